//! Training through the `stoke` binary against PyTorch DDP over gloo, in turn in the same run: samples a second at 1 and 2 ranks on the same
//! model, data and batch, one thread a rank; and the seconds from the submission to the first committed step, against a torch launch.
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench training
//!
//! Needs `target/release/stoke` (it is built first) and the Python that `jobs/reference/setup.sh` makes (or STOKE_TORCH_PYTHON); without
//! it, prints our figures only.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;
use stoke_tests::report::{Goal, Row};

/// STOKE_BENCH_ROUNDS replaces it.
const ROUNDS: usize = 5;

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_owned();
    let stoke = stoke_tests::binary::build(&root);
    let python = python();
    if python.is_none() {
        println!("no PyTorch here (jobs/reference/setup.sh makes it): our figures only");
    }
    println!(
        "{:<10} {:>5} {:>16} {:>16} {:>7}   {:>12} {:>12} {:>7}",
        "spec", "ranks", "stoke samples/s", "torch samples/s", "ratio", "stoke start", "torch start", "ratio"
    );
    for (spec, steps) in [("domains", 150), ("digits", 150), ("language", 40)] {
        for ranks in [1, 2] {
            compare(&root, &stoke, python.as_deref(), (spec, steps), ranks);
        }
    }
}

/// What one run gave.
#[derive(Clone, Copy)]
struct Figures {
    samples_per_second: f64,
    /// Seconds from the command to the first committed step.
    start: f64,
}

fn compare(root: &Path, stoke: &Path, python: Option<&Path>, (spec, steps): (&str, u64), ranks: u32) {
    let spec_file = root.join(format!("jobs/specs/{spec}.toml"));
    let cluster = Cluster::up(stoke, ranks);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let rounds = std::env::var("STOKE_BENCH_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().expect("a number"));
    for _ in 0..rounds {
        ours.push(cluster.train(&spec_file, steps, ranks));
        if let Some(python) = python {
            theirs.push(torch(root, python, &spec_file, steps, ranks));
        }
    }
    let figures = |runs: &[Figures], of: fn(&Figures) -> f64| runs.iter().map(of).collect::<Vec<_>>();
    let [rates, their_rates] = [&ours, &theirs].map(|runs| figures(runs, |run| run.samples_per_second));
    let goal = if spec == "digits" { Goal::AtLeast(1.0 / 1.3) } else { Goal::AtLeast(1.0) };
    let what = format!("training, {spec}, {ranks} ranks");
    Row::new(what, "samples/s", &rates).beside("PyTorch DDP", &their_rates).goal(goal).report();
    let [starts, their_starts] = [&ours, &theirs].map(|runs| figures(runs, |run| run.start));
    let what = format!("submission to the first step, {spec}, {ranks} ranks");
    Row::new(what, "s", &starts).beside("torch.distributed.run", &their_starts).report();
    let rate = |runs: &[Figures]| median(runs.iter().map(|run| run.samples_per_second));
    let start = |runs: &[Figures]| median(runs.iter().map(|run| run.start));
    let (our_rate, our_start) = (rate(&ours), start(&ours));
    print!("{spec:<10} {ranks:>5} {our_rate:>16.0} ");
    if theirs.is_empty() {
        println!("{:>16} {:>7}   {our_start:>10.2} s", "-", "-");
    } else {
        let (rate, start) = (rate(&theirs), start(&theirs));
        println!(
            "{rate:>16.0} {:>7.2}   {our_start:>10.2} s {start:>10.2} s {:>7.2}",
            our_rate / rate,
            our_start / start
        );
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64()
}

/// A local cluster that is taken down when dropped.
struct Cluster<'a> {
    stoke: &'a Path,
    folder: tempfile::TempDir,
}

impl<'a> Cluster<'a> {
    fn up(stoke: &'a Path, nodes: u32) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let cluster = Self { stoke, folder };
        cluster.ask(&["up", "--nodes", &nodes.to_string()]);
        cluster
    }

    fn ask(&self, args: &[&str]) -> String {
        let output = Command::new(self.stoke)
            .arg("--cluster")
            .arg(self.folder.path().join("c"))
            .args(args)
            .output()
            .expect("run stoke");
        assert!(output.status.success(), "stoke {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    fn train(&self, spec: &Path, steps: u64, ranks: u32) -> Figures {
        let (ranks, steps) = (ranks.to_string(), format!("train.steps={steps}"));
        let started = now();
        let spec = spec.to_str().expect("UTF-8");
        let args = [
            "submit",
            spec,
            "--ranks",
            &ranks,
            "--set",
            &steps,
            "--set",
            "checkpoint.every=100000",
            "--wait",
            "--json",
        ];
        let answer: Value = serde_json::from_str(&self.ask(&args)).expect("one JSON object");
        let job = answer["job"].as_str().expect("a job").to_owned();
        let log = self.ask(&["logs", &job, "--rank", "0"]);
        let figure = |name: &str| -> f64 {
            let at = log.find(name).unwrap_or_else(|| panic!("{name} stands in the log:\n{log}")) + name.len();
            log[at..].split_whitespace().next().and_then(|text| text.parse().ok()).expect("a number")
        };
        Figures { samples_per_second: figure("samples_per_second="), start: figure("unix_ms=") / 1e3 - started }
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        drop(Command::new(self.stoke).arg("--cluster").arg(self.folder.path().join("c")).arg("down").output());
    }
}

fn torch(root: &Path, python: &Path, spec: &Path, steps: u64, ranks: u32) -> Figures {
    let started = now();
    let output = Command::new(python)
        .args([
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            &ranks.to_string(),
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            "29611",
        ])
        .arg(root.join("tests/benches/ddp.py"))
        .arg(spec)
        .arg(steps.to_string())
        .stderr(Stdio::piped())
        .output()
        .expect("run python");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let line = stdout.lines().find(|line| line.starts_with('{'));
    let line = line.unwrap_or_else(|| panic!("torch failed: {}", String::from_utf8_lossy(&output.stderr)));
    let figures: Value = serde_json::from_str(line).expect("one JSON line");
    Figures {
        samples_per_second: figures["samples_per_second"].as_f64().expect("a rate"),
        start: figures["first_step_unix"].as_f64().expect("a time") - started,
    }
}

fn python() -> Option<PathBuf> {
    let named = std::env::var_os("STOKE_TORCH_PYTHON").map(PathBuf::from);
    let usual = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/stoke-torch/bin/python"));
    named.or(usual).filter(|path| path.exists())
}
