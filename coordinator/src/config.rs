//! The coordinator's settings: one TOML file, every default here with its unit and its why.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::state::liveness::Timings;

/// What `stoke coordinator` reads. Only `dir` and `listen` have no default.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Authority, journal, admin credentials and the default place of checkpoints. One coordinator at a time.
    pub dir: PathBuf,
    /// UDP address for nodes and users; port 0 takes a free one.
    pub listen: SocketAddr,
    /// How others reach it (`host:port`). Default: the address it listens on.
    #[serde(default)]
    pub advertise: Vec<String>,
    /// HTTP address of `/metrics` and `/healthz`. Default: none.
    #[serde(default)]
    pub metrics: Option<SocketAddr>,
    /// URI below which jobs that name no folder keep their checkpoints. Default: `checkpoints/` in `dir`, which is only right
    /// where every node sees that folder.
    #[serde(default)]
    pub checkpoints: Option<String>,
    #[serde(default)]
    pub timings: Timings,
    /// Records between snapshots of the state: a restart replays at most so many.
    #[serde(default = "snapshot_every")]
    pub snapshot_every: u64,
}

/// Ten thousand records replay in well under a second, and a snapshot of a large cluster takes a few milliseconds.
fn snapshot_every() -> u64 {
    10_000
}

/// A node's and a user's certificate: short enough that a stolen one is soon worthless, long enough to sleep through a weekend.
pub const MEMBER_CERTIFICATE_TTL: Duration = Duration::from_secs(7 * 24 * 3600);
/// The coordinator's own: renewed at each start and at two thirds of it.
pub const OWN_CERTIFICATE_TTL: Duration = Duration::from_secs(30 * 24 * 3600);
/// A rank's: it is shown once, when the ranks of a generation connect; a generation never lasts this long without a new one.
pub const RANK_CERTIFICATE_TTL: Duration = Duration::from_secs(24 * 3600);

impl Config {
    /// The defaults for a folder and an address.
    pub fn new(dir: impl Into<PathBuf>, listen: SocketAddr) -> Self {
        Self {
            dir: dir.into(),
            listen,
            advertise: Vec::new(),
            metrics: None,
            checkpoints: None,
            timings: Timings::default(),
            snapshot_every: snapshot_every(),
        }
    }
}
