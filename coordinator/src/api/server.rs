//! The coordinator's side of the API: HTTPS, where whoever asks has shown a user's certificate of this cluster. Owns the limits of connections; what is allowed is decided where
//! it is for every other question.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use stoke_protocol::identity::{Credentials, Subject, web_caller, web_config};
use stoke_protocol::message::client::Request;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::error::ApiError;
use super::{Ask, Asked, router};
use crate::actors::conversation::Conversation;
use crate::actors::door::Door;

/// Connections at a time: each costs memory and a file; more wait in the kernel.
const CONNECTIONS_MAX: usize = 256;
/// Of these, one address has at most so many, and one user: nobody keeps the others out alone.
const OF_AN_ADDRESS_MAX: u32 = 128;
const OF_A_USER_MAX: u32 = 64;
/// A client has so long for its handshake, and for the head of each request.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
const HEAD_MAX: Duration = Duration::from_secs(30);
/// The server's certificate lives so long, and is made anew at half of it.
const CERTIFICATE_LIFE: Duration = Duration::from_secs(7 * 24 * 3_600);
/// When the process has no file left for another connection.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What the API is served with.
pub(crate) struct Api {
    pub listener: TcpListener,
    /// Names and addresses that clients may reach it by.
    pub names: Vec<String>,
    pub credentials: Credentials,
}

/// How many connections each has.
#[derive(Clone)]
struct Shares<K: Ord> {
    held: Arc<Mutex<BTreeMap<K, u32>>>,
    most: u32,
}

/// One of them, given back when it is dropped.
struct Share<K: Ord> {
    of: Shares<K>,
    whose: K,
}

impl<K: Ord + Clone> Shares<K> {
    fn new(most: u32) -> Self {
        Self { held: Arc::default(), most }
    }

    /// None: it has as many as one may have.
    fn take(&self, whose: K) -> Option<Share<K>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.entry(whose.clone()).or_default();
        *count = Some(*count + 1).filter(|count| *count <= self.most)?;
        Some(Share { of: self.clone(), whose })
    }
}

impl<K: Ord> Drop for Share<K> {
    fn drop(&mut self) {
        let mut held = self.of.held.lock().unwrap_or_else(PoisonError::into_inner);
        let left = held.get_mut(&self.whose).map_or(0, |count| {
            *count -= 1;
            *count
        });
        if left == 0 {
            held.remove(&self.whose);
        }
    }
}

/// A user who is connected.
struct Caller {
    door: Door,
    subject: Subject,
}

impl Ask for Caller {
    fn ask(&self, request: Request) -> Asked {
        let conversation = Conversation { door: self.door.clone(), caller: self.subject.clone() };
        let (replies, _ended) = conversation.begin(request);
        Box::pin(std::future::ready(Ok(replies)))
    }
}

/// Serves until it is aborted.
pub(crate) async fn serve(api: Api, door: Door) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let (addresses, users) = (Shares::new(OF_AN_ADDRESS_MAX), Shares::new(OF_A_USER_MAX));
    let mut acceptor: Option<(TlsAcceptor, Instant)> = None;
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let (stream, remote) = match api.listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection to the API was not taken");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let Some(share) = addresses.take(remote.ip()) else { continue };
        acceptor.take_if(|(_, made)| made.elapsed() > CERTIFICATE_LIFE / 2);
        let acceptor = match &acceptor {
            Some((acceptor, _)) => acceptor.clone(),
            None => match web_config(&door.authority, &api.credentials, &api.names, CERTIFICATE_LIFE) {
                Ok(config) => acceptor.insert((TlsAcceptor::from(config), Instant::now())).0.clone(),
                Err(error) => {
                    tracing::error!(%error, "a certificate for the API cannot be made");
                    continue;
                }
            },
        };
        let (door, users) = (door.clone(), users.clone());
        tokio::spawn(async move {
            converse((stream, remote), acceptor, door, &users).await;
            drop((place, share));
        });
    }
}

async fn converse(
    (stream, remote): (TcpStream, SocketAddr),
    acceptor: TlsAcceptor,
    door: Door,
    users: &Shares<String>,
) {
    // What goes wrong here is the client's own matter.
    let Ok(Ok(stream)) = timeout(HANDSHAKE_MAX, acceptor.accept(stream)).await else { return };
    let caller = web_caller(stream.get_ref().1.peer_certificates());
    let share = match &caller {
        Some((Subject::User { name, .. }, _)) => users.take(name.clone()),
        Some(_) | None => None,
    };
    let (router, until) = match caller {
        Some((Subject::User { name, .. }, _)) if share.is_none() => {
            tracing::info!(%remote, user = name, "a user has too many connections to the API");
            return;
        }
        Some((subject @ Subject::User { .. }, until)) => (router(Arc::new(Caller { door, subject })), until),
        Some(_) | None => {
            tracing::info!(%remote, "a client of the API has shown no user's certificate");
            let refuse = axum::Router::new().fallback(async || ApiError::unauthenticated());
            (refuse, SystemTime::now() + HEAD_MAX)
        }
    };
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_MAX);
    let conversation = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // Its certificate may not outlast its life in a connection that stays.
    let left = until.duration_since(SystemTime::now()).unwrap_or_default();
    let _ended = timeout(left, conversation).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_who_has_its_share_waits_for_itself_and_for_nobody_else() {
        let shares = Shares::new(2);
        let held = ["ada", "ada", "eve"].map(|whose| shares.take(whose).expect("there is room"));
        assert!(shares.take("ada").is_none());
        drop(held);
        assert!(shares.held.lock().unwrap().is_empty(), "nothing is kept of those who are gone");
        assert!(shares.take("ada").is_some());
    }
}
