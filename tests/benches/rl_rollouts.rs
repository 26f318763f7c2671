//! Ranks that only play, driven through the `stoke` binary. First the env steps a second of one learner with none, one and two of them, in an environment that waits
//! a millisecond a step; then what it takes to give a policy's weights to one, two and four of them: bytes that the learner sends a round, and seconds until
//! all have them.
//!
//! `cargo bench -p stoke-cli -p stoke-tests --bench rl_rollouts`; the environment needs the Python that the tests of the bridge make (`~/.cache/stoke-tests`), or
//! STOKE_GYMNASIUM_PYTHON.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use stoke_tests::local::LocalCluster;

/// Rounds before the clock starts, and behind that.
const WARM: u64 = 2;
const ROUNDS: u64 = 24;
const LANES: u64 = 12;
const POLL: Duration = Duration::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(120);

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned();
    let stoke = stoke_tests::binary::build(&root);
    scaling(&stoke);
    broadcast(&stoke);
}

fn scaling(stoke: &Path) {
    let cached = || Some(std::env::home_dir()?.join(".cache/stoke-tests/gymnasium-1.4.0-numpy-2.4.6/bin/python"));
    let python = std::env::var_os("STOKE_GYMNASIUM_PYTHON").map(PathBuf::from).or_else(cached);
    let Some(python) = python.filter(|python| python.exists()) else {
        return println!("no gymnasium here: the integration tests make it (`cargo test --test integration rl::`)");
    };
    println!("one learner and ranks that only play, {LANES} lanes, an environment of 1 ms a step");
    println!("{:<16}{:>16}{:>10}{:>14}", "", "env steps/s", "ratio", "elsewhere");
    let mut alone = None;
    for rollouts in 0..3 {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches");
        let settings = [
            "rl.environment=rl_slow:Slow-v0".to_owned(),
            format!("rl.python={}", python.display()),
            format!("rl.folders=[{folder:?}]"),
            "rl.steps=64".to_owned(),
            format!("rl.total_steps={}", 64 * LANES * 1_000),
            format!("train.lanes={LANES}"),
        ];
        let run = Job::submit(stoke, rollouts, &settings);
        let (first, begun) = (run.past(WARM), Instant::now());
        let last = run.past(WARM + ROUNDS);
        let steps = number(&last, "env_steps") - number(&first, "env_steps");
        let rate = steps as f64 / begun.elapsed().as_secs_f64();
        let elsewhere = number(&last, "played_elsewhere") as f64;
        let share = elsewhere / (elsewhere + number(&last, "played_here") as f64);
        let alone = *alone.get_or_insert(rate);
        println!("{:<16}{rate:>16.0}{:>10.2}{:>13.0}%", format!("{rollouts} that play"), rate / alone, share * 100.0);
    }
}

fn broadcast(stoke: &Path) {
    println!("\nweights of CartPole's policy to ranks that only play");
    println!(
        "{:<22}{:>10}{:>16}{:>22}{:>18}",
        "", "they are", "learner sends", "until all have them", "that is copies"
    );
    for (hidden, name) in
        [("[64, 64]", "2 layers of 64"), ("[512, 512]", "2 layers of 512"), ("[1024, 1024]", "2 of 1024")]
    {
        for rollouts in [1, 2, 4] {
            let settings = [
                format!("rl.hidden={hidden}"),
                format!("rl.total_steps={}", 128 * LANES * 1_000),
                "rl.minibatches=1".to_owned(),
                "rl.epochs=1".to_owned(),
                format!("train.lanes={LANES}"),
            ];
            let run = Job::submit(stoke, rollouts, &settings);
            let first = run.past(WARM);
            let (mut last, mut seconds) = (first.clone(), Vec::new());
            while number(&last, "round") < number(&first, "round") + ROUNDS {
                last = run.past(number(&last, "round") + 1);
                seconds.extend(last["broadcast_seconds"].as_f64());
            }
            let weights = weights(hidden);
            let between = |key| (number(&last, key) - number(&first, key)) as f64;
            let a_round = between("weights_sent") / between("round");
            seconds.sort_by(f64::total_cmp);
            let median =
                seconds.get(seconds.len() / 2).map_or("-".to_owned(), |median| format!("{:.1} ms", median * 1e3));
            println!(
                "{:<22}{:>10}{:>16}{median:>22}{:>18.1}",
                format!("{name}, {rollouts} play"),
                mib(weights as f64),
                mib(a_round),
                a_round / weights as f64,
            );
        }
    }
}

/// Bytes of an actor and a critic.
fn weights(hidden: &str) -> u64 {
    let width: u64 = hidden.trim_matches(['[', ']']).split(',').next().and_then(|n| n.parse().ok()).expect("a width");
    let net = |outputs: u64| (4 + 1) * width + (width + 1) * width + (width + 1) * outputs;
    4 * (net(2) + net(1))
}

fn mib(bytes: f64) -> String {
    format!("{:.3} MiB", bytes / f64::from(1 << 20))
}

/// A job with one learner in a cluster of its own.
struct Job<'a> {
    cluster: LocalCluster<'a>,
    name: String,
}

impl<'a> Job<'a> {
    fn submit(stoke: &'a Path, rollouts: usize, settings: &[String]) -> Self {
        let cluster = LocalCluster::up(stoke, 1 + rollouts, &[]);
        let spec = Path::new(env!("CARGO_MANIFEST_DIR")).join("../jobs/specs/ppo-cartpole.toml");
        let rollouts = format!("resources.rollouts={rollouts}");
        let mut args = vec!["submit", spec.to_str().expect("UTF-8"), "--ranks", "1", "--set", &rollouts];
        settings.iter().for_each(|setting| args.extend(["--set", setting]));
        let name = cluster.ask(&args)["job"].as_str().expect("a job").to_owned();
        Self { cluster, name }
    }

    /// The progress when so many rounds are done.
    fn past(&self, round: u64) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let rl = self.cluster.job(&self.name)["progress"]["rl"].clone();
            if rl["round"].as_u64() >= Some(round) {
                return rl;
            }
            assert!(Instant::now() < deadline, "no round {round} of {}", self.name);
            std::thread::sleep(POLL);
        }
    }
}

fn number(rl: &Value, key: &str) -> u64 {
    rl[key].as_u64().unwrap_or(0)
}
