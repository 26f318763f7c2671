//! How the ranks of one generation find each other: every pair has one connection, the lower rank dials. Owns the endpoint and the admission
//! of peers; moves no values.
//!
//! M1: a connection is used only if its certificate names exactly the expected job, generation and rank.
//! M2: whoever else connects is refused with a code, and counted if it is of another generation.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use stoke_protocol::identity::{Credentials, Subject};
use stoke_protocol::ids::Rank;
use stoke_protocol::message::rank::{PeerAddress, RankId};
use stoke_protocol::transport::{Accepted, CloseCode, Connection, Endpoint, Io, Settings, TransportError};
use tokio::time::{Instant, sleep, timeout_at};

use super::all_reduce::{Exchange, Shape};
use super::error::ExchangeError;
use super::link::Counters;

/// From the peers' addresses to a whole mesh. A rank that is slower than this to answer its first packet is broken; the coordinator starts
/// another generation.
pub const CONNECT_MAX: Duration = Duration::from_secs(30);

/// Between two attempts to reach a peer that refused or was silent.
const RETRY: Duration = Duration::from_millis(200);

/// A rank's endpoint, bound before the peers are known: its address goes to the coordinator, the peers' addresses come back.
pub struct PeerEndpoint {
    endpoint: Endpoint,
    own: RankId,
    address: SocketAddr,
    counters: Arc<Counters>,
}

impl PeerEndpoint {
    /// Binds a port of `ip` for the rank that the credentials name.
    pub fn bind(io: &Io, ip: IpAddr, credentials: Credentials) -> Result<Self, ExchangeError> {
        let bind_error = |error| ExchangeError::Bind(Arc::new(error));
        let Subject::Rank { job, generation, rank } = credentials.identity().subject else {
            return Err(ExchangeError::NotARank { found: credentials.identity().to_string() });
        };
        let endpoint =
            Endpoint::server(io, SocketAddr::new(ip, 0), Settings::bulk(), credentials).map_err(bind_error)?;
        let address = endpoint.local_addr().map_err(bind_error)?;
        let own = RankId { job, generation, rank };
        Ok(Self { endpoint, own, address, counters: Arc::default() })
    }

    /// Where peers reach this rank.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connects to all other ranks: `peers` lists every rank of the generation once, in any order. Done when every pair has its connection,
    /// or with the first rank that could not be reached within [`CONNECT_MAX`]. Run it on any runtime.
    pub async fn connect(self, peers: &[PeerAddress], shape: Shape) -> Result<Exchange, ExchangeError> {
        let addresses = self.membership(peers)?;
        let deadline = Instant::now() + CONNECT_MAX;
        let (dialled, accepted) = tokio::try_join!(self.dial(&addresses, deadline), self.accept(deadline))?;
        let connections: BTreeMap<Rank, Connection> = dialled.into_iter().chain(accepted).collect();
        let refusing = self.endpoint.io().spawn(refuse_all(self.endpoint.clone(), self.own, self.counters.clone()));
        let exchange = Exchange::new(self.endpoint, self.own, connections, shape, self.counters);
        Ok(exchange.with_task(refusing.abort_handle()))
    }

    fn membership(&self, peers: &[PeerAddress]) -> Result<BTreeMap<Rank, SocketAddr>, ExchangeError> {
        let addresses: BTreeMap<Rank, SocketAddr> = peers.iter().map(|peer| (peer.rank, peer.address)).collect();
        let wrong = |reason: &str| ExchangeError::Membership { own: self.own.rank, reason: reason.to_owned() };
        if addresses.len() != peers.len() {
            return Err(wrong("a rank is listed twice"));
        }
        if addresses.keys().enumerate().any(|(index, rank)| rank.0 as usize != index) {
            return Err(wrong("ranks are not 0, 1, 2, ..."));
        }
        if !addresses.contains_key(&self.own.rank) {
            return Err(wrong("this rank is not among them"));
        }
        Ok(addresses)
    }

    /// Connects to every higher rank, all at once.
    async fn dial(
        &self,
        addresses: &BTreeMap<Rank, SocketAddr>,
        deadline: Instant,
    ) -> Result<Vec<(Rank, Connection)>, ExchangeError> {
        let higher = addresses.iter().filter(|(rank, _)| **rank > self.own.rank);
        futures_util::future::try_join_all(higher.map(|(rank, address)| self.dial_one(*rank, *address, deadline))).await
    }

    async fn dial_one(
        &self,
        rank: Rank,
        address: SocketAddr,
        deadline: Instant,
    ) -> Result<(Rank, Connection), ExchangeError> {
        // TLS compares the peer's certificate with this subject (M1).
        let expected = Subject::Rank { job: self.own.job, generation: self.own.generation, rank };
        let mut last = TransportError::NoAnswer { address, after: CONNECT_MAX };
        loop {
            match timeout_at(deadline, self.endpoint.connect(address, &expected)).await {
                Ok(Ok(connection)) => return Ok((rank, connection)),
                Ok(Err(error)) => {
                    tracing::debug!(own = %self.own, %rank, %address, %error, "peer not reached yet");
                    last = error;
                }
                Err(_) => {
                    let source = Arc::new(last);
                    return Err(ExchangeError::Unreachable { rank, address, within: CONNECT_MAX, source });
                }
            }
            sleep(RETRY).await;
        }
    }

    /// Waits for every lower rank. A rank that dials again, because it gave up on its first attempt, replaces that attempt.
    async fn accept(&self, deadline: Instant) -> Result<BTreeMap<Rank, Connection>, ExchangeError> {
        let mut accepted = BTreeMap::new();
        while let Some(missing) = (0..self.own.rank.0).map(Rank).find(|rank| !accepted.contains_key(rank)) {
            let within = CONNECT_MAX;
            let absent = ExchangeError::Absent { rank: missing, own: self.address, within };
            let next = timeout_at(deadline, self.endpoint.accept()).await.map_err(|_| absent)?;
            match next.ok_or(ExchangeError::EndpointClosed)? {
                Accepted::Session(connection) => {
                    if let Some(rank) = admit(&connection, self.own, &self.counters) {
                        accepted.insert(rank, connection);
                    }
                }
                Accepted::Join(_) => tracing::debug!(own = %self.own, "a join attempt at a rank was dropped"),
            }
        }
        Ok(accepted)
    }
}

/// The rank behind a connection if it is a lower rank of this generation; otherwise it is closed (M1, M2).
fn admit(connection: &Connection, own: RankId, counters: &Counters) -> Option<Rank> {
    let Subject::Rank { job, generation, rank } = connection.peer().subject else {
        connection.close(CloseCode::WrongRole, "ranks only");
        return None;
    };
    if job != own.job || generation != own.generation {
        counters.stale_refused.fetch_add(1, Ordering::Relaxed);
        let theirs = RankId { job, generation, rank };
        tracing::info!(%own, %theirs, "refused a peer of another generation");
        connection.close(CloseCode::Superseded, &format!("this is {own}, you are {theirs}"));
        return None;
    }
    if rank >= own.rank {
        connection.close(CloseCode::WrongRole, "the lower rank dials the higher one");
        return None;
    }
    Some(rank)
}

/// Once the mesh stands nobody else belongs to it.
async fn refuse_all(endpoint: Endpoint, own: RankId, counters: Arc<Counters>) {
    while let Some(accepted) = endpoint.accept().await {
        let Accepted::Session(connection) = accepted else { continue };
        if admit(&connection, own, &counters).is_some() {
            connection.close(CloseCode::Superseded, "this rank is connected already");
        }
    }
}
