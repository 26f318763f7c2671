//! Text to tokens and back, by the vocabulary that comes with a model: of a GGUF's metadata, or a folder's `tokenizer.json`.
//! Owns the limits on text and which tokens end an answer. Never truncates or pads, and adds no token unless it is asked to.

mod cut;
mod folder;
mod metadata;
mod pieces;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use super::{ModelError, Weights};
pub(super) use folder::{read, read_json};
pub(super) use metadata::token_id;
pub use pieces::Decoding;
use pieces::Pieces;

/// The longest text that is taken at once. The engine of the patterns that cut it keeps at most a million steps to go back to, and cuts
/// no more when they are used up; a run of so many spaces is far from that. The longest contexts have about as many bytes.
pub const TEXT_BYTES_MAX: usize = 512 << 10;

/// Texts of control tokens that end an answer whether or not the file says so: files often name one and the model writes another.
const ENDS: [&str; 8] =
    ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>"];

/// A model's tokenizer. Cheap to clone: clones share the vocabulary.
#[derive(Clone)]
pub struct Tokenizer(Arc<Parts>);

struct Parts {
    path: PathBuf,
    crate_tokenizer: tokenizers::Tokenizer,
    /// Ids that end an answer, in order.
    ends: Vec<u32>,
    /// Texts of the control tokens.
    control: Vec<String>,
    frame: Frame,
    pieces: Pieces,
}

/// What the model wants around a text that is not a chat.
enum Frame {
    /// The post-processor of `tokenizer.json` knows.
    Processor,
    /// A GGUF's beginning and end of a sequence, where it asks for them.
    Ids { before: Option<u32>, after: Option<u32> },
}

impl Tokenizer {
    /// Reads the tokenizer that lies in or beside `weights`.
    pub fn open(weights: &Weights) -> Result<Self, ModelError> {
        let parts = match weights.gguf() {
            Some(gguf) => metadata::open(gguf)?,
            None => folder::open(weights.path())?,
        };
        Ok(Self(Arc::new(parts)))
    }

    /// The tokens of `text` as it stands. Control tokens that are spelt out in it (`<|im_end|>`) become those tokens, as chat templates
    /// need; characters for whose bytes the vocabulary has no token are left out.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        self.ids(text, false)
    }

    /// The tokens of `text` with those around it that the model wants (beginning of a sequence; `[CLS]` and `[SEP]` of an encoder).
    pub fn encode_framed(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let Frame::Ids { before, after } = self.0.frame else { return self.ids(text, true) };
        let mut ids = Vec::from_iter(before);
        ids.extend(self.ids(text, false)?);
        ids.extend(after);
        Ok(ids)
    }

    /// The text of `ids`, without control tokens; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, ModelError> {
        if let Some(&id) = ids.iter().find(|id| **id as usize >= self.vocabulary()) {
            return Err(ModelError::Token { id, vocabulary: self.vocabulary() });
        }
        Ok(self.0.pieces.text(&self.0.crate_tokenizer, ids))
    }

    /// Text of tokens that come one by one.
    pub fn stream(&self) -> Decoding {
        Decoding::new(self.clone())
    }

    /// Ids that end an answer, in ascending order.
    pub fn end_of_sequence(&self) -> &[u32] {
        &self.0.ends
    }

    /// Texts that become control tokens where they are spelt out.
    pub(super) fn control(&self) -> &[String] {
        &self.0.control
    }

    /// How many ids there are: one more than the greatest.
    pub fn vocabulary(&self) -> usize {
        self.0.pieces.len()
    }

    fn ids(&self, text: &str, framed: bool) -> Result<Vec<u32>, ModelError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(ModelError::Text { bytes: text.len(), bytes_max: TEXT_BYTES_MAX });
        }
        let encoding = guarded(|| self.0.crate_tokenizer.encode_fast(text, framed)).map_err(|problem| {
            ModelError::Tokenizer { path: self.0.path.clone(), problem: format!("cannot encode: {problem}") }
        })?;
        Ok(encoding.get_ids().to_vec())
    }
}

/// Calls the crate, which panics on some files that contradict themselves (a post-processor that names tokens it does not give, merges
/// longer than every token): such a file is a user's mistake and no reason to die. The crate's state is not changed by these calls.
fn guarded<T>(call: impl FnOnce() -> Result<T, tokenizers::Error>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(returned) => returned.map_err(|cause| cause.to_string()),
        Err(_) => Err("its parts contradict each other".to_owned()),
    }
}

/// The ids in `named` and of those `control` tokens that are known to end an answer.
fn ends<'a>(named: impl IntoIterator<Item = u32>, control: impl IntoIterator<Item = (u32, &'a str)>) -> Vec<u32> {
    let known = control.into_iter().filter(|(_, text)| ENDS.contains(text)).map(|(id, _)| id);
    let mut ends: Vec<u32> = named.into_iter().chain(known).collect();
    ends.sort_unstable();
    ends.dedup();
    ends
}
