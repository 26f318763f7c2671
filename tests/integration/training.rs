//! What a job computes: the same bits on any number of ranks, through a resume, and a classifier that can be used.

use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{Run, checkpoint_at, run, run_with_input, text};

/// Enough for every code path (two checkpoints, a last one), few enough for two cores.
const STEPS: u64 = 8;

fn short(spec: &str, nodes: u32) -> Run {
    Run::new(spec, nodes).set("train.steps", STEPS).set("checkpoint.every", 4)
}

/// The reference: one rank, nothing happens. Shared by the tests of this file.
fn digits_alone() -> &'static (Value, TempDir) {
    static DONE: OnceLock<(Value, TempDir)> = OnceLock::new();
    DONE.get_or_init(|| short("digits.toml", 1).finish())
}

#[track_caller]
fn same_result(left: &Value, right: &Value) {
    for key in ["weights_blake3", "loss", "samples", "step", "metrics"] {
        assert_eq!(left[key], right[key], "{key} differs:\n{left:#}\n{right:#}");
    }
}

#[test]
fn digits_end_with_the_same_weights_on_one_two_and_three_ranks() {
    let (alone, _) = digits_alone();
    assert_eq!(alone["state"], "succeeded");
    assert_eq!(alone["step"], STEPS);
    assert_eq!(alone["samples"], STEPS * 128);
    assert_eq!(alone["world_sizes"], serde_json::json!([1]));
    for nodes in [2, 3] {
        let (several, _scratch) = short("digits.toml", nodes).finish();
        assert_eq!(several["world_sizes"], serde_json::json!([nodes]));
        same_result(alone, &several);
    }
}

#[test]
fn local_steps_end_with_the_same_weights_on_one_two_and_three_ranks() {
    let run = |nodes| short("digits.toml", nodes).set("train.diloco.local_steps", 3);
    let (alone, scratch) = run(1).finish();
    assert_eq!((&alone["step"], &alone["samples"]), (&STEPS.into(), &(STEPS * 128 * 3).into()), "{alone:#}");
    assert_ne!(alone["weights_blake3"], digits_alone().0["weights_blake3"]);
    for nodes in [2, 3] {
        let (several, _scratch) = run(nodes).finish();
        assert_eq!(several["world_sizes"], serde_json::json!([nodes]));
        same_result(&alone, &several);
    }
    let half = checkpoint_at(&scratch, STEPS / 2).display().to_string();
    let (resumed, _scratch) = run(2).with(&["--resume", &half]).finish();
    same_result(&alone, &resumed);
    let (other, _scratch) = run(1).set("train.diloco.local_steps", 4).with(&["--resume", &half]).start();
    other.wait().expect(1).says(&["[train.diloco] local_steps = 3, the spec says 4"]);
}

#[test]
fn lanes_in_bf16_end_with_the_same_weights_on_one_and_two_ranks_and_go_on_in_f32() {
    let run = |nodes, precision| short("digits.toml", nodes).set("train.precision", precision);
    let (alone, scratch) = run(1, "bf16").finish();
    assert_eq!(alone["step"], STEPS, "{alone:#}");
    assert_ne!(alone["weights_blake3"], digits_alone().0["weights_blake3"]);
    let (several, _scratch) = run(2, "bf16").finish();
    assert_eq!(several["world_sizes"], serde_json::json!([2]));
    same_result(&alone, &several);
    let half = checkpoint_at(&scratch, STEPS / 2).display().to_string();
    let (resumed, _scratch) = run(2, "bf16").with(&["--resume", &half]).finish();
    same_result(&alone, &resumed);
    let (other, _scratch) = run(1, "f32").with(&["--resume", &half]).finish();
    assert_eq!(other["step"], STEPS, "{other:#}");
    assert_ne!(other["weights_blake3"], alone["weights_blake3"]);
}

#[test]
fn ranks_that_keep_parts_of_the_optimizers_state_end_with_the_same_weights_and_checkpoints() {
    let (alone, scratch) = digits_alone();
    let sharded = |nodes| short("digits.toml", nodes).set("train.sharding", "zero1");
    let (several, parts) = sharded(4).finish();
    assert_eq!(several["world_sizes"], serde_json::json!([4]));
    same_result(alone, &several);
    // Each goes on from what the other has stored.
    for (from, run) in [(scratch, sharded(3)), (&parts, short("digits.toml", 2))] {
        let half = checkpoint_at(from, STEPS / 2).display().to_string();
        let (resumed, _scratch) = run.with(&["--resume", &half]).finish();
        same_result(alone, &resumed);
    }
}

#[test]
fn domains_end_with_the_same_weights_on_one_two_and_three_ranks() {
    let (alone, _scratch) = short("domains.toml", 1).finish();
    assert!(alone["metrics"]["roc_auc"].is_number(), "{alone:#}");
    for nodes in [2, 3] {
        let (several, _scratch) = short("domains.toml", nodes).finish();
        same_result(&alone, &several);
    }
}

#[test]
fn three_ranks_on_one_node_are_three_ranks() {
    let (alone, _) = digits_alone();
    let (crowded, _scratch) = short("digits.toml", 2).with(&["--ranks", "3"]).set("resources.cpus", 1).finish();
    assert_eq!(crowded["world_sizes"], serde_json::json!([3]));
    same_result(alone, &crowded);
}

#[test]
fn a_run_that_is_resumed_ends_as_one_that_was_not_interrupted() {
    let (alone, scratch) = digits_alone();
    let halfway = checkpoint_at(scratch, 4);
    let (resumed, _scratch) = short("digits.toml", 2).with(&["--resume", halfway.to_str().expect("UTF-8")]).finish();
    same_result(alone, &resumed);
}

#[test]
fn a_checkpoint_is_verified_byte_by_byte() {
    let (_, scratch) = short("digits.toml", 2).finish();
    let folder = checkpoint_at(&scratch, 8);
    let folder_text = folder.to_str().expect("UTF-8");
    let whole = run(["checkpoint", "verify", folder_text, "--json"]).expect(0).json();
    assert_eq!((&whole["ok"], &whole["shards"]), (&true.into(), &2.into()));
    flip_a_byte(&folder.join("shard-1-of-2.safetensors"));
    run(["checkpoint", "verify", folder_text]).expect(1).says(&["shard 1", "shard-1-of-2.safetensors"]);
    // Nothing is built from it either.
    run_with_input(["predict", "--checkpoint", folder_text], "x\n").expect(1).says(&["shard 1"]);
    std::fs::remove_file(folder.join("manifest.json")).expect("the manifest is there");
    run(["checkpoint", "verify", folder_text]).expect(3).says(&["manifest.json is missing"]);
}

#[test]
fn predict_classifies_lines_from_standard_input() {
    let (summary, _scratch) = short("domains.toml", 1).finish();
    let uri = text(&summary["checkpoint"]);
    let lines = "example.org\nsecure-login-paypa1.com\n";
    let plain = run_with_input(["predict", "--checkpoint", &uri], lines).expect(0);
    let columns: Vec<Vec<&str>> = plain.stdout.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!(columns.len(), 2, "{plain:#?}");
    assert_eq!((columns[0][2], columns[1][2]), ("example.org", "secure-login-paypa1.com"));
    let score: f64 = columns[0][1].parse().expect("a probability");
    assert!((0.0..=1.0).contains(&score));
    let json = run_with_input(["predict", "--checkpoint", &uri, "--json"], lines).expect(0);
    let first: Value = serde_json::from_str(json.stdout.lines().next().expect("a line")).expect("JSON");
    assert_eq!(first["label"], columns[0][0]);
    assert_eq!(first["scores"].as_object().map(serde_json::Map::len), Some(2));
    // More lines than a batch, blank ones between, and two that are no names.
    let many = format!("{}\nhttp://bad\r\n\n{lines}/\n", "example.org\n".repeat(300));
    let plain = run_with_input(["predict", "--checkpoint", &uri], &many).expect(1);
    let plain = plain.says(&["error: input line 302: expected a domain name", "error: input line 306: "]);
    assert_eq!(plain.stdout.lines().count(), 302);
    let json = run_with_input(["predict", "--checkpoint", &uri, "--json"], &many).expect(1);
    let documents: Vec<Value> = json.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(documents.len(), 304, "one for each line that is not blank");
    assert_eq!((&documents[300]["line"], &documents[300]["error"]["input_line"]), (&"http://bad".into(), &302.into()));
}

#[test]
fn a_summary_lies_beside_the_checkpoints() {
    let (summary, scratch) = digits_alone();
    let kept: Value = serde_json::from_slice(&std::fs::read(scratch.path().join("out/summary.json")).expect("written"))
        .expect("JSON");
    assert_eq!(&kept, summary);
    let folder = text(&summary["checkpoint"]);
    assert!(Path::new(folder.strip_prefix("file://").expect("a file")).join("manifest.json").is_file());
}

fn flip_a_byte(path: &Path) {
    let mut bytes = std::fs::read(path).expect("the shard is there");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(path, bytes).expect("written");
}
