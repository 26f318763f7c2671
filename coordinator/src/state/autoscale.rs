//! How many replicas a model is to have. A machine with memory: it sees a model about once a second, and says to grow, to shrink, or nothing. Owns the
//! windows and the rest after growth that did not come about; never submits or ends a job (`scaling.rs`), and hears nobody (`load.rs`).
//!
//! As Kubernetes' horizontal autoscaler: what is wanted is ceil(requests / requests that one replica is to have), and stays what it is within a
//! tenth of that; what is done is the least that was wanted throughout the window for growing, or the most in the one for shrinking.
//!
//! O1: replicas are at least `min`, and what is grown to is at most `max` and at most twice as many as there are.
//! O2: nothing is grown while a replica comes up: it may be what is missing. O3: heads that answer and are not heard count as idle for growing, as full
//!   for shrinking; while none answers nothing is let go.
//! O4: a window counts when it was seen whole; a coordinator that has just started sees it anew. O5: growth that finds no room, or whose replicas
//!   fail, is tried again later and later.

use std::collections::VecDeque;
use std::fmt;

use serde::{Deserialize, Serialize};
use stoke_protocol::message::client::ScaleView;
use stoke_protocol::spec::Replicas;

use super::time::Mono;

/// Of a hundred: so far may the requests be from what the replicas are to have before anything is done.
const TOLERANCE: u64 = 10;
/// A model whose target is a time lets a replica go only when its first tokens take no more than this part of a hundred of it.
const IDLE: u64 = 50;
/// Before growth that did not come about is tried again; doubled each time, up to this where there was no room: to look costs little, and a node may
/// join; and to this where replicas failed, each of which is a job that is remembered.
const AGAIN_MS: u64 = 5_000;
pub const NO_ROOM_MS_MAX: u64 = 30_000;
pub const FAILED_MS_MAX: u64 = 300_000;

/// As the spec of a model's newest job says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Policy {
    pub min: u32,
    pub max: u32,
    pub requests: u32,
    pub first_token_ms: Option<u64>,
    pub grow_after_ms: u64,
    pub shrink_after_ms: u64,
}

/// A model now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// Jobs that serve it and stay, those that come up included.
    pub replicas: u32,
    pub answering: u32,
    /// Of those that answer, the ones whose head was not heard lately.
    pub unheard: u32,
    /// Requests that run or wait, at heads and at gateways, and those that gateways have just refused.
    pub requests: u64,
    /// Of 100 answers, 99 had their first token within this.
    pub first_token_ms: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    Stay,
    Grow { to: u32, why: Why },
    Shrink { to: u32, why: Why },
}

/// In numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Why {
    seen: Seen,
    policy: Policy,
}

/// The memory of one model.
#[derive(Clone, Debug, Default)]
pub struct Scaler {
    /// Since when it is seen without a gap.
    since: Option<Mono>,
    /// What was wanted from when on, oldest first, at least and at most; each differs from the one before.
    wanted: VecDeque<(Mono, u32, u32)>,
    /// Growth rests until then, and how long it rests the next time.
    rests: Option<Mono>,
    again_ms: u64,
}

impl Policy {
    pub fn of(replicas: &Replicas) -> Self {
        Self {
            min: replicas.min,
            max: replicas.max,
            requests: replicas.requests,
            first_token_ms: replicas.first_token.map(|target| target.0),
            grow_after_ms: replicas.grow_after.0,
            shrink_after_ms: replicas.shrink_after.0,
        }
    }

    pub fn view(&self) -> ScaleView {
        let Self { min, max, requests, first_token_ms, .. } = *self;
        ScaleView { min, max, requests, first_token_ms }
    }

    /// What so many requests want; within the tolerance, those that answer.
    fn wants(&self, seen: &Seen, requests: u64) -> u32 {
        let (each, answering) = (u64::from(self.requests.max(1)), u64::from(seen.answering));
        let whole = answering * each;
        let by_requests = match requests.abs_diff(whole) * 100 <= whole * TOLERANCE {
            true => answering,
            false => requests.div_ceil(each),
        };
        let by_time = match (self.first_token_ms, seen.first_token_ms.map(u64::from)) {
            (Some(target), Some(found)) if found * 100 > target * (100 + TOLERANCE) => answering + 1,
            (Some(target), Some(found)) if found * 100 > target * IDLE => answering,
            (Some(_) | None, _) => 0,
        };
        u32::try_from(by_requests.max(by_time)).unwrap_or(u32::MAX).clamp(self.min, self.max.max(self.min))
    }
}

impl Scaler {
    /// About once a second.
    pub fn look(&mut self, now: Mono, policy: &Policy, seen: &Seen) -> Verdict {
        let Seen { replicas, answering, unheard, requests, .. } = *seen;
        let full = requests + u64::from(unheard) * u64::from(policy.requests);
        let (least, most) = (policy.wants(seen, requests), policy.wants(seen, full));
        // O3.
        let most = if answering == 0 { most.max(replicas) } else { most };
        self.note(now, policy, (least, most));
        let why = Why { seen: *seen, policy: *policy };
        let wanted = match replicas < policy.min {
            true => Some(policy.min),
            false => self.window(now, policy.grow_after_ms).and_then(|wanted| wanted.map(|(least, _)| least).min()),
        };
        let (comes_up, rests) = (replicas > answering, self.rests.is_some_and(|until| now < until));
        if !rests && !comes_up && wanted.is_some_and(|to| to <= replicas) {
            self.has_grown();
        }
        if let Some(to) = wanted.filter(|to| *to > replicas && !comes_up && !rests) {
            // O1.
            return Verdict::Grow { to: to.min(replicas.saturating_mul(2)).max(1), why };
        }
        let enough = self.window(now, policy.shrink_after_ms).and_then(|wanted| wanted.map(|(_, most)| most).max());
        match enough.filter(|to| *to < replicas) {
            Some(_) if policy.first_token_ms.is_some() => {
                // One a window: nobody knows what it does to the time.
                (self.since, self.wanted) = (None, VecDeque::new());
                Verdict::Shrink { to: replicas - 1, why }
            }
            Some(to) => Verdict::Shrink { to, why },
            None => Verdict::Stay,
        }
    }

    /// Growth did not come about (O5). Gives the milliseconds until it is tried again, and whether it is the first time in a row.
    pub fn put_off(&mut self, now: Mono, most_ms: u64) -> (u64, bool) {
        let is_first = self.again_ms == 0;
        self.again_ms = (2 * self.again_ms).clamp(AGAIN_MS, most_ms);
        self.rests = Some(now.plus_ms(self.again_ms));
        (self.again_ms, is_first)
    }

    /// Growth has come about, or is wanted no more.
    pub fn has_grown(&mut self) {
        (self.rests, self.again_ms) = (None, 0);
    }

    fn note(&mut self, now: Mono, policy: &Policy, (least, most): (u32, u32)) {
        self.since.get_or_insert(now);
        if self.wanted.back().is_none_or(|(_, before, above)| (*before, *above) != (least, most)) {
            self.wanted.push_back((now, least, most));
        }
        let longest_ms = policy.grow_after_ms.max(policy.shrink_after_ms);
        // The one before the window says what was wanted at its beginning.
        while self.wanted.get(1).is_some_and(|(at, ..)| now.since_ms(*at) >= longest_ms) {
            self.wanted.pop_front();
        }
    }

    /// What was wanted within the last milliseconds. None: they were not seen whole (O4).
    fn window(&self, now: Mono, ms: u64) -> Option<impl Iterator<Item = (u32, u32)>> {
        self.since.filter(|since| now.since_ms(*since) >= ms)?;
        let first = self.wanted.iter().rposition(|(at, ..)| now.since_ms(*at) >= ms).unwrap_or(0);
        Some(self.wanted.range(first..).map(|(_, least, most)| (*least, *most)))
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seen, policy } = self;
        let Seen { replicas, answering, requests, .. } = seen;
        write!(f, "{requests} requests run or wait, {answering} of {replicas} replicas answer")?;
        if let (Some(target), Some(found)) = (policy.first_token_ms, seen.first_token_ms) {
            write!(f, ", 99 of 100 first tokens within {found} ms (target {target} ms)")?;
        }
        write!(f, "; {} for each, between {} and {}", policy.requests, policy.min, policy.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: Policy =
        Policy { min: 1, max: 4, requests: 16, first_token_ms: None, grow_after_ms: 10_000, shrink_after_ms: 60_000 };

    /// A model whose replicas answer some seconds after they were added.
    struct Model {
        policy: Policy,
        scaler: Scaler,
        second: u64,
        replicas: u32,
        answering: u32,
        takes: u64,
        /// When those that come up answer.
        due: Option<u64>,
        /// When it grew or shrank, and to how many.
        done: Vec<(u64, u32)>,
    }

    impl Model {
        fn new(policy: Policy, replicas: u32) -> Self {
            let (scaler, done) = (Scaler::default(), Vec::new());
            Self { policy, scaler, second: 0, replicas, answering: replicas, takes: 3, due: None, done }
        }

        fn look(&mut self, requests: u64, first_token_ms: Option<u32>) -> Verdict {
            let now = Mono(1_000 * self.second);
            if self.due.is_some_and(|due| due <= self.second) {
                (self.answering, self.due) = (self.replicas, None);
                self.scaler.has_grown();
            }
            let (replicas, answering) = (self.replicas, self.answering);
            let verdict = self.scaler.look(
                now,
                &self.policy,
                &Seen { replicas, answering, unheard: 0, requests, first_token_ms },
            );
            self.second += 1;
            verdict
        }

        fn follow(&mut self, verdict: Verdict) {
            let at = self.second - 1;
            match verdict {
                Verdict::Stay => return,
                Verdict::Grow { to, .. } => (self.replicas, self.due) = (to, Some(at + self.takes)),
                Verdict::Shrink { to, .. } => (self.replicas, self.answering) = (to, self.answering.min(to)),
            }
            self.done.push((at, self.replicas));
        }

        /// So many seconds with these requests.
        fn run(&mut self, seconds: u64, requests: impl Fn(u64) -> u64) -> &mut Self {
            for _ in 0..seconds {
                let verdict = self.look(requests(self.second), None);
                self.follow(verdict);
            }
            self
        }
    }

    #[test]
    fn a_step_up_grows_after_its_window_and_at_most_doubles() {
        let mut model = Model::new(POLICY, 1);
        model.run(20, |_| 4).run(40, |_| 60);
        // A second of more makes no replica more; the second step waits for the first one's replica.
        assert_eq!(model.done, [(30, 2), (33, 4)]);
        let mut model = Model::new(Policy { max: 3, ..POLICY }, 1);
        assert_eq!(model.run(60, |_| 1_000).done, [(10, 2), (13, 3)], "O1");
        let mut model = Model::new(POLICY, 1);
        assert_eq!(model.run(120, |second| if second % 20 < 9 { 60 } else { 4 }).done, [], "peaks of nine seconds");
    }

    #[test]
    fn a_step_down_shrinks_after_its_window_and_never_below_the_least() {
        let mut model = Model::new(POLICY, 4);
        model.run(70, |_| 60).run(100, |_| 20);
        assert_eq!(model.done, [(130, 2)]);
        let mut model = Model::new(Policy { min: 2, ..POLICY }, 4);
        assert_eq!(model.run(200, |_| 0).done, [(60, 2)], "O1, O4");
        // A peak of a second within each minute keeps what it needs.
        let mut model = Model::new(POLICY, 4);
        assert_eq!(model.run(600, |second| if second % 50 == 0 { 64 } else { 4 }).done, []);
    }

    #[test]
    fn noise_around_a_bound_changes_nothing() {
        for (replicas, around) in [(1u32, 16), (2, 32), (3, 48), (4, 48)] {
            let mut model = Model::new(POLICY, replicas);
            let noise = [0, 1, -1, 2, 0, -1, 1];
            let requests = |second: u64| u64::try_from(around + noise[second as usize % 7]).unwrap();
            let shrinks = model.run(600, requests).done.clone();
            assert_eq!(shrinks, [], "{replicas} replicas with about {around}");
        }
    }

    #[test]
    fn fewer_than_the_least_grow_at_once_and_one_after_the_other() {
        let mut model = Model::new(Policy { min: 3, ..POLICY }, 1);
        assert_eq!(model.run(30, |_| 0).done, [(0, 2), (3, 3)], "O2");
    }

    #[test]
    fn growth_without_room_is_tried_again_later_and_later() {
        let mut model = Model::new(POLICY, 1);
        let mut tried = Vec::new();
        for _ in 0..400 {
            if let Verdict::Grow { to: 2, .. } = model.look(60, None) {
                tried.push((model.second - 1, model.scaler.put_off(Mono(1_000 * (model.second - 1)), FAILED_MS_MAX)));
            }
        }
        let seconds: Vec<u64> = tried.iter().map(|(second, _)| *second).collect();
        assert_eq!(seconds, [10, 15, 25, 45, 85, 165, 325]);
        assert_eq!((tried[0].1, tried[1].1), ((5_000, true), (10_000, false)), "O5");
        model.scaler.has_grown();
        assert!(matches!(model.look(60, None), Verdict::Grow { .. }));
        assert_eq!(model.scaler.put_off(Mono(0), NO_ROOM_MS_MAX), (5_000, true));
    }

    #[test]
    fn a_replica_that_dies_counts_as_one_that_comes_up() {
        let mut model = Model::new(POLICY, 2);
        model.run(20, |_| 30);
        // It is being replaced: the other one has all of it, and no third one is asked for meanwhile.
        model.answering = 1;
        model.run(30, |_| 60);
        assert_eq!(model.done, [], "O2");
        // It is gone for good.
        model.replicas = 1;
        model.run(1, |_| 60);
        assert_eq!(model.done, [(50, 2)], "the window was seen before");
        (model.answering, model.due) = (0, None);
        assert!((0..100).all(|_| model.look(0, None) == Verdict::Stay), "O3");
    }

    #[test]
    fn heads_that_are_not_heard_are_idle_for_growing_and_full_for_shrinking() {
        let mut scaler = Scaler::default();
        let seen = Seen { replicas: 3, answering: 3, unheard: 2, requests: 10, first_token_ms: None };
        for second in 0..100 {
            assert_eq!(scaler.look(Mono(1_000 * second), &POLICY, &seen), Verdict::Stay, "O3: at {second}");
        }
        let heard = Seen { unheard: 0, ..seen };
        let done = (100..200).map(|second| scaler.look(Mono(1_000 * second), &POLICY, &heard));
        let first = done.zip(100..).find(|(verdict, _)| *verdict != Verdict::Stay);
        assert!(matches!(first, Some((Verdict::Shrink { to: 1, .. }, 160))), "{first:?}");
    }

    #[test]
    fn first_tokens_that_come_too_late_grow_one_after_the_other() {
        let policy = Policy { first_token_ms: Some(2_000), ..POLICY };
        let mut model = Model::new(policy, 1);
        for _ in 0..60 {
            // Fast enough with three.
            let found = [2_500, 2_300, 1_500][model.answering as usize - 1];
            let verdict = model.look(8, Some(found));
            model.follow(verdict);
        }
        assert_eq!(model.done, [(10, 2), (23, 3)]);
        for _ in 0..200 {
            let verdict = model.look(8, Some(400));
            model.follow(verdict);
        }
        assert_eq!(model.done[2..], [(120, 2), (181, 1)]);
    }

    #[test]
    fn a_verdict_says_its_numbers() {
        let seen = Seen { replicas: 1, answering: 1, unheard: 0, requests: 41, first_token_ms: Some(2_400) };
        let policy = Policy { first_token_ms: Some(2_000), ..POLICY };
        assert_eq!(
            Why { seen, policy }.to_string(),
            "41 requests run or wait, 1 of 1 replicas answer, 99 of 100 first tokens within 2400 ms (target 2000 ms); 16 for each, \
             between 1 and 4"
        );
    }
}
