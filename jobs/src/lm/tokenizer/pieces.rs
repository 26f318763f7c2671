//! Tokens back to text: the bytes of every token of a byte-level vocabulary, and streams that give whole characters only.
//! Never reads files.

use std::collections::HashMap;
use std::sync::LazyLock;

use super::{Tokenizer, guarded};

/// The letters that stand for bytes in byte-level vocabularies (GPT-2's `bytes_to_unicode`): printable Latin-1 for itself, the rest in
/// order from U+0100.
static BYTES: LazyLock<HashMap<char, u8>> = LazyLock::new(|| {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others = (0..=255u8).filter(|byte| !printable(*byte)).zip('\u{100}'..);
    let same = (0..=255u8).filter(|byte| printable(*byte)).map(|byte| (char::from(byte), byte));
    same.chain(others.map(|(byte, letter)| (letter, byte))).collect()
});

/// The bytes that a token of a byte-level vocabulary stands for; its own, where it has letters that stand for none.
pub(super) fn bytes(token: &str) -> Vec<u8> {
    let mapped: Option<Vec<u8>> = token.chars().map(|letter| BYTES.get(&letter).copied()).collect();
    mapped.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// What each token is as text.
pub(super) enum Pieces {
    /// Byte-level: token i is `bytes[ends[i - 1]..ends[i]]`; nothing for control tokens.
    Bytes { bytes: Vec<u8>, ends: Vec<usize> },
    /// Any other vocabulary, of so many ids: its text depends on its neighbours, and the crate knows.
    Crate(usize),
}

impl Pieces {
    /// Of byte-level tokens, by id.
    pub fn bytes(tokens: impl Iterator<Item = Vec<u8>>) -> Self {
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for token in tokens {
            bytes.extend(token);
            ends.push(bytes.len());
        }
        Self::Bytes { bytes, ends }
    }

    /// How many ids there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Bytes { ends, .. } => ends.len(),
            Self::Crate(ids) => *ids,
        }
    }

    /// The text of known `ids`.
    pub fn text(&self, made: &tokenizers::Tokenizer, ids: &[u32]) -> String {
        match self {
            Self::Bytes { bytes, ends } => {
                let all: Vec<u8> = ids.iter().flat_map(|id| piece(bytes, ends, *id)).copied().collect();
                String::from_utf8_lossy(&all).into_owned()
            }
            Self::Crate(_) => guarded(|| made.decode(ids, true)).unwrap_or_default(),
        }
    }
}

fn piece<'a>(bytes: &'a [u8], ends: &[usize], id: u32) -> &'a [u8] {
    let at = id as usize;
    let Some(end) = ends.get(at) else { return &[] };
    &bytes[at.checked_sub(1).map_or(0, |before| ends[before])..*end]
}

/// Text of tokens that come one by one. What [`Decoding::push`] and [`Decoding::finish`] give, joined, is what
/// [`Tokenizer::decode`] gives for all of them at once.
pub struct Decoding {
    tokenizer: Tokenizer,
    /// Byte-level: the beginning of a character whose other bytes are still to come.
    bytes: Vec<u8>,
    /// Other vocabularies: the tokens since the last break, and how much of their text was given.
    ids: Vec<u32>,
    given: usize,
}

/// Other vocabularies: after so many tokens a stream looks for a place where it can forget what came before.
const WINDOW: usize = 32;

impl Decoding {
    pub(super) fn new(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, bytes: Vec::new(), ids: Vec::new(), given: 0 }
    }

    /// Takes one more token; gives the text that it completes, if any. Never a part of a character. Ids beyond the vocabulary, which
    /// models with padded tables can draw, are no text.
    pub fn push(&mut self, id: u32) -> Option<String> {
        let parts = &self.tokenizer.0;
        match &parts.pieces {
            Pieces::Bytes { bytes, ends } => {
                self.bytes.extend(piece(bytes, ends, id));
                some(whole(&mut self.bytes))
            }
            Pieces::Crate(_) => {
                self.ids.push(id);
                let text = parts.pieces.text(&parts.crate_tokenizer, &self.ids);
                // The text of the last token may still change with the next one: a byte of a character, a word's end.
                if text.ends_with(char::REPLACEMENT_CHARACTER) && self.ids.len() < WINDOW {
                    return None;
                }
                let new = text.get(self.given..).unwrap_or_default().to_owned();
                self.given = text.len();
                if self.ids.len() >= WINDOW {
                    self.ids.drain(..self.ids.len() - 1);
                    self.given = parts.pieces.text(&parts.crate_tokenizer, &self.ids).len();
                }
                some(new)
            }
        }
    }

    /// What is left when no token comes any more: U+FFFD for a character that was never completed.
    pub fn finish(self) -> Option<String> {
        let parts = &self.tokenizer.0;
        match parts.pieces {
            Pieces::Bytes { .. } => some(String::from_utf8_lossy(&self.bytes).into_owned()),
            Pieces::Crate(_) => {
                let text = parts.pieces.text(&parts.crate_tokenizer, &self.ids);
                some(text.get(self.given..).unwrap_or_default().to_owned())
            }
        }
    }
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// Takes from `bytes` all that can be decided: text, and U+FFFD for what can never become text, as `String::from_utf8_lossy` puts it.
/// Leaves at most the first three bytes of a character.
fn whole(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        let (valid, broken) = match std::str::from_utf8(bytes) {
            Ok(_) => (bytes.len(), None),
            Err(error) => (error.valid_up_to(), error.error_len()),
        };
        text.push_str(std::str::from_utf8(&bytes[..valid]).expect("checked above"));
        bytes.drain(..valid + broken.unwrap_or(0));
        if broken.is_none() {
            return text;
        }
        text.push(char::REPLACEMENT_CHARACTER);
    }
}
