//! How ranks find each other: every pair that needs one has one connection, which stays over generations; the lower rank dials. Owns the
//! endpoint, the connections and the streams that peers open before this rank has heard of their generation; moves no values.
//!
//! M1: a connection is used only for the rank that its certificate names, and that rank is of this job.
//! M2: whoever else connects is refused with a code, and counted; nodes, or ranks that learn, are let in where there is a door for them. M3: a stream of a generation that is over here is stopped and counted.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stoke_protocol::identity::{Credentials, Subject};
use stoke_protocol::ids::Term;
use stoke_protocol::message::peer::{Machine, Opening, Proposal, Standing};
use stoke_protocol::message::rank::{Member, RankId};
use stoke_protocol::spec::RANKS_MAX;
use stoke_protocol::transport::{
    Accepted, BulkReceiver, BulkSender, CloseCode, Connection, Endpoint, Io, Settings, TransportError,
};
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout_at};

use super::error::ExchangeError;
use super::link::Counters;
use super::machine;
use super::tcp::{Tcp, UseTcp, Way};

/// From a membership to its mesh. A rank that is slower than this to answer its first packet is broken; the coordinator replaces it.
pub const CONNECT_MAX: Duration = Duration::from_secs(30);

/// Between two attempts to reach a peer that refused or was silent.
const RETRY: Duration = Duration::from_millis(200);

/// Ranks that may be connected at a time: those of a generation, and the replaced ones that are still on their way out.
const PEERS_MAX: usize = 4 * RANKS_MAX as usize;

/// Connections of nodes that wait to be looked at.
const VISITORS_MAX: usize = 256;

/// A rank's endpoint with its connections. It listens from the bind on: its address goes to the coordinator, memberships come back.
pub struct Mesh {
    shared: Arc<Shared>,
    address: SocketAddr,
    accepting: AbortHandle,
    machine: Option<Machine>,
    tcp: Tcp,
}

struct Shared {
    endpoint: Endpoint,
    own: RankId,
    counters: Arc<Counters>,
    known: Mutex<Known>,
    /// A connection or a stream has come, or one is gone.
    changed: Notify,
    /// Where connections of nodes go.
    door: Mutex<Option<mpsc::Sender<Connection>>>,
}

#[derive(Default)]
struct Known {
    peers: BTreeMap<RankId, Peer>,
    /// The newest term that this rank has entered (M3).
    entered: Term,
}

/// Another rank.
struct Peer {
    connection: Connection,
    /// Its stream of the newest generation that it has opened one for.
    stream: Option<(Standing, BulkReceiver)>,
    /// Shards of its state that it gives to this rank.
    states: Vec<Incoming>,
    /// Its newest one of how to go on while the coordinator is away.
    proposal: Option<Proposal>,
    reading: AbortHandle,
}

/// A shard of a peer's state that is about to arrive.
pub struct Incoming {
    pub from: RankId,
    pub opening: Opening,
    pub stream: BulkReceiver,
}

/// Both directions of a pair in one generation.
pub struct Pair {
    pub peer: RankId,
    /// Where the peer stands.
    pub standing: Standing,
    pub sender: BulkSender,
    pub receiver: BulkReceiver,
    /// For the values of the generation, if they do not go by the two: with the connection of the mesh, which says who is there.
    pub tcp: Option<(Way, Connection)>,
}

impl Mesh {
    /// Binds a port of `ip` for the rank that the credentials name.
    pub fn bind(io: &Io, ip: IpAddr, credentials: Credentials) -> Result<Self, ExchangeError> {
        let bind_error = |error| ExchangeError::Bind(Arc::new(error));
        let Subject::Rank { job, generation, rank } = credentials.identity().subject else {
            return Err(ExchangeError::NotARank { found: credentials.identity().to_string() });
        };
        let own = RankId { job, generation, rank };
        let bind = SocketAddr::new(ip, 0);
        let endpoint = Endpoint::server(io, bind, Settings::bulk(), credentials.clone()).map_err(bind_error)?;
        let address = endpoint.local_addr().map_err(bind_error)?;
        let tcp = Tcp::new(io, own, address, credentials);
        let (known, changed) = (Mutex::default(), Notify::new());
        let (counters, door) = (Arc::default(), Mutex::default());
        let shared = Arc::new(Shared { endpoint, own, counters, known, changed, door });
        let accepting = shared.endpoint.io().spawn(shared.clone().accept()).abort_handle();
        Ok(Self { shared, address, accepting, machine: machine::here(), tcp })
    }

    /// Shares memory with ranks that name the same machine, in the place of the one that it is on; with none, the exchange goes over the network.
    pub fn on_machine(self, machine: Option<Machine>) -> Self {
        let mut mesh = self;
        mesh.machine = machine;
        mesh
    }

    /// When values go by TCP, in the place of where it is faster.
    pub fn using_tcp(self, choice: UseTcp) -> Self {
        let mut mesh = self;
        mesh.tcp.choose(choice);
        mesh
    }

    pub(super) fn tcp(&self) -> &Tcp {
        &self.tcp
    }

    pub(super) fn machine(&self) -> Option<Machine> {
        self.machine
    }

    /// Where peers reach this rank.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn own(&self) -> RankId {
        self.shared.own
    }

    /// From here on nodes may connect: their gateways ask this rank. Of a rank that plays environments, those that learn.
    pub fn open_door(&self) -> mpsc::Receiver<Connection> {
        let (enter, entered) = mpsc::channel(VISITORS_MAX);
        *self.shared.door.lock().unwrap_or_else(PoisonError::into_inner) = Some(enter);
        entered
    }

    /// A connection of one's own to a rank that plays environments. Tries until it is there or `CONNECT_MAX` is over.
    pub(crate) async fn call(&self, peer: &Member) -> Result<Connection, ExchangeError> {
        self.shared.dial(peer, Instant::now() + CONNECT_MAX).await
    }

    pub(crate) fn io(&self) -> &Io {
        self.shared.endpoint.io()
    }

    pub(super) fn counters(&self) -> &Arc<Counters> {
        &self.shared.counters
    }

    /// From here on streams of older generations are stopped.
    pub(crate) fn enter(&self, term: Term) {
        self.tcp.enter(term);
        let mut known = self.shared.known();
        known.entered = known.entered.max(term);
        let entered = known.entered;
        for peer in known.peers.values_mut() {
            let stale = peer.stream.take_if(|(standing, _)| standing.term < entered);
            stale.into_iter().for_each(|(_, stream)| self.shared.stale(stream));
        }
    }

    /// Meets one rank of the generation: a connection, a stream each way. Tries until `deadline`.
    pub(crate) async fn meet(
        &self,
        peer: &Member,
        standing: Standing,
        deadline: Instant,
    ) -> Result<Pair, ExchangeError> {
        let given = standing.term.ballot == 0;
        loop {
            if !given && !self.lives(peer.id) {
                // Those who went on without the coordinator had a connection: it is lost, and they are to agree anew.
                return Err(ExchangeError::PeerLost { peer: peer.id, source: Arc::new(TransportError::Ended) });
            }
            let connection = self.shared.connection(peer, deadline).await?;
            let met = self.shared.open(peer, &connection, standing);
            match timeout_at(deadline, met).await {
                Ok(Ok((sender, standing, receiver))) => {
                    return Ok(Pair { peer: peer.id, standing, sender, receiver, tcp: None });
                }
                Ok(Err(error)) => tracing::debug!(own = %self.own(), peer = %peer.id, %error, "peer not met yet"),
                Err(_) => return Err(ExchangeError::Absent { peer: peer.id, own: self.address, within: CONNECT_MAX }),
            }
            // The connection broke: the pair makes another one.
            sleep(RETRY).await;
        }
    }

    /// The connection to a rank that was met.
    pub(super) fn connection(&self, peer: RankId) -> Option<Connection> {
        self.shared.known().peers.get(&peer).map(|peer| peer.connection.clone())
    }

    /// Whether the connection to a rank stands, as far as is known.
    pub(super) fn lives(&self, peer: RankId) -> bool {
        self.connection(peer).is_some_and(|connection| connection.close_reason().is_none())
    }

    /// The newest term that this rank has entered, and the newest proposal of each peer.
    pub(super) fn proposals(&self) -> (Term, Vec<(RankId, Proposal)>) {
        let known = self.shared.known();
        let proposals = known.peers.iter().filter_map(|(id, peer)| Some((*id, peer.proposal.clone()?)));
        (known.entered, proposals.collect())
    }

    /// Done when a connection, a stream or a proposal has come, or one is gone, since the call.
    pub(super) fn changed(&self) -> tokio::sync::futures::Notified<'_> {
        self.shared.changed.notified()
    }

    /// The next shard of a peer's state in a generation; those of other generations are stopped.
    pub(super) async fn next_state(&self, term: Term) -> Incoming {
        loop {
            let changed = self.shared.changed.notified();
            if let Some(incoming) = self.shared.take_state(term) {
                return incoming;
            }
            changed.await;
        }
    }

    /// Ends every connection in order; what was sent and not yet received is lost.
    pub async fn close(self) {
        self.accepting.abort();
        self.shared.endpoint.close(CloseCode::Done, "this rank has ended").await;
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.accepting.abort();
        self.shared.known().peers.values().for_each(|peer| peer.reading.abort());
    }
}

impl Shared {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stale(&self, stream: BulkReceiver) {
        self.counters.stale_refused.fetch_add(1, Ordering::Relaxed);
        stream.stop(CloseCode::Superseded);
    }

    /// Whoever connects, for as long as the mesh lives.
    async fn accept(self: Arc<Self>) {
        while let Some(accepted) = self.endpoint.accept().await {
            let Accepted::Session(connection) = accepted else { continue };
            if let Some(peer) = self.admit(&connection) {
                self.keep(peer, connection);
            }
        }
    }

    /// The rank behind a connection if it may dial this one; otherwise it is closed (M1, M2).
    fn admit(&self, connection: &Connection) -> Option<RankId> {
        let Subject::Rank { job, generation, rank } = connection.peer().subject else {
            self.visit(connection);
            return None;
        };
        let theirs = RankId { job, generation, rank };
        if job != self.own.job {
            self.counters.stale_refused.fetch_add(1, Ordering::Relaxed);
            tracing::info!(own = %self.own, %theirs, "refused a rank of another job");
            connection.close(CloseCode::WrongRole, &format!("this is {}, you are {theirs}", self.own));
            return None;
        }
        if self.own.rank.is_rollout() {
            self.let_in(connection);
            return None;
        }
        if theirs >= self.own {
            connection.close(CloseCode::WrongRole, "the lower rank dials the higher one");
            return None;
        }
        let known = self.known();
        if known.peers.len() >= PEERS_MAX && !known.peers.contains_key(&theirs) {
            connection.close(CloseCode::TooSlow, "too many ranks are connected");
            return None;
        }
        Some(theirs)
    }

    /// Somebody who is no rank (M2).
    fn visit(&self, connection: &Connection) {
        match &connection.peer().subject {
            Subject::Node(_) if !self.own.rank.is_rollout() => self.let_in(connection),
            _ => connection.close(CloseCode::WrongRole, "ranks only"),
        }
    }

    fn let_in(&self, connection: &Connection) {
        match self.door.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            Some(door) if door.try_send(connection.clone()).is_ok() => {}
            Some(_) => connection.close(CloseCode::TooSlow, "this rank takes nobody in at the moment"),
            None => connection.close(CloseCode::WrongRole, "ranks only"),
        }
    }

    /// A newer connection of a rank replaces the one before: it dials again only when it gave that one up.
    fn keep(self: &Arc<Self>, peer: RankId, connection: Connection) {
        // Locked before the reading begins: the peer's stream may be here already, and one of a peer that is not known is dropped.
        let mut known = self.known();
        let reading = self.endpoint.io().spawn(self.clone().read(peer, connection.clone())).abort_handle();
        let (stream, states, proposal) = (None, Vec::new(), None);
        let before = known.peers.insert(peer, Peer { connection, stream, states, proposal, reading });
        drop(known);
        if let Some(before) = before {
            before.reading.abort();
            before.connection.close(CloseCode::Superseded, "another connection of yours has come");
        }
        self.changed.notify_waiters();
    }

    /// Takes the streams that a peer opens, until its connection is over.
    async fn read(self: Arc<Self>, peer: RankId, connection: Connection) {
        let error = loop {
            let opened = async {
                let mut stream = connection.accept_bulk().await?;
                let opening = stream.read_header::<Opening>().await?.ok_or(TransportError::Truncated)?;
                Ok::<_, TransportError>((opening, stream))
            };
            match opened.await {
                Ok((opening, stream)) => self.opened(peer, opening, stream),
                // A stream that was given up at once; the connection lives.
                Err(_) if connection.close_reason().is_none() => {}
                Err(error) => break error,
            }
        };
        tracing::debug!(own = %self.own, %peer, %error, "connection of a peer is over");
        let mut known = self.known();
        if known.peers.get(&peer).is_some_and(|found| found.connection.close_reason().is_some()) {
            known.peers.remove(&peer);
        }
        drop(known);
        self.changed.notify_waiters();
    }

    fn opened(&self, from: RankId, opening: Opening, stream: BulkReceiver) {
        let mut known = self.known();
        let entered = known.entered;
        let Some(peer) = known.peers.get_mut(&from) else { return };
        match opening {
            Opening::Exchange(standing) if standing.term < entered => self.stale(stream),
            Opening::Exchange(standing) => {
                let before = peer.stream.replace((standing, stream));
                before.into_iter().for_each(|(_, stream)| self.stale(stream));
            }
            Opening::State { term, .. } if term < entered => self.stale(stream),
            Opening::State { .. } => {
                peer.states.retain(|state| state.opening.term() >= entered);
                peer.states.push(Incoming { from, opening, stream });
            }
            Opening::Proposal(proposal) => {
                let newer = peer.proposal.as_ref().is_none_or(|before| before.term < proposal.term);
                peer.proposal = if newer { Some(proposal) } else { peer.proposal.take() };
            }
        }
        drop(known);
        self.changed.notify_waiters();
    }

    /// The connection to a rank: this one's to dial, or to wait for.
    async fn connection(self: &Arc<Self>, peer: &Member, deadline: Instant) -> Result<Connection, ExchangeError> {
        let within = CONNECT_MAX;
        loop {
            let changed = self.changed.notified();
            let found = self.known().peers.get(&peer.id).map(|found| found.connection.clone());
            if let Some(connection) = found.filter(|connection| connection.close_reason().is_none()) {
                return Ok(connection);
            }
            if self.own < peer.id {
                let connection = self.dial(peer, deadline).await?;
                self.keep(peer.id, connection);
                continue;
            }
            let absent = || ExchangeError::Absent { peer: peer.id, own: self.own_address(), within };
            timeout_at(deadline, changed).await.map_err(|_| absent())?;
        }
    }

    fn own_address(&self) -> SocketAddr {
        self.endpoint.local_addr().unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)))
    }

    async fn dial(&self, peer: &Member, deadline: Instant) -> Result<Connection, ExchangeError> {
        let Member { id, address } = *peer;
        // TLS compares the peer's certificate with this subject (M1).
        let expected = Subject::Rank { job: id.job, generation: id.generation, rank: id.rank };
        let mut last = TransportError::NoAnswer { address, after: CONNECT_MAX };
        loop {
            match timeout_at(deadline, self.endpoint.connect(address, &expected)).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(error)) => {
                    tracing::debug!(own = %self.own, peer = %id, %address, %error, "peer not reached yet");
                    last = error;
                }
                Err(_) => {
                    let source = Arc::new(last);
                    return Err(ExchangeError::Unreachable { peer: id, address, within: CONNECT_MAX, source });
                }
            }
            sleep(RETRY).await;
        }
    }

    /// Opens this rank's stream of a generation and waits for the peer's. A peer that has not heard of the generation yet opens it then.
    async fn open(
        &self,
        peer: &Member,
        connection: &Connection,
        standing: Standing,
    ) -> Result<(BulkSender, Standing, BulkReceiver), TransportError> {
        let mut sender = connection.open_bulk().await?;
        sender.write_header(&Opening::Exchange(standing)).await?;
        loop {
            let changed = self.changed.notified();
            if let Some((theirs, receiver)) = self.take_stream(peer.id, standing.term) {
                return Ok((sender, theirs, receiver));
            }
            if connection.close_reason().is_some() {
                return Err(TransportError::Ended);
            }
            changed.await;
        }
    }

    fn take_stream(&self, peer: RankId, term: Term) -> Option<(Standing, BulkReceiver)> {
        self.known().peers.get_mut(&peer)?.stream.take_if(|(standing, _)| standing.term == term)
    }

    fn take_state(&self, term: Term) -> Option<Incoming> {
        let mut known = self.known();
        known.peers.values_mut().find_map(|peer| {
            let at = peer.states.iter().position(|state| state.opening.term() == term)?;
            Some(peer.states.swap_remove(at))
        })
    }
}
