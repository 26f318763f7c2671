//! `/v1/embeddings`: a vector for each text, whole.

use std::sync::Arc;
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::{Response, StatusCode};
use serde::Serialize;
use stoke_protocol::message::serve::Ask;
use stoke_protocol::spec::Task;

use super::fields::EmbeddingRequest;
use crate::gateway::asking::Desk;
use crate::gateway::error::{Kind, Problem};
use crate::gateway::received::Event;
use crate::gateway::service::{Body, json};

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Embedding>,
    model: &'a str,
    usage: Usage,
}

#[derive(Serialize)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Values,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Values {
    Floats(Vec<f32>),
    /// Little-endian, as OpenAI's clients ask for it unless told otherwise.
    Base64(String),
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: u64,
    total_tokens: u64,
}

pub(in crate::gateway) async fn embeddings(
    desk: &Arc<Desk>,
    request: EmbeddingRequest,
    deadline: Option<Instant>,
) -> Result<Response<Body>, Problem> {
    let EmbeddingRequest { model, texts, base64 } = request;
    let mut data = Vec::with_capacity(texts.len());
    let mut prompt_tokens = 0;
    let mut asking = desk.ask(&model, &[Task::Embed], Ask::Embed { texts: texts.into() }, deadline);
    loop {
        match asking.next().await? {
            Event::Vector { tokens, values } => {
                prompt_tokens += u64::from(tokens);
                let embedding = if base64 { Values::Base64(encoded(&values)) } else { Values::Floats(values) };
                data.push(Embedding { object: "embedding", index: data.len(), embedding });
            }
            Event::Ended { .. } => break,
            other => return Err(Problem::new(Kind::Broken, format!("a head answered texts with {other:?}"))),
        }
    }
    let usage = Usage { prompt_tokens, total_tokens: prompt_tokens };
    Ok(json(StatusCode::OK, &List { object: "list", data, model: &model, usage }))
}

fn encoded(values: &[f32]) -> String {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    STANDARD.encode(bytes)
}
