//! Training `language` on two machines with a slow link between them, through the `stoke` binary and under PyTorch DDP over gloo, in turn in the same run: both
//! send gradients while backward computes others, ours encrypted. Samples a second, for links of several rates.
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench overlap
//!
//! The machines are network namespaces of this one (needs root), so that all ranks share its cores. Needs the Python that `jobs/reference/setup.sh` makes (or
//! STOKE_TORCH_PYTHON); without it, prints our figures only. STOKE_BENCH_ROUNDS, STOKE_BENCH_MBIT (a list with commas) replace the defaults.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use stoke_tests::namespaces::Namespaces;
use stoke_tests::report::{Figure, Row};

/// Two lanes: each rank has one, whose backward hides as much as it can.
const SETS: [&str; 2] = ["train.lanes=2", "train.batch=32"];
const STEPS: u64 = 60;
const PORT: u16 = 7878;
const DEADLINE: Duration = Duration::from_secs(60);

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_owned();
    let machines = match Namespaces::build(2) {
        Ok(machines) => machines,
        Err(why) => return println!("not measured: {why}"),
    };
    let stoke = stoke_tests::binary::build(&root);
    let spec = root.join("jobs/specs/language.toml");
    let python = python();
    if python.is_none() {
        println!("no PyTorch here (jobs/reference/setup.sh makes it): our figures only");
    }
    let cluster = Cluster::start(&stoke, &machines);
    println!("{:>8} {:>16} {:>16} {:>7}", "Mbit/s", "stoke samples/s", "torch samples/s", "ratio");
    let rounds = list("STOKE_BENCH_ROUNDS", &[3])[0];
    for mbit in list("STOKE_BENCH_MBIT", &[10_000, 1_000, 500]) {
        machines.limit(mbit).expect("tc, of iproute2");
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            ours.push(cluster.train(&spec));
            theirs.extend(python.as_deref().map(|python| torch(&root, &machines, python, &spec)));
        }
        let row = Row::new(format!("training, language, 2 machines, {mbit} Mbit/s"), "samples/s", &ours);
        let row = row.beside("PyTorch DDP, plain TCP", &theirs);
        let shown = |values: &[f64]| Figure::of(values).median;
        println!("{mbit:>8} {:>16.1} {:>16.1} {:>7.2}", shown(&ours), shown(&theirs), row.ratio().unwrap_or(f64::NAN));
        row.report();
    }
}

fn list(name: &str, usual: &[u32]) -> Vec<u32> {
    let Ok(given) = std::env::var(name) else { return usual.to_vec() };
    given.split(',').map(|word| word.parse().expect("numbers")).collect()
}

/// A coordinator on the first machine and a node on each, as on bare metal.
struct Cluster<'a> {
    stoke: &'a Path,
    machines: &'a Namespaces,
    processes: Vec<Child>,
    folder: tempfile::TempDir,
}

impl<'a> Cluster<'a> {
    fn start(stoke: &'a Path, machines: &'a Namespaces) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut cluster = Self { stoke, machines, processes: Vec::new(), folder };
        let address = format!("{}:{PORT}", Namespaces::address(0));
        let settings = format!(
            "dir = {:?}\nlisten = \"0.0.0.0:{PORT}\"\nadvertise = [{address:?}]\ncheckpoints = \"file://{}\"\n",
            cluster.path("head"),
            cluster.path("checkpoints")
        );
        std::fs::write(cluster.path("coordinator.toml"), settings).expect("written");
        cluster.serve(0, &["coordinator", "--config", &cluster.path("coordinator.toml")], Stdio::null());
        let all = |status: &Value, count| status["nodes"].as_array().is_some_and(|nodes| nodes.len() == count);
        cluster.wait_for(&["nodes"], |status| all(status, 0));
        for index in 0..2 {
            let (token, name) = (cluster.path(&format!("token-{index}")), format!("machine-{index}"));
            let written = Stdio::from(File::create(&token).expect("a file"));
            let mut create =
                cluster.command(0, &["token", "create", "--role", "node", "--cluster", &cluster.path("head")]);
            assert!(create.stdout(written).stderr(Stdio::null()).status().expect("run stoke").success());
            let node = ["node", "--join", "-", "--coordinator", &address, "--cpus", "1", "--name", &name];
            let folder = ["--dir", &cluster.path(&name)];
            cluster.serve(index, &[&node[..], &folder].concat(), File::open(&token).expect("written").into());
        }
        cluster.wait_for(&["nodes"], |status| all(status, 2));
        cluster
    }

    /// Samples a second, as rank 0 says when its steps are done.
    fn train(&self, spec: &Path) -> f64 {
        let (steps, every) = (format!("train.steps={STEPS}"), format!("checkpoint.every={STEPS}"));
        let mut arguments = vec!["submit", spec.to_str().expect("UTF-8"), "--ranks", "2", "--wait"];
        [&steps, &every].into_iter().map(String::as_str).chain(SETS).for_each(|set| arguments.extend(["--set", set]));
        let job = self.ask(&arguments).expect("the job succeeds")["job"].as_str().expect("a job").to_owned();
        let log = self.command(0, &["logs", &job, "--rank", "0", "--cluster", &self.path("head")]).output();
        let log = String::from_utf8(log.expect("run stoke").stdout).expect("UTF-8");
        let done = log.lines().find(|line| line.contains("steps done")).expect("it says so");
        let (_, rate) = done.split_once("samples_per_second=").expect("with its rate");
        rate.split_whitespace().next().and_then(|rate| rate.parse().ok()).expect("a number")
    }

    /// Asks again and again, up to the deadline.
    fn wait_for(&self, arguments: &[&str], is_there: impl Fn(&Value) -> bool) {
        let begun = Instant::now();
        while !self.ask(arguments).is_some_and(|answer| is_there(&answer)) {
            assert!(begun.elapsed() < DEADLINE, "the cluster starts");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn ask(&self, arguments: &[&str]) -> Option<Value> {
        let output = self.command(0, &[arguments, &["--json", "--cluster", &self.path("head")]].concat()).output();
        let output = output.expect("run stoke");
        output.status.success().then(|| serde_json::from_slice(&output.stdout).expect("one JSON object"))
    }

    /// A process that also ends if this one is killed.
    fn serve(&mut self, machine: u32, arguments: &[&str], input: Stdio) {
        let mut command = self.command(machine, &[arguments, &["--parent", &std::process::id().to_string()]].concat());
        let process = command.stdin(input).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.processes.push(process.expect("run stoke"));
    }

    fn command(&self, machine: u32, arguments: &[&str]) -> Command {
        let mut command = self.machines.command(machine, self.stoke);
        command.args(arguments).stdin(Stdio::null());
        command
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().expect("UTF-8").to_owned()
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        for process in self.processes.iter_mut().rev() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn torch(root: &Path, machines: &Namespaces, python: &Path, spec: &Path) -> f64 {
    let start = |rank: u32| {
        let mut command = machines.command(rank, python);
        command.arg(root.join("tests/benches/ddp.py")).arg(spec).arg(STEPS.to_string()).args(SETS);
        command.envs([("RANK", rank.to_string()), ("WORLD_SIZE", "2".into()), ("MASTER_PORT", "29617".into())]);
        command.envs([("MASTER_ADDR", Namespaces::address(0).to_string()), ("GLOO_SOCKET_IFNAME", "eth0".into())]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("run python")
    };
    let ranks: Vec<Child> = (0..2).map(start).collect();
    let outputs: Vec<_> = ranks.into_iter().map(|rank| rank.wait_with_output().expect("it ends")).collect();
    let said = String::from_utf8_lossy(&outputs[0].stdout);
    let line = said.lines().find(|line| line.starts_with('{')).expect("torch succeeds");
    let figures: Value = serde_json::from_str(line).expect("one JSON line");
    figures["samples_per_second"].as_f64().expect("a rate")
}

fn python() -> Option<PathBuf> {
    let named = std::env::var_os("STOKE_TORCH_PYTHON").map(PathBuf::from);
    let usual = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/stoke-torch/bin/python"));
    named.or(usual).filter(|path| path.exists())
}
