//! From a plan to entries: when one is made, what it looks at, and how long a job that has failed waits for new ranks. Owns no decision about
//! nodes (`placement.rs`). Part of `control.rs`.

use std::cmp::Reverse;

use stoke_protocol::ids::{JobId, Rank};
use stoke_protocol::message::rank::RankId;

use super::control::{Control, Step};
use super::event::Event;
use super::machine::Job;
use super::placement::{self, View};

/// Before a job that failed for the second time without getting further gets new ranks; doubled with each failure after it.
const BACK_OFF_MS: u64 = 1_000;
/// At most a minute.
const BACK_OFF_DOUBLINGS: u32 = 6;

impl Control {
    /// Makes a plan when something has changed that may let a job be placed, and journals what it places.
    pub(super) fn place(&mut self, step: &mut Step) {
        if !(self.cluster.take_replan() | std::mem::take(&mut self.replan)) {
            return;
        }
        let plan = placement::plan(&self.view(), &self.options.placement);
        (self.waits, self.stuck) = (plan.waits, plan.stuck);
        for (id, reason) in plan.retired {
            let committed = self.commit(step, Event::RankRetired { id, reason });
            assert!(committed.is_ok(), "J9: a plan leaves enough ranks: {committed:?}");
        }
        for (id, by) in plan.yielded {
            let committed = self.commit(step, Event::RankYielded { id, by });
            assert!(committed.is_ok(), "J9: a plan leaves enough ranks: {committed:?}");
        }
        for (job, by) in plan.preempted {
            let until = self.now.mono.plus_ms(self.options.timings.yield_max_ms);
            self.yielding.insert(job, until);
            let committed = self.commit(step, Event::Preempted { job, by });
            assert!(committed.is_ok(), "E1: a plan stops jobs that train: {committed:?}");
        }
        for (job, places) in plan.added {
            let Some(generation) = self.cluster.jobs().get(job).map(|job| job.generation.next()) else { continue };
            let ids = places.iter().map(|(rank, _)| RankId { job, generation, rank: *rank });
            self.starting.extend(ids.map(|id| (id, self.now.mono)));
            let committed = self.commit(step, Event::RanksPlaced { job, generation, places });
            assert!(committed.is_ok() || self.cluster.planted_bug().is_some(), "K3: a plan fits: {committed:?}");
        }
        for (job, placement) in plan.placed {
            let Some(generation) = self.cluster.jobs().get(job).map(|job| job.generation.next()) else { continue };
            self.progress.remove(&job);
            if self.cluster.jobs().get(job).is_some_and(|job| job.preemptions > 0) {
                self.spared.insert(job, self.now.mono.plus_ms(self.options.timings.spared_ms));
            }
            let ids = (0..placement.len() as u32).map(|rank| RankId { job, generation, rank: Rank(rank) });
            self.starting.extend(ids.map(|id| (id, self.now.mono)));
            let committed = self.commit(step, Event::GenerationStarted { job, generation, placement });
            assert!(committed.is_ok() || self.cluster.planted_bug().is_some(), "K3: a plan fits: {committed:?}");
        }
    }

    /// Running jobs that lack ranks, the most urgent first.
    fn missing(&self) -> Vec<(JobId, Vec<Rank>)> {
        let waits = |job: &Job| self.held_off.get(&job.id).is_some_and(|until| self.now.mono < *until);
        let lacking = self.cluster.jobs().lacking().filter(|job| !waits(job));
        let mut missing: Vec<(&Job, Vec<Rank>)> = lacking.map(|job| (job, job.missing())).collect();
        missing.sort_by_key(|(job, _)| (Reverse(job.priority), job.id));
        missing.into_iter().map(|(job, missing)| (job.id, missing)).collect()
    }

    /// Ranks that are to move and have no successor.
    fn moving(&self) -> Vec<(JobId, Vec<RankId>)> {
        let waits = |job: &Job| self.held_off.get(&job.id).is_some_and(|until| self.now.mono < *until);
        let lacking = self.cluster.jobs().lacking().filter(|job| !waits(job));
        lacking.map(|job| (job.id, job.moving())).filter(|(_, moving)| !moving.is_empty()).collect()
    }

    /// What a plan or an explanation looks at.
    pub fn view(&self) -> View<'_> {
        View {
            members: self.cluster.members(),
            live: self.liveness.live(),
            jobs: self.cluster.jobs(),
            missing: self.missing(),
            moving: self.moving(),
            spared: self.spared.keys().copied().collect(),
            held_off: self.held_off.iter().filter(|(_, until)| self.now.mono < **until).map(|(job, _)| *job).collect(),
            placements: self.cluster.placements(),
            bug: self.cluster.planted_bug(),
        }
    }

    pub(super) fn failures(&self, job: JobId) -> u32 {
        self.cluster.jobs().get(job).map_or(0, |job| job.failures + job.turned_away)
    }

    /// A job that has failed again without getting further gets new ranks later and later; the first time at once (I11).
    pub(super) fn hold_off(&mut self, job: JobId, before: u32) {
        let failures = self.failures(job);
        if failures > before && failures > 1 {
            let wait_ms = BACK_OFF_MS << (failures - 2).min(BACK_OFF_DOUBLINGS);
            self.held_off.insert(job, self.now.mono.plus_ms(wait_ms));
        }
    }
}
