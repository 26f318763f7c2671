//! Connections by TCP beside those of the mesh: where the path to a peer carries small packets only, the values of a generation go over one of these, and the
//! mesh's connection says who is there. Owns the port, the connections that came and are not used yet, and the choice.
//!
//! M4: values of a generation go by TCP only between two ranks that both know it: who dials says so on the mesh's stream, and the peer has the connection, from
//! that rank by its certificate and of that generation by its first header, before the generation stands.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoke_protocol::identity::{Credentials, Subject};
use stoke_protocol::ids::Term;
use stoke_protocol::message::peer::ByTcp;
use stoke_protocol::message::rank::{Member, RankId};
use stoke_protocol::spec::RANKS_MAX;
use stoke_protocol::transport::{BulkListener, BulkTcp, Io, Knock, PathMtu, TcpReceiver, TcpSender, TransportError};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

/// To connect, shake hands and be taken. Where a firewall drops it, the first generation waits so long, and later ones do not try for a while.
const DIAL_MAX: Duration = Duration::from_secs(2);

/// After a machine was not reached, or a connection broke that the mesh's outlived.
const CLOSED_FOR: Duration = Duration::from_secs(300);

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
    closed: Arc<Closed>,
}

/// Machines with whom TCP does not work, and since when.
#[derive(Default)]
struct Closed(Mutex<BTreeMap<IpAddr, Instant>>);

/// A connection that carries the values of a generation.
pub struct Way {
    pub sender: TcpSender,
    pub receiver: TcpReceiver,
    ip: IpAddr,
    closed: Arc<Closed>,
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
        let (choice, listening) = (UseTcp::WhereFaster, OnceLock::new());
        let (io, came, closed) = (io.clone(), Arc::default(), Arc::default());
        Self { own, io, credentials, address, choice, listening, came, closed }
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

    /// A rank that is not to be reached by TCP for now, because it was not.
    pub fn is_closed(&self, peer: &Member) -> bool {
        self.closed.has(peer.address.ip())
    }

    /// What came for generations before this one is not wanted any more.
    pub fn enter(&self, term: Term) {
        self.came.forget_before(term);
    }

    /// A connection for the values of a generation; none if the mesh's is as good, or the peer is not reached.
    pub async fn dial(&self, peer: &Member, port: u16, term: Term) -> Option<Way> {
        let ip = peer.address.ip();
        let is_better = match self.choice {
            UseTcp::WhereFaster => PathMtu::towards(ip) == PathMtu::Ethernet,
            UseTcp::Always => true,
            UseTcp::Never => false,
        };
        if !is_better || self.closed.has(ip) {
            return None;
        }
        let RankId { job, generation, rank } = peer.id;
        let (credentials, expected) = (self.credentials.clone(), Subject::Rank { job, generation, rank });
        // On the thread where it is used afterwards.
        let dialled = self.io.spawn(async move {
            let dial = async {
                let mut dialled = BulkTcp::dial(&credentials, SocketAddr::new(ip, port), &expected, DIAL_MAX).await?;
                dialled.sender.write(&ByTcp { term }, Bytes::new()).await?;
                // In TLS 1.3 a client hears last whether its certificate is good.
                let taken = dialled.receiver.read_header::<ByTcp>().await?;
                taken.filter(|taken| taken.term == term).map(|_| dialled).ok_or(TransportError::Ended)
            };
            let late = TransportError::Deadline { what: "connect by TCP", after: DIAL_MAX };
            timeout(DIAL_MAX, dial).await.map_err(|_| late)?
        });
        // A generation that is given up takes it along.
        let _dialling = Dialling(dialled.abort_handle());
        match dialled.await.unwrap_or(Err(TransportError::Ended)) {
            Ok(dialled) => Some(self.way(dialled, ip)),
            Err(error) => {
                tracing::warn!(own = %self.own, peer = %peer.id, %ip, port, %error, "not reached by TCP: values go by QUIC, which costs more where packets are small");
                self.closed.put(ip);
                None
            }
        }
    }

    fn way(&self, connection: BulkTcp, ip: IpAddr) -> Way {
        let BulkTcp { sender, receiver } = connection;
        Way { sender, receiver, ip, closed: self.closed.clone() }
    }

    /// The connection that a peer has made for a generation.
    pub async fn take(&self, peer: &Member, term: Term) -> Result<Way, TransportError> {
        let come = async {
            loop {
                let changed = self.came.changed.notified();
                if let Some(connection) = self.came.take(peer.id, term) {
                    return connection;
                }
                changed.await;
            }
        };
        let late = TransportError::Deadline { what: "wait for a peer's connection by TCP", after: COME_MAX };
        let come = timeout(COME_MAX, come).await.map_err(|_| late)?;
        Ok(self.way(come, peer.address.ip()))
    }
}

impl Way {
    /// It broke while the mesh's connection lives: for a while, values go by that.
    pub fn breaker(&self) -> impl FnOnce() + use<> {
        let (ip, closed) = (self.ip, self.closed.clone());
        move || closed.put(ip)
    }
}

impl Closed {
    fn put(&self, ip: IpAddr) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(ip, Instant::now());
    }

    fn has(&self, ip: IpAddr) -> bool {
        let closed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        closed.get(&ip).is_some_and(|since| since.elapsed() < CLOSED_FOR)
    }
}

struct Dialling(AbortHandle);

impl Drop for Dialling {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Came {
    /// The newest generation counts, not what comes last.
    fn put(&self, peer: RankId, term: Term, connection: BulkTcp) {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if connections.get(&peer).is_none_or(|(of, _)| *of <= term) {
            connections.insert(peer, (term, connection));
        }
        drop(connections);
        self.changed.notify_waiters();
    }

    fn forget_before(&self, term: Term) {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, (of, _)| *of >= term);
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
        let accepted = listener.accept().await;
        while waiting.try_join_next().is_some() {}
        match accepted {
            Ok(knock) if waiting.len() < WAITING_MAX => drop(waiting.spawn(admit(knock, own, came.clone()))),
            Ok(_) => tracing::debug!(%own, "too many connections by TCP wait for their first word"),
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
        connection.sender.write(&ByTcp { term }, Bytes::new()).await?;
        Ok((peer, term, connection))
    };
    match admitted.await {
        Ok((peer, term, connection)) => came.put(peer, term, connection),
        Err(error) => tracing::debug!(%own, %error, "a connection by TCP was not taken"),
    }
}
