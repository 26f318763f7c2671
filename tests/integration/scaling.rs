//! A model whose replicas come and go with its requests, and what people and Prometheus see of it.

use serde_json::{Value, json};

use crate::harness::{Cluster, poll, text};
use crate::serving::{RUNTIME, Stream, client};

/// What is got from a URL; empty where nobody answers.
fn fetched(url: &str) -> String {
    RUNTIME.block_on(async {
        let Ok(response) = client().get(url).send().await else { return String::new() };
        response.text().await.unwrap_or_default()
    })
}

/// The number of a metric.
fn metric(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

impl Cluster {
    /// Jobs of the model that stay, with what they serve.
    fn replicas(&self) -> Vec<(String, Value)> {
        let jobs = self.json(&["jobs"])["jobs"].as_array().expect("jobs").clone();
        let stays = |job: &&Value| {
            job["traffic"] == "rest" && matches!(job["state"].as_str(), Some("starting" | "running" | "queued"))
        };
        jobs.iter().filter(stays).map(|job| (text(&job["job"]), job["serves"].clone())).collect()
    }

    fn until_so_many_answer(&self, count: usize) {
        poll(&format!("{count} replicas"), || {
            let replicas = self.replicas();
            (replicas.len() == count && replicas.iter().all(|(_, serves)| serves["ready"] == true)).then_some(())
        });
    }
}

#[test]
fn replicas_come_and_go_with_the_requests_and_no_request_fails() {
    let parent = tempfile::tempdir().expect("a temporary folder");
    let cluster = Cluster::start_with(parent, 3, &["--metrics", "127.0.0.1:0"]);
    let own = ["serve.stages=1", "serve.replicas.max=3", "serve.replicas.requests=1"];
    let windows = ["serve.replicas.grow_after=1s", "serve.replicas.shrink_after=3s", "serve.replicas.first_token=50s"];
    let served = cluster.serve("chat", &[&own[..], &windows].concat());
    let calm = served.chats(5, 12, |_| ());

    let (lasting, crowd) = (Stream::start_with(&served, 1, 12), Stream::start_with(&served, 4, 12));
    cluster.until_so_many_answer(3);
    let told = cluster.run(&["explain", &served.job]).expect(0).stdout;
    for words in ["autoscale: 1 more, job-2: ", "scales itself between 1 and 3, for 1 request each", "tokens/s"] {
        assert!(told.contains(words), "{words:?}: {told}");
    }
    let view = cluster.json(&["status", &served.job]);
    let load = &view["serves"]["load"];
    assert_eq!((&view["serves"]["replicas"], &view["serves"]["scale"]["max"]), (&json!(3), &json!(3)), "{view}");
    assert!(load["tokens"].as_u64() > Some(0) && load["first_token_p99_ms"].as_u64().is_some(), "{view}");
    assert!(cluster.run(&["status", &served.job]).expect(0).stdout.contains("chat, it answers"));
    let refused = cluster.run(&["scale", "chat", "--replicas", "2"]);
    assert_ne!(refused.code(), 0);
    refused.says(&["1 to 3, as job-", "serve.replicas.min=N"]);

    let coordinator = format!("http://{}/metrics", text(&cluster.state()["metrics"]));
    poll("the coordinator's metrics", || {
        let text = fetched(&coordinator);
        let found = |name: &str| metric(&text, &format!("{name}{{model=\"chat\"}}"));
        let counted = found("stoke_model_tokens_total")? > 0.0 && found("stoke_model_first_token_seconds_count")? > 0.0;
        (counted && found("stoke_model_answering")? == 3.0).then_some(())
    });
    let text = fetched(&format!("{}/metrics", served.gateways[0]));
    for name in ["questions_total", "answers_total", "tokens_total", "first_token_seconds_count"] {
        let found = metric(&text, &format!("stoke_gateway_model_{name}{{model=\"chat\"}}"));
        assert!(found > Some(0.0), "{name}: {text}");
    }

    let mut answers = crowd.end();
    cluster.until_so_many_answer(1);
    assert_eq!(cluster.replicas()[0].0, served.job, "the newest leave");
    ["job-2", "job-3"].iter().for_each(|job| drop(cluster.wait_for_state(job, "cancelled")));
    let told = cluster.run(&["explain", &served.job]).expect(0).stdout;
    assert!(told.contains(" fewer, job-"), "{told}");
    lasting.next(1);
    answers.extend(lasting.end());
    for (_, number, answer) in &answers {
        assert_eq!(*answer, calm[*number], "chat {number}");
    }
}
