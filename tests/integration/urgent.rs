//! Jobs that make room for more urgent ones, and end with the bits of those that were left alone.

use serde_json::Value;

use crate::harness::{Cluster, poll};

const STEPS: u64 = 300;

/// Half of the machine's processors: two ranks fill it.
fn cpus(cluster: &Cluster) -> String {
    let cpus = cluster.json(&["nodes"])["nodes"][0]["cpus"].as_u64().expect("a number");
    format!("resources.cpus={}", (cpus / 2).max(1))
}

fn submit(cluster: &Cluster, steps: u64, more: &[&str]) -> String {
    let cpus = cpus(cluster);
    cluster.submit(steps, &[&["--ranks", "2", "--set", &cpus][..], more].concat())
}

fn reaches(cluster: &Cluster, job: &str, step: u64) {
    poll("some steps", || cluster.job(job)["progress"]["step"].as_u64().filter(|now| *now >= step));
}

fn same_bits(one: &Value, other: &Value) {
    for key in ["weights_blake3", "loss", "samples"] {
        assert_eq!(one["outcome"][key], other["outcome"][key], "{key}");
    }
}

#[test]
fn a_job_makes_room_for_a_more_urgent_one_and_goes_on_from_the_step_at_which_it_stopped() {
    let cluster = Cluster::start(1);
    let low = submit(&cluster, STEPS, &["--set", "resources.ranks_min=2"]);
    reaches(&cluster, &low, 10);
    let high = submit(&cluster, 20, &["--set", "priority=10"]);
    let waits = cluster.wait_for_state(&low, "queued");
    assert!(
        waits["reason"].as_str().is_some_and(|reason| reason.contains(&format!("made room for {high}"))),
        "{waits:#}"
    );
    assert!(waits["checkpoint"]["step"].as_u64().is_some_and(|step| step >= 10), "{waits:#}");
    cluster.wait_for_state(&high, "succeeded");
    let back = cluster.wait_for_state(&low, "succeeded");
    assert_eq!((&back["failures"], &back["recoveries"]), (&0.into(), &0.into()), "{back:#}");
    assert_eq!(back["preemptions"], 1, "{back:#}");
    let told = cluster.run(&["explain", &low]).expect(0).stdout;
    for words in [&*format!("makes room for {high}"), "queued again, goes on when there is room"] {
        assert!(told.contains(words), "{words:?} is not in {told}");
    }
    let calm = submit(&cluster, STEPS, &["--set", "resources.ranks_min=2"]);
    same_bits(&back, &cluster.wait_for_state(&calm, "succeeded"));
}

#[test]
fn a_job_that_may_shrink_is_not_stopped_for_a_more_urgent_one() {
    let cluster = Cluster::start(1);
    let low = submit(&cluster, STEPS, &[]);
    reaches(&cluster, &low, 10);
    let cpus = cpus(&cluster);
    let high = cluster.submit(20, &["--ranks", "1", "--set", "priority=10", "--set", &cpus]);
    cluster.wait_for_state(&high, "succeeded");
    let shrunk = cluster.wait_for_state(&low, "succeeded");
    let worlds: Vec<u64> = shrunk["world_sizes"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
    assert!(worlds.starts_with(&[2, 1]), "{shrunk:#}");
    assert_eq!((&shrunk["failures"], &shrunk["recoveries"]), (&0.into(), &0.into()), "{shrunk:#}");
    let calm = submit(&cluster, STEPS, &[]);
    same_bits(&shrunk, &cluster.wait_for_state(&calm, "succeeded"));
}
