//! What an agent and the ranks on its machine say to each other, over the socket pair that a rank inherits, and after the end of that agent over
//! a socket on which the rank waits for the next one. Frames as everywhere else. The vocabulary of rank events is shared with `node.rs`: an
//! agent passes them on, it does not invent them.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::load::Load;
use crate::ids::{Digest, Fingerprint, Generation, JobId, Rank, Step, Term};
use crate::ledger::Ledger;
use crate::list::List;
use crate::spec::Artifact;

/// Which process: the one that was started for slot `rank` of the job when it was placed in `generation`. It keeps its id through later
/// generations, for as long as it lives; a process that replaces it has a higher one (I3).
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
    /// The canonical job spec (TOML), at most `spec::SPEC_BYTES_MAX`.
    pub spec: String,
    /// URI of the folder that holds this job's checkpoints.
    pub checkpoints: String,
    pub from: StartFrom,
    /// What the coordinator has kept for it on its machine.
    pub memory_bytes: u64,
}

/// Where a rank's first state comes from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum StartFrom {
    /// The seed.
    Seed,
    Checkpoint(Origin),
    /// The ranks that train already: it joins them.
    Peers,
}

/// A checkpoint to begin with.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Origin {
    pub uri: String,
    /// Of the manifest that is in the catalogue: whatever else lies there is not that checkpoint. None where the catalogue does not know the URI,
    /// which a person has named.
    pub manifest_blake3: Option<Digest>,
}

/// Who trains in a generation: the fence of steps and checkpoints (I2). Made by the coordinator; while it is away, a quorum of the members may go on
/// without those that are gone, and nobody else may change it (I18).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Membership {
    pub generation: Generation,
    /// Those that own lanes, in the order of the lanes.
    pub members: List<Member>,
    /// Those that receive the state and every sum until they have caught up; they own no lane yet.
    pub joining: List<Member>,
    /// The generation whose members all live: they go on to this one together, between two of its steps. None: somebody is gone, so a step
    /// that is under way is given up at once and done again.
    pub after: Option<Generation>,
    /// 0 from the coordinator. Members that go on without it draw a higher one; such a membership never leaves the ranks.
    pub ballot: u32,
    pub purpose: Purpose,
    /// How many generations of the job have ended because of a loss: commands are told how often they were started again.
    pub restarts: u32,
}

/// What the members of a generation are to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Purpose {
    Train,
    /// Store a checkpoint of the step at which it begins, and hold: the job makes room for another one.
    Checkpoint,
}

/// A rank, and where it listens for its peers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Member {
    pub id: RankId,
    pub address: SocketAddr,
}

impl Membership {
    /// The place of a rank in the order of the lanes.
    pub fn position(&self, id: RankId) -> Option<u32> {
        self.members.iter().position(|member| member.id == id).map(|position| position as u32)
    }

    pub fn term(&self) -> Term {
        Term { generation: self.generation, ballot: self.ballot }
    }

    /// Whether so many of the members, the first one among them or not, may go on while the coordinator is away: two sets that have nobody in
    /// common never both may (I18). Of two halves it is the one with the first member.
    pub fn is_quorum(&self, of: &[RankId]) -> bool {
        let present = self.members.iter().filter(|member| of.contains(&member.id)).count();
        let first = self.members.first().is_some_and(|first| of.contains(&first.id));
        2 * present > self.members.len() || first && 2 * present == self.members.len()
    }
}

/// One shard of a checkpoint that is durable.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ShardRecord {
    /// Position among the shards of this checkpoint; equal to the position of the member that wrote it.
    pub index: u32,
    /// File name inside the checkpoint's folder.
    pub file: String,
    pub bytes: u64,
    pub blake3: Digest,
}

/// What became of a rank that trained to the last step.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Outcome {
    pub step: Step,
    /// Mean loss of the last step.
    pub loss: f32,
    /// Samples of so many steps.
    pub samples: u64,
    /// The same as the sums of the steps have shown it.
    pub ledger: Ledger,
    /// Steps that were left out because their sum was not finite.
    pub skipped: u64,
    pub weights_blake3: Digest,
    /// Held-out metrics; empty but for the first member.
    pub metrics: BTreeMap<String, f64>,
}

/// Why a rank's process is gone.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Exit {
    Code(i32),
    Signal(i32),
    /// The process could not be started; the text says why.
    NotStarted(String),
    /// It ended while there was no agent, with the machine or without; nobody saw how.
    AgentRestarted,
    /// The agent was told to end, and ended its ranks.
    AgentStopped,
    /// It ended without a word under an agent that had found it running and is not its parent: the system tells no code.
    Unseen,
}

/// What happens to a rank, in the order in which it happens. Delivered at least once, in order, until acknowledged.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum RankEvent {
    /// The process is up and its endpoint for peers listens.
    Ready { address: SocketAddr },
    /// A shard of the checkpoint at `step` is durable. `state` is the whole state that it was cut from, as this rank has it. When all members'
    /// are durable and of one state, the coordinator answers the first member with `Commit` (I19).
    ShardStored { generation: Generation, step: Step, shard: ShardRecord, state: Fingerprint },
    /// First member only: the manifest is durable. The coordinator commits it to the catalogue; only then is the checkpoint visible.
    ManifestStored { generation: Generation, step: Step, uri: String, manifest_blake3: Digest },
    /// A shard or the manifest of the checkpoint at `step` could not be written; the one before it stays the newest.
    NotStored { generation: Generation, step: Step, error: String },
    /// The checkpoint (URI) that the rank was to begin with cannot be used; the rank exits next. The coordinator takes an earlier one.
    Damaged { uri: String, error: String },
    /// The last step is done and the last checkpoint committed. The process waits for `Release`, or for another generation.
    Finished { generation: Generation, outcome: Outcome },
    /// The rank gives up; it exits next. The text is for people: what failed, where, and what to do. Permanent: the spec or the data is wrong,
    /// and another try would end the same way.
    Failed { error: String, permanent: bool },
    /// The agent saw the process go. Always the last event of a rank.
    Exited { exit: Exit },
    /// First member only: the generation trains; `step` steps are done. What the generation before had begun is done again.
    Resumed { generation: Generation, step: Step },
    /// A rank that joins has the state of the others and has followed them to `step`. Answered by a membership in which it owns lanes.
    Joined { generation: Generation, step: Step },
    /// The connection to another rank of the generation is gone, for a reason that this rank cannot know.
    PeerLost { generation: Generation, peer: RankId, error: String },
    /// The coordinator is away, and this rank goes on with `members`, a quorum of the generation's, after `step` steps. When a quorum has said
    /// so the coordinator gives the others up, and makes the next generation of these.
    WentOn { generation: Generation, step: Step, members: List<RankId> },
    /// After `step` steps the members' parameters are not the same: each member's, as this rank was told with their partial sums. The sum under
    /// way was not applied. Every member that sees it says so, and waits for another generation.
    Differ { generation: Generation, step: Step, replicas: List<(RankId, Fingerprint)> },
    /// The sum after `step` steps is not finite and was not applied. Every member says what its lanes gave to it, and waits for another
    /// generation or to be stopped.
    NotFinite { generation: Generation, step: Step, given: Given },
    /// Of a job that runs a command: this rank's command of the generation has ended. With code 0 the process waits for `Release` or for a generation of
    /// other members; otherwise `Failed` follows.
    CommandEnded { generation: Generation, exit: Exit },
    /// Of a job whose ranks keep parts of the optimizer's state: after `step` steps nobody has some part of it any more, or the two that have it do not
    /// agree; the text says which. Every member that sees it says so, and waits to be stopped: the job goes back to its last checkpoint.
    StateLost { generation: Generation, step: Step, error: String },
}

/// What a rank's lanes gave to a sum that is not finite.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Given {
    Finite,
    /// Not finite, and finite when computed again: its machine is at fault.
    FiniteAgain,
    /// Not finite, also when computed again. By lanes; none where each lane is finite and their sum is not.
    NotFinite {
        lanes: List<u32>,
    },
}

/// Where a rank stands. Sent about twice a second; only the newest matters, and it may be lost.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Progress {
    pub generation: Generation,
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
    /// Steps that were left out because their sum was not finite, of all.
    pub skipped: u64,
    /// Lanes that the rank computes.
    pub lanes: u32,
    /// Of a job with `[rl]`.
    pub rl: Option<RlProgress>,
}

/// Where the time of one step went, as one rank saw it. Its parts follow each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StepTimes {
    pub generation: Generation,
    /// How many steps were done with it.
    pub step: Step,
    /// Microseconds since the Unix epoch, by the clock of the rank's machine. For people: never compared with another machine's (I36).
    pub began_us: u64,
    pub compute_us: u32,
    pub exchange_us: u32,
    pub apply_us: u32,
}

impl StepTimes {
    /// More are never told at once: what a rank keeps while it has no agent.
    pub const TOLD_MAX: usize = 256;

    /// Whether the step of this number in its generation, counted from 1, is told: the first 32, and then 16 each time that their number has doubled.
    /// All ranks tell the same ones, whatever their pace.
    pub fn is_told(number: u64) -> bool {
        number > 0 && u64::BITS - number.leading_zeros() <= 5 + number.trailing_zeros()
    }
}

/// How reinforcement learning goes. None: not known yet, or the algorithm has no such figure.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct RlProgress {
    pub round: u64,
    pub rounds: u64,
    /// Of all envs of all ranks together.
    pub env_steps: u64,
    pub env_steps_per_second: f64,
    /// That have ended.
    pub episodes: u64,
    /// Mean over the last hundred episodes.
    pub episode_return: Option<f32>,
    pub explained_variance: Option<f32>,
    pub approx_kl: Option<f32>,
    pub entropy: Option<f32>,
    /// Updates that trajectories were behind.
    pub lag: Option<f32>,
    /// Environments that failed and were made anew.
    pub environment_failures: u64,
    /// Environments that gave something else when the episode's actions were played again: the weights depend on when that was.
    pub environment_strays: u64,
    /// Rounds of lanes that this rank has played itself, and that ranks which play have for it.
    pub played_here: u64,
    pub played_elsewhere: u64,
    /// Bytes of weights that this rank has sent to ranks that play.
    pub weights_sent: u64,
    /// From the beginning of a round until all of those had its weights, in the last round in which that was so.
    pub broadcast_seconds: Option<f32>,
}

/// Agent → rank.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum ToRank {
    /// First frame. Answered by `Hello`.
    Start(StartRank),
    /// Answers `Hello`: the rank's certificate and the cluster's CA (DER), for its peer endpoint. Answered by `Event(Ready)`. Answers `Renew` too.
    Certificate { certificate: List<u8>, authority: List<u8> },
    /// The rank's new generation. It may come again, and only the newest counts; a rank that is not in it has left the job.
    Membership(Membership),
    /// To the first member: all shards of `step` are durable, write the manifest. Answered by `Event(ManifestStored)`.
    Commit { generation: Generation, step: Step, shards: List<ShardRecord> },
    /// The checkpoint at `step` is in the catalogue. To every rank; the first member removes all folders of older checkpoints of the job but
    /// those that `keep` names.
    Committed { step: Step, keep: List<String> },
    /// The job is done: exit with code 0.
    Release,
    /// Stop: the job was cancelled, or this generation ended. Exit within the grace; the agent kills after it.
    Stop { reason: String },
    /// Before `Start`, where there is any: how object stores are reached, with their credentials. Not answered.
    Stores(StoreSettings),
    /// Whether the agent has a session with the coordinator. Without one, memberships are not to be waited for: see `Membership::is_quorum`.
    Coordinator { reachable: bool },
    /// Before `Start`, to a process: how it outlives its agent. Without it, it ends with its agent. Not answered.
    Settle(Settle),
    /// Answers `Return`: this is the rank's agent from now on.
    Adopted,
    /// What the rank said up to its event of this number is journalled, and is not to be said again. Events are numbered from 1 in the order in
    /// which they are sent, but for those that follow a `Return`.
    Taken { said: u64 },
    /// The checkpoint at `step` will not be, because a member could not store its part: the room of this rank's is needed. To every rank; never of
    /// a checkpoint that was committed. Not answered.
    Abandon { generation: Generation, step: Step },
    /// To a rank that learns: who is ready to play environments for it. It may come again; the newest list counts. Not answered.
    Rollouts { rollouts: List<Member> },
}

/// Variables of the agent's environment that are for object stores. Never leaves the machine, and never a process's memory (I35).
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreSettings(pub List<(String, String)>);

/// Names only: the values are secrets.
impl std::fmt::Debug for StoreSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

/// What a rank's process proves itself with to the next agent of its machine: known to it, and as a hash to that agent. Secret.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Cookie(pub List<u8>);

/// It is no one's business (I35).
impl std::fmt::Debug for Cookie {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a cookie")
    }
}

/// What a rank needs to wait for the next agent of its machine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Settle {
    /// Path of the socket to listen on. Its folder is the agent's alone.
    pub socket: String,
    pub cookie: Cookie,
    /// A rank without an agent for so long ends by itself.
    pub orphan_grace_ms: u64,
    /// Path of the files that take what it prints, without `.N.log`; the number of the one that it has; and where a file is cut.
    pub log: String,
    pub log_part: u64,
    pub log_bytes: u64,
}

/// Rank → agent.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum FromRank {
    /// Answers `Start`: a signing request (PKCS#10, DER) for the key that this process made, and the artifact that its command needs. Answered by
    /// `Certificate` when the agent has both.
    Hello {
        csr: List<u8>,
        artifact: Option<Artifact>,
    },
    /// Passed on to the coordinator as it is.
    Event(RankEvent),
    Progress(Progress),
    /// The process runs. About twice a second; an agent kills a rank that is silent for long.
    Alive,
    /// First frame on a connection that an agent has opened to a rank that runs already: who it is, with its cookie, and the number of the event
    /// that it says next. What no agent has acknowledged is said again. Answered by `Adopted`.
    Return {
        id: RankId,
        cookie: Cookie,
        next: u64,
    },
    /// Last frame: the process exits with this code.
    Leaving {
        code: u8,
    },
    /// Of the first rank of a gang that serves, about once a second. Passed on to the coordinator as it is; may be lost.
    Load(Load),
    /// Of some steps (`StepTimes::is_told`), with the next progress. Passed on to the coordinator as it is; may be lost.
    Timed(List<StepTimes>),
    /// A signing request (PKCS#10, DER) for a new key: the certificate is about to end. Said again until `Certificate` answers it.
    Renew {
        csr: List<u8>,
    },
}
