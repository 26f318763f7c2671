//! A gateway and heads in one process, over real sockets.

mod head;
mod inference;
mod limits;
mod metrics;
mod revisions;

use std::time::Duration;

use serde_json::{Value, json};
use stoke_protocol::list::List;
use stoke_protocol::message::serve::{Ask, Generate, Message, Prompt, Refusal, Route, Sampling};
use stoke_protocol::spec::Task;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use head::{Cluster, Deed, PROMPT_TOKENS, TestHead, routes, text_of, tokens, vector_of};

use super::*;

const LONG: Duration = Duration::from_secs(30);

struct Response {
    status: u16,
    headers: reqwest::header::HeaderMap,
    text: String,
}

impl Response {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    fn message(&self) -> String {
        self.json()["error"]["message"].as_str().unwrap_or_default().to_owned()
    }
}

async fn send(
    gateway: &Gateway,
    request: impl FnOnce(&reqwest::Client, String) -> reqwest::RequestBuilder,
) -> Response {
    let client = reqwest::Client::builder().timeout(LONG).build().unwrap();
    let response = request(&client, format!("http://{}", gateway.address())).send().await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    Response { status, headers, text: response.text().await.unwrap() }
}

async fn get(gateway: &Gateway, path: &str) -> Response {
    send(gateway, |client, url| client.get(url + path)).await
}

async fn post(gateway: &Gateway, path: &str, body: impl ToString) -> Response {
    let body = body.to_string();
    send(gateway, |client, url| client.post(url + path).header("content-type", "application/json").body(body)).await
}

const CHAT: &str = "/v1/chat/completions";

fn chat(tokens_max: u32, stream: bool) -> Value {
    json!({"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": tokens_max, "seed": 7,
        "stream": stream, "stream_options": {"include_usage": true}})
}

/// What every head answers to `chat`.
fn expected(tokens_max: u32) -> String {
    let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 7 };
    let message = Message { role: "user".into(), content: "hello".into() };
    let prompt = Prompt::Chat(vec![message].into());
    let (stop, answered) = (List::default(), Default::default());
    let generate = Generate { prompt, sampling, tokens_max: Some(tokens_max), stop, answered };
    text_of(&tokens(&generate).0)
}

/// The events of a stream: text, finish reason, usage. Panics where the stream does not end as it should.
fn read_stream(text: &str) -> (String, String, Value) {
    let events: Vec<&str> = text.split("\n\n").filter(|event| !event.is_empty()).collect();
    assert_eq!(events.last(), Some(&"data: [DONE]"), "{text}");
    let (mut content, mut finish, mut usage) = (String::new(), String::new(), Value::Null);
    for event in &events[..events.len() - 1] {
        let event: Value = serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
        assert!(event.get("error").is_none(), "{event}");
        if let Some(choice) = event["choices"].get(0) {
            content += choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
            finish += choice["finish_reason"].as_str().unwrap_or_default();
        }
        usage = if event["usage"].is_null() { usage } else { event["usage"].clone() };
    }
    (content, finish, usage)
}

fn usage(tokens: u64) -> Value {
    let prompt = u64::from(PROMPT_TOKENS);
    json!({"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens})
}

async fn with_head(deeds: Vec<Deed>) -> (Cluster, TestHead, Gateway) {
    let cluster = Cluster::new();
    let head = cluster.head(1, 1, deeds);
    let gateway = cluster.gateway(|_| {}).await;
    gateway.routes(routes(1, vec![head.route("m", Task::Generate)]));
    (cluster, head, gateway)
}

#[tokio::test]
async fn a_chat_is_answered_whole_and_as_a_stream() {
    let (_cluster, head, gateway) = with_head(Vec::new()).await;
    let response = post(&gateway, CHAT, chat(12, false)).await;
    assert_eq!(response.status, 200, "{}", response.text);
    let whole = response.json();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["model"], "m");
    assert_eq!(whole["choices"][0]["message"]["content"], expected(12));
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"], usage(12));
    let response = post(&gateway, CHAT, chat(12, true)).await;
    assert!(response.header("content-type").starts_with("text/event-stream"));
    assert_eq!(read_stream(&response.text), (expected(12), "length".into(), usage(12)));
    let Ask::Generate(generate) = &head.questions()[0].ask else { panic!("another question") };
    assert_eq!(generate.tokens_max, Some(12));
    assert_eq!(gateway.counts().running, 0);
    gateway.stop().await;
}

#[tokio::test]
async fn an_answer_goes_on_without_a_gap_wherever_its_head_is_lost() {
    let deeds = [
        vec![Deed::Reset(0)],
        vec![Deed::Close(0)],
        vec![Deed::Close(1)],
        vec![Deed::Close(6)],
        vec![Deed::Reset(6)],
        vec![Deed::End(6)],
        vec![Deed::Close(12)],
        vec![Deed::End(12)],
        vec![Deed::Close(3), Deed::Close(4)],
        vec![Deed::Close(3), Deed::Close(0), Deed::End(9)],
        vec![Deed::Refuse(Refusal::Moved)],
        vec![Deed::RefuseAfter(5, Refusal::Moved)],
        vec![Deed::RefuseAfter(5, Refusal::Busy { retry_after_ms: 50 })],
        vec![Deed::Repeat(5)],
        vec![Deed::Skip(5)],
    ];
    let cluster = Cluster::new();
    for deeds in deeds {
        let losses = deeds.len() as u64;
        let head = cluster.head(1, 1, [deeds.clone(), vec![Deed::Answer], deeds.clone()].concat());
        let gateway = cluster.gateway(|_| {}).await;
        gateway.routes(routes(1, vec![head.route("m", Task::Generate)]));
        let response = post(&gateway, CHAT, chat(12, true)).await;
        assert_eq!(read_stream(&response.text), (expected(12), "length".into(), usage(12)), "{deeds:?}");
        let response = post(&gateway, CHAT, chat(12, false)).await;
        assert_eq!(response.json()["choices"][0]["message"]["content"], expected(12), "{deeds:?}");
        assert_eq!(response.json()["usage"], usage(12), "{deeds:?}");
        assert_eq!(gateway.counts().replays, 2 * losses, "{deeds:?}");
        assert_eq!(gateway.counts().running, 0);
    }
}

#[tokio::test]
async fn the_next_head_goes_on_where_the_last_one_was_lost() {
    let cluster = Cluster::new();
    let first = cluster.head(1, 1, vec![Deed::Stall(4)]);
    let gateway = cluster.gateway(|_| {}).await;
    gateway.routes(routes(1, vec![first.route("m", Task::Generate)]));
    let asking = post(&gateway, CHAT, chat(12, true));
    let failing = async {
        first.asked(1).await;
        first.die().await;
        // Nobody is the head for a while.
        gateway.routes(routes(2, vec![Route { head: None, ..first.route("m", Task::Generate) }]));
        let next = cluster.head(1, 2, Vec::new());
        gateway.routes(routes(3, vec![next.route("m", Task::Generate)]));
        next
    };
    let (response, next) = tokio::join!(asking, failing);
    assert_eq!(read_stream(&response.text), (expected(12), "length".into(), usage(12)));
    assert_eq!(next.answered().len(), 1);
}

#[tokio::test]
async fn a_head_that_was_replaced_is_left_though_it_lives() {
    let cluster = Cluster::new();
    let first = cluster.head(1, 1, vec![Deed::Stall(4)]);
    let next = cluster.head(1, 2, Vec::new());
    let gateway = cluster.gateway(|_| {}).await;
    gateway.routes(routes(1, vec![first.route("m", Task::Generate)]));
    let asking = post(&gateway, CHAT, chat(12, true));
    let moving = async {
        first.asked(1).await;
        gateway.routes(routes(2, vec![next.route("m", Task::Generate)]));
        first.stopped(1).await;
    };
    let (response, ()) = tokio::join!(asking, moving);
    assert_eq!(read_stream(&response.text).0, expected(12));
}

#[tokio::test]
async fn questions_are_dealt_over_the_heads_of_a_model() {
    let cluster = Cluster::new();
    let heads = [cluster.head(1, 1, Vec::new()), cluster.head(2, 1, Vec::new())];
    let gateway = cluster.gateway(|_| {}).await;
    gateway.routes(routes(1, heads.iter().map(|head| head.route("m", Task::Generate)).collect()));
    for _ in 0..6 {
        assert_eq!(post(&gateway, CHAT, chat(2, false)).await.status, 200);
    }
    assert_eq!(heads.each_ref().map(|head| head.questions().len()), [3, 3]);
    // Where one is busy, the other one takes it; it is asked again after a while, so how often it was is no fact.
    let busy = cluster.head(3, 1, vec![Deed::Refuse(Refusal::Busy { retry_after_ms: 20_000 }); 4]);
    let other = cluster.head(4, 1, Vec::new());
    gateway.routes(routes(2, vec![busy.route("m", Task::Generate), other.route("m", Task::Generate)]));
    for _ in 0..4 {
        assert_eq!(post(&gateway, CHAT, chat(2, false)).await.status, 200);
    }
    assert!(!busy.questions().is_empty());
    assert_eq!(other.questions().len(), 4);
}

#[tokio::test]
async fn refusals_have_their_status() {
    let refusals = [
        (Refusal::Busy { retry_after_ms: 2500 }, 429, "rate_limit_exceeded"),
        (Refusal::TooLong { tokens: 900, context: 512 }, 400, "context_length_exceeded"),
        (Refusal::Late, 504, "timeout"),
    ];
    for (refusal, status, code) in refusals {
        for stream in [false, true] {
            let (_cluster, _head, gateway) = with_head(vec![Deed::Refuse(refusal.clone())]).await;
            let response = post(&gateway, CHAT, chat(12, stream)).await;
            assert_eq!(response.status, status, "{}", response.text);
            assert_eq!(response.json()["error"]["code"], code);
            let retry = if status == 429 { "3" } else { "" };
            assert_eq!(response.header("retry-after"), retry);
        }
    }
    let (_cluster, _head, gateway) = with_head(vec![Deed::Refuse(Refusal::Invalid { problem: "not so".into() })]).await;
    let response = post(&gateway, CHAT, chat(12, false)).await;
    assert_eq!((response.status, response.message().as_str()), (400, "not so"));
}

#[tokio::test]
async fn a_stream_that_fails_after_its_beginning_ends_with_the_error() {
    let problem = Refusal::Invalid { problem: "no more of it".into() };
    let (_cluster, _head, gateway) = with_head(vec![Deed::RefuseAfter(3, problem)]).await;
    let response = post(&gateway, CHAT, chat(12, true)).await;
    assert_eq!(response.status, 200);
    let last = response.text.split("\n\n").filter(|event| !event.is_empty()).last().unwrap();
    let last: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(last["error"]["message"], "no more of it");
}

#[tokio::test]
async fn a_request_waits_for_a_head_that_comes_up_and_not_for_ever() {
    let cluster = Cluster::new();
    let head = cluster.head(1, 1, Vec::new());
    let gateway = cluster.gateway(|options| options.wait = Duration::from_millis(300)).await;
    // No routes at all yet.
    let response = post(&gateway, CHAT, chat(3, false)).await;
    assert_eq!((response.status, response.header("retry-after")), (503, "5"), "{}", response.text);
    let without = Route { head: None, ..head.route("m", Task::Generate) };
    gateway.routes(routes(1, vec![without]));
    let response = post(&gateway, CHAT, chat(3, false)).await;
    assert_eq!((response.status, response.header("retry-after")), (503, "5"), "{}", response.text);
    let patient = cluster.gateway(|options| options.wait = LONG).await;
    patient.routes(routes(1, vec![Route { head: None, ..head.route("m", Task::Generate) }]));
    let asking = post(&patient, CHAT, chat(3, false));
    let coming = async {
        while patient.counts().questions == 0 {
            tokio::task::yield_now().await;
        }
        patient.routes(routes(2, vec![head.route("m", Task::Generate)]));
    };
    let (response, ()) = tokio::join!(asking, coming);
    assert_eq!(response.json()["choices"][0]["message"]["content"], expected(3));
}

#[tokio::test]
async fn a_client_that_goes_takes_its_question_back() {
    for stream in [true, false] {
        let (_cluster, head, gateway) = with_head(vec![Deed::Stall(2)]).await;
        let mut client = TcpStream::connect(gateway.address()).await.unwrap();
        let body = chat(12, stream).to_string();
        let request = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        client.write_all(request.as_bytes()).await.unwrap();
        head.asked(1).await;
        assert_eq!(gateway.counts().running, 1);
        drop(client);
        head.stopped(1).await;
        assert_eq!(gateway.counts().running, 0);
    }
}

#[tokio::test]
async fn a_deadline_ends_a_question() {
    let (_cluster, head, gateway) = with_head(vec![Deed::Stall(2)]).await;
    let body = chat(12, false).to_string();
    let response =
        send(&gateway, |client, url| client.post(url + CHAT).header("x-request-timeout-ms", "200").body(body)).await;
    assert_eq!(response.status, 504, "{}", response.text);
    head.stopped(1).await;
    let deadline_ms = head.questions()[0].deadline_ms;
    assert!((1..=200).contains(&deadline_ms), "{deadline_ms}");
    let body = chat(12, false).to_string();
    let response =
        send(&gateway, |client, url| client.post(url + CHAT).header("x-request-timeout-ms", "-1").body(body)).await;
    assert_eq!(response.status, 400, "{}", response.text);
}

#[tokio::test]
async fn a_head_that_lives_and_says_nothing_is_given_up() {
    let cluster = Cluster::new();
    let head = cluster.head(1, 1, vec![Deed::Stall(2)]);
    let gateway = cluster.gateway(|options| options.silence = Duration::from_millis(200)).await;
    gateway.routes(routes(1, vec![head.route("m", Task::Generate)]));
    let response = post(&gateway, CHAT, chat(12, false)).await;
    assert_eq!(response.status, 504, "{}", response.text);
    head.stopped(1).await;
}

#[tokio::test]
async fn more_questions_than_one_connection_carries_are_under_way_at_once() {
    let cluster = Cluster::new();
    let head = cluster.head(1, 1, vec![Deed::Stall(1); 270]);
    let gateway = cluster.gateway(|_| {}).await;
    gateway.routes(routes(1, vec![head.route("m", Task::Generate)]));
    let asking = futures_util::future::join_all((0..270).map(|_| post(&gateway, CHAT, chat(2, true))));
    tokio::select! {
        _ = asking => panic!("a head that stalls has answered"),
        () = head.asked(270) => {}
    }
    head.stopped(270).await;
    assert_eq!(gateway.counts().running, 0);
}

#[tokio::test]
async fn completions_have_choices_for_prompts_and_n() {
    let (_cluster, head, gateway) = with_head(Vec::new()).await;
    let body = json!({"model": "m", "prompt": ["one", "two"], "n": 2, "max_tokens": 4, "seed": 1});
    let response = post(&gateway, "/v1/completions", &body).await;
    assert_eq!(response.status, 200, "{}", response.text);
    let whole = response.json();
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(whole["choices"].as_array().unwrap().len(), 4);
    assert_eq!(whole["usage"]["prompt_tokens"], 2 * PROMPT_TOKENS);
    assert_eq!(whole["usage"]["completion_tokens"], 16);
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    let response = post(&gateway, "/v1/completions", streamed).await;
    let mut texts = vec![String::new(); 4];
    for event in response.text.split("\n\n").filter_map(|event| event.strip_prefix("data: {")) {
        let event: Value = serde_json::from_str(&format!("{{{event}")).unwrap();
        let choice = &event["choices"][0];
        texts[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
    }
    for (index, text) in texts.iter().enumerate() {
        assert_eq!(whole["choices"][index]["text"], **text);
    }
    assert_eq!(head.questions().len(), 8);
    // What OpenAI takes where nothing is said.
    post(&gateway, "/v1/completions", json!({"model": "m", "prompt": "x"})).await;
    let Ask::Generate(generate) = &head.questions()[8].ask else { panic!("another question") };
    assert_eq!((generate.tokens_max, generate.sampling.temperature), (Some(16), 1.0));
}

#[tokio::test]
async fn embeddings_come_as_numbers_and_as_base64_and_survive_a_loss() {
    let cluster = Cluster::new();
    let head = cluster.head(1, 1, vec![Deed::Vectors(1), Deed::Answer]);
    let gateway = cluster.gateway(|_| {}).await;
    gateway.routes(routes(1, vec![head.route("e", Task::Embed)]));
    let body = json!({"model": "e", "input": ["a", "bc", "déf"]});
    let response = post(&gateway, "/v1/embeddings", &body).await;
    assert_eq!(response.status, 200, "{}", response.text);
    let list = response.json();
    assert_eq!(list["usage"], json!({"prompt_tokens": 7, "total_tokens": 7}));
    for (index, text) in ["a", "bc", "déf"].iter().enumerate() {
        let values: Vec<f32> = serde_json::from_value(list["data"][index]["embedding"].clone()).unwrap();
        assert_eq!(values, vector_of(text));
    }
    let body = json!({"model": "e", "input": "a", "encoding_format": "base64"});
    let response = post(&gateway, "/v1/embeddings", body).await;
    assert_eq!(response.json()["data"][0]["embedding"], "AACAPwAAwkLNzMw9");
    let response = post(&gateway, "/v1/embeddings", json!({"model": "e", "input": ["a", ""]})).await;
    assert_eq!((response.status, response.message().contains("text 1 is empty")), (400, true), "{}", response.text);
    let response = post(&gateway, CHAT, json!({"model": "e", "messages": [{"role": "user", "content": "a"}]})).await;
    assert_eq!(response.status, 400);
    assert!(response.message().contains("/v1/embeddings"), "{}", response.message());
}
