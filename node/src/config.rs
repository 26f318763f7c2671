//! The agent's settings: one TOML file, every default here.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use stoke_protocol::label::{check_labels, check_node_name};
use stoke_protocol::spec::Bytes;

const GATEWAY_PORT: u16 = 8400;

/// What `stoke node` reads. Only `dir` and `coordinator` have no default.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Credentials, the fence, logs. For this agent only.
    pub dir: PathBuf,
    /// `host:port` of the coordinator; several are tried in turn.
    pub coordinator: Vec<String>,
    /// What people call this machine. Default: its host name.
    #[serde(default = "host_name")]
    pub name: String,
    /// For placement: `zone = "a"`.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Processors to offer. Default: all that this process may use.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// Memory to offer. Default: all that this process may use.
    #[serde(default)]
    pub memory: Option<Bytes>,
    /// Where ranks listen for their peers. Default: the address that leads to the coordinator.
    #[serde(default)]
    pub listen_ip: Option<IpAddr>,
    /// Where clients reach the models that are served, over HTTP: `IP:PORT`, or `none`. Default: port 8400 of the loopback, if it is free.
    #[serde(default)]
    pub gateway: Gateway,
    /// Who may ask the gateway: a file with a line `USER TOKEN` for each, for its owner only. Without it, everybody on this machine, and nobody else.
    #[serde(default)]
    pub gateway_tokens: Option<PathBuf>,
    /// TLS for the gateway: PEM files of its certificate chain and key. Both, or none.
    #[serde(default)]
    pub gateway_certificate: Option<PathBuf>,
    #[serde(default)]
    pub gateway_key: Option<PathBuf>,
    /// The program of a rank. Default: this executable with the argument `worker`.
    #[serde(default)]
    pub worker_command: Vec<String>,
    /// Ranks that are stopped because the agent ends have this long before they are killed.
    #[serde(default = "stop_grace_ms")]
    pub stop_grace_ms: u64,
    /// A rank's process that has said nothing for so long is killed, and its job goes on without it.
    #[serde(default = "rank_silence_ms")]
    pub rank_silence_ms: u64,
    /// A rank whose agent is gone goes on for so long without one, then it ends by itself: time to start the agent again.
    #[serde(default = "orphan_grace_ms")]
    pub orphan_grace_ms: u64,
    /// Ranks leave a copy of their last shards in the machine's memory (`/dev/shm`), from where a gang that begins again restores them.
    #[serde(default = "shards_in_memory")]
    pub shards_in_memory: bool,
    /// A rank's log is cut into two files of at most so many bytes; older lines go.
    #[serde(default = "log_bytes")]
    pub log_bytes: u64,
}

/// Where a node's gateway listens.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Gateway {
    /// On port 8400 of the loopback. An agent that finds it taken goes on without.
    #[default]
    Usual,
    None,
    At(SocketAddr),
}

impl Gateway {
    pub(crate) fn address(self) -> Option<SocketAddr> {
        match self {
            Self::Usual => Some((Ipv4Addr::LOCALHOST, GATEWAY_PORT).into()),
            Self::None => None,
            Self::At(address) => Some(address),
        }
    }
}

impl FromStr for Gateway {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            address => address
                .parse()
                .map(Self::At)
                .map_err(|_| format!("{text:?} is no address: write IP:PORT, for example 127.0.0.1:8400, or \"none\"")),
        }
    }
}

impl Serialize for Gateway {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Usual => serializer.serialize_str(&format!("127.0.0.1:{GATEWAY_PORT}")),
            Self::None => serializer.serialize_str("none"),
            Self::At(address) => serializer.collect_str(address),
        }
    }
}

impl<'de> Deserialize<'de> for Gateway {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Config {
    /// The defaults for a folder and a coordinator.
    pub fn new(dir: impl Into<PathBuf>, coordinator: Vec<String>) -> Self {
        Self {
            dir: dir.into(),
            coordinator,
            name: host_name(),
            labels: BTreeMap::new(),
            cpus: None,
            memory: None,
            listen_ip: None,
            gateway: Gateway::None,
            gateway_tokens: None,
            gateway_certificate: None,
            gateway_key: None,
            worker_command: Vec::new(),
            stop_grace_ms: stop_grace_ms(),
            rank_silence_ms: rank_silence_ms(),
            shards_in_memory: shards_in_memory(),
            orphan_grace_ms: orphan_grace_ms(),
            log_bytes: log_bytes(),
        }
    }

    /// What the coordinator would refuse.
    pub fn check(&self) -> Result<(), String> {
        check_node_name(&self.name)?;
        check_labels(self.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())))
    }

    /// An address of this machine on the way to the coordinator at `remote`; loopback if there is no route.
    pub(crate) fn rank_ip(&self, remote: IpAddr) -> IpAddr {
        self.listen_ip.unwrap_or_else(|| {
            let any: (IpAddr, u16) = if remote.is_ipv4() {
                (Ipv4Addr::UNSPECIFIED.into(), 0)
            } else {
                (std::net::Ipv6Addr::UNSPECIFIED.into(), 0)
            };
            // Connecting a UDP socket sends nothing: it asks the kernel for the route.
            let route = std::net::UdpSocket::bind(any)
                .and_then(|socket| socket.connect((remote, 9)).and_then(|()| socket.local_addr()));
            route.map_or(Ipv4Addr::LOCALHOST.into(), |address| address.ip())
        })
    }
}

fn host_name() -> String {
    sysinfo::System::host_name().unwrap_or_else(|_| "node".to_owned())
}

fn stop_grace_ms() -> u64 {
    5_000
}

fn rank_silence_ms() -> u64 {
    5_000
}

fn shards_in_memory() -> bool {
    true
}

fn orphan_grace_ms() -> u64 {
    300_000
}

fn log_bytes() -> u64 {
    8 << 20
}
