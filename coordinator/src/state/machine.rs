//! One job, from submission to its end. Owns its state, its newest run (a generation's ranks) and its reasons; never decides where ranks go,
//! never counts a node's room, and knows no session: it orders, others carry.
//!
//! | state       | event                                              | next        | orders                         |
//! |-------------|----------------------------------------------------|-------------|--------------------------------|
//! | Queued      | gang placed                                        | Starting    | Start to each rank             |
//! | Queued      | cancel                                             | Cancelled   |                                |
//! | Starting    | every rank ready                                   | Running     | Peers to each rank             |
//! | Starting, Running | a rank failed, exited unfinished, or its node is lost | Recovering | Stop to the others    |
//! | Starting, Running | the generation stalled                       | Recovering  | Stop to each rank              |
//! | Running     | every shard of a step stored                       | Running     | Commit to rank 0               |
//! | Running     | manifest stored, committed to the catalogue        | Running     | Committed to each rank         |
//! | Running     | every rank finished with the same weights          | Succeeded   | Release to each rank           |
//! | Running     | every rank finished, weights differ                | Recovering  | Stop to each rank (then Failed)|
//! | Recovering  | every rank gone, attempts left                     | Queued      |                                |
//! | Recovering  | every rank gone, no attempt left or doomed         | Failed      |                                |
//! | Starting, Running, Recovering | cancel                           | Cancelling  | Stop to each rank              |
//! | Cancelling  | every rank gone                                    | Cancelled   |                                |
//! | Succeeded, Failed, Cancelled | anything                          | the same    | Release or Stop to late ranks  |
//!
//! J1 (I2): only ranks of the newest generation change a job. J2 (I3): a generation starts when every rank of the one before is gone.
//! J3 (I8): terminal states absorb. J4 (I11): at most `attempts_max` generations. J5 (I14): a run has all its ranks.
//! J6 (I10): no Start and no certificate for a job that is being cancelled. J7 (I19): success needs equal digests on all ranks.
//! J8 (I21): Commit is ordered when every rank's shard is stored, and a manifest counts only after that.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::{Digest, Generation, JobId, LogIndex, NodeId, Rank, Step};
use stoke_protocol::list::List;
use stoke_protocol::message::client::{JobState, OutcomeView};
use stoke_protocol::message::node::ToNode;
use stoke_protocol::message::rank::{Exit, Outcome, PeerAddress, RankId, ShardRecord, StartRank};

use super::effect::Order;
use super::event::Submission;
use super::members::Room;
use super::planted::PlantedBug;
use super::time::Time;
use super::timeline::Timeline;

/// Checkpoints that a run may have in preparation: a rank that never stores its shard must not fill the state.
const PREPARED_MAX: usize = 8;
/// A reason that a rank gives is cut here: it stands in every view of the job.
const REASON_CHARS_MAX: usize = 2_000;
/// How long a rank that was told to stop may take before it is killed.
pub const STOP_GRACE_MS: u64 = 5_000;

/// What a gang needs.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Ask {
    pub ranks: u32,
    /// Of each rank.
    pub room: Room,
    pub labels: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Job {
    pub id: JobId,
    pub owner: String,
    pub key: String,
    pub name: String,
    pub trainer: String,
    /// Canonical TOML, as the ranks get it.
    pub spec: String,
    /// URI of the folder of its checkpoints.
    pub checkpoints: String,
    /// What a first generation continues from.
    pub resume: Option<String>,
    pub keep: u32,
    pub priority: i32,
    pub ask: Ask,
    pub attempts_max: u32,
    pub state: JobState,
    /// Set while recovering when no attempt can help: the job fails when its ranks are gone.
    pub doomed: bool,
    /// Why it recovers, or why it ended.
    pub reason: String,
    /// World size and first journal entry of each generation; generation g is at g - 1.
    pub generations: Vec<(u32, LogIndex)>,
    /// The newest generation's ranks; kept after the end.
    pub run: Option<Run>,
    pub outcome: Option<OutcomeView>,
    /// How many gangs had been placed in the cluster when it came into the queue.
    pub queued_after: u64,
    pub submitted: Time,
    pub started: Option<Time>,
    pub ended: Option<Time>,
    pub timeline: Timeline,
}

/// The ranks of one generation.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Run {
    pub generation: Generation,
    pub resume: Option<String>,
    /// By rank.
    pub ranks: Vec<RankRun>,
    /// Checkpoints in preparation: shards by step and rank.
    pub prepared: BTreeMap<Step, BTreeMap<u32, ShardRecord>>,
    pub committed: Option<Step>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RankRun {
    pub node: NodeId,
    pub address: Option<SocketAddr>,
    pub outcome: Option<Outcome>,
    /// No process of this rank can have an effect any more.
    pub gone: bool,
}

/// When and under which entry a machine is driven, and where its orders go.
pub struct Scene<'a> {
    pub at: Time,
    pub index: LogIndex,
    pub bug: Option<PlantedBug>,
    pub orders: &'a mut Vec<Order>,
}

impl Run {
    pub fn rank(&self, rank: Rank) -> Option<&RankRun> {
        self.ranks.get(rank.0 as usize)
    }

    /// Every rank is gone.
    pub fn is_over(&self) -> bool {
        self.ranks.iter().all(|rank| rank.gone)
    }

    fn ids(&self, job: JobId) -> impl Iterator<Item = (RankId, &RankRun)> {
        let generation = self.generation;
        (0..).map(Rank).zip(&self.ranks).map(move |(rank, run)| (RankId { job, generation, rank }, run))
    }
}

impl Job {
    pub fn new(id: JobId, now: Time, queued_after: u64, submission: Submission) -> Self {
        Self {
            id,
            checkpoints: format!("{}{id}", submission.checkpoints),
            owner: submission.owner,
            key: submission.key,
            name: submission.name,
            trainer: submission.trainer,
            spec: submission.spec,
            resume: submission.resume,
            keep: submission.keep,
            priority: submission.priority,
            ask: submission.ask,
            attempts_max: submission.attempts_max,
            state: JobState::Queued,
            doomed: false,
            reason: String::new(),
            generations: Vec::new(),
            run: None,
            outcome: None,
            queued_after,
            submitted: now,
            started: None,
            ended: None,
            timeline: Timeline::default(),
        }
    }

    pub fn generation(&self) -> Generation {
        Generation(self.generations.len() as u64)
    }

    /// Whether ranks of it may have a process that is wanted.
    pub fn is_active(&self) -> bool {
        matches!(self.state, JobState::Starting | JobState::Running)
    }

    /// Ranks of a starting generation that have not said that they are ready, with their nodes.
    pub fn unready(&self) -> Vec<(Rank, NodeId)> {
        let Some(run) = self.run.as_ref().filter(|_| self.state == JobState::Starting) else { return Vec::new() };
        let ranks = (0..).map(Rank).zip(&run.ranks);
        ranks.filter(|(_, place)| place.address.is_none()).map(|(rank, place)| (rank, place.node)).collect()
    }

    /// Whether this rank may start and have a certificate (J1, J6).
    pub fn expects(&self, id: RankId) -> bool {
        let run = self.run.as_ref().filter(|run| self.is_active() && run.generation == id.generation);
        run.and_then(|run| run.rank(id.rank)).is_some_and(|rank| !rank.gone)
    }

    /// Whether a cancel may be answered: no rank can start any more (I10).
    pub fn is_cancel_safe(&self) -> bool {
        let started = |rank: &RankRun| rank.gone || rank.address.is_some();
        match self.state {
            JobState::Cancelling => self.run.as_ref().is_none_or(|run| run.ranks.iter().all(started)),
            JobState::Cancelled => true,
            JobState::Queued | JobState::Starting | JobState::Running | JobState::Recovering => false,
            JobState::Succeeded | JobState::Failed => false,
        }
    }

    /// A gang was placed.
    pub fn start(&mut self, scene: &mut Scene<'_>, placement: &[NodeId], resume: Option<String>) {
        let before = self.run.as_ref().is_none_or(Run::is_over);
        assert!(before || scene.bug.is_some(), "J2: {} starts a generation while ranks of the last one live", self.id);
        self.generations.push((placement.len() as u32, scene.index));
        let rank = |node: &NodeId| RankRun { node: *node, address: None, outcome: None, gone: false };
        let generation = self.generation();
        let ranks = placement.iter().map(rank).collect();
        let places: Vec<String> =
            (0..).zip(placement).map(|(rank, node)| format!("{} on {node}", Rank(rank))).collect();
        let from = resume.as_deref().map(|uri| format!(", from {uri}")).unwrap_or_default();
        self.note(scene, format!("{generation} placed: {}{from}", places.join(", ")));
        self.run = Some(Run { generation, resume, ranks, prepared: BTreeMap::new(), committed: None });
        (self.state, self.reason) = (JobState::Starting, String::new());
        let run = self.run.as_ref().expect("set above");
        for (id, rank) in run.ids(self.id) {
            scene.orders.push(Order::Send { node: rank.node, message: ToNode::Start(self.start_rank(run, id)) });
        }
        self.changed(scene);
    }

    fn start_rank(&self, run: &Run, id: RankId) -> StartRank {
        StartRank {
            id,
            world: run.ranks.len() as u32,
            spec: self.spec.clone(),
            checkpoints: self.checkpoints.clone(),
            resume: run.resume.clone(),
        }
    }

    /// A rank's endpoint listens.
    pub fn ready(&mut self, scene: &mut Scene<'_>, rank: Rank, address: SocketAddr) {
        let Some(place) = self.live_rank(rank) else { return };
        place.address = Some(address);
        if self.state != JobState::Starting {
            return self.changed(scene);
        }
        let run = self.run.as_ref().expect("a starting job has a run");
        if run.ranks.iter().all(|rank| rank.address.is_some() && !rank.gone) {
            self.state = JobState::Running;
            self.started.get_or_insert(scene.at);
            let (generation, world) = (run.generation, run.ranks.len());
            for (id, rank) in run.ids(self.id) {
                scene.orders.push(Order::Send { node: rank.node, message: ToNode::Peers { id, peers: peers(run) } });
            }
            self.note(scene, format!("{generation} runs: {world} ranks are ready"));
        }
        self.changed(scene);
    }

    /// A shard is durable (J8).
    pub fn shard_stored(&mut self, scene: &mut Scene<'_>, rank: Rank, step: Step, shard: ShardRecord) {
        let active = self.is_active();
        let Some(run) = self.run.as_mut().filter(|_| active) else { return };
        if shard.index != rank.0 || run.committed.is_some_and(|committed| step <= committed) {
            return;
        }
        if run.prepared.len() >= PREPARED_MAX && !run.prepared.contains_key(&step) {
            run.prepared.pop_first();
        }
        run.prepared.entry(step).or_default().insert(shard.index, shard);
        if let Some(shards) = complete(run, step, scene.bug) {
            let id = RankId { job: self.id, generation: run.generation, rank: Rank(0) };
            scene.orders.push(Order::Send { node: run.ranks[0].node, message: ToNode::Commit { id, step, shards } });
        }
    }

    /// The shards of a prepared checkpoint, when a manifest of it may count (J8).
    pub fn prepared(&self, rank: Rank, step: Step, bug: Option<PlantedBug>) -> Option<List<ShardRecord>> {
        let run = self.run.as_ref().filter(|_| self.is_active() && rank == Rank(0))?;
        complete(run, step, bug)
    }

    /// The checkpoint at `step` is in the catalogue.
    pub fn committed(&mut self, scene: &mut Scene<'_>, step: Step, prune: Vec<String>) {
        let Some(run) = self.run.as_mut() else { return };
        run.committed = Some(step);
        run.prepared.retain(|prepared, _| *prepared > step);
        for (id, rank) in run.ids(self.id).filter(|(_, rank)| !rank.gone) {
            let prune = prune.clone().into();
            scene.orders.push(Order::Send { node: rank.node, message: ToNode::Committed { id, step, prune } });
        }
        self.note(scene, format!("checkpoint at {step} committed"));
        self.changed(scene);
    }

    /// A rank has trained to the last step.
    pub fn finished(&mut self, scene: &mut Scene<'_>, rank: Rank, outcome: Outcome) {
        if self.state != JobState::Running {
            return;
        }
        let Some(place) = self.live_rank(rank) else { return };
        place.outcome = Some(outcome);
        let run = self.run.as_ref().expect("a running job has a run");
        let Some(outcomes) = run.ranks.iter().map(|rank| rank.outcome.as_ref()).collect::<Option<Vec<&Outcome>>>()
        else {
            return;
        };
        if let Some(difference) = differing(&outcomes)
            && scene.bug != Some(PlantedBug::DigestsUncompared)
        {
            self.doomed = true;
            return self.recover(scene, difference);
        }
        let first = outcomes[0];
        self.outcome = Some(OutcomeView {
            step: first.step,
            loss: first.loss,
            samples: first.samples,
            weights_blake3: first.weights_blake3,
            metrics: first.metrics.clone(),
        });
        // Also to ranks of lost nodes: one that comes back must not wait for ever.
        for (id, rank) in run.ids(self.id) {
            scene.orders.push(Order::Send { node: rank.node, message: ToNode::Release { id } });
        }
        self.end(scene, JobState::Succeeded, String::new());
    }

    /// A rank gives up.
    pub fn failed(&mut self, scene: &mut Scene<'_>, rank: Rank, error: &str) {
        let active = self.is_active();
        let Some(place) = self.live_rank(rank) else { return };
        if place.outcome.is_none() && active {
            let node = place.node;
            let error: String = error.chars().take(REASON_CHARS_MAX).collect();
            self.recover(scene, format!("{rank} on {node} failed: {error}"));
        }
    }

    /// The generation makes no progress.
    pub fn stalled(&mut self, scene: &mut Scene<'_>, reason: &str) {
        if self.is_active() {
            self.recover(scene, reason.to_owned());
        }
    }

    /// A rank's process is gone for good.
    pub fn gone(&mut self, scene: &mut Scene<'_>, rank: Rank, how: &str) {
        let Some(place) = self.live_rank(rank) else { return };
        place.gone = true;
        let (node, finished) = (place.node, place.outcome.is_some());
        if self.is_active() && !finished {
            self.recover(scene, format!("{rank} on {node} {how}"));
        } else if !self.state.is_terminal() {
            self.note(scene, format!("{rank} on {node} {how}"));
        }
        self.settle(scene);
    }

    pub fn cancel(&mut self, scene: &mut Scene<'_>, by: &str) {
        self.note(scene, format!("cancelled by {by}"));
        let reason = format!("cancelled by {by}");
        if self.state == JobState::Queued {
            return self.end(scene, JobState::Cancelled, reason);
        }
        (self.state, self.reason) = (JobState::Cancelling, reason);
        self.stop(scene);
        self.settle(scene);
        self.changed(scene);
    }

    /// Says again what a rank that its node still has may have missed while the session was away (all of it is idempotent), or stops it.
    pub fn remind(&self, scene: &mut Scene<'_>, node: NodeId, id: RankId, pruned: Vec<String>) {
        let mut send = |message| scene.orders.push(Order::Send { node, message });
        let wanted = self.run.as_ref().filter(|run| run.generation == id.generation && run.rank(id.rank).is_some());
        match (self.state, wanted) {
            (JobState::Starting, Some(run)) => send(ToNode::Start(self.start_rank(run, id))),
            (JobState::Running, Some(run)) => {
                send(ToNode::Peers { id, peers: peers(run) });
                if let Some(step) = run.committed {
                    send(ToNode::Committed { id, step, prune: pruned.into() });
                }
                for step in run.prepared.keys().filter(|_| id.rank == Rank(0)) {
                    if let Some(shards) = complete(run, *step, None) {
                        send(ToNode::Commit { id, step: *step, shards });
                    }
                }
            }
            (JobState::Succeeded, Some(_)) => send(ToNode::Release { id }),
            (
                JobState::Queued
                | JobState::Recovering
                | JobState::Cancelling
                | JobState::Failed
                | JobState::Cancelled
                | JobState::Starting
                | JobState::Running
                | JobState::Succeeded,
                _,
            ) => scene.orders.push(stop_order(node, id, "its generation is over")),
        }
    }

    /// The generation is over early: stop its other ranks; what comes next is settled when all are gone.
    fn recover(&mut self, scene: &mut Scene<'_>, reason: String) {
        self.note(scene, format!("{} ended: {reason}", self.generation()));
        (self.state, self.reason) = (JobState::Recovering, reason);
        self.stop(scene);
        self.settle(scene);
        self.changed(scene);
    }

    fn stop(&self, scene: &mut Scene<'_>) {
        let Some(run) = &self.run else { return };
        // A rank that has finished and whose node was lost may be back by now, waiting for a release that will not come.
        let may_live = |rank: &RankRun| !rank.gone || rank.outcome.is_some();
        for (id, rank) in run.ids(self.id).filter(|(_, rank)| may_live(rank)) {
            scene.orders.push(stop_order(rank.node, id, &self.reason));
        }
    }

    fn settle(&mut self, scene: &mut Scene<'_>) {
        let over = self.run.as_ref().is_none_or(Run::is_over);
        let early = scene.bug == Some(PlantedBug::RequeuedBeforeGone) && self.state == JobState::Recovering;
        if !over && !early {
            return;
        }
        match self.state {
            JobState::Recovering => {
                let tried = self.generations.len() as u32;
                let spent = tried >= self.attempts_max && scene.bug != Some(PlantedBug::AttemptsUnbounded);
                if self.doomed {
                    self.end(scene, JobState::Failed, self.reason.clone());
                } else if spent {
                    let reason = format!("{} (attempt {tried} of {})", self.reason, self.attempts_max);
                    self.end(scene, JobState::Failed, reason);
                } else {
                    self.state = JobState::Queued;
                    self.note(scene, format!("queued again, attempt {} of {}", tried + 1, self.attempts_max));
                    self.changed(scene);
                }
            }
            JobState::Cancelling => self.end(scene, JobState::Cancelled, self.reason.clone()),
            JobState::Queued | JobState::Starting | JobState::Running => {}
            JobState::Succeeded | JobState::Failed | JobState::Cancelled => {}
        }
    }

    fn end(&mut self, scene: &mut Scene<'_>, state: JobState, reason: String) {
        assert!(!self.state.is_terminal(), "J3: {} has ended as {:?}", self.id, self.state);
        let why = if reason.is_empty() { String::new() } else { format!(": {reason}") };
        self.note(scene, format!("{}{why}", state_word(state)));
        (self.state, self.reason, self.ended) = (state, reason, Some(scene.at));
        if let Some(run) = &mut self.run {
            run.prepared.clear();
        }
        self.changed(scene);
    }

    /// A rank of the newest run that is not gone (J1 was checked by the caller).
    fn live_rank(&mut self, rank: Rank) -> Option<&mut RankRun> {
        self.run.as_mut()?.ranks.get_mut(rank.0 as usize).filter(|rank| !rank.gone)
    }

    fn note(&mut self, scene: &Scene<'_>, text: String) {
        self.timeline.add(scene.at, scene.index, text);
    }

    fn changed(&self, scene: &mut Scene<'_>) {
        scene.orders.push(Order::Changed { job: self.id });
    }
}

/// How a process went, in words that follow "rank-1 on node-2".
pub fn exit_words(exit: &Exit) -> String {
    match exit {
        Exit::Code(0) => "exited before it had finished".into(),
        Exit::Code(code) => format!("exited with code {code}"),
        Exit::Signal(signal) => format!("was killed by signal {signal}"),
        Exit::NotStarted(why) => {
            format!("could not be started: {}", why.chars().take(REASON_CHARS_MAX).collect::<String>())
        }
        Exit::AgentRestarted => "went with its agent, which was restarted".into(),
    }
}

/// As the command line spells it.
pub fn state_word(state: JobState) -> &'static str {
    match state {
        JobState::Queued => "queued",
        JobState::Starting => "starting",
        JobState::Running => "running",
        JobState::Recovering => "recovering",
        JobState::Cancelling => "cancelling",
        JobState::Succeeded => "succeeded",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

pub(super) fn stop_order(node: NodeId, id: RankId, reason: &str) -> Order {
    Order::Send { node, message: ToNode::Stop { id, reason: reason.to_owned(), grace_ms: STOP_GRACE_MS } }
}

fn peers(run: &Run) -> List<PeerAddress> {
    let ranks = (0..).map(Rank).zip(&run.ranks);
    ranks.filter_map(|(rank, place)| Some(PeerAddress { rank, address: place.address? })).collect()
}

/// Every rank's shard of a step, in order, or nothing.
fn complete(run: &Run, step: Step, bug: Option<PlantedBug>) -> Option<List<ShardRecord>> {
    let shards = run.prepared.get(&step)?;
    let needed = match bug {
        Some(PlantedBug::ShardMissing) => run.ranks.len().saturating_sub(1).max(1),
        _ => run.ranks.len(),
    };
    (shards.len() >= needed).then(|| shards.values().cloned().collect())
}

/// What differs between replicas that must be equal, with the ranks named (J7): those of the smaller group.
fn differing(outcomes: &[&Outcome]) -> Option<String> {
    let mut groups: BTreeMap<(Step, Digest), Vec<String>> = BTreeMap::new();
    for (rank, outcome) in (0..).map(Rank).zip(outcomes) {
        groups.entry((outcome.step, outcome.weights_blake3)).or_default().push(rank.to_string());
    }
    if groups.len() < 2 {
        return None;
    }
    let majority = groups.iter().max_by_key(|(_, ranks)| ranks.len()).map(|(key, _)| *key)?;
    let others: Vec<String> = groups
        .iter()
        .filter(|(key, _)| **key != majority)
        .map(|((step, digest), ranks)| format!("{} at {step} with weights {}", ranks.join(", "), short(digest)))
        .collect();
    Some(format!("replicas differ: {} against {} of the others", others.join("; "), short(&majority.1)))
}

/// Enough of a digest to tell two apart.
fn short(digest: &Digest) -> String {
    digest.to_string().chars().take(12).collect()
}
