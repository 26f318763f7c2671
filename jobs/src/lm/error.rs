//! Errors of language models. Each names the file, the key or tensor, and what to do about it.

use std::path::PathBuf;

/// What mends a file whose bytes are wrong or missing.
const FETCH: &str = "fetch it again: jobs/models/fetch.py replaces what differs; or copy it again from where it came";

/// Why a language model could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file that could not be opened, read or mapped at all.
    #[error("open model file {}: {source} (help: {mend})", path.display())]
    File { path: PathBuf, source: std::io::Error, mend: &'static str },
    /// A file whose bytes break the rules of its format.
    #[error("{} is damaged: {problem} (help: {FETCH})", path.display())]
    Damaged { path: PathBuf, problem: String },
    /// A JSON file that cannot be parsed, or lacks a key, or has one of another type.
    #[error("{} cannot be read: {source} (help: {FETCH})", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    /// A sound file that holds what this program cannot compute, or would compute wrongly.
    #[error("{}: {what} is not supported (help: {mend})", path.display())]
    Unsupported { path: PathBuf, what: String, mend: String },
    /// A key of the metadata, or a figure of the model, that is missing, of another type, or beyond its bounds.
    #[error("{}: key {key} {problem} (help: {FETCH})", path.display())]
    Key { path: PathBuf, key: String, problem: String },
    /// A tensor that is missing or not of the shape that the model needs.
    #[error("{}: tensor {tensor} {problem} (help: {FETCH})", path.display())]
    Tensor { path: PathBuf, tensor: String, problem: String },
    /// A tokenizer that could not be read, or that failed.
    #[error("tokenizer {} {problem} (help: take the model's files from where it was published; they come with its tokenizer)", path.display())]
    Tokenizer { path: PathBuf, problem: String },
    /// A chat template that is not there or cannot be parsed.
    #[error("chat template in {} {problem} (help: send a prompt instead of messages, or take the files of an instruction-tuned model)", path.display())]
    Template { path: PathBuf, problem: String },
    /// Messages that a chat template refuses, or cannot render within its limits.
    #[error(
        "the model's chat template refuses these messages: {problem} (help: check their roles, their order and their length)"
    )]
    Chat { problem: String },
    /// A text that is longer than any context.
    #[error("the text has {bytes} bytes, the limit is {bytes_max} (help: send a shorter text)")]
    Text { bytes: usize, bytes_max: usize },
    /// An id that no token has.
    #[error("token {id} is not in the vocabulary of {vocabulary} tokens (help: send ids from 0 to {})", vocabulary.saturating_sub(1))]
    Token { id: u32, vocabulary: usize },
}
