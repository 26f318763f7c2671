//! A disk that takes seconds for each sync, under the journal (F18): real calls, held back by strace. Without strace or the right to trace this
//! says so and passes.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{Cluster, poll, process_of, signal, spec};

/// A commit makes two of them: whatever waits for the disk is later than the lease and grace of a node (4 s), and most answers come before a
/// client gives up (10 s).
const SYNC: Duration = Duration::from_millis(2_200);
/// The clients that ask meanwhile.
const SUBMISSIONS: usize = 3;

#[test]
fn a_disk_that_takes_seconds_makes_submissions_wait_and_loses_neither_a_node_nor_a_step() {
    let cluster = Cluster::start(2);
    let job = cluster.submit(1_000_000, &["--ranks", "2"]);
    cluster.wait_for_state(&job, "running");
    let step = || cluster.job(&job)["progress"]["step"].as_u64();
    let before = poll("a first step", step);
    let Some(slow) = Slow::begin(process_of(cluster.dir(), "coordinator")) else {
        return eprintln!("not checked: strace is not installed, or this machine does not let it trace");
    };
    let keys: Vec<String> = (0..SUBMISSIONS).map(|number| format!("slow-{number}")).collect();
    for key in &keys {
        let asked = Instant::now();
        let spec = spec("digits.toml");
        let submission = ["submit", spec.to_str().expect("UTF-8"), "--set", "resources.cpus=100000", "--key", key];
        answer(&cluster, &submission);
        assert!(asked.elapsed() >= SYNC, "{key}: acknowledged after {:?}, before the disk had it", asked.elapsed());
        let status = answer(&cluster, &["status"]);
        assert_eq!(status["nodes_up"], 2, "{status:#}");
    }
    drop(slow);
    poll("steps", || (step() > Some(before)).then_some(()));
    let view = cluster.job(&job);
    assert_eq!((&view["generation"], &view["recoveries"]), (&1.into(), &0.into()), "a node was lost: {view:#}");
    // Each of them once.
    assert_eq!(cluster.json(&["jobs"])["jobs"].as_array().map(Vec::len), Some(1 + SUBMISSIONS));
    cluster.run(&["cancel", &job]).expect(0);
    cluster.wait_for_state(&job, "cancelled");
}

/// Asks again where the answer did not come within a client's deadline, which it is told: the same key is the same job.
fn answer(cluster: &Cluster, question: &[&str]) -> Value {
    let question = [question, &["--json"]].concat();
    poll("an answer", || {
        let ended = cluster.run(&question);
        assert!([0, 5].contains(&ended.code()), "{ended:#?}");
        (ended.code() == 0).then(|| ended.json())
    })
}

/// strace on a process that runs; it is let go when this is dropped.
struct Slow(Child);

impl Slow {
    /// None where it cannot be traced.
    fn begin(pid: u32) -> Option<Self> {
        let delay = format!("inject=fdatasync:delay_enter={}", SYNC.as_micros());
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", &delay, "-p", &pid.to_string()]);
        let mut child = strace.stdin(Stdio::null()).stderr(Stdio::null()).spawn().ok()?;
        let traced = || std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let attached = poll("strace", || match child.try_wait() {
            Ok(None) => (!traced().contains("TracerPid:\t0")).then_some(true),
            Ok(Some(_)) | Err(_) => Some(false),
        });
        attached.then_some(Self(child))
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        signal(self.0.id(), Signal::INT);
        let _ = self.0.wait();
    }
}
