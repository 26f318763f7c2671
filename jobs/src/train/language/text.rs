//! Texts as windows of tokens. Owns the vocabulary of a model that is trained from nothing: one token for each byte, and one that stands before every text.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::Data;
use crate::JobError;
use crate::data::{Group, HeldOut, Samples, in_column, read_split};
use crate::lm::{Tokenizer, Weights};

/// What stands before every text, and so ends the one before it.
const END: &str = "<|endoftext|>";
const END_ID: u32 = 256;
/// Of [`Vocabulary::Bytes`].
pub(super) const BYTES: usize = 257;

/// How text becomes tokens.
pub(super) enum Vocabulary {
    Bytes,
    Of { tokenizer: Tokenizer, end: u32 },
}

impl Vocabulary {
    /// Of a folder whose weights know so many tokens.
    pub fn of(weights: &Weights, known: usize) -> Result<Self, JobError> {
        let refused = |problem: String| JobError::Data { path: weights.path().to_owned(), problem };
        let tokenizer = Tokenizer::open(weights).map_err(JobError::Model)?;
        if tokenizer.vocabulary() > known {
            let has = tokenizer.vocabulary();
            return Err(refused(format!("its tokenizer has {has} tokens, its weights know {known}")));
        }
        let Some(end) = tokenizer.end_of_sequence().first().copied() else {
            return Err(refused("its tokenizer names no token that ends a text".to_owned()));
        };
        Ok(Self::Of { tokenizer, end })
    }

    fn end(&self) -> u32 {
        match self {
            Self::Bytes => END_ID,
            Self::Of { end, .. } => *end,
        }
    }

    fn tokens(&self, text: &str) -> Result<Vec<u32>, String> {
        match self {
            Self::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Self::Of { tokenizer, .. } => tokenizer.encode(text).map_err(|error| error.to_string()),
        }
    }
}

/// Tokens of all texts, one behind the other, cut into windows of `length` tokens and the one after them.
pub(super) struct Windows {
    /// Each with the token that ends texts before it, little-endian.
    texts: Samples,
    /// The token that ends texts: it stands behind the last one too.
    end: u32,
    length: usize,
}

impl Windows {
    /// Without the last one.
    fn tokens(&self) -> &[[u8; 4]] {
        self.texts.bytes().as_chunks().0
    }

    pub fn len(&self) -> usize {
        self.tokens().len() / self.length
    }

    /// `length + 1` tokens.
    pub fn get(&self, at: usize) -> Vec<u32> {
        let (tokens, first) = (self.tokens(), at * self.length);
        let last = first + self.length;
        let after = tokens.get(last).map_or(self.end, |token| u32::from_le_bytes(*token));
        tokens[first..last].iter().map(|token| u32::from_le_bytes(*token)).chain([after]).collect()
    }
}

/// What is trained on, and what is held out; none of them is empty.
pub(super) fn read(data: &Data, vocabulary: &Vocabulary, length: usize) -> Result<[Windows; 2], JobError> {
    let end = vocabulary.end();
    let sets = read_split(&data.train, &data.held_out, &[&data.text], &|fields, sample| {
        let text = in_column(&data.text, fields[0].text())?;
        let tokens = in_column(&data.text, vocabulary.tokens(&text))?;
        sample.extend([end].into_iter().chain(tokens).flat_map(u32::to_le_bytes));
        Ok(Group::of(text.as_bytes()))
    })?;
    let windows = sets.map(|texts| Windows { texts, end, length });
    let held_out = match &data.held_out {
        HeldOut::File(path) => path,
        HeldOut::Fraction(_) => &data.train,
    };
    for (windows, (which, path)) in windows.iter().zip([("to train on", &data.train), ("held out", held_out)]) {
        if windows.len() == 0 {
            let (found, path) = (windows.tokens().len() + 1, path.clone());
            let problem = format!("{found} tokens {which}: less than one window of [model] context = {length}");
            return Err(JobError::Data { path, problem });
        }
    }
    Ok(windows)
}

pub(super) const CONFIG: &str = "config.json";

/// Files of a Hugging Face folder beside the weights and [`CONFIG`], where they are there.
const NAMES: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
];

/// Of the files that say what the weights compute, as 64 hexadecimal digits.
pub(crate) fn digest(from: &Path) -> Result<String, JobError> {
    let mut hasher = blake3::Hasher::new_derive_key("stoke-jobs 2026 files of a model");
    for name in [CONFIG].into_iter().chain(NAMES) {
        let path = from.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => {
                hasher.update(name.as_bytes()).update(&(bytes.len() as u64).to_le_bytes()).update(&bytes);
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(JobError::File { path, source }),
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// The files beside the weights that say what a token is: name and text.
pub(super) fn files(from: Option<&Path>) -> Result<Vec<(PathBuf, Vec<u8>)>, JobError> {
    let Some(from) = from else {
        let config = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END });
        return Ok(vec![
            ("tokenizer.json".into(), tokenizer_json().to_string().into()),
            ("tokenizer_config.json".into(), config.to_string().into()),
        ]);
    };
    let mut found = Vec::new();
    for name in NAMES {
        let path = from.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => found.push((name.into(), bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(JobError::File { path, source }),
        }
    }
    Ok(found)
}

/// A `tokenizer.json` whose tokens are bytes: byte-level BPE (as GPT-2's) that merges nothing.
fn tokenizer_json() -> serde_json::Value {
    let vocabulary: serde_json::Map<String, serde_json::Value> = (0..=255u8)
        .map(|byte| (written(byte).to_string(), json!(byte)))
        .chain([(END.to_owned(), json!(END_ID))])
        .collect();
    let end = json!({ "id": END_ID, "content": END, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [end], "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": END, "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "SpecialToken": { "id": END, "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { END: { "id": END, "ids": [END_ID], "tokens": [END] } },
        },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocabulary, "merges": [],
        },
    })
}

/// The character that GPT-2's byte-level BPE writes for a byte: itself where it can be seen, else the next one from U+0100.
fn written(byte: u8) -> char {
    let is_seen = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match is_seen(byte) {
        true => char::from(byte),
        false => {
            let before = (0..byte).filter(|before| !is_seen(*before)).count() as u32;
            char::from_u32(0x100 + before).expect("P1: at most 0x100 + 67")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_its_own_token_and_comes_back() {
        let tokenizer = tokenizers::Tokenizer::from_bytes(tokenizer_json().to_string()).expect("a tokenizer");
        let text = "a\u{e9} \n\t\u{1f600}\0~";
        let encoding = tokenizer.encode(text, false).expect("encoded");
        assert_eq!(encoding.get_ids(), text.bytes().map(u32::from).collect::<Vec<_>>());
        assert_eq!(tokenizer.decode(encoding.get_ids(), true).expect("decoded"), text);
        let framed = tokenizer.encode("a", true).expect("encoded");
        assert_eq!(framed.get_ids(), [END_ID, 97]);
    }

    #[test]
    fn windows_share_the_token_between_them_and_leave_out_a_rest() {
        let texts = [[9u32, 1, 2, 3].as_slice(), &[9, 4]].map(|text| text.iter().flat_map(|token| token.to_le_bytes()));
        let windows = Windows { texts: Samples::of(texts.map(Iterator::collect)), end: 9, length: 3 };
        assert_eq!((windows.len(), windows.get(0), windows.get(1)), (2, vec![9, 1, 2, 3], vec![3, 9, 4, 9]));
    }
}
