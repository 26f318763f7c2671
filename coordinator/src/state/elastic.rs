//! How a job's membership changes while it runs: ranks that are lost, added, join and own lanes. Owns who is a member in which generation; part of
//! the machine in `machine.rs`, whose table says what follows from what.

use std::net::SocketAddr;

use stoke_protocol::ids::{Generation, NodeId, Rank, Step};
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::node::ToNode;
use stoke_protocol::message::rank::RankId;

use super::effect::Order;
use super::machine::{Job, REASON_CHARS_MAX, Scene, stop_order};
use super::planted::PlantedBug;
use super::run::{Run, rank_is_known};
use super::words::rank_count;

/// Generations whose world size is remembered.
const WORLDS_MAX: usize = 64;
/// Ranks that are gone and remembered.
const PAST_MAX: usize = 16;

/// How a process came to its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// By itself, with success.
    Left,
    /// By a fault that may be the job's own.
    Fault,
    /// With its agent or its machine.
    Machine,
}

impl Job {
    /// Slots of a running job without a process. A job that is about to end needs none.
    pub fn missing(&self) -> Vec<Rank> {
        let grows = self.state == JobState::Running && self.yields.is_none();
        let Some(run) = self.run.as_ref().filter(|_| grows) else { return Vec::new() };
        if run.ranks.values().any(|rank| rank.outcome.is_some()) {
            return Vec::new();
        }
        let slots = (0..self.ask.ranks).map(Rank).chain(self.rollout_slots());
        slots.filter(|slot| run.of_slot(*slot).is_none()).collect()
    }

    /// Room was found for missing ranks of a running job.
    pub fn add(&mut self, scene: &mut Scene<'_>, places: &[(Rank, NodeId)]) {
        self.generation = self.generation.next();
        let words: Vec<String> = places.iter().map(|(rank, node)| format!("{rank} on {node}")).collect();
        self.note(scene, format!("{} placed: {}", self.generation, words.join(", ")));
        self.place(scene, places.iter().copied());
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
            self.note(
                scene,
                match self.serves {
                    Some(_) => format!("{generation} has its {}", rank_count(world)),
                    None => format!("{generation} runs, its world size is {world}"),
                },
            );
        } else if id.rank.is_rollout() {
            self.note(scene, format!("{} is ready", id.rank));
        } else if state == JobState::Running && !rank_is_known(run, id) && !run.ranks[&id].leaving {
            if scene.bug == Some(PlantedBug::ReadyOwnsLanes) {
                run.members.push(id);
            } else {
                run.joining.push(id);
            }
            self.note(scene, format!("{} is ready and joins", id.rank));
            self.regroup(scene, true);
        }
        self.tell_rollouts(scene);
        self.changed(scene);
    }

    /// Whether the job may have so many ranks from now on.
    pub fn check_scale(&self, ranks: u32) -> Result<(), String> {
        if ranks < self.ranks_min.max(1) {
            return Err(format!("{} goes on with no fewer than {} (ranks_min)", self.id, rank_count(self.ranks_min)));
        }
        let run = self.run.as_ref().filter(|_| self.state == JobState::Running);
        let stay = run.map_or(0, |run| run.members.iter().filter(|id| id.rank.0 < ranks && run.is_live(**id)).count());
        let least = if run.is_some_and(Run::is_finishing) { 1 } else { self.ranks_min.max(1) as usize };
        let part = run.map_or(0, |run| run.members.len().saturating_sub(stay));
        match self.state {
            state if state.is_terminal() => Err(format!("{} has ended", self.id)),
            JobState::Cancelling => Err(format!("{} is being cancelled", self.id)),
            JobState::Starting => Err(format!("{} is starting: try again in a moment", self.id)),
            // The state is with the ranks that would leave, or the others are too few until those that are missing are back (J9).
            JobState::Running if stay < least => Err(format!(
                "of the first {} of {} only {stay} are there, the others are being replaced, and it goes on with no fewer than {least}: \
                 try again in a moment",
                rank_count(ranks),
                self.id
            )),
            JobState::Running if part > self.may_part() => Err(match self.may_part() {
                0 => {
                    format!("the ranks of {} hand over parts of the optimizer's state: try again in a moment", self.id)
                }
                most => format!(
                    "of the {} of {}, which keep parts of the optimizer's state, {most} may leave at once: scale it to {} first",
                    rank_count((stay + part) as u32),
                    self.id,
                    stay + part - most
                ),
            }),
            _ => Ok(()),
        }
    }

    /// The job is to have so many ranks. Those that are too many leave between two steps; those that it lacks are placed when there is room.
    pub fn scale(&mut self, scene: &mut Scene<'_>, ranks: u32, by: &str) {
        let before = std::mem::replace(&mut self.ask.ranks, ranks);
        self.note(scene, format!("resized from {before} to {} by {by}", rank_count(ranks)));
        if let Some(run) = self.run.as_mut().filter(|_| self.state == JobState::Running) {
            let surplus = |id: &RankId| id.rank.0 >= ranks && !id.rank.is_rollout();
            let known = run.members.iter().chain(&run.joining).any(surplus);
            for (id, rank) in run.ranks.iter_mut().filter(|(id, rank)| surplus(id) && !rank.gone && !rank.leaving) {
                rank.leaving = rank.outcome.is_none();
                rank.parting = rank.leaving && run.members.contains(id);
                if rank.leaving && !rank.parting {
                    scene.orders.push(stop_order(rank.node, *id, "the job was resized"));
                }
            }
            let stays = |id: &RankId| !surplus(id) || run.ranks.get(id).is_some_and(|rank| rank.outcome.is_some());
            run.members.retain(stays);
            run.joining.retain(stays);
            if known {
                self.regroup(scene, true);
            }
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
        let before = run.supplant(id);
        run.members.push(id);
        run.members.sort_unstable_by_key(|id| id.rank);
        self.turned_away = 0;
        let world = run.members.len() as u32;
        let moved = before.map(|(from, to)| format!(", and moves from {from} to {to}")).unwrap_or_default();
        self.note(scene, format!("{} has caught up at {step}{moved}: {}", id.rank, rank_count(world)));
        self.regroup(scene, true);
        self.changed(scene);
    }

    /// The first member says where the newest generation goes on.
    pub fn resumed(&mut self, scene: &mut Scene<'_>, id: RankId, generation: Generation, step: Step) {
        let Some(run) = self.run.as_ref().filter(|_| self.state == JobState::Running) else { return };
        if generation != run.generation || run.members.first() != Some(&id) {
            return;
        }
        self.struck = false;
        if self.reached.is_some_and(|reached| step > reached) {
            self.failures = 0;
        }
        self.reached = self.reached.max(Some(step));
        self.proven = Some(generation);
        let words = self.resumed_words(generation, step);
        self.note(scene, words);
        self.holds_at(scene, id, step);
        self.changed(scene);
    }

    /// A rank gives up; its end follows.
    pub fn failed(&mut self, scene: &mut Scene<'_>, id: RankId, error: &str, permanent: bool) {
        let error: String = error.chars().take(REASON_CHARS_MAX).collect();
        // What keeps a gang from starting keeps the next one too. A rank that was added may just be on the wrong machine.
        self.doomed |= permanent && (self.state == JobState::Starting || self.runs.is_some()) && self.expects(id);
        self.depart(scene, id, &format!("failed: {error}"));
    }

    /// A rank has lost the connection to another one. What follows is decided where time is known.
    pub fn peer_lost(&mut self, by: RankId, generation: Generation, of: RankId) {
        let Some(run) = self.run.as_mut().filter(|run| run.generation == generation) else { return };
        if rank_is_known(run, by) && rank_is_known(run, of) && by != of {
            run.lost.insert((by, of));
        }
    }

    /// While this coordinator was away, members went on without some of the others: those are as good as lost by it (I18). The end of the others may
    /// be known by now; then there is nothing to do but to say so.
    pub fn went_on(
        &mut self,
        scene: &mut Scene<'_>,
        id: RankId,
        (generation, step): (Generation, Step),
        with: &[RankId],
    ) {
        let Some(run) = self.run.as_mut().filter(|run| run.members.contains(&id)) else { return };
        if run.generation == generation {
            let without = run.members.iter().filter(|member| !with.contains(member));
            run.lost.extend(without.map(|lost| (id, *lost)));
        }
        if with.first() == Some(&id) {
            let world = with.len() as u32;
            self.note(
                scene,
                format!("{generation} went on at {step} with {} while the coordinator was away", rank_count(world)),
            );
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

    /// Processes of ranks are gone for good.
    pub fn gone(&mut self, scene: &mut Scene<'_>, ids: &[RankId], mut how: &str, end: End) {
        let active = self.is_active();
        let Some(run) = &mut self.run else { return };
        let (mut lost, mut words, mut waited_for, mut done) = (Vec::new(), Vec::new(), false, false);
        for id in ids {
            let Some(rank) = run.ranks.get_mut(id).filter(|rank| !rank.gone) else { continue };
            rank.gone = true;
            words.push(format!("{} on {}", id.rank, rank.node));
            self.past.push((*id, rank.node));
            how = if rank.parting && end == End::Left { "has left" } else { how };
            let (finished, leaving) = (rank.outcome.is_some(), rank.leaving);
            waited_for |= rank.parting && end != End::Left;
            done |= finished && run.members.contains(id);
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
        let (reason, generation) = (format!("{} {how}", words.join(", ")), self.generation);
        if !lost.is_empty() {
            self.lose(scene, &lost, &reason, end != End::Machine);
        } else if !self.state.is_terminal() {
            self.note(scene, reason.clone());
        }
        // Commands wait for no step, and one that has exited with 0 is not needed any more.
        let waits = (waited_for || done) && self.runs.is_none();
        if waits && self.state == JobState::Running && self.generation == generation {
            // The step at which it was to leave will not be complete; or another one is to evaluate.
            self.go_on(scene, &reason);
        }
        self.settle(scene);
    }

    /// Ranks that were wanted are not there any more: the others go on, if they are enough.
    pub(super) fn lose(&mut self, scene: &mut Scene<'_>, lost: &[RankId], reason: &str, fault: bool) {
        let (rollouts, lost): (Vec<RankId>, Vec<RankId>) = lost.iter().partition(|id| id.rank.is_rollout());
        if !rollouts.is_empty() && self.state == JobState::Running {
            self.lose_rollouts(scene, reason, fault);
            if lost.is_empty() {
                return;
            }
        }
        let lost = &lost[..];
        let least = if scene.bug == Some(PlantedBug::TooFewGoOn) { 1 } else { self.least_live() };
        let Some(run) = self.run.as_mut() else { return };
        let (running, run_generation) = (self.state == JobState::Running, run.generation);
        let members = lost.iter().any(|id| run.members.contains(id));
        let known = lost.iter().any(|id| rank_is_known(run, *id));
        run.members.retain(|id| !lost.contains(id));
        run.joining.retain(|id| !lost.contains(id));
        let live = run.members.iter().filter(|id| run.is_live(**id)).count();
        if running && !members {
            self.turned_away += 1;
        } else if fault && !std::mem::replace(&mut self.struck, true) {
            self.failures += 1;
        }
        // A member that has finished is not among the lost, and may be gone with them.
        if !running || live == 0 || self.doomed || members && (live < least || self.is_spent(scene.bug)) {
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

    /// J9. A gang that serves keeps what it has loaded while a rank of it is replaced, and answers nothing meanwhile (R1).
    pub(super) fn least_live(&self) -> usize {
        if self.serves.is_some() { 1 } else { self.ranks_min.max(1) as usize }
    }

    pub(super) fn is_spent(&self, bug: Option<PlantedBug>) -> bool {
        self.is_bounded() && self.failures >= self.attempts_max && bug != Some(PlantedBug::AttemptsUnbounded)
    }

    /// J4. One that has answered is needed: its ranks come back later and later instead.
    pub fn is_bounded(&self) -> bool {
        self.serves.is_none() || self.proven.is_none()
    }

    /// Those who live go on, if there are any.
    fn go_on(&mut self, scene: &mut Scene<'_>, reason: &str) {
        let live = self.run.as_ref().is_some_and(|run| run.members.iter().any(|id| run.is_live(*id)));
        if live {
            self.regroup(scene, false);
            self.conclude(scene);
        } else {
            self.recover(scene, reason.to_owned());
        }
    }

    /// Another generation of the same processes. Planned: everybody of the one before lives.
    pub(super) fn regroup(&mut self, scene: &mut Scene<'_>, planned: bool) {
        self.generation = self.generation.next();
        let Some(run) = &mut self.run else { return };
        let before = std::mem::replace(&mut run.generation, self.generation);
        // Members that have finished and are gone have no part in it; what they said counts still.
        let ranks = &run.ranks;
        run.members.retain(|id| ranks.get(id).is_some_and(|rank| !rank.gone));
        run.lost.clear();
        run.not_finite.clear();
        if self.runs.is_some() {
            run.forget_ends();
        }
        // What was stored of a checkpoint by other members does not fit together with what these store.
        if scene.bug != Some(PlantedBug::ShardsUnfenced) {
            run.prepared.clear();
            run.committing = None;
        }
        self.tell_membership(scene, planned.then_some(before));
    }

    pub(super) fn tell_membership(&mut self, scene: &mut Scene<'_>, after: Option<Generation>) {
        if let Some(runs) = &mut self.runs {
            runs.restarts = self.recoveries;
        }
        let Some(run) = &self.run else { return };
        self.worlds.insert(run.generation, (run.members.len() as u32, scene.index));
        if self.worlds.len() > WORLDS_MAX {
            self.worlds.pop_first();
        }
        let membership = run.membership(after, self.recoveries);
        // Also to those that are not in it any more and have not been told to stop: they end by themselves.
        for (id, rank) in run.ranks.iter().filter(|(_, rank)| !rank.gone && rank.address.is_some()) {
            let message = ToNode::Membership { id: *id, membership: membership.clone() };
            scene.orders.push(Order::Send { node: rank.node, message });
        }
    }
}
