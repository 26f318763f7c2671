//! Models whose cut is left to the cluster: explained before anything runs, served over nodes that are too small for all of it, and said where it fits nowhere.

use serde_json::{Value, json};

use crate::harness::{Background, Cluster, poll, run, stoke, text};
use crate::inference::model;
use crate::serving::Served;

const NAME: &str = "smollm2-135m-instruct";

/// Agents with so much memory, beside the cluster's own.
fn small_nodes(cluster: &Cluster, folder: &std::path::Path, memory: &str) -> [Background; 2] {
    let agents = ["small-1", "small-2"].map(|name| {
        let (dir, token, address) = (folder.join(name), cluster.token("node"), cluster.address());
        let dir = dir.to_str().expect("UTF-8");
        let who = ["node", "--dir", dir, "--coordinator", &address, "--join", &token, "--name", name];
        let what = ["--memory", memory, "--cpus", "1", "--label", "size=small", "--gateway", "none"];
        Background::start(stoke([&who[..], &what].concat()))
    });
    poll("the nodes", || {
        let nodes = cluster.json(&["nodes"]);
        let up = nodes["nodes"].as_array()?.iter().filter(|node| node["state"] == "up").count();
        (up == 3).then_some(())
    });
    agents
}

fn layers(split: &Value) -> Vec<(u64, u64)> {
    let ranks = split["ranks"].as_array().expect("ranks").iter();
    ranks.map(|rank| (rank["layers"][0].as_u64().unwrap_or(99), rank["layers"][1].as_u64().unwrap_or(99))).collect()
}

#[test]
fn a_model_that_fits_on_no_node_is_cut_over_two_and_answers_as_one_would() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cluster = Cluster::start(1);
    let _agents = small_nodes(&cluster, folder.path(), "238MiB");
    let spec = folder.path().join("chat.toml");
    let serve = format!("model = {:?}\nname = \"chat\"\ncontext = 256\ncache = \"16MiB\"", model(NAME));
    std::fs::write(&spec, format!("name = \"chat\"\n[serve]\n{serve}\n[resources.labels]\nsize = \"small\"\n"))
        .expect("written");
    let spec = spec.to_str().expect("UTF-8");
    // Before anything runs.
    let planned = cluster.json(&["explain", spec]);
    let split = &planned["split"];
    assert_eq!((&split["stages"], &split["tensor"]), (&2.into(), &1.into()), "{planned:#}");
    let cut = layers(split);
    assert!(cut[0].0 == 0 && cut[0].1 + 1 == cut[1].0 && cut[1].1 == 29, "{cut:?}");
    for rank in split["ranks"].as_array().expect("ranks") {
        assert!(rank["memory_bytes"].as_u64().is_some_and(|bytes| bytes <= 238 << 20), "{rank}");
        assert!(["node-2", "node-3"].contains(&text(&rank["node"]).as_str()), "{rank}");
        assert!(
            rank["layer_ms"].as_f64().is_some_and(|ms| ms > 0.0) && rank["rtt_ms"].as_f64().is_some_and(|ms| ms > 0.0)
        );
    }
    assert!(planned["nodes"].to_string().contains("lacks the label size=small"), "{planned:#}");
    assert_eq!(cluster.json(&["jobs"])["jobs"], json!([]));
    let shown = cluster.run(&["explain", spec]).expect(0).stdout;
    assert!(shown.contains("2 x 1 ranks") && shown.contains("it does not fit on fewer ranks"), "{shown}");
    // What was shown is what runs.
    let served = cluster.json(&["serve", spec]);
    let gateways = served["gateways"].as_array().expect("gateways").iter().map(text).collect();
    let served = Served { job: text(&served["job"]), gateways, name: "chat".into() };
    let explained = cluster.json(&["explain", &served.job]);
    assert_eq!(layers(&explained["split"]).len(), 2);
    let started = explained["events"].to_string();
    assert!(started.contains("cut into 2 x 1 ranks"), "{explained:#}");
    let asked = ["infer", "--model", &model(NAME), "--max-tokens", "24", "--json", "Tell me about TLS."];
    assert_eq!(served.chats(1, 24, |_| ())[0].0, text(&run(asked).expect(0).json()["text"]));
    cluster.run(&["cancel", &served.job]).expect(0);
}

#[test]
fn what_cannot_be_cut_is_said_node_by_node() {
    let cluster = Cluster::start(2);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let spec = folder.path().join("chat.toml");
    std::fs::write(&spec, "name = \"chat\"\n[serve]\nmodel = \"nowhere-at-all\"\n").expect("written");
    let spec = spec.to_str().expect("UTF-8");
    let shown = cluster.run(&["explain", spec]).expect(1).stdout;
    assert!(shown.contains("no node can serve") && shown.matches("fetch it there").count() >= 3, "{shown}");
    cluster.run(&["serve", spec, "--timeout", "1ms"]).expect(1).says(&["no answer within 1ms", "job-1: coming up"]);
    let reason = poll("the reason", || {
        let reason = text(&cluster.job("job-1")["reason"]);
        reason.contains("no node can serve").then_some(reason)
    });
    assert!(reason.contains("node-1") && reason.contains("fetch it there"), "{reason}");
    let waits = cluster.json(&["explain", "job-1"]);
    assert_eq!(waits["nodes"].to_string().matches("fetch it there").count(), 2, "{waits:#}");
    // Both nodes have said so twice.
    cluster.run(&["serve", spec]).expect(1).says(&["has ended: no node can serve", "fetch it there"]);
    assert_eq!(text(&cluster.job("job-1")["state"]), "failed");
    let good = format!("serve.model={}", model(NAME));
    let serve = ["serve", spec, "--set", &good, "--set", "serve.stages=99"];
    cluster.run(&serve).expect(1).says(&["stages = 99: the model has 30 layers, use at most 30"]);
    let planned = |more: &str, code: i32| cluster.run(&["explain", spec, "--set", &good, "--set", more]).expect(code);
    let shown = planned("serve.context=9000", 1).stdout;
    assert!(shown.contains("trained for 8192 tokens"), "{shown}");
    let shown = planned("resources.memory=150MiB", 2);
    shown.says(&["cache"]);
    let shown = planned("serve.tensor=4", 1).stdout;
    assert!(shown.contains("can be cut into 3 parts at most"), "{shown}");
    let all = ["explain", spec, "--set", &good, "--set", "serve.stages=1", "--set", "serve.tensor=1"];
    let shown = cluster.run(&[&all[..], &["--set", "resources.memory=1GiB"]].concat()).expect(0).stdout;
    assert!(shown.contains("1 x 1 ranks") && shown.contains("0-29") && shown.contains("1GiB"), "{shown}");
    let shown = cluster.run(&[&all[..], &["--set", "resources.memory=300MiB"]].concat()).expect(1).stdout;
    assert!(shown.contains("a rank with 30 layers of this model needs"), "{shown}");
    cluster.run(&["explain", "job-x"]).expect(3).says(&["no job is \"job-x\""]);
    cluster.run(&["explain", "nope.toml"]).expect(2).says(&["name a job or a model", "the file of a spec"]);
    let train = crate::harness::spec("digits.toml");
    cluster.run(&["explain", train.to_str().expect("UTF-8")]).expect(2).says(&["no section [serve]"]);
}
