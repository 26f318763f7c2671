//! Checkpoints as people meet them: which one it is, and what becomes of it outside a cluster.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Cluster, Run, root, run, run_with_input, text};

/// Two jobs alike, so that nothing but the catalogue tells their checkpoints apart.
#[test]
fn the_checkpoint_of_another_job_in_the_place_of_ones_own_is_refused_by_name() {
    let cluster = Cluster::start(1);
    let alike = ["--ranks", "1", "--set", "name=alike"];
    let (first, second) = (cluster.submit(2, &alike), cluster.submit(2, &alike));
    let committed = |job: &str| {
        cluster.wait_for_state(job, "succeeded");
        let listed = cluster.json(&["checkpoint", "list", job]);
        let checkpoint = &listed["checkpoints"][0];
        (text(&checkpoint["uri"]), text(&checkpoint["manifest_blake3"]))
    };
    let ((ours, our_hash), (theirs, their_hash)) = (committed(&first), committed(&second));
    let folder = |uri: &str| Path::new(uri.strip_prefix("file://").expect("a file URI")).to_owned();
    let (here, there) = (folder(&ours), folder(&theirs));
    assert_eq!(here.file_name(), there.file_name(), "the same step and generation");
    let aside = here.with_file_name("aside");
    fs::rename(&here, &aside).expect("rename");
    fs::rename(&there, &here).expect("rename");
    fs::rename(&aside, &there).expect("rename");
    let words = ["another checkpoint lies in the place", &our_hash, &their_hash, "earlier checkpoint"];
    cluster.run(&["checkpoint", "verify", &first]).expect(1).says(&words);
    // A person may look at whatever lies there, and a job must not begin with it.
    cluster.run(&["checkpoint", "verify", &ours]).expect(0);
    let after = cluster.submit(4, &["--ranks", "1", "--resume", &first]);
    let failed = cluster.wait_for_state(&after, "failed");
    let reason = text(&failed["reason"]);
    assert!(words.iter().all(|word| reason.contains(word)), "{reason}");
}

/// PyTorch of jobs/reference/setup.sh, where it was installed.
pub fn python() -> Option<PathBuf> {
    let found = env::var_os("STOKE_TORCH_PYTHON").map(PathBuf::from).unwrap_or_else(|| {
        let home = env::var_os("HOME").unwrap_or_default();
        Path::new(&home).join(".cache/stoke-torch/bin/python")
    });
    found.exists().then_some(found)
}

/// A short training, its last checkpoint as a file for PyTorch, and what `predict` answers to `lines`.
fn exported(spec: &str, lines: &str) -> (Value, TempDir) {
    let (summary, scratch) = Run::new(spec, 1).set("train.steps", 30).finish();
    let (uri, out) = (text(&summary["checkpoint"]), scratch.path().join("model.safetensors"));
    let arguments = ["checkpoint", "export", &uri, "--out", out.to_str().expect("UTF-8"), "--json"];
    let told = run(arguments).expect(0).json();
    assert_eq!(told["weights_blake3"], summary["weights_blake3"]);
    assert_eq!(told["bytes"].as_u64(), Some(fs::metadata(&out).expect("the file").len()));
    let document = run(arguments).expect(6).says(&["exists"]).json();
    assert_eq!(document["error"]["code"], "conflict");
    let answers = run_with_input(["predict", "--checkpoint", &uri, "--json"], lines).expect(0).stdout;
    fs::write(scratch.path().join("answers.jsonl"), answers).expect("write");
    (told["tensors"].clone(), scratch)
}

fn compare_in_pytorch(scratch: &TempDir) {
    let Some(python) = python() else {
        return println!("skipped: no PyTorch (sh jobs/reference/setup.sh installs it)");
    };
    let script = root().join("jobs/reference/load_export.py");
    let (file, scores) = (scratch.path().join("model.safetensors"), scratch.path().join("answers.jsonl"));
    let mut command = Command::new(python);
    command.args(["-W", "ignore"]).arg(script).arg(file).arg("--scores").arg(scores);
    let output = command.output().expect("start Python");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    println!("{}", String::from_utf8_lossy(&output.stdout));
}

fn shape(tensors: &Value, name: &str) -> Value {
    let found = tensors.as_array().into_iter().flatten().find(|tensor| tensor["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {tensors:#}"))["shape"].clone()
}

#[test]
fn an_exported_domains_model_answers_in_pytorch_as_it_does_here() {
    let lines = "secure-login-paypa1.com\nexample.org\nx.y\na-very-long-name-that-is-cut-in-front.of.the.registered.domain-example.co.uk\n";
    let (tensors, scratch) = exported("domains.toml", lines);
    assert_eq!(shape(&tensors, "convolutions.0.weight"), json!([256, 16, 5]));
    assert_eq!((shape(&tensors, "hidden.weight"), shape(&tensors, "output.bias")), (json!([64, 256]), json!([2])));
    compare_in_pytorch(&scratch);
}

#[test]
fn an_exported_digits_model_answers_in_pytorch_as_it_does_here() {
    let image = |seed: usize| {
        let pixels: Vec<usize> = (0..784).map(|at| (at * at * seed + at) % 256).collect();
        format!("{}\n", json!(pixels))
    };
    let (tensors, scratch) = exported("digits.toml", &[image(3), image(5), image(11)].concat());
    assert_eq!(shape(&tensors, "second.weight"), json!([32, 16, 5, 5]));
    assert_eq!(shape(&tensors, "hidden.weight"), json!([128, 512]));
    compare_in_pytorch(&scratch);
}

#[test]
fn a_step_is_exported_by_its_number_and_others_are_told() {
    let cluster = Cluster::shared();
    let job = cluster.submit(4, &["--set", "checkpoint.every=2"]);
    cluster.wait_for_state(&job, "succeeded");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("model.safetensors");
    let out = out.to_str().expect("UTF-8");
    assert_eq!(cluster.json(&["checkpoint", "export", &job, "2", "--out", out])["step"], 2);
    cluster.run(&["checkpoint", "export", &job, "3", "--out", out]).expect(3).says(&["step 3", "2, 4"]);
    let nowhere = folder.path().join("none/model.safetensors");
    let nowhere = nowhere.to_str().expect("UTF-8");
    cluster.run(&["checkpoint", "export", &job, "--out", nowhere]).expect(1).says(&["--out exists"]);
}
