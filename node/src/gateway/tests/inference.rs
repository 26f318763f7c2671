//! The Open Inference Protocol through a gateway.

use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::*;

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

/// A connection of HTTP/2.
async fn http2(gateway: &Gateway) -> hyper::client::conn::http2::SendRequest<Full<bytes::Bytes>> {
    let stream = TcpStream::connect(gateway.address()).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// A stream is not reset in the middle of a body that nobody wants.
#[tokio::test]
async fn a_request_that_is_refused_before_its_body_has_its_status_over_http2() {
    let (_cluster, _head, gateway) = with_each_task().await;
    let mut sender = http2(&gateway).await;
    for _ in 0..20 {
        for (path, media, bytes, status) in [
            ("/v1/nope", "application/json", 300_000, 404),
            ("/v1/chat/completions", "text/plain", 300_000, 415),
            ("/v1/chat/completions", "application/json", 5 << 20, 413),
        ] {
            let request = hyper::Request::post(format!("http://{}{path}", gateway.address()));
            let request = request.header("content-type", media).body(vec![b' '; bytes].into()).unwrap();
            assert_eq!(sender.send_request(request).await.unwrap().status(), status, "{path}");
        }
    }
}

/// One gRPC call, as any client makes it: the status and the message that came.
async fn call(gateway: &Gateway, method: &str, message: &[u8]) -> (String, Vec<u8>) {
    let mut sender = http2(gateway).await;
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
