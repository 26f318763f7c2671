//! `up`, `down`, `doctor`: a cluster that stays, and the folder that it stays in.

use serde_json::Value;

use crate::harness::{Background, poll, processes_naming, run, stoke, text};

#[test]
fn a_cluster_goes_up_and_down_and_comes_back_with_its_jobs() {
    let parent = tempfile::tempdir().expect("a temporary folder");
    let dir = parent.path().join("local");
    let dir = dir.to_str().expect("UTF-8");
    let up: Value = run(["up", "--nodes", "1", "--dir", dir, "--listen", "0.0.0.0:0", "--json"]).expect(0).json();
    assert_eq!(up["nodes"], 1);
    let guard = Down(dir.to_owned());
    run(["up", "--dir", dir]).expect(6).says(&["already runs", "stoke down"]);

    let status = run(["--cluster", dir, "status", "--json"]).expect(0).json();
    assert_eq!((&status["nodes_up"], &status["you"]), (&1.into(), &"user/admin/admin".into()));
    let spec = crate::harness::spec("digits.toml");
    let spec = spec.to_str().expect("UTF-8");
    let plan = ["--set", "train.steps=2", "--key", "kept", "--wait", "--json"];
    let submit: Vec<&str> = [&["--cluster", dir, "submit", spec][..], &plan].concat();
    let first = run(&submit).expect(0).json();
    assert_eq!(first["state"], "succeeded");

    let endless = ["--cluster", dir, "submit", spec, "--set", "train.steps=1000000", "--json"];
    let endless = text(&run(endless).expect(0).json()["job"]);
    let down = run(["down", "--dir", dir]).expect(0).says(&["1 job not over", &format!("stoke up --dir {dir}")]);
    assert_eq!(down.stdout, "cluster is down\n");
    poll("the end of every process", || processes_naming(dir).is_empty().then_some(()));
    run(["--cluster", dir, "status"]).expect(5).says(&["is stopped", &format!("stoke up --dir {dir}")]);
    run(["down", "--dir", dir]).expect(3).says(&["no local cluster runs"]);

    let again = run(["up", "--dir", dir, "--json"]).expect(0).json();
    assert_eq!(again["address"], up["address"], "users know the address");
    assert_eq!(again["nodes"], 1, "as many nodes as before");
    run(["--cluster", dir, "cancel", &endless]).expect(0);
    // The job is known still: the same key is the same job.
    let second = run(&submit).expect(0).json();
    assert_eq!(second["job"], first["job"]);
    for key in ["weights_blake3", "loss", "samples", "step", "metrics", "checkpoint"] {
        assert!(!first[key].is_null(), "the flat object of `run` has {key}: {first:#}");
        assert_eq!(second[key], first[key]);
    }
    let verified = run(["--cluster", dir, "checkpoint", "verify", &text(&first["job"]), "--json"]).expect(0).json();
    assert_eq!(verified["weights_blake3"], first["weights_blake3"]);

    drop(guard);
    run(["down", "--dir", dir, "--remove"]).expect(0);
    assert!(!std::path::Path::new(dir).exists());
}

/// Also when no node is left that serves: only a cluster that is up can be told that they are to serve again.
#[test]
fn a_cluster_with_drained_nodes_comes_up_and_says_how_they_serve_again() {
    let parent = tempfile::tempdir().expect("a temporary folder");
    let dir = parent.path().join("local");
    let dir = dir.to_str().expect("UTF-8");
    let _guard = Down(dir.to_owned());
    let first = run(["up", "--nodes", "2", "--dir", dir, "--json"]).expect(0).json();
    assert_eq!(first["without_ranks"], serde_json::json!([]));
    for node in ["node-1", "node-2"] {
        run(["--cluster", dir, "drain", node]).expect(0);
    }
    run(["down", "--dir", dir]).expect(0);
    let again = run(["up", "--dir", dir]).expect(0).stdout;
    for words in ["up, 2 nodes", "node-2", "gets no ranks: drained by admin", "`stoke drain node-2 --undo`"] {
        assert!(again.contains(words), "{again}");
    }
    run(["--cluster", dir, "drain", "node-1", "--undo"]).expect(0);
    run(["down", "--dir", dir]).expect(0);
    let third = run(["up", "--dir", dir, "--json"]).expect(0).json();
    let without = third["without_ranks"].as_array().expect("a list");
    assert_eq!((without.len(), &without[0]["node"], &without[0]["state"]), (1, &"node-2".into(), &"drained".into()));
    let spec = crate::harness::spec("digits.toml");
    let submit = ["--cluster", dir, "submit", spec.to_str().expect("UTF-8"), "--ranks", "1"];
    run([&submit[..], &["--set", "train.steps=2", "--wait"]].concat()).expect(0);
}

#[test]
fn doctor_looks_and_mends_nothing() {
    let doctor = run(["doctor", "--json"]);
    let report = doctor.json();
    let checks: Vec<&str> =
        report["checks"].as_array().expect("a list").iter().filter_map(|check| check["check"].as_str()).collect();
    for check in ["udp-buffers", "udp-loopback", "mtu", "clock", "port", "memory", "disk", "gpu", "coordinator"] {
        assert!(checks.contains(&check), "{check} is missing in {checks:?}");
    }
    for check in report["checks"].as_array().expect("a list") {
        let fine = check["status"] == "ok";
        assert_eq!(fine, check["mend"].is_null(), "a finding without a mend: {check}");
    }
    assert_eq!(doctor.code() == 0, report["ok"] == true);
}

#[test]
fn commands_without_a_cluster_say_how_to_get_one() {
    let nowhere = tempfile::tempdir().expect("a temporary folder");
    let mut command = stoke(["jobs", "--json", "--cluster"]);
    command.arg(nowhere.path());
    let ended = Background::start(command).wait().expect(3).says(&["stoke up", "stoke login"]);
    assert_eq!(ended.json()["error"]["code"], "not-found");
}

/// Takes a cluster down whatever the test does.
struct Down(String);

impl Drop for Down {
    fn drop(&mut self) {
        let _ = Background::start(stoke(["down", "--dir", &self.0])).wait();
    }
}
