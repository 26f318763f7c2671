//! What the death of a rank costs, through the `stoke` binary on three local nodes: from `kill -9` to the generation that goes on without it,
//! and to the one in which its successor owns lanes; then the same job once calm and once with a rank killed every 15 s (goodput: the time of
//! the calm run over that of the other).
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench recovery
//!
//! Times are the coordinator's, in milliseconds after the kill; the step that is done again is not in them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const NODES: usize = 3;
const KILLS: usize = 30;
const KILL_EVERY: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(60);
/// A job of half a minute that takes this long hangs.
const JOB_MAX: Duration = Duration::from_secs(300);

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_owned();
    let stoke = stoke_tests::binary::build(&root);
    let spec = root.join("jobs/specs/domains.toml");
    let cluster = Cluster::up(&stoke);
    latencies(&cluster, &spec);
    goodput(&cluster, &spec);
}

fn latencies(cluster: &Cluster<'_>, spec: &Path) {
    let job = cluster.submit(spec, 400);
    let (mut on, mut whole) = (Vec::new(), Vec::new());
    for kill in 0..KILLS {
        let members = cluster.members(&job);
        let (victim, others) = (members[kill % members.len()], members.len() - 1);
        let killed_ms = now_ms();
        kill_process(Pid::from_raw(victim as i32).expect("a process id"), Signal::KILL).expect("kill a rank");
        on.push(cluster.event(&job, killed_ms, "goes on at") - killed_ms);
        whole.push(cluster.event(&job, killed_ms, &format!(": {NODES} ranks")) - killed_ms);
        let left = cluster.members(&job);
        assert_eq!(members.iter().filter(|member| left.contains(member)).count(), others, "a survivor was restarted");
    }
    cluster.ask(&["cancel", &job]);
    println!("{KILLS} ranks killed, {NODES} nodes       median ms    p99 ms");
    print_row("to the generation that goes on", &mut on);
    print_row("to full strength again", &mut whole);
}

fn print_row(what: &str, values: &mut [f64]) {
    values.sort_by(f64::total_cmp);
    let at = |part: f64| values[((values.len() - 1) as f64 * part).round() as usize];
    println!("{what:<34} {:>9.0} {:>9.0}", at(0.5), at(0.99));
}

fn goodput(cluster: &Cluster<'_>, spec: &Path) {
    let calm = cluster.time(spec, None);
    let disturbed = cluster.time(spec, Some(KILL_EVERY));
    let (calm_s, disturbed_s) = (calm.0, disturbed.0);
    assert_eq!(calm.1, disturbed.1, "the same weights");
    println!(
        "goodput with a kill every {} s: {:.0}% ({disturbed_s:.1} s, calm {calm_s:.1} s), {} kills, the same weights",
        KILL_EVERY.as_secs(),
        100.0 * calm_s / disturbed_s,
        disturbed.2
    );
}

fn now_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64() * 1e3
}

/// A local cluster that is taken down when dropped.
struct Cluster<'a> {
    stoke: &'a Path,
    folder: tempfile::TempDir,
}

impl<'a> Cluster<'a> {
    fn up(stoke: &'a Path) -> Self {
        let cluster = Self { stoke, folder: tempfile::tempdir().expect("a temporary folder") };
        cluster.ask(&["up", "--nodes", &NODES.to_string()]);
        cluster
    }

    fn dir(&self) -> PathBuf {
        self.folder.path().join("c")
    }

    fn ask(&self, args: &[&str]) -> Value {
        let mut command = Command::new(self.stoke);
        let output = command.arg("--cluster").arg(self.dir()).args(args).arg("--json").output().expect("run stoke");
        assert!(output.status.success(), "stoke {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("one JSON document")
    }

    /// Submits and waits until all ranks train.
    fn submit(&self, spec: &Path, epochs: u32) -> String {
        let (spec, epochs) = (spec.to_str().expect("UTF-8"), format!("train.epochs={epochs}"));
        let answer = self.ask(&["submit", spec, "--ranks", &NODES.to_string(), "--set", &epochs]);
        let job = answer["job"].as_str().expect("a job").to_owned();
        self.event(&job, 0.0, "goes on at");
        job
    }

    /// When something was first noted of a job, after a time.
    fn event(&self, job: &str, after_ms: f64, words: &str) -> f64 {
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
    fn members(&self, job: &str) -> Vec<u32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let jobs = self.ask(&["jobs"]);
            let found = jobs["jobs"].as_array().and_then(|jobs| jobs.iter().find(|found| found["job"] == job));
            let world = found.and_then(|job| job["world_sizes"].as_array()?.last()?.as_u64());
            let ranks = self.ranks();
            if world == Some(NODES as u64) && ranks.len() == NODES {
                return ranks;
            }
            assert!(Instant::now() < deadline, "{job} does not come to full strength: {jobs:#}");
            std::thread::sleep(POLL);
        }
    }

    /// Children of this cluster's agents.
    fn ranks(&self) -> Vec<u32> {
        let dir = self.dir();
        let word = dir.to_str().expect("UTF-8");
        let processes = std::fs::read_dir("/proc").expect("list processes").flatten();
        let pids: Vec<u32> = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        let line = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let parent = |pid: u32| -> Option<u32> {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
        };
        let ours =
            |pid: &u32| line(*pid).contains("worker") && parent(*pid).is_some_and(|agent| line(agent).contains(word));
        pids.into_iter().filter(ours).collect()
    }

    /// Seconds of a whole job, its weights, and how many ranks were killed meanwhile.
    fn time(&self, spec: &Path, kill_every: Option<Duration>) -> (f64, Value, usize) {
        let begun = Instant::now();
        let job = self.submit(spec, 15);
        let (mut kills, mut killed) = (0, Instant::now());
        loop {
            let jobs = self.ask(&["jobs"]);
            let found = jobs["jobs"].as_array().and_then(|jobs| jobs.iter().find(|found| found["job"] == job.as_str()));
            let found = found.expect("the job is listed");
            if found["state"] == "succeeded" {
                return (begun.elapsed().as_secs_f64(), found["outcome"]["weights_blake3"].clone(), kills);
            }
            assert_ne!(found["state"], "failed", "{found:#}");
            assert!(begun.elapsed() < JOB_MAX, "{job} does not end: {found:#}");
            if kill_every.is_some_and(|every| killed.elapsed() >= every)
                && let Some(victim) = self.ranks().get(kills % NODES)
            {
                let _ = kill_process(Pid::from_raw(*victim as i32).expect("a process id"), Signal::KILL);
                (kills, killed) = (kills + 1, Instant::now());
            }
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        drop(Command::new(self.stoke).arg("--cluster").arg(self.dir()).arg("down").output());
    }
}
