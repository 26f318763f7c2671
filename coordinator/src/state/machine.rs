//! One job, from submission to its end. Owns its state, its run (`run.rs`) and its reasons; how the membership changes is in `elastic.rs`, how
//! checkpoints are committed in `commits.rs`. Never decides where ranks go, never counts a node's room, and knows no session: it orders,
//! others carry.
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
//! | Running     | it has caught up, and another rank of its slot moves | Running   | Membership: the one in the place of the other, planned |
//! | Running     | resized to fewer ranks, or one that moves has no room elsewhere | Running | Membership without them, planned |
//! | Running     | members' parameters differ, a majority agrees, compared at every step | Running | Stop to the others; Membership without them |
//! | Running     | members' parameters differ otherwise               | Recovering  | Stop to each rank              |
//! | Running     | a sum is not finite, and is where one rank computes again | Running | Stop to it; Membership without it |
//! | Running     | a sum is not finite otherwise                      | Recovering  | Stop to each rank (then Failed, or Queued once) |
//! | Running     | every shard of a step stored                       | Running     | Commit to the first member     |
//! | Running     | manifest stored, committed to the catalogue        | Running     | Committed to each rank         |
//! | Running     | a shard or a manifest could not be stored          | Running     | Abandon to each rank           |
//! | Running     | every member's command has exited with 0           | Succeeded   | Release to each rank           |
//! | Running     | every member finished with the same weights        | Succeeded   | Release to each rank           |
//! | Running     | every member finished, weights differ              | Recovering  | Stop to each rank (then Failed)|
//! | Running     | a more urgent job has no room                      | Running     | Membership of the same, planned: store and hold |
//! | Running     | it holds, and its checkpoint is committed or late  | Recovering  | Stop to each rank (then Queued)|
//! | Recovering  | every rank gone, attempts left                     | Queued      |                                |
//! | Recovering  | every rank gone, no attempt left or doomed         | Failed      |                                |
//! | Starting, Running, Recovering | cancel                           | Cancelling  | Stop to each rank              |
//! | Cancelling  | every rank gone                                    | Cancelled   |                                |
//! | Succeeded, Failed, Cancelled | anything                          | the same    | Release or Stop to late ranks  |
//!
//! J1 (I2): only ranks of the run change a job, and only what the newest generation stored may be committed. J2 (I3): a gang starts when every
//! rank of the run before is gone; a rank that is replaced is no member from the entry on that says so, alive or not.
//! J3 (I8): terminal states absorb. J4 (I11): a job that fails `attempts_max` times without getting further fails for good;
//! one that serves and has answered does not.
//! J5 (I14): a run starts with all its ranks. J6 (I10): no Start and no certificate for a job that is being cancelled.
//! J7 (I19, I20): success needs equal digests on all members, and ledgers that reach to the last sample; what differs before is `replicas.rs`'s.
//! J8 (I21): Commit is ordered when every member's shard is stored and all are of one state, and a manifest counts only after that.
//! J9: a run never goes on with fewer than `ranks_min` members, but for one that serves: it waits for those that it lacks.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::{Generation, JobId, LogIndex, NodeId, Rank, Step};
use stoke_protocol::message::client::{JobState, OutcomeView};
use stoke_protocol::message::node::ToNode;
use stoke_protocol::message::rank::{Origin, Outcome, Purpose, RankId, StartFrom, StartRank};
use stoke_protocol::spec::{Artifact, OnNan, Straggler};

use super::commands::Runs;
use super::effect::Order;
use super::event::Submission;
use super::members::Room;
use super::planted::PlantedBug;
use super::run::{RankRun, Run, complete, rank_is_known};
use super::serving::Serves;
use super::split::Cut;
use super::time::Time;
use super::timeline::Timeline;
use super::words::{differing, state_word, unaccounted};

/// A reason that a rank gives is cut here: it stands in every view of the job.
pub(super) const REASON_CHARS_MAX: usize = 2_000;
/// How long a rank that was told to stop may take before it is killed.
pub const STOP_GRACE_MS: u64 = 5_000;

/// What a gang needs.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub struct Ask {
    pub ranks: u32,
    /// Of each rank; where they are unequal, of the one that needs most.
    pub room: Room,
    pub labels: BTreeMap<String, String>,
    /// Rank by rank, where they are unequal: of a model that was cut.
    pub seats: Vec<Seat>,
    /// Ranks besides that play environments, where there is room (`rollouts.rs`).
    pub rollouts: u32,
}

/// What one rank of a cut model needs, and the node that it was meant for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Seat {
    pub node: NodeId,
    pub memory_bytes: u64,
}

impl Ask {
    pub fn room_of(&self, rank: Rank) -> Room {
        let seat = self.seats.get(rank.0 as usize);
        Room { memory_bytes: seat.map_or(self.room.memory_bytes, |seat| seat.memory_bytes), ..self.room }
    }

    /// Of one rank by itself.
    pub fn of(&self, rank: Rank) -> Self {
        let seats = self.seats.get(rank.0 as usize).copied().into_iter().collect();
        Self { ranks: 1, room: self.room_of(rank), labels: self.labels.clone(), seats, rollouts: 0 }
    }
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
    /// Of a job whose trainer is the user's own: what its ranks run.
    pub program: Option<Artifact>,
    pub cut: Cut,
    /// The generation that has shown that it computes.
    pub proven: Option<Generation>,
    pub attempts_max: u32,
    pub state: JobState,
    /// Set while recovering when no attempt can help: the job fails when its ranks are gone.
    pub doomed: bool,
    /// Failures since it last got further.
    pub failures: u32,
    /// Whether a failure was counted since it went on last: ranks that die together, or before the others have gone on, are one failure.
    pub struck: bool,
    /// How often a generation ended because of a loss.
    pub recoveries: u32,
    /// Ranks that were added in a row and did not become members. The others go on without them.
    pub turned_away: u32,
    /// The job for which it makes room.
    pub yields: Option<JobId>,
    /// How often it has stopped to make room.
    pub preemptions: u32,
    /// The highest step at which a generation went on.
    pub reached: Option<Step>,
    /// The step that was not finite when it last went back for such a one.
    pub went_back_for: Option<Step>,
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

/// When and under which entry a machine is driven, and where its orders go.
pub struct Scene<'a> {
    pub at: Time,
    pub index: LogIndex,
    pub bug: Option<PlantedBug>,
    pub orders: &'a mut Vec<Order>,
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
            digest_every: submission.digest_every,
            on_nan: submission.on_nan,
            straggler: submission.straggler,
            sharded: submission.sharded,
            serves: submission.serves,
            runs: submission.runs,
            program: submission.program,
            cut: submission.cut,
            proven: None,
            attempts_max: submission.attempts_max,
            state: JobState::Queued,
            doomed: false,
            failures: 0,
            struck: false,
            recoveries: 0,
            turned_away: 0,
            yields: None,
            preemptions: 0,
            reached: None,
            went_back_for: None,
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

    /// Whether this rank may start and have a certificate (J1, J6).
    pub fn expects(&self, id: RankId) -> bool {
        let rank = self.run.as_ref().filter(|_| self.is_active()).and_then(|run| run.ranks.get(&id));
        rank.is_some_and(|rank| !rank.gone && !rank.leaving)
    }

    /// Whether this rank is told to stop because the run has failed, and was wanted until then.
    pub fn stops(&self, id: RankId) -> bool {
        let rank = self.run.as_ref().filter(|_| self.state == JobState::Recovering).and_then(|run| run.ranks.get(&id));
        rank.is_some_and(RankRun::is_wanted)
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

    /// A gang was placed. It continues from a checkpoint, of a step that may be unknown.
    pub fn start(
        &mut self,
        scene: &mut Scene<'_>,
        placement: &[NodeId],
        (resume, begun): (Option<Origin>, Option<Step>),
    ) {
        let before = self.run.as_ref().is_none_or(Run::is_over);
        assert!(before || scene.bug.is_some(), "J2: {} starts a gang while ranks of the last one live", self.id);
        self.generation = self.generation.next();
        let generation = self.generation;
        let ranks = (0..).map(Rank).zip(placement.iter().copied());
        let from = resume.as_ref().map(|origin| format!(", from {}", origin.uri)).unwrap_or_default();
        let places: Vec<String> = ranks.clone().map(|(rank, node)| format!("{rank} on {node}")).collect();
        self.note(scene, format!("{generation} placed: {}{from}", places.join(", ")));
        self.run = Some(Run {
            generation,
            resume,
            purpose: Purpose::Train,
            begun,
            members: Vec::new(),
            joining: Vec::new(),
            lost: BTreeSet::new(),
            not_finite: BTreeMap::new(),
            ranks: BTreeMap::new(),
            prepared: BTreeMap::new(),
            committing: None,
            committed: None,
        });
        (self.state, self.reason, self.struck) = (JobState::Starting, String::new(), false);
        if let Some(runs) = &mut self.runs {
            runs.exits.clear();
        }
        self.place(scene, ranks);
    }

    pub(super) fn place(&mut self, scene: &mut Scene<'_>, places: impl Iterator<Item = (Rank, NodeId)>) {
        for (rank, node) in places {
            let id = RankId { job: self.id, generation: self.generation, rank };
            let placed = RankRun {
                node,
                address: None,
                outcome: None,
                finished: None,
                leaving: false,
                parting: false,
                moves: None,
                gone: false,
            };
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
            (Some(origin), true) => StartFrom::Checkpoint(origin.clone()),
            (None, true) => StartFrom::Seed,
        };
        let spec = match &self.cut {
            Cut::Chosen(chosen) => &chosen.spec,
            Cut::Written | Cut::Awaited => &self.spec,
        };
        let memory_bytes = self.ask.room_of(id.rank).memory_bytes;
        StartRank { id, spec: spec.clone(), checkpoints: self.checkpoints.clone(), from, memory_bytes }
    }

    /// A rank has trained to the last step.
    pub fn finished(&mut self, scene: &mut Scene<'_>, id: RankId, generation: Generation, outcome: Outcome) {
        let Some(run) = self.run.as_mut().filter(|_| self.state == JobState::Running) else { return };
        if !run.members.contains(&id) {
            return;
        }
        let Some(rank) = run.ranks.get_mut(&id) else { return };
        // A later generation has no news of the outcome but the metrics of another first member.
        let known = rank.outcome.take().filter(|known| !known.metrics.is_empty() && *known != outcome);
        rank.outcome = Some(Outcome { metrics: known.map_or(outcome.metrics, |known| known.metrics), ..outcome });
        rank.finished = Some(generation);
        self.conclude(scene);
    }

    /// Ends well if every member has finished, and the held-out metrics are there: where the rank that evaluated is gone, the new first member
    /// does it again.
    pub(super) fn conclude(&mut self, scene: &mut Scene<'_>) {
        if self.runs.is_some() {
            return self.conclude_commands(scene);
        }
        let Some(run) = self.run.as_ref().filter(|_| self.state == JobState::Running) else { return };
        let has_finished = |id: &RankId| run.ranks.get(id).is_some_and(|rank| rank.outcome.is_some());
        if run.members.is_empty() || !run.members.iter().all(has_finished) {
            return;
        }
        // Also of members that have finished and are gone.
        let done = run.ranks.iter().filter_map(|(id, rank)| Some((*id, rank.outcome.as_ref()?)));
        let (ids, outcomes): (Vec<RankId>, Vec<&Outcome>) = done.unzip();
        let evaluated =
            run.ranks.values().filter_map(|rank| rank.outcome.as_ref()).any(|done| !done.metrics.is_empty());
        let first = run.members.first().and_then(|id| run.ranks.get(id)?.finished);
        if outcomes.is_empty() || !(evaluated || first == Some(run.generation)) {
            return;
        }
        let differing = differing(&ids, &outcomes).filter(|_| scene.bug != Some(PlantedBug::DigestsUncompared));
        if let Some(wrong) = differing.or_else(|| unaccounted(&ids, &outcomes)) {
            self.doomed = true;
            return self.recover(scene, wrong);
        }
        let first = outcomes[0];
        let accounted = format!("samples {} are in committed steps, each in exactly one", first.ledger);
        let metrics = run.ranks.values().filter_map(|rank| rank.outcome.as_ref()).map(|outcome| &outcome.metrics);
        self.outcome = Some(OutcomeView {
            step: first.step,
            loss: first.loss,
            samples: first.samples,
            ledger: first.ledger,
            skipped: first.skipped,
            weights_blake3: first.weights_blake3,
            metrics: metrics.max_by_key(|metrics| metrics.len()).cloned().unwrap_or_default(),
        });
        // Also to ranks of lost nodes: one that comes back must not wait for ever.
        for (id, rank) in &run.ranks {
            scene.orders.push(Order::Send { node: rank.node, message: ToNode::Release { id: *id } });
        }
        self.note(scene, accounted);
        self.end(scene, JobState::Succeeded, String::new());
    }

    /// The run makes no progress.
    pub fn stalled(&mut self, scene: &mut Scene<'_>, reason: &str) {
        if self.is_active() {
            self.failures += 1;
            self.recover(scene, reason.to_owned());
        }
    }

    pub fn cancel(&mut self, scene: &mut Scene<'_>, by: &str) {
        self.note(scene, format!("cancelled by {by}"));
        let reason = match self.serves.as_ref().and_then(|serves| serves.leave.as_ref()) {
            // People have not asked for its end, but for others in its place.
            Some(leave) => format!("it has left, as {} asked: its model's requests go to other jobs", leave.by),
            None => format!("cancelled by {by}"),
        };
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
            (JobState::Running, Some((run, rank))) if !rank.leaving && !rank.gone => {
                if let Some(step) = run.committed {
                    send(ToNode::Committed { id, step, keep: kept.into() });
                }
                if rank_is_known(run, id) {
                    // Whoever missed the plan missed the step at which it began.
                    send(ToNode::Membership { id, membership: run.membership(None, self.recoveries) });
                }
                if self.ask.rollouts > 0 && !id.rank.is_rollout() {
                    send(self.rollouts_for(id));
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
    pub(super) fn recover(&mut self, scene: &mut Scene<'_>, reason: String) {
        let ended = self.run.as_ref().map_or(self.generation, |run| run.generation);
        // The end of the job is none.
        if !self.doomed && !self.is_spent(scene.bug) {
            self.recoveries += 1;
        }
        self.note(scene, format!("{ended} ended: {reason}"));
        (self.state, self.reason) = (JobState::Recovering, reason);
        self.stop(scene);
        self.settle(scene);
        self.changed(scene);
    }

    pub(super) fn stop(&self, scene: &mut Scene<'_>) {
        let Some(run) = &self.run else { return };
        // A rank that has finished and whose node was lost may be back by now, waiting for a release that will not come.
        let may_live = |rank: &RankRun| !rank.gone || rank.outcome.is_some();
        for (id, rank) in run.ranks.iter().filter(|(_, rank)| may_live(rank)) {
            scene.orders.push(stop_order(rank.node, *id, &self.reason));
        }
    }

    pub(super) fn settle(&mut self, scene: &mut Scene<'_>) {
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
                    let words = match self.yields.take() {
                        Some(_) => "queued again, goes on when there is room".to_owned(),
                        None if self.is_bounded() => format!("queued again, attempt {} of {most}", failures + 1),
                        None => "queued again".to_owned(),
                    };
                    self.note(scene, words);
                    self.changed(scene);
                }
            }
            JobState::Cancelling => self.end(scene, JobState::Cancelled, self.reason.clone()),
            JobState::Queued | JobState::Starting | JobState::Running => {}
            JobState::Succeeded | JobState::Failed | JobState::Cancelled => {}
        }
    }

    pub(super) fn end(&mut self, scene: &mut Scene<'_>, state: JobState, reason: String) {
        assert!(!self.state.is_terminal(), "J3: {} has ended as {:?}", self.id, self.state);
        let why = if reason.is_empty() { String::new() } else { format!(": {reason}") };
        self.note(scene, format!("{}{why}", state_word(state)));
        (self.state, self.reason, self.ended) = (state, reason, Some(scene.at));
        if let Some(run) = &mut self.run {
            run.prepared.clear();
        }
        self.changed(scene);
    }

    pub(super) fn note(&mut self, scene: &Scene<'_>, text: String) {
        self.timeline.add(scene.at, scene.index, text);
    }

    pub(super) fn changed(&self, scene: &mut Scene<'_>) {
        scene.orders.push(Order::Changed { job: self.id });
    }
}

pub(super) fn stop_order(node: NodeId, id: RankId, reason: &str) -> Order {
    Order::Send { node, message: ToNode::Stop { id, reason: reason.to_owned(), grace_ms: STOP_GRACE_MS } }
}
