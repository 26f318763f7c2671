//! What deaths of ranks cost in the end: useful steps a second while a rank is killed every 60 s and every 15 s, over those of a calm run
//! (goodput). Two ranks of `domains`; then the same model, batch and kills under PyTorch DDP, which torch.distributed.run starts again from its
//! last checkpoint. Both write one every `CHECKPOINT_STEPS`. A step that is done again counts once.
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench goodput
//!     STOKE_BENCH_SCHEDULES=15:60,5:30 cargo bench ...     kills every 15 s in 60 s, every 5 s in 30 s
//!
//! The peer needs the Python of `jobs/reference/setup.sh` (or STOKE_TORCH_PYTHON); without it, our figures only.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use stoke_tests::local::{LocalCluster, children, signal};

const RANKS: usize = 2;
/// About 10 s of training: what a restart from a checkpoint loses is half of it in the mean.
const CHECKPOINT_STEPS: u64 = 500;
const CALM: Duration = Duration::from_secs(60);
/// Seconds between kills, and of the whole.
const SCHEDULES: [(u64, u64); 2] = [(60, 180), (15, 120)];
const POLL: Duration = Duration::from_millis(20);
/// Until the first step.
const START_MAX: Duration = Duration::from_secs(120);

/// Somebody who trains.
trait Trainer {
    /// Steps that are done.
    fn step(&mut self) -> u64;
    /// Processes of the ranks.
    fn ranks(&mut self) -> Vec<u32>;
}

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_owned();
    let stoke = stoke_tests::binary::build(&root);
    let spec = root.join("jobs/specs/domains.toml");
    let python = python();
    if python.is_none() {
        println!("no PyTorch here (jobs/reference/setup.sh makes it): our figures only");
    }
    let ours = |schedule| ours(&stoke, &spec, schedule);
    let theirs = |schedule| python.as_deref().map(|python| torch(&root, python, &spec, schedule));
    let calm = (ours((u64::MAX, CALM.as_secs())), theirs((u64::MAX, CALM.as_secs())));
    println!("calm: {:.1} steps/s, torch {:.1}", calm.0, calm.1.unwrap_or(f64::NAN));
    println!(
        "{:<22} {:>14} {:>8} {:>14} {:>8} {:>7}",
        "a rank killed every", "stoke steps/s", "goodput", "torch", "goodput", "ratio"
    );
    for schedule in schedules() {
        let (our, their) = (ours(schedule), theirs(schedule));
        let goodput = (our / calm.0, their.zip(calm.1).map_or(f64::NAN, |(their, calm)| their / calm));
        println!(
            "{:<22} {our:>14.1} {:>7.1}% {:>14.1} {:>7.1}% {:>7.2}",
            format!("{} s, in {} s", schedule.0, schedule.1),
            100.0 * goodput.0,
            their.unwrap_or(f64::NAN),
            100.0 * goodput.1,
            goodput.0 / goodput.1,
        );
    }
}

fn schedules() -> Vec<(u64, u64)> {
    let Ok(text) = std::env::var("STOKE_BENCH_SCHEDULES") else { return SCHEDULES.to_vec() };
    let number = |text: &str| text.parse().expect("seconds");
    let pair = |text: &str| text.split_once(':').map(|(every, whole)| (number(every), number(whole)));
    text.split(',').map(|one| pair(one).expect("EVERY:SECONDS")).collect()
}

/// Useful steps a second from the first step on, while ranks die in turn.
fn rate(trainer: &mut impl Trainer, (every, seconds): (u64, u64)) -> f64 {
    let deadline = Instant::now() + START_MAX;
    while trainer.step() == 0 {
        assert!(Instant::now() < deadline, "it does not begin");
        std::thread::sleep(POLL);
    }
    // The first steps warm up, here and there.
    std::thread::sleep(Duration::from_secs(2));
    let (begun, first) = (Instant::now(), trainer.step());
    let mut kills = 0;
    while begun.elapsed().as_secs() < seconds {
        let due = every.saturating_mul(kills + 1);
        if due < seconds && begun.elapsed().as_secs() >= due {
            let ranks = trainer.ranks();
            // Between death and restart there may be nobody to kill.
            if let Some(victim) = ranks.get(kills as usize % ranks.len().max(1)) {
                signal(*victim, Signal::KILL);
            }
            kills += 1;
        }
        std::thread::sleep(POLL);
    }
    let done = trainer.step();
    done.saturating_sub(first) as f64 / begun.elapsed().as_secs_f64()
}

struct Ours<'a> {
    cluster: LocalCluster<'a>,
    job: String,
    /// Between generations nobody tells.
    told: u64,
}

impl Trainer for Ours<'_> {
    fn step(&mut self) -> u64 {
        self.told = self.cluster.job(&self.job)["progress"]["step"].as_u64().unwrap_or(self.told);
        self.told
    }

    fn ranks(&mut self) -> Vec<u32> {
        self.cluster.ranks()
    }
}

fn ours(stoke: &Path, spec: &Path, schedule: (u64, u64)) -> f64 {
    let cluster = LocalCluster::up(stoke, RANKS, &[]);
    let settings = ["train.steps=1000000".to_owned(), format!("checkpoint.every={CHECKPOINT_STEPS}")];
    let job = cluster.submit(spec, &settings);
    rate(&mut Ours { cluster, job, told: 0 }, schedule)
}

struct Torch {
    launcher: Child,
    folder: tempfile::TempDir,
}

impl Trainer for Torch {
    fn step(&mut self) -> u64 {
        let text = std::fs::read_to_string(self.folder.path().join("step")).unwrap_or_default();
        text.parse().unwrap_or(0)
    }

    fn ranks(&mut self) -> Vec<u32> {
        children(self.launcher.id())
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        let ranks = self.ranks();
        signal(self.launcher.id(), Signal::KILL);
        ranks.into_iter().for_each(|rank| signal(rank, Signal::KILL));
        drop(self.launcher.wait());
    }
}

fn torch(root: &Path, python: &Path, spec: &Path, schedule: (u64, u64)) -> f64 {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let launcher = Command::new(python)
        .args(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", &RANKS.to_string()])
        .args(["--max-restarts", "1000", "--monitor-interval", "0.1"])
        .arg(root.join("tests/benches/goodput.py"))
        .arg(spec)
        .arg(folder.path())
        .arg(CHECKPOINT_STEPS.to_string())
        .env("OMP_NUM_THREADS", "1")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("run python");
    rate(&mut Torch { launcher, folder }, schedule)
}

fn python() -> Option<PathBuf> {
    let named = std::env::var_os("STOKE_TORCH_PYTHON").map(PathBuf::from);
    let usual = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/stoke-torch/bin/python"));
    named.or(usual).filter(|path| path.exists())
}
