//! What an API says when it does not do what was asked: a status, a code for programs, and what to do for people.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use stoke_protocol::message::client::{Refusal, RefusalCode};

/// One refusal as a response.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
    mend: String,
}

impl ApiError {
    pub fn invalid(message: impl Into<String>, mend: &str) -> Self {
        let (status, code) = (StatusCode::BAD_REQUEST, "invalid");
        Self { status, code, message: message.into(), mend: mend.to_owned() }
    }

    /// Nobody has shown who it is.
    pub fn unauthenticated() -> Self {
        Self {
            status: StatusCode::UNAUTHORIZED,
            code: "unauthenticated",
            message: "this connection has shown no certificate of this cluster".into(),
            mend:
                "use the certificate and key in the folder of `stoke login`; a browser goes through `stoke dashboard`"
                    .into(),
        }
    }

    /// The question was sent, and no answer came: whether it was done is unknown (I9).
    pub fn unknown() -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            code: "unavailable",
            message: "the coordinator went down before it answered: it is unknown whether it was done".into(),
            mend: "ask again; a submission with the same Idempotency-Key".into(),
        }
    }

    pub fn too_slow() -> Self {
        let (message, mend) = ("the body of the request did not come in time", "send it at once");
        let (status, code) = (StatusCode::REQUEST_TIMEOUT, "invalid");
        Self { status, code, message: message.into(), mend: mend.into() }
    }

    pub fn no_route() -> Self {
        let (message, mend) = ("there is nothing at this path", "/v1/openapi.json names what there is");
        let (status, code) = (StatusCode::NOT_FOUND, "not-found");
        Self { status, code, message: message.into(), mend: mend.into() }
    }

    pub fn wrong_method() -> Self {
        let (message, mend) = ("this path has no such method", "/v1/openapi.json names what there is");
        let (status, code) = (StatusCode::METHOD_NOT_ALLOWED, "invalid");
        Self { status, code, message: message.into(), mend: mend.into() }
    }
}

impl From<Refusal> for ApiError {
    fn from(Refusal { code, message, mend }: Refusal) -> Self {
        let (status, code) = match code {
            RefusalCode::Invalid => (StatusCode::BAD_REQUEST, "invalid"),
            RefusalCode::NotFound => (StatusCode::NOT_FOUND, "not-found"),
            RefusalCode::Forbidden => (StatusCode::FORBIDDEN, "forbidden"),
            RefusalCode::Conflict => (StatusCode::CONFLICT, "conflict"),
            RefusalCode::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
        };
        Self { status, code, message, mend }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let error = json!({ "code": self.code, "message": self.message, "mend": self.mend });
        (self.status, Json(json!({ "error": error }))).into_response()
    }
}
