//! PPO on CartPole from end to end, one thread: env steps a second of `rl::Solo` beside a CleanRL-style script on PyTorch and gymnasium with the same
//! hyperparameters, taking turns in the same run. Prints medians, and the median of the ratios of turns that followed each other.
//!
//! `cargo bench -p stoke-cli -p stoke-tests --bench rl_ppo`; the script needs the Python that `jobs/reference/setup.sh` makes, or STOKE_TORCH_PYTHON.
//! STOKE_BENCH_TURNS (5) and STOKE_BENCH_STEPS (51200) replace the defaults. `--bench rl_ppo -- table` trains the table of
//! docs/rl.md instead: STOKE_BENCH_ONLY (`dqn Acrobot`) picks rows, STOKE_BENCH_MORE adds lines to their `[rl]`.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use stoke_jobs::rl::Solo;
use stoke_tests::report::{Goal, Row};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// One lane of four envs, and four lanes of one: the same batch.
const CASES: [(u32, usize); 2] = [(1, 4), (4, 1)];

fn main() {
    if std::env::args().any(|argument| argument == "table") {
        return table();
    }
    let number = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().expect("a number"));
    let (turns, steps) = (number("STOKE_BENCH_TURNS", 5), number("STOKE_BENCH_STEPS", 51_200));
    println!("PPO on CartPole, env steps a second, one thread, medians of {turns} turns of {steps} steps");
    println!("{:<20}{:>12}{:>12}{:>8}", "", "ours", "PyTorch", "ratio");
    let python = python();
    for (lanes, envs) in CASES {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for turn in 0..turns {
            ours.push(rate(lanes, envs, (steps, turn)));
            theirs.extend(python.as_deref().map(|python| peer(python, (steps, turn))));
        }
        let mut ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect();
        let name = format!("{lanes} lanes of {envs} envs");
        let what = format!("PPO on CartPole, {name}");
        Row::new(what, "env steps/s", &ours).beside("CleanRL-style PyTorch", &theirs).goal(Goal::AtLeast(5.0)).report();
        print!("{name:<20}{:>12.0}", median(&mut ours));
        match ratios.is_empty() {
            true => println!(" (no PyTorch here: jobs/reference/setup.sh makes it)"),
            false => println!("{:>12.0}{:>8.1}", median(&mut theirs), median(&mut ratios)),
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn rate(lanes: u32, envs: usize, (steps, seed): (u64, u64)) -> f64 {
    let spec = format!("[rl]\nalgorithm = 'ppo'\nenvironment = 'CartPole-v1'\nenvs = {envs}\n");
    let mut solo = Solo::new(&spec, lanes, seed).expect("a good spec");
    let rounds = steps / (solo.plan.steps * envs * lanes as usize) as u64;
    let begun = Instant::now();
    (0..rounds).for_each(|_| drop(solo.round().expect("a round")));
    steps as f64 / begun.elapsed().as_secs_f64()
}

fn peer(python: &Path, (steps, seed): (u64, u64)) -> f64 {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/rl_ppo.py");
    let mut command = Command::new(python);
    command.args(["-W", "ignore"]).arg(script).args([steps.to_string(), seed.to_string()]).env("OMP_NUM_THREADS", "1");
    let output = command.output().expect("python runs");
    let said = String::from_utf8_lossy(&output.stdout);
    let rate = said.split_whitespace().next().and_then(|rate| rate.parse().ok());
    rate.unwrap_or_else(|| panic!("no figure: {}", String::from_utf8_lossy(&output.stderr)))
}

fn python() -> Option<PathBuf> {
    let cached = || Some(std::env::home_dir()?.join(".cache/stoke-torch/bin/python"));
    std::env::var_os("STOKE_TORCH_PYTHON").map(PathBuf::from).or_else(cached).filter(|python| python.exists())
}

/// What is trained, its lanes, and the rounds that its actor is behind.
const TABLE: [(&str, &str, u32, usize); 10] = [
    ("ppo", "CartPole-v1", 4, 0),
    ("ppo", "Acrobot-v1", 4, 0),
    ("ppo", "Pendulum-v1", 1, 0),
    ("ppo", "MountainCarContinuous-v0", 1, 0),
    ("dqn", "CartPole-v1", 1, 0),
    ("dqn", "Acrobot-v1", 1, 0),
    ("impala", "CartPole-v1", 4, 0),
    ("impala", "CartPole-v1", 4, 4),
    ("impala", "Acrobot-v1", 4, 0),
    ("impala", "Acrobot-v1", 4, 4),
];

/// Five seeds of each, the whole budget.
fn table() {
    let (only, more_lines) = ("STOKE_BENCH_ONLY", "STOKE_BENCH_MORE");
    let [only, more_lines] = [only, more_lines].map(|name| std::env::var(name).unwrap_or_default());
    for (algorithm, environment, lanes, behind) in TABLE {
        if !format!("{algorithm} {environment}").contains(&only) {
            continue;
        }
        let spec = format!("[rl]\nalgorithm = '{algorithm}'\nenvironment = '{environment}'\n{more_lines}\n");
        let begun = Instant::now();
        let returns: Vec<f64> = (1..=5).map(|seed| train(&spec, (lanes, behind), seed)).collect();
        let mean = returns.iter().sum::<f64>() / 5.0;
        let deviation = (returns.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 5.0).sqrt();
        let each: Vec<String> = returns.iter().map(|value| format!("{value:.1}")).collect();
        let seconds = begun.elapsed().as_secs_f64() / 5.0;
        let each = each.join(", ");
        println!("| {algorithm} | {environment} | {behind} | {mean:.1} +- {deviation:.1} | {each} | {seconds:.1} |");
    }
}

/// The mean return of the last 100 episodes.
fn train(spec: &str, (lanes, behind): (u32, usize), seed: u64) -> f64 {
    let mut solo = Solo::new(spec, lanes, seed).expect("a good spec").behind(behind);
    let mut last: VecDeque<f64> = VecDeque::new();
    for _ in 0..solo.plan.rounds {
        let round = solo.round().expect("a round").round;
        // A round's episodes stand for their mean each.
        last.extend((0..round.episodes).filter_map(|_| round.episode_return));
        let past = last.len().saturating_sub(100);
        last.drain(..past);
    }
    last.iter().sum::<f64>() / last.len() as f64
}
