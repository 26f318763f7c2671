//! Ranks that compute more slowly than their peers. Owns what they said of their pace and the verdict on it; what follows is the spec's word
//! (`train.straggler`) and the control's act. Volatile: a restart hears everybody anew.
//!
//! T1: what is compared is compute time a lane. It depends neither on how many lanes a rank owns nor on its waiting for others.
//! T2: slow is a relation to the other members at the same time: when all slow down, or one is left, nobody is slow.
//! T3: a verdict takes [`WINDOWS`] reports in a row, and so does its end. A rank is told of once, and again only [`TOLD_AGAIN_MS`] after that.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use stoke_protocol::ids::{Generation, JobId};
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::rank::{Progress, RankId};
use stoke_protocol::spec::Straggler;

use super::control::{Control, Step};
use super::event::Event;
use super::machine::{Job, Scene};
use super::replicas::named;
use super::time::Mono;

/// Times the median of the others.
const SLOW: f32 = 1.5;
/// With a single peer there is no median, and a machine that is busy for a moment is half of the job.
const SLOW_OF_TWO: f32 = 2.0;
/// Below this share of the limit a rank has recovered: the gap keeps one at the limit from flapping.
const RECOVERED: f32 = 0.8;
/// Reports in a row, each about half a second or a step, whichever is longer: well within ten steps or a few seconds.
const WINDOWS: u32 = 4;
/// A rank that was not heard for so long is no measure.
const FRESH_MS: u64 = 10_000;
/// Lanes that take less are too short to be compared: a tick of the scheduler is in them or not.
const LANE_MS_MIN: f32 = 0.2;
const TOLD_AGAIN_MS: u64 = 60_000;
/// Ranks of a job that are replaced for their pace, at most, in a coordinator's life; after each the next must wait twice as long.
const REPLACED_MAX: u32 = 3;
const REPLACED_AGAIN_MS: u64 = 60_000;

#[derive(Clone, Debug, Default)]
pub struct Stragglers {
    paces: BTreeMap<JobId, Paces>,
    /// How often ranks of a job were replaced, and when the next may be.
    replaced: BTreeMap<JobId, (u32, Mono)>,
}

#[derive(Clone, Debug, Default)]
struct Paces {
    generation: Generation,
    ranks: BTreeMap<RankId, Pace>,
}

#[derive(Clone, Copy, Debug)]
struct Pace {
    generation: Generation,
    heard: Mono,
    lane_ms: f32,
    /// How many times the median of the others, in the newest report.
    times: f32,
    /// Reports in a row that say the opposite of `slow`.
    against: u32,
    slow: bool,
    /// When it was told of last, and whether that was of this spell.
    told: Option<Mono>,
    is_told: bool,
}

/// What came of a report.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Verdict {
    Slow { times: f32, lane_ms: f32, others_ms: f32 },
    Recovered,
}

impl Stragglers {
    /// A member of the newest generation says how fast it is; `members` are all of them.
    pub fn hear(&mut self, now: Mono, id: RankId, progress: &Progress, members: &[RankId]) -> Option<Verdict> {
        let generation = progress.generation;
        let Paces { generation: newest, ranks: paces } = self.paces.entry(id.job).or_default();
        if std::mem::replace(newest, generation) != generation {
            let members: BTreeSet<RankId> = members.iter().copied().collect();
            paces.retain(|known, _| members.contains(known));
        }
        let lane_ms = progress.compute_ms / progress.lanes.max(1) as f32;
        let fresh = |pace: &Pace| pace.generation == generation && now.since_ms(pace.heard) <= FRESH_MS;
        let others = paces.iter().filter(|(other, pace)| **other != id && fresh(pace));
        let others_ms = median(others.map(|(_, pace)| pace.lane_ms).collect());
        let unknown =
            Pace { generation, heard: now, lane_ms, times: 1.0, against: 0, slow: false, told: None, is_told: false };
        let pace = paces.entry(id).or_insert(unknown);
        (pace.generation, pace.heard, pace.lane_ms) = (generation, now, lane_ms);
        let others_ms = others_ms.filter(|ms| ms.is_finite())?;
        pace.times = lane_ms.max(LANE_MS_MIN) / others_ms.max(LANE_MS_MIN);
        let limit = if members.len() > 2 { SLOW } else { SLOW_OF_TWO };
        let against = if pace.slow { pace.times < limit * RECOVERED } else { pace.times > limit };
        pace.against = if against { pace.against + 1 } else { 0 };
        if pace.against < WINDOWS {
            return None;
        }
        (pace.slow, pace.against) = (!pace.slow, 0);
        if !pace.slow {
            return std::mem::take(&mut pace.is_told).then_some(Verdict::Recovered);
        }
        if pace.told.is_some_and(|told| now.since_ms(told) < TOLD_AGAIN_MS) {
            return None;
        }
        (pace.told, pace.is_told) = (Some(now), true);
        Some(Verdict::Slow { times: pace.times, lane_ms, others_ms })
    }

    /// Whether one more rank of a job may be replaced now; it counts.
    pub fn take_replacement(&mut self, now: Mono, job: JobId) -> bool {
        let (count, next) = self.replaced.entry(job).or_default();
        let may = *count < REPLACED_MAX && now >= *next;
        if may {
            *next = now.plus_ms(REPLACED_AGAIN_MS << *count);
            *count += 1;
        }
        may
    }

    /// Members that are slow now, with how many times the median of the others.
    pub fn slow(&self, job: JobId) -> impl Iterator<Item = (RankId, f32)> {
        let paces = self.paces.get(&job).into_iter().flat_map(|paces| &paces.ranks);
        paces.filter(|(_, pace)| pace.slow).map(|(id, pace)| (*id, pace.times))
    }

    pub fn count(&self) -> usize {
        self.paces.values().flat_map(|paces| paces.ranks.values()).filter(|pace| pace.slow).count()
    }

    /// Forgets jobs that are over.
    pub fn retain(&mut self, runs: impl Fn(JobId) -> bool) {
        self.paces.retain(|job, _| runs(*job));
        self.replaced.retain(|job, _| runs(*job));
    }
}

impl Control {
    /// Compares a member's pace with the others'; a verdict is journalled for the timeline, and acted upon where the spec says so.
    pub(super) fn take_pace(&mut self, step: &mut Step, id: RankId, progress: &Progress) {
        let job = self.cluster.jobs().get(id.job).filter(|job| job.state == JobState::Running);
        let Some((job, run)) = job.and_then(|job| Some((job, job.run.as_ref()?))) else { return };
        if run.generation != progress.generation || !run.members.contains(&id) {
            return;
        }
        let replaces = job.straggler == Straggler::Replace;
        let Some(verdict) = self.stragglers.hear(self.now.mono, id, progress, &run.members) else { return };
        // A rank that is gone by now has no pace.
        let _unchanged = self.commit(step, Event::PaceNoted { id, words: verdict.to_string() });
        let slow = matches!(verdict, Verdict::Slow { .. });
        if slow && replaces && self.stragglers.take_replacement(self.now.mono, id.job) {
            let _unchanged = self.replace(step, id, verdict.to_string());
        }
    }
}

impl Job {
    pub(super) fn pace_noted(&mut self, scene: &mut Scene<'_>, id: RankId, words: &str) {
        let Some(run) = &self.run else { return };
        self.note(scene, format!("{} {words}", named(run, id)));
        self.changed(scene);
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slow { times, lane_ms, others_ms } => {
                write!(f, "is slow: {lane_ms:.1} ms a lane, {times:.1} times the {others_ms:.1} ms of the others")
            }
            Self::Recovered => f.write_str("keeps up with the others again"),
        }
    }
}

/// The lower of the two in the middle: a rank is compared with the better half.
fn median(mut values: Vec<f32>) -> Option<f32> {
    let middle = values.len().checked_sub(1)? / 2;
    Some(*values.select_nth_unstable_by(middle, f32::total_cmp).1)
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::{Rank, Step};

    use super::*;

    fn id(rank: u32) -> RankId {
        RankId { job: JobId(1), generation: Generation(1), rank: Rank(rank) }
    }

    fn progress(compute_ms: f32, lanes: u32) -> Progress {
        Progress {
            generation: Generation(1),
            step: Step(1),
            steps: Step(9),
            loss: 1.0,
            accuracy: 0.5,
            learning_rate: 0.1,
            samples_per_second: 1.0,
            compute_ms,
            exchange_ms: 1.0,
            apply_ms: 1.0,
            samples: 1,
            skipped: 0,
            lanes,
            rl: None,
        }
    }

    /// Rounds of reports of all ranks, half a second apart: who was found slow in which round.
    fn rounds(world: u32, count: u64, pace: impl Fn(u64, u32) -> (f32, u32)) -> Vec<(u64, u32, Verdict)> {
        let members: Vec<RankId> = (0..world).map(id).collect();
        let mut stragglers = Stragglers::default();
        let mut found = Vec::new();
        for round in 0..count {
            for rank in 0..world {
                let (compute_ms, lanes) = pace(round, rank);
                let now = Mono(500 * round + u64::from(rank));
                let verdict = stragglers.hear(now, id(rank), &progress(compute_ms, lanes), &members);
                found.extend(verdict.map(|verdict| (round, rank, verdict)));
            }
        }
        found
    }

    #[test]
    fn a_rank_at_half_speed_is_found_within_a_few_reports_and_told_of_once() {
        for world in [3, 4, 8] {
            let found = rounds(world, 40, |round, rank| (if rank == 1 && round >= 5 { 20.0 } else { 10.0 }, 2));
            let [(round, 1, Verdict::Slow { times, .. })] = found[..] else { panic!("{found:?}") };
            assert!((5..=9).contains(&round) && (1.9..2.1).contains(&times), "{found:?}");
        }
    }

    #[test]
    fn nobody_is_slow_when_all_are_or_for_a_moment_or_for_owning_more_lanes() {
        assert_eq!(rounds(3, 40, |round, _| (if round >= 5 { 40.0 } else { 10.0 }, 2)), []);
        // One after the other slows down, as when a machine that they share gets busy: a few reports apart.
        assert_eq!(rounds(3, 40, |round, rank| (if round >= 5 + u64::from(rank) { 40.0 } else { 10.0 }, 2)), []);
        assert_eq!(rounds(3, 40, |round, rank| (if rank == 1 && round % 4 != 0 { 40.0 } else { 10.0 }, 2)), []);
        assert_eq!(rounds(2, 40, |_, rank| (10.0 * (rank + 1) as f32, rank + 1)), []);
        // Lanes that are too short to be compared.
        assert_eq!(rounds(3, 40, |_, rank| (if rank == 1 { 0.15 } else { 0.01 }, 1)), []);
        assert_eq!(rounds(1, 40, |round, _| (round as f32, 1)), []);
    }

    #[test]
    fn of_two_ranks_only_a_clear_difference_counts() {
        assert_eq!(rounds(2, 40, |_, rank| (if rank == 1 { 18.0 } else { 10.0 }, 2)), []);
        let found = rounds(2, 40, |_, rank| (if rank == 1 { 30.0 } else { 10.0 }, 2));
        assert!(matches!(found[..], [(_, 1, Verdict::Slow { .. })]), "{found:?}");
    }

    #[test]
    fn a_rank_that_keeps_up_again_is_not_slow_and_one_that_wavers_is_told_of_seldom() {
        let found = rounds(3, 60, |round, rank| (if rank == 1 && round < 20 { 20.0 } else { 10.0 }, 2));
        assert!(matches!(found[..], [(_, 1, Verdict::Slow { .. }), (_, 1, Verdict::Recovered)]), "{found:?}");
        let found = rounds(3, 480, |round, rank| (if rank == 1 && round / 10 % 2 == 0 { 20.0 } else { 10.0 }, 2));
        assert!((4..=10).contains(&found.len()), "four minutes: {found:?}");
    }

    #[test]
    fn replacements_are_few_and_further_and_further_apart() {
        let mut stragglers = Stragglers::default();
        let taken: Vec<u64> =
            (0..1_000).filter(|second| stragglers.take_replacement(Mono(second * 1_000), JobId(1))).collect();
        assert_eq!(taken, [0, 60, 180]);
    }
}
