//! Nodes that leave: drained without their jobs noticing, and removed.

use std::process::Command;

use serde_json::Value;

use crate::harness::{Background, Cluster, poll, process_of, signal, text};

/// One node of a cluster, as `stoke nodes` shows it.
fn node(cluster: &Cluster, id: &str) -> Value {
    let nodes = cluster.json(&["nodes"]);
    let found = nodes["nodes"].as_array().into_iter().flatten().find(|node| node["node"] == id);
    found.unwrap_or_else(|| panic!("{id} is not among {nodes}")).clone()
}

fn nodes_of(cluster: &Cluster, job: &str) -> Vec<String> {
    let placement = cluster.job(job)["placement"].clone();
    placement.as_array().into_iter().flatten().map(|place| text(&place["node"])).collect()
}

fn reaches(cluster: &Cluster, job: &str, step: u64) {
    poll("some steps", || cluster.job(job)["progress"]["step"].as_u64().filter(|now| *now >= step));
}

/// The job trains on while its rank moves, ends with the bits of one that nobody touched, and does not notice when the machine goes.
#[test]
fn a_drained_node_is_left_by_its_ranks_between_two_steps_and_can_be_stopped() {
    const STEPS: u64 = 300;
    let parent = tempfile::tempdir().expect("a temporary folder");
    let cluster = Cluster::start_with(parent, 3, &["--metrics", "127.0.0.1:0"]);
    let job = cluster.submit(STEPS, &["--ranks", "2"]);
    reaches(&cluster, &job, 3);
    let before = nodes_of(&cluster, &job);
    let from = before[0].clone();
    let drained = cluster.run(&["drain", &from, "--json"]).expect(0).says(&["moves to"]);
    assert_eq!((&drained.json()["state"], &drained.json()["node"]), (&"drained".into(), &from.clone().into()));
    let after = nodes_of(&cluster, &job);
    assert!(!after.contains(&from) && after.len() == 2, "{before:?} became {after:?}");
    assert!(cluster.run(&["nodes"]).expect(0).stdout.contains(&format!("{from}: drained by admin")));
    let metrics = format!("http://{}/metrics", text(&cluster.state()["metrics"]));
    poll("the metric of drained nodes", || {
        let told = Command::new("curl").args(["-s", &metrics]).output().expect("curl").stdout;
        let told = String::from_utf8_lossy(&told);
        let says = |line: &str| told.lines().any(|told| told == line);
        (says("stoke_nodes{state=\"drained\"} 1") && says("stoke_nodes{state=\"up\"} 2")).then_some(())
    });
    // A drained node stays one: it gets nothing, also over a kill of the coordinator.
    signal(process_of(cluster.dir(), "coordinator"), rustix::process::Signal::KILL);
    poll("the coordinator", || (cluster.run(&["status"]).code() == 0).then_some(()));
    poll("its session", || (node(&cluster, &from)["state"] == "drained").then_some(()));
    let all = cluster.submit(1, &["--ranks", "3"]);
    let waits = cluster.json(&["explain", &all]);
    assert!(waits["nodes"].to_string().contains("is being drained"), "{waits:#}");
    // Its machine can go now.
    signal(process_of(cluster.dir(), &from), rustix::process::Signal::STOP);
    poll("the loss of the node", || (node(&cluster, &from)["state"] == "lost").then_some(()));
    let moved = cluster.wait_for_state(&job, "succeeded");
    signal(process_of(cluster.dir(), &from), rustix::process::Signal::CONT);
    assert_eq!((&moved["recoveries"], &moved["failures"]), (&0.into(), &0.into()), "{moved:#}");
    cluster.run(&["drain", &from, "--undo"]).expect(0);
    cluster.wait_for_state(&all, "succeeded");
    let calm = cluster.submit(STEPS, &["--ranks", "2"]);
    let calm = cluster.wait_for_state(&calm, "succeeded");
    for key in ["weights_blake3", "loss", "samples"] {
        assert_eq!(moved["outcome"][key], calm["outcome"][key], "{key}");
    }
}

/// Two jobs that live on two nodes lose rank after rank on one of them: it gets no more, and they go on without it.
#[test]
fn a_node_whose_ranks_die_and_live_elsewhere_is_put_in_quarantine() {
    let cluster = Cluster::start(2);
    let jobs = [(); 2].map(|()| cluster.submit(100_000, &["--ranks", "2", "--set", "restart.attempts=100"]));
    jobs.iter().for_each(|job| reaches(&cluster, job, 2));
    let found = kill_ranks_on(&cluster, "node-2", &jobs, usize::MAX);
    assert_eq!(found["state"], "quarantined");
    assert!(text(&found["reason"]).contains("failed here and not elsewhere"), "{found:#}");
    assert_eq!(node(&cluster, "node-1")["state"], "up");
    let lifted = cluster.json(&["node", "release", "node-2"]);
    assert_eq!((&lifted["state"], &lifted["reason"]), (&"up".into(), &"".into()));
    jobs.iter().for_each(|job| drop(cluster.run(&["cancel", job]).expect(0)));
}

/// F33: the next node that they fail on is not to blame as well, nor the last one when the first is lifted.
#[test]
fn two_jobs_whose_ranks_die_everywhere_put_one_node_in_quarantine_and_no_other() {
    let cluster = Cluster::start(3);
    let plan = ["--ranks", "3", "--set", "restart.attempts=100", "--set", "checkpoint.every=1000000"];
    let jobs = [(); 2].map(|()| cluster.submit(1_000_000, &plan));
    jobs.iter().for_each(|job| reaches(&cluster, job, 2));
    assert_eq!(kill_ranks_on(&cluster, "node-1", &jobs, usize::MAX)["state"], "quarantined");
    let found = kill_ranks_on(&cluster, "node-2", &jobs, 4);
    assert_eq!((&found["state"], &found["reason"]), (&"up".into(), &"".into()), "{found:#}");
    cluster.run(&["node", "release", "node-1"]).expect(0);
    let found = kill_ranks_on(&cluster, "node-3", &jobs, 4);
    assert_eq!((&found["state"], &found["reason"]), (&"up".into(), &"".into()), "{found:#}");
    jobs.iter().for_each(|job| drop(cluster.run(&["cancel", job]).expect(0)));
}

/// Kills the ranks of a node, each once and the next when the coordinator knows of the last and both jobs have come up again; until the node is in
/// quarantine, or so many are known to be gone.
fn kill_ranks_on(cluster: &Cluster, name: &str, jobs: &[String], most: usize) -> Value {
    let agent = process_of(cluster.dir(), name);
    let end = format!("on {name} was killed by signal 9");
    let ends = |job: &String| cluster.json(&["explain", job])["events"].to_string().matches(&end).count();
    let mut killed = std::collections::BTreeSet::new();
    poll("the quarantine", || {
        let known = jobs.iter().map(ends).sum::<usize>();
        let found = node(cluster, name);
        if found["state"] == "quarantined" || known >= most {
            return Some(found);
        }
        let whole = jobs.iter().all(|job| nodes_of(cluster, job).len() >= 2);
        let rank = children(agent).into_iter().find(|rank| !killed.contains(rank));
        if let Some(rank) = rank.filter(|_| whole && known >= killed.len()) {
            killed.insert(rank);
            signal(rank, rustix::process::Signal::KILL);
        }
        None
    })
}

/// The ranks of an agent.
pub fn children(agent: u32) -> Vec<u32> {
    let parent = |pid: u32| -> Option<u32> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    let workers = crate::harness::processes_naming("worker").into_iter();
    workers.map(|(pid, _)| pid).filter(|pid| parent(*pid) == Some(agent)).collect()
}

/// The agent ends and says how to come back; with a new token it does, in the same folder and as another node.
#[test]
fn a_removed_node_is_refused_until_it_joins_again() {
    let cluster = Cluster::start(2);
    cluster.run(&["node", "remove", "node-2"]).expect(6).says(&["neither lost nor drained", "stoke drain node-2"]);
    cluster.run(&["drain", "node-2"]).expect(0);
    let agent = process_of(cluster.dir(), "node-2");
    assert_eq!(cluster.json(&["node", "remove", "node-2"])["removed"], true);
    poll("the end of the agent", || (!std::path::Path::new(&format!("/proc/{agent}")).exists()).then_some(()));
    let nodes = cluster.json(&["nodes"]);
    assert_eq!(nodes["nodes"].as_array().map(Vec::len), Some(1), "{nodes:#}");
    cluster.run(&["drain", "node-2"]).expect(3).says(&["no node-2"]);
    // The folder has no identity any more, and the agent says what to do.
    let dir = cluster.dir().join("node-2");
    let (dir, address) = (dir.to_str().expect("UTF-8"), cluster.address());
    let start = ["node", "--dir", dir, "--coordinator", &address];
    crate::harness::run(start).expect(4).says(&["--join TOKEN"]);
    let token = cluster.token("node");
    let again = crate::harness::stoke([&start[..], &["--join", &token, "--name", "again"]].concat());
    let again = Background::start(again);
    poll("the node", || {
        let nodes = cluster.json(&["nodes"]);
        let names = nodes["nodes"].as_array()?.iter().map(|node| (text(&node["node"]), text(&node["state"])));
        names.into_iter().find(|known| *known == ("node-3".to_owned(), "up".to_owned()))
    });
    let job = cluster.submit(5, &["--ranks", "2"]);
    cluster.wait_for_state(&job, "succeeded");
    signal(again.pid(), rustix::process::Signal::TERM);
    again.wait().expect(0);
    // By its name, as it is lost.
    poll("the loss of the node", || (node(&cluster, "node-3")["state"] == "lost").then_some(()));
    cluster.run(&["node", "remove", "again"]).expect(0);
}

#[test]
fn a_drain_without_room_elsewhere_shrinks_the_job_or_says_what_it_waits_for() {
    let cluster = Cluster::start(1);
    let job = cluster.submit(4_000, &["--ranks", "1"]);
    reaches(&cluster, &job, 3);
    let waiting = Background::start(cluster.command(&["drain", "node-1"]));
    poll("the reason", || {
        let reason = text(&node(&cluster, "node-1")["reason"]);
        reason.contains("no room elsewhere").then_some(())
    });
    drop(waiting);
    let forced = cluster.run(&["drain", "node-1", "--deadline", "1s"]).expect(1);
    assert!(forced.stdout.contains("the deadline came first"), "{forced:#?}");
    let view = cluster.wait_for_state(&job, "queued");
    assert_eq!(view["failures"], 0);
    cluster.run(&["drain", "node-9"]).expect(3).says(&["no node-9"]);
    cluster.run(&["drain", "node-1", "--undo", "--deadline", "1s"]).expect(2);
    cluster.run(&["drain", "node-1", "--undo"]).expect(0);
    cluster.wait_for_state(&job, "running");
    cluster.run(&["cancel", &job]).expect(0);
}
