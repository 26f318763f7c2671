//! Makes a run that fails small: takes out clients, jobs, machines, faults and rates, then writes down every choice and sets those back to the
//! least that are not needed, then shortens times. A candidate counts when the same invariant breaks, and, of a planted bug, when the run is
//! sound without it. Owns the order of the passes; a run takes milliseconds, so it tries thousands.

use std::collections::BTreeSet;

use super::plan::Plan;
use super::planted::Planted;
use super::random::{Choices, Moment, Source};
use super::run::{Outcome, Setting, Violation, run};
use super::trace::{Trace, size};
use super::world::Ms;

/// Of one shrinking; what is left then is small enough or never will be.
pub const RUNS_MAX: usize = 20_000;
/// A plan that is to show the same is tried with so many draws: what takes a coincidence is not lost with the first event that shifts it.
const DRAWS: u64 = 4;
/// Passes over everything.
const ROUNDS_MAX: usize = 6;

struct Shrinker {
    best: Setting,
    breaks: String,
    at_ms: Ms,
    runs: usize,
    runs_max: usize,
}

/// A small trace of what a failing run has shown, and how many runs it took.
pub fn shrink(setting: &Setting, violation: &Violation, runs_max: usize) -> (Trace, usize) {
    let best = Setting { story: 0, ..setting.clone() };
    let mut shrinker = Shrinker { best, breaks: violation.name(), at_ms: violation.at_ms, runs: 0, runs_max };
    shrinker.cut_short();
    shrinker.take_out();
    shrinker.write_down();
    shrinker.drop_choices();
    for _ in 0..ROUNDS_MAX {
        let before = shrinker.size();
        shrinker.cut_short();
        shrinker.take_out();
        shrinker.simplify();
        shrinker.hurry();
        shrinker.drop_choices();
        if shrinker.size() == before {
            break;
        }
    }
    shrinker.lower_choices();
    let (choices, runs) = (shrinker.choices(), shrinker.runs);
    (Trace { planted: setting.planted, breaks: shrinker.breaks, plan: shrinker.best.plan, choices }, runs)
}

impl Shrinker {
    fn size(&self) -> usize {
        size(&self.best.plan, &self.choices())
    }

    fn choices(&self) -> Choices {
        match &self.best.source {
            Source::Written(choices) => choices.clone(),
            Source::Seed(_) => run(&self.best).drawn,
        }
    }

    /// Takes the candidate if it shows the same; while choices are still drawn, also with other draws.
    fn accepts(&mut self, candidate: Setting) -> bool {
        if candidate == self.best {
            return false;
        }
        match candidate.source {
            Source::Written(_) => self.takes(candidate),
            Source::Seed(seed) => (0..DRAWS).any(|draw| {
                let source = Source::Seed(seed ^ draw << 32);
                self.takes(Setting { source, ..candidate.clone() })
            }),
        }
    }

    fn takes(&mut self, candidate: Setting) -> bool {
        if self.runs >= self.runs_max {
            return false;
        }
        self.runs += 1;
        let same = |outcome: Outcome| outcome.violation.filter(|violation| violation.name() == self.breaks);
        let Some(violation) = same(run(&candidate)) else { return false };
        if candidate.planted != Planted::Nothing {
            self.runs += 1;
            if run(&candidate.clone().planted(Planted::Nothing)).violation.is_some() {
                return false;
            }
        }
        (self.best, self.at_ms) = (candidate, violation.at_ms);
        true
    }

    fn tries(&mut self, change: impl FnOnce(&mut Plan)) -> bool {
        let mut candidate = self.best.clone();
        change(&mut candidate.plan);
        self.accepts(candidate)
    }

    /// Nothing after the violation, and the calm as early as can be.
    fn cut_short(&mut self) {
        let end = self.at_ms;
        self.tries(|plan| {
            plan.asks.retain(|ask| ask.at <= end);
            plan.faults.retain(|fault| fault.at <= end);
        });
        self.tries(|plan| plan.chaos_ms = plan.chaos_ms.min(end + 1));
        let last = |plan: &Plan| plan.asks.last().map(|ask| ask.at).max(plan.faults.last().map(|fault| fault.at));
        self.tries(|plan| plan.chaos_ms = plan.chaos_ms.min(last(plan).unwrap_or(0) + 1));
        while self.tries(|plan| plan.chaos_ms -= plan.chaos_ms / 4) {}
    }

    fn take_out(&mut self) {
        let clients: BTreeSet<usize> = self.best.plan.asks.iter().map(|ask| ask.client).collect();
        for client in clients {
            self.tries(|plan| plan.asks.retain(|ask| ask.client != client));
        }
        let jobs: BTreeSet<_> = self.best.plan.asks.iter().map(|ask| ask.ask.job(ask.client)).collect();
        for job in jobs {
            self.tries(|plan| plan.asks.retain(|ask| ask.ask.job(ask.client) != job));
        }
        self.remove(|plan| &mut plan.asks);
        for machine in (0..self.best.plan.machines.len()).rev() {
            self.tries(|plan| drop_machine(plan, machine));
        }
        let kinds: BTreeSet<String> = self.best.plan.faults.iter().map(|fault| fault.fault.kind()).collect();
        for kind in kinds {
            self.tries(|plan| plan.faults.retain(|fault| fault.fault.kind() != kind));
        }
        self.remove(|plan| &mut plan.faults);
        for rate in 0..self.best.plan.rates.all().len() {
            self.tries(|plan| *plan.rates.all()[rate] = 0.0);
        }
    }

    /// Pieces of a list go, big ones first.
    fn remove<T: PartialEq>(&mut self, list: fn(&mut Plan) -> &mut Vec<T>) {
        let mut piece = list(&mut self.best.plan).len();
        while piece > 0 {
            let mut at = 0;
            while at < list(&mut self.best.plan).len() {
                let gone = self.tries(|plan| {
                    let list = list(plan);
                    list.drain(at..(at + piece).min(list.len()));
                });
                at += if gone { 0 } else { piece };
            }
            piece /= 2;
        }
    }

    fn simplify(&mut self) {
        for at in 0..self.best.plan.asks.len() {
            for change in super::specs::SIMPLER {
                self.tries(|plan| plan.asks[at].ask.spec().into_iter().for_each(change));
            }
        }
        for at in 0..self.best.plan.machines.len() {
            self.tries(|plan| plan.machines[at].rate = 1.0);
            self.tries(|plan| plan.machines[at].gpus = 0);
            self.tries(|plan| plan.machines[at].zone = "a".to_owned());
        }
        for rate in 0..self.best.plan.rates.all().len() {
            // What is written down happens; how likely it was means nothing any more.
            self.tries(|plan| plan.rates.all()[rate..=rate].iter_mut().for_each(|rate| **rate = rate.ceil()));
        }
        self.tries(|plan| plan.snapshot_every = 600);
        self.tries(|plan| plan.failover_grace_ms = 10_000);
        for at in 0..self.best.plan.faults.len() {
            while self.tries(|plan| plan.faults[at].fault.lasts().into_iter().for_each(|lasts| *lasts -= *lasts / 2)) {}
        }
    }

    /// Everything from an event on comes earlier.
    fn hurry(&mut self) {
        let times = |plan: &Plan| -> BTreeSet<Ms> {
            plan.asks.iter().map(|ask| ask.at).chain(plan.faults.iter().map(|fault| fault.at)).collect()
        };
        for nth in 0..times(&self.best.plan).len() {
            loop {
                let times: Vec<Ms> = times(&self.best.plan).into_iter().collect();
                let Some(now) = times.get(nth).copied() else { break };
                let before = if nth == 0 { 0 } else { times[nth - 1] };
                let sooner = (now - before) / 2;
                let mut candidate = self.best.clone();
                let plan = &mut candidate.plan;
                let asks = plan.asks.iter_mut().map(|ask| &mut ask.at);
                let later = asks.chain(plan.faults.iter_mut().map(|fault| &mut fault.at)).filter(|at| **at >= now);
                later.for_each(|at| *at -= sooner);
                plan.chaos_ms -= sooner;
                if let Source::Written(choices) = &mut candidate.source {
                    hurry_choices(choices, now, sooner);
                }
                if sooner < 10 || !self.accepts(candidate) {
                    break;
                }
            }
        }
    }

    /// From here on nothing is drawn.
    fn write_down(&mut self) {
        let drawn = run(&self.best).drawn;
        let candidate = Setting { source: Source::Written(drawn.clone()), ..self.best.clone() };
        // The budget may be used up: the trace needs its choices all the same.
        if !self.accepts(candidate) {
            self.best.source = Source::Written(drawn);
        }
    }

    fn tries_choices(&mut self, change: impl FnOnce(&mut Choices)) -> bool {
        let mut choices = self.choices();
        change(&mut choices);
        choices.values_mut().for_each(|sites| sites.retain(|_, drawn| !drawn.is_empty()));
        choices.retain(|_, sites| !sites.is_empty());
        self.accepts(Setting { source: Source::Written(choices), ..self.best.clone() })
    }

    fn entries(&self) -> Vec<(String, String, Moment)> {
        let choices = self.choices();
        let sites =
            choices.iter().flat_map(|(stream, sites)| sites.iter().map(move |(site, drawn)| (stream, site, drawn)));
        sites.flat_map(|(stream, site, drawn)| drawn.keys().map(|at| (stream.clone(), site.clone(), *at))).collect()
    }

    /// Sets choices back to the least.
    fn drop_choices(&mut self) {
        self.tries_choices(Choices::clear);
        for stream in self.choices().keys() {
            self.tries_choices(|choices| drop(choices.remove(stream)));
        }
        for (stream, sites) in self.choices() {
            for site in sites.keys() {
                self.tries_choices(|choices| drop(choices.get_mut(&stream).and_then(|sites| sites.remove(site))));
            }
        }
        let mut piece = self.entries().len() / 2;
        while piece > 0 {
            let mut at = 0;
            loop {
                let entries = self.entries();
                if at >= entries.len() || self.runs >= self.runs_max {
                    break;
                }
                let gone = self.tries_choices(|choices| {
                    for (stream, site, n) in &entries[at..(at + piece).min(entries.len())] {
                        choices.get_mut(stream).and_then(|sites| sites.get_mut(site)?.remove(n));
                    }
                });
                at += if gone { 0 } else { piece };
            }
            piece /= 2;
        }
    }

    /// Those that are needed are made as small as they may be. One that only takes time goes if all that is written comes earlier by it.
    fn lower_choices(&mut self) {
        for (stream, site, n) in self.entries() {
            self.tries_choices(|choices| {
                let gone = choices.get_mut(&stream).and_then(|sites| sites.get_mut(&site)?.remove(&n));
                let sooner = gone.unwrap_or(0).min(n.0);
                hurry_choices(choices, n.0 + sooner, sooner);
            });
            while self.tries_choices(|choices| {
                let drawn = choices.get_mut(&stream).and_then(|sites| sites.get_mut(&site)?.get_mut(&n));
                drawn.into_iter().for_each(|drawn| *drawn -= *drawn / 2);
            }) {}
        }
    }
}

fn hurry_choices(choices: &mut Choices, from: Ms, sooner: Ms) {
    for drawn in choices.values_mut().flat_map(|sites| sites.values_mut()) {
        let later = drawn.split_off(&(from, 0));
        drawn.retain(|(ms, _), _| *ms <= from - sooner);
        drawn.extend(later.into_iter().map(|((ms, nth), value)| ((ms - sooner, nth), value)));
    }
}

fn drop_machine(plan: &mut Plan, machine: usize) {
    plan.machines.remove(machine);
    plan.faults.retain_mut(|fault| fault.fault.node().is_none_or(|node| *node != machine));
    plan.asks.retain_mut(|ask| ask.ask.machine().is_none_or(|at| *at != machine));
    for at in plan.asks.iter_mut().filter_map(|ask| ask.ask.machine()) {
        *at -= usize::from(*at > machine);
    }
    for node in plan.faults.iter_mut().filter_map(|fault| fault.fault.node()) {
        *node -= usize::from(*node > machine);
    }
}
