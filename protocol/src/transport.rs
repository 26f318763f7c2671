//! QUIC as the cluster uses it: endpoints on a thread of their own, a gate before any stream, frames, requests, datagrams and bulk bytes; and bulk
//! bytes by TLS over TCP. Only this module knows quinn. It owns limits, deadlines and close codes; it decides nothing about members, jobs or roles beyond "a
//! certificate of this kind may speak this protocol".
//!
//! The protocols (ALPN), so that one port can serve members and strangers:
//! - `stoke/join/1`: no client certificate; one [`crate::message::join::JoinRequest`], one reply, within [`HANDSHAKE_MAX`].
//! - `stoke/cluster/1`: nodes and users towards the coordinator, with certificates.
//! - `stoke/peer/1`: rank to rank, with certificates of one generation; and node to rank, where the rank serves.
//! - `stoke/bulk/1`: rank to rank by TCP, beside a connection by QUIC.
//!
//! On a stream, a frame is a little-endian u32 length and so many bytes of [`crate::codec`] payload. The length is compared with the cap
//! before anything is allocated. A bidirectional stream begins with one byte that says what it is (frames or request); a unidirectional
//! stream is always bulk: framed headers, each followed by as many raw bytes as it says.
//!
//! What ends a stream: `finish` is a clean end, everything else (an error, a panic, a dropped or cancelled sender) resets it, so that half
//! a conversation never looks like a whole one.

mod bulk;
mod connection;
mod endpoint;
mod error;
mod frames;
mod gate;
mod io;
mod outdoors;
mod settings;
mod socket;
mod tcp;
#[cfg(test)]
mod tests;
mod weather;

use std::time::Duration;

pub use bulk::{BulkReceiver, BulkSender};
pub use connection::{Connection, ConnectionStats};
pub use endpoint::{Bind, Endpoint};
pub use error::{CloseCode, Closed, TransportError};
pub use frames::{FrameReceiver, FrameSender, Reply, Request};
pub use gate::{Accepted, JoinAttempt};
pub use io::Io;
pub use settings::{PathMtu, Settings};
pub use socket::{SOCKET_BUFFER_BYTES, SocketBuffers, interface_mtu, socket_buffers};
pub use tcp::{BulkListener, BulkTcp, Knock, TcpReceiver, TcpSender, TcpWatch};
pub use weather::{Harm, Spell, WEATHER_VARIABLE, read_weather, write_weather};

/// What a simulator implements to carry packets itself; see [`Bind::Socket`].
pub use quinn::{AsyncUdpSocket, UdpPoller, udp};

/// No client certificate: join requests only.
pub const ALPN_JOIN: &[u8] = b"stoke/join/1";
/// Nodes and users.
pub const ALPN_CLUSTER: &[u8] = b"stoke/cluster/1";
/// Ranks among themselves.
pub const ALPN_PEER: &[u8] = b"stoke/peer/1";
/// The same by TCP: bulk bytes only.
pub const ALPN_BULK: &[u8] = b"stoke/bulk/1";

/// A stranger has this long from its first packet to a finished handshake and, on the join protocol, a whole request (I30).
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(5);

/// Bytes that a stranger can make us hold, before its certificate was looked at (I30).
pub const STRANGER_BYTES_MAX: u32 = 64 * 1024;

/// Half-open handshakes from one address (I30); more are refused, so that one host cannot take all slots.
pub const HALF_OPEN_PER_ADDRESS_MAX: usize = 64;

/// Half-open handshakes in all; more are refused. Each holds up to [`STRANGER_BYTES_MAX`].
pub const HALF_OPEN_MAX: usize = 1024;
