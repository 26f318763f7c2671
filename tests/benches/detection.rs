//! How soon a machine that dies without a word is found, in both profiles of `--detection`: an agent and its ranks get `kill -9` at once, with
//! the supervisor stopped, so that nobody starts it again and only its silence tells. Times until the coordinator takes the node as lost, and
//! until its job goes on without it; medians over the rounds.
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench detection

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use stoke_tests::local::{LocalCluster, children, now_ms, quantile, signal};

const NODES: usize = 3;
const ROUNDS: usize = 10;
const PATIENCE: Duration = Duration::from_secs(60);
/// Each node is late for a quarter of the time in the mean.
const JITTER: &str = "delay-packets every 300ms for 250ms by 200ms";
const JITTER_TIME: &str = "30s";
const POLL: Duration = Duration::from_millis(10);

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_owned();
    let stoke = stoke_tests::binary::build(&root);
    let spec = root.join("jobs/specs/domains.toml");
    println!(
        "{:<10} {:<28} {:>10} {:>9}",
        "detection",
        format!("{ROUNDS} machines killed, until"),
        "median ms",
        "p99 ms"
    );
    for profile in ["default", "fast"] {
        let cluster = LocalCluster::up(&stoke, NODES, &["--detection", profile]);
        let job = cluster.submit(&spec, &["train.steps=1000000".to_owned()]);
        let (mut lost, mut on) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let times = kill_a_machine(&cluster, &job, 1 + round % NODES);
            lost.push(times.0);
            on.push(times.1);
        }
        for (what, values) in [("the node is lost", &mut lost), ("its job goes on", &mut on)] {
            println!("{profile:<10} {what:<28} {:>10.0} {:>9.0}", quantile(values, 0.5), quantile(values, 0.99));
        }
        let (struck, ended) = jitter(&cluster, &job);
        println!("{profile:<10} {JITTER_TIME} of {struck} delays of 200 ms: {ended} generations ended");
    }
}

/// Milliseconds until the node is lost, and until the others go on.
fn kill_a_machine(cluster: &LocalCluster<'_>, job: &str, node: usize) -> (f64, f64) {
    cluster.members(job);
    let supervisor = cluster.supervisor();
    let agent = cluster.agent(node).expect("the node has an agent");
    let ranks = children(agent);
    signal(supervisor, Signal::STOP);
    let killed_ms = now_ms();
    ranks.into_iter().chain([agent]).for_each(|pid| signal(pid, Signal::KILL));
    let lost_ms = lost_at(cluster, node) - killed_ms;
    let on_ms = cluster.event(job, killed_ms, "goes on at") - killed_ms;
    signal(supervisor, Signal::CONT);
    (lost_ms, on_ms)
}

/// Delays that met a node, and generations that ended meanwhile: nothing died.
fn jitter(cluster: &LocalCluster<'_>, job: &str) -> (usize, usize) {
    cluster.members(job);
    let before = ended(cluster, job);
    let account = cluster.ask(&["chaos", JITTER, "--for", JITTER_TIME, "--seed", "1"]);
    let struck = account["faults"].as_array().expect("faults").len();
    (struck, ended(cluster, job) - before)
}

fn ended(cluster: &LocalCluster<'_>, job: &str) -> usize {
    let explained = cluster.ask(&["explain", job]);
    let events = explained["events"].as_array().expect("events");
    events.iter().filter(|event| event["text"].as_str().is_some_and(|text| text.contains(" ended: "))).count()
}

fn lost_at(cluster: &LocalCluster<'_>, node: usize) -> f64 {
    let deadline = Instant::now() + PATIENCE;
    let name = format!("node-{node}");
    loop {
        let answer = cluster.ask(&["nodes"]);
        let nodes = answer["nodes"].as_array().expect("nodes");
        let found = nodes.iter().find(|found| found["name"] == name.as_str()).expect("the node is listed");
        if found["state"] == "lost" {
            return now_ms();
        }
        assert!(Instant::now() < deadline, "{name} is not lost: {found}");
        std::thread::sleep(POLL);
    }
}
