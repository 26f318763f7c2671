//! What a run outlives: the death of its coordinator, of an agent, of a rank; and what outlives a run: nothing.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{
    Background, Cluster, Run, cluster_of, poll, process_of, processes_naming, signal, spec, step_of, stoke, text,
};

/// Long enough to be hit in the middle.
const STEPS: u64 = 60;

fn long() -> Run {
    Run::new("digits.toml", 2).set("train.steps", STEPS).set("checkpoint.every", 10)
}

/// What each of these runs must end with.
fn undisturbed() -> &'static Value {
    static DONE: OnceLock<Value> = OnceLock::new();
    DONE.get_or_init(|| long().finish().0)
}

/// A run of which some steps are done and most are not.
fn in_the_middle() -> (Background, TempDir, std::path::PathBuf) {
    let (running, scratch) = long().start();
    let cluster = cluster_of(&scratch);
    poll("a few steps", || step_of(&cluster).filter(|step| *step >= 3));
    (running, scratch, cluster)
}

#[track_caller]
fn same_weights(summary: &Value) {
    let reference = undisturbed();
    for key in ["weights_blake3", "loss", "samples", "step", "metrics"] {
        assert_eq!(summary[key], reference[key], "{key} differs:\n{summary:#}\n{reference:#}");
    }
}

#[test]
fn a_coordinator_killed_during_training_costs_no_step() {
    let (running, _scratch, cluster) = in_the_middle();
    let before = process_of(&cluster, "coordinator");
    signal(before, Signal::KILL);
    let ended = running.wait().expect(0).says(&["the coordinator was killed by signal 9", "the coordinator is back"]);
    let summary = ended.json();
    same_weights(&summary);
    assert_eq!(summary["recoveries"], 0, "ranks went on while it was away: {summary:#}");
    assert_eq!(summary["restarts"], 1);
}

#[test]
fn a_coordinator_stopped_during_training_costs_no_step() {
    let (running, _scratch, cluster) = in_the_middle();
    signal(process_of(&cluster, "coordinator"), Signal::TERM);
    let summary = running.wait().expect(0).says(&["the coordinator is back"]).json();
    same_weights(&summary);
    assert_eq!(summary["recoveries"], 0, "ranks went on while it was away: {summary:#}");
}

/// Of three ranks two are a quorum: they do every step that is left, and the coordinator takes it over when it is back.
#[test]
fn a_rank_that_dies_while_the_coordinator_is_away_costs_no_step() {
    let long = Run::new("digits.toml", 3).set("train.steps", STEPS).set("checkpoint.every", 10);
    let (running, scratch) = long.start();
    let cluster = cluster_of(&scratch);
    poll("a few steps", || step_of(&cluster).filter(|step| *step >= 3));
    let coordinator = process_of(&cluster, "coordinator");
    signal(coordinator, Signal::STOP);
    signal(rank_of(&cluster, "node-3"), Signal::KILL);
    poll("the others to finish alone", || {
        let alone = |node| logs_of(&cluster, node).contains("going on without the coordinator");
        let done = |node| logs_of(&cluster, node).contains("steps done");
        (alone("node-1") && alone("node-2") && done("node-1") && done("node-2")).then_some(())
    });
    signal(coordinator, Signal::CONT);
    let summary = running.wait().expect(0).json();
    same_weights(&summary);
    // A successor that comes when all is done may go again, which counts too; a gang that had begun anew would have had three ranks.
    let worlds = summary["world_sizes"].as_array().expect("world sizes");
    assert!(worlds[0] == 3 && worlds.len() > 1 && worlds[1..].iter().all(|world| *world == 2), "{summary:#}");
    assert!(summary["restarts"] == 0 && summary["recoveries"].as_u64() >= Some(1), "{summary:#}");
}

#[test]
fn a_run_that_nobody_reads_trains_to_its_end() {
    let scratch = tempfile::tempdir().expect("a temporary folder");
    // Not the folder that percent escapes would make of it.
    let out = scratch.path().join("a%41b");
    let mut command = stoke(["run", "--nodes", "1", "--set", "train.steps=2", "--out"]);
    let (reader, writer) = std::io::pipe().expect("a pipe");
    command.arg(&out).arg(spec("digits.toml")).stdout(writer.try_clone().expect("a pipe")).stderr(writer);
    let mut child = command.spawn().expect("stoke starts");
    drop((command, reader));
    let status = poll("the end of the run", || child.try_wait().expect("the child can be watched"));
    assert_eq!(status.code(), Some(0));
    let summary = std::fs::read_to_string(out.join("summary.json")).expect("a summary");
    let summary: Value = serde_json::from_str(&summary).expect("JSON");
    let checkpoint = summary["checkpoint"].as_str().and_then(|uri| uri.strip_prefix("file://")).expect("a URI");
    assert!(Path::new(checkpoint).starts_with(&out) && Path::new(checkpoint).join("manifest.json").exists());
}

#[test]
fn an_agent_killed_during_training_costs_no_step() {
    let (running, _scratch, cluster) = in_the_middle();
    signal(process_of(&cluster, "node-2"), Signal::KILL);
    let summary = running.wait().expect(0).says(&["the node-2 was killed by signal 9"]).json();
    same_weights(&summary);
    assert_eq!(summary["recoveries"], 0, "its rank went on while it was away: {summary:#}");
}

/// The other rank keeps its process, and the one that takes the dead one's place trains to the end.
#[test]
fn a_rank_killed_during_training_costs_a_step_and_no_bit() {
    let (running, _scratch, cluster) = in_the_middle();
    let (killed, survivor) = (rank_of(&cluster, "node-1"), rank_of(&cluster, "node-2"));
    signal(killed, Signal::KILL);
    let step = step_of(&cluster).unwrap_or_default();
    let successor = poll("another process in its place", || {
        let found = try_rank_of(&cluster, "node-1").filter(|pid| *pid != killed);
        found.filter(|_| step_of(&cluster).is_some_and(|now| now > step))
    });
    assert_eq!(try_rank_of(&cluster, "node-2"), Some(survivor), "the survivor was restarted");
    assert_ne!(successor, killed);
    let summary = running.wait().expect(0).says(&["generation 1 ended: ", "killed by signal 9"]).json();
    same_weights(&summary);
    assert_eq!(summary["recoveries"], 1, "{summary:#}");
    let worlds = summary["world_sizes"].as_array().expect("world sizes");
    assert_eq!((worlds.first(), worlds.last()), (Some(&2.into()), Some(&2.into())), "{summary:#}");
}

/// The store has lost every shard: what the machines have in memory is enough.
#[test]
fn a_gang_that_dies_whole_restores_from_the_memory_of_its_machines() {
    if !Path::new("/dev/shm").is_dir() {
        return println!("not run: this machine has no /dev/shm");
    }
    let (running, scratch, cluster) = in_the_middle();
    poll("a checkpoint", || step_of(&cluster).filter(|step| *step >= 13));
    let ranks = [rank_of(&cluster, "node-1"), rank_of(&cluster, "node-2")];
    for rank in ranks {
        signal(rank, Signal::STOP);
    }
    for file in files_below(&scratch.path().join("out")) {
        if file.extension().is_some_and(|extension| extension == "safetensors") {
            std::fs::remove_file(file).expect("a shard goes");
        }
    }
    for rank in ranks {
        signal(rank, Signal::KILL);
    }
    let logs = poll("the gang to restore", || {
        let logs = logs_of(&cluster, "node-1") + &logs_of(&cluster, "node-2");
        logs.contains("checkpoint gathered").then_some(logs)
    });
    assert!(logs.contains("in_store=0") && !logs.contains("in_store=1"), "{logs}");
    let summary = running.wait().expect(0).json();
    same_weights(&summary);
    nothing_in_memory(&scratch);
}

/// Of four ranks those half the gang apart keep the same part of the optimizer's state.
#[test]
fn two_ranks_that_keep_the_same_part_of_the_state_die_and_the_job_goes_back_to_its_checkpoint() {
    let long = Run::new("digits.toml", 4).set("train.steps", STEPS).set("checkpoint.every", 5);
    let (running, scratch) = long.set("train.sharding", "zero1").start();
    let cluster = cluster_of(&scratch);
    poll("a checkpoint", || step_of(&cluster).filter(|step| *step >= 12));
    let ranks = ["node-1", "node-3"].map(|node| rank_of(&cluster, node));
    ranks.into_iter().for_each(|rank| signal(rank, Signal::STOP));
    ranks.into_iter().for_each(|rank| signal(rank, Signal::KILL));
    let ended =
        running.wait().expect(0).says(&["nobody has the optimizer's state of", "the job goes back to its checkpoint"]);
    same_weights(&ended.json());
}

/// A process that is stopped says nothing and does not end: its agent gives it up, and a step that waits for it is done again.
#[test]
fn a_rank_that_is_stopped_is_replaced() {
    let (running, _scratch, cluster) = in_the_middle();
    signal(rank_of(&cluster, "node-2"), Signal::STOP);
    let summary = running.wait().expect(0).says(&["generation 1 ended: ", "stopped or hangs"]).json();
    same_weights(&summary);
    assert_eq!(summary["recoveries"], 1, "{summary:#}");
}

/// Nobody starts the agent again, and nobody says goodbye: only its silence tells.
#[test]
fn a_machine_that_dies_without_a_word_is_lost_and_comes_back() {
    let parent = TempDir::new().expect("a scratch folder");
    let cluster = Cluster::start_with(parent, 2, &["--detection", "fast"]);
    let state = |wanted: &str| {
        poll(wanted, || {
            let nodes = cluster.json(&["nodes"]);
            let found = nodes["nodes"].as_array()?.iter().find(|node| node["name"] == "node-2")?.clone();
            (found["state"] == wanted).then_some(())
        });
    };
    let supervisor = cluster.state()["supervisor"].as_u64().expect("a process id") as u32;
    signal(supervisor, Signal::STOP);
    signal(process_of(cluster.dir(), "node-2"), Signal::KILL);
    state("lost");
    signal(supervisor, Signal::CONT);
    state("up");
}

#[test]
fn an_interrupted_run_leaves_nothing_behind() {
    for (ending, code) in [(Signal::INT, 130), (Signal::TERM, 130)] {
        let (running, scratch, cluster) = in_the_middle();
        signal(running.pid(), ending);
        running.wait().expect(code).says(&["interrupted"]);
        nothing_left(&scratch, &cluster);
    }
}

#[test]
fn a_killed_run_leaves_nothing_behind() {
    let (running, scratch, cluster) = in_the_middle();
    signal(running.pid(), Signal::KILL);
    running.wait().expect(128 + 9);
    poll("the end of its processes and its folder", || (!cluster.exists()).then_some(()));
    nothing_left(&scratch, &cluster);
}

#[test]
fn a_run_whose_supervisor_is_killed_says_so_and_leaves_nothing_behind() {
    let (running, scratch, cluster) = in_the_middle();
    poll("a checkpoint", || step_of(&cluster).filter(|step| *step >= 13));
    let state: Value = serde_json::from_slice(&std::fs::read(cluster.join("local.json")).expect("read")).expect("JSON");
    let supervisor = state["supervisor"].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("a process id");
    signal(supervisor, Signal::KILL);
    running.wait().expect(1).says(&["the supervisor of the local cluster died"]);
    nothing_left(&scratch, &cluster);
}

#[track_caller]
fn nothing_left(scratch: &TempDir, cluster: &Path) {
    let word = cluster.to_str().expect("UTF-8").to_owned();
    poll("the end of every process", || processes_naming(&word).is_empty().then_some(()));
    let left: Vec<_> = std::fs::read_dir(scratch.path().join("tmp")).expect("read").flatten().collect();
    assert!(left.is_empty(), "{left:?} is left in the temporary folder");
    nothing_in_memory(scratch);
}

/// Shards of the run's cluster, which its checkpoints name.
#[track_caller]
fn nothing_in_memory(scratch: &TempDir) {
    let manifests = files_below(&scratch.path().join("out")).into_iter().filter(|file| file.ends_with("manifest.json"));
    let Some(manifest) = manifests.map(|file| std::fs::read(file).expect("a manifest")).next() else { return };
    let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
    let own = format!("stoke-{}-", text(&manifest["cluster"]));
    let left = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with(&own)).collect();
    assert!(left.is_empty(), "{left:?} is left in memory");
}

/// The process of the rank on a node.
pub fn rank_of(cluster: &Path, node: &str) -> u32 {
    poll("a rank on the node", || try_rank_of(cluster, node))
}

/// Everything that ranks on a node have written.
fn logs_of(cluster: &Path, node: &str) -> String {
    let logs = files_below(&cluster.join(node)).into_iter();
    let logs = logs.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.map(|path| std::fs::read_to_string(path).unwrap_or_default()).collect()
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let (mut files, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push(path);
            }
        }
    }
    files
}

fn try_rank_of(cluster: &Path, node: &str) -> Option<u32> {
    let agent = process_of(cluster, node);
    let workers = processes_naming("worker").into_iter();
    workers.map(|(pid, _)| pid).find(|pid| parent_of(*pid) == Some(agent))
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; the parent is the second field after it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}
