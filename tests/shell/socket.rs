//! A UDP socket of the simulated network for QUIC endpoints. Owns what the network does to packets beyond delay: it loses and doubles them by
//! the socket's own seed. Writes every packet down.

use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use quinn::{AsyncUdpSocket, UdpPoller, udp};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Every packet and event: when, from where, to where, how long.
#[derive(Clone, Default)]
pub struct Trace(Arc<Mutex<Vec<String>>>);

impl Trace {
    pub fn note(&self, text: String) {
        let at = turmoil::sim_elapsed().unwrap_or_default();
        self.0.lock().expect("nobody panics with it").push(format!("{at:?} {text}"));
    }

    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().expect("nobody panics with it"))
    }
}

type Readable = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

pub struct SimulatedSocket {
    socket: Arc<turmoil::net::UdpSocket>,
    readable: Mutex<Option<Readable>>,
    trace: Trace,
    random: Mutex<ChaCha8Rng>,
    loss: f64,
}

impl SimulatedSocket {
    pub async fn bind(port: u16, trace: &Trace, (seed, loss): ([u8; 32], f64)) -> Arc<Self> {
        let socket = turmoil::net::UdpSocket::bind(("0.0.0.0", port)).await.expect("a free port");
        let random = Mutex::new(ChaCha8Rng::from_seed(seed));
        Arc::new(Self { socket: Arc::new(socket), readable: Mutex::default(), trace: trace.clone(), random, loss })
    }

    fn chance(&self) -> bool {
        let drawn = self.random.lock().expect("nobody panics with it").next_u32();
        f64::from(drawn) < self.loss * f64::from(u32::MAX)
    }
}

impl std::fmt::Debug for SimulatedSocket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SimulatedSocket")
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for SimulatedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &udp::Transmit<'_>) -> io::Result<()> {
        let from = self.socket.local_addr()?;
        let (lost, doubled) = (self.chance(), self.chance());
        let fate = if lost { " lost" } else { "" };
        self.trace.note(format!("{from} > {} {}{fate}", transmit.destination, transmit.contents.len()));
        for _ in 0..u8::from(!lost) * (1 + u8::from(doubled)) {
            // A send that the simulated network refuses (no route, crashed peer) is a lost packet too.
            let _ = self.socket.try_send_to(transmit.contents, transmit.destination);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [udp::RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut readable = self.readable.lock().expect("nobody panics with it");
        loop {
            match self.socket.try_recv_from(&mut bufs[0]) {
                Ok((len, addr)) => {
                    meta[0] = udp::RecvMeta { addr, len, stride: len, ecn: None, dst_ip: None };
                    return Poll::Ready(Ok(1));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
            let waiting = readable.get_or_insert_with(|| {
                let socket = self.socket.clone();
                Box::pin(async move { socket.readable().await })
            });
            ready!(waiting.as_mut().poll(cx))?;
            *readable = None;
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn may_fragment(&self) -> bool {
        false
    }
}
