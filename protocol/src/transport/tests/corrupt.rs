//! Packets whose bits are flipped on the way (F15): QUIC's authentication drops each of them, and nobody above notices more than lost time.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use bytes::Bytes;

use super::super::socket::{self, Socket};
use super::super::*;
use super::{ANY, HOUR, authority, node};
use crate::identity::Subject;

/// One packet in so many is changed.
const ONE_IN: u64 = 20;
/// Kept small: packets on a lossy path come slowly.
const BULK_BYTES: usize = 4 << 20;
const REQUESTS: u64 = 100;
/// A frame takes many packets.
const FRAME_BYTES: usize = 20_000;

/// A UDP socket that flips bits in what it receives, by its own seed: behind the UDP checksum, as a bad router or bad memory does.
#[derive(Debug)]
struct Corrupting {
    socket: Arc<Socket>,
    random: Mutex<u64>,
    received: AtomicU64,
    corrupted: AtomicU64,
}

impl Corrupting {
    fn bind(seed: u64) -> Arc<Self> {
        let (socket, _) = socket::bind(ANY).unwrap();
        let socket = Arc::new(Socket::new(socket).unwrap());
        Arc::new(Self { socket, random: Mutex::new(seed), received: AtomicU64::new(0), corrupted: AtomicU64::new(0) })
    }

    /// SplitMix64 (Steele, Lea, Flood, 2014).
    fn draw(&self) -> u64 {
        let mut state = self.random.lock().unwrap();
        *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Flips one to four bits anywhere in one packet of [`ONE_IN`].
    fn corrupt(&self, packet: &mut [u8]) {
        self.received.fetch_add(1, Ordering::Relaxed);
        if packet.is_empty() || !self.draw().is_multiple_of(ONE_IN) {
            return;
        }
        // Different bits of one byte, so that no two flips undo each other.
        let at = self.draw() as usize % packet.len();
        let bits = [0x01, 0x80, 0x18, 0xA5][self.draw() as usize % 4];
        packet[at] ^= bits;
        self.corrupted.fetch_add(1, Ordering::Relaxed);
    }

    /// Packets that came, and those of them that were changed.
    fn counts(&self) -> (u64, u64) {
        (self.received.load(Ordering::Relaxed), self.corrupted.load(Ordering::Relaxed))
    }
}

impl AsyncUdpSocket for Corrupting {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.socket.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &udp::Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [udp::RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(self.socket.poll_recv(cx, bufs, meta))?;
        for (buffer, meta) in bufs.iter_mut().zip(meta.iter()).take(count) {
            // One receive may carry many packets, each but the last of `stride` bytes.
            buffer[..meta.len].chunks_mut(meta.stride.max(1)).for_each(|packet| self.corrupt(packet));
        }
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }
}

/// Bytes in which every word is another, so that none can take the place of another unseen.
fn pattern(bytes: usize, salt: u32) -> Bytes {
    (0..bytes as u32 / 4).flat_map(|word| (word ^ salt).wrapping_mul(0x9E37_79B9).to_le_bytes()).collect()
}

async fn answer(session: Connection) {
    while let Ok(request) = session.accept_request().await {
        let (question, reply) = request.read::<Vec<u8>>().await.unwrap();
        reply.send(&question).await.unwrap();
    }
}

async fn ask(session: &Connection) {
    for number in 0..REQUESTS {
        let question = pattern(FRAME_BYTES, number as u32).to_vec();
        let answer = session.request::<Vec<u8>, Vec<u8>>(&question, HOUR).await.unwrap();
        assert!(answer == question, "frame {number} was changed");
    }
}

/// Control frames both ways on one connection between endpoints whose packets are changed.
#[tokio::test]
async fn changed_packets_change_no_frame_and_end_no_connection() {
    let (authority, sockets) = (authority(1), [Corrupting::bind(1), Corrupting::bind(2)]);
    let io = Io::ambient().unwrap();
    let bind = |at: usize| Bind::Socket { socket: sockets[at].clone(), seed: [at as u8; 32] };
    let credentials = authority.credentials(&Subject::Coordinator, HOUR).unwrap();
    let server = Endpoint::server(&io, bind(0), Settings::control(), credentials).unwrap();
    let credentials = authority.credentials(&node(7), HOUR).unwrap();
    let client = Endpoint::client(&io, bind(1), Settings::control(), credentials).unwrap();
    let address = server.local_addr().unwrap();
    let (dialled, accepted) = tokio::join!(client.connect(address, &Subject::Coordinator), server.accept());
    let (dialled, Some(Accepted::Session(accepted))) = (dialled.unwrap(), accepted) else { panic!("a session") };
    let answering = tokio::spawn(answer(accepted));
    ask(&dialled).await;
    assert_eq!(dialled.close_reason(), None);
    injected(&sockets);
    dialled.close(CloseCode::Done, "answered");
    answering.await.unwrap();
}

/// A bulk stream of rank to rank, in packets of the size that they have between machines.
#[tokio::test]
async fn changed_packets_change_no_byte_of_a_bulk_stream() {
    let (authority, sockets) = (authority(1), [Corrupting::bind(3), Corrupting::bind(4)]);
    let io = Io::ambient().unwrap();
    let bind = |at: usize| Bind::Socket { socket: sockets[at].clone(), seed: [at as u8; 32] };
    let settings = Settings::bulk().with_path(PathMtu::Ethernet);
    let [own, other] = [super::rank(0), super::rank(1)];
    let credentials = authority.credentials(&own, HOUR).unwrap();
    let server = Endpoint::server(&io, bind(0), settings.clone(), credentials).unwrap();
    let credentials = authority.credentials(&other, HOUR).unwrap();
    let client = Endpoint::client(&io, bind(1), settings, credentials).unwrap();
    let address = server.local_addr().unwrap();
    let (dialled, accepted) = tokio::join!(client.connect(address, &own), server.accept());
    let (dialled, Some(Accepted::Session(accepted))) = (dialled.unwrap(), accepted) else { panic!("a session") };

    let data = pattern(BULK_BYTES, 0);
    let send = async {
        let mut sender = dialled.open_bulk().await.unwrap();
        sender.write_header(&(data.len() as u64)).await.unwrap();
        sender.write_chunk(data.clone()).await.unwrap();
        sender.finish().unwrap();
    };
    let receive = async {
        let mut receiver = accepted.accept_bulk().await.unwrap();
        let mut left = receiver.read_header::<u64>().await.unwrap().unwrap() as usize;
        let mut received = Vec::with_capacity(left);
        while left > 0 {
            let chunk = receiver.read_chunk(left).await.unwrap();
            left -= chunk.len();
            received.extend_from_slice(&chunk);
        }
        assert!(receiver.read_header::<u64>().await.unwrap().is_none(), "nothing comes after the end");
        received
    };
    let ((), received) = tokio::join!(send, receive);
    assert!(received == data, "the bulk stream was changed");
    assert_eq!((dialled.close_reason(), accepted.close_reason()), (None, None));
    assert!(dialled.stats().lost_packets > 0, "what was changed counts as lost: {:?}", dialled.stats());
    injected(&sockets);
}

/// Both sides really did get changed packets.
#[track_caller]
fn injected(sockets: &[Arc<Corrupting>]) {
    for socket in sockets {
        let (received, corrupted) = socket.counts();
        println!("{corrupted} of {received} packets changed");
        assert!(corrupted > 0, "nothing was changed among {received} packets");
    }
}
