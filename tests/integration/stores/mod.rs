//! Checkpoints and data in object stores: whole jobs against real servers of S3 and Azure, and what happens when those are away, refuse, or are left in
//! the middle of an upload. Without network and the packages in the cache these tests say that they did not run.

mod data;
mod gate;
mod server;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{Background, Run, cluster_of, poll, process_of, processes_naming, signal, step_of, stoke, text};
use gate::{Gate, Mode};
use server::{KEY, Kind, SECRET, Server, Variables};

/// As in `training.rs`: every code path, few enough for two cores.
const STEPS: u64 = 8;
/// So large a layer makes one rank's shard three parts of an upload.
const WIDE: u64 = 1_000;

fn s3() -> Option<&'static Server> {
    static S3: OnceLock<Option<Server>> = OnceLock::new();
    S3.get_or_init(|| Server::start(Kind::S3)).as_ref()
}

/// A run whose checkpoints go to a folder of its own in the store, reached through `port`.
struct Stored {
    run: Run,
    nodes: u32,
    variables: Variables,
}

impl Stored {
    fn new(server: &Server, port: u16, folder: &str, nodes: u32) -> Self {
        let to = format!("{}/{folder}", server.bucket());
        let run = Run::new("digits.toml", nodes)
            .set("train.steps", STEPS)
            .set("checkpoint.every", 4)
            .set("checkpoint.to", to);
        Self { run, nodes, variables: server.variables(port) }
    }

    /// Of another spec: what was set for the first one is left out.
    fn spec(self, name: &str) -> Self {
        Self { run: Run::new(name, self.nodes), ..self }
    }

    fn set(self, key: &str, value: impl std::fmt::Display) -> Self {
        Self { run: self.run.set(key, value), ..self }
    }

    fn with(self, arguments: &[&str]) -> Self {
        Self { run: self.run.with(arguments), ..self }
    }

    fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    fn start(self) -> (Background, TempDir) {
        self.variables.into_iter().fold(self.run, |run, (name, value)| run.env(&name, &value)).start()
    }

    #[track_caller]
    fn finish(self) -> (Value, TempDir) {
        let (running, scratch) = self.start();
        (running.wait().expect(0).json(), scratch)
    }
}

/// A command that reaches the store as a user does.
fn reaching(variables: &Variables, arguments: &[&str]) -> Command {
    let mut command = stoke(arguments);
    command.envs(variables.iter().cloned());
    command
}

/// One rank, files, nothing happens.
fn reference() -> &'static Value {
    static DONE: OnceLock<Value> = OnceLock::new();
    let run = || Run::new("digits.toml", 1).set("train.steps", STEPS).set("checkpoint.every", 4).finish().0;
    DONE.get_or_init(run)
}

#[track_caller]
fn same_weights(left: &Value, right: &Value) {
    for key in ["weights_blake3", "loss", "samples", "step", "metrics"] {
        assert_eq!(left[key], right[key], "{key} differs:\n{left:#}\n{right:#}");
    }
}

/// A URI of the same job's checkpoint at another step.
fn at_step(uri: &str, step: u64) -> String {
    let (job, _) = uri.rsplit_once('/').expect("a folder");
    format!("{job}/step-{step:08}-g1")
}

/// What each store has to do: three ranks write, another number reads, and the command line verifies.
#[track_caller]
fn a_whole_job(server: &Server) {
    let variables = server.variables(server.port);
    let (whole, scratch) = Stored::new(server, server.port, "whole", 3).finish();
    same_weights(&whole, reference());
    let last = text(&whole["checkpoint"]);
    assert!(last.starts_with(server.bucket()), "{last}");
    let middle = at_step(&last, 4);
    for uri in [&last, &middle] {
        let verified =
            Background::start(reaching(&variables, &["checkpoint", "verify", uri, "--json"])).wait().expect(0).json();
        assert_eq!((&verified["ok"], &verified["shards"]), (&true.into(), &3.into()));
    }
    let (resumed, _scratch) = Stored::new(server, server.port, "resumed", 2).with(&["--resume", &middle]).finish();
    same_weights(&resumed, reference());
    let missing = at_step(&last, 5);
    Background::start(reaching(&variables, &["checkpoint", "verify", &missing]))
        .wait()
        .expect(3)
        .says(&["manifest.json is missing"]);
    // Nothing was written on this machine beside what the run says of itself.
    let out: Vec<_> =
        std::fs::read_dir(scratch.path().join("out")).expect("read").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(out, ["summary.json"]);
}

#[test]
fn a_job_checkpoints_to_s3_and_continues_on_another_number_of_ranks() {
    let Some(server) = s3() else { return };
    a_whole_job(server);
}

#[test]
fn a_job_checkpoints_to_azure_and_continues_on_another_number_of_ranks() {
    let Some(server) = Server::start(Kind::Azure) else { return };
    a_whole_job(&server);
    let verify = ["checkpoint", "verify", "az://stoke-tests/whole/x"];
    let mut wrong = reaching(&server.variables(server.port), &verify);
    wrong.env("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=");
    Background::start(wrong).wait().expect(1).says(&["403", "AZURE_STORAGE_ACCOUNT_KEY"]);
}

#[test]
fn credentials_that_are_wrong_or_missing_are_said_by_name() {
    let Some(server) = s3() else { return };
    let verify = ["checkpoint", "verify", "s3://stoke-tests/nothing/x"];
    let said = |name: &str, value: &str| {
        let mut command = reaching(&server.variables(server.port), &verify);
        command.env(name, value);
        let ended = Background::start(command).wait();
        assert!(!ended.stderr.contains(SECRET), "{ended:#?}");
        ended.expect(1)
    };
    said("AWS_SECRET_ACCESS_KEY", "wrong").says(&["403", "AWS_SECRET_ACCESS_KEY"]);
    said("AWS_ACCESS_KEY_ID", "nobody").says(&["403", "AWS_ACCESS_KEY_ID"]);
    let mut nobody = reaching(&server.variables(server.port), &verify);
    // No machine's identity is asked: nothing listens there.
    nobody
        .env_remove("AWS_ACCESS_KEY_ID")
        .env_remove("AWS_SECRET_ACCESS_KEY")
        .env("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9");
    Background::start(nobody)
        .wait()
        .expect(1)
        .says(&["set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"]);
    let mut plain = reaching(&server.variables(server.port), &["checkpoint", "verify", "s3://a:b@bucket/x"]);
    plain.env_remove("AWS_ENDPOINT_URL");
    Background::start(plain).wait().expect(2).says(&["s3://bucket/folder"]);
}

/// The checkpoint before stays, the timeline says what to set, the job goes on, and the next checkpoint is there again.
#[test]
fn credentials_that_expire_cost_a_checkpoint_and_no_step() {
    let Some(server) = s3() else { return };
    let gate = Gate::before(server.port);
    let (running, scratch) =
        Stored::new(server, gate.port, "expired", 2).set("train.steps", 60).set("checkpoint.every", 10).start();
    let cluster = cluster_of(&scratch);
    let first = poll("a checkpoint", || checkpoints(&cluster).into_iter().next_back());
    gate.set(Mode::Expired);
    let denied = poll("news of it", || timeline(&cluster).into_iter().find(|text| text.contains("was not written")));
    for words in ["ExpiredToken", "AWS_SESSION_TOKEN", "environment of the node's agent"] {
        assert!(denied.contains(words), "{denied}");
    }
    assert!(gate.answered() > 0 && checkpoints(&cluster).contains(&first), "the one before stays");
    gate.set(Mode::Open);
    let summary = finish_and_look(running, &scratch);
    assert_eq!((&summary["state"], &summary["recoveries"]), (&"succeeded".into(), &0.into()), "{summary:#}");
}

/// A store that is killed and comes back later; the ranks train meanwhile.
#[test]
fn a_store_that_is_down_costs_checkpoints_and_no_step() {
    let Some(mut server) = Server::start(Kind::S3) else { return };
    let (running, scratch) =
        Stored::new(&server, server.port, "down", 2).set("train.steps", 60).set("checkpoint.every", 10).start();
    let cluster = cluster_of(&scratch);
    poll("a checkpoint", || checkpoints(&cluster).into_iter().next_back());
    server.kill();
    poll("news of it", || timeline(&cluster).into_iter().find(|text| text.contains("the store does not answer")));
    let before = step_of(&cluster);
    server.start_again();
    let summary = finish_and_look(running, &scratch);
    assert_eq!((&summary["state"], &summary["recoveries"]), (&"succeeded".into(), &0.into()), "{summary:#}");
    assert!(summary["step"].as_u64() >= before, "{summary:#}");
    let verify = ["checkpoint", "verify", &text(&summary["checkpoint"])];
    Background::start(reaching(&server.variables(server.port), &verify)).wait().expect(0);
}

/// The coordinator has no credentials; the node's agent has.
#[test]
fn a_prune_removes_from_the_store_and_leaves_what_is_pinned() {
    let Some(server) = s3() else { return };
    let (running, scratch) =
        Stored::new(server, server.port, "pruned", 1).set("train.steps", 400).set("checkpoint.every", 20).start();
    let cluster = cluster_of(&scratch);
    let asked = |arguments: &[&str]| {
        let mut command = stoke(["--json", "--cluster"]);
        command.arg(&cluster).arg("checkpoint").args(arguments);
        Background::start(command).wait()
    };
    poll("a pin", || (asked(&["pin", "job-1", "20"]).code() == 0).then_some(()));
    poll("a second one", || checkpoints(&cluster).get(1).cloned());
    asked(&["prune", "job-1", "--keep", "1"]).expect(0);
    poll("a third one", || checkpoints(&cluster).get(2).cloned());
    asked(&["prune", "job-1", "--keep", "1"]).expect(0);
    let swept =
        poll("news of it", || timeline(&cluster).into_iter().find(|text| text.contains("removed pruned checkpoints")));
    assert!(swept.contains("removed"), "{swept}");
    let (summary, variables) = (finish_and_look(running, &scratch), server.variables(server.port));
    let last = text(&summary["checkpoint"]);
    let verify =
        |step| Background::start(reaching(&variables, &["checkpoint", "verify", &at_step(&last, step)])).wait();
    verify(20).expect(0);
    verify(40).expect(3).says(&["manifest.json is missing"]);
}

/// The rank dies in the middle of a shard of several parts. Nothing of it is seen, and the job begins at the checkpoint before it.
#[test]
fn an_upload_that_is_left_in_the_middle_is_never_seen() {
    let Some(server) = s3() else { return };
    let gate = Gate::before(server.port);
    let (running, scratch) = Stored::new(server, gate.port, "partial", 1)
        .set("model.hidden", WIDE)
        .set("train.steps", 40)
        .set("checkpoint.keep", 20)
        .start();
    let cluster = cluster_of(&scratch);
    poll("a checkpoint", || checkpoints(&cluster).into_iter().next_back());
    // More than a part of 8 MiB, and not all of them.
    gate.set(Mode::Stall { after: 12 << 20 });
    poll("an upload in its middle", || gate.is_stalled().then_some(()));
    let (first, step) = checkpoints(&cluster).into_iter().zip(steps(&cluster)).next_back().expect("it stays");
    let unfinished = at_step(&first, step + 4);
    let variables = server.variables(server.port);
    let verify = |uri: &str| Background::start(reaching(&variables, &["checkpoint", "verify", uri])).wait();
    verify(&unfinished).expect(3).says(&["manifest.json is missing"]);
    signal(rank_of(&cluster), Signal::KILL);
    gate.set(Mode::Open);
    let summary = finish_and_look(running, &scratch);
    assert_eq!((&summary["state"], &summary["recoveries"]), (&"succeeded".into(), &1.into()), "{summary:#}");
    verify(&first).expect(0);
    verify(&text(&summary["checkpoint"])).expect(0);
}

/// Secrets reach ranks, and are in no process's arguments, no environment of a rank and no file of the cluster.
#[test]
fn secrets_of_a_store_are_in_no_file_and_in_no_environment_of_a_rank() {
    let Some(server) = s3() else { return };
    let gate = Gate::before(server.port);
    let (running, scratch) = Stored::new(server, gate.port, "secrets", 1).variable("RUST_LOG", "debug").start();
    let cluster = cluster_of(&scratch);
    gate.set(Mode::Stall { after: 0 });
    poll("an upload that waits", || gate.is_stalled().then_some(()));
    let environment = std::fs::read(format!("/proc/{}/environ", rank_of(&cluster))).expect("read");
    let environment = String::from_utf8_lossy(&environment).into_owned();
    assert!(environment.contains("PATH=") && !environment.contains("AWS_"), "{environment}");
    assert_eq!(files_with(&cluster, SECRET), Vec::<PathBuf>::new());
    assert_eq!(processes_naming(SECRET), []);
    gate.set(Mode::Open);
    running.wait().expect(0);
}

#[track_caller]
fn finish_and_look(running: Background, scratch: &TempDir) -> Value {
    let ended = running.wait().expect(0);
    assert!(!ended.stderr.contains(SECRET) && !ended.stderr.contains(KEY), "{ended:#?}");
    assert_eq!(files_with(scratch.path(), SECRET), Vec::<PathBuf>::new());
    ended.json()
}

/// URIs of the committed ones, oldest first.
fn checkpoints(cluster: &Path) -> Vec<String> {
    let mut command = stoke(["--json", "checkpoint", "list", "--cluster"]);
    command.arg(cluster);
    let listed: Value = serde_json::from_str(&Background::start(command).wait().stdout).unwrap_or_default();
    listed["checkpoints"].as_array().into_iter().flatten().map(|checkpoint| text(&checkpoint["uri"])).collect()
}

/// Their steps.
fn steps(cluster: &Path) -> Vec<u64> {
    let of = |uri: String| uri.rsplit_once("step-").and_then(|(_, name)| name.get(..8)?.parse().ok());
    checkpoints(cluster).into_iter().filter_map(of).collect()
}

/// What has happened to the one job.
fn timeline(cluster: &Path) -> Vec<String> {
    let mut command = stoke(["--json", "explain", "job-1", "--cluster"]);
    command.arg(cluster);
    let told: Value = serde_json::from_str(&Background::start(command).wait().stdout).unwrap_or_default();
    told["events"].as_array().into_iter().flatten().map(|event| text(&event["text"])).collect()
}

/// The rank on the first node.
fn rank_of(cluster: &Path) -> u32 {
    let agent = process_of(cluster, "node-1");
    poll("a rank", || {
        let workers = processes_naming("worker").into_iter().map(|(pid, _)| pid);
        workers.into_iter().find(|pid| parent_of(*pid) == Some(agent))
    })
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// Files below a folder that contain `word`.
fn files_with(folder: &Path, word: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let found = entries.flat_map(|path| {
        if path.is_dir() {
            return files_with(&path, word);
        }
        let bytes = std::fs::read(&path).unwrap_or_default();
        let holds = bytes.windows(word.len()).any(|window| window == word.as_bytes());
        Vec::from_iter(holds.then_some(path))
    });
    found.collect()
}
