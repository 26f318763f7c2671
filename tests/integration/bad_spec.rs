//! Specs and data that cannot be trained on: what is said, where, and with which exit code.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::harness::{Cluster, Run, run, spec, text};

/// A copy of a spec with one change, and absolute data.
fn changed(from: &str, to: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let original = std::fs::read_to_string(spec("digits.toml")).expect("the spec is there");
    assert!(original.contains(from), "{from:?} is not in the spec");
    let path = dir.path().join("job.toml");
    std::fs::write(&path, original.replacen(from, to, 1)).expect("written");
    (dir, path)
}

fn line_of(path: &Path, word: &str) -> usize {
    let text = std::fs::read_to_string(path).expect("the spec is there");
    1 + text.lines().position(|line| line.contains(word)).expect("the word is in the spec")
}

#[track_caller]
fn refused(path: &Path, word: &str, says: &[&str]) {
    let place = format!("{}:{}: ", path.display(), line_of(path, word));
    let ended = run(["run", "--json", path.to_str().expect("UTF-8")]).expect(2).says(&[&place]).says(says);
    assert_eq!(ended.json()["error"]["code"], "invalid");
}

#[test]
fn an_unknown_key_is_named_with_its_line() {
    let (_dir, path) = changed("epochs =", "epoch =");
    refused(&path, "epoch =", &["epoch", "epochs"]);
    let (_dir, path) = changed("[optimizer]", "[optimiser]");
    refused(&path, "[optimiser]", &["optimiser"]);
}

#[test]
fn an_unknown_key_of_the_trainer_is_named_with_its_line() {
    let (_dir, path) = changed("hidden =", "hiden =");
    refused(&path, "hiden =", &["hiden"]);
}

#[test]
fn a_wrong_type_is_named_with_its_line() {
    let (_dir, path) = changed("batch = 128", "batch = \"many\"");
    refused(&path, "batch =", &["invalid type", "expected a whole number"]);
    let (_dir, path) = changed("lr = 3e-3", "lr = \"fast\"");
    refused(&path, "lr =", &["lr"]);
}

#[test]
fn a_value_out_of_bounds_is_named_with_its_mend() {
    let (_dir, path) = changed("batch = 128", "batch = 130");
    refused(&path, "batch =", &["multiple of 8"]);
    let (_dir, path) = changed("trainer = \"digits\"", "trainer = \"poetry\"");
    refused(&path, "trainer =", &["poetry", "digits"]);
    let digits = spec("digits.toml");
    let digits = digits.to_str().expect("UTF-8");
    run(["run", digits, "--ranks", "9"]).expect(2).says(&["ranks = 9", "use 1 to 8"]);
    run(["run", digits, "--set", "train.batch"]).expect(2).says(&["has no '='"]);
    run(["run", "/no/such/spec.toml"]).expect(2).says(&["/no/such/spec.toml"]);
}

#[test]
fn a_missing_data_file_is_named_before_anything_starts() {
    let (running, _scratch) = Run::new("digits.toml", 1).set("data.train", "\"/no/such/digits.jsonl\"").start();
    let ended = running.wait().expect(2).says(&["/no/such/digits.jsonl", "paths in a spec are relative to its folder"]);
    assert!(!ended.stderr.contains("starting"), "{ended:#?}");
}

#[test]
fn a_data_file_that_no_node_has_fails_the_job_with_its_name() {
    let cluster = Cluster::shared();
    let missing = ["--set", "data.train=\"/no/such/digits.jsonl\"", "--set", "restart.attempts=1"];
    let job = cluster.submit(1, &missing);
    let view = cluster.wait_for_state(&job, "failed");
    assert!(text(&view["reason"]).contains("/no/such/digits.jsonl"), "{view:#}");
}

#[test]
fn a_change_on_the_command_line_is_blamed_and_not_the_file() {
    let digits = spec("digits.toml");
    let digits = digits.to_str().expect("UTF-8");
    for (change, says) in [
        ("train.epochs=abc", "--set train.epochs: invalid type: string \"abc\", expected a whole number"),
        ("optimizer.name=foo", "--set optimizer.name: unknown variant `foo`"),
        ("priority=99999999999", "expected a whole number from -2147483648 to 2147483647"),
        ("model.channels=[4,8,9]", "an array of length 2"),
        ("optimizer.betas=[0.9,0.99,0.5]", "an array of length 2"),
        ("model.channels=\"a\"", "--set model.channels: invalid type"),
        ("train.batch=130", "--set train.batch: batch = 130 does not divide into 8 lanes"),
        ("name.deep=1", "--set name.deep: name is not a section"),
    ] {
        let ended = run(["run", digits, "--set", "train.seed=1", "--set", change]).expect(2).says(&[says]);
        assert!(!ended.stderr.contains("digits.toml"), "{ended:#?}");
    }
    // What the file itself has wrong is shown where it stands, whatever is changed beside it.
    let (_dir, path) = changed("batch = 128", "batch = \"many\"");
    let place = format!("{}:{}: batch: invalid type", path.display(), line_of(&path, "batch ="));
    run(["run", path.to_str().expect("UTF-8"), "--set", "train.seed=1"]).expect(2).says(&[&place]);
}

#[test]
fn a_missing_key_is_not_blamed_on_the_key_that_stands_there() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("job.toml");
    for (text, words) in [
        ("name = \"x\"\n", "job.toml: missing section [train], [serve] for a job"),
        ("name = \"x\"\n[train]\nsteps = 1\nbatch = 8\n", "job.toml: missing field `trainer`"),
        ("name = \"x\"\n[train]\nsteps = 1\n", "job.toml:2: missing field `batch`"),
    ] {
        std::fs::write(&path, text).expect("written");
        run(["run", path.to_str().expect("UTF-8")]).expect(2).says(&[words]);
    }
}

#[test]
fn a_checkpoint_that_cannot_be_resumed_is_refused_before_anything_starts() {
    for nowhere in ["/no/such/checkpoint", "no-such-checkpoint", "file:///no/such/checkpoint"] {
        let (running, _scratch) = Run::new("digits.toml", 1).with(&["--resume", nowhere]).start();
        let ended = running.wait().expect(2).says(&["such", "manifest.json is missing", "--resume takes"]);
        assert!(!ended.stderr.contains("starting"), "{ended:#?}");
    }
}

#[test]
fn wrong_arguments_are_a_document_too() {
    let ended = run(["token", "create", "--json"]).expect(2).says(&["--role", "Usage"]);
    let error = &ended.json()["error"];
    assert_eq!(error["code"], "invalid");
    assert!(text(&error["message"]).contains("--role"), "{error}");
    assert!(run(["run", "--help", "--json"]).expect(0).stdout.contains("Usage"));
}

#[test]
fn a_malformed_data_file_is_named_with_its_line() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let data = dir.path().join("digits.jsonl");
    let pixels = vec!["0"; 784].join(",");
    let good = format!("{{\"label\": 1, \"pixels\": [{pixels}]}}\n");
    std::fs::write(&data, format!("{good}{good}{{\"label\": 1, \"pixels\": [1, 2, 3]}}\n{good}")).expect("written");
    let run = Run::new("digits.toml", 1).set("data.train", format!("{data:?}")).set("restart.attempts", 1);
    let (running, _scratch) = run.start();
    running.wait().expect(1).says(&[&format!("{}, line 3", data.display())]);
}

#[test]
fn an_ask_that_no_node_can_meet_ends_a_run_with_the_reason() {
    let (running, _scratch) = Run::new("digits.toml", 1).set("resources.gpus", 16).start();
    running.wait().expect(1).says(&["can never be placed", "gpu", "[resources]"]);
}
