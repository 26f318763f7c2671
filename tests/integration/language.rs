//! A language model's way: trained on a cluster, through deaths, exported, served, opened by transformers, and trained further.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::checkpoints::python;
use crate::harness::{Cluster, poll, root, run, spec, text};
use crate::serving::{RUNTIME, client};

/// Small enough for a test.
const SMALL: [&str; 7] = [
    "train.steps=200",
    "model.hidden=32",
    "model.heads=2",
    "model.layers=2",
    "model.context=32",
    "checkpoint.every=10",
    "schedule.lr=1e-2",
];

/// What `stoke submit` says.
fn submit(cluster: &Cluster, ranks: &str, more: &[&str]) -> Value {
    let spec = spec("language.toml");
    let sets: Vec<&str> = SMALL.into_iter().flat_map(|set| ["--set", set]).collect();
    let arguments = [&["submit", spec.to_str().expect("UTF-8"), "--ranks", ranks][..], &sets, more].concat();
    cluster.json(&arguments)
}

fn metric(summary: &Value, name: &str) -> f64 {
    summary["metrics"][name].as_f64().unwrap_or_else(|| panic!("no {name} in {summary:#}"))
}

/// What a model that is served says after `prompt`, likeliest token by likeliest token.
fn continued(url: &str, model: &str, prompt: &str) -> String {
    let body = json!({ "model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0.0 }).to_string();
    let answer: Value = RUNTIME.block_on(async {
        let sent = client().post(format!("{url}/v1/completions")).header("content-type", "application/json").body(body);
        let bytes = sent.send().await.expect("an answer").bytes().await.expect("a body");
        serde_json::from_slice(&bytes).expect("JSON")
    });
    text(&answer["choices"][0]["text"])
}

#[test]
fn a_language_model_is_trained_through_a_death_exported_served_and_trained_further() {
    let cluster = Cluster::start(3);
    let calm = submit(&cluster, "1", &["--wait"]);
    // A byte that is guessed has a loss of ln 257 = 5.5.
    assert!(metric(&calm, "loss") < 2.9 && metric(&calm, "accuracy") > 0.15, "{calm:#}");
    let job = text(&submit(&cluster, "3", &[])["job"]);
    poll("it trains", || cluster.job(&job)["progress"]["step"].as_u64().filter(|step| *step > 3));
    cluster.run(&["chaos", "kill-rank at 0s", "--for", "1s", "--seed", "3"]).expect(0);
    let trained = cluster.wait_for_state(&job, "succeeded");
    assert!(trained["recoveries"].as_u64().is_some_and(|count| count > 0), "{trained:#}");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("names");
    let out = out.to_str().expect("UTF-8");
    let told = cluster.json(&["checkpoint", "export", &job, "--out", out]);
    assert_eq!(told["weights_blake3"], calm["weights_blake3"]);
    cluster.run(&["checkpoint", "export", &job, "--out", out]).expect(6).says(&["exists"]);

    let served = spec("serve-smollm2.toml");
    let served = served.to_str().expect("UTF-8");
    let model = format!("serve.model={out}");
    let small = ["serve.name=names", "serve.cache=16MiB", "serve.context=32", "resources.memory=256MiB"];
    let sets: Vec<&str> = small.into_iter().chain([model.as_str()]).flat_map(|set| ["--set", set]).collect();
    let served = cluster.json(&[&["serve", served][..], &sets].concat());
    let said = continued(&text(&served["gateways"][0]), "names", "www.exam");
    assert!(!said.is_empty());
    match python() {
        Some(python) => {
            let script = root().join("jobs/reference/continue_text.py");
            let output = Command::new(python).args(["-W", "ignore"]).arg(script).args([out, "www.exam", "12"]).output();
            let output = output.expect("start Python");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            assert_eq!(String::from_utf8_lossy(&output.stdout), said, "transformers continues it as we do");
        }
        None => println!("not compared with transformers: sh jobs/reference/setup.sh installs it"),
    }
    cluster.run(&["cancel", &text(&served["job"])]).expect(0);

    // From the folder, as the first weights: it begins where the other has ended.
    let from = ["model.context=32", "checkpoint.every=10", "train.steps=2", "schedule.lr=1e-6"];
    let from = from.into_iter().map(str::to_owned).chain([format!("model.from={out}")]);
    let from: Vec<String> = from.flat_map(|set| ["--set".to_owned(), set]).collect();
    let own = folder.path().join("further.toml");
    let shipped = std::fs::read_to_string(spec("language.toml")).expect("the spec");
    let data = format!("{:?}", root().join("jobs/data/domains.csv.gz"));
    let further: String = shipped
        .lines()
        .filter(|line| !["hidden =", "layers =", "heads ="].iter().any(|key| line.starts_with(key)))
        .map(|line| line.replace("\"../data/domains.csv.gz\"", &data) + "\n")
        .collect();
    std::fs::write(&own, further).expect("written");
    let mut arguments = vec!["submit", own.to_str().expect("UTF-8"), "--ranks", "1", "--wait"];
    arguments.extend(from.iter().map(String::as_str));
    let further = cluster.json(&arguments);
    let (before, after) = (metric(&calm, "loss"), metric(&further, "loss"));
    assert!((before - after).abs() < 1e-3, "{before}, then {after}");
    let again = folder.path().join("again");
    let again = again.to_str().expect("UTF-8");
    cluster.json(&["checkpoint", "export", &text(&further["job"]), "--out", again]);
    let same = |name: &str| {
        let read = |folder: &str| std::fs::read(Path::new(folder).join(name)).expect("a file of the folder");
        read(out) == read(again)
    };
    assert!(same("config.json") && same("tokenizer.json") && !same("model.safetensors"));

    // A folder that says something else than when the job was submitted is no folder of that job.
    let config = Path::new(out).join("config.json");
    let said = std::fs::read_to_string(&config).expect("a configuration");
    std::fs::write(&config, said.replace("10000", "20000")).expect("written");
    let other = folder.path().join("other");
    let job = text(&further["job"]);
    let export = ["checkpoint", "export", &job, "--out", other.to_str().expect("UTF-8")];
    cluster.run(&export).expect(1).says(&["is not what it was when the job was submitted"]);
    // One whose weights are not as large as it says is refused before anything is made so large.
    std::fs::write(&config, said.replace("\"hidden_size\":32", "\"hidden_size\":1048576")).expect("written");
    let huge = [&["run"][..], &arguments[1..2], &arguments[5..]].concat();
    run(huge).expect(2).says(&["embed_tokens"]);
}

#[test]
fn what_no_language_model_can_be_made_of_is_refused_with_its_place() {
    let cluster = Cluster::shared();
    let spec = spec("language.toml");
    let spec = spec.to_str().expect("UTF-8");
    for (set, exit, words) in [
        ("model.heads=5", 2, "heads = 5 does not fit"),
        ("model.kv_heads=2", 2, "kv_heads does not divide heads"),
        ("model.context=0", 2, "context is out of range"),
        ("model.from=\"/nowhere\"", 2, "hidden is beside from"),
        ("model.depth=3", 2, "unknown field `depth`"),
    ] {
        cluster.run(&["submit", spec, "--set", set]).expect(exit).says(&[words]);
    }
    let job = cluster.json(&["submit", spec, "--set", "data.text=name"]);
    let failed = cluster.wait_for_state(&text(&job["job"]), "failed");
    assert!(text(&failed["reason"]).contains("no column \"name\""), "{failed:#}");
}
