//! One authenticated connection: who is at its other end, its streams, datagrams and end. Owns the routing of incoming streams by kind;
//! never reconnects (its holder does).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::FutureExt;
use quinn::{RecvStream, SendStream};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Mutex, mpsc};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::bulk::{BulkReceiver, BulkSender};
use super::error::{CloseCode, Closed, TransportError};
use super::frames::{FrameReceiver, FrameSender, Request, StreamKind};
use super::io::Io;
use crate::codec::{self, CodecError, FrameCap};
use crate::identity::Identity;

/// Streams that wait to be accepted; further ones wait in QUIC, which counts them against the peer's stream limit.
const ROUTED_MAX: usize = 64;

/// A stream whose first byte has not arrived after this long is given up (F38).
const ANNOUNCE_MAX: Duration = Duration::from_secs(5);

type RawStream = (SendStream, RecvStream);

/// A connection. Clones share it; it closes when the last clone and the last of its streams are dropped, but say why with
/// [`Connection::close`].
#[derive(Clone)]
pub struct Connection(Arc<Shared>);

/// What the streams of a connection keep alive.
pub(super) struct Shared {
    quinn: quinn::Connection,
    peer: Identity,
    peer_expires_at: SystemTime,
    frames: Mutex<mpsc::Receiver<RawStream>>,
    requests: Mutex<mpsc::Receiver<RawStream>>,
    router: AbortHandle,
    /// The network thread lives as long as its connections.
    _io: Io,
}

/// A connection's counters since its start.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConnectionStats {
    pub rtt: Duration,
    pub mtu_bytes: u16,
    pub window_bytes: u64,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    pub sent_packets: u64,
    pub lost_packets: u64,
    pub congestion_events: u64,
}

impl Connection {
    pub(super) fn new(quinn: quinn::Connection, peer: Identity, peer_expires_at: SystemTime, io: Io) -> Self {
        let (to_frames, frames) = mpsc::channel(ROUTED_MAX);
        let (to_requests, requests) = mpsc::channel(ROUTED_MAX);
        let router = Router { quinn: quinn.clone(), frames: to_frames, requests: to_requests };
        let router = io.spawn(router.run()).abort_handle();
        let (frames, requests) = (Mutex::new(frames), Mutex::new(requests));
        Self(Arc::new(Shared { quinn, peer, peer_expires_at, frames, requests, router, _io: io }))
    }

    /// Who is at the other end, as its certificate says.
    pub fn peer(&self) -> &Identity {
        &self.0.peer
    }

    /// When the certificate that the peer showed ends; a connection should not outlive it.
    pub fn peer_expires_at(&self) -> SystemTime {
        self.0.peer_expires_at
    }

    pub fn remote_address(&self) -> SocketAddr {
        self.0.quinn.remote_address()
    }

    /// The address of this machine that the peer reaches, where the system tells.
    pub fn local_ip(&self) -> Option<std::net::IpAddr> {
        self.0.quinn.local_ip()
    }

    /// Opens a long-lived stream of frames each way. The peer's [`Connection::accept_frames`] takes it.
    pub async fn open_frames(&self) -> Result<(FrameSender, FrameReceiver), TransportError> {
        self.open(StreamKind::Frames, FrameCap::Control).await
    }

    /// The next stream of frames that the peer opens.
    pub async fn accept_frames(&self) -> Result<(FrameSender, FrameReceiver), TransportError> {
        let routed = self.0.frames.lock().await.recv().await;
        let stream = routed.ok_or_else(|| self.lost())?;
        Ok(self.wrap(stream, FrameCap::Control))
    }

    /// Asks on a stream of its own and waits for the one answer. On a time-out it is unknown whether the peer acted (I9).
    pub async fn request<Q: Serialize, A: DeserializeOwned>(
        &self,
        question: &Q,
        deadline: Duration,
    ) -> Result<A, TransportError> {
        let ask = async { self.request_frames(question).await?.expect().await };
        timeout(deadline, ask)
            .await
            .map_err(|_| TransportError::Deadline { what: "wait for an answer", after: deadline })?
    }

    /// Asks on a stream of its own; the answer is as many frames as the peer sends. Dropping the receiver tells the peer to stop.
    pub async fn request_frames<Q: Serialize>(&self, question: &Q) -> Result<FrameReceiver, TransportError> {
        let (mut sender, receiver) = self.open(StreamKind::Request, FrameCap::Request).await?;
        sender.send(question).await?;
        sender.finish()?;
        Ok(receiver)
    }

    /// The next request that the peer makes.
    pub async fn accept_request(&self) -> Result<Request, TransportError> {
        let routed = self.0.requests.lock().await.recv().await;
        let stream = routed.ok_or_else(|| self.lost())?;
        let (sender, receiver) = self.wrap(stream, FrameCap::Request);
        Ok(Request { receiver, sender })
    }

    /// Opens a stream for bulk bytes to the peer.
    pub async fn open_bulk(&self) -> Result<BulkSender, TransportError> {
        Ok(BulkSender::new(self.0.quinn.open_uni().await?, self.0.clone()))
    }

    /// The next bulk stream that the peer opens.
    pub async fn accept_bulk(&self) -> Result<BulkReceiver, TransportError> {
        Ok(BulkReceiver::new(self.0.quinn.accept_uni().await?, self.0.clone()))
    }

    /// Sends a message that may be lost: heartbeats and progress, where the next one makes up for it.
    pub fn send_datagram<T: Serialize>(&self, message: &T) -> Result<(), TransportError> {
        let payload = codec::encode(message, FrameCap::Control)?;
        let (bytes, max) = (payload.len(), self.0.quinn.max_datagram_size().unwrap_or(0));
        self.0.quinn.send_datagram(payload.into()).map_err(|error| match error {
            quinn::SendDatagramError::ConnectionLost(error) => error.into(),
            quinn::SendDatagramError::TooLarge
            | quinn::SendDatagramError::UnsupportedByPeer
            | quinn::SendDatagramError::Disabled => TransportError::DatagramTooLarge { bytes, max },
        })
    }

    /// The next datagram that arrives. One that cannot be decoded closes the connection.
    pub async fn recv_datagram<T: DeserializeOwned>(&self) -> Result<T, TransportError> {
        let payload = self.0.quinn.read_datagram().await?;
        codec::decode(&payload, FrameCap::Control).map_err(|error| {
            self.0.refuse(&error);
            error.into()
        })
    }

    /// Ends the connection at once: what is not yet delivered is lost. The peer sees the code and the reason.
    pub fn close(&self, code: CloseCode, reason: &str) {
        self.0.quinn.close(code.into(), reason.as_bytes());
    }

    /// Resolves when the connection is over, with the reason.
    pub async fn closed(&self) -> Closed {
        self.0.quinn.closed().await.into()
    }

    /// The reason, if the connection is over already.
    pub fn close_reason(&self) -> Option<Closed> {
        self.0.quinn.close_reason().map(Closed::from)
    }

    /// The least of all round trips so far: what the way takes when nobody is busy.
    pub fn least_rtt(&self) -> Duration {
        self.0.quinn.stats().path.min_rtt
    }

    pub fn stats(&self) -> ConnectionStats {
        let stats = self.0.quinn.stats();
        ConnectionStats {
            rtt: stats.path.rtt,
            mtu_bytes: stats.path.current_mtu,
            window_bytes: stats.path.cwnd,
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
            sent_packets: stats.path.sent_packets,
            lost_packets: stats.path.lost_packets,
            congestion_events: stats.path.congestion_events,
        }
    }

    async fn open(&self, kind: StreamKind, cap: FrameCap) -> Result<(FrameSender, FrameReceiver), TransportError> {
        let stream = self.0.quinn.open_bi().await?;
        let (mut sender, receiver) = self.wrap(stream, cap);
        sender.announce(kind).await?;
        Ok((sender, receiver))
    }

    fn wrap(&self, (send, receive): RawStream, cap: FrameCap) -> (FrameSender, FrameReceiver) {
        let shared = || Some(self.0.clone());
        (FrameSender::new(send, cap, shared()), FrameReceiver::new(receive, cap, shared()))
    }

    /// Why no stream comes any more. The router ends only with the connection.
    fn lost(&self) -> TransportError {
        TransportError::Closed(self.close_reason().unwrap_or(Closed::ByUs))
    }
}

impl Shared {
    /// Closes the connection because of a frame of the peer's.
    pub(super) fn refuse(&self, error: &CodecError) {
        self.quinn.close(CloseCode::of(error).into(), error.to_string().as_bytes());
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.router.abort();
        self.quinn.close(CloseCode::Abandoned.into(), b"dropped without a close");
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection({} at {})", self.0.peer, self.remote_address())
    }
}

/// Sorts the bidirectional streams of a peer by their first byte.
struct Router {
    quinn: quinn::Connection,
    frames: mpsc::Sender<RawStream>,
    requests: mpsc::Sender<RawStream>,
}

impl Router {
    async fn run(self) {
        let router = Arc::new(self);
        while let Ok(stream) = router.quinn.accept_bi().await {
            // The first byte is there nearly always. Where its packet was lost, later streams must not wait for it.
            let mut announced = Box::pin(router.clone().announced(stream));
            match (&mut announced).now_or_never() {
                Some(Some(routed)) => router.deliver(routed).await,
                Some(None) => {}
                None => {
                    let router = router.clone();
                    tokio::spawn(async move {
                        if let Ok(Some(routed)) = timeout(ANNOUNCE_MAX, announced).await {
                            router.deliver(routed).await;
                        }
                    });
                }
            }
        }
    }

    async fn announced(self: Arc<Self>, (send, mut receive): RawStream) -> Option<(StreamKind, RawStream)> {
        let mut first = [0];
        match receive.read(&mut first).await {
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return None,
        }
        let Some(kind) = StreamKind::of(first[0]) else {
            let reason = format!("stream of unknown kind {}", first[0]);
            self.quinn.close(CloseCode::Malformed.into(), reason.as_bytes());
            return None;
        };
        Some((kind, (send, receive)))
    }

    async fn deliver(&self, (kind, stream): (StreamKind, RawStream)) {
        let _ = match kind {
            StreamKind::Frames => self.frames.send(stream).await,
            StreamKind::Request => self.requests.send(stream).await,
        };
    }
}
