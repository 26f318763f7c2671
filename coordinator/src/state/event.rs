//! Everything that changes the durable state: one journal entry each. bincode numbers variants by order: append, never reorder; a change of a
//! variant bumps `journal::FORMAT`.

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::{ClusterId, Digest, Generation, Incarnation, JobId, LogIndex, NodeId, Rank, Step, TokenId};
use stoke_protocol::message::client::TokenScope;
use stoke_protocol::message::join::Wants;
use stoke_protocol::message::node::{NodeHello, Report};
use stoke_protocol::message::rank::RankId;
use stoke_protocol::spec::{Artifact, OnNan, Straggler};

use super::commands::Runs;
use super::machine::Ask;
use super::serving::Serves;
use super::split::{Chosen, Cut};
use super::time::Time;

/// A journal entry: an event and when the coordinator took it in.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Record {
    pub at: Time,
    pub event: Event,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Event {
    /// The first entry of every journal. `admin` names the user whose credentials were made beside it.
    Founded {
        cluster: ClusterId,
        admin: String,
    },
    /// A coordinator has started; nothing is said under the new epoch before this is durable (I1).
    EpochRaised {
        version: String,
    },
    /// An administrator made a join token. Only the hash of its secret is known here (I33).
    TokenCreated {
        scope: TokenScope,
        secret_hash: Digest,
        expires: Time,
        by: String,
    },
    TokenRevoked {
        token: TokenId,
        by: String,
    },
    /// Somebody with a token asked to become a member; the token is used up by this entry.
    Joined {
        token: TokenId,
        secret_hash: Digest,
        wants: Wants,
    },
    /// An agent has opened a session and told what it has and runs.
    NodeUp {
        hello: NodeHello,
        address: String,
    },
    /// Lease and grace of a node are over.
    NodeLost {
        node: NodeId,
        incarnation: Incarnation,
    },
    /// What an agent reports of a rank, in its order.
    Reported {
        node: NodeId,
        incarnation: Incarnation,
        report: Report,
    },
    Submitted(Box<Submission>),
    CancelAsked {
        job: JobId,
        by: String,
    },
    /// A gang was placed: rank r goes to `placement[r]`.
    GenerationStarted {
        job: JobId,
        generation: Generation,
        placement: Vec<NodeId>,
    },
    /// A changing request that was refused (I34). Those that were done are entries of their own and name who asked.
    Refused {
        who: String,
        verb: String,
        reason: String,
    },
    /// A gang does not come up: it is ended like one whose rank has failed.
    Stalled {
        job: JobId,
        generation: Generation,
        reason: String,
    },
    /// Missing ranks of a running job were placed.
    RanksPlaced {
        job: JobId,
        generation: Generation,
        places: Vec<(Rank, NodeId)>,
    },
    /// A rank is not to be one of its job any more, though its process may live.
    Evicted {
        id: RankId,
        reason: String,
    },
    /// A job is to have so many ranks.
    Scaled {
        job: JobId,
        ranks: u32,
        by: String,
    },
    /// A node is to be emptied: it gets no new ranks, and those that it has move away. The deadline counts from this entry.
    DrainAsked {
        node: NodeId,
        deadline_ms: Option<u64>,
        by: String,
    },
    /// The node serves again.
    DrainLifted {
        node: NodeId,
        by: String,
    },
    /// The deadline of a drain is over: the ranks that are left are stopped, and their jobs go on as after a loss.
    DrainOverdue {
        node: NodeId,
    },
    /// A rank is to give way to a successor on another node.
    MoveAsked {
        id: RankId,
        reason: String,
    },
    /// A rank that is to move leaves between two steps; nobody takes its place for now.
    RankRetired {
        id: RankId,
        reason: String,
    },
    /// A lost or drained node is no member any more; its certificate opens nothing.
    NodeRemoved {
        node: NodeId,
        by: String,
    },
    /// Ranks fail on a node that do well elsewhere: it gets no new ones.
    NodeQuarantined {
        node: NodeId,
        reason: String,
    },
    /// It has been left alone for a while: one rank may try it.
    ProbationBegun {
        node: NodeId,
    },
    /// A person says that it is mended.
    QuarantineLifted {
        node: NodeId,
        by: String,
    },
    /// How a rank of a running job does, for its timeline: the words follow the rank and its node.
    PaceNoted {
        id: RankId,
        words: String,
    },
    /// A job stores a checkpoint, stops and waits, so that a more urgent one has room.
    Preempted {
        job: JobId,
        by: JobId,
    },
    /// It has taken too long with that: it stops anyway.
    YieldOverdue {
        job: JobId,
    },
    /// A rank leaves its job between two steps, so that a more urgent one has room.
    RankYielded {
        id: RankId,
        by: JobId,
    },
    /// No policy takes this checkpoint away.
    Pinned {
        job: JobId,
        step: Step,
        by: String,
    },
    Unpinned {
        job: JobId,
        step: Step,
        by: String,
    },
    /// Of a job's checkpoints only the newest `keep`, the pinned and the needed stay.
    Pruned {
        job: JobId,
        keep: u32,
        by: String,
    },
    /// A node has removed what the prune of entry `index` let go, or could not.
    Swept {
        node: NodeId,
        job: JobId,
        index: LogIndex,
        removed: u32,
        error: Option<String>,
    },
    /// The revision of this job gets all new requests of its model; jobs of other revisions leave.
    Promoted {
        job: JobId,
        by: String,
    },
    /// Jobs of a model with a share or a shadow leave.
    RolledBack {
        model: String,
        by: String,
    },
    /// A job that serves takes no new requests, and is cancelled when its answers are over.
    LeaveAsked {
        job: JobId,
        by: String,
    },
    /// Why a model that scales itself has other replicas now, or has not, for the timelines of these jobs.
    ScaleNoted {
        jobs: Vec<JobId>,
        words: String,
    },
    /// How the model of a job that waits is cut, for as long as the job lives: what is replaced or starts again has the same layers.
    SplitChosen {
        job: JobId,
        chosen: Box<Chosen>,
    },
    /// No node could ever serve the model of a job that waits for its cut.
    SplitRefused {
        job: JobId,
        reason: String,
    },
}

/// A job as it was submitted. What the state needs of the spec stands beside its text, so that a replay never depends on how a later release
/// reads specs.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Submission {
    /// Idempotency key, the owner's own.
    pub key: String,
    pub owner: String,
    pub name: String,
    pub trainer: String,
    /// Canonical TOML.
    pub spec: String,
    /// The URI of the job's checkpoints without the job's id at its end.
    pub checkpoints: String,
    pub resume: Option<String>,
    pub keep: u32,
    pub priority: i32,
    pub attempts_max: u32,
    pub ranks_min: u32,
    /// Steps between comparisons of the ranks' parameters; 0: none.
    pub digest_every: u64,
    pub on_nan: OnNan,
    pub straggler: Straggler,
    /// Ranks keep parts of the optimizer's state, each at two of them.
    pub sharded: bool,
    /// Of a job that serves.
    pub serves: Option<Serves>,
    /// Of a job that runs a command.
    pub runs: Option<Runs>,
    /// Of a job whose trainer is the user's own.
    pub program: Option<Artifact>,
    /// Awaited: what `ask` says of ranks and memory is not known yet.
    pub cut: Cut,
    pub ask: Ask,
}
