//! An agent that dies alone: its ranks step on, the next agent of the node takes them over, and whoever must not outlive something does not.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use serde_json::Value;
use stoke_node::agent::end_orphans;

use crate::harness::{Cluster, Ended, poll, process_of, rank_on, records, run, signal, stoke, text};

const STEPS: u64 = 90;

fn control_group(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("the process runs")
}

fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// A job of three ranks, one a node, of which a few steps are done; with the processes of its ranks, by node.
fn in_the_middle(cluster: &Cluster) -> (String, Vec<PathBuf>, Vec<u32>) {
    let job = cluster.submit(STEPS, &["--ranks", "3", "--set", "checkpoint.every=10", "--set", "resources.cpus=1"]);
    let nodes: Vec<PathBuf> = (1..=3).map(|index| cluster.dir().join(format!("node-{index}"))).collect();
    poll("a few steps", || step(cluster, &job).filter(|step| *step >= 3));
    let ranks = nodes.iter().map(|node| rank_on(node)).collect();
    (job, nodes, ranks)
}

fn step(cluster: &Cluster, job: &str) -> Option<u64> {
    cluster.job(job)["progress"]["step"].as_u64()
}

/// Three nodes that can take one rank each.
fn three() -> Cluster {
    Cluster::start(3)
}

#[track_caller]
fn same_weights(cluster: &Cluster, job: &str) {
    let calm = cluster.submit(STEPS, &["--ranks", "3", "--set", "checkpoint.every=10"]);
    let (calm, job) = (cluster.wait_for_state(&calm, "succeeded"), cluster.job(job));
    for key in ["weights_blake3", "loss", "samples", "metrics"] {
        assert_eq!(job["outcome"][key], calm["outcome"][key], "{key} differs:\n{job:#}\n{calm:#}");
    }
}

fn log_of(cluster: &Cluster, job: &str, rank: &str) -> String {
    cluster.run(&["logs", job, "--rank", rank]).expect(0).stdout
}

#[test]
fn an_agent_killed_twice_costs_no_step_and_no_process() {
    let cluster = three();
    let (job, nodes, ranks) = in_the_middle(&cluster);
    for _ in 0..2 {
        let killed = process_of(cluster.dir(), "node-2");
        signal(killed, Signal::KILL);
        let before = step(&cluster, &job).unwrap_or_default();
        poll("another agent", || Some(process_of(cluster.dir(), "node-2")).filter(|pid| *pid != killed));
        poll("the rank is taken over", || log_of(&cluster, &job, "1").contains("another agent is there").then_some(()));
        poll("a step", || step(&cluster, &job).filter(|now| *now > before));
    }
    let now: Vec<u32> = nodes.iter().map(|node| rank_on(node)).collect();
    assert_eq!(now, ranks, "a rank was started anew");
    let done = cluster.wait_for_state(&job, "succeeded");
    assert_eq!((&done["generation"], &done["recoveries"]), (&1.into(), &0.into()), "{done:#}");
    let log = log_of(&cluster, &job, "1");
    let alone = log.matches("going on without one").count();
    assert_eq!((alone, log.matches("another agent is there").count()), (2, 2), "{log}");
    for line in ["trainer loaded", "steps done", "trained"] {
        assert!(log.contains(line), "{line} is missing:\n{log}");
    }
    // Nothing is kept of ranks whose end everybody knows.
    poll("the end of the records", || nodes.iter().all(|node| records(node).is_empty()).then_some(()));
    same_weights(&cluster, &job);
}

#[test]
fn a_rank_killed_while_its_agent_is_away_is_replaced() {
    let cluster = three();
    let (job, _nodes, ranks) = in_the_middle(&cluster);
    signal(process_of(cluster.dir(), "node-2"), Signal::KILL);
    signal(ranks[1], Signal::KILL);
    let done = cluster.wait_for_state(&job, "succeeded");
    assert_eq!(done["recoveries"], 1, "{done:#}");
    same_weights(&cluster, &job);
}

/// A process that is stopped for as long as this is there.
struct Held(u32);

impl Held {
    fn new(pid: u32) -> Self {
        signal(pid, Signal::STOP);
        Self(pid)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        signal(self.0, Signal::CONT);
    }
}

/// The supervisor is held, so that the agent stays away.
#[test]
fn the_others_go_on_while_the_agent_of_a_dead_rank_is_away() {
    let cluster = three();
    let (job, _nodes, ranks) = in_the_middle(&cluster);
    let supervisor = cluster.state()["supervisor"].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("an id");
    let held = Held::new(supervisor);
    signal(process_of(cluster.dir(), "node-2"), Signal::KILL);
    signal(ranks[1], Signal::KILL);
    let goes_on = |event: &Value| text(&event["text"]).starts_with("g2 goes on");
    poll("the others go on", || {
        let explained = cluster.json(&["explain", &job]);
        explained["events"].as_array()?.iter().any(goes_on).then_some(())
    });
    drop(held);
    cluster.wait_for_state(&job, "succeeded");
    same_weights(&cluster, &job);
}

/// Also while ranks start, and while their records are written.
#[test]
fn agents_killed_again_and_again_change_no_bit() {
    // Long enough for many faults on a fast machine.
    let run = |chaos: &[&str]| {
        let run = crate::harness::Run::new("digits.toml", 2).set("train.steps", 180).set("checkpoint.every", 10);
        run.with(chaos).finish().0
    };
    let (calm, struck) = (run(&[]), run(&["--chaos", "kill-agent every 400ms", "--seed", "3"]));
    for key in ["weights_blake3", "loss", "samples", "step", "metrics"] {
        assert_eq!(struck[key], calm[key], "{key} differs:\n{struck:#}\n{calm:#}");
    }
    let faults = struck["chaos"]["faults"].as_array().expect("faults");
    assert!(faults.iter().filter(|fault| fault["met"] == true).count() > 3, "{struck:#}");
    assert_eq!(struck["chaos"]["steps_lost"], 0, "{struck:#}");
}

#[test]
fn a_cluster_that_ends_while_an_agent_is_away_leaves_no_rank() {
    let cluster = three();
    let (_job, _nodes, ranks) = in_the_middle(&cluster);
    signal(process_of(cluster.dir(), "node-2"), Signal::KILL);
    drop(cluster);
    poll("the end of every rank", || ranks.iter().all(|pid| !is_running(*pid)).then_some(()));
}

/// An agent that nobody starts again but the test.
struct Bare {
    dir: tempfile::TempDir,
    agent: Child,
}

impl Bare {
    fn start(cluster: &Cluster, orphan_grace_ms: u64) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let config = format!(
            "dir = {:?}\ncoordinator = [{:?}]\nname = \"bare\"\nlabels = {{ bare = \"yes\" }}\norphan_grace_ms = {orphan_grace_ms}\n",
            Self::folder(&dir),
            cluster.address()
        );
        std::fs::write(dir.path().join("node.toml"), config).expect("written");
        let token = dir.path().join("token");
        std::fs::write(&token, cluster.token("node")).expect("written");
        let mut command = Self::command(&dir);
        command.args(["--join", "-"]).stdin(std::fs::File::open(token).expect("opened"));
        Self { agent: command.spawn().expect("an agent"), dir }
    }

    fn command(dir: &tempfile::TempDir) -> Command {
        let mut command = stoke(["node", "--config"]);
        command.arg(dir.path().join("node.toml")).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn folder(dir: &tempfile::TempDir) -> PathBuf {
        dir.path().join("node")
    }

    fn kill(&mut self) {
        self.agent.kill().expect("killed");
        self.agent.wait().expect("reaped");
    }

    fn restart(&mut self) {
        self.agent = Self::command(&self.dir).spawn().expect("an agent");
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        if matches!(self.agent.try_wait(), Ok(None)) {
            signal(self.agent.id(), Signal::TERM);
        }
        let _ = self.agent.wait();
        // Where the test ended between two agents.
        let _ = end_orphans(&Self::folder(&self.dir));
    }
}

/// One job on the bare node, with the process of its rank.
fn bare_job(cluster: &Cluster, bare: &Bare) -> (String, u32) {
    let job = cluster.submit(1_000_000, &["--ranks", "1", "--set", "resources.labels.bare=yes"]);
    poll("a few steps", || step(cluster, &job).filter(|step| *step >= 3));
    (job, rank_on(&Bare::folder(&bare.dir)))
}

#[test]
fn a_rank_without_an_agent_ends_after_its_grace() {
    let cluster = Cluster::start(1);
    let mut bare = Bare::start(&cluster, 1_000);
    let (job, rank) = bare_job(&cluster, &bare);
    bare.kill();
    poll("the end of the rank", || (!is_running(rank)).then_some(()));
    bare.restart();
    let told = |explained: &Value| explained.to_string().contains("exited with code 3");
    poll("how it ended", || Some(cluster.json(&["explain", &job])).filter(told));
    cluster.run(&["cancel", &job]).expect(0);
}

/// A new binary in the place of the old one, say. Meanwhile no other agent can take the folder.
#[test]
fn an_agent_is_replaced_under_a_running_rank_and_two_at_once_are_refused() {
    let cluster = Cluster::start(1);
    let mut bare = Bare::start(&cluster, 60_000);
    let (job, rank) = bare_job(&cluster, &bare);
    bare.kill();
    bare.restart();
    poll("the rank is taken over", || log_of(&cluster, &job, "0").contains("another agent is there").then_some(()));
    let folder = Bare::folder(&bare.dir);
    let second: Ended = run(["node", "--dir", folder.to_str().expect("UTF-8"), "--coordinator", &cluster.address()]);
    second.expect(6).says(&["is used by another agent"]);
    let before = step(&cluster, &job).unwrap_or_default();
    poll("more steps", || step(&cluster, &job).filter(|now| *now > before + 3));
    assert_eq!((rank_on(&folder), &cluster.job(&job)["generation"]), (rank, &1.into()));
    // Whoever ends the whole unit of a service ends what is in its control group.
    assert_eq!(control_group(rank), control_group(bare.agent.id()));
    // The order to stop arrives, and so does the end.
    cluster.run(&["cancel", &job]).expect(0);
    cluster.wait_for_state(&job, "cancelled");
    assert!(!is_running(rank));
    poll("the end of the record", || records(&folder).is_empty().then_some(()));
}

/// The agent was away when its node was removed: it learns so when it is back, and no rank of it goes on.
#[test]
fn a_removed_node_leaves_no_rank_without_an_agent() {
    let cluster = Cluster::start(1);
    let mut bare = Bare::start(&cluster, 600_000);
    let (job, rank) = bare_job(&cluster, &bare);
    bare.kill();
    poll("the loss of the node", || (cluster.run(&["node", "remove", "bare"]).code() == 0).then_some(()));
    assert!(is_running(rank));
    bare.restart();
    assert_eq!(bare.agent.wait().expect("its end").code(), Some(4));
    assert!(!is_running(rank));
    cluster.run(&["cancel", &job]).expect(0);
}

#[test]
fn a_rank_that_was_taken_over_moves_when_its_node_is_drained() {
    let cluster = three();
    let job = cluster.submit(400, &["--ranks", "2", "--set", "checkpoint.every=50", "--set", "resources.cpus=1"]);
    poll("a few steps", || step(&cluster, &job).filter(|step| *step >= 3));
    let drained = text(&cluster.job(&job)["placement"][0]["node"]);
    let rank = rank_on(&cluster.dir().join(&drained));
    signal(process_of(cluster.dir(), &drained), Signal::KILL);
    poll("the rank is taken over", || log_of(&cluster, &job, "0").contains("another agent is there").then_some(()));
    cluster.run(&["drain", &drained]).expect(0).says(&["moves to"]);
    poll("the end of the rank", || (!is_running(rank)).then_some(()));
    let done = cluster.wait_for_state(&job, "succeeded");
    assert_eq!((&done["recoveries"], &done["failures"]), (&0.into(), &0.into()), "{done:#}");
}

/// A rank that hangs in the kernel's eyes too: it is there and proves nothing.
#[test]
fn a_rank_that_does_not_answer_its_new_agent_is_killed() {
    let cluster = Cluster::start(1);
    let mut bare = Bare::start(&cluster, 60_000);
    let (job, rank) = bare_job(&cluster, &bare);
    bare.kill();
    signal(rank, Signal::STOP);
    bare.restart();
    poll("the end of the rank", || (!is_running(rank)).then_some(()));
    let told = |explained: &Value| explained.to_string().contains("said nothing for");
    poll("why it was killed", || Some(cluster.json(&["explain", &job])).filter(told));
    cluster.run(&["cancel", &job]).expect(0);
}
