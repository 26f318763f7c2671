//! The gateway: HTTP in front of the heads of serving gangs, in every agent's process. Owns HTTP, routing, replay and limits; knows no model file,
//! no coordinator and no job but what its routes say. Wiring; the parts say what they hold (G1 to G6).

mod asking;
mod auth;
mod body;
mod door;
mod error;
mod heads;
mod inference;
mod metrics;
mod openai;
mod place;
mod ready;
mod received;
mod routes;
mod secrets;
mod service;
mod shadow;
mod tally;
#[cfg(test)]
mod tests;
mod tls;
pub mod untrusted;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use stoke_protocol::ids::LogIndex;
use stoke_protocol::message::load::Demand;
use stoke_protocol::message::serve::Routes;
use stoke_protocol::transport::Endpoint;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use auth::Token;
pub use secrets::Who;
pub use tls::{Tls, TlsError};

use asking::{Desk, Patience};
use secrets::Secrets;
use service::Service;

/// Connections that wait in the kernel.
const WAITING_MAX: u32 = 1024;

/// How a gateway runs.
#[derive(Clone, Debug)]
pub struct Options {
    pub listen: SocketAddr,
    pub who: Who,
    /// None: plain HTTP.
    pub tls: Option<Tls>,
    /// A request waits so long for a head that is coming up.
    pub wait: Duration,
    /// An answer that has begun waits so long for a head to go on with it: a gang loads its model again in this time.
    pub replay_wait: Duration,
    /// A head that lives and says nothing to a question for so long is given up.
    pub silence: Duration,
    /// Connections of clients; more wait in the kernel.
    pub connections_max: usize,
}

impl Options {
    /// The defaults.
    pub fn new(listen: SocketAddr) -> Self {
        Self {
            listen,
            who: Who::Machine,
            tls: None,
            wait: Duration::from_secs(10),
            replay_wait: Duration::from_secs(120),
            // As long as OpenAI's clients wait.
            silence: Duration::from_secs(600),
            connections_max: 1024,
        }
    }
}

/// Why a gateway does not start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    #[error(
        "listen on {address} without tokens: everybody who reaches it could use the models; configure tokens, or listen on 127.0.0.1"
    )]
    Exposed { address: SocketAddr },
    #[error("listen on TCP {address}: is another process listening there? (ss -tlnp shows it)")]
    Bind {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("{0}")]
    Tokens(String),
    #[error("offer TLS")]
    Tls(#[from] TlsError),
}

/// A running gateway. Dropping it ends its connections at once.
pub struct Gateway {
    address: SocketAddr,
    service: Arc<Service>,
    stopping: watch::Sender<bool>,
    serving: JoinHandle<()>,
}

/// What a gateway has done since its start, and what is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// HTTP requests and gRPC calls.
    pub requests: u64,
    /// Those of them that were told of a problem before any of an answer.
    pub refused: u64,
    /// Questions to heads.
    pub questions: u64,
    /// Questions that went on at another head, or once more at the same one.
    pub replays: u64,
    /// Tokens that heads have made.
    pub tokens: u64,
    /// Frames of heads that broke the rules.
    pub broken: u64,
    /// Questions that are at a head now.
    pub running: u64,
    /// Copies of questions to shadows, and those that had no answer.
    pub copies: u64,
    pub copies_failed: u64,
}

impl Gateway {
    /// Binds, and serves until it is stopped or dropped. `endpoint` dials heads: a client with the node's credentials and `Settings::bulk()`.
    pub async fn start(options: Options, endpoint: Endpoint) -> Result<Self, GatewayError> {
        let address = options.listen;
        let secrets = Arc::new(Secrets::open(options.who, options.tls)?);
        if secrets.tokens().is_empty() && !address.ip().is_loopback() {
            return Err(GatewayError::Exposed { address });
        }
        let bind_error = |source| GatewayError::Bind { address, source };
        let listener = bind(address).map_err(bind_error)?;
        let address = listener.local_addr().map_err(bind_error)?;
        let Options { wait, replay_wait, silence, .. } = options;
        let desk = Arc::new(Desk::new(endpoint, Patience { wait, replay_wait, silence }));
        let service = Arc::new(Service::new(desk, secrets.clone()));
        let (stopping, stop) = watch::channel(false);
        let served = service.clone();
        let serving = tokio::spawn(async move {
            // It looks for as long as somebody is served.
            let looking = tokio::spawn(secrets.watch());
            door::serve(listener, served, options.connections_max, stop).await;
            looking.abort();
        });
        Ok(Self { address, service, stopping, serving })
    }

    /// Where clients reach it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the heads are. The newest counts; older ones change nothing.
    pub fn routes(&self, routes: Routes) {
        self.service.desk.renew(routes);
    }

    pub fn counts(&self) -> Counts {
        self.service.counts()
    }

    /// For heartbeats.
    pub fn watch(&self) -> Watch {
        Watch(self.service.desk.clone())
    }

    /// Takes no more requests, and lets those that run end for a few seconds.
    pub async fn stop(mut self) {
        self.stopping.send_replace(true);
        let _ = (&mut self.serving).await;
    }
}

/// What the coordinator is told of a gateway, again and again.
#[derive(Clone)]
pub struct Watch(Arc<Desk>);

impl Watch {
    /// The newest routes that it goes by, and its questions at jobs that leave.
    pub fn leaving(&self) -> (LogIndex, u32) {
        self.0.table().leaving()
    }

    /// Models with questions that no head has now, or that were refused since the last call.
    pub fn demand(&self) -> Vec<Demand> {
        self.0.tallies.demand()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// At once, so that a port in use is an error of the start.
fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(WAITING_MAX)
}
