//! The UDP socket under an endpoint: large buffers, and sends that stay within what one datagram call can carry. Owns the file
//! descriptor; knows nothing of QUIC.

use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket as StdSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket as RawSocket, Type};
use tokio::io::Interest;

use super::outdoors::Outdoors;
use super::weather::Weather;

/// Asked of the kernel for each direction. Its default of 212 KiB loses packets at a few hundred MB/s; `net.core.rmem_max` and `wmem_max`
/// cap what is given unless the process has CAP_NET_ADMIN.
pub const SOCKET_BUFFER_BYTES: usize = 8 * 1024 * 1024;

/// The most that one UDP send carries, segments together. Above it `sendmsg` fails with EMSGSIZE, which quinn-udp swallows: the transfer
/// would hang, or fall to 1,200-byte packets.
pub(super) const SEND_BYTES_MAX: usize = 65_507;

/// The buffers that the kernel gave, in bytes of payload (it counts twice as many for its own bookkeeping).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketBuffers {
    pub receive_bytes: usize,
    pub send_bytes: usize,
}

/// What a socket of ours would get on this machine, for `stoke doctor`.
pub fn socket_buffers() -> io::Result<SocketBuffers> {
    let socket = StdSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    Ok(enlarge_buffers(&socket))
}

/// The MTU in bytes of the route to `peer`, as this machine's kernel knows it: 65,536 on the loopback.
pub fn interface_mtu(peer: IpAddr) -> io::Result<u32> {
    let socket = connected(peer)?;
    if peer.is_ipv4() { Ok(sockopt::ip_mtu(&socket)?) } else { Ok(sockopt::ipv6_mtu(&socket)?) }
}

/// Whether packets to `peer` stay inside this machine.
pub(super) fn is_same_host(peer: IpAddr) -> bool {
    let peer = peer.to_canonical();
    peer.is_loopback() || connected(peer).and_then(|socket| socket.local_addr()).is_ok_and(|own| own.ip() == peer)
}

/// A socket towards `peer`. Connecting a UDP socket sends nothing; it only chooses the route.
fn connected(peer: IpAddr) -> io::Result<StdSocket> {
    let any: IpAddr = if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = StdSocket::bind((any, 0))?;
    socket.connect((peer, 9))?;
    Ok(socket)
}

/// Binds a socket for [`Socket::new`]. An IPv6 wildcard also takes IPv4, where the system allows it.
pub(super) fn bind(address: SocketAddr) -> io::Result<(StdSocket, SocketBuffers)> {
    let socket = RawSocket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        let _ = socket.set_only_v6(false);
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    let socket = StdSocket::from(socket);
    let buffers = enlarge_buffers(&socket);
    Ok((socket, buffers))
}

fn enlarge_buffers(socket: &StdSocket) -> SocketBuffers {
    // The forced variant passes the cap with CAP_NET_ADMIN; the other one stops at the cap. Less than asked is slower, not wrong.
    if sockopt::set_socket_recv_buffer_size_force(socket, SOCKET_BUFFER_BYTES).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(socket, SOCKET_BUFFER_BYTES);
    }
    if sockopt::set_socket_send_buffer_size_force(socket, SOCKET_BUFFER_BYTES).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER_BYTES);
    }
    SocketBuffers {
        receive_bytes: sockopt::socket_recv_buffer_size(socket).unwrap_or(0) / 2,
        send_bytes: sockopt::socket_send_buffer_size(socket).unwrap_or(0) / 2,
    }
}

/// A tokio UDP socket with segmentation offload, whose sends never exceed [`SEND_BYTES_MAX`].
#[derive(Debug)]
pub(super) struct Socket {
    wire: Arc<Wire>,
    /// What packets of a local cluster pass through.
    outdoors: Option<Outdoors>,
}

/// The kernel's side of it.
#[derive(Debug)]
pub(super) struct Wire {
    io: tokio::net::UdpSocket,
    state: UdpSocketState,
}

impl Wire {
    pub(super) fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.io.try_io(Interest::WRITABLE, || self.state.send((&self.io).into(), transmit))
    }
}

impl Socket {
    /// Must be called where a tokio runtime is entered.
    pub(super) fn new(socket: StdSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        let own = socket.local_addr()?.ip().to_canonical();
        let wire = Arc::new(Wire { io: tokio::net::UdpSocket::from_std(socket)?, state });
        let outdoors = Weather::of_process().map(|weather| Outdoors::new(weather, own, wire.clone()));
        Ok(Self { wire, outdoors })
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(WritePoller { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if let Some(outdoors) = self.outdoors.as_ref().filter(|outdoors| outdoors.is_foul(transmit)) {
            return outdoors.send(transmit);
        }
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        let send_bytes = (SEND_BYTES_MAX / segment).max(1) * segment;
        // When a later part would block, the whole is sent again later: the receiver drops packets that it has seen.
        for contents in transmit.contents.chunks(send_bytes) {
            let segment_size = transmit.segment_size.filter(|segment| contents.len() > *segment);
            let part = Transmit { contents, segment_size, ..*transmit };
            self.wire.send(&part)?;
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.wire.io.poll_recv_ready(cx))?;
            let receive = || self.wire.state.recv((&self.wire.io).into(), bufs, meta);
            if let Ok(received) = self.wire.io.try_io(Interest::READABLE, receive) {
                return Poll::Ready(Ok(received));
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.wire.io.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.wire.state.max_gso_segments()
    }

    /// Coalesced receives are on, but a slot of the largest payload holds any of them: without this the endpoint would multiply its buffer
    /// by 64 (134 MB at loopback's packet size).
    fn max_receive_segments(&self) -> usize {
        1
    }

    fn may_fragment(&self) -> bool {
        self.wire.state.may_fragment()
    }
}

type Writable = Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>;

/// Waits for writability for one task; a socket's own `poll_send_ready` would remember only the last of many.
struct WritePoller {
    socket: Arc<Socket>,
    waiting: Option<Writable>,
}

impl std::fmt::Debug for WritePoller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WritePoller")
    }
}

impl UdpPoller for WritePoller {
    fn poll_writable(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let waiting = this.waiting.get_or_insert_with(|| {
            let socket = this.socket.clone();
            Box::pin(async move { socket.wire.io.writable().await })
        });
        let writable = ready!(waiting.as_mut().poll(cx));
        this.waiting = None;
        Poll::Ready(writable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_this_host_with_a_large_mtu() {
        assert!(is_same_host(Ipv4Addr::LOCALHOST.into()));
        assert!(interface_mtu(Ipv4Addr::LOCALHOST.into()).unwrap() > 9000);
    }

    #[test]
    fn buffers_are_reported_as_given() {
        let buffers = socket_buffers().unwrap();
        assert!(buffers.receive_bytes > 64 * 1024 && buffers.receive_bytes <= SOCKET_BUFFER_BYTES, "{buffers:?}");
    }
}
