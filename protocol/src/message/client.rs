//! What people and programs ask of the coordinator: one request stream a question. Every question is authorised by the certificate's role.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::node::{Capacity, Heat, LogChunk};
use super::rank::{Exit, Progress};
use super::serve::Traffic;
use super::split::{Planned, Split};
use crate::ids::{ClusterId, Digest, Epoch, Generation, JobId, LogIndex, NodeId, Rank, Step, TokenId};
use crate::ledger::Ledger;
use crate::list::List;
use crate::spec::{Artifact, Precision, Task};

/// Client → coordinator.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Run this. The same key with the same spec gives the same job, over any number of tries; with another spec an error (I7). Answered by
    /// `Submitted` after the job is durable (I6). Role: submitter.
    Submit { key: String, spec: String },
    /// Answered by `Cluster`. Role: viewer, like all questions that only look.
    Cluster,
    /// Answered by `Jobs`.
    Jobs,
    /// Answered by `Job`.
    Job { job: JobId },
    /// Answered by `Nodes`.
    Nodes,
    /// Answered by `Cancelled` when no rank will start any more (I10). Role: submitter.
    Cancel { job: JobId },
    /// Answered by `Explained`: why it waits, and what has happened to it.
    Explain { job: JobId },
    /// Answered by `Checkpoints`; all jobs' when none is named.
    Checkpoints { job: Option<JobId> },
    /// Answered by `Log` frames until a chunk is the last; all ranks' when none is named.
    Logs { job: JobId, rank: Option<Rank>, tail: Option<u32>, follow: bool },
    /// Answered by `Job` frames: one at once, one a change (at most about five a second), the last one when the job has ended.
    Watch { job: JobId },
    /// Answered by `Token`. Role: admin.
    TokenCreate { scope: TokenScope, ttl_seconds: u64 },
    /// Answered by `Tokens`. Role: admin.
    TokenList,
    /// Answered by `TokenRevoked`. Role: admin.
    TokenRevoke { token: TokenId },
    /// A fresh certificate for the user that asks. Answered by `Certificate`. Any role.
    Renew { csr: List<u8> },
    /// Let a job have so many ranks from now on, while it runs. Answered by `Scaled`. Role: submitter.
    Scale { job: JobId, ranks: u32 },
    /// Empty a node: no new ranks, and those that it has move away. After the deadline those that are left are stopped. The same again changes
    /// nothing. Answered by `Node`. Role: operator.
    Drain { node: NodeId, deadline_ms: Option<u64> },
    /// Let a node serve again that was drained. Answered by `Node`. Role: operator.
    Undrain { node: NodeId },
    /// Let a lost or drained node go for good: its certificate opens nothing any more. The same again changes nothing. Answered by
    /// `NodeRemoved`. Role: operator.
    RemoveNode { node: NodeId },
    /// Let a node have ranks again that was in quarantine. Answered by `Node`. Role: operator.
    ReleaseNode { node: NodeId },
    /// No policy takes this checkpoint away from now on. Answered by `Pinned`, also when it was before. Role: submitter.
    Pin { job: JobId, step: Step },
    /// The opposite; nothing is removed by this. Answered by `Pinned`.
    Unpin { job: JobId, step: Step },
    /// Only the newest `keep` checkpoints of a job stay (none: as many as its spec says), with the pinned and those that a job continues from.
    /// `dry_run`: only tells. Answered by `Pruned` when the others are out of sight; a node removes them after that. Role: submitter.
    Prune { job: JobId, keep: Option<u32>, dry_run: bool },
    /// The revision that a job serves gets all new requests of its model: its shares and shadows end, and jobs of other revisions leave. The same
    /// again changes nothing. Answered by `Serving`. Role: submitter.
    Promote { job: JobId },
    /// Jobs of a model with a share or a shadow leave. The same again changes nothing. Answered by `Serving`. Role: submitter.
    Rollback { model: String },
    /// So many jobs are to serve a model, besides those with a share or a shadow: copies of the newest are submitted, or the newest leave.
    /// Answered by `Serving`. Role: submitter.
    Replicas { model: String, replicas: u32 },
    /// How this spec of a model that is served would be cut, were it submitted now. Answered by `Planned` when its nodes have been asked.
    Plan { spec: String },
    /// How a job went since this coordinator began, as far as it was heard after `after_ms` (0: all of it): points of steps that were done again
    /// replace those that were told before. Answered by `History`.
    History { job: JobId, after_ms: u64 },
    /// An artifact of so many bytes is to be there for a job. Answered by `Artifact`: how much of it the coordinator has. Role: submitter.
    Artifact { artifact: Artifact, bytes: u64 },
    /// A part of it, behind what the coordinator has; the last one makes it whole. Answered by `Artifact`. The same again changes nothing. Role: submitter.
    ArtifactPart { artifact: Artifact, bytes: u64, offset: u64, part: List<u8> },
    /// Jobs that wait or run, and the newest `ended` of the others: for those who look again and again. Answered by `Jobs`.
    Recent { ended: u32 },
    /// How the cluster is, and what has happened in it behind this entry: for those who look every second. Answered by `Pulse`.
    Pulse { after: LogIndex },
}

/// Coordinator → client.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Reply {
    Submitted {
        job: JobId,
        created: bool,
    },
    Cluster(ClusterView),
    Jobs(List<JobView>),
    Job(Box<JobView>),
    Nodes(List<NodeView>),
    Cancelled {
        job: JobId,
    },
    Explained(Explanation),
    Checkpoints(List<CheckpointView>),
    Log(LogChunk),
    /// The whole token; its secret is shown this once and kept nowhere.
    Token {
        token: TokenId,
        text: String,
    },
    Tokens(List<TokenView>),
    TokenRevoked {
        token: TokenId,
    },
    Certificate {
        certificate: List<u8>,
    },
    Refused(Refusal),
    Scaled {
        job: JobId,
        ranks: u32,
    },
    Node(Box<NodeView>),
    NodeRemoved {
        node: NodeId,
    },
    /// As it stands now: `pinned` says which of the two was asked.
    Pinned(CheckpointView),
    /// What goes, or would go, and what stays; each oldest first.
    Pruned {
        removed: List<CheckpointView>,
        kept: List<CheckpointView>,
    },
    /// Who serves a model from now on, oldest first.
    Serving {
        model: String,
        /// With neither share nor shadow.
        jobs: List<JobId>,
        /// Of these, the ones that this request has submitted.
        added: List<JobId>,
        /// They take no new requests, and are cancelled when their answers are over.
        leaving: List<JobId>,
    },
    Planned(Box<Planned>),
    /// A few hundred points at most, the oldest first.
    History(List<Point>),
    /// So many bytes of an artifact are there, from the first on; all of them: it is whole, and has its hash.
    Artifact {
        received: u64,
    },
    Pulse(Box<Pulse>),
}

/// A part of `ClusterView` that costs nothing, and the news.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Pulse {
    pub version: String,
    pub epoch: Epoch,
    pub index: LogIndex,
    pub nodes_up: u32,
    pub nodes: u32,
    pub jobs_running: u32,
    pub jobs_queued: u32,
    pub ranks_slow: u32,
    /// Who asks, as the coordinator sees it.
    pub you: String,
    pub now_ms: u64,
    /// Oldest first, a few hundred at most; none where nothing has happened.
    pub events: List<ClusterEvent>,
}

/// Something that has happened in the cluster, in words for people.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClusterEvent {
    pub at_ms: u64,
    /// Entry of the journal; several events may be of one.
    pub index: LogIndex,
    pub job: Option<JobId>,
    pub node: Option<NodeId>,
    /// Something was lost, or failed.
    pub grave: bool,
    pub text: String,
}

/// Where a job stood.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Point {
    pub at_ms: u64,
    pub step: Step,
    pub loss: f32,
    pub accuracy: f32,
    pub samples_per_second: f32,
    /// Of a job with `[rl]`.
    pub env_steps: Option<u64>,
    /// Mean of the last hundred episodes.
    pub episode_return: Option<f32>,
}

/// Why a request was not done. `code` is stable for programs; `message` says what, `mend` what to do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Refusal {
    pub code: RefusalCode,
    pub message: String,
    pub mend: String,
}

/// Stable over releases; the command line maps each to an exit code.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalCode {
    /// The spec or an argument is wrong.
    Invalid,
    NotFound,
    /// The role of the certificate does not allow it.
    Forbidden,
    /// The same idempotency key with another spec, or the job has ended already.
    Conflict,
    /// Not now: the journal's disk is full, or a queue is. Try again later.
    Unavailable,
}

/// What a join token admits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenScope {
    Node,
    Admin,
    Operator,
    Submitter,
    Viewer,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ClusterView {
    pub cluster: ClusterId,
    pub version: String,
    pub epoch: Epoch,
    pub index: LogIndex,
    pub state_hash: Digest,
    pub nodes_up: u32,
    pub nodes: u32,
    pub jobs_running: u32,
    pub jobs_queued: u32,
    /// Ranks that compute more slowly than their peers now.
    pub ranks_slow: u32,
    /// Who asks, as the coordinator sees it.
    pub you: String,
    /// The coordinator's clock, in milliseconds since the Unix epoch: for people who wonder about certificates (I36).
    pub now_ms: u64,
    /// URL of the HTTP API, where there is one.
    pub api: Option<String>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct NodeView {
    pub node: NodeId,
    pub name: String,
    pub state: NodeState,
    pub address: String,
    /// URL of its gateway, if it has one.
    pub gateway: Option<String>,
    pub capacity: Capacity,
    pub cpus_used: u32,
    pub memory_reserved_bytes: u64,
    pub gpus_used: u32,
    pub ranks: List<(JobId, Rank)>,
    /// Of all processors, from the last heartbeat.
    pub cpu_load: f32,
    /// From the last heartbeat too.
    pub memory_used_bytes: u64,
    pub heat: Heat,
    /// Milliseconds since the last heartbeat.
    pub silent_ms: u64,
    /// Why it gets no ranks, and what is waited for; empty while it serves.
    pub reason: String,
    pub drain: Option<DrainView>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DrainView {
    pub by: String,
    /// Milliseconds since the Unix epoch, by the coordinator's clock.
    pub since_ms: u64,
    pub deadline_ms: Option<u64>,
    /// The deadline came first, and ranks were stopped.
    pub overdue: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeState {
    Up,
    /// Its lease has run out; its ranks are taken as lost after the grace.
    Silent,
    Lost,
    /// It gets no ranks, and those that it has move away.
    Draining,
    /// It has no ranks and gets none.
    Drained,
    /// It gets no ranks, because they fail there.
    Quarantined,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct JobView {
    pub job: JobId,
    pub name: String,
    /// Empty for a job that serves.
    pub trainer: String,
    pub serves: Option<ServesView>,
    /// Of a job that serves: which of the model's new requests it gets.
    pub traffic: Option<Traffic>,
    /// Of a job that runs a command.
    pub exec: Option<ExecView>,
    pub owner: String,
    pub state: JobState,
    /// Why it waits, is about to stop, or ended; empty while it runs well.
    pub reason: String,
    pub priority: i32,
    pub generation: Generation,
    /// Since it last got further.
    pub failures: u32,
    /// How often it lost ranks and went on.
    pub recoveries: u32,
    /// How often it stopped to make room for a more urgent job.
    pub preemptions: u32,
    /// Members of its newest generations (at most 64), first to last.
    pub world_sizes: List<u32>,
    pub placement: List<(Rank, NodeId)>,
    pub progress: Option<Progress>,
    /// Ranks that compute more slowly than the others now, and how many times.
    pub slow: List<(Rank, f32)>,
    pub checkpoint: Option<CheckpointView>,
    pub outcome: Option<OutcomeView>,
    /// Milliseconds since the Unix epoch, by the coordinator's clock; for people.
    pub submitted_ms: u64,
    pub started_ms: Option<u64>,
    pub ended_ms: Option<u64>,
}

/// How the commands of a job's ranks do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ExecView {
    /// How often the gang has begun anew because of a loss.
    pub restarts: u32,
    /// Failures after which the job has failed.
    pub attempts: u32,
    /// What each start of the command finds in its folder.
    pub artifact: Option<Artifact>,
    /// How commands of the newest gang have ended.
    pub exits: List<(Rank, Exit)>,
}

/// What a job serves.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ServesView {
    /// As clients name it.
    pub model: String,
    pub task: Task,
    /// Its files, as the spec names them.
    pub weights: String,
    pub precision: Precision,
    /// The gang is whole, and a token has gone through all of it.
    pub ready: bool,
    /// What its head said last; none where it has not been heard for a few seconds.
    pub load: Option<LoadView>,
    /// Jobs that serve the model, besides those with a share or a shadow and those that leave; and those of them that answer.
    pub replicas: u32,
    pub answering: u32,
    /// Questions for the model that wait at gateways for a head.
    pub held: u32,
    /// Where the model has as many replicas as its requests need.
    pub scale: Option<ScaleView>,
}

/// What a head has under way, and how fast it was over the last ten seconds.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct LoadView {
    pub running: u32,
    pub waiting: u32,
    /// Since its process began.
    pub answers: u64,
    pub tokens: u64,
    pub tokens_per_second: f32,
    /// From a question's arrival; none where there was none.
    pub first_token_p50_ms: Option<u32>,
    pub first_token_p99_ms: Option<u32>,
}

/// Bounds of a model's replicas, as its newest job says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ScaleView {
    pub min: u32,
    pub max: u32,
    /// That one replica is to have.
    pub requests: u32,
    pub first_token_ms: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// Waits for room; the reason says for what.
    Queued,
    /// Placed; its ranks come up.
    Starting,
    Running,
    /// A generation has ended early; its ranks are being stopped before the next try.
    Recovering,
    Cancelling,
    Succeeded,
    Failed,
    Cancelled,
}

impl JobState {
    /// Terminal states absorb (I8).
    pub fn is_terminal(self) -> bool {
        match self {
            Self::Succeeded | Self::Failed | Self::Cancelled => true,
            Self::Queued | Self::Starting | Self::Running | Self::Recovering | Self::Cancelling => false,
        }
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct OutcomeView {
    pub step: Step,
    pub loss: f32,
    pub samples: u64,
    pub ledger: Ledger,
    /// Steps that were left out because their sum was not finite.
    pub skipped: u64,
    pub weights_blake3: Digest,
    pub metrics: BTreeMap<String, f64>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CheckpointView {
    pub job: JobId,
    pub generation: Generation,
    pub step: Step,
    pub uri: String,
    pub shards: u32,
    pub bytes: u64,
    pub committed_ms: u64,
    /// Of the bytes of its manifest, as they were committed.
    pub manifest_blake3: Digest,
    pub pinned: bool,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Explanation {
    pub job: Box<JobView>,
    /// For a job that waits: a line for each node, why it does not fit there.
    pub nodes: List<(NodeId, String)>,
    pub events: List<TimelineEvent>,
    /// Of a job that serves, where it was chosen.
    pub split: Option<Box<Split>>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TimelineEvent {
    pub at_ms: u64,
    pub index: LogIndex,
    pub text: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TokenView {
    pub token: TokenId,
    pub scope: TokenScope,
    pub state: TokenState,
    pub expires_ms: u64,
    pub created_by: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenState {
    Open,
    Used,
    Expired,
    Revoked,
}
