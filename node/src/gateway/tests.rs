//! A gateway and heads in one process, over real sockets.

mod head;

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
    let (stop, answered) = (List::default(), List::default());
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
    // One that is busy is passed over.
    let busy = cluster.head(3, 1, vec![Deed::Refuse(Refusal::Busy { retry_after_ms: 20_000 })]);
    let other = cluster.head(4, 1, Vec::new());
    gateway.routes(routes(2, vec![busy.route("m", Task::Generate), other.route("m", Task::Generate)]));
    for _ in 0..4 {
        assert_eq!(post(&gateway, CHAT, chat(2, false)).await.status, 200);
    }
    assert_eq!((busy.questions().len(), other.questions().len()), (1, 4));
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
    let response = post(&gateway, CHAT, json!({"model": "e", "messages": [{"role": "user", "content": "a"}]})).await;
    assert_eq!(response.status, 400);
    assert!(response.message().contains("/v1/embeddings"), "{}", response.message());
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_said() {
    let (_cluster, head, gateway) = with_head(Vec::new()).await;
    let chat = |field: &str, value: Value| {
        let mut body = chat(3, false);
        body[field] = value;
        body.to_string()
    };
    let plain = json!({"model": "m"}).to_string();
    let cases = [
        (chat("model", json!("zz")), 404, "no model \"zz\": there is m"),
        (chat("temperature", json!(-0.1)), 400, "temperature is -0.1"),
        (chat("temperature", json!("hot")), 400, "temperature: invalid type"),
        (chat("top_p", json!(0)), 400, "top_p is 0"),
        (chat("top_k", json!(-2)), 400, "top_k is -2"),
        (chat("max_tokens", json!(0)), 400, "max_tokens is 0"),
        (chat("max_tokens", json!(-5)), 400, "max_tokens: invalid value"),
        (chat("max_tokens", json!(1u64 << 40)), 400, "max_tokens is 1099511627776"),
        (chat("n", json!(17)), 400, "n is 17"),
        (chat("n", json!(0)), 400, "n is 0"),
        (chat("stop", json!(["a", "b", "c", "d", "e"])), 400, "stop: send up to 4"),
        (chat("stop", json!([1])), 400, "stop: expected a text"),
        (chat("stop", json!("")), 400, "stop: send up to 4"),
        (chat("seed", json!(1e30)), 400, "seed"),
        (chat("tools", json!([{"type": "function"}])), 400, "tools is not supported"),
        (chat("logprobs", json!(true)), 400, "logprobs is not supported"),
        (chat("response_format", json!({"type": "json_object"})), 400, "response_format"),
        (chat("presence_penalty", json!(0.5)), 400, "presence_penalty is not supported"),
        (chat("messages", json!([])), 400, "messages: send 1 to"),
        (chat("messages", json!("hello")), 400, "messages: invalid type"),
        (chat("messages", json!([{"role": "user"}])), 400, "a message has a content"),
        (chat("messages", json!([{"role": "user", "content": [{"type": "image_url"}]}])), 400, "type \"text\""),
        (plain, 400, "messages is missing"),
        ("{\"model\": \"m\", \"temperature\": NaN}".into(), 400, "the body is not JSON"),
        ("{\"model\": \"m\", \"temperature\": 1e999}".into(), 400, "number out of range"),
        ("{\"model\": \"m\"".into(), 400, "the body is not JSON"),
        ("{\"model\": \"m\"} {}".into(), 400, "the body is not JSON"),
        ("[1]".into(), 400, "invalid type"),
        (String::new(), 400, "the body is not JSON"),
        ("[".repeat(100_000), 400, ""),
    ];
    for (body, status, message) in cases {
        let response = post(&gateway, CHAT, &body).await;
        let shown: String = body.chars().take(200).collect();
        assert_eq!(response.status, status, "{shown}: {}", response.text);
        assert!(response.message().contains(message), "{shown}: {}", response.message());
    }
    let response = send(&gateway, |client, url| client.post(url + CHAT).body(b"{\"model\": \"\xff\"}".to_vec())).await;
    assert_eq!(response.status, 400, "{}", response.text);
    assert!(head.questions().is_empty());
    // What asks for nothing is no error, and what is not known is left out.
    let harmless = [
        ("tools", json!([])),
        ("tool_choice", json!("none")),
        ("logprobs", json!(false)),
        ("response_format", json!({"type": "text"})),
        ("frequency_penalty", json!(0)),
        ("logit_bias", json!({})),
        ("n", json!(1)),
        ("stop", Value::Null),
        ("top_k", json!(-1)),
        ("seed", json!(-3)),
        ("user", json!("u-1")),
        ("messages", json!([{"role": "user", "content": [{"type": "text", "text": "hello"}]}])),
    ];
    for (field, value) in harmless {
        let response = post(&gateway, CHAT, chat(field, value)).await;
        assert_eq!(response.status, 200, "{field}: {}", response.text);
    }
}

#[tokio::test]
async fn places_and_methods_are_told_apart() {
    let (_cluster, _head, gateway) = with_head(Vec::new()).await;
    let models = get(&gateway, "/v1/models").await.json();
    let model = json!({"id": "m", "object": "model", "created": 1_700_000_000, "owned_by": "stoke"});
    assert_eq!(models, json!({"object": "list", "data": [model]}));
    assert_eq!(get(&gateway, "/v1/models/m").await.json(), model);
    assert_eq!(get(&gateway, "/v1/models/z").await.status, 404);
    assert_eq!(get(&gateway, "/nothing").await.json()["error"]["type"], "invalid_request_error");
    let response = get(&gateway, CHAT).await;
    assert_eq!((response.status, response.header("allow")), (405, "POST, OPTIONS"));
    let response = send(&gateway, |client, url| client.delete(url + "/v1/models")).await;
    assert_eq!((response.status, response.header("allow")), (405, "GET, HEAD, OPTIONS"));
    let response = send(&gateway, |client, url| client.head(url + "/v1/models")).await;
    assert_eq!((response.status, response.text.as_str()), (200, ""));
    let response = send(&gateway, |client, url| client.request(reqwest::Method::OPTIONS, url + CHAT)).await;
    assert_eq!((response.status, response.header("allow")), (204, "POST, OPTIONS"));
    let body = chat(3, false).to_string();
    let form = |body: String| {
        send(&gateway, |client, url| client.post(url + CHAT).header("content-type", "text/xml").body(body))
    };
    assert_eq!(form(body.clone()).await.status, 415);
    let response =
        send(&gateway, |client, url| client.post(url + CHAT).header("content-encoding", "gzip").body(body)).await;
    assert_eq!(response.status, 415);
    let response = send(&gateway, |client, url| client.get(url + "/health").header("x-request-id", "abc-1")).await;
    assert_eq!((response.status, response.header("x-request-id")), (200, "abc-1"));
    let response = send(&gateway, |client, url| client.get(url + "/health").header("x-request-id", "a b")).await;
    assert_eq!(response.header("x-request-id").len(), 32);
}

#[tokio::test]
async fn what_is_too_large_is_refused_before_it_is_kept() {
    let (_cluster, _head, gateway) = with_head(Vec::new()).await;
    // By its length, before any of it was sent.
    let mut client = TcpStream::connect(gateway.address()).await.unwrap();
    let request = format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999\r\n\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
    let mut answer = [0; 64];
    let read = timeout(LONG, client.read(&mut answer)).await.unwrap().unwrap();
    assert!(answer[..read].starts_with(b"HTTP/1.1 413"), "{}", String::from_utf8_lossy(&answer[..read]));
    // A body that fits, with more text than a head takes.
    let mut body = chat(3, false);
    body["messages"][0]["content"] = "a".repeat(2 << 20).into();
    let response = post(&gateway, CHAT, body).await;
    assert_eq!(response.status, 413, "{}", response.text);
    // A head of a request that is too large.
    let response = send(&gateway, |client, url| client.get(url + "/health").header("x-a", "a".repeat(60_000))).await;
    assert_eq!(response.status, 431);
}

#[tokio::test]
async fn only_those_with_a_token_come_in() {
    let cluster = Cluster::new();
    let head = cluster.head(1, 1, Vec::new());
    let gateway = cluster.gateway(|options| options.tokens = vec![Token::new("anna", "s3cret")]).await;
    gateway.routes(routes(1, vec![head.route("m", Task::Generate)]));
    let response = post(&gateway, CHAT, chat(3, false)).await;
    assert_eq!((response.status, response.header("www-authenticate")), (401, "Bearer"));
    assert_eq!(response.json()["error"]["code"], "invalid_api_key");
    let body = chat(3, false).to_string();
    let response = send(&gateway, |client, url| client.post(url + CHAT).bearer_auth("s3cret").body(body)).await;
    assert_eq!(response.status, 200, "{}", response.text);
    assert_eq!(get(&gateway, "/health").await.status, 200);
    assert_eq!(get(&gateway, "/v1/models").await.status, 401);
}

#[tokio::test]
async fn nobody_else_is_let_in_without_tokens() {
    let cluster = Cluster::new();
    let gateway = cluster.gateway(|_| {}).await;
    let error = GatewayError::Exposed { address: ([0, 0, 0, 0], 80).into() };
    assert!(error.to_string().contains("configure tokens"), "{error}");
    let taken = Options::new(gateway.address());
    let endpoint = cluster.client();
    let started = Gateway::start(taken, endpoint.clone()).await;
    assert!(matches!(started, Err(GatewayError::Bind { .. })));
    let started = Gateway::start(Options::new(([0, 0, 0, 0], 0).into()), endpoint).await;
    assert!(matches!(started, Err(GatewayError::Exposed { .. })));
}

#[tokio::test]
async fn a_gateway_that_stops_lets_running_requests_end() {
    let cluster = Cluster::new();
    let head = cluster.head(1, 1, vec![Deed::Stall(3)]);
    let next = cluster.head(1, 2, Vec::new());
    let gateway = cluster.gateway(|_| {}).await;
    let address = gateway.address();
    gateway.routes(routes(1, vec![head.route("m", Task::Generate)]));
    let body = chat(12, true).to_string();
    let client = reqwest::Client::new();
    let asking = tokio::spawn(async move {
        client.post(format!("http://{address}{CHAT}")).body(body).send().await.unwrap().text().await.unwrap()
    });
    head.asked(1).await;
    let desk = gateway.service.desk.clone();
    let stopping = tokio::spawn(gateway.stop());
    while TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    desk.renew(routes(2, vec![next.route("m", Task::Generate)]));
    assert_eq!(read_stream(&asking.await.unwrap()).0, expected(12));
    timeout(LONG, stopping).await.unwrap().unwrap();
}

#[tokio::test]
async fn models_are_ready_when_a_probe_has_gone_through() {
    let cluster = Cluster::new();
    let head = cluster.head(1, 1, Vec::new());
    let gateway = cluster.gateway(|options| options.wait = Duration::from_millis(100)).await;
    assert_eq!(get(&gateway, "/v2/health/live").await.status, 200);
    assert_eq!(get(&gateway, "/v2/health/ready").await.status, 503, "nothing is served");
    gateway.routes(routes(1, vec![head.route("m", Task::Generate)]));
    for _ in 0..5 {
        assert_eq!(get(&gateway, "/v2/health/ready").await.status, 200);
        assert_eq!(get(&gateway, "/v2/models/m/ready").await.json(), json!({"name": "m", "ready": true}));
    }
    // A probe counts for a second, whoever asks.
    let probes = head.questions().len();
    assert!(probes < 5, "{probes}");
    assert_eq!(get(&gateway, "/v2/models/m/versions/1/ready").await.status, 200);
    assert_eq!(get(&gateway, "/v2/models/m/versions/2/ready").await.status, 404);
    assert_eq!(get(&gateway, "/v2/models/z/ready").await.status, 404);
    gateway
        .routes(routes(2, vec![head.route("m", Task::Generate), Route { head: None, ..head.route("z", Task::Embed) }]));
    assert_eq!(get(&gateway, "/v2/models/z/ready").await.status, 503);
    assert_eq!(get(&gateway, "/v2/health/ready").await.status, 503);
}

async fn with_each_task() -> (Cluster, TestHead, Gateway) {
    let cluster = Cluster::new();
    let head = cluster.head(1, 1, Vec::new());
    let gateway = cluster.gateway(|_| {}).await;
    let other = |job, model: &str, task| Route { job: stoke_protocol::ids::JobId(job), ..head.route(model, task) };
    let all = vec![head.route("m", Task::Generate), other(2, "e", Task::Embed), other(3, "t", Task::Infer)];
    gateway.routes(routes(1, all));
    (cluster, head, gateway)
}

fn texts(texts: &[&str]) -> Value {
    json!({"name": "text", "shape": [texts.len()], "datatype": "BYTES", "data": texts})
}

#[tokio::test]
async fn tensors_go_through_every_kind_of_model() {
    let (_cluster, _head, gateway) = with_each_task().await;
    let metadata = get(&gateway, "/v2/models/m").await.json();
    assert_eq!(metadata["inputs"], json!([{"name": "text", "datatype": "BYTES", "shape": [-1]}]));
    let metadata = get(&gateway, "/v2/models/t").await.json();
    assert_eq!(metadata["outputs"], json!([{"name": "x_out", "datatype": "FP32", "shape": [-1, 2]}]));
    assert_eq!(get(&gateway, "/v2").await.json()["name"], "stoke");

    let body = json!({"id": "7", "inputs": [texts(&["a", "bé"])], "parameters": {"max_tokens": 3, "seed": 1}});
    let response = post(&gateway, "/v2/models/m/infer", body).await;
    assert_eq!(response.status, 200, "{}", response.text);
    let answer = response.json();
    assert_eq!(
        (&answer["id"], &answer["model_name"], &answer["model_version"]),
        (&json!("7"), &json!("m"), &json!("1"))
    );
    let output = &answer["outputs"][0];
    assert_eq!(
        (&output["name"], &output["shape"], &output["datatype"]),
        (&json!("text"), &json!([2]), &json!("BYTES"))
    );
    let completion = json!({"model": "m", "prompt": "bé", "max_tokens": 3, "seed": 1});
    let completion = post(&gateway, "/v1/completions", completion).await.json();
    assert_eq!(output["data"][1], completion["choices"][0]["text"]);

    let response = post(&gateway, "/v2/models/e/infer", json!({"inputs": [texts(&["a", "bc"])]})).await;
    let output = response.json()["outputs"][0].clone();
    assert_eq!((&output["name"], &output["shape"]), (&json!("embedding"), &json!([2, 3])));
    let values: Vec<f32> = serde_json::from_value(output["data"].clone()).unwrap();
    assert_eq!(values, [vector_of("a"), vector_of("bc")].concat());

    let input = json!({"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [[1.5, -2]]});
    let response = post(&gateway, "/v2/models/t/versions/1/infer", json!({"inputs": [input]})).await;
    assert_eq!(response.json()["outputs"][0]["data"], json!([3.0, -4.0]));
}

#[tokio::test]
async fn tensors_come_and_go_as_bytes() {
    let (_cluster, _head, gateway) = with_each_task().await;
    let head = json!({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}],
        "parameters": {"binary_data_output": true}});
    let head = head.to_string();
    let values = [1.5f32, -2.0].map(f32::to_le_bytes).concat();
    let body = [head.as_bytes(), &values].concat();
    let client = reqwest::Client::new();
    let url = format!("http://{}/v2/models/t/infer", gateway.address());
    let send =
        |length: usize| client.post(&url).header("inference-header-content-length", length).body(body.clone()).send();
    let response = send(head.len()).await.unwrap();
    assert_eq!(response.status(), 200);
    let length = response.headers()["inference-header-content-length"].to_str().unwrap().parse::<usize>().unwrap();
    let answer = response.bytes().await.unwrap();
    let (json, values) = answer.split_at(length);
    let json: Value = serde_json::from_slice(json).unwrap();
    assert_eq!(json["outputs"][0]["parameters"]["binary_data_size"], 8);
    assert_eq!(values, [3.0f32, -4.0].map(f32::to_le_bytes).concat());
    for length in [0, head.len() - 1, head.len() + 1, body.len() + 1] {
        assert_eq!(send(length).await.unwrap().status(), 400, "{length}");
    }
}

#[tokio::test]
async fn what_is_wrong_with_tensors_is_said() {
    let (_cluster, _head, gateway) = with_each_task().await;
    let tensor = |shape: Value, datatype: &str, data: Value| json!({"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": data}]});
    let cases = [
        ("t", tensor(json!([3]), "FP32", json!([1])), "shape [3] has 3 values, and 1 were sent"),
        ("t", tensor(json!([-1]), "FP32", json!([1])), "inputs[0].shape[0]"),
        ("t", tensor(json!([1]), "FP16", json!([1])), "FP16"),
        ("t", tensor(json!([1]), "INT32", json!([1.5])), "not of data type INT32"),
        ("t", tensor(json!([1]), "INT32", json!([null])), "inputs[0].data"),
        ("t", json!({"inputs": 3}), "inputs"),
        ("t", json!({}), "inputs"),
        ("m", json!({"inputs": []}), "takes one tensor, \"text\""),
        ("m", json!({"inputs": [texts(&["a"])], "parameters": {"temperature": -1}}), "temperature is -1"),
        ("m", json!({"inputs": [texts(&["a"])], "parameters": {"stream": true}}), "stream is no parameter"),
        ("e", json!({"inputs": [texts(&["a"])], "outputs": [{"name": "no"}]}), "no tensor \"no\""),
    ];
    for (model, body, message) in cases {
        let response = post(&gateway, &format!("/v2/models/{model}/infer"), &body).await;
        let error = response.json()["error"].as_str().unwrap_or_default().to_owned();
        assert_eq!(response.status, 400, "{body}: {}", response.text);
        assert!(error.contains(message), "{body}: {error}");
    }
    let response = post(&gateway, "/v2/models/z/infer", json!({"inputs": []})).await;
    assert_eq!((response.status, response.json()), (404, json!({"error": "no model \"z\": there is e, m, t"})));
}

/// One gRPC call, as any client makes it: the status and the message that came.
async fn call(gateway: &Gateway, method: &str, message: &[u8]) -> (String, Vec<u8>) {
    use http_body_util::{BodyExt, Full};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    let stream = TcpStream::connect(gateway.address()).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let body = [&[0][..], &(message.len() as u32).to_be_bytes(), message].concat();
    let request = hyper::Request::post(format!("http://{}/inference.GRPCInferenceService/{method}", gateway.address()))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::<bytes::Bytes>::from(body))
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    let headers = response.headers().clone();
    let collected = response.into_body().collect().await.unwrap();
    let status = collected.trailers().and_then(|trailers| trailers.get("grpc-status"));
    let status = status.or(headers.get("grpc-status")).unwrap().to_str().unwrap().to_owned();
    let bytes = collected.to_bytes();
    (status, bytes.get(5..).unwrap_or_default().to_vec())
}

#[tokio::test]
async fn calls_are_answered_on_the_same_port() {
    let (_cluster, _head, gateway) = with_each_task().await;
    assert_eq!(call(&gateway, "ServerLive", &[]).await, ("0".into(), vec![8, 1]));
    assert_eq!(call(&gateway, "ServerReady", &[]).await, ("0".into(), vec![8, 1]));
    // name = "m"; then "z".
    assert_eq!(call(&gateway, "ModelReady", &[10, 1, b'm']).await, ("0".into(), vec![8, 1]));
    assert_eq!(call(&gateway, "ModelReady", &[10, 1, b'z']).await.0, "5");
    assert_eq!(call(&gateway, "Nothing", &[]).await.0, "12");
    assert_eq!(call(&gateway, "ModelInfer", &[255, 255]).await.0, "3");
    // model_name = "t"; inputs = [name = "x", datatype = "FP32", shape = [1, 2]]; raw_input_contents = [1.5, -2].
    let input = [&[10, 1, b'x', 18, 4][..], b"FP32", &[26, 2, 1, 2]].concat();
    let values = [1.5f32, -2.0].map(f32::to_le_bytes).concat();
    let request = [&[10, 1, b't', 42, input.len() as u8][..], &input, &[58, 8], &values].concat();
    let (status, answer) = call(&gateway, "ModelInfer", &request).await;
    assert_eq!(status, "0");
    let doubled = [3.0f32, -4.0].map(f32::to_le_bytes).concat();
    assert_eq!(answer[answer.len() - 10..], [&[50, 8][..], &doubled].concat());
    let response = post(&gateway, "/inference.GRPCInferenceService/ServerLive", "").await;
    assert_eq!(response.header("grpc-status"), "3", "over HTTP/1.1");
}

#[tokio::test]
async fn a_client_that_never_reads_holds_no_place_at_the_head() {
    let (_cluster, head, gateway) = with_head(Vec::new()).await;
    let mut client = TcpStream::connect(gateway.address()).await.unwrap();
    let mut body = chat(5000, true);
    body["stream_options"] = Value::Null;
    let body = body.to_string();
    let request = format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    client.write_all(request.as_bytes()).await.unwrap();
    // The head gets rid of the whole answer, though its client reads nothing of it.
    head.answered_whole(1).await;
    let mut text = String::new();
    let read = timeout(LONG, async {
        let mut buffer = [0; 65536];
        while !text.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n") {
            let count = client.read(&mut buffer).await.unwrap();
            assert!(count > 0, "the answer is cut off");
            text.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    });
    read.await.unwrap();
    assert!(text.contains("\"finish_reason\":\"length\""));
}

#[tokio::test]
async fn clients_with_tls_are_answered_and_others_are_not() {
    let cluster = Cluster::new();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let tls = Tls { certificate: certificate.clone(), key: key.clone() };
    let gateway = cluster.gateway(|options| options.tls = Some(tls)).await;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = TcpStream::connect(gateway.address()).await.unwrap();
    let mut stream = connector.connect("localhost".try_into().unwrap(), stream).await.unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    timeout(LONG, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok\n"), "{answer}");
    let mut plain = TcpStream::connect(gateway.address()).await.unwrap();
    plain.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(LONG, plain.read_to_end(&mut answer)).await.unwrap();
    assert!(!answer.starts_with(b"HTTP"));
    // Files that are mixed up are an error of the start.
    let mut options = Options::new(([127, 0, 0, 1], 0).into());
    options.tls = Some(Tls { certificate: key, key: certificate });
    assert!(matches!(Gateway::start(options, cluster.client()).await, Err(GatewayError::Tls(_))));
}
