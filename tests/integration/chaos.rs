//! Faults by a seeded schedule, through `stoke run --chaos` and `stoke chaos`: whatever strikes, the weights are those of a calm run, and the
//! account says what was done.

use std::sync::OnceLock;

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{Background, Cluster, Run, cluster_of, poll, run, signal, step_of, text};

/// Seconds of training, on a fast machine too: enough for several faults.
const STEPS: u64 = 600;

fn short() -> Run {
    Run::new("domains.toml", 3).set("train.steps", STEPS).set("checkpoint.every", 40)
}

/// What each of these runs must end with.
fn undisturbed() -> &'static Value {
    static DONE: OnceLock<Value> = OnceLock::new();
    DONE.get_or_init(|| short().finish().0)
}

#[track_caller]
fn same_weights(summary: &Value) {
    let reference = undisturbed();
    for key in ["weights_blake3", "loss", "samples", "ledger", "step", "metrics"] {
        assert_eq!(summary[key], reference[key], "{key} differs:\n{summary:#}\n{reference:#}");
    }
    // Each sample of every step once, as the sums have shown it, whoever was lost.
    assert_eq!(summary["chaos"]["ledger"], serde_json::json!([[0, summary["samples"]]]), "{summary:#}");
}

#[track_caller]
fn same_weights_without_a_loss(summary: &Value) {
    same_weights(summary);
    let chaos = &summary["chaos"];
    assert_eq!((&chaos["steps_lost"], &chaos["samples_lost"]), (&0.into(), &0.into()), "{chaos:#}");
    assert!(chaos["committed_samples_per_second"].as_f64().is_some_and(|rate| rate > 0.0), "{chaos:#}");
    let share = chaos["progress_share"].as_f64().expect("a share");
    assert!((0.0..=1.0).contains(&share), "{chaos:#}");
}

/// The faults of a kind that met somebody.
fn met<'a>(account: &'a Value, fault: &str) -> Vec<&'a Value> {
    let faults = account["faults"].as_array().expect("faults").iter();
    faults.filter(|struck| struck["fault"] == fault && struck["met"] == true).collect()
}

#[test]
fn ranks_that_are_killed_again_and_again_change_no_bit() {
    let (running, _scratch) = short().with(&["--chaos", "kill-rank every 2s", "--seed", "7"]).start();
    let ended = running.wait().expect(0).says(&["chaos: kill-rank: the rank of node-", "went on at step", "seed 7"]);
    let summary = ended.json();
    same_weights_without_a_loss(&summary);
    let killed = met(&summary["chaos"], "kill-rank");
    assert!(!killed.is_empty(), "{summary:#}");
    assert!(killed.iter().any(|struck| text(&struck["effect"]).contains("killed by signal 9")), "{summary:#}");
    assert!(summary["chaos"]["recoveries"].as_u64().is_some_and(|count| count > 0), "{summary:#}");
    assert_eq!((&summary["chaos"]["seed"], &summary["restarts"]), (&7.into(), &0.into()));
}

/// What a lane rounds is rounded alike by whoever computes it again.
#[test]
fn ranks_that_are_killed_change_no_bit_of_what_is_computed_in_bf16() {
    let run = |nodes| Run::new("domains.toml", nodes).set("train.steps", STEPS).set("train.precision", "bf16");
    let (calm, _scratch) = run(1).finish();
    let (running, _scratch) = run(2).with(&["--chaos", "kill-rank at 1s, kill-rank at 2500ms", "--seed", "7"]).start();
    let summary = running.wait().expect(0).json();
    for key in ["weights_blake3", "loss", "samples", "step", "metrics"] {
        assert_eq!(summary[key], calm[key], "{key} differs:\n{summary:#}\n{calm:#}");
    }
    assert!(!met(&summary["chaos"], "kill-rank").is_empty(), "{summary:#}");
}

/// Parts are handed over at each loss, also while the coordinator is away.
#[test]
fn ranks_that_keep_parts_of_the_optimizers_state_and_are_killed_change_no_bit() {
    let run = Run::new("domains.toml", 4).set("train.steps", STEPS).set("checkpoint.every", 40);
    let schedule = "kill-rank every 2s, kill-coordinator at 3s";
    let (running, _scratch) = run.set("train.sharding", "zero1").with(&["--chaos", schedule, "--seed", "5"]).start();
    let ended = running.wait().expect(0);
    let summary = ended.json();
    same_weights(&summary);
    assert!(!met(&summary["chaos"], "kill-rank").is_empty(), "{summary:#}");
    assert!(summary["world_sizes"].as_array().is_some_and(|sizes| sizes.contains(&4.into())), "{summary:#}");
}

#[test]
fn a_coordinator_and_a_node_that_are_killed_change_no_bit() {
    let schedule = "kill-coordinator at 1500ms, kill-node at 3s; pause-rank at 2500ms for 300ms";
    let (running, _scratch) = short().with(&["--chaos", schedule, "--seed", "11"]).start();
    let summary = running.wait().expect(0).json();
    same_weights_without_a_loss(&summary);
    let chaos = &summary["chaos"];
    for fault in ["kill-coordinator", "kill-node"] {
        let [struck] = met(chaos, fault)[..] else { panic!("one {fault}: {chaos:#}") };
        assert!(struck["back_after_seconds"].is_number(), "{struck:#}");
    }
    assert!(met(chaos, "pause-rank").iter().all(|struck| struck["paused_seconds"].is_number()), "{chaos:#}");
    assert_eq!(summary["restarts"], 2, "{summary:#}");
}

/// Both ways between a node and all others: long enough to lose the node, and short enough to keep the lease.
#[test]
fn nodes_that_are_cut_off_change_no_bit() {
    let schedule = "partition-node at 1500ms for 6s, partition-node at 9s for 1s";
    let (running, _scratch) = short().with(&["--chaos", schedule, "--seed", "3"]).start();
    let ended = running.wait().expect(0).says(&["chaos: partition-node: node-", "for 6.0s"]);
    let summary = ended.json();
    same_weights_without_a_loss(&summary);
    let cut = met(&summary["chaos"], "partition-node");
    assert!(!cut.is_empty(), "{summary:#}");
    assert!(summary["chaos"]["recoveries"].as_u64().is_some_and(|count| count > 0), "{summary:#}");
}

/// Packets that are lost, late, overtaken or doubled, one way that is cut, processes that stand half of the time: slower, and the same bits.
#[test]
fn bad_weather_and_slow_processes_change_no_bit() {
    let schedule = "lose-packets at 1s for 2s by 10%, delay-packets at 2s for 2s by 20ms, reorder-packets at 3s for 2s by 30%, \
                    duplicate-packets at 4s for 2s by 30%, partition-inbound at 6s for 700ms, partition-outbound at 8s for 700ms, \
                    slow-rank at 5s for 2s by 50%, slow-node at 9s for 2s by 30%";
    let (running, _scratch) = short().with(&["--chaos", schedule, "--seed", "5"]).start();
    let ended = running.wait().expect(0).says(&["chaos: lose-packets: node-", "for 2.0s by 10%"]);
    let summary = ended.json();
    same_weights_without_a_loss(&summary);
    for fault in ["lose-packets", "delay-packets", "reorder-packets", "duplicate-packets", "slow-rank"] {
        let [struck] = met(&summary["chaos"], fault)[..] else { panic!("one {fault}: {summary:#}") };
        assert!(struck["amount"].is_string() && struck["paused_seconds"].is_number(), "{struck:#}");
    }
}

/// Checkpoints that cannot be written are given up, and the ones before them stay; one at the end is tried again.
#[test]
fn a_disk_that_is_full_now_and_then_changes_no_bit() {
    let run = short().set("checkpoint.every", 15).set("restart.attempts", 20);
    let (running, _scratch) = run.with(&["--chaos", "fill-disk every 3s for 1s", "--seed", "5"]).start();
    let ended = running.wait();
    if ended.code() == 2 {
        return drop(ended.says(&["fill-disk needs root"]));
    }
    let summary = ended.expect(0).json();
    same_weights(&summary);
    let faults = summary["chaos"]["faults"].as_array().expect("faults");
    // A machine may have no overlay file system.
    let has_none = faults.iter().any(|struck| text(&struck["effect"]).contains("mount"));
    assert!(has_none || !met(&summary["chaos"], "fill-disk").is_empty(), "{summary:#}");
}

/// The last checkpoint has nothing behind it that could make up for it: it waits for room.
#[test]
fn a_disk_that_is_full_at_the_end_is_waited_for() {
    let run = Run::new("domains.toml", 3).set("train.steps", 200).set("checkpoint.every", 150).set("train.batch", 64);
    let (running, _scratch) = run.with(&["--chaos", "fill-disk at 700ms for 12s", "--seed", "5"]).start();
    let ended = running.wait();
    if ended.code() == 2 {
        return drop(ended.says(&["fill-disk needs root"]));
    }
    let summary = ended.expect(0).json();
    assert_eq!((&summary["recoveries"], &summary["chaos"]["steps_lost"]), (&0.into(), &0.into()), "{summary:#}");
    assert_eq!(summary["step"], 200, "{summary:#}");
}

/// A run that has lost every rank begins again from a checkpoint; a damaged one is not it.
#[test]
fn damage_and_the_loss_of_all_ranks_cost_steps_and_no_bit() {
    let schedule = "corrupt-shard at 3s, kill-all-ranks at 4s";
    // Each of the three counts as a failure.
    let run = short().set("checkpoint.every", 15);
    let (running, _scratch) = run.with(&["--chaos", schedule, "--seed", "3"]).start();
    let summary = running.wait().expect(0).json();
    same_weights(&summary);
    for struck in met(&summary["chaos"], "corrupt-shard") {
        let effect = text(&struck["effect"]);
        assert!(effect.contains("found by a verification") || effect.contains("removed since"), "{struck:#}");
    }
}

/// Most agree: the rank is named and replaced, and nothing of it was in any sum.
#[test]
fn a_rank_whose_memory_is_wrong_is_named_and_replaced_and_changes_no_bit() {
    let (running, _scratch) = short().with(&["--chaos", "corrupt-rank at 3s", "--seed", "5"]).start();
    let ended = running.wait().expect(0).says(&["chaos: corrupt-rank: the rank of node-"]);
    let summary = ended.json();
    same_weights_without_a_loss(&summary);
    let [struck] = met(&summary["chaos"], "corrupt-rank")[..] else { panic!("one: {summary:#}") };
    let effect = text(&struck["effect"]);
    assert!(effect.contains("as its parameters, 2 others have"), "{struck:#}");
}

/// One against one: nobody is believed, and steps are done again.
#[test]
fn of_two_ranks_that_differ_none_is_believed_and_the_job_goes_back_to_its_checkpoint() {
    let run = Run::new("domains.toml", 2).set("train.steps", STEPS).set("checkpoint.every", 40);
    let (running, _scratch) = run.with(&["--chaos", "corrupt-rank at 4s", "--seed", "5"]).start();
    let summary = running.wait().expect(0).json();
    same_weights(&summary);
    let [struck] = met(&summary["chaos"], "corrupt-rank")[..] else { panic!("one: {summary:#}") };
    assert!(text(&struck["effect"]).contains("none have a majority"), "{struck:#}");
    assert_eq!(summary["recoveries"], 1, "{summary:#}");
}

#[test]
fn an_agent_that_is_killed_on_purpose_is_always_started_again() {
    let cluster = Cluster::start(1);
    let schedule = "kill-node every 700ms";
    let account = cluster.json(&["chaos", schedule, "--for", "6s", "--seed", "1"]);
    assert!(met(&account, "kill-node").len() > 5, "{account:#}");
    assert_eq!(account["jobs"], serde_json::json!([]));
    cluster.run(&["status"]).expect(0);
    let restarts = cluster.state()["processes"][1]["restarts"].as_u64();
    assert!(restarts.is_some_and(|restarts| restarts > 5), "{:#}", cluster.state());
}

#[test]
fn jobs_of_a_cluster_that_stays_go_on_under_faults() {
    let cluster = Cluster::start(2);
    let job = cluster.submit(150, &["--ranks", "2"]);
    let arguments = ["chaos", "pause-node at 700ms for 500ms, kill-rank at 2s", "--for", "3s", "--seed", "5", "--json"];
    let account = Background::start(cluster.command(&arguments)).wait().expect(0).json();
    assert_eq!(account["jobs"][0]["job"], job.as_str(), "{account:#}");
    assert_eq!(account["jobs"][0]["steps_lost"], 0, "{account:#}");
    for struck in met(&account, "pause-node") {
        assert!(struck["paused_seconds"].as_f64().is_some_and(|seconds| seconds >= 0.5), "{struck:#}");
    }
    cluster.wait_for_state(&job, "succeeded");
}

/// Whoever ends it early has the account all the same, programs too.
#[test]
fn an_account_is_told_also_when_the_run_or_its_cluster_is_stopped() {
    let endless = Run::new("domains.toml", 2).set("train.steps", 1_000_000);
    let (running, scratch) = endless.with(&["--chaos", "kill-rank every 1s", "--seed", "7"]).start();
    let dir = cluster_of(&scratch);
    poll("some steps", || step_of(&dir).filter(|step| *step > 0));
    signal(running.pid(), Signal::INT);
    let document = running.wait().expect(130).says(&["chaos: ", "seed 7"]).json();
    assert_eq!((&document["error"]["code"], &document["chaos"]["seed"]), (&"interrupted".into(), &7.into()));
    assert!(document["chaos"]["faults"].is_array() && document["chaos"]["recoveries"].is_u64(), "{document:#}");

    let cluster = Cluster::start(1);
    let arguments = ["chaos", "kill-agent every 500ms", "--for", "60s", "--seed", "5", "--json"];
    let running = Background::start(cluster.command(&arguments));
    poll("a fault", || cluster.state()["processes"][1]["restarts"].as_u64().filter(|restarts| *restarts > 0));
    signal(cluster.supervisor(), Signal::TERM);
    let document = running.wait().expect(3).says(&["no local cluster runs"]).json();
    assert_eq!((&document["error"]["code"], &document["seed"]), (&"not-found".into(), &5.into()));
    assert!(!met(&document, "kill-agent").is_empty(), "{document:#}");
}

#[test]
fn a_wrong_schedule_is_refused_before_anything_starts() {
    let (running, scratch) = short().with(&["--chaos", "kill-rank every 3s, kil-node at 4s"]).start();
    let words = ["item 2 \"kil-node at 4s\": there is no fault \"kil-node\"", "kill-node"];
    let document = running.wait().expect(2).says(&words).json();
    assert_eq!(document["error"]["code"], "invalid");
    assert!(!scratch.path().join("out").exists());
    let (running, _scratch) = short().with(&["--seed", "3"]).start();
    running.wait().expect(2).says(&["--chaos"]);
    let nowhere = tempfile::tempdir().expect("a temporary folder");
    let dir = nowhere.path().to_str().expect("UTF-8");
    run(["chaos", "kill-rank every", "--cluster", dir]).expect(2).says(&["no time after \"every\""]);
    run(["chaos", "kill-rank every 3s", "--cluster", dir]).expect(3).says(&["no local cluster runs", "stoke up"]);
}
