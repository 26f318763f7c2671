//! How a job makes room for a more urgent one: its members store a checkpoint at the next step and hold, it stops when that is committed, waits in
//! the queue, and goes on from there. Owns the way from the wish to the queue; who makes room is decided in `preemption.rs`. Part of the machine
//! in `machine.rs`.
//!
//! Y1: it takes at most `yield_max_ms`; after that, or when the checkpoint cannot be stored, it stops anyway, and begins at its last one. Y2: no
//! attempt is counted. Y3: while it makes room nothing is placed for it.

use stoke_protocol::ids::{JobId, NodeId, Rank, Step};
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::rank::{Purpose, RankId};

use super::machine::{Job, Scene, stop_order};
use super::run::{RankRun, Run};
use super::words::rank_count;

impl Job {
    /// Whether it could make room: it trains, and is not about to end.
    pub fn may_yield(&self) -> bool {
        self.yields.is_none() && self.trains()
    }

    /// One that is about to end does so, and its room is free then.
    fn trains(&self) -> bool {
        let unfinished = |run: &Run| run.ranks.values().all(|rank| rank.outcome.is_none());
        self.state == JobState::Running && self.run.as_ref().is_some_and(unfinished)
    }

    /// Whether its ranks are on their way out.
    pub fn is_leaving(&self) -> bool {
        self.run.iter().flat_map(|run| run.ranks.values()).any(|rank| self.gives_back(rank))
    }

    /// Where the room is that is on its way back: of ranks that end, or whose job makes room.
    pub fn given_back(&self) -> impl Iterator<Item = (Rank, NodeId)> {
        let ranks = self.run.iter().flat_map(|run| &run.ranks);
        ranks.filter(|(_, rank)| self.gives_back(rank)).map(|(id, rank)| (id.rank, rank.node))
    }

    fn gives_back(&self, rank: &RankRun) -> bool {
        !rank.gone && (rank.leaving || self.yields.is_some() || !self.is_active())
    }

    /// Members that it could go on without, the last slots first; with their nodes.
    pub fn spare(&self) -> Vec<(RankId, NodeId)> {
        let Some(run) = &self.run else { return Vec::new() };
        let spare = run.members.len().saturating_sub(self.ranks_min.max(1) as usize);
        let last = run.members.iter().rev().take(spare.min(self.may_part_in_turn()));
        last.filter_map(|id| Some((*id, run.ranks.get(id)?.node))).collect()
    }

    /// Where its ranks are that stay.
    pub fn nodes(&self) -> Vec<NodeId> {
        let ranks = self.run.iter().flat_map(|run| run.ranks.values());
        ranks.filter(|rank| rank.is_wanted()).map(|rank| rank.node).collect()
    }

    pub fn check_yield(&self) -> Result<(), String> {
        if self.may_yield() { Ok(()) } else { Err(format!("{} does not train, or makes room already", self.id)) }
    }

    pub fn check_overdue(&self) -> Result<(), String> {
        if self.yields.is_some() && self.state == JobState::Running {
            return Ok(());
        }
        Err(format!("{} has made room", self.id))
    }

    pub fn check_give(&self, id: RankId) -> Result<(), String> {
        self.check_yield()?;
        if self.spare().iter().any(|(spare, _)| *spare == id) {
            return Ok(());
        }
        Err(format!("{} goes on with no fewer than {}", self.id, rank_count(self.ranks_min)))
    }

    /// One of its ranks makes room, and it goes on with fewer.
    pub fn give_rank(&mut self, scene: &mut Scene<'_>, id: RankId, by: JobId) {
        self.retire(scene, id, &format!("makes room for {by}, which is more urgent"));
    }

    /// It is to make room for another job: a checkpoint first.
    pub fn yield_to(&mut self, scene: &mut Scene<'_>, by: JobId) {
        let Some(run) = self.run.as_mut() else { return };
        let members = run.members.clone();
        for (id, rank) in run.ranks.iter_mut().filter(|(id, rank)| rank.is_wanted() && !members.contains(id)) {
            rank.leaving = true;
            scene.orders.push(stop_order(rank.node, *id, "its job makes room for a more urgent one"));
        }
        run.joining.clear();
        run.purpose = Purpose::Checkpoint;
        self.yields = Some(by);
        self.preemptions += 1;
        self.reason = format!("stores a checkpoint and makes room for {by}, which is more urgent");
        let words = self.reason.clone();
        self.note(scene, words);
        self.regroup(scene, true);
        self.changed(scene);
    }

    /// The members go on at a step, or hold there: whether there is anything to store.
    pub(super) fn holds_at(&mut self, scene: &mut Scene<'_>, first: RankId, step: Step) {
        let Some(run) = self.run.as_mut() else { return };
        if run.generation == first.generation {
            // Only a gang's own first generation begins where the gang did: a later one may be the first that is heard of.
            run.begun.get_or_insert(step);
        }
        let stored = run.committed.max(run.begun).is_some_and(|stored| step <= stored);
        if self.yields.is_some() && stored {
            self.stop_for_another(scene);
        }
    }

    /// Its checkpoint is committed, or will not be.
    pub(super) fn stop_for_another(&mut self, scene: &mut Scene<'_>) {
        let Some(by) = self.yields.filter(|_| self.trains()) else { return };
        self.state = JobState::Recovering;
        self.reason = format!("made room for {by}, which is more urgent");
        let words = format!("{} stops: the job {}", self.generation, self.reason);
        self.note(scene, words);
        self.stop(scene);
        self.settle(scene);
        self.changed(scene);
    }
}
