//! Bulk bytes by TLS 1.3 over TCP, with the certificates of the cluster, for ranks whose path carries small packets only: QUIC's cost is per packet, and the
//! kernel or the card cuts TCP's bytes into packets for a fraction of it. Owns listening, dialling, who is behind a connection, and the framing of
//! headers; when it is used, and what the end of a connection means, is its users'.
//!
//! One connection carries headers and raw bytes both ways, as a bulk stream of QUIC does. A clean end is TLS's own (close_notify).

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::error::TransportError;
use super::frames::{ByteSource, PartialFrame, frame};
use super::gate::{HalfOpen, Slot};
use super::io::Io;
use super::{ALPN_BULK, HALF_OPEN_MAX, HALF_OPEN_PER_ADDRESS_MAX, HANDSHAKE_MAX, STRANGER_BYTES_MAX};
use crate::codec::{self, FrameCap};
use crate::identity::{Credentials, Identity, PeerError, Subject, client_config, leaf_identity, server_config};

/// Asked of the kernel at a time: rustls reads 4 KiB at a time by itself, and each would be a call. What a stranger can make us hold, too (I30).
const READ_BYTES: usize = STRANGER_BYTES_MAX as usize;

/// Decrypted bytes that are handed on at a time, at most, and allocated.
const CHUNK_BYTES: usize = 64 * 1024;

/// Connections that the kernel completes before they are accepted.
const BACKLOG: i32 = 256;

/// Encrypted bytes that wait for the kernel: a header and 256 KiB leave with one call.
const WRITE_BYTES: usize = 320 * 1024;

/// A record of TLS.
const RECORD_BYTES: usize = 16 * 1024;

/// So often in a row the kernel sends the same bytes, or asks a peer that had no room whether it has some, without any answer, until the connection counts as
/// broken: 13 s, for it waits twice as long each time. Machines answer also for a process that reads nothing; that one is gone is found by QUIC in 10 s. What is
/// left is a firewall that has forgotten the connection. The kernel itself would try for a quarter of an hour.
const UNANSWERED_MAX: u8 = 6;

/// Between two looks at that.
const LOOK: Duration = Duration::from_secs(1);

/// An idle connection says something so often, for firewalls that forget those that are silent. That a machine is gone is found by QUIC.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

type Tls = TlsStream<BufReader<TcpStream>>;

/// A port where members of the cluster open bulk connections.
pub struct BulkListener {
    listener: TcpListener,
    tls: TlsAcceptor,
    port: u16,
    half_open: HalfOpen,
}

/// A connection that came in, before anything is known of who it is.
pub struct Knock {
    stream: TcpStream,
    tls: TlsAcceptor,
    slot: Slot,
}

/// Both directions of a bulk connection.
pub struct BulkTcp {
    pub sender: TcpSender,
    pub receiver: TcpReceiver,
}

/// Dropping it without [`TcpSender::finish`] ends the connection uncleanly.
pub struct TcpSender {
    stream: WriteHalf<Tls>,
    socket: Arc<OwnedFd>,
}

/// What the kernel knows of a connection. Only as long as somebody asks: it keeps the connection open.
pub struct TcpWatch(Arc<OwnedFd>);

/// Reads never take more than they are asked for, so that the bytes after a run stay for the next header.
pub struct TcpReceiver {
    header: PartialFrame,
    source: Decrypted,
}

/// The decrypted bytes of a connection.
struct Decrypted {
    stream: ReadHalf<Tls>,
    buffer: BytesMut,
}

impl BulkListener {
    /// Listens on `address`, whose port may be 0.
    pub fn bind(io: &Io, address: SocketAddr, credentials: &Credentials) -> Result<Self, TransportError> {
        let bound = || {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            socket.bind(&address.into())?;
            socket.listen(BACKLOG)?;
            TcpListener::from_std(socket.into())
        };
        let listener = io.enter(bound)?;
        let port = listener.local_addr()?.port();
        let tls = server_config(credentials, &[ALPN_BULK]).map_err(TransportError::Tls)?;
        Ok(Self { listener, tls: TlsAcceptor::from(Arc::new(tls)), port, half_open: HalfOpen::default() })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The next connection; those of an address that has too many half-open ones, or beyond what there may be in all, are closed (I30). An error is of a
    /// connection, or of a process that has no more files.
    pub async fn accept(&self) -> io::Result<Knock> {
        loop {
            let (stream, from) = self.listener.accept().await?;
            let address = from.ip().to_canonical();
            let (here, total) = self.half_open.count(address);
            if here < HALF_OPEN_PER_ADDRESS_MAX && total < HALF_OPEN_MAX {
                return Ok(Knock { stream, tls: self.tls.clone(), slot: self.half_open.enter(address) });
            }
            tracing::debug!(%from, "too many half-open connections by TCP");
        }
    }
}

impl Knock {
    /// The connection, and who is behind it: only members of the cluster are let in. It may take [`HANDSHAKE_MAX`].
    pub async fn admit(self) -> Result<(Identity, BulkTcp), TransportError> {
        let greet = async {
            prepare(&self.stream)?;
            let stream = BufReader::with_capacity(READ_BYTES, self.stream);
            self.tls.accept_with(stream, |tls| tls.set_buffer_limit(Some(WRITE_BYTES))).await
        };
        let late = TransportError::Deadline { what: "wait for a handshake", after: HANDSHAKE_MAX };
        let stream: Tls = timeout(HANDSHAKE_MAX, greet).await.map_err(|_| late)??.into();
        drop(self.slot);
        let peer = identity(&stream)?;
        Ok((peer, BulkTcp::new(stream)?))
    }
}

impl BulkTcp {
    /// Connects to `expected` at `address`, and to nobody else.
    pub async fn dial(
        credentials: &Credentials,
        address: SocketAddr,
        expected: &Subject,
        within: Duration,
    ) -> Result<Self, TransportError> {
        let (tls, failure) = client_config(credentials, expected, ALPN_BULK).map_err(TransportError::Tls)?;
        let dial = async {
            let stream = TcpStream::connect(address).await?;
            prepare(&stream)?;
            let name = ServerName::IpAddress(address.ip().into());
            let stream = BufReader::with_capacity(READ_BYTES, stream);
            let limit = |tls: &mut rustls::ClientConnection| tls.set_buffer_limit(Some(WRITE_BYTES));
            TlsConnector::from(Arc::new(tls)).connect_with(name, stream, limit).await
        };
        let silent = TransportError::Deadline { what: "connect by TCP", after: within };
        let stream: Tls = timeout(within, dial)
            .await
            .map_err(|_| silent)?
            .map_err(|error| match failure.lock().expect("no holder of this lock panics").take() {
                Some(peer) => TransportError::Peer { address, peer },
                None => error.into(),
            })?
            .into();
        Ok(Self::new(stream)?)
    }

    fn new(stream: Tls) -> io::Result<Self> {
        let socket = Arc::new(stream.get_ref().0.get_ref().as_fd().try_clone_to_owned()?);
        let (stream, out) = tokio::io::split(stream);
        let source = Decrypted { stream, buffer: BytesMut::new() };
        let receiver = TcpReceiver { header: PartialFrame::default(), source };
        Ok(Self { sender: TcpSender { stream: out, socket }, receiver })
    }
}

impl TcpSender {
    /// Writes a header, which says how many bytes follow, and those; returns when the kernel has them.
    pub async fn write<T: Serialize>(&mut self, header: &T, bytes: Bytes) -> Result<(), TransportError> {
        let [length, payload] = frame(header, FrameCap::Header)?;
        self.stream.write_all_buf(&mut length.chain(payload).chain(bytes)).await?;
        Ok(self.stream.flush().await?)
    }

    /// The clean end.
    pub async fn finish(mut self) -> Result<(), TransportError> {
        Ok(self.stream.shutdown().await?)
    }

    pub fn watch(&self) -> TcpWatch {
        TcpWatch(self.socket.clone())
    }
}

impl TcpWatch {
    /// Waits until nobody answers what is sent any more, and ends the connection: whoever reads or writes has an error then.
    pub async fn silenced(self) {
        while self.unanswered() < UNANSWERED_MAX {
            sleep(LOOK).await;
        }
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }

    /// How often in a row the kernel has sent the same bytes, or asked for room; 0 if it does not tell.
    fn unanswered(&self) -> u8 {
        // The beginning of `struct tcp_info`: state, state of congestion, retransmits, probes.
        let mut info = [0u8; 4];
        let mut len = info.len() as libc::socklen_t;
        // SAFETY: the kernel writes no more than `len` bytes to `info`, and the socket is open.
        let answer = unsafe {
            libc::getsockopt(self.0.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &mut len)
        };
        if answer == 0 { info[2].max(info[3]) } else { 0 }
    }
}

impl TcpReceiver {
    /// The next header; none only after the peer's explicit end. Cancel-safe.
    pub async fn read_header<T: DeserializeOwned>(&mut self) -> Result<Option<T>, TransportError> {
        let Some(payload) = self.header.read(&mut self.source, FrameCap::Header).await? else { return Ok(None) };
        Ok(Some(codec::decode(&payload, FrameCap::Header)?))
    }

    /// Between 1 and `bytes_max` bytes. Cancel-safe.
    pub async fn read_chunk(&mut self, bytes_max: usize) -> Result<Bytes, TransportError> {
        self.source.chunk(bytes_max).await?.ok_or(TransportError::Truncated)
    }
}

impl ByteSource for Decrypted {
    async fn chunk(&mut self, bytes_max: usize) -> Result<Option<Bytes>, TransportError> {
        if self.buffer.is_empty() {
            // What is left of the last allocation will do for a record.
            if self.buffer.capacity() < RECORD_BYTES {
                self.buffer.reserve(CHUNK_BYTES);
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
        Ok(Some(self.buffer.split_to(bytes_max.min(self.buffer.len())).freeze()))
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // No TCP_USER_TIMEOUT: the kernel counts a peer that answers and does not read, because it still computes, as one that is gone.
    let often = TcpKeepalive::new().with_time(KEEP_ALIVE).with_interval(KEEP_ALIVE);
    SockRef::from(stream).set_tcp_keepalive(&often)
}

fn identity(stream: &Tls) -> Result<Identity, TransportError> {
    let (tcp, tls) = stream.get_ref();
    let address = tcp.get_ref().peer_addr()?;
    // A client that offers no protocol at all gets through the handshake.
    let leaf =
        tls.peer_certificates().filter(|_| tls.alpn_protocol() == Some(ALPN_BULK)).and_then(|chain| chain.first());
    let leaf = leaf.ok_or(TransportError::Peer { address, peer: PeerError::UnknownAuthority })?;
    leaf_identity(leaf).map_err(|peer| TransportError::Peer { address, peer })
}
