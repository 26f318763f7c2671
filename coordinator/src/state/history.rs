//! How jobs went: a curve of each, thinned as it grows. Volatile: a coordinator that starts anew begins a new one; checkpoints and logs have the whole.

use std::collections::BTreeMap;

use stoke_protocol::ids::{JobId, Step};
use stoke_protocol::message::client::Point;
use stoke_protocol::message::rank::Progress;

/// Of a job. When they are there every second one goes, and half as many come from then on.
const POINTS_MAX: usize = 512;
/// Jobs that have one; the oldest job's goes first. With all points each is 24 KiB.
const JOBS_MAX: usize = 1_000;

#[derive(Default)]
pub struct Histories(BTreeMap<JobId, History>);

struct History {
    points: Vec<Point>,
    /// When the newest step was first reported.
    moved_ms: u64,
    newest: Step,
    /// One of so many reports is kept.
    every: u32,
    since: u32,
}

impl Histories {
    pub fn hear(&mut self, job: JobId, at_ms: u64, progress: &Progress) {
        let history = self.0.entry(job).or_insert_with(|| History {
            points: Vec::new(),
            moved_ms: at_ms,
            newest: progress.step,
            every: 1,
            since: 0,
        });
        history.hear(at_ms, progress);
        if self.0.len() > JOBS_MAX {
            self.0.pop_first();
        }
    }

    pub fn of(&self, job: JobId) -> &[Point] {
        self.0.get(&job).map_or(&[], |history| &history.points)
    }

    /// What was heard after a moment.
    pub fn after(&self, job: JobId, after_ms: u64) -> &[Point] {
        let points = self.of(job);
        &points[points.partition_point(|point| point.at_ms <= after_ms)..]
    }

    /// When a job last got further.
    pub fn moved_ms(&self, job: JobId) -> Option<u64> {
        self.0.get(&job).map(|history| history.moved_ms)
    }

    pub fn retain(&mut self, is_known: impl Fn(JobId) -> bool) {
        self.0.retain(|job, _| is_known(*job));
    }
}

impl History {
    fn hear(&mut self, at_ms: u64, progress: &Progress) {
        if self.newest != progress.step {
            (self.newest, self.moved_ms) = (progress.step, at_ms);
        }
        // Steps that were lost are done again.
        let before = self.points.len();
        self.points.retain(|point| point.step < progress.step);
        self.since += 1;
        if self.since < self.every && self.points.len() == before {
            return;
        }
        self.since = 0;
        self.points.push(Point {
            at_ms,
            step: progress.step,
            loss: progress.loss,
            accuracy: progress.accuracy,
            samples_per_second: progress.samples_per_second as f32,
            env_steps: progress.rl.map(|rl| rl.env_steps),
            episode_return: progress.rl.and_then(|rl| rl.episode_return),
        });
        if self.points.len() > POINTS_MAX {
            let mut at = 0;
            self.points.retain(|_| {
                at += 1;
                at % 2 == 1
            });
            self.every *= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::Generation;

    use super::*;

    fn progress(step: u64) -> Progress {
        Progress {
            generation: Generation(1),
            step: Step(step),
            steps: Step(10_000),
            loss: 1.0 / (1 + step) as f32,
            accuracy: 0.5,
            learning_rate: 0.1,
            samples_per_second: 100.0,
            compute_ms: 1.0,
            exchange_ms: 1.0,
            apply_ms: 1.0,
            samples: step,
            skipped: 0,
            lanes: 1,
            rl: None,
        }
    }

    fn steps(histories: &Histories) -> Vec<u64> {
        histories.of(JobId(1)).iter().map(|point| point.step.0).collect()
    }

    #[test]
    fn long_curve_is_thinned_and_keeps_its_beginning() {
        let mut histories = Histories::default();
        (1..=5_000).for_each(|step| histories.hear(JobId(1), step, &progress(step)));
        let steps = steps(&histories);
        assert!(steps.len() <= POINTS_MAX && steps.len() > POINTS_MAX / 4, "{}", steps.len());
        assert_eq!(steps[0], 1);
        assert!(steps.is_sorted() && steps.last() > Some(&4_900));
    }

    #[test]
    fn steps_that_were_lost_are_not_in_the_curve_twice() {
        let mut histories = Histories::default();
        (1..=9).for_each(|step| histories.hear(JobId(1), step, &progress(step)));
        histories.hear(JobId(1), 10, &progress(4));
        assert_eq!(steps(&histories), [1, 2, 3, 4]);
    }

    #[test]
    fn who_has_seen_a_curve_gets_what_came_after() {
        let mut histories = Histories::default();
        (1..=9).for_each(|step| histories.hear(JobId(1), 100 + step, &progress(step)));
        let steps = |histories: &Histories, after_ms| -> Vec<u64> {
            histories.after(JobId(1), after_ms).iter().map(|point| point.step.0).collect()
        };
        assert_eq!((steps(&histories, 0).len(), steps(&histories, 107)), (9, vec![8, 9]));
        assert!(steps(&histories, 109).is_empty() && histories.after(JobId(2), 0).is_empty());
        // Steps that are done again are told again.
        histories.hear(JobId(1), 110, &progress(4));
        assert_eq!(steps(&histories, 109), [4]);
    }

    #[test]
    fn oldest_jobs_make_room() {
        let mut histories = Histories::default();
        (0..=JOBS_MAX as u64).for_each(|job| histories.hear(JobId(job), 1, &progress(1)));
        assert!(histories.of(JobId(0)).is_empty() && !histories.of(JobId(1)).is_empty());
    }
}
