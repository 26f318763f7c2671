//! The gate between the network and a server's owner: nothing is handed over before the peer's certificate was checked against the protocol
//! it speaks, and nothing of a stranger is decoded but a join request (I30). Owns the limits on half-open handshakes.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use quinn::ServerConfig;
use quinn::crypto::rustls::HandshakeData;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::time::timeout;

use super::connection::Connection;
use super::endpoint::peer_leaf;
use super::error::{CloseCode, Closed, TransportError};
use super::frames::{FrameReceiver, FrameSender, StreamKind};
use super::io::WeakIo;
use super::settings::{PathMtu, Settings};
use super::{ALPN_CLUSTER, ALPN_JOIN, ALPN_PEER, HALF_OPEN_MAX, HALF_OPEN_PER_ADDRESS_MAX, HANDSHAKE_MAX};
use crate::codec::FrameCap;
use crate::identity::{Identity, Subject, leaf_expires_at, leaf_identity};
use crate::message::join::{JoinReply, JoinRequest};

/// From this many half-open handshakes of one address, or in all, a client must prove its address first (Retry): sources that are made up
/// cannot use up the slots of those that are not.
const RETRY_PER_ADDRESS: usize = 16;
const RETRY_TOTAL: usize = 128;

const OVERLOADED: &str = "too many connections wait to be served: try again in a moment";

/// Who came in.
#[derive(Debug)]
pub enum Accepted {
    /// A stranger with a token.
    Join(JoinAttempt),
    /// A member, by its certificate.
    Session(Connection),
}

/// A join request that waits for its answer. Dropping it closes the connection; the joiner sees "abandoned".
#[derive(Debug)]
pub struct JoinAttempt {
    request: JoinRequest,
    sender: FrameSender,
    quinn: quinn::Connection,
}

impl JoinAttempt {
    pub fn request(&self) -> &JoinRequest {
        &self.request
    }

    pub fn remote_address(&self) -> SocketAddr {
        self.quinn.remote_address()
    }

    /// Answers, waits until the joiner has the answer, and closes.
    pub async fn reply(mut self, reply: &JoinReply) -> Result<(), TransportError> {
        let answer = async {
            self.sender.send(reply).await?;
            self.sender.finish_delivered().await
        };
        let answered = timeout(HANDSHAKE_MAX, answer).await;
        self.quinn.close(CloseCode::Done.into(), b"join answered");
        match answered {
            // The joiner closes as soon as it has read the answer; that may overtake the acknowledgement.
            Ok(Err(TransportError::Closed(Closed::ByPeer { code: CloseCode::Done, .. }))) => Ok(()),
            Ok(delivered) => delivered,
            Err(_) => Err(TransportError::Deadline { what: "deliver the answer to a join", after: HANDSHAKE_MAX }),
        }
    }
}

/// Admits connections until its endpoint is closed.
pub(super) struct Gate {
    quinn: quinn::Endpoint,
    settings: Settings,
    configs: BTreeMap<PathMtu, Arc<ServerConfig>>,
    io: WeakIo,
    accepted: mpsc::Sender<Accepted>,
    half_open: HalfOpen,
}

impl Gate {
    pub(super) fn new(
        quinn: quinn::Endpoint,
        settings: Settings,
        configs: BTreeMap<PathMtu, Arc<ServerConfig>>,
        io: WeakIo,
        accepted: mpsc::Sender<Accepted>,
    ) -> Self {
        Self { quinn, settings, configs, io, accepted, half_open: HalfOpen::default() }
    }

    pub(super) async fn run(self) {
        let gate = Arc::new(self);
        while let Some(incoming) = gate.quinn.accept().await {
            let address = incoming.remote_address().ip().to_canonical();
            let (here, total) = gate.half_open.count(address);
            if here >= HALF_OPEN_PER_ADDRESS_MAX || total >= HALF_OPEN_MAX {
                incoming.refuse();
            } else if (here >= RETRY_PER_ADDRESS || total >= RETRY_TOTAL) && incoming.may_retry() {
                let _ = incoming.retry();
            } else {
                let slot = gate.half_open.enter(address);
                tokio::spawn(gate.clone().admit(incoming, slot));
            }
        }
    }

    /// One handshake and its verdict, within the deadline; the slot is free again at its end.
    async fn admit(self: Arc<Self>, incoming: quinn::Incoming, slot: Slot) {
        let remote = incoming.remote_address();
        match timeout(HANDSHAKE_MAX, self.handshake(incoming)).await {
            Ok(Some(accepted)) => self.hand_over(accepted),
            Ok(None) => {}
            Err(_) => tracing::debug!(%remote, "handshake took too long"),
        }
        drop(slot);
    }

    /// Never waits: a stranger that waited here would hold memory without a slot.
    fn hand_over(&self, accepted: Accepted) {
        let refuse = |accepted: Accepted| match accepted {
            Accepted::Join(attempt) => attempt.quinn.close(CloseCode::Overloaded.into(), OVERLOADED.as_bytes()),
            Accepted::Session(connection) => connection.close(CloseCode::Overloaded, OVERLOADED),
        };
        match self.accepted.try_send(accepted) {
            Ok(()) => {}
            Err(TrySendError::Full(accepted)) => refuse(accepted),
            Err(TrySendError::Closed(_)) => {}
        }
    }

    async fn handshake(&self, incoming: quinn::Incoming) -> Option<Accepted> {
        let remote = incoming.remote_address();
        let config = self.configs[&self.settings.path_towards(remote.ip())].clone();
        let quinn = match incoming.accept_with(config) {
            Ok(connecting) => connecting.await.map_err(|error| (remote, error)),
            Err(error) => Err((remote, error)),
        };
        let quinn = quinn.inspect_err(|(remote, error)| tracing::debug!(%remote, %error, "handshake failed")).ok()?;
        let handshake = quinn.handshake_data()?.downcast::<HandshakeData>().ok()?;
        let protocol = handshake.protocol.unwrap_or_default();
        if protocol == ALPN_JOIN {
            return self.join(quinn).await;
        }
        self.session(quinn, &protocol)
    }

    async fn join(&self, quinn: quinn::Connection) -> Option<Accepted> {
        let (send, mut receive) = quinn.accept_bi().await.ok()?;
        let mut kind = [0];
        receive.read_exact(&mut kind).await.ok()?;
        if StreamKind::of(kind[0]) != Some(StreamKind::Request) {
            quinn.close(CloseCode::Malformed.into(), b"expected a join request");
            return None;
        }
        match FrameReceiver::new(receive, FrameCap::Control, None).expect().await {
            Ok(request) => {
                let sender = FrameSender::new(send, FrameCap::Control, None);
                Some(Accepted::Join(JoinAttempt { request, sender, quinn }))
            }
            Err(TransportError::Frame(error)) => {
                quinn.close(CloseCode::of(&error).into(), error.to_string().as_bytes());
                None
            }
            Err(_) => None,
        }
    }

    fn session(&self, quinn: quinn::Connection, protocol: &[u8]) -> Option<Accepted> {
        let Some((peer, expires_at)) = member(&quinn) else {
            quinn.close(CloseCode::Unauthenticated.into(), b"a client certificate is required: join the cluster first");
            return None;
        };
        if !may_speak(&peer.subject, protocol) {
            let reason = format!("{} may not speak {}", peer.subject, String::from_utf8_lossy(protocol));
            quinn.close(CloseCode::WrongRole.into(), reason.as_bytes());
            return None;
        }
        let windows = self.settings.windows();
        quinn.set_receive_window(windows.receive_bytes.into());
        quinn.set_max_concurrent_bi_streams(windows.bi_streams.into());
        quinn.set_max_concurrent_uni_streams(windows.uni_streams.into());
        Some(Accepted::Session(Connection::new(quinn, peer, expires_at, self.io.upgrade()?)))
    }
}

/// The identity in the client's certificate, if it showed one; TLS has verified it against the cluster's roots.
fn member(quinn: &quinn::Connection) -> Option<(Identity, SystemTime)> {
    let leaf = peer_leaf(quinn)?;
    Some((leaf_identity(&leaf).ok()?, leaf_expires_at(&leaf).ok()?))
}

fn may_speak(subject: &Subject, protocol: &[u8]) -> bool {
    match subject {
        Subject::User { .. } => protocol == ALPN_CLUSTER,
        // A node's gateway asks ranks that serve.
        Subject::Node(_) => protocol == ALPN_CLUSTER || protocol == ALPN_PEER,
        Subject::Rank { .. } => protocol == ALPN_PEER,
        Subject::Coordinator => false,
    }
}

/// Handshakes under way, by address.
#[derive(Clone, Default)]
pub(super) struct HalfOpen(Arc<Mutex<BTreeMap<IpAddr, usize>>>);

pub(super) struct Slot {
    half_open: HalfOpen,
    address: IpAddr,
}

impl HalfOpen {
    /// Of this address, and in all. The sum is over addresses that have any, a few.
    pub(super) fn count(&self, address: IpAddr) -> (usize, usize) {
        let counts = self.0.lock().expect("no holder of this lock panics");
        (counts.get(&address).copied().unwrap_or(0), counts.values().sum())
    }

    pub(super) fn enter(&self, address: IpAddr) -> Slot {
        *self.0.lock().expect("no holder of this lock panics").entry(address).or_default() += 1;
        Slot { half_open: self.clone(), address }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut counts = self.half_open.0.lock().expect("no holder of this lock panics");
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}
