//! The protocol's gRPC: unary calls of `inference.GRPCInferenceService` over HTTP/2, one message each way (gRPC over HTTP2, PROTOCOL-HTTP2.md).
//! No streams, no compression, no reflection.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{HeaderMap, Response};
use prost::Message;
use stoke_protocol::message::serve::{Datatype, Tensor, TensorKind};

use super::infer::{self, InferRequest, Parameter, Parameters};
use super::message::{
    Contents, Flag, Infer, InferParameter, InferTensor, Inferred, Model, ModelMetadata, ParameterChoice,
    ServerMetadata, TensorMetadata,
};
use super::{EXTENSIONS, SERVER, VERSION, check_version, is_ready, kinds, tensor};
use crate::gateway::asking::Desk;
use crate::gateway::error::{Kind, Problem};
use crate::gateway::ready::Readiness;
use crate::gateway::service::{Body, whole};

/// A flag and a length stand before each message.
const PREFIX_BYTES: usize = 5;
const MESSAGE_BYTES_MAX: usize = 400;

/// What can be called.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::gateway) enum Method {
    ServerLive,
    ServerReady,
    ModelReady,
    ServerMetadata,
    ModelMetadata,
    ModelInfer,
}

impl Method {
    pub(in crate::gateway) fn named(name: &str) -> Option<Self> {
        match name {
            "ServerLive" => Some(Self::ServerLive),
            "ServerReady" => Some(Self::ServerReady),
            "ModelReady" => Some(Self::ModelReady),
            "ServerMetadata" => Some(Self::ServerMetadata),
            "ModelMetadata" => Some(Self::ModelMetadata),
            "ModelInfer" => Some(Self::ModelInfer),
            _ => None,
        }
    }
}

/// One call.
pub(in crate::gateway) async fn call(
    desk: &Arc<Desk>,
    readiness: &Readiness,
    method: Method,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<Response<Body>, Problem> {
    let message = unwrapped(body)?;
    let deadline = deadline(headers)?;
    match method {
        Method::ServerLive => Ok(answered(&Flag { yes: true })),
        Method::ServerReady => Ok(answered(&Flag { yes: readiness.all().await })),
        Method::ModelReady => {
            let Model { name, version } = decoded(message)?;
            Ok(answered(&Flag { yes: is_ready(desk, readiness, &name, &version).await? }))
        }
        Method::ServerMetadata => {
            let extensions = EXTENSIONS.map(str::to_owned).into();
            let (name, version) = (SERVER.to_owned(), env!("CARGO_PKG_VERSION").to_owned());
            Ok(answered(&ServerMetadata { name, version, extensions }))
        }
        Method::ModelMetadata => {
            let Model { name, version } = decoded(message)?;
            check_version(&name, &version)?;
            let (inputs, outputs) = kinds(desk, &name).await?;
            let (inputs, outputs) = (inputs.iter().map(described).collect(), outputs.iter().map(described).collect());
            let (versions, platform) = (vec![VERSION.to_owned()], SERVER.to_owned());
            Ok(answered(&ModelMetadata { name, versions, platform, inputs, outputs }))
        }
        Method::ModelInfer => {
            let request = read_call(message)?;
            let (model_name, id) = (request.model.clone(), request.id.clone());
            let outputs = infer::infer(desk, request, deadline).await?;
            let named = |tensor: &Tensor| InferTensor {
                name: tensor.name.clone(),
                datatype: tensor::name_of(tensor.datatype).to_owned(),
                shape: tensor.shape.iter().map(|length| *length as i64).collect(),
                contents: None,
            };
            let (model_version, named) = (VERSION.to_owned(), outputs.iter().map(named).collect());
            let raw_output_contents = outputs.into_iter().map(|tensor| tensor.values.0).collect();
            Ok(answered(&Inferred { model_name, model_version, id, outputs: named, raw_output_contents }))
        }
    }
}

/// What the message of a `ModelInfer` asks of a model. Pure.
pub(in crate::gateway) fn read_call(message: &[u8]) -> Result<InferRequest, Problem> {
    let call: Infer = decoded(message)?;
    check_version(&call.model_name, &call.model_version)?;
    let is_raw = !call.raw_input_contents.is_empty();
    if is_raw && call.raw_input_contents.len() != call.inputs.len() {
        let message = "raw_input_contents has one entry for each input, or none";
        return Err(Problem::field("raw_input_contents", message));
    }
    let mut raw = call.raw_input_contents.into_iter();
    let mut inputs = Vec::with_capacity(call.inputs.len());
    for input in call.inputs {
        let datatype = tensor::datatype(&input.name, &input.datatype)?;
        let values = match raw.next() {
            Some(values) => values,
            None => contents(datatype, input.contents.unwrap_or_default()),
        };
        let shape: Result<Vec<u64>, _> = input.shape.into_iter().map(u64::try_from).collect();
        let shape = shape.map_err(|_| Problem::field("shape", "a shape has no negative lengths"))?;
        inputs.push(tensor::checked(input.name, datatype, shape, values)?);
    }
    let outputs = call.outputs.into_iter().map(|output| output.name).collect();
    Ok(InferRequest { model: call.model_name, id: call.id, parameters: parameters(call.parameters), inputs, outputs })
}

fn parameters(sent: std::collections::BTreeMap<String, InferParameter>) -> Parameters {
    let parameter = |(name, InferParameter { choice }): (String, InferParameter)| {
        let value = match choice? {
            ParameterChoice::Bool(value) => Parameter::Bool(value),
            ParameterChoice::I64(value) => Parameter::Integer(value),
            ParameterChoice::Text(value) => Parameter::Text(value),
            ParameterChoice::F64(value) => Parameter::Number(value),
            ParameterChoice::U64(value) => {
                i64::try_from(value).map_or(Parameter::Number(value as f64), Parameter::Integer)
            }
        };
        Some((name, value))
    };
    sent.into_iter().filter_map(parameter).collect()
}

fn contents(datatype: Datatype, contents: Contents) -> Vec<u8> {
    match datatype {
        Datatype::Bool => contents.bools.into_iter().map(u8::from).collect(),
        // What does not fit is cut off, as in a conversion of C: the protocol has no smaller integer here.
        Datatype::U8 => contents.u32s.into_iter().map(|value| value as u8).collect(),
        Datatype::I32 => contents.i32s.into_iter().flat_map(i32::to_le_bytes).collect(),
        Datatype::I64 => contents.i64s.into_iter().flat_map(i64::to_le_bytes).collect(),
        Datatype::F32 => contents.f32s.into_iter().flat_map(f32::to_le_bytes).collect(),
        Datatype::F64 => contents.f64s.into_iter().flat_map(f64::to_le_bytes).collect(),
        Datatype::Bytes => tensor::joined(contents.bytes.iter().map(Vec::as_slice)),
    }
}

fn described(kind: &TensorKind) -> TensorMetadata {
    let length = |length: &Option<u64>| length.map_or(-1, |length| i64::try_from(length).unwrap_or(i64::MAX));
    let (name, datatype) = (kind.name.clone(), tensor::name_of(kind.datatype).to_owned());
    TensorMetadata { name, datatype, shape: kind.shape.iter().map(length).collect() }
}

/// The one message of a request's body. Pure.
pub(in crate::gateway) fn unwrapped(body: &[u8]) -> Result<&[u8], Problem> {
    let invalid = |message: &str| Problem::new(Kind::Invalid, message);
    let (prefix, message) =
        body.split_first_chunk::<PREFIX_BYTES>().ok_or_else(|| invalid("the body is no gRPC message"))?;
    let [flag, length @ ..] = *prefix;
    if flag != 0 {
        return Err(invalid("compressed messages are not supported: send it as it is"));
    }
    match u32::from_be_bytes(length) as usize == message.len() {
        true => Ok(message),
        false => Err(invalid("a call has one message, and no more bytes")),
    }
}

fn decoded<T: Message + Default>(message: &[u8]) -> Result<T, Problem> {
    T::decode(message).map_err(|error| Problem::new(Kind::Invalid, format!("decode the message: {error}")))
}

/// `grpc-timeout`: up to 8 digits and a unit.
fn deadline(headers: &HeaderMap) -> Result<Option<Instant>, Problem> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let after = value.to_str().ok().and_then(timeout);
    let after = after.ok_or_else(|| Problem::field("grpc-timeout", "grpc-timeout: send up to 8 digits and a unit"))?;
    Ok(Instant::now().checked_add(after))
}

fn timeout(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

fn answered<T: Message>(message: &T) -> Response<Body> {
    let length = u32::try_from(message.encoded_len()).expect("an answer is below 4 GiB");
    let mut bytes = Vec::with_capacity(PREFIX_BYTES + length as usize);
    bytes.push(0);
    bytes.extend_from_slice(&length.to_be_bytes());
    message.encode(&mut bytes).expect("a vector grows as needed");
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let frames = [Frame::data(Bytes::from(bytes)), Frame::trailers(trailers)].map(Ok::<_, Infallible>);
    response(StreamBody::new(stream::iter(frames)).boxed_unsync())
}

fn response(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// A call without an answer: the status is all there is.
pub(in crate::gateway) fn failure(problem: &Problem) -> Response<Body> {
    let status: u8 = match problem.kind {
        Kind::Invalid | Kind::TooLong | Kind::MediaType => 3,
        Kind::Late | Kind::SlowBody => 4,
        Kind::UnknownModel => 5,
        Kind::Busy | Kind::TooLarge => 8,
        Kind::NoPlace | Kind::Method(_) => 12,
        Kind::Broken => 13,
        Kind::NoHead => 14,
        Kind::Unauthorized => 16,
    };
    let mut response = response(whole(Bytes::new()));
    let headers = response.headers_mut();
    headers.insert("grpc-status", HeaderValue::from(u16::from(status)));
    let escaped = escaped(&problem.message);
    headers.insert("grpc-message", HeaderValue::try_from(escaped).expect("what is not plain was escaped"));
    response
}

/// Printable ASCII but for the percent sign; everything else as `%XX`.
fn escaped(message: &str) -> String {
    let mut escaped = String::new();
    for byte in message.bytes().take(MESSAGE_BYTES_MAX) {
        match byte {
            b' '..=b'~' if byte != b'%' => escaped.push(char::from(byte)),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_have_a_unit() {
        assert_eq!(timeout("100m"), Some(Duration::from_millis(100)));
        assert_eq!(timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for wrong in ["", "m", "100", "123456789S", "1x", "-1S", "1é"] {
            assert_eq!(timeout(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_body_is_one_message() {
        assert_eq!(unwrapped(&[0, 0, 0, 0, 2, 7, 8]), Ok(&[7, 8][..]));
        for wrong in [&[][..], &[0, 0, 0], &[1, 0, 0, 0, 0], &[0, 0, 0, 0, 3, 7, 8], &[0, 0, 0, 0, 1, 7, 8]] {
            assert!(unwrapped(wrong).is_err(), "{wrong:?}");
        }
    }
}
