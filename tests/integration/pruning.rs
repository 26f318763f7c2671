//! Which checkpoints stay: pins, prunes, who may ask for them, and what is left in the store.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use serde_json::Value;

use crate::crash_points::can_trace;
use crate::harness::{Cluster, poll, process_of, signal, text};
use crate::recovery::rank_of;

/// More steps than any test waits for.
const LONG: u64 = 1_000_000;

fn steps(views: &Value) -> Vec<u64> {
    views.as_array().expect("a list").iter().map(|view| view["step"].as_u64().expect("a step")).collect()
}

fn listed(cluster: &Cluster, job: &str) -> Value {
    cluster.json(&["checkpoint", "list", job])["checkpoints"].clone()
}

fn folder(view: &Value) -> PathBuf {
    let uri = text(&view["uri"]);
    Path::new(uri.strip_prefix("file://").expect("a file URI")).to_owned()
}

fn told(cluster: &Cluster, job: &str) -> String {
    cluster.run(&["explain", job]).expect(0).stdout
}

#[track_caller]
fn gone(folder: &Path) {
    poll(&format!("{} removed", folder.display()), || (!folder.exists()).then_some(()));
}

/// As a rank that was killed leaves it.
fn half_a_shard(folder: &Path) {
    std::fs::create_dir_all(folder).expect("a folder");
    std::fs::write(folder.join("shard-0-of-2.safetensors"), "half of a shard").expect("a file");
}

/// A job that has ended, with checkpoints at 2, 4 and 6.
#[track_caller]
fn ended(cluster: &Cluster) -> String {
    let job = cluster.submit(6, &["--ranks", "1", "--set", "checkpoint.every=2"]);
    cluster.wait_for_state(&job, "succeeded");
    assert_eq!(steps(&listed(cluster, &job)), [2, 4, 6]);
    job
}

#[test]
fn a_pinned_checkpoint_outlasts_keep_and_prunes_until_it_is_unpinned() {
    let cluster = Cluster::start(1);
    let job = cluster.submit(LONG, &["--ranks", "1", "--set", "checkpoint.every=2", "--set", "checkpoint.keep=2"]);
    // The newest may be one too many before it is pinned.
    let pinned = poll("a pin", || {
        let newest = steps(&listed(&cluster, &job)).pop()?;
        let ended = cluster.run(&["checkpoint", "pin", &job, &newest.to_string(), "--json"]);
        (ended.code() == 0).then(|| ended.json())
    });
    assert_eq!(pinned["pinned"], true);
    let step = pinned["step"].as_u64().expect("a step");
    poll("two newer ones, twice over", || {
        let steps = steps(&listed(&cluster, &job));
        assert!(steps.contains(&step) && steps.len() <= 3, "{step} is pinned: {steps:?}");
        (steps.last() >= Some(&(step + 8))).then_some(())
    });
    cluster.run(&["cancel", &job]).expect(0);
    cluster.wait_for_state(&job, "cancelled");
    let before = listed(&cluster, &job);
    assert_eq!((before[0]["pinned"].clone(), before[1]["pinned"].clone()), (true.into(), false.into()));
    let [oldest, going, newest] = &steps(&before)[..] else { panic!("three stay: {before:#}") };
    // Told, and not done.
    let told_only = cluster.json(&["checkpoint", "prune", &job, "--keep", "1", "--dry-run"]);
    assert_eq!((steps(&told_only["removed"]), steps(&told_only["kept"])), (vec![*going], vec![*oldest, *newest]));
    assert_eq!(listed(&cluster, &job), before);
    assert!(folder(&before[1]).join("manifest.json").exists());
    // Done.
    let done = cluster.json(&["checkpoint", "prune", &job, "--keep", "1"]);
    assert_eq!((&done["removed"], &done["kept"]), (&told_only["removed"], &told_only["kept"]));
    assert_eq!(listed(&cluster, &job), done["kept"]);
    gone(&folder(&before[1]));
    // What was being stored at the cancel may go with it.
    poll("news of it", || told(&cluster, &job).contains("removed pruned checkpoints").then_some(()));
    for view in [&before[0], &before[2]] {
        cluster.run(&["checkpoint", "verify", &text(&view["uri"])]).expect(0);
    }
    // The same again changes nothing.
    let again = cluster.json(&["checkpoint", "prune", &job, "--keep", "1"]);
    assert_eq!((steps(&again["removed"]), &again["kept"]), (vec![], &done["kept"]));
    for _ in 0..2 {
        let unpinned = cluster.json(&["checkpoint", "unpin", &job, &step.to_string()]);
        assert_eq!((&unpinned["pinned"], &unpinned["step"]), (&false.into(), &step.into()));
    }
    let summary = cluster.run(&["checkpoint", "prune", &job, "--keep", "1"]).expect(0).stdout;
    assert!(summary.contains(&format!("1 checkpoint of {job} removed")) && summary.contains("1 stay"), "{summary}");
    gone(&folder(&before[0]));
    assert_eq!(steps(&listed(&cluster, &job)), [*newest]);
    // What a job that is over has begun and never committed goes too, whenever it is asked for, and of one that has committed nothing.
    for _ in 0..2 {
        let left = folder(&before[2]).with_file_name("step-00999999-g7");
        half_a_shard(&left);
        cluster.run(&["checkpoint", "prune", &job, "--keep", "1"]).expect(0);
        gone(&left);
    }
    let second = cluster.submit(LONG, &["--ranks", "1", "--set", "checkpoint.every=1000000"]);
    cluster.wait_for_state(&second, "running");
    cluster.run(&["cancel", &second]).expect(0);
    cluster.wait_for_state(&second, "cancelled");
    let all = folder(&before[2]).parent().and_then(Path::parent).expect("the folder of all jobs").to_owned();
    let left = all.join(&second).join("step-00000001-g1");
    half_a_shard(&left);
    cluster.run(&["checkpoint", "prune", &second]).expect(0);
    gone(&left);
    cluster.run(&["checkpoint", "verify", &text(&before[2]["uri"])]).expect(0);
    cluster.run(&["checkpoint", "pin", &job, &step.to_string()]).expect(3).says(&["no committed checkpoint"]);
    cluster.run(&["checkpoint", "prune", &job, "--keep", "0"]).expect(2);
    cluster.run(&["checkpoint", "prune", "job-99"]).expect(3);
}

#[test]
fn a_checkpoint_that_a_job_continues_from_is_not_pruned() {
    let cluster = Cluster::start(1);
    let job = ended(&cluster);
    let first = text(&listed(&cluster, &job)[0]["uri"]);
    // As a shell completes it.
    let typed = format!("{}/", folder(&listed(&cluster, &job)[0]).display());
    let after = cluster.submit(LONG, &["--ranks", "1", "--resume", &typed]);
    cluster.wait_for_state(&after, "running");
    let pruned = cluster.json(&["checkpoint", "prune", &job, "--keep", "1"]);
    assert_eq!((steps(&pruned["removed"]), steps(&pruned["kept"])), (vec![4], vec![2, 6]));
    poll("news of it", || {
        told(&cluster, &job).contains("removed pruned checkpoints from the store, folders: 1").then_some(())
    });
    cluster.run(&["checkpoint", "verify", &first]).expect(0);
    // It has no checkpoint of its own, and begins there again.
    signal(rank_of(cluster.dir(), "node-1"), Signal::KILL);
    poll("a second beginning", || {
        (told(&cluster, &after).matches(&format!("from {first}")).count() == 2).then_some(())
    });
    cluster.wait_for_state(&after, "running");
    cluster.run(&["cancel", &after]).expect(0);
    cluster.wait_for_state(&after, "cancelled");
    assert_eq!(steps(&cluster.json(&["checkpoint", "prune", &job, "--keep", "1"])["removed"]), [2]);
}

#[test]
fn a_prune_whose_node_dies_is_swept_when_a_node_is_back() {
    let cluster = Cluster::start(1);
    let job = ended(&cluster);
    let before = listed(&cluster, &job);
    let agent = process_of(cluster.dir(), "node-1");
    signal(agent, Signal::STOP);
    cluster.run(&["checkpoint", "prune", &job, "--keep", "1"]).expect(0);
    assert_eq!(steps(&listed(&cluster, &job)), [6]);
    assert!(folder(&before[0]).exists() && folder(&before[1]).exists(), "nobody has removed them yet");
    signal(agent, Signal::KILL);
    before.as_array().into_iter().flatten().take(2).for_each(|view| gone(&folder(view)));
    cluster.run(&["checkpoint", "verify", &job]).expect(0);
}

/// Every sync of the journal on the way of a prune and of the news that it was swept.
#[test]
fn a_prune_whose_coordinator_is_killed_at_any_sync_is_done_or_not_and_goes_on() {
    if !can_trace() {
        return;
    }
    let cluster = Cluster::start(1);
    let job = cluster.submit(14, &["--ranks", "1", "--set", "checkpoint.every=2", "--set", "checkpoint.keep=7"]);
    cluster.wait_for_state(&job, "succeeded");
    for sync in 1..7 {
        let before = listed(&cluster, &job);
        let views = before.as_array().expect("a list");
        let going = folder(&views[0]);
        // Nothing is started again while this looks.
        signal(cluster.supervisor(), Signal::STOP);
        let mut trap = Trap::set(process_of(cluster.dir(), "coordinator"), "fdatasync", sync, None);
        let mut prune = cluster.command(&["checkpoint", "prune", &job, "--keep", &(views.len() - 1).to_string()]);
        let mut prune = prune.stdout(Stdio::null()).spawn().expect("stoke starts");
        let killed = poll("a kill or an end", || match trap.has_killed() {
            true => Some(true),
            false => (!going.exists() && prune.try_wait().expect("a child").is_some()).then_some(false),
        });
        // Files that are listed are whole, and the one that goes is whole or none.
        for view in &views[usize::from(!going.join("manifest.json").exists())..] {
            cluster.run(&["checkpoint", "verify", &text(&view["uri"])]).expect(0);
        }
        drop(trap);
        signal(cluster.supervisor(), Signal::CONT);
        assert!(prune.wait().expect("a child").success(), "killed at sync {sync}");
        assert_eq!(listed(&cluster, &job).as_array().expect("a list")[..], views[1..], "killed at sync {sync}");
        gone(&going);
        if !killed {
            assert!(sync > 1, "no sync was met");
            return;
        }
    }
    panic!("a prune syncs more than six times");
}

#[test]
fn a_prune_that_is_cut_between_manifest_and_shards_leaves_no_checkpoint_and_is_done_later() {
    if !can_trace() {
        return;
    }
    let cluster = Cluster::start(1);
    let job = ended(&cluster);
    let before = listed(&cluster, &job);
    let half = folder(&before[0]);
    let names = std::fs::read_dir(&half).expect("a folder").flatten().map(|entry| entry.path());
    let shard = names.into_iter().find(|path| path.extension().is_some_and(|is| is == "safetensors")).expect("a shard");
    signal(cluster.supervisor(), Signal::STOP);
    let mut trap = Trap::set(process_of(cluster.dir(), "node-1"), "?unlink,unlinkat", 1, Some(&shard));
    cluster.run(&["checkpoint", "prune", &job, "--keep", "1"]).expect(0);
    poll("the end of the agent", || trap.has_killed().then_some(()));
    assert!(shard.exists() && !half.join("manifest.json").exists(), "the manifest goes first");
    assert_eq!(steps(&listed(&cluster, &job)), [6]);
    cluster.run(&["checkpoint", "verify", &text(&before[0]["uri"])]).expect(3).says(&["manifest.json is missing"]);
    signal(process_of(cluster.dir(), "coordinator"), Signal::KILL);
    drop(trap);
    signal(cluster.supervisor(), Signal::CONT);
    before.as_array().into_iter().flatten().take(2).for_each(|view| gone(&folder(view)));
    poll("news of it", || told(&cluster, &job).contains("removed pruned checkpoints").then_some(()));
    assert_eq!(steps(&listed(&cluster, &job)), [6]);
    cluster.run(&["checkpoint", "verify", &job]).expect(0);
}

#[test]
fn pins_and_prunes_are_for_the_owner_and_those_above() {
    let cluster = &Cluster::start(1);
    let homes = tempfile::tempdir().expect("a temporary folder");
    let job = ended(cluster);
    let before = listed(cluster, &job);
    for user in ["viewer", "submitter"].map(|role| cluster.login(&homes, role)) {
        for arguments in [&["pin", &job, "2"][..], &["unpin", &job, "2"], &["prune", &job, "--keep", "1"]] {
            user.run(&[&["checkpoint"], arguments].concat()).expect(4).says(&["may not change"]);
        }
        assert_eq!(user.run(&["checkpoint", "list", &job, "--json"]).expect(0).json()["checkpoints"], before);
    }
    let operator = cluster.login(&homes, "operator");
    operator.run(&["checkpoint", "pin", &job, "2"]).expect(0);
    assert_eq!(listed(cluster, &job)[0]["pinned"], true);
}

/// strace on a process that runs: kills it at its n-th call of these, of those that name `path` where it is given.
struct Trap(Child);

impl Trap {
    #[track_caller]
    fn set(pid: u32, calls: &str, nth: u32, path: Option<&Path>) -> Self {
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={calls}")]);
        command.args(["-e", &format!("inject={calls}:signal=KILL:when={nth}")]);
        if let Some(path) = path {
            command.arg("-P").arg(path);
        }
        let mut trap = Self(command.args(["-p", &pid.to_string()]).spawn().expect("strace starts"));
        poll("all threads traced", || {
            assert!(!trap.has_killed(), "strace has ended before anything was asked");
            let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
            let mut states = threads.map(|thread| std::fs::read_to_string(thread.path().join("status")));
            states.all(|state| state.is_ok_and(|state| !state.contains("TracerPid:\t0\n"))).then_some(())
        });
        trap
    }

    /// strace ends with what it traces.
    fn has_killed(&mut self) -> bool {
        self.0.try_wait().expect("strace can be watched").is_some()
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
