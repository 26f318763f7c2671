//! The long mode of the simulator: many seeds on all cores, for nightly runs. A seed that fails is shrunk and written as a trace; at the end
//! it says how often each kind of event, effect, fault and mishap has happened, and fails when one never has (from 10,000 seeds on).
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench seeds -- --seeds 100000
//!     cargo bench -p stoke-cli -p stoke-tests --bench seeds -- --from 100000 --seconds 3600 --threads 8

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use stoke_tests::sim::Setting;
use stoke_tests::sim::seeds::{self, Sweep, Tally};

const SEEDS: u64 = 10_000;
/// With fewer, some things are too rare to be asked for.
const COVERING_SEEDS: u64 = 10_000;
/// Failures that are shrunk; more are only named.
const REPORTS_MAX: usize = 10;
/// Of a thread that runs seeds, one of so many is run twice and must repeat.
const REPEAT_EVERY: u64 = 50;

fn main() -> ExitCode {
    let number = |name: &str| {
        let mut args = std::env::args().skip_while(|arg| arg != name).skip(1);
        args.next().map(|value| value.parse::<u64>().unwrap_or_else(|_| panic!("{name} takes a number, not {value:?}")))
    };
    let (from, seconds) = (number("--from").unwrap_or(0), number("--seconds"));
    // Until the time is over, if there is one.
    let many = number("--seeds").unwrap_or(if seconds.is_some() { u64::MAX - from } else { SEEDS });
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let begun = Instant::now();
    let sweep = Sweep {
        seeds: from..from.saturating_add(many),
        threads: number("--threads").unwrap_or(cores) as usize,
        repeat_every: REPEAT_EVERY,
        until: seconds.map(|seconds| begun + Duration::from_secs(seconds)),
    };
    let tally = sweep.run(|tally| eprintln!("{:>6.0} s  {}", begun.elapsed().as_secs_f64(), tally.words()));
    println!("{} in {:.1} s", tally.words(), begun.elapsed().as_secs_f64());
    print!("{}", tally.coverage.table());
    verdict(&tally)
}

fn verdict(tally: &Tally) -> ExitCode {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("traces");
    for (seed, violation) in &tally.failed {
        println!("seed {seed}: {violation:?}");
    }
    for seed in tally.failed.keys().take(REPORTS_MAX) {
        println!("\n{}", seeds::report(&Setting::of_seed(*seed), &folder));
    }
    tally.unequal.iter().for_each(|seed| println!("seed {seed} does not repeat"));
    let wrong = if tally.runs >= COVERING_SEEDS { tally.coverage.wrong() } else { Vec::new() };
    wrong.iter().for_each(|wrong| println!("{wrong}"));
    if tally.failed.is_empty() && tally.unequal.is_empty() && wrong.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
