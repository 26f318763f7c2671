//! The coordinator that dies, or whose disk fails, at each system call that touches its folder (F7, F20): real calls, chosen by strace.
//!
//! A killed process leaves its page cache to the kernel: what a power cut loses besides is the simulator's lying disk. Without strace or the
//! right to trace these tests say so and pass.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{LIMIT, processes_naming, signal, spec, stoke, text};

/// The calls that change a folder: redb's, and those that the authority and the credentials are written with.
const CALLS: &str = "pwrite64,fdatasync,fsync,ftruncate,rename,renameat,renameat2";
/// A sweep ends where a session outlives its fault; one that needs more than this does not end.
const CALLS_MAX: u32 = 400;
/// Submissions of a session: with the start more entries than there are between two snapshots.
const SUBMISSIONS: usize = 3;
const SNAPSHOT_ENTRIES: u32 = 3;

#[test]
fn a_coordinator_killed_at_any_call_of_its_first_start_founds_its_cluster_at_the_next() {
    if !can_trace() {
        return;
    }
    for call in 1..CALLS_MAX {
        let folder = Folder::new();
        let mut first = folder.start(Some(&format!("{CALLS}:signal=KILL:when={call}")));
        let listened = first.listens();
        drop(first);
        let mut second = folder.start(None);
        assert!(second.listens(), "killed at call {call}, it does not start again: {}", second.stderr());
        assert_eq!(folder.submit(&mut second, "key"), Some("job-1".into()), "killed at call {call}");
        if listened {
            assert!(call > 10, "no fault was met");
            return;
        }
    }
    panic!("the first start makes more than {CALLS_MAX} calls");
}

#[test]
fn a_coordinator_killed_at_any_call_of_a_commit_keeps_what_it_acknowledged() {
    sweep(CALLS, "signal=KILL", |_, _| {});
}

#[test]
fn a_coordinator_whose_sync_fails_ends_with_the_reason_and_keeps_what_it_acknowledged() {
    sweep("fdatasync", "error=EIO", |code, stderr| {
        assert_eq!(code, Some(1), "{stderr}");
        assert!(stderr.contains("journal") && stderr.contains("Input/output error"), "{stderr}");
    });
}

/// One session a call, all in one folder: start, submissions, an orderly stop. `ended` looks at how a session ended whose fault came before the stop.
fn sweep(calls: &str, fault: &str, ended: impl Fn(Option<i32>, &str)) {
    if !can_trace() {
        return;
    }
    let folder = Folder::new();
    let mut jobs = BTreeSet::new();
    for call in 1..CALLS_MAX {
        let mut session = folder.start(Some(&format!("{calls}:{fault}:when={call}")));
        let keys: Vec<String> = (0..SUBMISSIONS).map(|number| format!("{call}-{number}")).collect();
        let mut unknown = None;
        if session.listens() {
            for key in &keys {
                let Some(job) = folder.submit(&mut session, key) else {
                    unknown = Some(key);
                    break;
                };
                assert!(jobs.insert(job), "call {call}: an acknowledged job was forgotten and its id given again");
            }
        }
        let outlived = session.is_up();
        let outlived_stop = outlived && session.stop() == Some(0);
        if !outlived {
            let code = session.wait();
            ended(code, &session.stderr());
        }
        drop(session);
        folder.check(&mut jobs, unknown, call);
        if outlived_stop {
            assert!(call > 10, "no fault was met");
            return;
        }
    }
    panic!("a session makes more than {CALLS_MAX} calls");
}

pub fn can_trace() -> bool {
    let traced = Command::new("strace").args(["-f", "-qq", "-o", "/dev/null", "true"]).status();
    let can = traced.is_ok_and(|status| status.success());
    if !can {
        eprintln!("not checked: strace is not installed, or this machine does not let it trace");
    }
    can
}

/// A coordinator's folder.
struct Folder {
    parent: TempDir,
}

impl Folder {
    fn new() -> Self {
        let parent = tempfile::tempdir().expect("a temporary folder");
        let dir = parent.path().join("coordinator");
        let settings = format!("dir = {dir:?}\nlisten = \"127.0.0.1:0\"\nsnapshot_entries = {SNAPSHOT_ENTRIES}\n");
        std::fs::write(parent.path().join("settings.toml"), settings).expect("written");
        Self { parent }
    }

    /// With a fault of strace's, or without.
    fn start(&self, fault: Option<&str>) -> Session {
        let settings = self.parent.path().join("settings.toml");
        let plain = stoke(["--json", "coordinator", "--config", settings.to_str().expect("UTF-8")]);
        let mut command = match fault {
            None => plain,
            Some(fault) => {
                let mut traced = Command::new("strace");
                // Not with --seccomp-bpf: strace 6.1 then injects no signal.
                let traces = format!("trace={CALLS}");
                traced.args(["-f", "-qq", "-o", "/dev/null", "-e", &traces]);
                traced.arg("-e").arg(format!("inject={fault}"));
                traced.arg(plain.get_program()).args(plain.get_args()).stdin(Stdio::null());
                traced
            }
        };
        let log = tempfile::NamedTempFile::new_in(self.parent.path()).expect("a file");
        let stderr = log.reopen().expect("the file opens again");
        let child = command.stdout(Stdio::piped()).stderr(stderr).spawn().expect("the coordinator starts");
        Session { child, log, word: settings.to_str().expect("UTF-8").to_owned() }
    }

    /// The job, if the submission was acknowledged before the coordinator ended.
    fn submit(&self, session: &mut Session, key: &str) -> Option<String> {
        let spec = spec("digits.toml");
        let arguments = ["--json", "submit", spec.to_str().expect("UTF-8"), "--key", key];
        let mut client = self.client(&arguments);
        let deadline = Instant::now() + LIMIT;
        let mut succeeded = false;
        while session.is_up() {
            if let Some(status) = client.try_wait().expect("the client can be watched") {
                succeeded = status.success();
                break;
            }
            assert!(Instant::now() < deadline, "no answer to {key}");
            std::thread::sleep(Duration::from_millis(2));
        }
        // Without its coordinator it would ask again and again; what it has said counts.
        let _ = client.kill();
        let _ = client.wait();
        let answer: Option<Value> = serde_json::from_str(&said(&mut client)).ok();
        assert!(!succeeded || answer.is_some(), "{key}: acknowledged without a job");
        answer.filter(|answer| !answer["job"].is_null()).map(|answer| text(&answer["job"]))
    }

    fn jobs(&self, session: &Session) -> Vec<Value> {
        let mut client = self.client(&["--json", "jobs"]);
        let answer = said(&mut client);
        let told = client.wait().expect("the client ends").success();
        assert!(told, "the jobs are not told: {answer}\n{}", session.stderr());
        let mut answer: Value = serde_json::from_str(&answer).expect("JSON");
        answer["jobs"].as_array_mut().expect("jobs").drain(..).collect()
    }

    fn client(&self, arguments: &[&str]) -> Child {
        let mut command = stoke(["--cluster"]);
        command.arg(self.parent.path().join("coordinator")).args(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("stoke starts")
    }

    /// Recovers without a fault (the hash chain is verified at each start) and looks at the jobs: every acknowledged one once, and one whose
    /// submission was cut short whole or not at all.
    fn check(&self, jobs: &mut BTreeSet<String>, unknown: Option<&String>, call: u32) {
        let mut session = self.start(None);
        assert!(session.listens(), "call {call}: no start afterwards: {}", session.stderr());
        let found = self.jobs(&session);
        for job in &found {
            let words = ["name", "state", "owner", "trainer"].map(|field| job[field].as_str().unwrap_or_default());
            assert_eq!(words, ["digits", "queued", "admin", "digits"], "call {call}: half a job");
        }
        let ids: BTreeSet<String> = found.iter().map(|job| text(&job["job"])).collect();
        assert_eq!(ids.len(), found.len(), "call {call}: a job twice");
        assert!(jobs.is_subset(&ids), "call {call}: lost {:?}", jobs.difference(&ids));
        let more: Vec<&String> = ids.difference(jobs).collect();
        assert!(more.len() <= usize::from(unknown.is_some()), "call {call}: nobody submitted {more:?}");
        if let Some(key) = unknown {
            // The same key again is the same job.
            let job = self.submit(&mut session, key).expect("acknowledged");
            assert!(more.first().is_none_or(|there| **there == job), "call {call}: {key} is {more:?} and {job}");
            jobs.insert(job);
        }
        assert_eq!(session.stop(), Some(0), "{}", session.stderr());
    }
}

/// A coordinator that runs, maybe under strace; killed when this is dropped.
struct Session {
    child: Child,
    log: tempfile::NamedTempFile,
    /// In its command line and in no other's.
    word: String,
}

impl Session {
    /// Waits until it listens; false if it ended instead.
    fn listens(&mut self) -> bool {
        let mut line = String::new();
        let stdout = self.child.stdout.as_mut().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("read");
        // One that does not start says that on stdout too.
        line.contains("\"address\"")
    }

    fn is_up(&mut self) -> bool {
        self.child.try_wait().expect("the coordinator can be watched").is_none()
    }

    /// Stops it as a person would; the exit code.
    fn stop(&mut self) -> Option<i32> {
        self.coordinators().into_iter().for_each(|pid| signal(pid, Signal::TERM));
        self.wait()
    }

    /// Its processes, without strace, which ends after them.
    fn coordinators(&self) -> Vec<u32> {
        let named = processes_naming(&self.word).into_iter().filter(|(_, line)| !line.starts_with("strace"));
        named.map(|(pid, _)| pid).collect()
    }

    fn wait(&mut self) -> Option<i32> {
        self.child.wait().expect("the coordinator ends").code()
    }

    fn stderr(&self) -> String {
        std::fs::read_to_string(self.log.path()).expect("its log")
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Not strace: a process that is about to die has no name any more and its locks still, and only strace waits for its end.
        for pid in self.coordinators() {
            let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("a process id");
            // It may just have ended.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

fn said(client: &mut Child) -> String {
    let mut said = String::new();
    client.stdout.as_mut().expect("a pipe").read_to_string(&mut said).expect("UTF-8");
    said
}
