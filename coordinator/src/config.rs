//! The coordinator's settings: one TOML file, every default here.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::state::liveness::Timings;
use crate::state::placement;

/// What `stoke coordinator` reads. Only `dir` and `listen` have no default.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Authority, journal, admin credentials and the default place for checkpoints. For this coordinator only.
    pub dir: PathBuf,
    /// UDP address for nodes and users. Port 0 takes any free one.
    pub listen: SocketAddr,
    /// How others reach it, `host:port`. Default: the listen address.
    #[serde(default)]
    pub advertise: Vec<String>,
    /// HTTP address of `/metrics` and `/healthz`; it has no authentication, so keep it on the loopback or a private network. Default: none.
    #[serde(default)]
    pub metrics: Option<SocketAddr>,
    /// HTTPS address of the API and the dashboard, for users who show their certificates. Default: none.
    #[serde(default)]
    pub api: Option<SocketAddr>,
    /// URL of a collector that takes traces by OTLP over HTTP, such as `http://127.0.0.1:4318`. Default: none.
    #[serde(default)]
    pub otlp: Option<String>,
    /// URI below which jobs keep their checkpoints unless they say otherwise. Every node must reach it. Default: `dir/checkpoints`.
    #[serde(default)]
    pub checkpoints: Option<String>,
    #[serde(default)]
    pub timings: Timings,
    #[serde(default)]
    pub placement: placement::Options,
    #[serde(default)]
    pub lifetimes: Lifetimes,
    /// Journal entries between snapshots: more make a start slower, fewer write the whole state more often.
    #[serde(default = "snapshot_entries")]
    pub snapshot_entries: u64,
}

/// Lives of certificates, in seconds. Members renew theirs at two thirds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lifetimes {
    /// A week: a stolen one is soon worthless, and a machine may sleep through a weekend. One that was away for longer joins again.
    pub node_s: u64,
    /// A month: people are away for longer than machines.
    pub user_s: u64,
    /// A week: ranks show it only when they connect to their peers, at the beginning of a generation.
    pub rank_s: u64,
    pub coordinator_s: u64,
}

impl Default for Lifetimes {
    fn default() -> Self {
        const DAY: u64 = 24 * 3_600;
        Self { node_s: 7 * DAY, user_s: 30 * DAY, rank_s: 7 * DAY, coordinator_s: 30 * DAY }
    }
}

fn snapshot_entries() -> u64 {
    4_096
}

impl Config {
    /// The defaults for a folder and an address.
    pub fn new(dir: impl Into<PathBuf>, listen: SocketAddr) -> Self {
        Self {
            dir: dir.into(),
            listen,
            advertise: Vec::new(),
            metrics: None,
            api: None,
            otlp: None,
            checkpoints: None,
            timings: Timings::default(),
            placement: placement::Options::default(),
            lifetimes: Lifetimes::default(),
            snapshot_entries: snapshot_entries(),
        }
    }

    /// Under which names and addresses clients reach the API.
    pub(crate) fn api_names(&self, bound: SocketAddr) -> Vec<String> {
        let host = |address: &String| match address.parse::<SocketAddr>() {
            Ok(address) => address.ip().to_string(),
            Err(_) => address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host).to_owned(),
        };
        let mut names: Vec<String> = self.advertise.iter().map(host).collect();
        names.extend(["127.0.0.1", "::1", "localhost"].map(str::to_owned));
        if !bound.ip().is_unspecified() {
            names.push(bound.ip().to_string());
        }
        names.sort();
        names.dedup();
        names
    }

    /// Where clients reach the API.
    pub(crate) fn api_url(&self, bound: SocketAddr) -> String {
        let advertised = self.advertise.first().and_then(|address| match address.parse::<SocketAddr>() {
            Ok(address) => Some(SocketAddr::new(address.ip(), bound.port()).to_string()),
            Err(_) => address.rsplit_once(':').map(|(host, _)| format!("{host}:{}", bound.port())),
        });
        let here = match bound.ip().is_unspecified() {
            true => SocketAddr::from(([127, 0, 0, 1], bound.port())),
            false => bound,
        };
        format!("https://{}", advertised.unwrap_or_else(|| here.to_string()))
    }

    /// How members reach a coordinator that has bound `bound`.
    pub(crate) fn addresses(&self, bound: SocketAddr) -> Vec<String> {
        let mut addresses = self.advertise.clone();
        if bound.ip().is_unspecified() {
            // The admin's credentials are on this machine.
            let loopback: std::net::IpAddr =
                if bound.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() };
            addresses.push(SocketAddr::new(loopback, bound.port()).to_string());
        } else if addresses.is_empty() {
            addresses.push(bound.to_string());
        }
        addresses
    }
}
