//! Models that are served: a real language model through the gateways of a cluster, cut over ranks in every way, and what becomes of answers while ranks
//! and coordinators die.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::harness::{Cluster, poll, process_of, python_with, run, run_with_input, signal, spec, text};
use crate::inference::model;
use crate::recovery::rank_of;

const NAME: &str = "smollm2-135m-instruct";

pub static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));

/// A model that answers on a cluster.
pub struct Served {
    pub job: String,
    /// `http://ADDRESS` of each node's gateway.
    pub gateways: Vec<String>,
    pub name: String,
}

impl Cluster {
    pub fn serve(&self, name: &str, sets: &[&str]) -> Served {
        let spec = spec("serve-smollm2.toml");
        let spec = spec.to_str().expect("UTF-8");
        let (model, name_key) = (format!("serve.model={}", model(NAME)), format!("serve.name={name}"));
        let small = ["serve.cache=64MiB", "serve.context=1024", "resources.memory=512MiB"];
        // The last of a key counts.
        let keys = [&[model.as_str(), &name_key], &small[..], sets].concat();
        let sets: Vec<&str> = keys.into_iter().flat_map(|key| ["--set", key]).collect();
        let served = self.json(&[&["serve", spec][..], &sets].concat());
        let gateways = served["gateways"].as_array().expect("gateways").iter().map(text).collect();
        Served { job: text(&served["job"]), gateways, name: name.to_owned() }
    }
}

/// One chat, by its number: every second one is drawn.
fn chat(model: &str, number: usize, tokens: usize) -> Value {
    let topics = ["TLS", "port scans", "DNS", "HTTP headers", "SSH banners", "firewalls", "phishing", "BGP"];
    let asked = format!("Tell me about {}.", topics[number % topics.len()]);
    json!({
        "model": model, "messages": [{"role": "user", "content": asked}], "max_tokens": tokens, "stream": true,
        "temperature": if number.is_multiple_of(2) { 0.0 } else { 0.8 }, "seed": number,
    })
}

pub fn client() -> reqwest::Client {
    // It wants one even where nothing is encrypted.
    let _there_already = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().expect("an HTTP client")
}

/// The text of a stream and why it ended; `each` is told how many pieces of text have come.
async fn stream(url: String, body: Value, each: impl Fn(usize)) -> (String, String) {
    let sent = client().post(url).header("content-type", "application/json").body(body.to_string()).send();
    let mut response = sent.await.expect("an answer");
    let status = response.status();
    let (mut left, mut said, mut ended, mut pieces) = (Vec::new(), String::new(), String::new(), 0);
    while let Some(chunk) = response.chunk().await.expect("the stream goes on") {
        left.extend_from_slice(&chunk);
        while let Some(end) = left.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = left.drain(..end + 2).collect();
            let event = String::from_utf8(event).expect("UTF-8");
            let Some(data) = event.trim().strip_prefix("data: ").filter(|data| *data != "[DONE]") else { continue };
            let data: Value = serde_json::from_str(data).expect("JSON");
            assert!(data.get("error").is_none(), "{data}");
            let choice = &data["choices"][0];
            if let Some(piece) = choice["delta"]["content"].as_str().filter(|piece| !piece.is_empty()) {
                said.push_str(piece);
                pieces += 1;
                each(pieces);
            }
            if let Some(reason) = choice["finish_reason"].as_str() {
                ended = reason.to_owned();
            }
        }
    }
    assert!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&left));
    (said, ended)
}

impl Served {
    pub fn url(&self, number: usize, path: &str) -> String {
        format!("{}{path}", self.gateways[number % self.gateways.len()])
    }

    /// Chats side by side, over all gateways. `each`: of the first, as its pieces come.
    pub fn chats(
        &self,
        count: usize,
        tokens: usize,
        each: impl Fn(usize) + Send + Sync + 'static,
    ) -> Vec<(String, String)> {
        let each = Arc::new(each);
        let ask = |number: usize| {
            let (url, body, each) =
                (self.url(number, "/v1/chat/completions"), chat(&self.name, number, tokens), each.clone());
            RUNTIME.spawn(async move {
                let watch = |pieces| {
                    if number == 0 {
                        each(pieces)
                    }
                };
                stream(url, body, watch).await
            })
        };
        let asked: Vec<_> = (0..count).map(ask).collect();
        asked.into_iter().map(|chat| RUNTIME.block_on(chat).expect("a chat")).collect()
    }

    pub fn post(&self, path: &str, body: &str) -> (u16, Value) {
        RUNTIME.block_on(async {
            let sent = client().post(self.url(0, path)).header("content-type", "application/json");
            let response = sent.body(body.to_owned()).send().await.expect("an answer");
            let (status, body) = (response.status().as_u16(), response.text().await.expect("a body"));
            (status, serde_json::from_str(&body).unwrap_or(Value::String(body)))
        })
    }
}

/// D1, D3: and they are those of `stoke infer`.
#[test]
fn every_cut_of_a_model_over_ranks_gives_the_same_answers() {
    let cluster = Cluster::start(4);
    let mut answers: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
    for (stages, tensor) in [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)] {
        let name = format!("{stages}x{tensor}");
        let sets = [format!("serve.stages={stages}"), format!("serve.tensor={tensor}")];
        let served = cluster.serve(&name, &sets.each_ref().map(String::as_str));
        answers.insert(name, served.chats(4, 24, |_| ()));
        cluster.run(&["cancel", &served.job]).expect(0);
        cluster.wait_for_state(&served.job, "cancelled");
    }
    let whole = answers["1x1"].clone();
    for (cut, found) in &answers {
        assert_eq!(*found, whole, "{cut}");
    }
    let asked = ["infer", "--model", &model(NAME), "--max-tokens", "24", "--json", "Tell me about TLS."];
    assert_eq!(text(&run(asked).expect(0).json()["text"]), whole[0].0);
}

/// I27, F41: whichever stage dies, and whenever.
#[test]
fn answers_go_on_with_the_same_tokens_when_stages_die() {
    let cluster = Cluster::start(2);
    let served = cluster.serve("chat", &[]);
    let (chats, tokens) = (32, 40);
    let calm = served.chats(chats, tokens, |_| ());
    let pieces = {
        let count = Arc::new(AtomicUsize::new(0));
        let counts = count.clone();
        served.chats(1, tokens, move |pieces| counts.store(pieces, Ordering::Relaxed));
        count.load(Ordering::Relaxed)
    };
    // Of the head and of the other stage; one directly after the other.
    let nodes = ["node-1", "node-2"];
    for (round, at) in [1, 2, pieces / 2, pieces - 1].into_iter().enumerate() {
        let dir = cluster.dir().to_owned();
        let kills = [(at, nodes[round % 2]), ((at + 1).min(pieces), nodes[(round + 1) % 2])];
        let found = served.chats(chats, tokens, move |pieces| {
            for (_, node) in kills.iter().filter(|(at, _)| *at == pieces) {
                signal(rank_of(&dir, node), Signal::KILL);
            }
        });
        assert_eq!(found, calm, "killed at piece {at} of {pieces}");
    }
    let told = cluster.run(&["explain", &served.job]).expect(0).stdout;
    assert!(told.matches("was killed by signal 9; the others go on").count() >= 4, "{told}");
    // Pages that a dead rank had come back from the other one.
    let log = |rank| {
        poll("a rank in the place of the last one", || {
            let read = cluster.run(&["logs", &served.job, "--rank", rank]);
            (read.code() == 0).then_some(read.stdout)
        })
    };
    let logs = ["0", "1"].map(log);
    let restored = logs.iter().flat_map(|log| log.split("restored=").skip(1)).any(|text| !text.starts_with('0'));
    assert!(restored, "{logs:?}");
}

#[test]
fn answers_go_on_while_the_coordinator_is_away() {
    let cluster = Cluster::start(2);
    let served = cluster.serve("chat", &[]);
    let calm = served.chats(4, 24, |_| ());
    let coordinator = process_of(cluster.dir(), "coordinator");
    signal(coordinator, Signal::STOP);
    assert_eq!(served.chats(4, 24, |_| ()), calm, "new requests, while nobody coordinates");
    signal(coordinator, Signal::KILL);
    assert_eq!(served.chats(4, 24, |_| ()), calm);
    poll("the coordinator is back", || (cluster.run(&["jobs"]).code() == 0).then_some(()));
    assert_eq!(text(&cluster.job(&served.job)["state"]), "running");
    assert_eq!(served.chats(4, 24, |_| ()), calm);
}

/// B10: a node that has another version of the model takes no part in answers.
#[test]
fn a_rank_whose_model_is_another_one_is_not_let_in() {
    let cluster = Cluster::start(2);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let name = "SmolLM2-135M-Instruct.Q4_1.gguf";
    let good = std::fs::read(Path::new(&model(NAME)).join(name)).expect("the model");
    let file = dir.path().join(name);
    std::fs::write(&file, &good).expect("a copy");
    let from = format!("serve.model={}", dir.path().display());
    let served = cluster.serve("chat", &[&from]);
    // Ranks that run have the old file mapped.
    let mut other = good.clone();
    let half = other.len() / 2;
    other[half..].iter_mut().step_by(1_024).for_each(|byte| *byte ^= 1);
    let put = |bytes: &[u8]| {
        let beside = dir.path().join("beside");
        std::fs::write(&beside, bytes).and_then(|()| std::fs::rename(&beside, &file)).expect("a file in its place");
    };
    let calm = served.chats(2, 8, |_| ());
    put(&other);
    signal(rank_of(cluster.dir(), "node-1"), Signal::KILL);
    poll("word of it", || {
        let told = cluster.run(&["explain", &served.job]).stdout;
        told.contains("the model's files on this node differ from those of").then_some(())
    });
    put(&good);
    assert_eq!(served.chats(2, 8, |_| ()), calm);
}

/// A gang moves while it answers.
#[test]
fn a_drained_node_gives_its_stage_to_another_one_and_no_answer_is_lost() {
    let cluster = Cluster::start(3);
    let served = cluster.serve("chat", &[]);
    let calm = served.chats(4, 60, |_| ());
    let job = cluster.job(&served.job);
    let node = text(&job["placement"][1]["node"]);
    let drained = Arc::new(std::sync::Mutex::new(None));
    let (given, command) = (drained.clone(), cluster.command(&["drain", &node]));
    let command = std::sync::Mutex::new(Some(command));
    let found = served.chats(4, 60, move |pieces| {
        if pieces == 5
            && let Some(command) = command.lock().expect("a command").take()
        {
            *given.lock().expect("a process") = Some(crate::harness::Background::start(command));
        }
    });
    assert_eq!(found, calm);
    drained.lock().expect("a process").take().expect("a drain").wait().expect(0);
    assert_eq!(served.chats(4, 60, |_| ()), calm);
}

/// The phase in which a chat began, its number, and its answer.
pub type Answered = (usize, usize, (String, String));

/// Chats that follow each other until they are told to stop, some at a time.
pub struct Stream {
    phase: Arc<AtomicUsize>,
    whole: Arc<AtomicUsize>,
    tasks: Vec<tokio::task::JoinHandle<Vec<Answered>>>,
}

const OVER: usize = usize::MAX;

impl Stream {
    fn start(served: &Served, tokens: usize) -> Self {
        Self::start_with(served, CHATS, tokens)
    }

    /// So many at a time.
    pub fn start_with(served: &Served, chats: usize, tokens: usize) -> Self {
        let (phase, whole) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let follow = |number: usize| {
            let (url, body) = (served.url(number, "/v1/chat/completions"), chat(&served.name, number, tokens));
            let (phase, whole) = (phase.clone(), whole.clone());
            RUNTIME.spawn(async move {
                let mut answers = Vec::new();
                loop {
                    let begun = phase.load(Ordering::Relaxed);
                    if begun == OVER {
                        return answers;
                    }
                    answers.push((begun, number, stream(url.clone(), body.clone(), |_| ()).await));
                    whole.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let tasks = (0..chats).map(follow).collect();
        Self { phase, whole, tasks }
    }

    /// The next phase, when so many more answers are whole.
    pub fn next(&self, more: usize) {
        let due = self.whole.load(Ordering::Relaxed) + more;
        poll("more answers", || (self.whole.load(Ordering::Relaxed) >= due).then_some(()));
        self.phase.fetch_add(1, Ordering::Relaxed);
    }

    /// Panics where a request has failed.
    pub fn end(self) -> Vec<Answered> {
        self.phase.store(OVER, Ordering::Relaxed);
        self.tasks.into_iter().flat_map(|task| RUNTIME.block_on(task).expect("every request has its answer")).collect()
    }
}

const CHATS: usize = 3;

/// R4, G7, G9: no request fails, and each answer is one revision's from its first token to its last.
#[test]
fn revisions_and_replicas_come_and_go_while_every_answer_is_whole() {
    let cluster = Cluster::start(3);
    let strings = |value: &Value| value.as_array().expect("a list").iter().map(text).collect::<Vec<_>>();
    let regular = cluster.serve("chat", &["serve.stages=1"]);
    let rounded = regular.chats(CHATS, 16, |_| ());
    let asked = Stream::start(&regular, 16);
    asked.next(CHATS);

    let full_sets = ["serve.stages=1", "serve.precision=full", "serve.share=0.5"];
    let canary = cluster.serve("chat", &full_sets);
    let view = cluster.job(&canary.job);
    assert_eq!((&view["traffic"], &view["share"]), (&json!("share"), &json!(0.5)));
    asked.next(0);
    asked.next(4 * CHATS);
    let told = cluster.json(&["serve", "promote", &canary.job]);
    assert_eq!(told["model"], "chat");
    assert_eq!(
        (strings(&told["jobs"]), strings(&told["leaving"])),
        (vec![canary.job.clone()], vec![regular.job.clone()])
    );
    cluster.wait_for_state(&regular.job, "cancelled");
    assert_eq!(cluster.json(&["serve", "promote", &canary.job])["leaving"], json!([]), "the same again");
    let full = canary.chats(CHATS, 16, |_| ());
    assert_ne!(rounded, full, "two revisions differ");

    let again = cluster.serve("chat", &["serve.stages=1", "serve.share=0.5"]);
    asked.next(2 * CHATS);
    let told = cluster.json(&["serve", "rollback", "chat"]);
    assert_eq!(
        (strings(&told["jobs"]), strings(&told["leaving"])),
        (vec![canary.job.clone()], vec![again.job.clone()])
    );
    cluster.wait_for_state(&again.job, "cancelled");

    let told = cluster.json(&["scale", "chat", "--replicas", "2"]);
    let added = strings(&told["added"]);
    assert_eq!(strings(&told["jobs"]), [vec![canary.job.clone()], added.clone()].concat());
    cluster.wait_for_state(&added[0], "running");
    asked.next(2 * CHATS);
    assert_eq!(strings(&cluster.json(&["scale", "chat", "--replicas", "1"])["leaving"]), added);
    cluster.wait_for_state(&added[0], "cancelled");
    asked.next(CHATS);

    let answers = asked.end();
    for (phase, number, answer) in &answers {
        let known = [&rounded[*number], &full[*number]];
        assert!(known.contains(&answer), "phase {phase}, chat {number}: {answer:?} is neither of {known:?}");
    }
    let of = |phase: usize, revision: &[(String, String)]| {
        let of_phase = answers.iter().filter(|(begun, ..)| *begun == phase);
        of_phase.filter(|(_, number, answer)| rounded[*number] != full[*number] && *answer == revision[*number]).count()
    };
    assert_eq!(of(0, &full), 0, "before there was a canary");
    assert!(of(2, &rounded) > 0 && of(2, &full) > 0, "beside each other: {} and {}", of(2, &rounded), of(2, &full));
}

#[test]
fn replicas_come_together_and_what_cannot_be_changed_is_said() {
    let cluster = Cluster::start(2);
    let spec = spec("serve-smollm2.toml");
    let spec = spec.to_str().expect("UTF-8");
    let model = format!("serve.model={}", model(NAME));
    let sets = [&model, "serve.stages=1", "serve.name=chat", "serve.cache=64MiB", "serve.context=1024"];
    let sets: Vec<&str> = sets.iter().flat_map(|key| ["--set", key]).collect();
    let serve =
        [&["serve", spec, "--replicas", "2", "--key", "k"][..], &sets, &["--set", "resources.memory=512MiB"]].concat();
    let served = cluster.json(&serve);
    let jobs = served["jobs"].as_array().expect("jobs").clone();
    assert_eq!((jobs.len(), &served["ranks"]), (2, &json!(2)));
    assert_eq!(cluster.json(&serve)["jobs"], json!(jobs), "the same keys");
    let refused = |arguments: &[&str], code: i32, words: &[&str]| {
        cluster.run(arguments).expect(code).says(words);
    };
    refused(
        &[&serve[..2], &sets, &["--set", "serve.precision=full"]].concat(),
        6,
        &["replicas serve the same", "share = 0.1"],
    );
    refused(&["serve", "promote", "job-99"], 3, &["there is no job-99"]);
    refused(&["serve", "rollback", "nothing"], 3, &["no job serves nothing"]);
    refused(&["scale", "nothing", "--replicas", "2"], 3, &["no job serves nothing"]);
    refused(&["scale", "chat", "--replicas", "0"], 2, &["0 replicas of chat", "stoke cancel"]);
    refused(
        &["scale", "chat", "--ranks", "2"],
        2,
        &["is the name of 2 jobs: job-1 (chat), job-2 (chat)", "--replicas"],
    );
    refused(&["scale", "chat"], 2, &["--ranks", "--replicas"]);
    refused(&["serve", "promote", "chat"], 6, &["nothing waits to be promoted"]);
    refused(&[&serve[..2], &sets, &["--set", "serve.share=2"]].concat(), 2, &["above 0 and up to 1"]);
    let unchanged = cluster.json(&["serve", "rollback", "chat"]);
    assert_eq!(unchanged["jobs"], json!(jobs), "nothing is tried, nothing changes");
    assert!(text(&unchanged["nothing"]).starts_with("no job of chat has a share"), "{unchanged}");
    let again = cluster.run(&["serve", "promote", "job-2"]).expect(0).stdout;
    assert!(again.starts_with("nothing was changed: job-1, job-2 had all new requests before"), "{again}");
    // Names, where jobs are named.
    assert_eq!(cluster.json(&["status", "chat"])["jobs"].as_array().map(Vec::len), Some(2));
    for command in ["explain", "logs", "cancel"] {
        refused(&[command, "chat"], 2, &["is the name of 2 jobs: job-1 (chat), job-2 (chat)"]);
        refused(&[command, "nothing"], 3, &["no job is \"nothing\"", "there is job-2 (chat), job-1 (chat)"]);
    }
    let twice = cluster.run(&[&serve[..2], &sets, &["--set", "resources.memory=512MiB"]].concat()).expect(0);
    twice.says(&["chat is served by job-1, job-2 already: job-3 comes beside it"]);
    assert_eq!(cluster.json(&["scale", "job-1", "--replicas", "1"])["model"], "chat");
    for job in ["job-2", "job-3"] {
        let left = cluster.wait_for_state(job, "cancelled");
        assert!(text(&left["reason"]).starts_with("it has left, as admin asked"), "{left}");
    }
    cluster.run(&["logs", "chat"]).expect(0);
    assert_eq!(cluster.json(&["explain", "chat"])["job"]["job"], "job-1");
    assert_eq!(cluster.json(&["cancel", "chat"])["job"], "job-1");
    // A cancel is answered when no rank will start; the name is free when the last one is gone.
    cluster.wait_for_state("job-1", "cancelled");
    refused(&["cancel", "chat"], 3, &["job-3 is cancelled", "stoke explain job-3"]);
    assert_eq!(cluster.json(&["status", "chat"])["job"], "job-3", "the newest that has ended");
}

#[test]
fn what_cannot_be_served_is_said_with_its_mend() {
    let cluster = Cluster::start(1);
    let spec = spec("serve-smollm2.toml");
    let spec = spec.to_str().expect("UTF-8");
    let refused = |sets: &[&str], words: &[&str]| {
        let sets: Vec<&str> = sets.iter().flat_map(|key| ["--set", key]).collect();
        let ended = cluster.run(&[&["serve", spec][..], &sets].concat());
        assert!(ended.code() != 0, "{ended:?}");
        ended.says(words);
    };
    refused(&["serve.model=nowhere"], &["nowhere", "fetch it there"]);
    refused(&["serve.model=/nowhere/at/all"], &["/nowhere/at/all"]);
    let good = format!("serve.model={}", model(NAME));
    refused(&[&good, "serve.context=9000"], &["trained for 8192 tokens"]);
    refused(&[&good, "serve.cache=1MiB"], &["cache = \"1MiB\"", "one request may need 45MiB", "use at least that"]);
    refused(&["serve.stages=0"], &["stages = 0: use 1 to 256"]);
    refused(&["serve.task=embed"], &["an encoder or a classifier has one rank"]);
    refused(&[&good, "serve.task=embed", "serve.stages=1"], &["task = \"generate\""]);
    refused(&[&format!("serve.model={}", model("all-minilm-l6-v2"))], &["task = \"embed\""]);
    refused(&["train.steps=5", "train.batch=8"], &["both [train] and [serve]"]);
    cluster
        .run(&["serve", crate::harness::spec("domains.toml").to_str().expect("UTF-8")])
        .expect(2)
        .says(&["no section [serve]"]);
    let served = cluster.serve("chat", &["serve.stages=1"]);
    cluster.run(&["scale", &served.job, "--ranks", "2"]).expect(2).says(&["its split"]);
    let (status, answer) =
        served.post("/v1/chat/completions", r#"{"model": "other", "messages": [{"role": "user", "content": "x"}]}"#);
    assert_eq!(status, 404, "{answer}");
    let long = "word ".repeat(2_000);
    let body = json!({"model": "chat", "messages": [{"role": "user", "content": long}]}).to_string();
    let (status, answer) = served.post("/v1/chat/completions", &body);
    assert!(status == 400 && answer.to_string().contains("1024"), "{status} {answer}");
    // Far more memory than bytes: it is refused here, and its head is as well as before.
    let many: Vec<Value> = (0..4_000).map(|_| json!({"role": "user", "content": "x"})).collect();
    let (status, answer) = served.post("/v1/chat/completions", &json!({"model": "chat", "messages": many}).to_string());
    assert!(status == 413 && answer.to_string().contains("too many small parts"), "{status} {answer}");
    assert_eq!(served.chats(1, 2, |_| ()).len(), 1);
}

/// A Python that has the clients.
fn python() -> Option<PathBuf> {
    let packages = ["openai==3.57.0", "tritonclient[http,grpc]==2.73.0"];
    python_with("clients-openai-3.57.0-tritonclient-2.73.0", &packages, "openai, tritonclient.grpc, tritonclient.http")
}

#[test]
fn clients_that_nobody_here_wrote_work_unchanged() {
    let Some(python) = python() else { return };
    let cluster = Cluster::start(2);
    let served = cluster.serve("chat", &[]);
    let encoder = format!("serve.model={}", model("all-minilm-l6-v2"));
    cluster.serve("minilm", &["serve.task=embed", &encoder, "serve.stages=1"]);
    let gateway = served.gateways[0].trim_start_matches("http://");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("integration/clients.py");
    let output = Command::new(python).arg(script).args([gateway, "chat", "minilm"]).output().expect("Python runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let openai = &told["openai"];
    let asked = ["infer", "--model", &model(NAME), "--max-tokens", "24", "--json", "Tell me about TLS."];
    let alone = run(asked).expect(0).json();
    assert_eq!((&openai["chat"], &openai["streamed"]), (&alone["text"], &alone["text"]));
    assert_eq!((&openai["completion_tokens"], &openai["streamed_tokens"]), (&24.into(), &24.into()));
    assert_eq!(openai["finish_reason"], "length");
    let sentence = text(&alone["text"]).split('.').next().expect("a sentence").to_owned();
    assert_eq!(text(&openai["stopped"]), sentence);
    assert_eq!(openai["models"], json!(["chat", "minilm"]));
    assert!(openai["drawn"][0] == openai["drawn"][1] && openai["drawn"][0] != openai["drawn"][2], "{openai}");
    assert_eq!((&openai["unknown_model"][0], &openai["unknown_model"][1]), (&"NotFoundError".into(), &404.into()));
    assert_eq!(
        (&openai["negative_temperature"][0], &openai["wrong_task"][0]),
        (&"BadRequestError".into(), &"BadRequestError".into())
    );
    let embed =
        ["embed", "--model", &model("all-minilm-l6-v2"), "--json", "nginx/1.24.0 (Ubuntu)", "SSH-2.0-OpenSSH_9.6"];
    let embedded = run(embed).expect(0).stdout;
    let vectors: Vec<Value> = embedded.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    for (row, vector) in vectors.iter().enumerate() {
        let ours = numbers(&vector["embedding"]);
        for found in [&openai["embeddings"], &told["http"]["embeddings"], &told["grpc"]["embeddings"]] {
            let differ = numbers(&found[row]).iter().zip(&ours).any(|(found, ours)| (found - ours).abs() > 1e-6);
            assert!(!differ && numbers(&found[row]).len() == ours.len(), "row {row}: {found}");
        }
    }
    let raw = ["infer", "--model", &model(NAME), "--raw", "--max-tokens", "8", "--json", "220 smtp.example.org ESMTP"];
    let raw = run(raw).expect(0).json();
    assert_eq!((&told["http"]["text"], &told["grpc"]["text"]), (&raw["text"], &raw["text"]));
    assert_eq!((&told["http"]["inputs"], &told["grpc"]["inputs"]), (&json!(["text"]), &json!(["text"])));
}

fn numbers(values: &Value) -> Vec<f64> {
    values.as_array().expect("a vector").iter().map(|value| value.as_f64().expect("a number")).collect()
}

/// What this project has trained answers too, as `stoke predict` does.
#[test]
fn a_trained_classifier_is_served_from_its_checkpoint() {
    let cluster = Cluster::start(1);
    let domains = spec("domains.toml");
    let trained = ["submit", domains.to_str().expect("UTF-8"), "--ranks", "1", "--set", "train.steps=20"];
    let job = text(&cluster.json(&trained)["job"]);
    cluster.wait_for_state(&job, "succeeded");
    let uri = text(&cluster.json(&["checkpoint", "list", &job])["checkpoints"][0]["uri"]);
    let checkpoint = format!("serve.model={uri}");
    let served = cluster.serve("domains", &["serve.task=infer", "serve.stages=1", &checkpoint]);
    let lines = ["paypal-secure-login.xyz", "wikipedia.org"];
    let body = json!({"inputs": [{"name": "line", "datatype": "BYTES", "shape": [2], "data": lines}]}).to_string();
    let (status, answer) = served.post("/v2/models/domains/infer", &body);
    assert_eq!(status, 200, "{answer}");
    let predict = ["predict", "--checkpoint", &uri, "--json"];
    let predicted = run_with_input(predict, &lines.join("\n")).expect(0).stdout;
    let labels: Vec<Value> =
        predicted.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")["label"].clone()).collect();
    assert_eq!(answer["outputs"][0]["data"], Value::Array(labels), "{answer}");
}
