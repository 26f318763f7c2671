//! What goes wrong in transport, in words that say what to do, and the codes with which connections and streams end.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use quinn::VarInt;

use crate::codec::CodecError;
use crate::identity::{CredentialsError, PeerError};

/// The code of a close or a reset: what the other side branches on. The text beside it is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseCode {
    /// The conversation is over as planned.
    Done,
    /// The last handle was dropped without a close: a crash, a panic or a cancelled task.
    Abandoned,
    /// A client certificate is required on this protocol.
    Unauthenticated,
    /// The certificate is good, but its kind may not speak this protocol.
    WrongRole,
    /// The peer speaks another protocol version.
    Version,
    /// A frame was over its cap.
    FrameTooLarge,
    /// A frame could not be decoded, or a stream did not say what it is.
    Malformed,
    /// A newer connection, incarnation or generation took this one's place.
    Superseded,
    /// The process is going down; a reconnect will find its successor.
    ShuttingDown,
    /// The peer did not do in time what was expected of it.
    TooSlow,
    /// More than this side can take; try again later.
    Overloaded,
    /// The certificate was revoked.
    Revoked,
    /// A code of a newer release.
    Unknown(u32),
}

impl CloseCode {
    const KNOWN: [(Self, u32); 12] = [
        (Self::Done, 0),
        (Self::Abandoned, 1),
        (Self::Unauthenticated, 2),
        (Self::WrongRole, 3),
        (Self::Version, 4),
        (Self::FrameTooLarge, 5),
        (Self::Malformed, 6),
        (Self::Superseded, 7),
        (Self::ShuttingDown, 8),
        (Self::TooSlow, 9),
        (Self::Overloaded, 10),
        (Self::Revoked, 11),
    ];

    /// The code that a refused frame closes its connection with.
    pub fn of(error: &CodecError) -> Self {
        match error {
            CodecError::TooLarge { .. } => Self::FrameTooLarge,
            CodecError::Version { .. } => Self::Version,
            CodecError::Empty | CodecError::Trailing { .. } | CodecError::Malformed(_) | CodecError::Unencodable(_) => {
                Self::Malformed
            }
        }
    }
}

impl From<CloseCode> for VarInt {
    fn from(code: CloseCode) -> Self {
        let known = CloseCode::KNOWN.iter().find(|(known, _)| *known == code);
        match (known, code) {
            (Some((_, number)), _) => Self::from_u32(*number),
            (None, CloseCode::Unknown(number)) => Self::from_u32(number),
            (None, _) => unreachable!("KNOWN lists every code"),
        }
    }
}

impl From<VarInt> for CloseCode {
    fn from(number: VarInt) -> Self {
        let number = u32::try_from(number.into_inner()).unwrap_or(u32::MAX);
        Self::KNOWN.iter().find(|(_, known)| *known == number).map_or(Self::Unknown(number), |(code, _)| *code)
    }
}

impl std::fmt::Display for CloseCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Abandoned => f.write_str("abandoned"),
            Self::Unauthenticated => f.write_str("unauthenticated"),
            Self::WrongRole => f.write_str("wrong role"),
            Self::Version => f.write_str("version"),
            Self::FrameTooLarge => f.write_str("frame too large"),
            Self::Malformed => f.write_str("malformed"),
            Self::Superseded => f.write_str("superseded"),
            Self::ShuttingDown => f.write_str("shutting down"),
            Self::TooSlow => f.write_str("too slow"),
            Self::Overloaded => f.write_str("overloaded"),
            Self::Revoked => f.write_str("revoked"),
            Self::Unknown(number) => write!(f, "code {number}"),
        }
    }
}

/// Why a connection is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Closed {
    #[error("closed by the peer, {code}: {reason}")]
    ByPeer { code: CloseCode, reason: String },
    #[error("closed by this side")]
    ByUs,
    /// The idle time-out: the peer, its machine or the network between is gone.
    #[error("no packet from the peer within the idle time-out")]
    Silent,
    /// A stateless reset: the process at that address is not the one that we were connected to.
    #[error("the peer was restarted and knows nothing of this connection")]
    Restarted,
    /// The peer's TLS refused ours: most often the certificate is of another cluster or has expired.
    #[error("the peer refused the handshake: {reason}")]
    Refused { reason: String },
    /// The peer's QUIC takes no new connection (CONNECTION_REFUSED): too many are being opened, or it is going down. Try again.
    #[error("the peer takes no connections now: it is busy, or going down")]
    Busy,
    /// One side broke the rules of QUIC.
    #[error("transport failed: {reason}")]
    Broken { reason: String },
}

impl From<quinn::ConnectionError> for Closed {
    fn from(error: quinn::ConnectionError) -> Self {
        use quinn::ConnectionError as E;
        match error {
            E::ApplicationClosed(close) => Self::ByPeer {
                code: close.error_code.into(),
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            E::LocallyClosed => Self::ByUs,
            E::TimedOut => Self::Silent,
            E::Reset => Self::Restarted,
            E::ConnectionClosed(close) => {
                refused(close.error_code, String::from_utf8_lossy(&close.reason).into_owned())
            }
            E::TransportError(error) => Self::Broken { reason: error.to_string() },
            E::VersionMismatch | E::CidsExhausted => Self::Broken { reason: error.to_string() },
        }
    }
}

/// A close by the peer's QUIC or TLS layer. TLS alerts are codes 0x100 and up (RFC 9001, 4.8).
fn refused(code: quinn::TransportErrorCode, reason: String) -> Closed {
    if code == quinn::TransportErrorCode::CONNECTION_REFUSED {
        return Closed::Busy;
    }
    let number = u64::from(code);
    let alert = match number.checked_sub(0x100) {
        Some(40) => "handshake failure",
        Some(42 | 46) => "it cannot use our certificate",
        Some(44) => "our certificate was revoked",
        Some(45) => "our certificate has expired: join again with a new token",
        Some(48) => "our certificate is of another cluster: join this one with a token",
        Some(116) => "it demands a certificate",
        Some(120) => "it does not speak this protocol: is the address that of a stoke coordinator?",
        Some(_) => "TLS alert",
        None => "transport error",
    };
    let reason = if reason.is_empty() { format!("{alert} ({code})") } else { format!("{alert} ({code}: {reason})") };
    Closed::Refused { reason }
}

/// Why a transport operation failed. A peer's refusal or a lost connection is part of the message, because that is what people act on;
/// other causes are in `source()`.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error("start the network thread {name}")]
    Thread {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("no tokio runtime is running here: call this inside one, or use a network thread")]
    NoRuntime,
    #[error("listen on UDP {address}: {}", bind_advice(source.kind()))]
    Bind {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("open endpoint")]
    Endpoint(#[source] io::Error),
    #[error("set up TLS")]
    Tls(#[source] rustls::Error),
    #[error("this endpoint has no credentials: join the cluster first")]
    NoCredentials,
    #[error("connect to {address}: no answer in {} s; is the process running there, and UDP port {} open?", after.as_secs(), address.port())]
    NoAnswer { address: SocketAddr, after: Duration },
    #[error("connect to {address}: {reason}")]
    Address { address: SocketAddr, reason: String },
    #[error("connect to {address}: {peer}")]
    Peer { address: SocketAddr, peer: PeerError },
    #[error("connect to {address}: {closed}")]
    Connect { address: SocketAddr, closed: Closed },
    #[error("connection lost: {0}")]
    Closed(Closed),
    #[error("the peer gave up this stream: {code}")]
    StreamReset { code: CloseCode },
    #[error("the peer stopped reading this stream: {code}")]
    StreamStopped { code: CloseCode },
    #[error("the stream ended inside a frame")]
    Truncated,
    #[error("the stream ended before the frame that was expected")]
    Ended,
    #[error("an earlier send on this stream was cancelled half way: open a new one")]
    Interrupted,
    #[error("{what}: nothing in {after:?}")]
    Deadline { what: &'static str, after: Duration },
    /// Of a connection by TCP.
    #[error("connection by TCP: {0}")]
    Tcp(#[from] io::Error),
    #[error("datagram of {bytes} bytes, this connection carries at most {max}")]
    DatagramTooLarge { bytes: usize, max: usize },
    #[error(transparent)]
    Frame(#[from] CodecError),
    #[error("join refused: {reason}")]
    JoinRefused { reason: String },
    #[error("use the certificate that the coordinator issued")]
    Credentials(#[from] CredentialsError),
}

impl TransportError {
    /// Why the connection ended, if that is what happened.
    pub fn closed(&self) -> Option<&Closed> {
        match self {
            Self::Closed(closed) | Self::Connect { closed, .. } => Some(closed),
            _ => None,
        }
    }

    /// Whether the peer ended this on purpose: it lives, or said good-bye.
    pub fn is_given_up(&self) -> bool {
        matches!(
            self,
            Self::StreamReset { .. } | Self::StreamStopped { .. } | Self::Closed(Closed::ByPeer { .. } | Closed::ByUs)
        )
    }
}

fn bind_advice(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::AddrInUse => {
            "the port is in use; stop the other process (ss -ulpn shows it) or choose another port"
        }
        io::ErrorKind::AddrNotAvailable => "no interface of this machine has that address",
        io::ErrorKind::PermissionDenied => "not permitted; ports below 1024 need CAP_NET_BIND_SERVICE",
        _ => "the system refused it",
    }
}

impl From<quinn::ConnectionError> for TransportError {
    fn from(error: quinn::ConnectionError) -> Self {
        Self::Closed(error.into())
    }
}

impl From<quinn::WriteError> for TransportError {
    fn from(error: quinn::WriteError) -> Self {
        match error {
            quinn::WriteError::Stopped(code) => Self::StreamStopped { code: code.into() },
            quinn::WriteError::ConnectionLost(error) => error.into(),
            quinn::WriteError::ClosedStream => Self::Ended,
            quinn::WriteError::ZeroRttRejected => unreachable!("early data is off"),
        }
    }
}

impl From<quinn::ReadError> for TransportError {
    fn from(error: quinn::ReadError) -> Self {
        match error {
            quinn::ReadError::Reset(code) => Self::StreamReset { code: code.into() },
            quinn::ReadError::ConnectionLost(error) => error.into(),
            quinn::ReadError::ClosedStream => Self::Ended,
            quinn::ReadError::IllegalOrderedRead => unreachable!("every read is ordered"),
            quinn::ReadError::ZeroRttRejected => unreachable!("early data is off"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_codes_survive_the_wire() {
        for (code, number) in CloseCode::KNOWN {
            assert_eq!(VarInt::from(code), VarInt::from_u32(number));
            assert_eq!(CloseCode::from(VarInt::from_u32(number)), code);
        }
        assert_eq!(CloseCode::from(VarInt::from_u32(999)), CloseCode::Unknown(999));
    }
}
