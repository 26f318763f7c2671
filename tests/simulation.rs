//! Runs of the simulator: a thousand seeds that must show no violation, each twice with equal hashes; planted bugs that must be found; and traces
//! of failures, shrunk and kept, that are run again.
//! `SEED=7 cargo test --release -p stoke-cli -p stoke-tests --test simulation one_run -- --nocapture` tells one run as it goes, `TRACE=FILE` the run
//! of a trace file.

use std::path::{Path, PathBuf};

use stoke_tests::sim::seeds::{self, Sweep};
use stoke_tests::sim::{Detection, Fault, Outcome, Plan, Planted, Rates, Setting, TimedFault, Trace, run, shrink};

/// Seeds of every run of the test suite.
const SEEDS: u64 = 1_000;
/// A planted bug must be found within so many.
const SEEDS_PLANTED_MAX: u64 = 2_000;
const THREADS: usize = 2;
/// Lines of the story that a failure shows.
const STORY_LINES: usize = 80;
/// Of the shrinking of a planted bug: enough for a small trace, and a few seconds.
const RUNS_PLANTED_MAX: usize = 1_500;
/// When everybody has joined.
const CUT_MS: u64 = 20_000;
/// A shrunk trace is at least so many times smaller.
const SMALLER: usize = 20;

#[test]
fn a_thousand_seeds_hold_every_invariant_and_repeat_bit_for_bit() {
    let tally = Sweep { seeds: 0..SEEDS, threads: THREADS, repeat_every: 1, until: None }.run(|_| {});
    println!("{}", tally.words());
    assert!(tally.unequal.is_empty(), "seeds that do not repeat: {:?}", tally.unequal);
    tally.failed.iter().for_each(|(seed, violation)| println!("seed {seed}: {violation:?}"));
    if let Some(first) = tally.failed.keys().next() {
        let outcome = run(&Setting::of_seed(*first).story(STORY_LINES));
        println!("seed {first}, the end of its story:\n  {}", outcome.story.join("\n  "));
        let report = seeds::report(&Setting::of_seed(*first), &traces_made());
        panic!("{} seeds fail: {:?}\n{report}", tally.failed.len(), tally.failed.keys());
    }
}

/// Each packet of a minute takes up to 200 ms, and nothing else happens: nobody is taken for lost, whatever the profile.
#[test]
fn packets_that_take_200_ms_lose_no_node_in_either_profile() {
    for seed in 0..40 {
        let detection = if seed % 2 == 0 { Detection::Default } else { Detection::Fast };
        let mut setting = Setting::of_seed(seed);
        let rates = Rates { tail: 1.0, tail_ms: 200, ..Rates::default() };
        setting.plan = Plan { detection, rates, faults: Vec::new(), chaos_ms: 60_000, ..setting.plan };
        let outcome = run(&setting);
        assert_eq!(outcome.violation, None, "seed {seed}");
        assert_eq!(outcome.coverage.of("coordinator event", "NodeLost"), 0, "seed {seed} with {detection:?}");
    }
}

/// From the cut to the entry in the journal; clocks may be off by a twentieth, and the modelled coordinator looks every 250 ms.
#[test]
fn a_node_that_is_cut_off_is_lost_after_4_s_or_in_the_fast_profile_after_1100_ms() {
    for (detection, at_most) in [(Detection::Default, 4_500), (Detection::Fast, 1_450)] {
        for seed in 0..20 {
            let mut setting = Setting::of_seed(seed).story(100_000);
            let faults = vec![TimedFault { at: CUT_MS, fault: Fault::CutBoth { node: 0, lasts: 20_000 } }];
            setting.plan = Plan { detection, faults, rates: Rates::default(), chaos_ms: 60_000, ..setting.plan };
            let outcome = run(&setting);
            assert_eq!(outcome.violation, None, "seed {seed}");
            let lost = outcome.story.iter().find(|line| line.contains("NodeLost"));
            let lost = lost.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).expect("it is lost");
            assert!((CUT_MS..CUT_MS + at_most).contains(&lost), "seed {seed}: lost at {lost} ms, cut at {CUT_MS} ms");
        }
    }
}

/// F9: the coordinator is gone for ten minutes, and a minute into them a rank dies. The two that are left do every step of those minutes, and the
/// coordinator goes on from there: nothing begins at a checkpoint again.
#[test]
fn ten_minutes_without_a_coordinator_and_the_death_of_a_rank_cost_no_step() {
    for seed in 0..20 {
        let plan = toml::from_str(TEN_MINUTES).expect("a plan");
        let outcome = run(&Setting { plan, ..Setting::of_seed(seed).story(100_000) });
        assert_eq!(outcome.violation, None, "seed {seed}");
        let stands: Vec<(bool, u64)> = outcome.story.iter().filter_map(|line| stands(line)).collect();
        let (_, alone) = stands.iter().find(|(alone, _)| *alone).expect("a quorum goes on alone");
        let (_, after) = stands.iter().skip_while(|(alone, _)| !alone).find(|(alone, _)| !alone).expect("it is back");
        // A step takes a quarter of a second at the mean.
        assert!(*alone < 400 && *after > alone + 1_500, "seed {seed}: {stands:?}");
        assert!(stands.is_sorted_by_key(|(_, step)| *step), "seed {seed}: {stands:?}");
        // The gang, and one successor when there was somebody to place it.
        assert_eq!(outcome.spawned, 4, "seed {seed}");
    }
}

/// Whether a term stands without the coordinator, and the step at which it does.
fn stands(line: &str) -> Option<(bool, u64)> {
    let (_, rest) = line.split_once(" stands at step-")?;
    Some((rest.ends_with("alone"), rest.split_whitespace().next()?.parse().ok()?))
}

const TEN_MINUTES: &str = r#"
chaos_ms = 700_000
failover_grace_ms = 30_000
snapshot_every = 600
rates = { slow_ms = 10, tail_ms = 10 }
machines = [
    { cpus = 2, gpus = 0, memory_gib = 4, name = 0, rate = 1.0, zone = "a" },
    { cpus = 2, gpus = 0, memory_gib = 4, name = 1, rate = 1.0, zone = "a" },
    { cpus = 2, gpus = 0, memory_gib = 4, name = 2, rate = 1.0, zone = "a" },
]
asks = [
    { ask = "submit", at = 2_000, client = 3, key = 1, job = { attempts = 3, cpus = 2, gpus = 0, every = 100, keep = 2, memory_gib = 1, priority = 0, ranks = 3, ranks_min = 1, steps = 3_500 } },
]
faults = [
    { at = 20_000, fault = "coordinator-crash", down = 600_000 },
    { at = 80_000, fault = "rank-kill", pick = 0, signal = 9 },
]
"#;

#[test]
fn every_planted_bug_is_found() {
    let planted = Planted::all();
    let found: Vec<(Planted, Option<(u64, Outcome)>)> = seeds::over(0..planted.len() as u64, THREADS, |at| {
        let planted = planted[at as usize];
        Some((planted, first_found(planted)))
    });
    let mut missed = Vec::new();
    for (planted, found) in &found {
        match found {
            Some((seed, outcome)) => println!("{planted:?}: after {} seeds, {:?}", seed + 1, outcome.violation),
            None => missed.push(*planted),
        }
    }
    assert!(missed.is_empty(), "not found within {SEEDS_PLANTED_MAX} seeds: {missed:?}");
}

fn first_found(planted: Planted) -> Option<(u64, Outcome)> {
    let violated = |seed| Some((seed, run(&Setting::of_seed(seed).planted(planted))));
    (0..SEEDS_PLANTED_MAX).filter_map(violated).find(|(_, outcome)| outcome.violation.is_some())
}

#[test]
fn a_failing_seed_shrinks_to_a_small_trace_that_fails_alike() {
    let planted = Planted::named("SlotFreedBeforeExit").expect("it is planted");
    let (seed, outcome) = first_found(planted).expect("a seed finds it");
    let violation = outcome.violation.clone().expect("found by it");
    let setting = Setting::of_seed(seed).planted(planted);
    let (trace, runs) = shrink(&setting, &violation, RUNS_PLANTED_MAX);
    let whole = Trace { plan: setting.plan, choices: outcome.drawn, ..trace.clone() };
    println!("from {} to {} in {runs} runs:\n{}", whole.size(), trace.size(), trace.write(""));
    assert!(trace.size() * SMALLER <= whole.size(), "{} is left of {}", trace.size(), whole.size());
    let again = Trace::read(&trace.write("")).expect("what was written can be read");
    assert_eq!(again, trace);
    shows_what_it_says(&again);
}

#[test]
fn traces_that_were_kept_show_what_they_say_and_nothing_without_it() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/sim/traces");
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).expect("the folder of traces").flatten().map(|entry| entry.path()).collect();
    files.sort();
    assert!(!files.is_empty(), "no traces are kept");
    for file in files {
        println!("{}", file.display());
        shows_what_it_says(&read(&file));
    }
}

/// With its planted bug the invariant breaks, without it none does.
fn shows_what_it_says(trace: &Trace) {
    let setting = trace.setting();
    let sound = run(&setting.clone().planted(Planted::Nothing));
    assert_eq!(sound.violation, None, "it fails without a planted bug");
    if trace.planted != Planted::Nothing {
        let (first, second) = (run(&setting), run(&setting));
        assert_eq!(first.hash, second.hash, "it does not repeat");
        let again = "if its moment has only moved, shrink it anew: PLANTED=... SEED=..., test one_run";
        assert_eq!(first.violation.map(|violation| violation.name()), Some(trace.breaks.clone()), "{again}");
    }
}

fn read(file: &Path) -> Trace {
    let text = std::fs::read_to_string(file).expect("a trace file can be read");
    Trace::read(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// Where new ones are written.
fn traces_made() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("traces")
}

/// Of the file `TRACE`, of `SEED`, or of the first seed, with `PLANTED` if it is given: told as it goes.
#[test]
fn one_run() {
    let planted = std::env::var("PLANTED").ok();
    let planted = planted.map_or(Planted::Nothing, |name| Planted::named(&name).expect("a planted bug's name"));
    let seed = std::env::var("SEED").ok().map_or(0, |seed| seed.parse().expect("SEED is a number"));
    let setting = match std::env::var("TRACE") {
        Ok(file) => read(Path::new(&file)).setting(),
        Err(_) => Setting::of_seed(seed).planted(planted),
    };
    let outcome = run(&setting.clone().story(100_000));
    println!("{}", outcome.story.join("\n"));
    println!("{} events, {} jobs, hash {:016x}: {:?}", outcome.events, outcome.jobs, outcome.hash, outcome.violation);
    if outcome.violation.is_some() {
        println!("{}", seeds::report(&setting, &traces_made()));
    }
    assert_eq!(outcome.violation.is_some(), setting.planted != Planted::Nothing, "{:?}", outcome.violation);
}
