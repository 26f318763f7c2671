//! What a job went through while faults struck: its timeline and its steps as they were seen. Adds up losses; pure, and asks nobody.
//!
//! A generation that ends and the one that goes on are lines of the job's timeline (`g2 ended: ...`, `g3 goes on at step-88`), exact to the
//! millisecond. Steps are reported twice a second: a job that stands still without a change of generation (a paused rank) is seen by that.

use std::collections::BTreeMap;

use stoke_protocol::ledger::Ledger;
use stoke_protocol::message::client::{Explanation, JobState, JobView};

/// Reports of steps come every half second; later than this by so much, the job stood still.
const STANDSTILL_MS: u64 = 1_000;

#[derive(Debug)]
pub struct Course {
    /// Following began here, in milliseconds since the Unix epoch.
    since_ms: u64,
    /// Before it did.
    recoveries_before: u32,
    view: JobView,
    steps: Vec<Steps>,
    /// Lines of the timeline by journal index: it keeps a bounded number, so they are collected while they are there.
    lines: BTreeMap<u64, Vec<(u64, String)>>,
}

/// A report of steps.
#[derive(Clone, Copy, Debug)]
struct Steps {
    at_ms: u64,
    step: u64,
    /// Milliseconds of one.
    each_ms: f64,
}

/// A generation that ended by a loss, and how the job went on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recovery {
    pub generation: String,
    pub reason: String,
    pub ended_ms: u64,
    /// The survivors went on; otherwise all ranks were started again.
    pub survived: bool,
    pub resumed: Option<Resumed>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resumed {
    pub generation: String,
    pub at_ms: u64,
    /// Steps that were done.
    pub step: u64,
}

/// The account of one job.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Losses {
    pub state: Option<JobState>,
    pub reason: String,
    pub recoveries: u32,
    pub found: Vec<Recovery>,
    /// Under way when ranks were lost, and begun again.
    pub steps_redone: u64,
    /// Committed, and done again from a checkpoint.
    pub steps_lost: u64,
    /// Of a job that has succeeded: those of its steps, less those in its ledger.
    pub samples_lost: Option<u64>,
    pub ledger: Option<Ledger>,
    /// From the first step to the last.
    pub training_ms: u64,
    pub standstill_ms: u64,
    /// Samples in steps that were committed meanwhile.
    pub samples: u64,
}

enum Line {
    Ended { generation: String, reason: String, survived: bool },
    GoesOn { generation: String, step: u64 },
    Other,
}

impl Course {
    pub fn new(now_ms: u64, seen: &Explanation) -> Self {
        let mut course = Self {
            since_ms: now_ms,
            recoveries_before: seen.job.recoveries,
            view: (*seen.job).clone(),
            steps: Vec::new(),
            lines: BTreeMap::new(),
        };
        course.see(now_ms, seen);
        course
    }

    pub fn see(&mut self, now_ms: u64, seen: &Explanation) {
        self.view = (*seen.job).clone();
        for event in seen.events.iter().filter(|event| event.at_ms >= self.since_ms) {
            let lines = self.lines.entry(event.index.0).or_default();
            if !lines.iter().any(|(_, text)| *text == event.text) {
                lines.push((event.at_ms, event.text.clone()));
            }
        }
        let Some(progress) = &self.view.progress else { return };
        if self.steps.last().is_none_or(|last| last.step != progress.step.0) {
            let each_ms = f64::from(progress.compute_ms + progress.exchange_ms + progress.apply_ms);
            self.steps.push(Steps { at_ms: now_ms, step: progress.step.0, each_ms });
        }
    }

    pub fn is_over(&self) -> bool {
        self.view.state.is_terminal()
    }

    /// Every generation that ended is followed by one that went on.
    pub fn is_calm(&self) -> bool {
        self.is_over() || self.recoveries().iter().all(|recovery| recovery.resumed.is_some())
    }

    pub fn newest_checkpoint(&self) -> Option<(u64, &str)> {
        self.view.checkpoint.as_ref().map(|checkpoint| (checkpoint.committed_ms, checkpoint.uri.as_str()))
    }

    /// `struck_ms` are the moments at which ranks were struck, in order.
    pub fn losses(&self, now_ms: u64, struck_ms: &[u64]) -> Losses {
        let found = self.recoveries();
        let (begin_ms, first_step) = self.begin(now_ms);
        let end_ms = self.view.ended_ms.unwrap_or(now_ms).max(begin_ms);
        let outcome = self.view.outcome.as_ref();
        let progress = self.view.progress.as_ref();
        let step = outcome.map(|outcome| outcome.step.0).max(progress.map(|progress| progress.step.0)).unwrap_or(0);
        let batch = progress.map_or(0, |progress| progress.samples / progress.step.0.max(1));
        let elastic = found.iter().filter(|recovery| recovery.survived).filter_map(|recovery| recovery.resumed.clone());
        let mut redone: Vec<u64> = elastic.map(|resumed| resumed.at_ms).collect();
        redone.dedup();
        let mut still: Vec<(u64, u64)> = self.late_reports();
        still.extend(found.iter().map(|recovery| standstill(recovery, struck_ms, end_ms)));
        Losses {
            state: Some(self.view.state),
            reason: self.view.reason.clone(),
            recoveries: self.view.recoveries - self.recoveries_before.min(self.view.recoveries),
            steps_redone: redone.len() as u64,
            steps_lost: self.steps_lost(),
            samples_lost: outcome.map(|outcome| outcome.samples.saturating_sub(outcome.ledger.end)),
            ledger: outcome.map(|outcome| outcome.ledger),
            training_ms: end_ms - begin_ms,
            standstill_ms: covered(still, begin_ms, end_ms),
            samples: step.saturating_sub(first_step) * batch,
            found,
        }
    }

    /// When the first step began, and how many were done before.
    fn begin(&self, now_ms: u64) -> (u64, u64) {
        let resumed = self.parsed().find_map(|(at_ms, line)| match line {
            Line::GoesOn { step, .. } => Some((at_ms, step)),
            Line::Ended { .. } | Line::Other => None,
        });
        let reported = self.steps.first().map(|first| (first.at_ms, first.step));
        // A job that trained already when following began has reported steps before its next generation.
        [resumed, reported].into_iter().flatten().min().unwrap_or((now_ms, 0))
    }

    fn recoveries(&self) -> Vec<Recovery> {
        let mut found: Vec<Recovery> = Vec::new();
        for (at_ms, line) in self.parsed() {
            match line {
                Line::Ended { generation, reason, survived } => {
                    found.push(Recovery { generation, reason, ended_ms: at_ms, survived, resumed: None });
                }
                Line::GoesOn { generation, step } => {
                    for recovery in found.iter_mut().filter(|recovery| recovery.resumed.is_none()) {
                        recovery.resumed = Some(Resumed { generation: generation.clone(), at_ms, step });
                    }
                }
                Line::Other => {}
            }
        }
        found
    }

    /// Steps that were committed by one generation and done again by the next, as far as reports told of them.
    fn steps_lost(&self) -> u64 {
        let (mut lost, mut since, mut done) = (0, 0, 0);
        for (at_ms, line) in self.parsed() {
            let Line::GoesOn { step, .. } = line else { continue };
            let meanwhile = self.steps.iter().filter(|steps| (since..at_ms).contains(&steps.at_ms));
            let reached = meanwhile.map(|steps| steps.step).max().max(Some(done)).unwrap_or(0);
            lost += reached.saturating_sub(step);
            (since, done) = (at_ms, step);
        }
        lost
    }

    /// Times without a report of steps that the steps themselves do not explain.
    fn late_reports(&self) -> Vec<(u64, u64)> {
        let stood = |pair: &[Steps]| {
            let (before, after) = (pair[0], pair[1]);
            let steps_ms = after.step.saturating_sub(before.step) as f64 * before.each_ms;
            let still_ms = (after.at_ms - before.at_ms).saturating_sub(steps_ms as u64);
            (still_ms > STANDSTILL_MS).then(|| (after.at_ms - still_ms, after.at_ms))
        };
        self.steps.windows(2).filter_map(stood).collect()
    }

    fn parsed(&self) -> impl Iterator<Item = (u64, Line)> {
        self.lines.values().flatten().map(|(at_ms, text)| (*at_ms, parse(text)))
    }
}

/// From the blow that caused it, or from its end where none did, until the job went on.
fn standstill(recovery: &Recovery, struck_ms: &[u64], end_ms: u64) -> (u64, u64) {
    let struck = struck_ms.iter().rev().find(|at| **at <= recovery.ended_ms).copied();
    (struck.unwrap_or(recovery.ended_ms), recovery.resumed.as_ref().map_or(end_ms, |resumed| resumed.at_ms))
}

/// The length of a union of intervals between two moments.
fn covered(mut intervals: Vec<(u64, u64)>, begin: u64, end: u64) -> u64 {
    intervals.sort_unstable();
    let (mut sum, mut until) = (0, begin);
    for (from, to) in intervals {
        let (from, to) = (from.max(until), to.min(end));
        sum += to.saturating_sub(from);
        until = until.max(to);
    }
    sum
}

fn parse(text: &str) -> Line {
    let Some((generation, rest)) = text.split_once(' ') else { return Line::Other };
    let is_generation = generation.strip_prefix('g').is_some_and(|number| number.parse::<u32>().is_ok());
    if !is_generation {
        return Line::Other;
    }
    let generation = generation.to_owned();
    if let Some(reason) = rest.strip_prefix("ended: ") {
        let survivors = reason.strip_suffix("; the others go on");
        return Line::Ended {
            generation,
            reason: survivors.unwrap_or(reason).to_owned(),
            survived: survivors.is_some(),
        };
    }
    let step = rest.strip_prefix("goes on at step-").and_then(|step| step.parse().ok());
    step.map_or(Line::Other, |step| Line::GoesOn { generation, step })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(lines: &[(u64, &str)], step: u64) -> Explanation {
        use stoke_protocol::ids::{Generation, JobId, LogIndex, Step};
        use stoke_protocol::message::client::TimelineEvent;
        use stoke_protocol::message::rank::Progress;
        let events = lines.iter().map(|(at_ms, text)| TimelineEvent {
            at_ms: *at_ms,
            index: LogIndex(*at_ms),
            text: (*text).to_owned(),
        });
        let progress = Progress {
            generation: Generation(1),
            step: Step(step),
            steps: Step(100),
            loss: 0.5,
            accuracy: 0.5,
            learning_rate: 0.1,
            samples_per_second: 100.0,
            compute_ms: 5.0,
            exchange_ms: 4.0,
            apply_ms: 1.0,
            samples: step * 8,
            skipped: 0,
            lanes: 2,
            rl: None,
        };
        let job = JobView {
            job: JobId(1),
            name: "x".into(),
            trainer: "digits".into(),
            serves: None,
            traffic: None,
            exec: None,
            owner: "admin".into(),
            state: JobState::Running,
            reason: String::new(),
            priority: 0,
            generation: Generation(1),
            failures: 0,
            recoveries: lines.iter().filter(|(_, text)| text.contains(" ended: ")).count() as u32,
            preemptions: 0,
            world_sizes: vec![2].into(),
            placement: Vec::new().into(),
            progress: (step > 0).then_some(progress),
            slow: Vec::new().into(),
            checkpoint: None,
            outcome: None,
            submitted_ms: 0,
            started_ms: None,
            ended_ms: None,
        };
        Explanation {
            job: Box::new(job),
            nodes: Vec::new().into(),
            events: events.collect::<Vec<_>>().into(),
            split: None,
        }
    }

    #[test]
    fn a_lost_rank_costs_the_step_that_was_under_way() {
        let lines = [(1_000, "g1 goes on at step-0"), (1_600, "g1 ended: rank-1 on n2 was killed; the others go on")];
        let mut course = Course::new(0, &seen(&[], 0));
        course.see(1_500, &seen(&lines[..1], 40));
        assert!(course.is_calm());
        course.see(1_650, &seen(&lines, 40));
        assert!(!course.is_calm());
        let lines = [&lines[..], &[(1_700, "g2 goes on at step-45"), (1_900, "g3 goes on at step-60")]].concat();
        course.see(2_000, &seen(&lines, 70));
        let losses = course.losses(3_000, &[1_550]);
        assert_eq!((losses.recoveries, losses.steps_redone, losses.steps_lost), (1, 1, 0));
        assert_eq!((losses.training_ms, losses.standstill_ms, losses.samples), (2_000, 150, 560));
        let resumed = losses.found[0].resumed.as_ref().unwrap();
        assert_eq!((resumed.generation.as_str(), resumed.at_ms, resumed.step), ("g2", 1_700, 45));
        assert_eq!(losses.found[0].reason, "rank-1 on n2 was killed");
        assert!(losses.found[0].survived);
    }

    #[test]
    fn a_run_that_begins_again_from_a_checkpoint_loses_committed_steps() {
        let lines = [
            (1_000, "g1 goes on at step-0"),
            (2_000, "g1 ended: rank-0 on n1 was killed"),
            (2_005, "g2 ended: rank-1 on n2 was killed"),
            (2_010, "queued again, attempt 2 of 3"),
            (2_500, "g3 goes on at step-30"),
        ];
        let mut course = Course::new(0, &seen(&[], 0));
        course.see(1_900, &seen(&lines[..1], 42));
        course.see(2_600, &seen(&lines, 42));
        let losses = course.losses(2_600, &[]);
        assert_eq!((losses.steps_redone, losses.steps_lost, losses.standstill_ms), (0, 12, 500));
        assert!(!losses.found[0].survived);
        // What was lost once is not lost again by the next recovery.
        let more = [(2_800, "g3 ended: rank-0 on n1 was killed; the others go on"), (2_850, "g4 goes on at step-35")];
        course.see(2_900, &seen(&[&lines[..], &more].concat(), 36));
        assert_eq!(course.losses(3_000, &[]).steps_lost, 12);
    }

    #[test]
    fn a_job_that_stands_still_without_a_loss_is_seen_by_its_reports() {
        let lines = [(1_000, "g1 goes on at step-0")];
        let mut course = Course::new(0, &seen(&[], 0));
        // 10 ms a step: 500 ms of steps, then 20 steps in 2.7 s, then 300 steps in 3 s without a report between.
        for (at_ms, step) in [(1_500, 50), (4_200, 70), (7_200, 370)] {
            course.see(at_ms, &seen(&lines, step));
        }
        assert_eq!(course.losses(7_200, &[]).standstill_ms, 2_500);
    }

    #[test]
    fn moments_that_overlap_count_once() {
        assert_eq!(covered(vec![(5, 10), (8, 12), (9, 10), (20, 30)], 6, 25), 11);
        assert_eq!(covered(Vec::new(), 0, 10), 0);
    }

    #[test]
    fn other_lines_are_not_mistaken() {
        for text in ["submitted by admin", "g2 placed: rank-0 on n1", "gone ended: x", "g1 runs, its world size is 2"] {
            assert!(matches!(parse(text), Line::Other), "{text}");
        }
    }
}
