//! Packets of a local cluster in bad weather: each meets its own fate, and those that come late are kept until then. Owns what is kept; the fate
//! is the weather's (`weather.rs`), the sending the socket's.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::udp::{EcnCodepoint, Transmit};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::{Instant, sleep_until};

use super::socket::Wire;
use super::weather::{Fate, Weather};

/// Packets that wait to be late, of one socket; as many again on their way to the waiting. One more is lost: a network holds no more either.
const LATE_PACKETS_MAX: usize = 1024;

#[derive(Debug)]
pub(super) struct Outdoors {
    weather: Arc<Weather>,
    /// The address that the socket is bound to.
    own: IpAddr,
    wire: Arc<Wire>,
    late: Sender<Late>,
}

/// A packet, and when it goes.
#[derive(Debug)]
struct Late {
    due: Instant,
    destination: SocketAddr,
    ecn: Option<EcnCodepoint>,
    source: Option<IpAddr>,
    contents: Box<[u8]>,
}

impl Outdoors {
    /// Must be called where a tokio runtime is entered.
    pub(super) fn new(weather: Arc<Weather>, own: IpAddr, wire: Arc<Wire>) -> Self {
        let (late, waiting) = channel(LATE_PACKETS_MAX);
        tokio::spawn(deliver(wire.clone(), waiting));
        Self { weather, own, wire, late }
    }

    pub(super) fn is_foul(&self, transmit: &Transmit<'_>) -> bool {
        self.weather.strikes(self.own, transmit.destination.ip())
    }

    /// As on a network: what is lost is lost without a word.
    pub(super) fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let packet_bytes = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        for contents in transmit.contents.chunks(packet_bytes) {
            let packet = Transmit { contents, segment_size: None, ..*transmit };
            let Fate::Sent { copies, after } = self.weather.fate(self.own, transmit.destination.ip()) else { continue };
            for _ in 0..copies {
                match after {
                    Duration::ZERO => self.wire.send(&packet)?,
                    after => drop(self.late.try_send(Late::of(&packet, Instant::now() + after))),
                }
            }
        }
        Ok(())
    }
}

impl Late {
    fn of(packet: &Transmit<'_>, due: Instant) -> Self {
        let Transmit { destination, ecn, src_ip: source, .. } = *packet;
        Self { due, destination, ecn, source, contents: packet.contents.into() }
    }

    fn transmit(&self) -> Transmit<'_> {
        let Self { destination, ecn, source, .. } = *self;
        Transmit { destination, ecn, contents: &self.contents, segment_size: None, src_ip: source }
    }
}

/// Sends each at its time, those of one time in their order. Ends with the socket.
async fn deliver(wire: Arc<Wire>, mut late: Receiver<Late>) {
    let mut waiting: BTreeMap<(Instant, u64), Late> = BTreeMap::new();
    for number in 0.. {
        let first = waiting.first_key_value().map(|((due, _), _)| *due);
        tokio::select! {
            packet = late.recv(), if waiting.len() < LATE_PACKETS_MAX => match packet {
                Some(packet) => drop(waiting.insert((packet.due, number), packet)),
                None => return,
            },
            () = sleep_until(first.unwrap_or_else(Instant::now)), if first.is_some() => {
                let (_, packet) = waiting.pop_first().expect("it was the first a moment ago");
                // What the kernel has no room for is lost.
                let _ = wire.send(&packet.transmit());
            }
        }
    }
}
