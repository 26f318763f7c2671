//! From a request to its response: where it goes, whether it may, and in which shape a problem is told. The interfaces do the rest.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_ENCODING, CONTENT_TYPE, EXPECT, HeaderValue, WWW_AUTHENTICATE};
use hyper::http::request::Parts;
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Version};
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Counts;
use super::asking::Desk;
use super::auth;
use super::body::{self, Bodies};
use super::error::{Kind, Problem};
use super::inference;
use super::metrics;
use super::openai::{self, Form};
use super::place::{Place, Shape};
use super::ready::Readiness;
use super::secrets::Secrets;

/// Requests at a time, over all connections: each may hold a question (1 MiB) and an answer.
const REQUESTS_MAX: usize = 2048;
/// A day.
const TIMEOUT_MS_MAX: u64 = 24 * 60 * 60 * 1000;
const TIMEOUT: &str = "x-request-timeout-ms";
const REQUEST_ID: &str = "x-request-id";
const REQUEST_ID_BYTES_MAX: usize = 128;

pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// A request's place among those that are under way, kept until its response is sent. None: it was refused before it had one.
pub(super) type Room = Option<OwnedSemaphorePermit>;

/// What every connection shares.
pub(super) struct Service {
    pub(super) desk: Arc<Desk>,
    pub(super) ready: Readiness,
    pub(super) secrets: Arc<Secrets>,
    bodies: Bodies,
    places: Arc<Semaphore>,
    requests: AtomicU64,
    /// Requests that were told of a problem, before any of the answer.
    refused: AtomicU64,
}

impl Service {
    pub(super) fn new(desk: Arc<Desk>, secrets: Arc<Secrets>) -> Self {
        let (ready, bodies) = (Readiness::new(desk.clone()), Bodies::new());
        let (requests, refused) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { desk, ready, secrets, bodies, places: Arc::new(Semaphore::new(REQUESTS_MAX)), requests, refused }
    }

    pub(super) fn counts(&self) -> Counts {
        let counters = &self.desk.counters;
        Counts {
            requests: self.requests.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            questions: counters.questions.load(Ordering::Relaxed),
            replays: counters.replays.load(Ordering::Relaxed),
            tokens: counters.tokens.load(Ordering::Relaxed),
            broken: counters.broken.load(Ordering::Relaxed),
            copies: counters.copies.load(Ordering::Relaxed),
            copies_failed: counters.copies_failed.load(Ordering::Relaxed),
            running: self.desk.table().running(),
        }
    }

    /// The response to a request, whatever it is.
    pub(super) async fn serve(&self, request: Request<Incoming>) -> (Response<Body>, Room) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let (parts, mut body) = request.into_parts();
        let id = request_id(&parts.headers);
        let shape = Shape::of(parts.uri.path());
        let begun = Instant::now();
        let mut room = None;
        let mut response = match self.answer(&parts, &mut body, &mut room).await {
            Ok(response) => response,
            Err(problem) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                tracing::info!(id = ?id, path = parts.uri.path(), kind = ?problem.kind, problem = problem.message, "refused a request");
                // A client that is still sending when the stream is reset or the connection closed sees it as broken, and no status. One that asks
                // before it sends a body (HTTP/1.1) has sent nothing, and to read would be to ask for it.
                if !parts.headers.contains_key(EXPECT) {
                    body::drain(&mut body).await;
                }
                refused(shape, &problem)
            }
        };
        let status = response.status().as_u16();
        tracing::debug!(id = ?id, path = parts.uri.path(), status, ms = begun.elapsed().as_millis(), "answered a request");
        response.headers_mut().insert(REQUEST_ID, id);
        (response, room)
    }

    async fn answer(&self, parts: &Parts, body: &mut Incoming, room: &mut Room) -> Result<Response<Body>, Problem> {
        let place = Place::find(parts.uri.path())?;
        if parts.method == Method::OPTIONS {
            return Ok(allowed(place.method()));
        }
        let method = if parts.method == Method::HEAD { "GET" } else { parts.method.as_str() };
        if method != place.method() {
            let message = format!("{} does not take {}: use {}", parts.uri.path(), parts.method, place.method());
            return Err(Problem::new(Kind::Method(place.method()), message));
        }
        if !place.is_open() {
            let tokens = self.secrets.tokens();
            let user = auth::user(&tokens, &parts.headers)?;
            tracing::debug!(user, path = parts.uri.path(), "a request");
        }
        *room = self.places.clone().try_acquire_owned().ok();
        if room.is_none() {
            let message = format!("this gateway has {REQUESTS_MAX} requests, as many as it takes: try again in 1 s");
            return Err(Problem { retry_after: Some(Duration::from_secs(1)), ..Problem::new(Kind::Busy, message) });
        }
        self.dispatch(place, parts, body).await
    }

    async fn dispatch(&self, place: Place<'_>, parts: &Parts, body: &mut Incoming) -> Result<Response<Body>, Problem> {
        let headers = &parts.headers;
        match place {
            Place::Live => Ok(text(StatusCode::OK, "ok\n")),
            Place::Metrics => {
                let text = metrics::text(&self.counts(), &self.desk.tallies);
                Ok(typed(StatusCode::OK, "text/plain; version=0.0.4", whole(text)))
            }
            Place::Models => Ok(openai::models(&self.desk)),
            Place::Model(name) => openai::model(&self.desk, name),
            Place::Chat => {
                let body = self.json_body(headers, body).await?;
                let request = openai::chat_question(&body, rand::random())?;
                openai::generate(&self.desk, Form::Chat, request, deadline(headers)?).await
            }
            Place::Completions => {
                let body = self.json_body(headers, body).await?;
                let request = openai::completion_question(&body, rand::random())?;
                openai::generate(&self.desk, Form::Completion, request, deadline(headers)?).await
            }
            Place::Embeddings => {
                let body = self.json_body(headers, body).await?;
                openai::embeddings(&self.desk, openai::embedding_texts(&body)?, deadline(headers)?).await
            }
            Place::Server => Ok(inference::server()),
            Place::ServerLive => Ok(inference::live()),
            Place::ServerReady => Ok(inference::ready(&self.ready).await),
            Place::Metadata { model, version } => inference::metadata(&self.desk, model, version).await,
            Place::Ready { model, version } => inference::model_ready(&self.desk, &self.ready, model, version).await,
            Place::Infer { model, version } => {
                // Triton's clients name no type of their bodies, or one of bytes.
                let body = self.plain_body(headers, body).await?;
                let request = inference::read_request(model, version, &body, inference::json_bytes(headers)?)?;
                inference::infer(&self.desk, request, deadline(headers)?).await
            }
            Place::Grpc(method) => {
                let body = self.grpc_body(parts, body).await?;
                inference::call(&self.desk, &self.ready, method, headers, &body).await
            }
        }
    }

    async fn json_body(&self, headers: &HeaderMap, body: &mut Incoming) -> Result<Bytes, Problem> {
        if let Some(found) = headers.get(CONTENT_TYPE) {
            let found = found.to_str().unwrap_or_default();
            let media = found.split(';').next().unwrap_or_default().trim();
            if !media.eq_ignore_ascii_case("application/json") {
                let message = format!("the body is {media:?}: send \"Content-Type: application/json\"");
                return Err(Problem::new(Kind::MediaType, message));
            }
        }
        self.plain_body(headers, body).await
    }

    async fn grpc_body(&self, parts: &Parts, body: &mut Incoming) -> Result<Bytes, Problem> {
        let media = parts.headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
        if parts.version != Version::HTTP_2 || !media.starts_with(b"application/grpc") {
            return Err(Problem::new(Kind::MediaType, "a call is HTTP/2 with \"Content-Type: application/grpc\""));
        }
        self.plain_body(&parts.headers, body).await
    }

    /// A body that is not compressed.
    async fn plain_body(&self, headers: &HeaderMap, body: &mut Incoming) -> Result<Bytes, Problem> {
        let encoding = headers.get(CONTENT_ENCODING).filter(|encoding| encoding.as_bytes() != b"identity");
        if encoding.is_some() {
            return Err(Problem::new(Kind::MediaType, "compressed bodies are not supported: send it as it is"));
        }
        self.bodies.read(body).await
    }
}

/// When the client wants to have its answer; never, if it says nothing: then it ends the request itself.
fn deadline(headers: &HeaderMap) -> Result<Option<Instant>, Problem> {
    let Some(value) = headers.get(TIMEOUT) else { return Ok(None) };
    let ms = value.to_str().ok().and_then(|value| value.parse().ok()).filter(|ms| (1..=TIMEOUT_MS_MAX).contains(ms));
    let ms = ms
        .ok_or_else(|| Problem::field(TIMEOUT, format!("{TIMEOUT}: send whole milliseconds, 1 to {TIMEOUT_MS_MAX}")))?;
    Ok(Some(Instant::now() + Duration::from_millis(ms)))
}

/// The client's own if it has a plain one, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let is_plain = |id: &&HeaderValue| {
        (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    let new = || format!("{:032x}", rand::random::<u128>()).parse().expect("hex digits make a header value");
    headers.get(REQUEST_ID).filter(is_plain).cloned().unwrap_or_else(new)
}

fn refused(shape: Shape, problem: &Problem) -> Response<Body> {
    let mut response = match shape {
        Shape::OpenAi => openai::failure(problem),
        Shape::Inference => inference::failure(problem),
        Shape::Grpc => inference::grpc_failure(problem),
    };
    let headers = response.headers_mut();
    match problem.kind {
        Kind::Method(method) => drop(headers.insert(ALLOW, allow(method))),
        Kind::Unauthorized => drop(headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))),
        _ => {}
    }
    response
}

fn allowed(method: &'static str) -> Response<Body> {
    let mut response = text(StatusCode::NO_CONTENT, "");
    response.headers_mut().insert(ALLOW, allow(method));
    response
}

fn allow(method: &'static str) -> HeaderValue {
    HeaderValue::from_static(if method == "GET" { "GET, HEAD, OPTIONS" } else { "POST, OPTIONS" })
}

pub(super) fn whole(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed_unsync()
}

pub(super) fn json<T: Serialize>(status: StatusCode, value: &T) -> Response<Body> {
    let bytes = serde_json::to_vec(value).expect("what we send has names for keys and no failing part");
    typed(status, "application/json", whole(bytes))
}

fn text(status: StatusCode, text: &'static str) -> Response<Body> {
    typed(status, "text/plain; charset=utf-8", whole(text))
}

pub(super) fn typed(status: StatusCode, media: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media));
    response
}
