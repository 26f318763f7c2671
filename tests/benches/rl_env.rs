//! Environment steps a second, one thread: every native environment against gymnasium's `SyncVectorEnv`, and CartPole also against gymnasium's own
//! vectorised one, taking turns in the same run. Prints medians of the turns, and the median of the ratios of turns that followed each other.
//!
//! `cargo bench -p stoke-cli -p stoke-tests --bench rl_env`; gymnasium needs the Python that the tests of the bridge make (`~/.cache/stoke-tests`), or
//! STOKE_GYMNASIUM_PYTHON. STOKE_BENCH_ENVS (64) and STOKE_BENCH_TURNS (11) replace the defaults.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use stoke_jobs::rl::{Actions, Pcg64, Space, StepBuffer, make};
use stoke_tests::report::{Goal, Row};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const NAMES: [&str; 5] = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"];
/// How long a turn lasts at least.
const TURN: Duration = Duration::from_millis(250);
/// Steps of actions that are drawn before the clock starts, and used again and again.
const DRAWN: usize = 256;

fn main() {
    let number = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().expect("a number"));
    let (envs, turns) = (number("STOKE_BENCH_ENVS", 64), number("STOKE_BENCH_TURNS", 11));
    let mut peer = Peer::start(envs);
    println!(
        "environment steps a second, {envs} envs, one thread, medians of {turns} turns of {} ms",
        TURN.as_millis()
    );
    println!("{:<26}{:>14}{:>14}{:>8}", "", "ours", "gymnasium", "ratio");
    for name in NAMES {
        compare(name, name, &mut peer, (envs, turns));
    }
    compare("CartPole-v1", "CartPole-v1 vectorised", &mut peer, (envs, turns));
    let mut ours: Vec<f64> = (0..turns).map(|_| rate("scan-budget", envs)).collect();
    println!("{:<26}{:>14.0}", "scan-budget", median(&mut ours));
}

fn compare(name: &str, theirs: &str, peer: &mut Option<Peer>, (envs, turns): (usize, usize)) {
    let (mut ours, mut others) = (Vec::new(), Vec::new());
    for _ in 0..turns {
        ours.push(rate(name, envs));
        others.extend(peer.as_mut().map(|peer| peer.rate(theirs)));
    }
    let mut ratios: Vec<f64> = ours.iter().zip(&others).map(|(ours, theirs)| ours / theirs).collect();
    let what = format!("environment steps, {theirs}");
    Row::new(what, "steps/s", &ours).beside("gymnasium", &others).goal(Goal::AtLeast(100.0)).report();
    let ours = median(&mut ours);
    if ratios.is_empty() {
        return println!("{theirs:<26}{ours:>14.0}");
    }
    println!("{theirs:<26}{ours:>14.0}{:>14.0}{:>8.0}", median(&mut others), median(&mut ratios));
}

/// Steps a second of all envs together.
fn rate(name: &str, envs: usize) -> f64 {
    let mut env = make(name, envs).expect("a native environment");
    let mut buffer = StepBuffer::new(&*env);
    let seeds: Vec<u64> = (0..envs as u64).collect();
    env.reset(&seeds, &mut buffer.observations).expect("a reset");
    let mut rng = Pcg64::new(0);
    let n = if let Space::Discrete { n } = env.spec().action { n } else { 1 };
    let choices: Vec<u32> = (0..DRAWN * envs).map(|_| rng.below(n.into()) as u32).collect();
    let values: Vec<f32> = (0..DRAWN * envs).map(|_| rng.uniform(-1.0, 1.0) as f32).collect();
    let discrete = matches!(env.spec().action, Space::Discrete { .. });
    let (begun, mut steps) = (Instant::now(), 0);
    while begun.elapsed() < TURN {
        for step in 0..DRAWN {
            let here = step * envs..(step + 1) * envs;
            let actions = if discrete { Actions::Discrete(&choices[here]) } else { Actions::Box(&values[here]) };
            env.step(actions, buffer.step()).expect("a step");
            steps += envs;
        }
        std::hint::black_box(&buffer);
    }
    steps as f64 / begun.elapsed().as_secs_f64()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// gymnasium, in rl_env.py.
struct Peer {
    process: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    /// None, and said, where there is no gymnasium.
    fn start(envs: usize) -> Option<Self> {
        let cached = || Some(std::env::home_dir()?.join(".cache/stoke-tests/gymnasium-1.4.0-numpy-2.4.6/bin/python"));
        let python = std::env::var_os("STOKE_GYMNASIUM_PYTHON").map(PathBuf::from).or_else(cached)?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/rl_env.py");
        let mut command = Command::new(&python);
        command.args(["-W", "ignore"]).arg(script).args([envs.to_string(), TURN.as_secs_f64().to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = match command.spawn() {
            Ok(process) => process,
            Err(error) => {
                println!("no gymnasium to compare with: start {}: {error}", python.display());
                return None;
            }
        };
        let requests = process.stdin.take().expect("piped");
        let answers = BufReader::new(process.stdout.take().expect("piped"));
        let mut peer = Self { process, requests, answers };
        println!("gymnasium {}", peer.line().trim());
        Some(peer)
    }

    fn rate(&mut self, name: &str) -> f64 {
        writeln!(self.requests, "{name}").expect("gymnasium lives");
        self.line().trim().parse().expect("a number")
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("gymnasium lives");
        line
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
