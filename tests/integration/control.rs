//! The control plane as people use it: submissions, cancels, logs, explanations, tokens, roles.

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{Background, Cluster, poll, signal, spec, text};

#[test]
fn a_key_is_one_job_however_often_it_is_submitted() {
    let cluster = Cluster::shared();
    let key = "the-same-key";
    let spec = spec("digits.toml");
    let submit = |steps: &str| {
        let spec = spec.to_str().expect("UTF-8");
        cluster.run(&["submit", spec, "--set", steps, "--key", key, "--json"])
    };
    let first = submit("train.steps=1").expect(0).json();
    let second = submit("train.steps=1").expect(0).json();
    assert_eq!((&first["job"], &first["created"]), (&second["job"], &true.into()));
    assert_eq!(second["created"], false);
    let other = submit("train.steps=2").expect(6).says(&["key"]);
    assert_eq!(other.json()["error"]["code"], "conflict");
    cluster.wait_for_state(&text(&first["job"]), "succeeded");
}

#[test]
fn a_job_is_seen_from_every_side() {
    let cluster = Cluster::shared();
    let job = cluster.submit(2, &["--set", "name=seen"]);
    let view = cluster.wait_for_state(&job, "succeeded");
    assert_eq!((&view["name"], &view["trainer"]), (&"seen".into(), &"digits".into()));
    assert_eq!(view["outcome"]["step"], 2);
    let nodes = cluster.json(&["nodes"]);
    let states: Vec<&Value> = nodes["nodes"].as_array().expect("a list").iter().map(|node| &node["state"]).collect();
    assert_eq!(states, ["up", "up"]);
    for node in nodes["nodes"].as_array().expect("a list") {
        assert_eq!(node["name"], node["node"], "agents join in the order of their names");
    }
    let status = cluster.json(&["status"]);
    assert_eq!((&status["nodes_up"], &status["nodes"]), (&2.into(), &2.into()));
    let explained = cluster.json(&["explain", &job]);
    assert!(explained["events"].as_array().is_some_and(|events| events.len() >= 3), "{explained:#}");
    let checkpoints = cluster.json(&["checkpoint", "list", &job]);
    assert_eq!(checkpoints["checkpoints"][0]["step"], 2);
    cluster.run(&["checkpoint", "verify", &job]).expect(0);
    for people in [&["status"][..], &["jobs"], &["nodes"], &["explain", &job], &["checkpoint", "list"]] {
        assert!(!cluster.run(people).expect(0).stdout.is_empty());
    }
}

/// From one rank to two and back, with the bits of a job that nobody touched.
#[test]
fn a_job_is_resized_while_it_runs_and_ends_with_the_same_bits() {
    let cluster = Cluster::shared();
    const STEPS: u64 = 150;
    let job = cluster.submit(STEPS, &["--ranks", "1"]);
    let world = || cluster.job(&job)["world_sizes"].as_array().and_then(|worlds| worlds.last()?.as_u64());
    poll("the first steps", || cluster.job(&job)["progress"]["step"].as_u64().filter(|step| *step >= 3));
    cluster.run(&["scale", &job, "--ranks", "9"]).expect(2).says(&["use 1 to 8", "lane"]);
    assert_eq!(cluster.json(&["scale", &job, "--ranks", "2"])["ranks"], 2);
    poll("two ranks", || world().filter(|world| *world == 2));
    cluster.run(&["scale", &job, "--ranks", "1"]).expect(0).says(&[]);
    poll("one rank again", || world().filter(|world| *world == 1));
    let resized = cluster.wait_for_state(&job, "succeeded");
    assert_eq!((&resized["recoveries"], &resized["failures"]), (&0.into(), &0.into()), "{resized:#}");
    let calm = cluster.submit(STEPS, &["--ranks", "2"]);
    let calm = cluster.wait_for_state(&calm, "succeeded");
    for key in ["weights_blake3", "loss", "samples"] {
        assert_eq!(resized["outcome"][key], calm["outcome"][key], "{key}");
    }
}

#[test]
fn logs_are_followed_to_the_end_of_the_job() {
    let cluster = Cluster::shared();
    let job = cluster.submit(20, &["--ranks", "2"]);
    let followed = Background::start(cluster.command(&["logs", &job, "-f", "--json"]));
    cluster.wait_for_state(&job, "succeeded");
    let followed = followed.wait().expect(0);
    let ranks: std::collections::BTreeSet<u64> =
        followed.stdout.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()?["rank"].as_u64()).collect();
    assert_eq!(ranks.into_iter().collect::<Vec<_>>(), [0, 1]);
    let all = cluster.run(&["logs", &job]).expect(0).stdout;
    let words = all.lines().filter_map(|line| line.split_whitespace().nth(1));
    let stamps: Vec<&str> = words.filter(|word| word.starts_with("20") && word.ends_with('Z')).collect();
    assert!(
        stamps.len() > 2 && stamps.is_sorted() && ["[rank-0] ", "[rank-1] "].iter().all(|rank| all.contains(rank)),
        "{all}"
    );
    let tail = cluster.run(&["logs", &job, "--rank", "1", "--tail", "1"]).expect(0);
    assert_eq!(tail.stdout.lines().count(), 1, "{tail:#?}");
    assert!(tail.stdout.starts_with("[rank-1] "));
    cluster.run(&["logs", &job, "--rank", "7"]).expect(3).says(&["no rank-7", "2 ranks"]);
}

#[test]
fn an_interrupted_wait_leaves_the_job_and_says_so() {
    let cluster = Cluster::shared();
    let digits = spec("digits.toml");
    let arguments =
        ["submit", digits.to_str().expect("UTF-8"), "--set", "train.steps=1000000", "--set", "name=goes-on"];
    let waiting = Background::start(cluster.command(&[&arguments[..], &["--wait"]].concat()));
    let job = poll("the job", || {
        let jobs = cluster.json(&["jobs"]);
        let job = jobs["jobs"].as_array()?.iter().find(|job| job["name"] == "goes-on")?.clone();
        (job["state"] == "running").then(|| text(&job["job"]))
    });
    signal(waiting.pid(), Signal::INT);
    waiting.wait().expect(130).says(&[&format!("{job} goes on"), &format!("stoke cancel {job}")]);
    assert_eq!(cluster.job(&job)["state"], "running");
    cluster.run(&["cancel", &job]).expect(0);
}

#[test]
fn a_job_stands_for_its_newest_checkpoint_in_a_resume() {
    let cluster = Cluster::shared();
    let first = cluster.submit(2, &[]);
    cluster.wait_for_state(&first, "succeeded");
    let second = cluster.submit(3, &["--resume", &first]);
    assert_eq!(cluster.wait_for_state(&second, "succeeded")["outcome"]["step"], 3);
    let never = cluster.submit(1, &["--set", "resources.gpus=16"]);
    let digits = spec("digits.toml");
    let resume = ["submit", digits.to_str().expect("UTF-8"), "--resume", &never];
    cluster.run(&resume).expect(3).says(&["no committed checkpoint"]);
    cluster.run(&["cancel", &never]).expect(0);
}

#[test]
fn a_cancelled_job_ends_and_stays_ended() {
    let cluster = Cluster::shared();
    let job = cluster.submit(1_000_000, &[]);
    cluster.wait_for_state(&job, "running");
    cluster.run(&["cancel", &job]).expect(0);
    let view = cluster.wait_for_state(&job, "cancelled");
    assert!(view["ended_ms"].is_number());
    let nodes = cluster.json(&["nodes"]);
    let held: Vec<&Value> =
        nodes["nodes"].as_array().into_iter().flatten().flat_map(|node| node["ranks"].as_array()).flatten().collect();
    assert!(held.iter().all(|rank| rank["job"] != job.as_str()), "{held:?}");
}

#[test]
fn what_is_not_there_is_not_found() {
    let cluster = Cluster::shared();
    for arguments in [
        &["explain", "job-9999"][..],
        &["cancel", "job-9999"],
        &["logs", "job-9999"],
        &["token", "revoke", "token-9999"],
        &["checkpoint", "verify", "job-9999"],
        &["checkpoint", "verify", "/no/such/checkpoint"],
    ] {
        let ended = cluster.run(&[arguments, &["--json"]].concat());
        assert_eq!(ended.code(), 3, "{arguments:?}: {ended:#?}");
        assert_eq!(ended.json()["error"]["code"], "not-found", "{arguments:?}");
    }
}

#[test]
fn an_impossible_ask_waits_with_a_reason_for_each_node() {
    let cluster = Cluster::shared();
    for (key, word) in
        [("resources.memory=\"900TiB\"", "memory"), ("resources.gpus=16", "gpu"), ("resources.cpus=4096", "cpu")]
    {
        let job = cluster.submit(1, &["--set", key, "--ranks", "1"]);
        let explained = cluster.json(&["explain", &job]);
        assert_eq!(explained["job"]["state"], "queued", "{explained:#}");
        let reasons = explained["nodes"].as_array().expect("a list");
        assert_eq!(reasons.len(), 2, "{explained:#}");
        for reason in reasons {
            let said = text(&reason["reason"]).to_lowercase();
            assert!(said.contains(word), "{word} is not named: {explained:#}");
        }
        cluster.run(&["cancel", &job]).expect(0);
    }
}

#[test]
fn roles_bound_what_a_user_may_do() {
    let cluster = Cluster::shared();
    let homes = tempfile::tempdir().expect("a temporary folder");
    let viewer = cluster.login(&homes, "viewer");
    let status = viewer.run(&["status", "--json"]).expect(0).json();
    assert_eq!(status["you"], "user/viewer/viewer");
    let spec = spec("digits.toml");
    let submit = ["submit", spec.to_str().expect("UTF-8"), "--set", "train.steps=1"];
    viewer.run(&submit).expect(4).says(&["submitter"]);
    viewer.run(&["token", "create", "--role", "node"]).expect(4);
    let submitter = cluster.login(&homes, "submitter");
    submitter.run(&submit).expect(0);
    submitter.run(&["token", "list"]).expect(4).says(&["may not manage tokens"]);
    // Credentials are not replaced by accident.
    let again =
        ["--cluster", &submitter.dir, "login", "--join", &cluster.token("viewer"), "--coordinator", &cluster.address()];
    crate::harness::run(again).expect(6).says(&["credentials already"]);
}

#[test]
fn a_list_that_is_longer_than_a_frame_is_whole() {
    let cluster = Cluster::start(1);
    let long = 201;
    (0..long).for_each(|_| drop(cluster.token("viewer")));
    let tokens = cluster.json(&["token", "list"]);
    // The cluster's own nodes have joined by tokens too.
    assert!(tokens["tokens"].as_array().expect("a list").len() > long, "{tokens:#}");
}
