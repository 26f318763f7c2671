//! What an agent and the ranks on its machine say to each other, over the socket pair that a rank inherits. Frames as everywhere else.
//! The vocabulary of rank events is shared with `node.rs`: an agent passes them on, it does not invent them.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::ids::{Digest, Generation, JobId, Rank, Step};
use crate::list::List;

/// Which process of which membership: the fence of everything a rank does (I2, I3).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct RankId {
    pub job: JobId,
    pub generation: Generation,
    pub rank: Rank,
}

impl std::fmt::Display for RankId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.job, self.generation, self.rank)
    }
}

/// Everything a rank needs to begin. Made by the coordinator, passed through the agent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StartRank {
    pub id: RankId,
    pub world: u32,
    /// The canonical job spec (TOML), at most `spec::SPEC_BYTES_MAX`.
    pub spec: String,
    /// URI of the folder that holds this job's checkpoints.
    pub checkpoints: String,
    /// URI of the checkpoint to continue from; none for a fresh start.
    pub resume: Option<String>,
}

/// One shard of a checkpoint that is durable.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ShardRecord {
    /// Position among the shards of this checkpoint; equal to the rank that wrote it.
    pub index: u32,
    /// File name inside the checkpoint's folder.
    pub file: String,
    pub bytes: u64,
    pub blake3: Digest,
}

/// Where a rank listens for its peers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeerAddress {
    pub rank: Rank,
    pub address: SocketAddr,
}

/// What became of a rank that trained to the last step.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Outcome {
    pub step: Step,
    /// Mean loss of the last step.
    pub loss: f32,
    /// Samples in committed steps, from the first step of the job on.
    pub samples: u64,
    pub weights_blake3: Digest,
    /// Held-out metrics; empty but for rank 0.
    pub metrics: BTreeMap<String, f64>,
}

/// Why a rank's process is gone.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Exit {
    Code(i32),
    Signal(i32),
    /// The process could not be started; the text says why.
    NotStarted(String),
    /// The agent was restarted or its machine was; the rank went with it.
    AgentRestarted,
}

/// What happens to a rank, in the order in which it happens. Delivered at least once, in order, until acknowledged.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum RankEvent {
    /// The process is up and its endpoint for peers listens.
    Ready { address: SocketAddr },
    /// A shard of the checkpoint at `step` is durable. When all are, the coordinator answers rank 0 with `Commit`.
    ShardStored { step: Step, shard: ShardRecord },
    /// Rank 0 only: the manifest is durable. The coordinator commits it to the catalogue; only then is the checkpoint visible.
    ManifestStored { step: Step, uri: String, manifest_blake3: Digest },
    /// The last step is done and the last checkpoint committed. The process waits for `Release`.
    Finished { outcome: Outcome },
    /// The rank gives up; it exits next. The text is for people: what failed, where, and what to do.
    Failed { error: String },
    /// The agent saw the process go. Always the last event of a rank.
    Exited { exit: Exit },
}

/// Where a rank stands. Sent about twice a second; only the newest matters, and it may be lost.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Progress {
    pub step: Step,
    pub steps: Step,
    pub loss: f32,
    pub accuracy: f32,
    pub learning_rate: f64,
    /// Samples a second over all ranks, measured over the last report's interval.
    pub samples_per_second: f64,
    /// Mean milliseconds a step: compute, exchange, apply.
    pub compute_ms: f32,
    pub exchange_ms: f32,
    pub apply_ms: f32,
    pub samples: u64,
}

/// Agent → rank.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum ToRank {
    /// First frame. Answered by `Hello`.
    Start(StartRank),
    /// Answers `Hello`: the rank's certificate and the cluster's CA (DER), for its peer endpoint. Answered by `Event(Ready)`.
    Certificate { certificate: List<u8>, authority: List<u8> },
    /// When all ranks of the generation are ready. Training begins.
    Peers(List<PeerAddress>),
    /// To rank 0: all shards of `step` are durable, write the manifest. Answered by `Event(ManifestStored)`.
    Commit { step: Step, shards: List<ShardRecord> },
    /// The checkpoint at `step` is in the catalogue. To every rank; folders of the checkpoints in `prune` (URIs) may be removed by rank 0.
    Committed { step: Step, prune: List<String> },
    /// The job is done: exit with code 0.
    Release,
    /// Stop: the job was cancelled, or this generation ended. Exit within the grace; the agent kills after it.
    Stop { reason: String },
}

/// Rank → agent.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum FromRank {
    /// Answers `Start`: a signing request (PKCS#10, DER) for the key that this process made. Answered by `Certificate`.
    Hello {
        csr: List<u8>,
    },
    /// Passed on to the coordinator as it is.
    Event(RankEvent),
    Progress(Progress),
}
