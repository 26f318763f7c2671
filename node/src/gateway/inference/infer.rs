//! Tensors of a request to tensors of its answer, for each kind of model. Knows neither REST nor gRPC.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use stoke_protocol::message::serve::{Ask, Datatype, Generate, Tensor};
use stoke_protocol::spec::Task;

use super::{EMBEDDING, TEXT, misplaced, task, tensor};
use crate::gateway::asking::{Asking, Desk};
use crate::gateway::error::{Kind, Problem};
use crate::gateway::openai;
use crate::gateway::received::Event;

/// Tensors of a request, or names of those that it wants.
const TENSORS_MAX: usize = 64;
const PARAMETERS_MAX: usize = 64;

/// What is asked of a model.
#[derive(Debug, PartialEq)]
pub(in crate::gateway) struct InferRequest {
    pub(super) model: String,
    pub(super) id: String,
    pub(super) parameters: Parameters,
    pub(super) inputs: Vec<Tensor>,
    /// Empty: all of them.
    pub(super) outputs: Vec<String>,
}

pub(super) type Parameters = BTreeMap<String, Parameter>;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Parameter {
    Bool(bool),
    Integer(i64),
    Number(f64),
    Text(String),
}

/// A completion, as OpenAI's clients would ask for it: the parameters have the same names, values and checks.
#[derive(Serialize)]
struct Completion<'a> {
    model: &'a str,
    prompt: Vec<String>,
    #[serde(flatten)]
    parameters: &'a Parameters,
}

/// The tensors of the answer, those that were asked for.
pub(super) async fn infer(
    desk: &Arc<Desk>,
    mut request: InferRequest,
    deadline: Option<Instant>,
) -> Result<Vec<Tensor>, Problem> {
    if request.inputs.len().max(request.outputs.len()) > TENSORS_MAX {
        return Err(Problem::field("inputs", format!("a request has at most {TENSORS_MAX} tensors")));
    }
    let found = match task(desk, &request.model)? {
        Task::Generate => vec![generate(desk, &request, deadline).await?],
        Task::Embed => vec![embed(desk, &request, deadline).await?],
        Task::Infer => {
            let inputs = std::mem::take(&mut request.inputs);
            let asking = desk.ask(&request.model, &[Task::Infer], Ask::Infer { inputs: inputs.into() }, deadline);
            tensors(asking).await?
        }
    };
    wanted(found, &request.outputs)
}

fn wanted(mut found: Vec<Tensor>, names: &[String]) -> Result<Vec<Tensor>, Problem> {
    if names.is_empty() {
        return Ok(found);
    }
    let take = |name: &String| match found.iter().position(|tensor| tensor.name == *name) {
        Some(at) => Ok(found.swap_remove(at)),
        None => Err(Problem::field("outputs", format!("the model gives no tensor {name:?}, or it was named twice"))),
    };
    names.iter().map(take).collect()
}

async fn tensors(mut asking: Asking) -> Result<Vec<Tensor>, Problem> {
    let mut found = Vec::new();
    loop {
        match asking.next().await? {
            Event::Tensors(outputs) => found = outputs,
            Event::Ended { .. } => return Ok(found),
            other => return Err(misplaced(&other)),
        }
    }
}

/// The texts that are the one input of models of language.
fn texts(request: &InferRequest) -> Result<Vec<String>, Problem> {
    match &request.inputs[..] {
        [input] if input.name == TEXT => tensor::texts(input),
        _ => Err(Problem::field("inputs", format!("model {:?} takes one tensor, {TEXT:?}", request.model))),
    }
}

async fn generate(desk: &Arc<Desk>, request: &InferRequest, deadline: Option<Instant>) -> Result<Tensor, Problem> {
    if request.parameters.len() > PARAMETERS_MAX {
        return Err(Problem::field("parameters", format!("a request has at most {PARAMETERS_MAX} parameters")));
    }
    if let Some(name) = ["model", "prompt", "n", "stream"].iter().find(|name| request.parameters.contains_key(**name)) {
        return Err(Problem::field(*name, format!("{name} is no parameter here: leave it out")));
    }
    let completion = Completion { model: &request.model, prompt: texts(request)?, parameters: &request.parameters };
    let body = serde_json::to_vec(&completion).expect("its keys are texts");
    let questions = openai::completion_question(&body, rand::random())?.questions;
    let answers = try_join_all(questions.into_iter().map(|question| text(desk, &request.model, question, deadline)));
    let answers = answers.await?;
    let shape = vec![answers.len() as u64];
    let values = tensor::joined(answers.iter().map(String::as_bytes));
    Ok(Tensor { name: TEXT.to_owned(), datatype: Datatype::Bytes, shape: shape.into(), values: values.into() })
}

async fn text(desk: &Arc<Desk>, model: &str, question: Generate, deadline: Option<Instant>) -> Result<String, Problem> {
    let mut asking = desk.ask(model, &[Task::Generate], Ask::Generate(question), deadline);
    let mut answer = String::new();
    loop {
        match asking.next().await? {
            Event::Begun { .. } => {}
            Event::Text(text) => answer.push_str(&text),
            Event::Ended { text, .. } => return Ok(answer + &text),
            other => return Err(misplaced(&other)),
        }
    }
}

async fn embed(desk: &Arc<Desk>, request: &InferRequest, deadline: Option<Instant>) -> Result<Tensor, Problem> {
    let texts = texts(request)?;
    let count = texts.len() as u64;
    let (mut all, mut width) = (Vec::new(), None);
    let mut asking = desk.ask(&request.model, &[Task::Embed], Ask::Embed { texts: texts.into() }, deadline);
    loop {
        match asking.next().await? {
            Event::Vector { values, .. } => {
                if *width.get_or_insert(values.len()) != values.len() {
                    return Err(Problem::new(Kind::Broken, "a head answered with vectors of different lengths"));
                }
                all.extend(values.into_iter().flat_map(f32::to_le_bytes));
            }
            Event::Ended { .. } => break,
            other => return Err(misplaced(&other)),
        }
    }
    let shape = vec![count, width.unwrap_or(0) as u64];
    Ok(Tensor { name: EMBEDDING.to_owned(), datatype: Datatype::F32, shape: shape.into(), values: all.into() })
}
