//! One job, from submission to its end. Owns its state, its run (the processes that are placed, and which of them are members) and its
//! reasons; never decides where ranks go, never counts a node's room, and knows no session: it orders, others carry.
//!
//! | state       | event                                              | next        | orders                         |
//! |-------------|----------------------------------------------------|-------------|--------------------------------|
//! | Queued      | gang placed                                        | Starting    | Start to each rank             |
//! | Queued      | cancel                                             | Cancelled   |                                |
//! | Starting    | every rank ready                                   | Running     | Membership of all              |
//! | Starting    | a rank failed, exited, or its node is lost; stalled| Recovering  | Stop to the others             |
//! | Running     | a member failed, exited unfinished, was evicted, or its node is lost; enough others live | Running | Membership without it |
//! | Running     | the same, and too few others live                  | Recovering  | Stop to the others             |
//! | Running     | room for a missing rank                            | Running     | Start to it                    |
//! | Running     | a rank that was added is ready                     | Running     | Membership: it joins           |
//! | Running     | it has caught up                                   | Running     | Membership: it owns lanes      |
//! | Running     | every shard of a step stored                       | Running     | Commit to the first member     |
//! | Running     | manifest stored, committed to the catalogue        | Running     | Committed to each rank         |
//! | Running     | every member finished with the same weights        | Succeeded   | Release to each rank           |
//! | Running     | every member finished, weights differ              | Recovering  | Stop to each rank (then Failed)|
//! | Recovering  | every rank gone, attempts left                     | Queued      |                                |
//! | Recovering  | every rank gone, no attempt left or doomed         | Failed      |                                |
//! | Starting, Running, Recovering | cancel                           | Cancelling  | Stop to each rank              |
//! | Cancelling  | every rank gone                                    | Cancelled   |                                |
//! | Succeeded, Failed, Cancelled | anything                          | the same    | Release or Stop to late ranks  |
//!
//! J1 (I2): only ranks of the run change a job, and only what the newest generation stored may be committed. J2 (I3): a gang starts when every
//! rank of the run before is gone; a rank that is replaced is no member from the entry on that says so, alive or not.
//! J3 (I8): terminal states absorb. J4 (I11): a job that fails `attempts_max` times without getting further fails for good.
//! J5 (I14): a run starts with all its ranks. J6 (I10): no Start and no certificate for a job that is being cancelled.
//! J7 (I19): success needs equal digests on all members. J8 (I21): Commit is ordered when every member's shard is stored, and a manifest
//! counts only after that. J9: a run never goes on with fewer than `ranks_min` members.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::{Digest, Generation, JobId, LogIndex, NodeId, Rank, Step};
use stoke_protocol::list::List;
use stoke_protocol::message::client::{JobState, OutcomeView};
use stoke_protocol::message::node::ToNode;
use stoke_protocol::message::rank::{Exit, Member, Membership, Outcome, RankId, ShardRecord, StartFrom, StartRank};

use super::effect::Order;
use super::event::Submission;
use super::members::Room;
use super::planted::PlantedBug;
use super::time::Time;
use super::timeline::Timeline;

/// Checkpoints that a run may have in preparation: a rank that never stores its shard must not fill the state.
const PREPARED_MAX: usize = 8;
/// Generations whose world size is remembered.
const WORLDS_MAX: usize = 64;
/// Ranks that are gone and remembered.
const PAST_MAX: usize = 16;
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
    /// With fewer members a run does not go on.
    pub ranks_min: u32,
    pub attempts_max: u32,
    pub state: JobState,
    /// Set while recovering when no attempt can help: the job fails when its ranks are gone.
    pub doomed: bool,
    /// Failures since it last got further.
    pub failures: u32,
    /// How often a generation ended because of a loss.
    pub recoveries: u32,
    /// Ranks that were added in a row and did not become members. The others go on without them.
    pub turned_away: u32,
    /// The highest step at which a generation went on.
    pub reached: Option<Step>,
    /// Why it recovers, or why it ended.
    pub reason: String,
    /// The newest that was given out: to a membership, or to ranks that were placed.
    pub generation: Generation,
    /// World size and first journal entry of the newest memberships.
    pub worlds: BTreeMap<Generation, (u32, LogIndex)>,
    /// Kept after the end.
    pub run: Option<Run>,
    /// Ranks that are gone, the newest last: where to look for their logs.
    pub past: Vec<(RankId, NodeId)>,
    pub outcome: Option<OutcomeView>,
    /// How many gangs had been placed in the cluster when it came into the queue.
    pub queued_after: u64,
    pub submitted: Time,
    pub started: Option<Time>,
    pub ended: Option<Time>,
    pub timeline: Timeline,
}

/// The processes of a job, from a gang's start until the last of them is gone.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Run {
    /// The membership that may commit.
    pub generation: Generation,
    pub resume: Option<String>,
    /// In the order of lanes; empty until every rank of the gang is ready.
    pub members: Vec<RankId>,
    pub joining: Vec<RankId>,
    /// Who has lost the connection to whom in this generation.
    pub lost: BTreeSet<(RankId, RankId)>,
    /// Every process that was placed and is not gone, and finished members that are.
    pub ranks: BTreeMap<RankId, RankRun>,
    /// Checkpoints in preparation by this generation: shards by step and position.
    pub prepared: BTreeMap<Step, BTreeMap<u32, ShardRecord>>,
    /// The one whose manifest is being written. Of others that are complete meanwhile only the newest is committed after it.
    pub committing: Option<Step>,
    pub committed: Option<Step>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RankRun {
    pub node: NodeId,
    pub address: Option<SocketAddr>,
    pub outcome: Option<Outcome>,
    /// It is not wanted any more: it failed, was evicted or replaced.
    pub leaving: bool,
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
    /// Every rank is gone.
    pub fn is_over(&self) -> bool {
        self.ranks.values().all(|rank| rank.gone)
    }

    /// The process of a slot that is wanted, if there is one.
    pub fn of_slot(&self, slot: Rank) -> Option<RankId> {
        self.ranks.iter().find(|(id, rank)| id.rank == slot && !rank.gone && !rank.leaving).map(|(id, _)| *id)
    }

    fn is_live(&self, id: RankId) -> bool {
        self.ranks.get(&id).is_some_and(|rank| !rank.gone)
    }

    fn member(&self, id: RankId) -> Option<Member> {
        Some(Member { id, address: self.ranks.get(&id)?.address? })
    }

    fn membership(&self, after: Option<Generation>) -> Membership {
        let addressed = |ids: &[RankId]| ids.iter().filter_map(|id| self.member(*id)).collect();
        let (members, joining) = (addressed(&self.members), addressed(&self.joining));
        Membership { generation: self.generation, members, joining, after }
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
            ranks_min: submission.ranks_min,
            attempts_max: submission.attempts_max,
            state: JobState::Queued,
            doomed: false,
            failures: 0,
            recoveries: 0,
            turned_away: 0,
            reached: None,
            reason: String::new(),
            generation: Generation(0),
            worlds: BTreeMap::new(),
            run: None,
            past: Vec::new(),
            outcome: None,
            queued_after,
            submitted: now,
            started: None,
            ended: None,
            timeline: Timeline::default(),
        }
    }

    /// Whether ranks of it may have a process that is wanted.
    pub fn is_active(&self) -> bool {
        matches!(self.state, JobState::Starting | JobState::Running)
    }

    /// Whether a rank was placed, is wanted and has not said that it is ready; with its node.
    pub fn unready(&self, id: RankId) -> Option<NodeId> {
        let rank = self.run.as_ref().filter(|_| self.is_active())?.ranks.get(&id)?;
        (rank.address.is_none() && !rank.gone && !rank.leaving).then_some(rank.node)
    }

    /// Slots of a running job without a process. A job that is about to end needs none.
    pub fn missing(&self) -> Vec<Rank> {
        let Some(run) = self.run.as_ref().filter(|_| self.state == JobState::Running) else { return Vec::new() };
        if run.ranks.values().any(|rank| rank.outcome.is_some()) {
            return Vec::new();
        }
        (0..self.ask.ranks).map(Rank).filter(|slot| run.of_slot(*slot).is_none()).collect()
    }

    /// Whether this rank may start and have a certificate (J1, J6).
    pub fn expects(&self, id: RankId) -> bool {
        let rank = self.run.as_ref().filter(|_| self.is_active()).and_then(|run| run.ranks.get(&id));
        rank.is_some_and(|rank| !rank.gone && !rank.leaving)
    }

    /// Whether a process of this rank may be there.
    pub fn knows(&self, id: RankId) -> bool {
        self.run.as_ref().is_some_and(|run| run.ranks.contains_key(&id))
    }

    /// Whether a rank is placed on this node.
    pub fn is_on(&self, id: RankId, node: NodeId) -> bool {
        self.run.as_ref().and_then(|run| run.ranks.get(&id)).is_some_and(|rank| rank.node == node)
    }

    /// Whether a cancel may be answered: no rank can start any more (I10).
    pub fn is_cancel_safe(&self) -> bool {
        let started = |rank: &RankRun| rank.gone || rank.address.is_some();
        match self.state {
            JobState::Cancelling => self.run.as_ref().is_none_or(|run| run.ranks.values().all(started)),
            JobState::Cancelled => true,
            JobState::Queued | JobState::Starting | JobState::Running | JobState::Recovering => false,
            JobState::Succeeded | JobState::Failed => false,
        }
    }

    /// A gang was placed.
    pub fn start(&mut self, scene: &mut Scene<'_>, placement: &[NodeId], resume: Option<String>) {
        let before = self.run.as_ref().is_none_or(Run::is_over);
        assert!(before || scene.bug.is_some(), "J2: {} starts a gang while ranks of the last one live", self.id);
        self.generation = self.generation.next();
        let generation = self.generation;
        let ranks = (0..).map(Rank).zip(placement.iter().copied());
        let from = resume.as_deref().map(|uri| format!(", from {uri}")).unwrap_or_default();
        let places: Vec<String> = ranks.clone().map(|(rank, node)| format!("{rank} on {node}")).collect();
        self.note(scene, format!("{generation} placed: {}{from}", places.join(", ")));
        self.run = Some(Run {
            generation,
            resume,
            members: Vec::new(),
            joining: Vec::new(),
            lost: BTreeSet::new(),
            ranks: BTreeMap::new(),
            prepared: BTreeMap::new(),
            committing: None,
            committed: None,
        });
        (self.state, self.reason) = (JobState::Starting, String::new());
        self.place(scene, ranks);
    }

    /// Room was found for missing ranks of a running job.
    pub fn add(&mut self, scene: &mut Scene<'_>, places: &[(Rank, NodeId)]) {
        self.generation = self.generation.next();
        let words: Vec<String> = places.iter().map(|(rank, node)| format!("{rank} on {node}")).collect();
        self.note(scene, format!("{} placed: {}", self.generation, words.join(", ")));
        self.place(scene, places.iter().copied());
    }

    fn place(&mut self, scene: &mut Scene<'_>, places: impl Iterator<Item = (Rank, NodeId)>) {
        for (rank, node) in places {
            let id = RankId { job: self.id, generation: self.generation, rank };
            let placed = RankRun { node, address: None, outcome: None, leaving: false, gone: false };
            let run = self.run.as_mut().expect("a job with ranks has a run");
            run.ranks.insert(id, placed);
            scene.orders.push(Order::Send { node, message: ToNode::Start(self.start_rank(id)) });
        }
        self.changed(scene);
    }

    fn start_rank(&self, id: RankId) -> StartRank {
        let run = self.run.as_ref().expect("a rank is started in a run");
        let from = match (&run.resume, run.members.is_empty()) {
            (_, false) => StartFrom::Peers,
            (Some(uri), true) => StartFrom::Checkpoint(uri.clone()),
            (None, true) => StartFrom::Seed,
        };
        StartRank { id, spec: self.spec.clone(), checkpoints: self.checkpoints.clone(), from }
    }

    /// A rank's endpoint listens.
    pub fn ready(&mut self, scene: &mut Scene<'_>, id: RankId, address: SocketAddr) {
        let state = self.state;
        let Some(run) = &mut self.run else { return };
        let Some(rank) = run.ranks.get_mut(&id).filter(|rank| !rank.gone) else { return };
        rank.address = Some(address);
        if state == JobState::Starting && run.ranks.values().all(|rank| rank.address.is_some() && !rank.gone) {
            run.members = run.ranks.keys().copied().collect();
            self.state = JobState::Running;
            self.started.get_or_insert(scene.at);
            self.tell_membership(scene, None);
            let (generation, world) = (self.generation, self.ask.ranks);
            self.note(scene, format!("{generation} runs, its world size is {world}"));
        } else if state == JobState::Running && !rank_is_known(run, id) && !run.ranks[&id].leaving {
            run.joining.push(id);
            self.note(scene, format!("{} is ready and joins", id.rank));
            self.regroup(scene, true);
        }
        self.changed(scene);
    }

    /// A rank that joins has caught up.
    pub fn joined(&mut self, scene: &mut Scene<'_>, id: RankId, generation: Generation, step: Step) {
        let Some(run) = self.run.as_mut().filter(|_| self.state == JobState::Running) else { return };
        if generation != run.generation || !run.joining.contains(&id) {
            return;
        }
        run.joining.retain(|other| *other != id);
        run.members.push(id);
        run.members.sort_unstable_by_key(|id| id.rank);
        self.turned_away = 0;
        let world = run.members.len();
        self.note(scene, format!("{} has caught up at {step}: {world} ranks", id.rank));
        self.regroup(scene, true);
        self.changed(scene);
    }

    /// The first member says where the newest generation goes on.
    pub fn resumed(&mut self, scene: &mut Scene<'_>, id: RankId, generation: Generation, step: Step) {
        let Some(run) = self.run.as_ref().filter(|_| self.state == JobState::Running) else { return };
        if generation != run.generation || run.members.first() != Some(&id) {
            return;
        }
        if self.reached.is_some_and(|reached| step > reached) {
            self.failures = 0;
        }
        self.reached = self.reached.max(Some(step));
        self.note(scene, format!("{generation} goes on at {step}"));
        self.changed(scene);
    }

    /// A shard is durable (J8).
    pub fn shard_stored(&mut self, scene: &mut Scene<'_>, id: RankId, at: (Generation, Step), shard: ShardRecord) {
        let (generation, step) = at;
        let active = self.is_active();
        let Some(run) = self.run.as_mut().filter(|_| active) else { return };
        let unfenced = matches!(scene.bug, Some(PlantedBug::ShardsUnfenced | PlantedBug::ReportsUnfenced));
        let position = run.members.iter().position(|member| *member == id);
        let placed = position.is_some_and(|position| position as u32 == shard.index);
        if run.committed.is_some_and(|committed| step <= committed)
            || !(generation == run.generation && placed || unfenced && (shard.index as usize) < run.members.len())
        {
            return;
        }
        if run.prepared.len() >= PREPARED_MAX && !run.prepared.contains_key(&step) {
            let oldest = run.prepared.keys().find(|old| Some(**old) != run.committing).copied();
            match oldest {
                Some(oldest) if oldest < step => drop(run.prepared.remove(&oldest)),
                Some(_) | None => return,
            }
        }
        run.prepared.entry(step).or_default().insert(shard.index, shard);
        self.commit_next(scene);
    }

    /// Orders the newest complete checkpoint to be committed, if none is under way.
    fn commit_next(&mut self, scene: &mut Scene<'_>) {
        let Some(run) = self.run.as_mut().filter(|run| run.committing.is_none()) else { return };
        let newest = run.prepared.keys().rev().find_map(|step| Some((*step, complete(run, *step, scene.bug)?)));
        let Some((step, shards)) = newest else { return };
        run.committing = Some(step);
        run.prepared.retain(|older, _| *older >= step);
        self.order_commit(scene, step, shards);
    }

    /// A checkpoint will not be: a shard or its manifest could not be written, or is not taken.
    pub fn not_stored(&mut self, scene: &mut Scene<'_>, id: RankId, at: (Generation, Step), words: String) {
        let (generation, step) = at;
        let Some(run) = self.run.as_mut().filter(|run| run.generation == generation) else { return };
        if !run.members.contains(&id) {
            return;
        }
        run.prepared.remove(&step);
        run.committing.take_if(|committing| *committing == step);
        self.note(scene, words.chars().take(REASON_CHARS_MAX).collect());
        self.commit_next(scene);
        self.changed(scene);
    }

    /// The checkpoint that a gang was to begin with cannot be used. `mine`: it was one of this job's, and the one before it is taken.
    pub fn damaged(&mut self, scene: &mut Scene<'_>, id: RankId, (uri, mine): (&str, bool), error: &str) {
        let first = mine || self.run.as_ref().is_some_and(|run| run.resume.as_deref() == Some(uri));
        if !self.is_active() || !self.knows(id) || !first {
            return;
        }
        let error: String = error.chars().take(REASON_CHARS_MAX).collect();
        if !mine && self.resume.as_deref() == Some(uri) {
            // There is no other one to take.
            self.doomed = true;
        }
        if self.doomed {
            self.recover(scene, format!("{} failed: {error}", id.rank));
        } else if mine {
            self.recover(scene, format!("{uri} is damaged, an earlier one is taken: {error}"));
        }
    }

    fn order_commit(&self, scene: &mut Scene<'_>, step: Step, shards: List<ShardRecord>) {
        let Some(run) = &self.run else { return };
        let Some((id, first)) = run.members.first().and_then(|id| Some((*id, run.ranks.get(id)?))) else { return };
        let message = ToNode::Commit { id, generation: run.generation, step, shards };
        scene.orders.push(Order::Send { node: first.node, message });
    }

    /// The shards of a prepared checkpoint, when a manifest of it may count (J8).
    pub fn prepared(&self, id: RankId, step: Step, bug: Option<PlantedBug>) -> Option<List<ShardRecord>> {
        let run = self.run.as_ref().filter(|run| self.is_active() && run.members.first() == Some(&id))?;
        complete(run, step, bug)
    }

    /// The checkpoint at `step` is in the catalogue.
    pub fn committed(&mut self, scene: &mut Scene<'_>, step: Step, kept: Vec<String>) {
        let Some(run) = self.run.as_mut() else { return };
        run.committed = Some(step);
        run.committing.take_if(|committing| *committing <= step);
        run.prepared.retain(|prepared, _| *prepared > step);
        for (id, rank) in run.ranks.iter().filter(|(_, rank)| !rank.gone) {
            let keep = kept.clone().into();
            scene.orders.push(Order::Send { node: rank.node, message: ToNode::Committed { id: *id, step, keep } });
        }
        self.note(scene, format!("checkpoint at {step} committed"));
        self.commit_next(scene);
        self.changed(scene);
    }

    /// A rank has trained to the last step.
    pub fn finished(&mut self, scene: &mut Scene<'_>, id: RankId, outcome: Outcome) {
        let Some(run) = self.run.as_mut().filter(|_| self.state == JobState::Running) else { return };
        if !run.members.contains(&id) {
            return;
        }
        let Some(rank) = run.ranks.get_mut(&id) else { return };
        // A later generation has no news of the outcome but the metrics of another first member.
        let known = rank.outcome.take().filter(|known| !known.metrics.is_empty() && *known != outcome);
        rank.outcome = Some(Outcome { metrics: known.map_or(outcome.metrics, |known| known.metrics), ..outcome });
        self.conclude(scene);
    }

    /// Ends well if every member has finished.
    fn conclude(&mut self, scene: &mut Scene<'_>) {
        let Some(run) = self.run.as_ref().filter(|_| self.state == JobState::Running) else { return };
        let outcomes = run.members.iter().map(|id| run.ranks.get(id).and_then(|rank| rank.outcome.as_ref()));
        let Some(outcomes) = outcomes.collect::<Option<Vec<&Outcome>>>() else { return };
        if outcomes.is_empty() {
            return;
        }
        if let Some(difference) = differing(&run.members, &outcomes)
            && scene.bug != Some(PlantedBug::DigestsUncompared)
        {
            self.doomed = true;
            return self.recover(scene, difference);
        }
        let first = outcomes[0];
        let metrics = run.ranks.values().filter_map(|rank| rank.outcome.as_ref()).map(|outcome| &outcome.metrics);
        self.outcome = Some(OutcomeView {
            step: first.step,
            loss: first.loss,
            samples: first.samples,
            weights_blake3: first.weights_blake3,
            metrics: metrics.max_by_key(|metrics| metrics.len()).cloned().unwrap_or_default(),
        });
        // Also to ranks of lost nodes: one that comes back must not wait for ever.
        for (id, rank) in &run.ranks {
            scene.orders.push(Order::Send { node: rank.node, message: ToNode::Release { id: *id } });
        }
        self.end(scene, JobState::Succeeded, String::new());
    }

    /// A rank gives up; its end follows.
    pub fn failed(&mut self, scene: &mut Scene<'_>, id: RankId, error: &str, permanent: bool) {
        let error: String = error.chars().take(REASON_CHARS_MAX).collect();
        // What keeps a gang from starting keeps the next one too. A rank that was added may just be on the wrong machine.
        self.doomed |= permanent && self.state == JobState::Starting && self.expects(id);
        self.depart(scene, id, &format!("failed: {error}"));
    }

    /// A rank has lost the connection to another one. What follows is decided where time is known.
    pub fn peer_lost(&mut self, by: RankId, generation: Generation, of: RankId) {
        let Some(run) = self.run.as_mut().filter(|run| run.generation == generation) else { return };
        if rank_is_known(run, by) && rank_is_known(run, of) && by != of {
            run.lost.insert((by, of));
        }
    }

    /// Whether a running job's ranks have lost each other.
    pub fn is_parted(&self) -> bool {
        self.state == JobState::Running && self.run.as_ref().is_some_and(|run| !run.lost.is_empty())
    }

    /// A rank is not wanted any more: it hangs, or the others cannot reach it.
    pub fn evicted(&mut self, scene: &mut Scene<'_>, id: RankId, reason: &str) {
        let node = self.run.as_ref().and_then(|run| run.ranks.get(&id)).map(|rank| rank.node);
        if self.depart(scene, id, reason)
            && let Some(node) = node
        {
            scene.orders.push(stop_order(node, id, reason));
        }
    }

    /// The others go on without a rank whose process is still there; whether it was wanted until now.
    fn depart(&mut self, scene: &mut Scene<'_>, id: RankId, how: &str) -> bool {
        let active = self.is_active();
        let Some(run) = self.run.as_mut().filter(|_| active) else { return false };
        let Some(rank) = run.ranks.get_mut(&id).filter(|rank| !rank.gone && !rank.leaving) else { return false };
        if rank.outcome.is_some() {
            return false;
        }
        rank.leaving = true;
        let reason = format!("{} on {} {how}", id.rank, rank.node);
        self.lose(scene, &[id], &reason, true);
        true
    }

    /// The run makes no progress.
    pub fn stalled(&mut self, scene: &mut Scene<'_>, reason: &str) {
        if self.is_active() {
            self.failures += 1;
            self.recover(scene, reason.to_owned());
        }
    }

    /// Processes of ranks are gone for good; `fault`: by a fault that may be the job's own.
    pub fn gone(&mut self, scene: &mut Scene<'_>, ids: &[RankId], how: &str, fault: bool) {
        let active = self.is_active();
        let Some(run) = &mut self.run else { return };
        let (mut lost, mut words) = (Vec::new(), Vec::new());
        for id in ids {
            let Some(rank) = run.ranks.get_mut(id).filter(|rank| !rank.gone) else { continue };
            rank.gone = true;
            words.push(format!("{} on {}", id.rank, rank.node));
            self.past.push((*id, rank.node));
            let (finished, leaving) = (rank.outcome.is_some(), rank.leaving);
            if !finished {
                run.ranks.remove(id);
            }
            if active && !finished && !leaving {
                lost.push(*id);
            }
        }
        if words.is_empty() {
            return;
        }
        self.past.drain(..self.past.len().saturating_sub(PAST_MAX));
        let reason = format!("{} {how}", words.join(", "));
        if !lost.is_empty() {
            self.lose(scene, &lost, &reason, fault);
        } else if !self.state.is_terminal() {
            self.note(scene, reason);
        }
        self.settle(scene);
    }

    /// Ranks that were wanted are not there any more: the others go on, if they are enough.
    fn lose(&mut self, scene: &mut Scene<'_>, lost: &[RankId], reason: &str, fault: bool) {
        let Some(run) = self.run.as_mut() else { return };
        let (running, run_generation) = (self.state == JobState::Running, run.generation);
        let members = lost.iter().any(|id| run.members.contains(id));
        let known = lost.iter().any(|id| rank_is_known(run, *id));
        run.members.retain(|id| !lost.contains(id));
        run.joining.retain(|id| !lost.contains(id));
        let enough = run.members.iter().filter(|id| run.is_live(**id)).count() >= self.ranks_min.max(1) as usize;
        if running && !members {
            self.turned_away += 1;
        } else if fault {
            self.failures += 1;
        }
        if !running || members && (!enough || self.is_spent(scene.bug)) {
            return self.recover(scene, reason.to_owned());
        }
        if known {
            self.recoveries += 1;
            self.note(scene, format!("{} ended: {reason}; the others go on", run_generation));
            self.regroup(scene, false);
        } else {
            self.note(scene, reason.to_owned());
        }
        // Those that are left may all have finished.
        self.conclude(scene);
        self.changed(scene);
    }

    fn is_spent(&self, bug: Option<PlantedBug>) -> bool {
        self.failures >= self.attempts_max && bug != Some(PlantedBug::AttemptsUnbounded)
    }

    /// Another generation of the same processes. Planned: everybody of the one before lives.
    fn regroup(&mut self, scene: &mut Scene<'_>, planned: bool) {
        self.generation = self.generation.next();
        let Some(run) = &mut self.run else { return };
        let before = std::mem::replace(&mut run.generation, self.generation);
        run.lost.clear();
        // What was stored of a checkpoint by other members does not fit together with what these store.
        if scene.bug != Some(PlantedBug::ShardsUnfenced) {
            run.prepared.clear();
            run.committing = None;
        }
        self.tell_membership(scene, planned.then_some(before));
    }

    fn tell_membership(&mut self, scene: &mut Scene<'_>, after: Option<Generation>) {
        let Some(run) = &self.run else { return };
        self.worlds.insert(run.generation, (run.members.len() as u32, scene.index));
        if self.worlds.len() > WORLDS_MAX {
            self.worlds.pop_first();
        }
        let membership = run.membership(after);
        // Also to those that are not in it any more and have not been told to stop: they end by themselves.
        for (id, rank) in run.ranks.iter().filter(|(_, rank)| !rank.gone && rank.address.is_some()) {
            let message = ToNode::Membership { id: *id, membership: membership.clone() };
            scene.orders.push(Order::Send { node: rank.node, message });
        }
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
    pub fn remind(&self, scene: &mut Scene<'_>, node: NodeId, id: RankId, kept: Vec<String>) {
        let known = self.run.as_ref().and_then(|run| Some((run, run.ranks.get(&id)?)));
        let mut send = |message| scene.orders.push(Order::Send { node, message });
        match (self.state, known) {
            (JobState::Starting | JobState::Running, Some((_, rank))) if rank.address.is_none() && !rank.leaving => {
                send(ToNode::Start(self.start_rank(id)));
            }
            (JobState::Starting, Some(_)) => {}
            (JobState::Running, Some((run, rank))) if !rank.leaving => {
                if let Some(step) = run.committed {
                    send(ToNode::Committed { id, step, keep: kept.into() });
                }
                if rank_is_known(run, id) {
                    // Whoever missed the plan missed the step at which it began.
                    send(ToNode::Membership { id, membership: run.membership(None) });
                }
                let committing = run.committing.filter(|_| run.members.first() == Some(&id));
                if let Some((step, shards)) = committing.and_then(|step| Some((step, complete(run, step, None)?))) {
                    self.order_commit(scene, step, shards);
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
            ) => scene.orders.push(stop_order(node, id, "the job goes on without it")),
        }
    }

    /// The run is over early: stop its other ranks; what comes next is settled when all are gone.
    fn recover(&mut self, scene: &mut Scene<'_>, reason: String) {
        let ended = self.run.as_ref().map_or(self.generation, |run| run.generation);
        self.recoveries += 1;
        self.note(scene, format!("{ended} ended: {reason}"));
        (self.state, self.reason) = (JobState::Recovering, reason);
        self.stop(scene);
        self.settle(scene);
        self.changed(scene);
    }

    fn stop(&self, scene: &mut Scene<'_>) {
        let Some(run) = &self.run else { return };
        // A rank that has finished and whose node was lost may be back by now, waiting for a release that will not come.
        let may_live = |rank: &RankRun| !rank.gone || rank.outcome.is_some();
        for (id, rank) in run.ranks.iter().filter(|(_, rank)| may_live(rank)) {
            scene.orders.push(stop_order(rank.node, *id, &self.reason));
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
                let (failures, most) = (self.failures, self.attempts_max);
                if self.doomed {
                    self.end(scene, JobState::Failed, self.reason.clone());
                } else if self.is_spent(scene.bug) {
                    let reason = format!("{} (attempt {failures} of {most})", self.reason);
                    self.end(scene, JobState::Failed, reason);
                } else {
                    self.state = JobState::Queued;
                    self.note(scene, format!("queued again, attempt {} of {most}", failures + 1));
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
        Exit::Code(4) => "was told to stop".into(),
        Exit::Code(code) => format!("exited with code {code}"),
        Exit::Signal(signal) => format!("was killed by signal {signal}"),
        Exit::NotStarted(why) => {
            format!("could not be started: {}", why.chars().take(REASON_CHARS_MAX).collect::<String>())
        }
        Exit::AgentRestarted => "went with its agent, which was restarted".into(),
        Exit::AgentStopped => "went with its agent, which was stopped".into(),
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

/// Whether a rank is in the membership.
pub fn rank_is_known(run: &Run, id: RankId) -> bool {
    run.members.contains(&id) || run.joining.contains(&id)
}

/// Every member's shard of a step, in order, or nothing.
fn complete(run: &Run, step: Step, bug: Option<PlantedBug>) -> Option<List<ShardRecord>> {
    let shards = run.prepared.get(&step)?;
    let needed = match bug {
        Some(PlantedBug::ShardMissing) => run.members.len().saturating_sub(1).max(1),
        _ => run.members.len(),
    };
    (needed > 0 && shards.len() >= needed).then(|| shards.values().cloned().collect())
}

/// What differs between replicas that must be equal, with the ranks named (J7): those of the smaller group.
fn differing(members: &[RankId], outcomes: &[&Outcome]) -> Option<String> {
    let mut groups: BTreeMap<(Step, Digest), Vec<String>> = BTreeMap::new();
    for (id, outcome) in members.iter().zip(outcomes) {
        groups.entry((outcome.step, outcome.weights_blake3)).or_default().push(id.rank.to_string());
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
