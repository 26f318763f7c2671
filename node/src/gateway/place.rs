//! What stands at which path. Pure.

use super::error::{Kind, Problem};

/// Something that can be asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place<'a> {
    Live,
    Models,
    Model(&'a str),
    Chat,
    Completions,
    Embeddings,
}

/// How problems are told at a path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Shape {
    OpenAi,
}

impl<'a> Place<'a> {
    pub(super) fn find(path: &'a str) -> Result<Self, Problem> {
        // Names of models have no characters that a URL escapes.
        let segments: Vec<&str> = path.trim_matches('/').splitn(8, '/').collect();
        match segments[..] {
            ["health"] => Ok(Self::Live),
            ["v1", "models"] => Ok(Self::Models),
            ["v1", "models", name] => Ok(Self::Model(name)),
            ["v1", "chat", "completions"] => Ok(Self::Chat),
            ["v1", "completions"] => Ok(Self::Completions),
            ["v1", "embeddings"] => Ok(Self::Embeddings),
            _ => {
                let shown: String = path.chars().take(100).collect();
                Err(Problem::new(Kind::NoPlace, format!("there is nothing at {shown:?}: see docs/serving.md")))
            }
        }
    }

    /// The one method that it takes, besides those that every place takes.
    pub(super) fn method(self) -> &'static str {
        match self {
            Self::Live | Self::Models | Self::Model(_) => "GET",
            Self::Chat | Self::Completions | Self::Embeddings => "POST",
        }
    }

    /// Whether it is answered without a token: those who watch a service have none.
    pub(super) fn is_open(self) -> bool {
        match self {
            Self::Live => true,
            Self::Models | Self::Model(_) | Self::Chat | Self::Completions | Self::Embeddings => false,
        }
    }
}

impl Shape {
    pub(super) fn of(_path: &str) -> Self {
        Self::OpenAi
    }
}
