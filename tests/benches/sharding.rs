//! Training on four ranks of one machine with the optimizer's state whole at each and in parts (`sharding = "zero1"`), and the same under PyTorch DDP with AdamW
//! and with ZeroRedundancyOptimizer over gloo, in turn in the same run: samples a second, and the memory of a rank.
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench sharding
//!
//! Needs the Python that `jobs/reference/setup.sh` makes (or STOKE_TORCH_PYTHON); without it, prints our figures only. STOKE_BENCH_ROUNDS replaces the rounds.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use stoke_tests::report::{Figure, Row};

const RANKS: u32 = 4;
const STEPS: u64 = 12;
/// 10.7 million parameters: 82 MiB of state with AdamW.
const MODEL: [&str; 4] = ["model.hidden=384", "model.layers=6", "model.heads=6", "train.batch=8"];
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What one run gave.
struct Figures {
    samples_per_second: f64,
    /// The most that a rank had for itself, in MiB: ours without memory that ranks share, theirs with their libraries.
    peak_mib: f64,
}

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_owned();
    let stoke = stoke_tests::binary::build(&root);
    let spec = root.join("jobs/specs/language.toml");
    let python = python();
    if python.is_none() {
        println!("no PyTorch here (jobs/reference/setup.sh makes it): our figures only");
    }
    let cluster = Cluster::up(&stoke);
    let rounds = std::env::var("STOKE_BENCH_ROUNDS").map_or(3, |rounds| rounds.parse().expect("a number"));
    println!(
        "{:<16} {:>16} {:>10} {:>16} {:>10}",
        "optimizer's state", "stoke samples/s", "MiB", "torch samples/s", "MiB"
    );
    for (what, sharding, optimizer) in [("whole", "none", "whole"), ("in parts", "zero1", "zero")] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            ours.push(cluster.train(&spec, sharding));
            theirs.extend(python.as_deref().map(|python| torch(&root, python, &spec, optimizer)));
        }
        let of = |runs: &[Figures], figure: fn(&Figures) -> f64| runs.iter().map(figure).collect::<Vec<_>>();
        let [rates, their_rates] = [&ours, &theirs].map(|runs| of(runs, |run| run.samples_per_second));
        let [peaks, their_peaks] = [&ours, &theirs].map(|runs| of(runs, |run| run.peak_mib));
        let shown = |values: &[f64]| Figure::of(values).median;
        let (rate, peak, their_rate, their_peak) =
            (shown(&rates), shown(&peaks), shown(&their_rates), shown(&their_peaks));
        println!("{what:<16} {rate:>16.1} {peak:>10.0} {their_rate:>16.1} {their_peak:>10.0}");
        let peer = if optimizer == "zero" { "PyTorch ZeroRedundancyOptimizer" } else { "PyTorch DDP" };
        let row = |figure: &str| format!("{figure}, 4 ranks, optimizer's state {what}");
        Row::new(row("training"), "samples/s", &rates).beside(peer, &their_rates).report();
        Row::new(row("memory of a rank"), "MiB", &peaks).beside(peer, &their_peaks).report();
    }
}

/// A local cluster that is taken down when dropped.
struct Cluster<'a> {
    stoke: &'a Path,
    folder: tempfile::TempDir,
}

impl<'a> Cluster<'a> {
    fn up(stoke: &'a Path) -> Self {
        let cluster = Self { stoke, folder: tempfile::tempdir().expect("a temporary folder") };
        cluster.ask(&["up", "--nodes", &RANKS.to_string()]);
        cluster
    }

    fn ask(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(self.stoke);
        let output = command.arg("--cluster").arg(self.folder.path().join("c")).args(arguments).output();
        let output = output.expect("run stoke");
        assert!(output.status.success(), "stoke {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    fn train(&self, spec: &Path, sharding: &str) -> Figures {
        let sets = [
            format!("train.steps={STEPS}"),
            "checkpoint.every=100000".to_owned(),
            format!("train.sharding=\"{sharding}\""),
        ];
        let mut arguments = vec!["submit", spec.to_str().expect("UTF-8"), "--ranks", "4", "--wait", "--json"];
        sets.iter().map(String::as_str).chain(MODEL).for_each(|set| arguments.extend(["--set", set]));
        let done = Arc::new(AtomicBool::new(false));
        let is_done = done.clone();
        let looking = thread::spawn(move || look(&is_done));
        let answer: Value = serde_json::from_str(&self.ask(&arguments)).expect("one JSON object");
        done.store(true, Ordering::Relaxed);
        let peak_mib = looking.join().expect("it looks");
        let log = self.ask(&["logs", answer["job"].as_str().expect("a job"), "--rank", "0"]);
        let line = log.lines().find(|line| line.contains("steps done")).expect("it says so");
        let (_, rate) = line.split_once("samples_per_second=").expect("with its rate");
        let rate = rate.split_whitespace().next().and_then(|rate| rate.parse().ok());
        Figures { samples_per_second: rate.expect("a number"), peak_mib }
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        drop(Command::new(self.stoke).arg("--cluster").arg(self.folder.path().join("c")).arg("down").output());
    }
}

/// The most that any rank of this machine has for itself, until it is done.
fn look(is_done: &AtomicBool) -> f64 {
    let mut most: f64 = 0.0;
    while !is_done.load(Ordering::Relaxed) {
        let processes = std::fs::read_dir("/proc").expect("Linux").flatten().map(|process| process.path());
        let ranks = processes.filter(|process| {
            let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).nth(1) == Some(b"worker")
        });
        for rank in ranks {
            let status = std::fs::read_to_string(rank.join("status")).unwrap_or_default();
            let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
            let kib = anonymous.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
            most = most.max(kib.unwrap_or(0.0) / 1024.0);
        }
        thread::sleep(LOOK_EVERY);
    }
    most
}

fn torch(root: &Path, python: &Path, spec: &Path, optimizer: &str) -> Figures {
    let output = Command::new(python)
        .args(["-m", "torch.distributed.run", "--nproc-per-node", &RANKS.to_string()])
        .args(["--master-addr", "127.0.0.1", "--master-port", "29613"])
        .arg(root.join("tests/benches/ddp.py"))
        .arg(spec)
        .arg(STEPS.to_string())
        .args(MODEL)
        .env("STOKE_BENCH_OPTIMIZER", optimizer)
        .stderr(Stdio::piped())
        .output()
        .expect("run python");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let line = stdout.lines().find(|line| line.starts_with('{'));
    let line = line.unwrap_or_else(|| panic!("torch failed: {}", String::from_utf8_lossy(&output.stderr)));
    let figures: Value = serde_json::from_str(line).expect("one JSON line");
    let figure = |name: &str| figures[name].as_f64().expect("a number");
    Figures { samples_per_second: figure("samples_per_second"), peak_mib: figure("peak_mib") }
}

fn python() -> Option<PathBuf> {
    let named = std::env::var_os("STOKE_TORCH_PYTHON").map(PathBuf::from);
    let usual = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/stoke-torch/bin/python"));
    named.or(usual).filter(|path| path.exists())
}
