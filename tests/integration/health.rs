//! Ranks and steps that live and are wrong or slow: numbers that are not finite, and what the spec makes of them (`train.on_nan`), and ranks
//! that fall behind (`train.straggler`). Wrong memory is in `chaos.rs`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::{Cluster, Ended, Run, poll, process_of, spec, text};
use crate::nodes::children;

/// The first update is so large that no loss after it is finite.
fn diverging(policy: &str) -> (Ended, Value) {
    let run = Run::new("domains.toml", 2).set("train.steps", 40).set("checkpoint.every", 1);
    let run = run.set("schedule.lr", 1).set("schedule.warmup_steps", 0).set("optimizer.weight_decay", "1e30");
    let run = run.set("train.on_nan", policy);
    let (running, _scratch) = run.start();
    let ended = running.wait().expect(1).says(&["loss or gradient of step-"]);
    let summary = ended.json();
    assert_eq!(summary["state"], "failed", "{summary:#}");
    (ended, summary)
}

#[test]
fn a_loss_that_is_not_finite_fails_the_job_once_with_its_lanes_and_the_mend() {
    let (ended, summary) = diverging("fail");
    let reason = text(&summary["reason"]);
    assert!(
        reason.contains("loss or gradient of step-1 is not finite, from lanes 0, 1, 2, 3 of rank-0 on node-"),
        "{reason}"
    );
    assert!(reason.contains("lanes 4, 5, 6, 7 of rank-1 on node-") && reason.contains("clip_norm"), "{reason}");
    // No attempt is wasted on what every attempt would do.
    assert_eq!(summary["recoveries"], 0, "{summary:#}");
    ended.says(&["is not finite, also when computed again", "rows=["]);
}

#[test]
fn steps_that_are_not_finite_are_skipped_so_many_times_in_a_row() {
    let (_, summary) = diverging("skip");
    let reason = text(&summary["reason"]);
    assert!(reason.contains("of step-11 is not finite") && reason.contains("which were skipped"), "{reason}");
}

#[test]
fn a_job_that_goes_back_for_a_step_and_finds_it_again_fails() {
    let (_, summary) = diverging("rollback");
    let reason = text(&summary["reason"]);
    assert!(reason.contains("of step-1 is not finite") && reason.contains("again after going back"), "{reason}");
    assert_eq!(summary["recoveries"], 1, "it went back once, and failed: {summary:#}");
}

/// Stops a process again and again, for all of the time but 20 ms a turn: what a thermal limit or a noisy neighbour does to a machine.
pub struct Brake {
    pid: u32,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Brake {
    /// Stopped for so many milliseconds in a turn.
    pub fn on(pid: u32, millis: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let send = move |signal| Pid::from_raw(pid.cast_signed()).is_some_and(|pid| kill_process(pid, signal).is_ok());
        let work = move || {
            while !stopped.load(Ordering::Relaxed) && send(Signal::STOP) {
                thread::sleep(Duration::from_millis(millis));
                send(Signal::CONT);
                thread::sleep(Duration::from_millis(20));
            }
        };
        Self { pid, stop, thread: Some(thread::spawn(work)) }
    }
}

impl Drop for Brake {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
        let _ = Pid::from_raw(self.pid.cast_signed()).map(|pid| kill_process(pid, Signal::CONT));
    }
}

/// The ranks' processes, by their agents'.
pub fn workers(cluster: &Cluster, nodes: u32) -> Vec<u32> {
    (1..=nodes).flat_map(|node| children(process_of(cluster.dir(), &format!("node-{node}")))).collect()
}

#[test]
fn a_rank_that_computes_slowly_is_told_of_and_equal_ranks_are_not() {
    let cluster = Cluster::start(3);
    let (spec, steps) = (spec("domains.toml"), "train.steps=100000");
    let spec = spec.to_str().expect("UTF-8");
    let job = text(&cluster.json(&["submit", spec, "--set", steps])["job"]);
    poll("the job trains", || cluster.job(&job)["progress"]["step"].as_u64().filter(|step| *step > 50));
    let events = || cluster.json(&["explain", &job])["events"].to_string();
    assert!(!events().contains("is slow"), "{}", events());
    let slow = workers(&cluster, 3)[1];
    let brake = Brake::on(slow, 60);
    let view = poll("the slow rank is told of", || {
        let view = cluster.job(&job);
        view["slow"].as_array().is_some_and(|slow| slow.len() == 1).then_some(view)
    });
    let rank = view["slow"][0]["rank"].as_u64().expect("a rank");
    assert!(events().contains(&format!("rank-{rank} on node-")) && events().contains("ms a lane"), "{}", events());
    cluster.run(&["status"]).expect(0);
    assert_eq!(cluster.json(&["status"])["ranks_slow"], 1);
    drop(brake);
    poll("it keeps up again", || events().contains("keeps up with the others again").then_some(()));
    cluster.run(&["cancel", &job]).expect(0);
}

/// The successor joins beside the slow rank, on the node that has none, and takes its place between two steps.
#[test]
fn a_rank_that_computes_slowly_moves_elsewhere_where_the_spec_says_so_and_no_bit_changes() {
    const STEPS: &str = "train.steps=1500";
    let cluster = Cluster::start(3);
    let spec = spec("domains.toml");
    let spec = spec.to_str().expect("UTF-8");
    let submit = |more: &[&str]| {
        let arguments = [&["submit", spec, "--set", STEPS, "--ranks", "2"][..], more].concat();
        text(&cluster.json(&arguments)["job"])
    };
    let calm = submit(&[]);
    let calm = cluster.wait_for_state(&calm, "succeeded");
    let job = submit(&["--set", "train.straggler=replace"]);
    poll("the job trains", || cluster.job(&job)["progress"]["step"].as_u64().filter(|step| *step > 50));
    let slow = workers(&cluster, 3)[0];
    let _brake = Brake::on(slow, 60);
    let view = cluster.wait_for_state(&job, "succeeded");
    let events = cluster.json(&["explain", &job])["events"].to_string();
    assert!(events.contains("is slow") && events.contains("and moves from node-"), "{events}");
    assert_eq!(view["outcome"]["weights_blake3"], calm["outcome"]["weights_blake3"]);
    // Nobody was lost: the old rank left between two steps.
    assert_eq!((&view["recoveries"], &view["failures"]), (&0.into(), &0.into()), "{view:#}");
}
