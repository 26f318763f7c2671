//! What a client is told when it gets no answer. Owns the kinds and their HTTP status; each interface writes them in its own shape.

use std::time::Duration;

use hyper::http::StatusCode;
use stoke_protocol::message::serve::Refusal;
use stoke_protocol::spec::Task;

/// Why there is no answer, or no more of one.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Problem {
    pub(super) kind: Kind,
    /// For people: what is wrong, and what to do instead.
    pub(super) message: String,
    /// The field of the request that is wrong.
    pub(super) param: Option<String>,
    pub(super) retry_after: Option<Duration>,
}

/// What a program branches on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// The request is wrong.
    Invalid,
    /// Prompt and answer do not fit the context.
    TooLong,
    Unauthorized,
    /// There is nothing at this path.
    NoPlace,
    UnknownModel,
    /// The place takes only this method.
    Method(&'static str),
    /// The body did not come in time.
    SlowBody,
    TooLarge,
    MediaType,
    /// As much waits as may wait.
    Busy,
    /// A fault of this side.
    Broken,
    /// No head came up in time.
    NoHead,
    Late,
}

impl Kind {
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::Invalid | Self::TooLong => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::NoPlace | Self::UnknownModel => StatusCode::NOT_FOUND,
            Self::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::SlowBody => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::MediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Busy => StatusCode::TOO_MANY_REQUESTS,
            Self::Broken => StatusCode::INTERNAL_SERVER_ERROR,
            Self::NoHead => StatusCode::SERVICE_UNAVAILABLE,
            Self::Late => StatusCode::GATEWAY_TIMEOUT,
        }
    }
}

impl Problem {
    pub(super) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), param: None, retry_after: None }
    }

    /// A field of the request is wrong.
    pub(super) fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(Kind::Invalid, message) }
    }

    pub(super) fn busy(model: &str, after: Duration) -> Self {
        let message = format!("model {model:?} has as many requests as it takes: try again in {} s", seconds(after));
        Self { retry_after: Some(after), ..Self::new(Kind::Busy, message) }
    }

    pub(super) fn no_head(model: &str, waited: Duration) -> Self {
        let message = format!(
            "model {model:?} is being brought up, or part of it is being replaced: no answer within {} s, try again",
            seconds(waited)
        );
        Self { retry_after: Some(Duration::from_secs(5)), ..Self::new(Kind::NoHead, message) }
    }

    pub(super) fn no_revision(model: &str) -> Self {
        let message = format!(
            "model {model:?} is served no more by the revision that began this answer, and another one would go on with other words: ask again"
        );
        Self { retry_after: Some(Duration::from_secs(1)), ..Self::new(Kind::NoHead, message) }
    }

    pub(super) fn unknown_model(model: &str, known: &[String]) -> Self {
        let known = match known {
            [] => "no model is served now".to_owned(),
            known => format!("there is {}", known.join(", ")),
        };
        let shown: String = model.chars().take(100).collect();
        Self { param: Some("model".into()), ..Self::new(Kind::UnknownModel, format!("no model {shown:?}: {known}")) }
    }

    pub(super) fn other_task(model: &str, task: Task) -> Self {
        let instead = match task {
            Task::Generate => "generates text: use /v1/chat/completions or /v1/completions",
            Task::Embed => "gives vectors for texts: use /v1/embeddings",
            Task::Infer => "takes and gives tensors: use /v2/models/{model}/infer",
        };
        Self::field("model", format!("model {model:?} {}", instead.replace("{model}", model)))
    }

    pub(super) fn late() -> Self {
        Self::new(Kind::Late, "the answer was not complete at the deadline of the request")
    }

    /// What a head has said, unless another one is to be asked.
    pub(super) fn refused(model: &str, refusal: &Refusal) -> Self {
        match refusal {
            Refusal::Invalid { problem } => Self::new(Kind::Invalid, problem.clone()),
            Refusal::TooLong { tokens, context } => Self::new(
                Kind::TooLong,
                format!(
                    "the context of model {model:?} is {context} tokens, and the request needs {tokens} for its prompt and its answer: \
                     shorten the prompt or ask for fewer tokens"
                ),
            ),
            Refusal::Busy { retry_after_ms } => Self::busy(model, Duration::from_millis(u64::from(*retry_after_ms))),
            Refusal::Late => Self::late(),
            Refusal::Failed { problem } => Self::new(Kind::Broken, problem.clone()),
            Refusal::Moved => Self::no_head(model, Duration::ZERO),
        }
    }

    /// For `Retry-After`.
    pub(super) fn retry_after_seconds(&self) -> Option<u64> {
        self.retry_after.map(seconds)
    }
}

/// Whole ones, and at least one.
fn seconds(time: Duration) -> u64 {
    time.as_millis().div_ceil(1000).clamp(1, 3600) as u64
}
