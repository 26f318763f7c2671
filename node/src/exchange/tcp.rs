//! Connections by TCP beside those of the mesh: where the path to a peer carries small packets only, the values of a generation go over one of these, and the
//! mesh's connection says who is there. Owns the port, the connections that came and are not used yet, and the choice.
//!
//! M4: values of a generation go by TCP only between two ranks that both know it: who dials says so on the mesh's stream, and the peer has the connection, from
//! that rank by its certificate and of that generation by its first header, before the generation stands.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use stoke_protocol::identity::{Credentials, Subject};
use stoke_protocol::ids::Term;
use stoke_protocol::message::peer::ByTcp;
use stoke_protocol::message::rank::{Member, RankId};
use stoke_protocol::spec::RANKS_MAX;
use stoke_protocol::transport::{BulkListener, BulkTcp, Io, Knock, PathMtu, TransportError};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

/// To connect and shake hands. Where a firewall drops it, the first generation waits so long, and later ones do not try.
const DIAL_MAX: Duration = Duration::from_secs(2);

/// From a peer's word that it has connected until the connection is here.
const COME_MAX: Duration = Duration::from_secs(5);

/// Connections that may wait for their first header; further ones are closed.
const WAITING_MAX: usize = 2 * RANKS_MAX as usize;

/// After an error of the listener, which is most often too many open files.
const RETRY: Duration = Duration::from_millis(200);

/// When values go by TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UseTcp {
    /// Where packets of the path are small.
    WhereFaster,
    Always,
    Never,
}

/// See the module.
pub struct Tcp {
    own: RankId,
    io: Io,
    credentials: Credentials,
    /// Of the rank's endpoint.
    address: SocketAddr,
    choice: UseTcp,
    /// The port and its task, from the first generation with values on; none inside if nobody can connect.
    listening: OnceLock<Option<(u16, AbortHandle)>>,
    came: Arc<Came>,
    /// Machines that could not be reached by TCP.
    closed: Mutex<BTreeSet<IpAddr>>,
}

/// The newest connection of each peer, with the generation that it is for.
#[derive(Default)]
struct Came {
    connections: Mutex<BTreeMap<RankId, (Term, BulkTcp)>>,
    changed: Notify,
}

impl Tcp {
    /// For a rank whose endpoint has this address.
    pub fn new(io: &Io, own: RankId, address: SocketAddr, credentials: Credentials) -> Self {
        let (choice, listening, came, closed) =
            (UseTcp::WhereFaster, OnceLock::new(), Arc::default(), Mutex::default());
        Self { own, io: io.clone(), credentials, address, choice, listening, came, closed }
    }

    pub fn choose(&mut self, choice: UseTcp) {
        self.choice = choice;
    }

    /// Where peers reach this rank, if it is to be reached by TCP at all: from the first call on it listens. The port has the number of the endpoint's, so that
    /// who opens ports need not know of two, or any if that one is taken.
    pub fn port(&self) -> Option<u16> {
        if self.choice == UseTcp::Never {
            return None;
        }
        let listen = || {
            let bind = |port| BulkListener::bind(&self.io, SocketAddr::new(self.address.ip(), port), &self.credentials);
            let listener = bind(self.address.port()).or_else(|_| bind(0));
            let listener =
                listener.inspect_err(|error| tracing::info!(own = %self.own, %error, "no exchange by TCP")).ok()?;
            let port = listener.port();
            Some((port, self.io.spawn(accept(listener, self.own, self.came.clone())).abort_handle()))
        };
        self.listening.get_or_init(listen).as_ref().map(|(port, _)| *port)
    }

    /// A connection for the values of a generation; none if the mesh's is as good, or the peer is not reached.
    pub async fn dial(&self, peer: &Member, port: u16, term: Term) -> Option<BulkTcp> {
        let ip = peer.address.ip();
        let is_better = match self.choice {
            UseTcp::WhereFaster => PathMtu::towards(ip) == PathMtu::Ethernet,
            UseTcp::Always => true,
            UseTcp::Never => false,
        };
        if !is_better || self.closed.lock().unwrap_or_else(PoisonError::into_inner).contains(&ip) {
            return None;
        }
        let RankId { job, generation, rank } = peer.id;
        let (credentials, expected) = (self.credentials.clone(), Subject::Rank { job, generation, rank });
        // On the thread where it is used afterwards.
        let dialled = self.io.spawn(async move {
            let mut dialled = BulkTcp::dial(&credentials, SocketAddr::new(ip, port), &expected, DIAL_MAX).await?;
            dialled.sender.write_header(&ByTcp { term }).await?;
            dialled.sender.flush().await?;
            Ok::<_, TransportError>(dialled)
        });
        match dialled.await.unwrap_or(Err(TransportError::Ended)) {
            Ok(dialled) => Some(dialled),
            Err(error) => {
                tracing::warn!(own = %self.own, peer = %peer.id, %ip, port, %error, "not reached by TCP: values go by QUIC, which costs more where packets are small");
                self.closed.lock().unwrap_or_else(PoisonError::into_inner).insert(ip);
                None
            }
        }
    }

    /// The connection that a peer has made for a generation.
    pub async fn take(&self, peer: RankId, term: Term) -> Result<BulkTcp, TransportError> {
        let come = async {
            loop {
                let changed = self.came.changed.notified();
                if let Some(connection) = self.came.take(peer, term) {
                    return connection;
                }
                changed.await;
            }
        };
        let late = TransportError::Deadline { what: "wait for a peer's connection by TCP", after: COME_MAX };
        timeout(COME_MAX, come).await.map_err(|_| late)
    }
}

impl Came {
    fn put(&self, peer: RankId, connection: (Term, BulkTcp)) {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).insert(peer, connection);
        self.changed.notify_waiters();
    }

    fn take(&self, peer: RankId, term: Term) -> Option<BulkTcp> {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections
            .get(&peer)
            .is_some_and(|(of, _)| *of == term)
            .then(|| connections.remove(&peer))
            .flatten()
            .map(|(_, connection)| connection)
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        self.listening.get().iter().copied().flatten().for_each(|(_, accepting)| accepting.abort());
    }
}

async fn accept(listener: BulkListener, own: RankId, came: Arc<Came>) {
    // They end with this task.
    let mut waiting = JoinSet::new();
    loop {
        while waiting.try_join_next().is_some() {}
        match listener.accept().await {
            Ok(knock) if waiting.len() < WAITING_MAX => drop(waiting.spawn(admit(knock, own, came.clone()))),
            Ok(_) => tracing::warn!(%own, "too many connections by TCP wait for their first word"),
            Err(error) => {
                tracing::debug!(%own, %error, "accept a connection by TCP");
                sleep(RETRY).await;
            }
        }
    }
}

/// M1 for connections by TCP.
async fn admit(knock: Knock, own: RankId, came: Arc<Came>) {
    let admitted = async {
        let (peer, mut connection) = knock.admit().await?;
        let Subject::Rank { job, generation, rank } = peer.subject else { return Err(TransportError::Ended) };
        let peer = RankId { job, generation, rank };
        if job != own.job || peer >= own {
            return Err(TransportError::Ended);
        }
        let header = timeout(COME_MAX, connection.receiver.read_header::<ByTcp>()).await;
        let silent = TransportError::Deadline { what: "wait for the first word", after: COME_MAX };
        let ByTcp { term } = header.map_err(|_| silent)??.ok_or(TransportError::Ended)?;
        Ok((peer, (term, connection)))
    };
    match admitted.await {
        Ok((peer, connection)) => came.put(peer, connection),
        Err(error) => tracing::debug!(%own, %error, "a connection by TCP was not taken"),
    }
}
