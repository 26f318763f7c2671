//! A local cluster that benches drive through the `stoke` binary: up, submit, look, down. Owns its folder; whom a bench kills is its own affair.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const POLL: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(60);

/// Taken down when dropped.
pub struct LocalCluster<'a> {
    stoke: &'a Path,
    nodes: usize,
    folder: tempfile::TempDir,
}

impl<'a> LocalCluster<'a> {
    /// With more arguments for `stoke up`.
    pub fn up(stoke: &'a Path, nodes: usize, more: &[&str]) -> Self {
        let cluster = Self { stoke, nodes, folder: tempfile::tempdir().expect("a temporary folder") };
        let nodes = nodes.to_string();
        cluster.ask(&[&["up", "--nodes", &nodes], more].concat());
        cluster
    }

    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("c")
    }

    pub fn ask(&self, args: &[&str]) -> Value {
        let mut command = Command::new(self.stoke);
        let output = command.arg("--cluster").arg(self.dir()).args(args).arg("--json").output().expect("run stoke");
        assert!(output.status.success(), "stoke {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("one JSON document")
    }

    /// Submits with a rank a node and these settings, and waits until all ranks train.
    pub fn submit(&self, spec: &Path, settings: &[String]) -> String {
        let ranks = self.nodes.to_string();
        let mut args = vec!["submit", spec.to_str().expect("UTF-8"), "--ranks", &ranks];
        settings.iter().for_each(|setting| args.extend(["--set", setting]));
        let job = self.ask(&args)["job"].as_str().expect("a job").to_owned();
        self.event(&job, 0.0, "goes on at");
        job
    }

    /// What `stoke jobs` tells of a job.
    pub fn job(&self, job: &str) -> Value {
        let jobs = self.ask(&["jobs"]);
        let found = jobs["jobs"].as_array().and_then(|jobs| jobs.iter().find(|found| found["job"] == job));
        found.expect("the job is listed").clone()
    }

    /// When something was first noted of a job, after a time, in milliseconds of the coordinator's clock.
    pub fn event(&self, job: &str, after_ms: f64, words: &str) -> f64 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let explained = self.ask(&["explain", job]);
            let events = explained["events"].as_array().expect("events");
            let at = |event: &Value| event["at_ms"].as_f64().filter(|at| *at >= after_ms.floor());
            let noted = |event: &&Value| event["text"].as_str().is_some_and(|text| text.contains(words));
            if let Some(at) = events.iter().filter(noted).find_map(at) {
                return at;
            }
            assert!(Instant::now() < deadline, "{words:?} was not noted of {job}: {explained:#}");
            std::thread::sleep(POLL);
        }
    }

    /// Processes of the ranks, when all are there.
    pub fn members(&self, job: &str) -> Vec<u32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.job(job);
            let world = found["world_sizes"].as_array().and_then(|sizes| sizes.last()?.as_u64());
            let ranks = self.ranks();
            if world == Some(self.nodes as u64) && ranks.len() == self.nodes {
                return ranks;
            }
            assert!(Instant::now() < deadline, "{job} does not come to full strength: {found:#}");
            std::thread::sleep(POLL);
        }
    }

    /// Children of this cluster's agents.
    pub fn ranks(&self) -> Vec<u32> {
        let agents: Vec<u32> = (1..=self.nodes).flat_map(|node| self.agent(node)).collect();
        let ours = |pid: &u32| line(*pid).contains("worker") && parent(*pid).is_some_and(|pid| agents.contains(&pid));
        processes().into_iter().filter(ours).collect()
    }

    /// The process of a node's agent, by the node's number from 1.
    pub fn agent(&self, node: usize) -> Option<u32> {
        let dir = self.dir().join(format!("node-{node}"));
        let word = dir.to_str().expect("UTF-8").to_owned();
        processes().into_iter().find(|pid| {
            let line = line(*pid);
            line.contains("\0node\0") && line.split('\0').any(|argument| argument == word)
        })
    }

    /// The process that starts agents again.
    pub fn supervisor(&self) -> u32 {
        let dir = self.dir();
        let word = dir.to_str().expect("UTF-8");
        let ours = |pid: &u32| {
            let line = line(*pid);
            line.contains("\0supervise\0") && line.split('\0').any(|argument| argument == word)
        };
        processes().into_iter().find(ours).expect("a supervisor")
    }
}

impl Drop for LocalCluster<'_> {
    fn drop(&mut self) {
        drop(Command::new(self.stoke).arg("--cluster").arg(self.dir()).arg("down").output());
    }
}

/// One of our own processes; it may be gone already.
pub fn signal(pid: u32, signal: Signal) {
    let _gone = kill_process(Pid::from_raw(pid as i32).expect("a process id"), signal);
}

pub fn children(pid: u32) -> Vec<u32> {
    processes().into_iter().filter(|child| parent(*child) == Some(pid)).collect()
}

pub fn now_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64() * 1e3
}

/// A value of those below so large a part of the others.
pub fn quantile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * part).round() as usize]
}

fn processes() -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").expect("list processes").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Its arguments, with a zero after each.
fn line(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default()
}

fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}
