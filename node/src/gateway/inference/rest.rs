//! The protocol's REST: paths below `/v2`, JSON bodies, and the extension that puts tensors behind the JSON as bytes (Triton's clients do unless
//! told otherwise).

use std::sync::Arc;
use std::time::Instant;

use hyper::header::HeaderValue;
use hyper::{HeaderMap, Response, StatusCode};
use serde::{Deserialize, Serialize};
use stoke_protocol::message::serve::{Tensor, TensorKind};

use super::infer::{self, InferRequest, Parameter, Parameters};
use super::tensor::{self, Flat, Written};
use super::{EXTENSIONS, SERVER, VERSION, check_version, is_ready, kinds};
use crate::gateway::asking::Desk;
use crate::gateway::error::{Kind, Problem};
use crate::gateway::openai;
use crate::gateway::ready::Readiness;
use crate::gateway::service::{Body, json, typed, whole};

/// How many bytes of a body are JSON; tensors follow.
const JSON_BYTES: &str = "inference-header-content-length";
const ID_BYTES_MAX: usize = 256;

#[derive(Deserialize)]
struct RequestBody {
    #[serde(default)]
    id: String,
    #[serde(default)]
    parameters: Parameters,
    inputs: Vec<Input>,
    #[serde(default)]
    outputs: Vec<Output>,
}

#[derive(Deserialize)]
struct Input {
    name: String,
    shape: Vec<u64>,
    datatype: String,
    data: Option<Flat>,
    #[serde(default)]
    parameters: InputParameters,
}

#[derive(Default, Deserialize)]
struct InputParameters {
    binary_data_size: Option<usize>,
}

#[derive(Deserialize)]
struct Output {
    name: String,
    #[serde(default)]
    parameters: OutputParameters,
}

#[derive(Default, Deserialize)]
struct OutputParameters {
    binary_data: Option<bool>,
    classification: Option<u64>,
}

/// Which tensors of the answer are written as bytes.
#[derive(Debug, PartialEq)]
pub(in crate::gateway) struct Binary {
    all: bool,
    named: Vec<(String, bool)>,
}

#[derive(Serialize)]
struct ResponseBody<'a> {
    model_name: &'a str,
    model_version: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    id: &'a str,
    outputs: Vec<OutputBody<'a>>,
}

#[derive(Serialize)]
struct OutputBody<'a> {
    name: &'a str,
    shape: &'a [u64],
    datatype: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Written>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<BinarySize>,
}

#[derive(Serialize)]
struct BinarySize {
    binary_data_size: usize,
}

#[derive(Serialize)]
struct Server {
    name: &'static str,
    version: &'static str,
    extensions: [&'static str; 1],
}

#[derive(Serialize)]
struct Metadata<'a> {
    name: &'a str,
    versions: [&'static str; 1],
    platform: &'static str,
    inputs: Vec<KindBody<'a>>,
    outputs: Vec<KindBody<'a>>,
}

#[derive(Serialize)]
struct KindBody<'a> {
    name: &'a str,
    datatype: &'static str,
    shape: Vec<i64>,
}

#[derive(Serialize)]
struct Live {
    live: bool,
}

#[derive(Serialize)]
struct Ready<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    ready: bool,
}

pub(in crate::gateway) fn server() -> Response<Body> {
    let version = env!("CARGO_PKG_VERSION");
    json(StatusCode::OK, &Server { name: SERVER, version, extensions: EXTENSIONS })
}

pub(in crate::gateway) fn live() -> Response<Body> {
    json(StatusCode::OK, &Live { live: true })
}

pub(in crate::gateway) async fn ready(readiness: &Readiness) -> Response<Body> {
    told(None, readiness.all().await)
}

pub(in crate::gateway) async fn model_ready(
    desk: &Desk,
    readiness: &Readiness,
    model: &str,
    version: &str,
) -> Result<Response<Body>, Problem> {
    Ok(told(Some(model), is_ready(desk, readiness, model, version).await?))
}

fn told(name: Option<&str>, ready: bool) -> Response<Body> {
    json(if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, &Ready { name, ready })
}

pub(in crate::gateway) async fn metadata(
    desk: &Arc<Desk>,
    model: &str,
    version: &str,
) -> Result<Response<Body>, Problem> {
    check_version(model, version)?;
    let (inputs, outputs) = kinds(desk, model).await?;
    let (inputs, outputs) = (inputs.iter().map(KindBody::of).collect(), outputs.iter().map(KindBody::of).collect());
    Ok(json(StatusCode::OK, &Metadata { name: model, versions: [VERSION], platform: SERVER, inputs, outputs }))
}

impl<'a> KindBody<'a> {
    fn of(kind: &'a TensorKind) -> Self {
        // -1: any length.
        let length = |length: &Option<u64>| length.map_or(-1, |length| i64::try_from(length).unwrap_or(i64::MAX));
        let shape = kind.shape.iter().map(length).collect();
        Self { name: &kind.name, datatype: tensor::name_of(kind.datatype), shape }
    }
}

/// How long the JSON of a body is, where tensors follow it.
pub(in crate::gateway) fn json_bytes(headers: &HeaderMap) -> Result<Option<usize>, Problem> {
    let Some(value) = headers.get(JSON_BYTES) else { return Ok(None) };
    let bytes = value.to_str().ok().and_then(|value| value.parse().ok());
    bytes.map(Some).ok_or_else(|| Problem::field(JSON_BYTES, format!("{JSON_BYTES}: send a number of bytes")))
}

/// What a body asks of a model. `json_bytes`: where its JSON ends, if that is not its own end. Pure.
pub(in crate::gateway) fn read_request(
    model: &str,
    version: &str,
    body: &[u8],
    json_bytes: Option<usize>,
) -> Result<(InferRequest, Binary), Problem> {
    check_version(model, version)?;
    let (text, mut binary) = body
        .split_at_checked(json_bytes.unwrap_or(body.len()))
        .ok_or_else(|| Problem::field(JSON_BYTES, format!("{JSON_BYTES} is beyond the body's {} bytes", body.len())))?;
    let mut request: RequestBody = openai::parse(text)?;
    if request.id.len() > ID_BYTES_MAX {
        return Err(Problem::field("id", format!("id: send up to {ID_BYTES_MAX} bytes")));
    }
    let mut inputs = Vec::with_capacity(request.inputs.len());
    for input in request.inputs {
        let datatype = tensor::datatype(&input.name, &input.datatype)?;
        let values = match (input.data, input.parameters.binary_data_size) {
            (Some(data), None) => data.into_values(&input.name, datatype)?,
            (None, Some(bytes)) => {
                let missing = || Problem::field("binary_data_size", format!("tensor {:?} has fewer bytes", input.name));
                let (values, rest) = binary.split_at_checked(bytes).ok_or_else(missing)?;
                binary = rest;
                values.to_vec()
            }
            _ => {
                return Err(Problem::field(
                    "data",
                    format!("tensor {:?} has either data or binary_data_size", input.name),
                ));
            }
        };
        inputs.push(tensor::checked(input.name, datatype, input.shape, values)?);
    }
    if !binary.is_empty() {
        return Err(Problem::new(Kind::Invalid, format!("{} bytes are left over behind the tensors", binary.len())));
    }
    if request.outputs.iter().any(|output| output.parameters.classification.is_some_and(|count| count > 0)) {
        return Err(Problem::field("classification", "classification is not supported: leave it out"));
    }
    let all = matches!(request.parameters.remove("binary_data_output"), Some(Parameter::Bool(true)));
    let named = request.outputs.iter().filter_map(|output| Some((output.name.clone(), output.parameters.binary_data?)));
    let binary = Binary { all, named: named.collect() };
    let outputs = request.outputs.into_iter().map(|output| output.name).collect();
    let (id, parameters) = (request.id, request.parameters);
    Ok((InferRequest { model: model.to_owned(), id, parameters, inputs, outputs }, binary))
}

pub(in crate::gateway) async fn infer(
    desk: &Arc<Desk>,
    (request, binary): (InferRequest, Binary),
    deadline: Option<Instant>,
) -> Result<Response<Body>, Problem> {
    let (model, id) = (request.model.clone(), request.id.clone());
    let tensors = infer::infer(desk, request, deadline).await?;
    let is_binary = |tensor: &Tensor| {
        let named = binary.named.iter().find(|(name, _)| *name == tensor.name);
        named.map_or(binary.all, |(_, is_binary)| *is_binary)
    };
    let outputs = tensors.iter().map(|tensor| {
        let size = is_binary(tensor).then(|| BinarySize { binary_data_size: tensor.values.len() });
        let data = size.is_none().then(|| tensor::written(tensor));
        let datatype = tensor::name_of(tensor.datatype);
        OutputBody { name: &tensor.name, shape: &tensor.shape, datatype, data, parameters: size }
    });
    let body = ResponseBody { model_name: &model, model_version: VERSION, id: &id, outputs: outputs.collect() };
    let mut bytes = serde_json::to_vec(&body).expect("what we send has names for keys and no failing part");
    if !tensors.iter().any(is_binary) {
        return Ok(typed(StatusCode::OK, "application/json", whole(bytes)));
    }
    let json_bytes = bytes.len();
    tensors.iter().filter(|tensor| is_binary(tensor)).for_each(|tensor| bytes.extend_from_slice(&tensor.values));
    let mut response = typed(StatusCode::OK, "application/octet-stream", whole(bytes));
    response.headers_mut().insert(JSON_BYTES, HeaderValue::from(json_bytes));
    Ok(response)
}
