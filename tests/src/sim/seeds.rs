//! Many seeds on all threads, and what is written of one that fails. Owns the loop and the report; knows no test.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::coverage::Coverage;
use super::planted::Planted;
use super::random::Source;
use super::run::{Outcome, Setting, Violation, run};
use super::shrink::{RUNS_MAX, shrink};

/// Between two words of a long run.
const WORDS_EVERY: Duration = Duration::from_secs(10);

/// Many seeds.
#[derive(Clone, Debug)]
pub struct Sweep {
    pub seeds: Range<u64>,
    pub threads: usize,
    /// One seed of so many is run twice and must repeat.
    pub repeat_every: u64,
    pub until: Option<Instant>,
}

/// What they came to.
#[derive(Clone, Default, Debug)]
pub struct Tally {
    pub runs: u64,
    pub events: u64,
    pub simulated_ms: u64,
    pub jobs: u64,
    pub starts: u64,
    pub ranks: u64,
    /// By seed.
    pub failed: BTreeMap<u64, Violation>,
    /// Seeds of which two runs differ.
    pub unequal: Vec<u64>,
    pub coverage: Coverage,
}

impl Sweep {
    /// Runs them; `progress` is called every few seconds.
    pub fn run(&self, progress: impl Fn(&Tally) + Sync) -> Tally {
        let (tally, told) = (Mutex::new(Tally::default()), Mutex::new(Instant::now()));
        over(self.seeds.clone(), self.threads, |seed| -> Option<()> {
            if self.until.is_some_and(|until| Instant::now() >= until) {
                return None;
            }
            let outcome = run(&Setting::of_seed(seed));
            let again = seed.is_multiple_of(self.repeat_every).then(|| run(&Setting::of_seed(seed)).hash);
            let mut tally = locked(&tally);
            if again.is_some_and(|again| again != outcome.hash) {
                tally.unequal.push(seed);
            }
            tally.add(seed, outcome);
            let mut told = locked(&told);
            if told.elapsed() >= WORDS_EVERY {
                *told = Instant::now();
                progress(&tally);
            }
            Some(())
        });
        tally.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tally {
    fn add(&mut self, seed: u64, outcome: Outcome) {
        self.runs += 1;
        self.events += outcome.events;
        self.simulated_ms += outcome.simulated_ms;
        self.jobs += outcome.jobs as u64;
        self.starts += outcome.replays;
        self.ranks += outcome.spawned;
        self.coverage.add(&outcome.coverage);
        if let Some(violation) = outcome.violation {
            // A long run may be cut off before it reports.
            eprintln!("seed {seed}: {violation:?}");
            self.failed.insert(seed, violation);
        }
    }

    pub fn words(&self) -> String {
        let Self { runs, events, jobs, starts, ranks, .. } = self;
        let hours = self.simulated_ms / 3_600_000;
        let failed = self.failed.len();
        format!(
            "{runs} seeds, {failed} fail: {events} events in {hours} simulated hours, {jobs} jobs, {ranks} ranks, {starts} starts of a coordinator"
        )
    }
}

/// Nobody who holds it panics: runs catch their own panics.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs seeds on so many threads, until there are no more or `each` gives nothing; gives what it made of each, in no order.
pub fn over<T: Send>(seeds: Range<u64>, threads: usize, each: impl Fn(u64) -> Option<T> + Sync) -> Vec<T> {
    let next = AtomicU64::new(seeds.start);
    let made = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let Some(one) = each(seed) else { return };
                    locked(&made).push(one);
                }
            });
        }
    });
    made.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// What to read after a run has failed: what does not hold, its shrunk trace, which is written to the folder, and how to see it again.
pub fn report(setting: &Setting, folder: &Path) -> String {
    let outcome = run(setting);
    let Some(violation) = outcome.violation else { return "every invariant holds".to_owned() };
    let (trace, runs) = shrink(setting, &violation, RUNS_MAX);
    let seed = match setting.source {
        Source::Seed(seed) => format!("seed-{seed}"),
        Source::Written(_) => "trace".to_owned(),
    };
    let planted = setting.planted != Planted::Nothing;
    let name = if planted { format!("{}-{seed}", setting.planted.name()) } else { seed };
    let shown = run(&trace.setting()).violation.map(|violation| violation.what).unwrap_or_default();
    let words = format!("{name}, shrunk in {runs} runs: {shown}");
    let text = trace.write(&words);
    let file = folder.join(format!("{name}.toml"));
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&file, &text));
    let written = written.map_or_else(
        |error| format!("write {}: {error}", file.display()),
        |()| {
            let again = "cargo test --release -p stoke-cli -p stoke-tests --test simulation one_run -- --nocapture";
            format!("see it again: TRACE={} {again}", file.display())
        },
    );
    format!(
        "{text}\n{written}\nWhen it is mended, the trace belongs into tests/src/sim/traces: each test run runs it again."
    )
}
