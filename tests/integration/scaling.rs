//! A model whose replicas come and go with its requests, and what people and Prometheus see of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::harness::{Cluster, poll, process_of, signal, text};
use crate::recovery::rank_of;
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
    let shown = cluster.run(&["status", &served.job]).expect(0).stdout;
    assert!(
        shown.contains("chat from ") && shown.contains(", it answers") && shown.contains("rank-0 on node-"),
        "{shown}"
    );
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
    let told = fetched(&format!("{}/metrics", served.gateways[0]));
    for name in ["questions_total", "answers_total", "tokens_total", "first_token_seconds_count"] {
        let found = metric(&told, &format!("stoke_gateway_model_{name}{{model=\"chat\"}}"));
        assert!(found > Some(0.0), "{name}: {told}");
    }

    // A replica that is being replaced is no reason for another one, and a coordinator that comes back goes on with what is there.
    let node = text(&cluster.job("job-2")["placement"][0]["node"]);
    signal(rank_of(cluster.dir(), &node), Signal::KILL);
    poll("word of it", || cluster.run(&["explain", "job-2"]).stdout.contains("killed by signal 9").then_some(()));
    cluster.until_so_many_answer(3);
    signal(process_of(cluster.dir(), "coordinator"), Signal::KILL);
    poll("the coordinator is back", || (cluster.run(&["jobs"]).code() == 0).then_some(()));
    crowd.next(8);
    cluster.until_so_many_answer(3);

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

/// A client that comes back when it is refused, as it was told to; its answers that were whole.
async fn insists(url: String, over: Arc<AtomicBool>) -> u32 {
    let body =
        json!({"model": "chat", "messages": [{"role": "user", "content": "Tell me about TLS."}], "max_tokens": 12})
            .to_string();
    let mut whole = 0;
    while !over.load(Ordering::Relaxed) {
        let sent = client().post(&url).header("content-type", "application/json").body(body.clone()).send();
        let response = sent.await.expect("an answer");
        let refused = response.status().as_u16() == 429;
        assert!(refused || response.status().is_success(), "{:?}", response.text().await);
        whole += u32::from(!refused);
        if refused {
            let after = response.headers()["retry-after"].to_str().expect("seconds").parse().expect("seconds");
            tokio::time::sleep(Duration::from_secs(after)).await;
        }
    }
    whole
}

/// Its heads never have more than one replica is to have: only those who are sent away make it grow.
#[test]
fn a_model_whose_heads_are_full_grows_by_the_requests_that_are_refused() {
    let cluster = Cluster::start(2);
    let full =
        ["serve.stages=1", "serve.running=1", "serve.waiting=1", "serve.replicas.max=2", "serve.replicas.requests=2"];
    let served = cluster.serve("chat", &[&full[..], &["serve.replicas.grow_after=1s"]].concat());
    let over = Arc::new(AtomicBool::new(false));
    let asking: Vec<_> =
        (0..6).map(|number| RUNTIME.spawn(insists(served.url(number, "/v1/chat/completions"), over.clone()))).collect();
    cluster.until_so_many_answer(2);
    over.store(true, Ordering::Relaxed);
    let whole: u32 = asking.into_iter().map(|task| RUNTIME.block_on(task).expect("a client")).sum();
    assert!(whole > 0);
    let refused = |gateway: &String| {
        metric(&fetched(&format!("{gateway}/metrics")), "stoke_gateway_model_busy_total{model=\"chat\"}")
    };
    assert!(served.gateways.iter().any(|gateway| refused(gateway) > Some(0.0)));
    assert!(cluster.run(&["explain", &served.job]).expect(0).stdout.contains("autoscale: 1 more, job-2: "));
}
