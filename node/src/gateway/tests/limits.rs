//! What a gateway refuses, whom it lets in, and how it ends.

use super::*;

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
        (chat("temperature", json!("hot")), 400, "temperature: invalid type: string \"hot\", expected a number"),
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
        (chat("messages", json!([{"role": "usr", "content": "x"}])), 400, "messages[0].role: \"usr\" is none"),
        (chat("max_token", json!(5)), 400, "max_token is not known: use max_tokens"),
        (chat("messages", json!([{"role": "user", "content": [{"type": "image_url"}]}])), 400, "type \"text\""),
        (plain, 400, "messages is missing"),
        ("{\"model\": \"m\", \"temperature\": NaN}".into(), 400, "the body is not JSON"),
        ("{\"model\": \"m\", \"temperature\": 1e999}".into(), 400, "number out of range"),
        ("{\"model\": \"m\"".into(), 400, "the body is not JSON"),
        ("{\"model\": \"m\"} {}".into(), 400, "the body is not JSON"),
        ("[1]".into(), 400, "no JSON object"),
        (String::new(), 400, "the body is not JSON"),
        ("[".repeat(100_000), 400, "no JSON object"),
        (format!("{{\"model\": {}", "[".repeat(100_000)), 400, ""),
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
    // Whoever sends all of it first is told, too.
    let mut client = TcpStream::connect(gateway.address()).await.unwrap();
    let request = format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", 12 << 20);
    client.write_all(request.as_bytes()).await.unwrap();
    client.write_all(&vec![b' '; 12 << 20]).await.expect("the connection is there to the end of the body");
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
    let gateway = cluster.gateway(|options| options.who = Who::Tokens(vec![Token::new("anna", "s3cret")])).await;
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
