//! What every integration test stands on: the binary, commands with deadlines, clusters that end with the test, polling. Owns every process
//! that it starts, and ends them by id.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// For anything: a machine with two cores runs several clusters at once.
pub const LIMIT: Duration = Duration::from_secs(180);
const POLL_EVERY: Duration = Duration::from_millis(20);

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace")
}

pub fn spec(name: &str) -> PathBuf {
    root().join("jobs/specs").join(name)
}

/// The binary, built once if it is not there yet.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| stoke_tests::binary::build(root()))
}

/// A command with nothing of the caller's in its environment that could lead it to another cluster.
pub fn stoke<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(binary());
    command.args(arguments).stdin(Stdio::null()).current_dir(home());
    for name in ["STOKE_CLUSTER", "RUST_LOG"] {
        command.env_remove(name);
    }
    command.env("XDG_DATA_HOME", home());
    command
}

/// A folder in place of the user's own; the tests' default cluster is never the machine's.
fn home() -> &'static Path {
    static HOME: OnceLock<TempDir> = OnceLock::new();
    HOME.get_or_init(|| tempfile::tempdir().expect("a temporary folder")).path()
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// The one document on stdout.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("stdout is no JSON document: {error}\n{self:#?}"))
    }

    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "{self:#?}");
        self
    }

    /// Stderr says all of these.
    #[track_caller]
    pub fn says(self, words: &[&str]) -> Self {
        for word in words {
            assert!(self.stderr.contains(word), "stderr does not say {word:?}: {self:#?}");
        }
        self
    }
}

/// A command that runs; killed when it is dropped.
pub struct Background {
    child: Child,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
}

impl Background {
    #[track_caller]
    pub fn start(mut command: Command) -> Self {
        Self::of(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command starts"))
    }

    /// One that a test has started itself, to read what it says while it runs.
    pub fn of(mut child: Child) -> Self {
        let stdout = child.stdout.take().map(read_all);
        let stderr = child.stderr.take().map(read_all);
        Self { child, stdout, stderr }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    #[track_caller]
    pub fn wait(mut self) -> Ended {
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("the child can be watched") {
                break status;
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                panic!("no end after {LIMIT:?}: {:#?}", self.output(ExitStatus::default()));
            }
            thread::sleep(POLL_EVERY);
        };
        self.output(status)
    }

    fn output(&mut self, status: ExitStatus) -> Ended {
        let text = |reader: Option<JoinHandle<String>>| {
            reader.map(|reader| reader.join().expect("a reader")).unwrap_or_default()
        };
        Ended { status, stdout: text(self.stdout.take()), stderr: text(self.stderr.take()) }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_all(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Runs a command to its end.
#[track_caller]
pub fn run<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Ended {
    Background::start(stoke(arguments)).wait()
}

/// The same with lines on its standard input.
#[track_caller]
pub fn run_with_input<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>, input: &str) -> Ended {
    let mut file = tempfile::tempfile().expect("a temporary file");
    std::io::Write::write_all(&mut file, input.as_bytes()).expect("written");
    std::io::Seek::rewind(&mut file).expect("rewound");
    let mut command = stoke(arguments);
    command.stdin(file);
    Background::start(command).wait()
}

/// Asks until there is an answer.
#[track_caller]
pub fn poll<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        thread::sleep(POLL_EVERY);
    }
}

/// A Python that has these packages of PyPI and can import `modules`, made once below the user's cache. None, and said why, where they cannot be had.
pub fn python_with(name: &str, packages: &[&str], modules: &str) -> Option<PathBuf> {
    // Two tests may want the same one at once.
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = std::env::home_dir()?.join(".cache/stoke-tests").join(name);
    let python = folder.join("bin/python");
    let have = || Command::new(&python).args(["-c", &format!("import {modules}")]).output();
    if have().is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    let made = Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder).output();
    let installed =
        made.and_then(|_| Command::new(&python).args(["-m", "pip", "install", "-q"]).args(packages).output());
    let why = match installed {
        Ok(output) if output.status.success() => return Some(python),
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(error) => error.to_string(),
    };
    // Past the capture of the test runner: nobody should take this for a test that was done.
    writeln!(std::io::stderr(), "not tested with {}: {why}", packages.join(", ")).expect("stderr");
    None
}

pub fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.cast_signed()).expect("a process id");
    kill_process(pid, signal).expect("the process takes the signal");
}

/// Command lines of running processes that name `word`, with their ids.
pub fn processes_naming(word: &str) -> Vec<(u32, String)> {
    let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let lines = ids.filter_map(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some((pid, String::from_utf8_lossy(&line).replace('\0', " ")))
    });
    lines.filter(|(_, line)| line.contains(word)).collect()
}

/// A cluster of this machine that is gone when this is dropped, or when the tests end in any other way.
pub struct Cluster {
    dir: PathBuf,
    supervisor: Child,
    _lifeline: ChildStdin,
    /// Keeps the pipe: a supervisor whose notices nobody reads must not be stopped by that.
    _notices: BufReader<std::process::ChildStdout>,
    _parent: TempDir,
}

impl Cluster {
    pub fn start(nodes: u32) -> Self {
        let parent = tempfile::tempdir().expect("a temporary folder");
        Self::start_in(parent, nodes)
    }

    /// In a folder that the test has prepared.
    pub fn start_in(parent: TempDir, nodes: u32) -> Self {
        Self::start_with(parent, nodes, &[])
    }

    /// The same with further options of the supervisor.
    pub fn start_with(parent: TempDir, nodes: u32, more: &[&str]) -> Self {
        let dir = parent.path().join("cluster");
        let mut command = stoke(["supervise", "--nodes", &nodes.to_string(), "--listen", "127.0.0.1:0", "--lifeline"]);
        let mut supervisor = command
            .args(more)
            .arg("--dir")
            .arg(&dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the supervisor starts");
        let lifeline = supervisor.stdin.take().expect("a pipe");
        let mut notices = BufReader::new(supervisor.stdout.take().expect("a pipe"));
        let mut line = String::new();
        notices.read_line(&mut line).expect("the supervisor speaks");
        let notice: Value = serde_json::from_str(&line).unwrap_or_default();
        assert_eq!(notice["event"], "ready", "the cluster does not come up: {line}");
        Self { dir, supervisor, _lifeline: lifeline, _notices: notices, _parent: parent }
    }

    /// One cluster with two nodes for all tests that leave it as they found it.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Cluster> = OnceLock::new();
        SHARED.get_or_init(|| Self::start(2))
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What starts its processes again.
    pub fn supervisor(&self) -> u32 {
        self.supervisor.id()
    }

    /// A command of this cluster's admin.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = stoke(["--cluster"]);
        command.arg(&self.dir).args(arguments);
        command
    }

    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> Ended {
        Background::start(self.command(arguments)).wait()
    }

    /// The answer of a command that succeeds.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let arguments = [arguments, &["--json"]].concat();
        self.run(&arguments).expect(0).json()
    }

    /// Addresses and process ids.
    pub fn state(&self) -> Value {
        let text = std::fs::read_to_string(self.dir.join("local.json")).expect("local.json");
        serde_json::from_str(&text).expect("local.json is JSON")
    }

    pub fn address(&self) -> String {
        self.state()["address"].as_str().expect("an address").to_owned()
    }

    /// A token's text.
    #[track_caller]
    pub fn token(&self, role: &str) -> String {
        text(&self.json(&["token", "create", "--role", role])["text"])
    }

    /// Credentials of a user with this role, and its name, below `homes`.
    #[track_caller]
    pub fn login(&self, homes: &TempDir, role: &str) -> User {
        let dir = homes.path().join(role).to_str().expect("UTF-8").to_owned();
        let arguments = ["--cluster", &dir, "login", "--join", "-", "--name", role, "--coordinator", &self.address()];
        run_with_input(arguments, &self.token(role)).expect(0);
        User { dir }
    }

    /// Submits a short job: the digits, `steps` steps.
    #[track_caller]
    pub fn submit(&self, steps: u64, more: &[&str]) -> String {
        let (spec, steps) = (spec("digits.toml"), format!("train.steps={steps}"));
        let arguments = [&["submit", spec.to_str().expect("UTF-8"), "--set", &steps][..], more].concat();
        text(&self.json(&arguments)["job"])
    }

    /// One job as `stoke jobs` shows it.
    #[track_caller]
    pub fn job(&self, job: &str) -> Value {
        let jobs = self.json(&["jobs"]);
        let found = jobs["jobs"].as_array().into_iter().flatten().find(|view| view["job"] == job);
        found.unwrap_or_else(|| panic!("{job} is not among {jobs}")).clone()
    }

    #[track_caller]
    pub fn wait_for_state(&self, job: &str, state: &str) -> Value {
        poll(&format!("{job} {state}"), || {
            let view = self.job(job);
            let over = ["succeeded", "failed", "cancelled"].contains(&view["state"].as_str().unwrap_or_default());
            assert!(view["state"] == state || !over, "{job} will not be {state}: {view:#}");
            (view["state"] == state).then_some(view)
        })
    }
}

/// Somebody who has joined a cluster.
pub struct User {
    pub dir: String,
}

impl User {
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> Ended {
        run([&["--cluster", &self.dir], arguments].concat())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = Pid::from_raw(self.supervisor.id().cast_signed()).map(|pid| kill_process(pid, Signal::TERM));
        let _ = self.supervisor.wait();
    }
}

/// A JSON string without its quotes.
#[track_caller]
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

/// `stoke run` of a spec, with a short plan.
pub struct Run {
    pub scratch: TempDir,
    command: Command,
}

impl Run {
    pub fn new(spec_name: &str, nodes: u32) -> Self {
        let scratch = tempfile::tempdir().expect("a temporary folder");
        let mut command = stoke(["run", "--json", "--nodes", &nodes.to_string()]);
        command.arg(spec(spec_name)).arg("--out").arg(scratch.path().join("out"));
        // So that a test finds the folder of the throwaway cluster.
        std::fs::create_dir(scratch.path().join("tmp")).expect("a folder");
        command.env("TMPDIR", scratch.path().join("tmp"));
        Self { scratch, command }
    }

    pub fn set(mut self, key: &str, value: impl std::fmt::Display) -> Self {
        self.command.arg("--set").arg(format!("{key}={value}"));
        self
    }

    pub fn with(mut self, arguments: &[&str]) -> Self {
        self.command.args(arguments);
        self
    }

    /// A variable of the command, and so of its agents.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// As the last arguments of another command.
    pub fn under(self, program: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(program);
        command.args(arguments).arg(self.command.get_program()).args(self.command.get_args());
        command.stdin(Stdio::null()).current_dir(home());
        for (name, value) in self.command.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        Self { command, ..self }
    }

    pub fn start(self) -> (Background, TempDir) {
        (Background::start(self.command), self.scratch)
    }

    /// The summary of a run that succeeds, and the folder with its checkpoints.
    #[track_caller]
    pub fn finish(self) -> (Value, TempDir) {
        let (running, scratch) = self.start();
        (running.wait().expect(0).json(), scratch)
    }
}

/// The throwaway cluster of a run that goes on.
pub fn cluster_of(scratch: &TempDir) -> PathBuf {
    poll("the run's cluster", || {
        let entries = std::fs::read_dir(scratch.path().join("tmp")).ok()?;
        let dirs = entries.flatten().map(|entry| entry.path());
        dirs.into_iter().find(|dir| dir.join("coordinator/admin/cluster.toml").exists())
    })
}

/// The folder of a run's checkpoint at `step`, committed by its first generation.
#[track_caller]
pub fn checkpoint_at(scratch: &TempDir, step: u64) -> PathBuf {
    let out = scratch.path().join("out");
    let jobs = std::fs::read_dir(&out).expect("the run's output").flatten().map(|entry| entry.path());
    let name = format!("step-{step:08}-g1");
    let found = jobs.map(|job| job.join(&name)).find(|folder| folder.join("manifest.json").exists());
    found.unwrap_or_else(|| panic!("no {name} under {}", out.display()))
}

/// The newest step of the one job of a cluster, while it is there.
pub fn step_of(cluster: &Path) -> Option<u64> {
    let mut command = stoke(["--json", "jobs", "--cluster"]);
    command.arg(cluster);
    let ended = Background::start(command).wait();
    let jobs: Value = serde_json::from_str(&ended.stdout).ok()?;
    jobs["jobs"][0]["progress"]["step"].as_u64()
}

/// The id of a process of a local cluster.
pub fn process_of(cluster: &Path, name: &str) -> u32 {
    poll(&format!("a {name}"), || {
        let state: Value = serde_json::from_slice(&std::fs::read(cluster.join("local.json")).ok()?).ok()?;
        let process = state["processes"].as_array()?.iter().find(|process| process["name"] == name)?;
        process["pid"].as_u64().filter(|pid| *pid > 0).and_then(|pid| u32::try_from(pid).ok())
    })
}

/// The records of an agent's ranks, as it keeps them in its folder.
pub fn records(node: &Path) -> Vec<Value> {
    let entries = std::fs::read_dir(node.join("ranks")).into_iter().flatten().flatten();
    let files = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "json"));
    files.filter_map(|path| serde_json::from_slice(&std::fs::read(path).ok()?).ok()).collect()
}

/// The process of the one rank on a node.
pub fn rank_on(node: &Path) -> u32 {
    poll("a rank on the node", || records(node).first()?["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()))
}
