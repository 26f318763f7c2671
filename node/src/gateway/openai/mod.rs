//! OpenAI's API: what its clients send and expect, for models that generate text and models that give vectors. Wiring, and what the endpoints
//! share.

mod embeddings;
mod fields;
mod generate;
mod models;
mod stream;
mod value;

use hyper::http::header::{CONTENT_TYPE, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde::Serialize;

pub(super) use embeddings::embeddings;
pub(super) use fields::{chat_question, completion_question, embedding_texts, parse};
pub(super) use generate::{Form, generate};
pub(super) use models::{model, models};

use super::error::{Kind, Problem};
use super::service::{Body, json};

/// `{"error": {...}}`, as OpenAI's clients read it.
#[derive(Serialize)]
pub(super) struct Failure<'a> {
    error: FailureParts<'a>,
}

#[derive(Serialize)]
struct FailureParts<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl<'a> Failure<'a> {
    pub(super) fn new(problem: &'a Problem) -> Self {
        let (r#type, code) = match problem.kind {
            Kind::Invalid | Kind::MediaType | Kind::NoPlace | Kind::Method(_) => ("invalid_request_error", None),
            Kind::TooLong => ("invalid_request_error", Some("context_length_exceeded")),
            Kind::Unauthorized => ("invalid_request_error", Some("invalid_api_key")),
            Kind::UnknownModel => ("invalid_request_error", Some("model_not_found")),
            Kind::TooLarge => ("invalid_request_error", Some("request_too_large")),
            Kind::SlowBody | Kind::Late => ("timeout_error", Some("timeout")),
            Kind::Busy => ("rate_limit_error", Some("rate_limit_exceeded")),
            Kind::Broken => ("server_error", None),
            Kind::NoHead => ("server_error", Some("model_not_ready")),
        };
        Self { error: FailureParts { message: &problem.message, r#type, param: problem.param.as_deref(), code } }
    }
}

/// The whole answer to a request that has none.
pub(super) fn failure(problem: &Problem) -> Response<Body> {
    let mut response = json(problem.kind.status(), &Failure::new(problem));
    if let Some(seconds) = problem.retry_after_seconds() {
        response.headers_mut().insert(RETRY_AFTER, seconds.into());
    }
    response
}

fn event_stream(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::OK;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, "text/event-stream; charset=utf-8".parse().expect("a header value"));
    headers.insert("cache-control", "no-cache".parse().expect("a header value"));
    // nginx keeps a stream back until it is whole unless it is told not to.
    headers.insert("x-accel-buffering", "no".parse().expect("a header value"));
    response
}
