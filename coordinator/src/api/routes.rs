//! The routes: each is one question to the cluster and the JSON of its answer. Owns their paths, queries and bodies (`openapi.json` tells them to others).

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{Path, Query, Request as HttpRequest, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::stream;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use stoke_protocol::ids::{JobId, LogIndex, NodeId, Rank};
use stoke_protocol::message::client::{Reply, Request};
use stoke_protocol::spec::JobSpec;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::error::ApiError;
use super::{Ask, OPENAPI, json as shape};

/// Of a request's body: a spec is some kilobytes.
const BODY_BYTES_MAX: usize = 1 << 20;
/// From a request's head to the end of its body: a client that is slow on purpose holds its place for no longer.
const BODY_MAX: Duration = Duration::from_secs(30);

type Asking = State<Arc<dyn Ask>>;
type Answer = Result<Json<Value>, ApiError>;

pub fn router(ask: Arc<dyn Ask>) -> Router {
    Router::new()
        .route("/v1/openapi.json", get(openapi))
        .route("/v1/cluster", get(cluster))
        .route("/v1/nodes", get(nodes))
        .route("/v1/nodes/{node}/drain", post(drain))
        .route("/v1/nodes/{node}/undrain", post(undrain))
        .route("/v1/jobs", get(jobs).post(submit))
        .route("/v1/jobs/{job}", get(job))
        .route("/v1/jobs/{job}/explanation", get(explanation))
        .route("/v1/jobs/{job}/history", get(history))
        .route("/v1/jobs/{job}/watch", get(watch))
        .route("/v1/jobs/{job}/logs", get(logs))
        .route("/v1/jobs/{job}/cancel", post(cancel))
        .route("/v1/jobs/{job}/scale", post(scale))
        .route("/v1/checkpoints", get(checkpoints))
        .route("/v1/pulse", get(pulse))
        .fallback(async || ApiError::no_route())
        .method_not_allowed_fallback(async || ApiError::wrong_method())
        .layer(middleware::from_fn(whole_in_time))
        .with_state(ask)
}

/// The body is there, or the request is over.
async fn whole_in_time(request: HttpRequest, next: Next) -> Response {
    let (head, body) = request.into_parts();
    match whole(body).await {
        Ok(bytes) => next.run(HttpRequest::from_parts(head, Body::from(bytes))).await,
        // What remains of it is not read: the connection ends with the answer.
        Err(error) => ([(header::CONNECTION, "close")], error).into_response(),
    }
}

async fn whole(body: Body) -> Result<Bytes, ApiError> {
    let read = timeout(BODY_MAX, to_bytes(body, BODY_BYTES_MAX)).await.map_err(|_| ApiError::too_slow())?;
    let mend = format!("a body has {BODY_BYTES_MAX} bytes at most");
    read.map_err(|error| ApiError::invalid(format!("the body: {error}"), &mend))
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

async fn cluster(State(ask): Asking) -> Answer {
    match one(&ask, Request::Cluster).await? {
        Reply::Cluster(view) => Ok(Json(shape::cluster(&view))),
        other => Err(unexpected(&other)),
    }
}

async fn nodes(State(ask): Asking) -> Answer {
    let nodes = list(&ask, Request::Nodes, |reply| match reply {
        Reply::Nodes(nodes) => Some(nodes.iter().map(shape::node).collect()),
        _ => None,
    });
    Ok(Json(json!({ "nodes": nodes.await? })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ended {
    ended: Option<u32>,
}

async fn jobs(State(ask): Asking, query: Result<Query<Ended>, QueryRejection>) -> Answer {
    let request = asked(query)?.ended.map_or(Request::Jobs, |ended| Request::Recent { ended });
    let jobs = list(&ask, request, |reply| match reply {
        Reply::Jobs(jobs) => Some(jobs.iter().map(shape::job).collect()),
        _ => None,
    });
    Ok(Json(json!({ "jobs": jobs.await? })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Of {
    job: Option<String>,
}

async fn checkpoints(State(ask): Asking, query: Result<Query<Of>, QueryRejection>) -> Answer {
    let job = asked(query)?.job.map(|job| id::<JobId>("job", &job)).transpose()?;
    let checkpoints = list(&ask, Request::Checkpoints { job }, |reply| match reply {
        Reply::Checkpoints(checkpoints) => Some(checkpoints.iter().map(shape::checkpoint).collect()),
        _ => None,
    });
    Ok(Json(json!({ "checkpoints": checkpoints.await? })))
}

async fn job(State(ask): Asking, Path(job): Path<String>) -> Answer {
    match one(&ask, Request::Job { job: id("job", &job)? }).await? {
        Reply::Job(view) => Ok(Json(shape::job(&view))),
        other => Err(unexpected(&other)),
    }
}

async fn explanation(State(ask): Asking, Path(job): Path<String>) -> Answer {
    match one(&ask, Request::Explain { job: id("job", &job)? }).await? {
        Reply::Explained(view) => Ok(Json(shape::explanation(&view))),
        other => Err(unexpected(&other)),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Heard {
    #[serde(default)]
    after_ms: u64,
}

async fn history(State(ask): Asking, Path(job): Path<String>, query: Result<Query<Heard>, QueryRejection>) -> Answer {
    let Heard { after_ms } = asked(query)?;
    match one(&ask, Request::History { job: id("job", &job)?, after_ms }).await? {
        Reply::History(points) => Ok(Json(json!({ "points": points.iter().map(shape::point).collect::<Vec<_>>() }))),
        other => Err(unexpected(&other)),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Behind {
    #[serde(default)]
    after: u64,
}

async fn pulse(State(ask): Asking, query: Result<Query<Behind>, QueryRejection>) -> Answer {
    let after = LogIndex(asked(query)?.after);
    match one(&ask, Request::Pulse { after }).await? {
        Reply::Pulse(view) => Ok(Json(shape::pulse(&view))),
        other => Err(unexpected(&other)),
    }
}

/// A spec in a JSON document.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Submission {
    /// TOML as text, or the same as an object.
    spec: Value,
}

async fn submit(
    State(ask): Asking,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let key = headers.get("idempotency-key").and_then(|key| key.to_str().ok()).ok_or_else(|| {
        let mend = "send a text that names this submission: the same key with the same spec is one job, over any number of tries";
        ApiError::invalid("there is no header Idempotency-Key", mend)
    })?;
    let text = spec_text(&headers, &read(body)?)?;
    let mut spec = JobSpec::parse(&text).map_err(|error| {
        let line = error.line.map(|line| format!("line {line}: ")).unwrap_or_default();
        ApiError::invalid(format!("spec: {line}{}", error.message), "mend the spec: docs/spec.md has every key")
    })?;
    if spec.resources.ranks.is_none() && spec.serve.is_none() {
        // As `stoke submit` does: a rank a node.
        let Reply::Cluster(view) = one(&ask, Request::Cluster).await? else { return Err(ApiError::unknown()) };
        let ranks = view
            .nodes_up
            .clamp(spec.resources.ranks_min.unwrap_or(1), spec.ranks_max().max(spec.resources.ranks_min.unwrap_or(1)));
        spec.resources.ranks = Some(ranks);
    }
    match one(&ask, Request::Submit { key: key.to_owned(), spec: spec.to_toml() }).await? {
        Reply::Submitted { job, created } => {
            let status = if created { StatusCode::CREATED } else { StatusCode::OK };
            Ok((status, Json(json!({ "job": job.to_string(), "created": created }))))
        }
        other => Err(unexpected(&other)),
    }
}

fn spec_text(headers: &HeaderMap, body: &[u8]) -> Result<String, ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if !kind.starts_with("application/json") {
        let text = std::str::from_utf8(body);
        return text
            .map(str::to_owned)
            .map_err(|_| ApiError::invalid("the body is not UTF-8", "send the spec as TOML"));
    }
    let Submission { spec } = document(body)?;
    match spec {
        Value::String(text) => Ok(text),
        object => toml::to_string(&object)
            .map_err(|error| ApiError::invalid(format!("spec: {error}"), "send the spec as TOML in a string")),
    }
}

async fn cancel(State(ask): Asking, Path(job): Path<String>) -> Answer {
    match one(&ask, Request::Cancel { job: id("job", &job)? }).await? {
        Reply::Cancelled { job } => Ok(Json(json!({ "job": job.to_string(), "cancelled": true }))),
        other => Err(unexpected(&other)),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Size {
    ranks: u32,
}

async fn scale(State(ask): Asking, Path(job): Path<String>, body: Result<Bytes, BytesRejection>) -> Answer {
    let Size { ranks } = document(&read(body)?)?;
    match one(&ask, Request::Scale { job: id("job", &job)?, ranks }).await? {
        Reply::Scaled { job, ranks } => Ok(Json(json!({ "job": job.to_string(), "ranks": ranks }))),
        other => Err(unexpected(&other)),
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Drain {
    deadline_ms: Option<u64>,
}

async fn drain(State(ask): Asking, Path(node): Path<String>, body: Result<Bytes, BytesRejection>) -> Answer {
    let body = read(body)?;
    let Drain { deadline_ms } = if body.is_empty() { Drain::default() } else { document(&body)? };
    changed(&ask, Request::Drain { node: id("node", &node)?, deadline_ms }).await
}

async fn undrain(State(ask): Asking, Path(node): Path<String>) -> Answer {
    changed(&ask, Request::Undrain { node: id::<NodeId>("node", &node)? }).await
}

async fn changed(ask: &Arc<dyn Ask>, request: Request) -> Answer {
    match one(ask, request).await? {
        Reply::Node(view) => Ok(Json(shape::node(&view))),
        other => Err(unexpected(&other)),
    }
}

/// Server-sent events: the job at once, and after each change until it has ended.
async fn watch(State(ask): Asking, Path(job): Path<String>) -> Result<Response, ApiError> {
    let event = |reply| match reply {
        Reply::Job(view) => format!("event: job\ndata: {}\n\n", shape::job(&view)),
        Reply::Refused(refusal) => format!("event: error\ndata: {}\n\n", json!(refusal.message)),
        other => format!("event: error\ndata: {}\n\n", json!(format!("{other:?}"))),
    };
    stream_of(&ask, Request::Watch { job: id("job", &job)? }, "text/event-stream", event).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Lines {
    rank: Option<u32>,
    tail: Option<u32>,
    #[serde(default)]
    follow: bool,
}

/// One JSON object a line.
async fn logs(
    State(ask): Asking,
    Path(job): Path<String>,
    query: Result<Query<Lines>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Lines { rank, tail, follow } = asked(query)?;
    let lines = |reply| match reply {
        Reply::Log(chunk) => shape::log_lines(&chunk).map(|line| format!("{line}\n")).collect(),
        Reply::Refused(refusal) => format!("{}\n", json!({ "error": refusal.message })),
        _ => String::new(),
    };
    let request = Request::Logs { job: id("job", &job)?, rank: rank.map(Rank), tail, follow };
    stream_of(&ask, request, "application/x-ndjson", lines).await
}

/// A refusal that comes first is the response; later ones are part of the stream.
async fn stream_of(
    ask: &Arc<dyn Ask>,
    request: Request,
    kind: &'static str,
    text: impl Fn(Reply) -> String + Send + 'static,
) -> Result<Response, ApiError> {
    let mut replies = ask.ask(request).await?;
    let first = match replies.recv().await {
        Some(Reply::Refused(refusal)) => return Err(refusal.into()),
        Some(reply) => reply,
        None => return Err(ApiError::unknown()),
    };
    let pieces = stream::unfold((Some(first), replies, text), |(first, mut replies, text)| async move {
        let reply = match first {
            Some(first) => first,
            None => replies.recv().await?,
        };
        let piece = Ok::<_, Infallible>(Bytes::from(text(reply)));
        Some((piece, (None, replies, text)))
    });
    let headers = [(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-store")];
    Ok((headers, Body::from_stream(pieces)).into_response())
}

/// One answer; a refusal is an error.
async fn one(ask: &Arc<dyn Ask>, request: Request) -> Result<Reply, ApiError> {
    let mut replies = ask.ask(request).await?;
    match replies.recv().await {
        Some(Reply::Refused(refusal)) => Err(refusal.into()),
        Some(reply) => Ok(reply),
        None => Err(ApiError::unknown()),
    }
}

/// A list, which comes in pieces.
async fn list(
    ask: &Arc<dyn Ask>,
    request: Request,
    entries: impl Fn(&Reply) -> Option<Vec<Value>>,
) -> Result<Vec<Value>, ApiError> {
    let mut replies: mpsc::Receiver<Reply> = ask.ask(request).await?;
    let mut all = None;
    while let Some(reply) = replies.recv().await {
        match reply {
            Reply::Refused(refusal) => return Err(refusal.into()),
            reply => all.get_or_insert_with(Vec::new).extend(entries(&reply).ok_or_else(|| unexpected(&reply))?),
        }
    }
    all.ok_or_else(ApiError::unknown)
}

fn id<T: std::str::FromStr>(what: &str, text: &str) -> Result<T, ApiError> {
    text.parse()
        .map_err(|_| ApiError::invalid(format!("{text:?} is no {what}"), &format!("write for example {what}-7")))
}

fn asked<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, ApiError> {
    query
        .map(|Query(query)| query)
        .map_err(|error| ApiError::invalid(error.body_text(), "/v1/openapi.json names the parameters of each path"))
}

fn read(body: Result<Bytes, BytesRejection>) -> Result<Bytes, ApiError> {
    body.map_err(|error| ApiError::invalid(error.body_text(), &format!("a body has {BODY_BYTES_MAX} bytes at most")))
}

fn document<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body)
        .map_err(|error| ApiError::invalid(format!("the body: {error}"), "/v1/openapi.json has the shape of each body"))
}

/// The cluster has answered something else than was asked.
fn unexpected(reply: &Reply) -> ApiError {
    tracing::error!(?reply, "an answer of another kind");
    ApiError::unknown()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_come_or_is_too_large_ends_its_request() {
        let status = async |body| whole(body).await.err().map(|error| error.into_response().status());
        let slow = Body::from_stream(stream::pending::<Result<Bytes, Infallible>>());
        assert_eq!(status(slow).await, Some(StatusCode::REQUEST_TIMEOUT));
        assert_eq!(status(Body::from(vec![0; BODY_BYTES_MAX + 1])).await, Some(StatusCode::BAD_REQUEST));
        assert_eq!(status(Body::from(vec![0; BODY_BYTES_MAX])).await, None);
    }
}
