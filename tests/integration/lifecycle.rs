//! `up`, `down`, `doctor`: a cluster that stays, and the folder that it stays in.

use std::os::unix::fs::PermissionsExt;

use serde_json::Value;

use crate::harness::{Background, poll, processes_naming, run, stoke, text};
use crate::serving::{RUNTIME, client};

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

/// Tokens and TLS of a local cluster's gateways: they stay until they are taken back.
#[test]
fn a_cluster_keeps_the_tokens_of_its_gateways() {
    let parent = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| parent.path().join(name).to_str().expect("UTF-8").to_owned();
    let (dir, tokens) = (path("local"), path("tokens"));
    let write = |text: &str| {
        std::fs::write(&tokens, text).expect("written");
        std::fs::set_permissions(&tokens, std::fs::Permissions::from_mode(0o600)).expect("permissions");
    };
    let _guard = Down(dir.clone());
    run(["up", "--dir", &dir, "--gateway-certificate", &path("c")])
        .expect(2)
        .says(&["needs both files", "--gateway-key"]);
    write("anna short\n");
    run(["up", "--nodes", "1", "--dir", &dir, "--gateway-tokens", &tokens])
        .expect(2)
        .says(&["tokens:1:", "16 characters"]);
    write("anna 0123456789abcdef\n");
    let status = |token: Option<&str>| {
        let nodes = run(["--cluster", &dir, "nodes", "--json"]).expect(0).json();
        let request = client().get(format!("{}/v1/models", text(&nodes["nodes"][0]["gateway"])));
        let request = token.map_or(request.try_clone(), |token| Some(request.bearer_auth(token))).expect("a request");
        RUNTIME.block_on(request.send()).expect("an answer").status().as_u16()
    };
    run(["up", "--nodes", "1", "--dir", &dir, "--gateway-tokens", &tokens]).expect(0);
    assert_eq!((status(None), status(Some("0123456789abcdef"))), (401, 200));
    let spec = crate::harness::spec("serve-smollm2.toml");
    let sets = ["serve.task=infer", "serve.model=identity", "serve.stages=1", "serve.name=noop"];
    let sets: Vec<&str> = sets.into_iter().flat_map(|set| ["--set", set]).collect();
    let serve = [&["--cluster", &dir, "serve", spec.to_str().expect("UTF-8")][..], &sets].concat();
    let told = run(serve).expect(0).stdout;
    assert!(told.contains("Bearer TOKEN"), "{told}");
    run(["down", "--dir", &dir]).expect(0);
    run(["up", "--dir", &dir]).expect(0);
    assert_eq!(status(None), 401, "as before");
    run(["down", "--dir", &dir]).expect(0);
    run(["up", "--dir", &dir, "--gateway-tokens", "none"]).expect(0);
    assert_eq!(status(None), 200);
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
