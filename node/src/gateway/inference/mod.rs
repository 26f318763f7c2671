//! The Open Inference Protocol, version 2: tensors in, tensors out, by REST and by gRPC, for every model that is served. Wiring, and what the two
//! share: what a model is called and what it takes.

mod grpc;
mod infer;
mod message;
mod rest;
mod tensor;

use std::sync::Arc;

use hyper::Response;
use hyper::header::RETRY_AFTER;
use serde::Serialize;
use stoke_protocol::ids::JobId;
use stoke_protocol::message::serve::{Ask, Datatype, TensorKind};
use stoke_protocol::spec::Task;

pub(super) use grpc::{Method, call, failure as grpc_failure, read_call, unwrapped};
pub(super) use rest::{infer, json_bytes, live, metadata, model_ready, read_request, ready, server};

use super::asking::Desk;
use super::error::{Kind, Problem};
use super::ready::Readiness;
use super::received::Event;
use super::service::{Body, json};

/// The tensor of texts that goes into models, and out of those that generate.
const TEXT: &str = "text";
/// What comes out of models that embed.
const EMBEDDING: &str = "embedding";
const SERVER: &str = "stoke";
/// The only one there is: another version of a model is another job, under another name.
const VERSION: &str = "1";
const EXTENSIONS: [&str; 1] = ["binary_tensor_data"];

/// `{"error": "..."}`.
#[derive(Serialize)]
struct Failure<'a> {
    error: &'a str,
}

/// The whole answer to a request that has none.
pub(super) fn failure(problem: &Problem) -> Response<Body> {
    let mut response = json(problem.kind.status(), &Failure { error: &problem.message });
    if let Some(seconds) = problem.retry_after_seconds() {
        response.headers_mut().insert(RETRY_AFTER, seconds.into());
    }
    response
}

/// What a model does.
fn task(desk: &Desk, model: &str) -> Result<Task, Problem> {
    let models = desk.table().models();
    let found = models.iter().find(|route| route.model == model).map(|route| route.task);
    found.ok_or_else(|| {
        let known: Vec<String> = models.into_iter().map(|route| route.model).collect();
        Problem::unknown_model(model, &known)
    })
}

/// A version that a client names must be the one there is; an empty one is none.
fn check_version(model: &str, version: &str) -> Result<(), Problem> {
    match version {
        "" | VERSION => Ok(()),
        _ => {
            let message = format!("model {model:?} has no version {version:?}: its only one is {VERSION:?}");
            Err(Problem::new(Kind::UnknownModel, message))
        }
    }
}

/// Whether a model answers; with a job as its version, whether this one does: a replica, a canary or a shadow.
async fn is_ready(desk: &Desk, readiness: &Readiness, model: &str, version: &str) -> Result<bool, Problem> {
    let job: Option<JobId> = version.parse().ok();
    if job.is_none() {
        check_version(model, version)?;
        task(desk, model)?;
    }
    let found = readiness.model(model, job).await;
    found.ok_or_else(|| Problem::new(Kind::UnknownModel, format!("model {model:?} is not served by {version:?}")))
}

/// What a model takes and gives.
async fn kinds(desk: &Arc<Desk>, model: &str) -> Result<(Vec<TensorKind>, Vec<TensorKind>), Problem> {
    let kind = |name: &str, datatype, dimensions| TensorKind {
        name: name.to_owned(),
        datatype,
        shape: vec![None; dimensions].into(),
    };
    let texts = || vec![kind(TEXT, Datatype::Bytes, 1)];
    match task(desk, model)? {
        Task::Generate => Ok((texts(), texts())),
        Task::Embed => Ok((texts(), vec![kind(EMBEDDING, Datatype::F32, 2)])),
        Task::Infer => {
            let mut asking = desk.ask(model, &[Task::Infer], Ask::Describe, None);
            match asking.next().await? {
                Event::Described { inputs, outputs } => Ok((inputs, outputs)),
                other => Err(misplaced(&other)),
            }
        }
    }
}

fn misplaced(event: &Event) -> Problem {
    Problem::new(Kind::Broken, format!("a head answered with {event:?}, which was not asked for"))
}
