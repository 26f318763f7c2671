//! How a rank moves to another node while its job trains: a successor is placed in its slot, follows as a joining rank, and takes its place in
//! the planned generation in which the old one leaves, so that no step is lost and none is done again. Owns who gives way to whom; where the
//! successor goes is the planner's. Part of the machine in `machine.rs`.
//!
//! V1: a slot has at most one member; beside a member that moves there may be one successor that joins. V2: a rank that moves stays a member
//! until its successor is one, unless the job may go on without it.

use stoke_protocol::ids::{NodeId, Rank};
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::rank::RankId;

use super::machine::{Job, Scene, stop_order};
use super::run::{Move, Run, rank_is_known};
use super::words::rank_count;

impl Job {
    /// Members that are to move and have no successor yet. A job that is about to end moves none.
    pub fn moving(&self) -> Vec<RankId> {
        let grows = self.state == JobState::Running && self.yields.is_none();
        let Some(run) = self.run.as_ref().filter(|_| grows) else { return Vec::new() };
        if run.ranks.values().any(|rank| rank.outcome.is_some()) {
            return Vec::new();
        }
        let moving = run.ranks.iter().filter(|(_, rank)| rank.is_wanted() && rank.moves.is_some());
        moving.map(|(id, _)| *id).filter(|id| run.successor(*id).is_none()).collect()
    }

    /// Slots of a running job that a new process may take.
    pub fn vacant(&self) -> Vec<Rank> {
        self.missing().into_iter().chain(self.moving().into_iter().map(|id| id.rank)).collect()
    }

    pub fn is_lacking(&self) -> bool {
        !self.missing().is_empty() || !self.moving().is_empty()
    }

    /// The node on which the last two ranks of this slot have ended, of a job that serves: another one is better, if there is room. Which nodes jobs that
    /// train are to keep away from is found out by comparing them (`quarantine.rs`).
    pub fn unlucky_on(&self, slot: Rank) -> Option<NodeId> {
        self.serves.as_ref()?;
        let mut past = self.past.iter().rev().filter(|(id, _)| id.rank == slot).map(|(_, node)| *node);
        let last = past.next()?;
        past.next().filter(|before| *before == last)
    }

    /// Where the rank is that a successor in this slot may not be beside.
    pub fn moves_from(&self, slot: Rank) -> Option<NodeId> {
        let run = self.run.as_ref()?;
        let moving = |(id, rank): &(&RankId, &super::run::RankRun)| id.rank == slot && rank.moves.is_some();
        run.ranks.iter().filter(|(_, rank)| rank.is_wanted()).find(moving).map(|(_, rank)| rank.node)
    }

    /// A rank is to move. One that is no member yet is not worth waiting for: it is stopped, and another one is placed.
    pub fn move_away(&mut self, scene: &mut Scene<'_>, id: RankId, why: Move) {
        let (active, running) = (self.is_active(), self.state == JobState::Running);
        let Some(run) = self.run.as_mut().filter(|_| active) else { return };
        let Some(rank) = run.ranks.get_mut(&id).filter(|rank| rank.is_wanted() && rank.outcome.is_none()) else {
            return;
        };
        if rank.moves == Some(Move::Drained) || rank.moves.as_ref() == Some(&why) {
            return;
        }
        let words = format!("{} is to move away from {}: {why}", id.rank, rank.node);
        rank.moves = Some(why);
        if running && !run.members.contains(&id) {
            self.drop_joining(scene, id);
        }
        self.note(scene, words);
        self.changed(scene);
    }

    /// A rank may stay where it is after all; a successor that is no member yet is not needed.
    pub fn stay(&mut self, scene: &mut Scene<'_>, id: RankId) {
        let Some(run) = self.run.as_mut() else { return };
        let Some(rank) = run.ranks.get_mut(&id).filter(|rank| rank.is_wanted()) else { return };
        if rank.moves.take().is_none() {
            return;
        }
        let words = format!("{} stays on {}", id.rank, rank.node);
        if let Some(successor) = run.successor(id) {
            self.drop_joining(scene, successor);
        }
        self.note(scene, words);
        self.changed(scene);
    }

    /// A member that moves and has no room elsewhere leaves between two steps.
    pub fn retire(&mut self, scene: &mut Scene<'_>, id: RankId, reason: &str) {
        let Some(run) = self.run.as_mut().filter(|_| self.state == JobState::Running) else { return };
        let Some(rank) = run.ranks.get_mut(&id).filter(|rank| rank.is_wanted()) else { return };
        (rank.leaving, rank.parting) = (true, true);
        run.members.retain(|member| *member != id);
        let words = format!("{} on {} leaves: {reason}", id.rank, rank.node);
        self.note(scene, words);
        self.regroup(scene, true);
        self.changed(scene);
    }

    /// Whether members may leave for good: J9, and those that have finished are needed to the end.
    pub fn check_retire(&self, id: RankId) -> Result<(), String> {
        let run = self.run.as_ref().filter(|_| self.state == JobState::Running && self.moving().contains(&id));
        let Some(run) = run else { return Err(format!("{id} is not to move")) };
        match run.members.len() as u32 > self.ranks_min.max(1) {
            true if self.may_part() == 0 => Err(format!("the ranks of {} hand over parts of its state", self.id)),
            true => Ok(()),
            false => Err(format!("{} goes on with no fewer than {}", self.id, rank_count(self.ranks_min))),
        }
    }

    /// How many members may leave between two steps so that the others have all of the state: where each part is at two of them, half, the last ones or any one;
    /// and nobody before what the last change asked for is handed over.
    pub fn may_part(&self) -> usize {
        let Some(run) = self.run.as_ref().filter(|_| self.sharded) else { return usize::MAX };
        if self.proven == Some(run.generation) { run.members.len() / 2 } else { 0 }
    }

    /// The same for a plan, each of whose ranks leaves by a change of its own.
    pub fn may_part_in_turn(&self) -> usize {
        if self.sharded { self.may_part().min(1) } else { usize::MAX }
    }

    /// Ranks are stopped though they are in order: the job goes on as after a loss, and no failure is counted.
    pub fn withdraw(&mut self, scene: &mut Scene<'_>, ids: &[RankId], reason: &str) {
        let active = self.is_active();
        let Some(run) = self.run.as_mut().filter(|_| active) else { return };
        let (mut lost, mut words, mut orders) = (Vec::new(), Vec::new(), Vec::new());
        for id in ids {
            let Some(rank) = run.ranks.get_mut(id).filter(|rank| rank.is_wanted() && rank.outcome.is_none()) else {
                continue;
            };
            rank.leaving = true;
            lost.push(*id);
            words.push(format!("{} on {}", id.rank, rank.node));
            orders.push(stop_order(rank.node, *id, reason));
        }
        if !lost.is_empty() {
            self.lose(scene, &lost, &format!("{} {reason}", words.join(", ")), false);
            scene.orders.extend(orders);
        }
    }

    /// A rank that is no member is stopped; the members go on as they are.
    fn drop_joining(&mut self, scene: &mut Scene<'_>, id: RankId) {
        let Some(run) = self.run.as_mut() else { return };
        let Some(rank) = run.ranks.get_mut(&id) else { return };
        rank.leaving = true;
        scene.orders.push(stop_order(rank.node, id, "another node is to have this rank"));
        let known = rank_is_known(run, id);
        run.joining.retain(|other| *other != id);
        if known {
            self.regroup(scene, true);
        }
        self.tell_rollouts(scene);
    }
}

impl Run {
    /// The process that is to take a rank's place.
    pub fn successor(&self, id: RankId) -> Option<RankId> {
        let follows = |other: &RankId| other.rank == id.rank && *other != id;
        let found = self.ranks.iter().find(|(other, rank)| follows(other) && rank.is_wanted() && rank.moves.is_none());
        found.map(|(other, _)| *other)
    }

    /// Whether a rank joins beside a member of its slot that is to move.
    pub fn succeeds(&self, id: RankId) -> bool {
        let old = self.members.iter().find(|member| member.rank == id.rank && **member != id);
        self.joining.contains(&id) && old.and_then(|old| self.ranks.get(old)).is_some_and(|rank| rank.moves.is_some())
    }

    /// Whoever had the slot of a rank that becomes a member leaves between two steps. Gives from where to where the slot moves.
    pub(super) fn supplant(&mut self, id: RankId) -> Option<(NodeId, NodeId)> {
        let to = self.ranks.get(&id)?.node;
        let old = *self.members.iter().find(|member| member.rank == id.rank && **member != id)?;
        let rank = self.ranks.get_mut(&old)?;
        (rank.leaving, rank.parting) = (true, true);
        let from = rank.node;
        self.members.retain(|member| *member != old);
        Some((from, to))
    }
}
