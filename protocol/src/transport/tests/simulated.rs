//! Transport on a simulated network: joins, sessions and a coordinator that crashes and comes back, with the same packets at the same times
//! whenever the seed is the same. What differs between two runs is key material, never a size or an order.

use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use super::super::*;
use super::{HOUR, authority, node};
use crate::identity::{Authority, Credentials, JoinToken, KeyRequest, Subject, TokenSecret};
use crate::ids::TokenId;
use crate::message::join::{JoinReply, Wants};

const PORT: u16 = 7500;

/// Every packet and event: when, from where, to where, how long.
#[derive(Clone, Default)]
struct Trace(Arc<Mutex<Vec<String>>>);

impl Trace {
    fn note(&self, text: String) {
        let at = turmoil::sim_elapsed().unwrap_or_default();
        self.0.lock().unwrap().push(format!("{at:?} {text}"));
    }
}

type Readable = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

struct SimulatedSocket {
    socket: Arc<turmoil::net::UdpSocket>,
    readable: Mutex<Option<Readable>>,
    trace: Trace,
}

impl SimulatedSocket {
    async fn bind(port: u16, trace: &Trace) -> Arc<Self> {
        let socket = Arc::new(turmoil::net::UdpSocket::bind(("0.0.0.0", port)).await.unwrap());
        Arc::new(Self { socket, readable: Mutex::default(), trace: trace.clone() })
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
        self.trace.note(format!("{from} > {} {}", transmit.destination, transmit.contents.len()));
        // A send that the simulated network refuses (no route, crashed peer) is a lost packet.
        let _ = self.socket.try_send_to(transmit.contents, transmit.destination);
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [udp::RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut readable = self.readable.lock().unwrap();
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

/// One seed per incarnation of a host.
fn seed(run: u64, incarnation: u64) -> [u8; 32] {
    *blake3::hash(&[run.to_le_bytes(), incarnation.to_le_bytes()].concat()).as_bytes()
}

async fn serve_session(session: Connection, trace: Trace) {
    trace.note(format!("session of {}", session.peer().subject));
    while let Ok(request) = session.accept_request().await {
        let Ok((question, reply)) = request.read::<u64>().await else { continue };
        let _ = reply.send(&(question * 2)).await;
    }
    trace.note(format!("end of {}: {:?}", session.peer().subject, session.close_reason()));
}

async fn coordinate(
    authority: Arc<Authority>,
    credentials: Credentials,
    seed: [u8; 32],
    trace: Trace,
) -> turmoil::Result {
    let socket = SimulatedSocket::bind(PORT, &trace).await;
    let bind = Bind::Socket { socket, seed };
    let server = Endpoint::server(&Io::ambient()?, bind, Settings::control(), credentials)?;
    while let Some(accepted) = server.accept().await {
        match accepted {
            Accepted::Join(attempt) => {
                let Wants::Node { name } = &attempt.request().wants else { panic!("a node joins") };
                let issued = authority.issue(&attempt.request().csr, &node(name.parse()?), HOUR)?;
                let reply = JoinReply::Accepted { certificate: issued.certificate.into() };
                tokio::spawn(async move { attempt.reply(&reply).await });
            }
            Accepted::Session(session) => drop(tokio::spawn(serve_session(session, trace.clone()))),
        }
    }
    Ok(())
}

async fn follow(number: u64, token: JoinToken, run: u64, trace: Trace) -> turmoil::Result {
    let address = SocketAddr::new(turmoil::lookup("coordinator"), PORT);
    let bind = async |incarnation| {
        let socket = SimulatedSocket::bind(0, &trace).await;
        Bind::Socket { socket, seed: seed(run, 1000 * number + incarnation) }
    };
    let stranger = Endpoint::stranger(&Io::ambient()?, bind(1).await)?;
    let wants = Wants::Node { name: number.to_string() };
    let credentials = stranger.join(address, &token, wants, KeyRequest::new()?).await?;
    let member = Endpoint::client(&Io::ambient()?, bind(2).await, Settings::control(), credentials)?;
    loop {
        if let Ok(session) = member.connect(address, &Subject::Coordinator).await {
            while let Ok(answer) = session.request::<u64, u64>(&number, Duration::from_secs(2)).await {
                assert_eq!(answer, 2 * number);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            trace.note(format!("node {number} lost the coordinator: {:?}", session.close_reason()));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn simulate(run: u64) -> Vec<String> {
    let trace = Trace::default();
    let mut sim = turmoil::Builder::new()
        .rng_seed(run)
        .simulation_duration(Duration::from_secs(60))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(20))
        .udp_capacity(4096)
        .build();
    let authority = Arc::new(authority(1));
    let credentials = authority.credentials(&Subject::Coordinator, HOUR).unwrap();
    let token = JoinToken { ca_hash: authority.ca_hash(), id: TokenId(1), secret: TokenSecret::from_bytes([1; 16]) };
    let lives = Arc::new(AtomicU64::new(0));
    let (own_trace, own_lives) = (trace.clone(), lives.clone());
    sim.host("coordinator", move || {
        let life = own_lives.fetch_add(1, Ordering::SeqCst);
        coordinate(authority.clone(), credentials.clone(), seed(run, life), own_trace.clone())
    });
    for number in 1..=3 {
        let (token, trace) = (token.clone(), trace.clone());
        sim.host(format!("node{number}"), move || follow(number, token.clone(), run, trace.clone()));
    }
    for step in 0..8_000 {
        match step {
            3_000 => sim.crash("coordinator"),
            3_500 => sim.bounce("coordinator"),
            _ => {}
        }
        sim.step().unwrap();
    }
    drop(sim);
    Arc::try_unwrap(trace.0).expect("every host is gone").into_inner().unwrap()
}

#[test]
fn the_same_seed_gives_the_same_packets() {
    let first = simulate(1);
    let second = simulate(1);
    if let Some(at) = (0..first.len()).find(|at| second.get(*at) != Some(&first[*at])) {
        panic!("packet {at} differs: {} / {:?}", first[at], second.get(at));
    }
    assert_eq!(first.len(), second.len());
    let count = |what: &str| first.iter().filter(|line| line.contains(what)).count();
    assert_eq!(count("session of node/"), 6, "each node is back after the crash");
    assert_eq!(count("Some(Restarted)"), 3, "the new coordinator resets what it does not know");
    assert_ne!(simulate(2), first);
}
