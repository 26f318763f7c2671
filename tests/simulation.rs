//! Runs of the simulator: a thousand seeds that must show no violation, each twice with equal hashes, and planted bugs that must be found.
//! `SEED=7 cargo test --release -p stoke-cli -p stoke-tests --test simulation one_seed -- --nocapture` tells one run as it goes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use stoke_tests::sim::{Outcome, Planted, Setting, run};

/// Seeds of every run of the test suite.
const SEEDS: u64 = 1_000;
/// A planted bug must be found within so many.
const SEEDS_PLANTED_MAX: u64 = 2_000;
const THREADS: usize = 2;
/// Lines of the trace that a failure shows.
const TRACE_LINES: usize = 80;

fn plain(seed: u64) -> Setting {
    Setting { seed, planted: Planted::Nothing, trace: 0 }
}

/// What to read after a failure: the invariant, and what happened last.
fn story(setting: Setting) -> String {
    let outcome = run(Setting { trace: TRACE_LINES, ..setting });
    let seed = setting.seed;
    format!(
        "seed {seed} ({:?}): {:?}\n  {}\nagain: SEED={seed} cargo test --release -p stoke-cli -p stoke-tests --test simulation one_seed -- --nocapture",
        setting.planted,
        outcome.violation,
        outcome.trace.join("\n  ")
    )
}

/// Runs seeds on all threads until `stop` says so; gives what it made of each, in no order.
fn over<T: Send>(seeds: u64, each: impl Fn(u64) -> Option<T> + Sync) -> Vec<T> {
    let next = AtomicU64::new(0);
    let made = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    if let Some(one) = each(seed) {
                        made.lock().unwrap_or_else(PoisonError::into_inner).push(one);
                    }
                }
            });
        }
    });
    made.into_inner().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn a_thousand_seeds_hold_every_invariant_and_repeat_bit_for_bit() {
    let seeds = std::env::var("SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(SEEDS);
    let outcomes: Vec<(u64, Outcome, u64)> = over(seeds, |seed| {
        let (first, second) = (run(plain(seed)), run(plain(seed)));
        Some((seed, first, second.hash))
    });
    let mut sums = (0, 0, 0, 0);
    let mut failed = Vec::new();
    for (seed, outcome, again) in &outcomes {
        assert_eq!(outcome.hash, *again, "seed {seed} does not repeat");
        sums.0 += outcome.events;
        sums.1 += outcome.jobs;
        sums.2 += outcome.replays;
        sums.3 += outcome.spawned;
        if let Some(violation) = &outcome.violation {
            println!("seed {seed}: {violation:?}");
            failed.push(*seed);
        }
    }
    println!("{seeds} seeds: {} events, {} jobs, {} starts of a coordinator, {} ranks", sums.0, sums.1, sums.2, sums.3);
    failed.sort_unstable();
    if let Some(first) = failed.first() {
        panic!("{} seeds fail: {failed:?}\n{}", failed.len(), story(plain(*first)));
    }
}

#[test]
fn every_planted_bug_is_found() {
    let found: Vec<(Planted, Option<(u64, Outcome)>)> = {
        let planted = Planted::all();
        over(planted.len() as u64, |at| {
            let planted = planted[at as usize];
            let violated =
                |seed| Some((seed, run(Setting { planted, ..plain(seed) }))).filter(|(_, o)| o.violation.is_some());
            Some((planted, (0..SEEDS_PLANTED_MAX).find_map(violated)))
        })
    };
    let mut missed = Vec::new();
    for (planted, found) in &found {
        match found {
            Some((seed, outcome)) => println!("{planted:?}: after {} seeds, {:?}", seed + 1, outcome.violation),
            None => missed.push(*planted),
        }
    }
    assert!(missed.is_empty(), "not found within {SEEDS_PLANTED_MAX} seeds: {missed:?}");
}

/// Of `SEED`, or of the first: told as it goes.
#[test]
fn one_seed() {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
    let outcome = run(Setting { trace: 100_000, ..plain(seed) });
    println!("{}", outcome.trace.join("\n"));
    println!("{} events, {} jobs, hash {:016x}: {:?}", outcome.events, outcome.jobs, outcome.hash, outcome.violation);
    assert_eq!(outcome.violation, None);
}
