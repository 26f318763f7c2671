//! Windows, time-outs and packet sizes of the two planes. Pure numbers with their reasons; measured in the transport benchmark. QUIC's cost is
//! per packet, so the packet size is chosen from the path before anything else.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{MtuDiscoveryConfig, TransportConfig, VarInt};

use super::socket::{self, SEND_BYTES_MAX};
use super::{ALPN_CLUSTER, ALPN_JOIN, ALPN_PEER, STRANGER_BYTES_MAX};

const KIB: u32 = 1024;
const MIB: u32 = 1024 * 1024;

/// Both sides of an idle connection speak this often, so that a silent one is a dead one.
const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// A killed peer is found after this long without a packet. Bulk connections share their machine with compute and get more patience.
const IDLE_MAX_CONTROL: Duration = Duration::from_secs(5);
const IDLE_MAX_BULK: Duration = Duration::from_secs(10);

/// The guess before the first measurement decides how soon a lost first packet is sent again (three of these). quinn's 333 ms is for the
/// open internet.
const INITIAL_RTT: Duration = Duration::from_millis(100);

/// Payload sizes: an Ethernet frame of 9,000 bytes less IPv6 and UDP headers; the largest UDP datagram on the loopback.
const JUMBO_PAYLOAD_BYTES: u16 = 8952;
const LOOPBACK_PAYLOAD_BYTES: u16 = SEND_BYTES_MAX as u16;

/// Long headers carry a 14-bit length: quinn-proto panics at a `min_mtu` of 16,384 and above.
const LOOPBACK_PAYLOAD_BYTES_MIN: u16 = 16_000;

/// What the path to a peer carries in one packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PathMtu {
    /// The loopback: 65,507 bytes, one datagram a send.
    SameHost,
    /// Jumbo frames on the interface; discovery tells whether the whole path has them.
    Jumbo,
    /// 1,500 bytes or unknown; discovery starts at 1,200.
    Ethernet,
}

impl PathMtu {
    /// Chosen from the route that this machine has to `peer`.
    pub fn towards(peer: IpAddr) -> Self {
        if socket::is_same_host(peer) {
            return Self::SameHost;
        }
        match socket::interface_mtu(peer) {
            Ok(mtu) if mtu >= 9000 => Self::Jumbo,
            Ok(_) | Err(_) => Self::Ethernet,
        }
    }
}

/// What an endpoint is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plane {
    Control,
    Bulk,
}

/// One endpoint's settings. Control and bulk never share an endpoint: a bulk stream beside it takes a request from 0.1 to 2 ms.
#[derive(Clone, Debug)]
pub struct Settings {
    pub(super) plane: Plane,
    path: Option<PathMtu>,
}

/// Limits of an authenticated connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Windows {
    /// Unread bytes of one stream. At least rate times round trip, or the sender stalls.
    stream_bytes: u32,
    /// Unread bytes of all streams: what a peer can make us hold.
    pub(super) receive_bytes: u32,
    /// Unacknowledged bytes that we hold for a peer.
    send_bytes: u32,
    pub(super) bi_streams: u32,
    pub(super) uni_streams: u32,
}

impl Settings {
    /// Sessions of nodes and users with the coordinator: many small requests, long-lived control streams, datagrams.
    pub fn control() -> Self {
        Self { plane: Plane::Control, path: Some(PathMtu::Ethernet) }
    }

    /// Rank to rank: few streams with a lot in them, packets as large as each peer's path allows.
    pub fn bulk() -> Self {
        Self { plane: Plane::Bulk, path: None }
    }

    /// Takes the path as given instead of asking the kernel for each peer: for benchmarks and tests.
    #[must_use]
    pub fn with_path(mut self, path: PathMtu) -> Self {
        self.path = Some(path);
        self
    }

    pub(super) fn path_towards(&self, peer: IpAddr) -> PathMtu {
        self.path.unwrap_or_else(|| PathMtu::towards(peer))
    }

    /// The protocols that a server of this plane answers.
    pub(super) fn served(&self) -> &'static [&'static [u8]] {
        match self.plane {
            Plane::Control => &[ALPN_CLUSTER, ALPN_JOIN],
            Plane::Bulk => &[ALPN_PEER],
        }
    }

    /// The protocol that a member connects with.
    pub(super) fn spoken(&self) -> &'static [u8] {
        match self.plane {
            Plane::Control => ALPN_CLUSTER,
            Plane::Bulk => ALPN_PEER,
        }
    }

    pub(super) fn windows(&self) -> Windows {
        match self.plane {
            Plane::Control => Windows {
                stream_bytes: MIB,
                receive_bytes: 16 * MIB,
                send_bytes: 16 * MIB,
                bi_streams: 1024,
                uni_streams: 16,
            },
            Plane::Bulk => Windows {
                stream_bytes: 16 * MIB,
                receive_bytes: 64 * MIB,
                send_bytes: 32 * MIB,
                // A gateway has one for each question.
                bi_streams: 1024,
                uni_streams: 64,
            },
        }
    }

    /// For connections that we open: the server proves itself before any stream, so the full windows stand from the start.
    pub(super) fn client_transport(&self, path: PathMtu) -> Arc<TransportConfig> {
        let windows = self.windows();
        let mut config = self.transport(path);
        config
            .receive_window(windows.receive_bytes.into())
            .max_concurrent_bidi_streams(windows.bi_streams.into())
            .max_concurrent_uni_streams(windows.uni_streams.into());
        Arc::new(config)
    }

    /// For connections that we accept: a stranger's windows until the gate has seen its certificate (I30).
    pub(super) fn server_transport(&self, path: PathMtu) -> Arc<TransportConfig> {
        let mut config = self.transport(path);
        config
            .receive_window(STRANGER_BYTES_MAX.into())
            .max_concurrent_bidi_streams(VarInt::from_u32(1))
            .max_concurrent_uni_streams(VarInt::from_u32(1));
        Arc::new(config)
    }

    fn transport(&self, path: PathMtu) -> TransportConfig {
        let windows = self.windows();
        let idle_max = match self.plane {
            Plane::Control => IDLE_MAX_CONTROL,
            Plane::Bulk => IDLE_MAX_BULK,
        };
        let mut config = TransportConfig::default();
        config
            .stream_receive_window(windows.stream_bytes.into())
            .send_window(windows.send_bytes.into())
            .keep_alive_interval(Some(KEEP_ALIVE))
            .max_idle_timeout(Some(idle_max.try_into().expect("seconds fit QUIC's time-out")))
            .initial_rtt(INITIAL_RTT)
            .datagram_receive_buffer_size(Some(64 * KIB as usize))
            .datagram_send_buffer_size(64 * KIB as usize);
        self.size_packets(&mut config, path);
        config
    }

    fn size_packets(&self, config: &mut TransportConfig, path: PathMtu) {
        if self.plane == Plane::Control {
            return;
        }
        let mut cubic = CubicConfig::default();
        match path {
            PathMtu::SameHost => {
                // One datagram already fills a send. The default window (14 KB) is below one packet and would never send it.
                config
                    .initial_mtu(LOOPBACK_PAYLOAD_BYTES)
                    .min_mtu(LOOPBACK_PAYLOAD_BYTES_MIN)
                    .mtu_discovery_config(None)
                    .enable_segmentation_offload(false);
                cubic.initial_window(u64::from(MIB));
            }
            PathMtu::Jumbo => {
                let mut discovery = MtuDiscoveryConfig::default();
                discovery.upper_bound(JUMBO_PAYLOAD_BYTES);
                config.mtu_discovery_config(Some(discovery));
                cubic.initial_window(u64::from(256 * KIB));
            }
            PathMtu::Ethernet => {
                cubic.initial_window(u64::from(128 * KIB));
            }
        }
        config.congestion_controller_factory(Arc::new(cubic));
    }
}
