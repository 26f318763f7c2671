//! What stands at which path. Pure.

use super::error::{Kind, Problem};
use super::inference::Method;

const GRPC_SERVICE: &str = "inference.GRPCInferenceService";

/// Something that can be asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place<'a> {
    Live,
    /// Prometheus's.
    Metrics,
    Models,
    Model(&'a str),
    Chat,
    Completions,
    Embeddings,
    /// The Open Inference Protocol by REST, from here on.
    Server,
    ServerLive,
    ServerReady,
    Metadata {
        model: &'a str,
        version: &'a str,
    },
    Ready {
        model: &'a str,
        version: &'a str,
    },
    Infer {
        model: &'a str,
        version: &'a str,
    },
    /// And by gRPC.
    Grpc(Method),
}

/// How problems are told at a path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Shape {
    OpenAi,
    Inference,
    Grpc,
}

impl<'a> Place<'a> {
    pub(super) fn find(path: &'a str) -> Result<Self, Problem> {
        // Names of models have no characters that a URL escapes.
        let segments: Vec<&str> = path.trim_matches('/').splitn(8, '/').collect();
        match segments[..] {
            ["health"] => Ok(Self::Live),
            ["metrics"] => Ok(Self::Metrics),
            ["v1", "models"] => Ok(Self::Models),
            ["v1", "models", name] => Ok(Self::Model(name)),
            ["v1", "chat", "completions"] => Ok(Self::Chat),
            ["v1", "completions"] => Ok(Self::Completions),
            ["v1", "embeddings"] => Ok(Self::Embeddings),
            ["v2"] => Ok(Self::Server),
            ["v2", "health", "live"] => Ok(Self::ServerLive),
            ["v2", "health", "ready"] => Ok(Self::ServerReady),
            ["v2", "models", model] => Ok(Self::Metadata { model, version: "" }),
            ["v2", "models", model, "ready"] => Ok(Self::Ready { model, version: "" }),
            ["v2", "models", model, "infer"] => Ok(Self::Infer { model, version: "" }),
            ["v2", "models", model, "versions", version] => Ok(Self::Metadata { model, version }),
            ["v2", "models", model, "versions", version, "ready"] => Ok(Self::Ready { model, version }),
            ["v2", "models", model, "versions", version, "infer"] => Ok(Self::Infer { model, version }),
            [GRPC_SERVICE, method] => match Method::named(method) {
                Some(method) => Ok(Self::Grpc(method)),
                None => Err(Problem::new(Kind::NoPlace, "the service has no such method")),
            },
            _ => {
                let shown: String = path.chars().take(100).collect();
                Err(Problem::new(Kind::NoPlace, format!("there is nothing at {shown:?}: see docs/serving.md")))
            }
        }
    }

    /// The one method that it takes, besides those that every place takes.
    pub(super) fn method(self) -> &'static str {
        match self {
            Self::Live | Self::Metrics | Self::Models | Self::Model(_) => "GET",
            Self::Server | Self::ServerLive | Self::ServerReady | Self::Metadata { .. } | Self::Ready { .. } => "GET",
            Self::Chat | Self::Completions | Self::Embeddings | Self::Infer { .. } | Self::Grpc(_) => "POST",
        }
    }

    /// Whether it is answered without a token: those who watch a service have none.
    pub(super) fn is_open(self) -> bool {
        match self {
            Self::Live | Self::ServerLive | Self::ServerReady => true,
            Self::Grpc(Method::ServerLive | Method::ServerReady) => true,
            Self::Metrics | Self::Models | Self::Model(_) => false,
            Self::Chat | Self::Completions | Self::Embeddings => false,
            Self::Server | Self::Metadata { .. } | Self::Ready { .. } | Self::Infer { .. } | Self::Grpc(_) => false,
        }
    }
}

impl Shape {
    pub(super) fn of(path: &str) -> Self {
        match path.split('/').find(|segment| !segment.is_empty()) {
            Some("v2") => Self::Inference,
            Some(GRPC_SERVICE) => Self::Grpc,
            Some(_) | None => Self::OpenAi,
        }
    }
}
