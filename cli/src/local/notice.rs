//! What a supervisor tells whoever started it, one JSON object a line on its standard output.

use serde::{Deserialize, Serialize};

/// Supervisor → `stoke run` or `stoke up`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Notice {
    /// The coordinator answers and all agents are connected. Some of their nodes may get no ranks: that is for people to lift, with a cluster that
    /// is up.
    Ready {
        address: String,
        metrics: Option<String>,
        api: Option<String>,
        nodes: u32,
        without_ranks: Vec<WithoutRanks>,
    },
    /// A process died and is started again.
    Restarting { process: String, reason: String, restarts: u32 },
    /// The process is back.
    Restarted { process: String, pid: u32 },
    /// The cluster cannot go on; the supervisor takes it down. `log` is the tail of the log of the process that caused it; `exit` the code that
    /// whoever asked for it ends with.
    Failed { reason: String, help: String, log: Vec<String>, exit: u8 },
}

/// A node that is drained, or in quarantine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WithoutRanks {
    pub node: String,
    pub state: String,
    /// With what lifts it.
    pub reason: String,
}

/// A coordinator → its supervisor, first line on its standard output: where it listens.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Listening {
    pub address: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api: Option<String>,
}
