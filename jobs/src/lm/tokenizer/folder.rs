//! A tokenizer from a folder with `tokenizer.json`, and what the files beside it say of the end of an answer. Leaves the reading
//! to the crate whose format it is, and checks what the crate does not.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;
use tokenizers::DecoderWrapper;

use super::pieces::{self, Pieces};
use super::{Frame, Parts, ends, guarded};
use crate::lm::ModelError;

const FILE: &str = "tokenizer.json";
/// A tokenizer.json of 150,000 tokens has 7 to 20 MB; what is far beyond is not one.
pub(in crate::lm) const FILE_BYTES_MAX: u64 = 128 << 20;

pub(super) fn open(folder: &Path) -> Result<Parts, ModelError> {
    let path = folder.join(FILE);
    let failed = |problem: String| ModelError::Tokenizer { path: path.clone(), problem };
    let Some(text) = read(&path)? else {
        return Err(failed("is not there".to_owned()));
    };
    let mut made: tokenizers::Tokenizer =
        guarded(|| text.parse()).map_err(|problem| failed(format!("cannot be read: {problem}")))?;
    // Files carry the cut and the padding of some training run. How long a text may be is for the caller to say.
    made.with_truncation(None).map_err(|cause| failed(format!("cannot be read: {cause}")))?;
    made.with_padding(None);
    let added = made.get_added_tokens_decoder();
    let control = added.iter().filter(|(_, token)| token.special).map(|(id, token)| (*id, token.content.as_str()));
    let ends = ends(named_ends(folder)?, control);
    let ids: BTreeSet<u32> = made.get_vocab(true).into_values().collect();
    let len = ids.last().map_or(0, |last| *last as usize + 1);
    if len > ids.len() * 2 + 1024 {
        return Err(failed(format!("numbers {} tokens up to {len}", ids.len())));
    }
    if let Some(end) = ends.iter().find(|end| **end as usize >= len) {
        return Err(failed(format!(
            "has no token {end}, which config.json or generation_config.json say ends an answer"
        )));
    }
    let pieces = match made.get_decoder() {
        Some(DecoderWrapper::ByteLevel(_)) => Pieces::bytes((0..len as u32).map(|id| match added.get(&id) {
            Some(token) if token.special => Vec::new(),
            Some(token) => token.content.as_bytes().to_vec(),
            None => made.id_to_token(id).map_or_else(Vec::new, |token| pieces::bytes(&token)),
        })),
        Some(_) | None => Pieces::Crate(len),
    };
    let special = added.values().filter(|token| token.special && !token.content.is_empty());
    let control = special.map(|token| token.content.clone()).collect();
    Ok(Parts { path, crate_tokenizer: made, ends, control, frame: Frame::Processor, pieces })
}

/// Reads a text file of a model's folder; nothing if there is none.
pub(in crate::lm) fn read(path: &Path) -> Result<Option<String>, ModelError> {
    let failed =
        |source| ModelError::File { path: path.to_owned(), source, mend: "check the file's rights and the disk" };
    match std::fs::metadata(path) {
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(failed(cause)),
        Ok(found) if found.len() > FILE_BYTES_MAX => Err(ModelError::Tokenizer {
            path: path.to_owned(),
            problem: format!("has {} bytes, the limit is {FILE_BYTES_MAX}", found.len()),
        }),
        Ok(_) => std::fs::read_to_string(path).map(Some).map_err(failed),
    }
}

/// Reads a JSON file of a model's folder; null if there is none.
pub(in crate::lm) fn read_json(path: &Path) -> Result<Value, ModelError> {
    let Some(text) = read(path)? else { return Ok(Value::Null) };
    serde_json::from_str(&text)
        .map_err(|cause| ModelError::Tokenizer { path: path.to_owned(), problem: format!("is not JSON: {cause}") })
}

/// Ids that the files beside `tokenizer.json` name as the end: one, or a list.
fn named_ends(folder: &Path) -> Result<Vec<u32>, ModelError> {
    let mut ids = Vec::new();
    for name in ["generation_config.json", "config.json"] {
        let named = read_json(&folder.join(name))?["eos_token_id"].take();
        let one = std::slice::from_ref(&named);
        let listed = named.as_array().map_or(one, Vec::as_slice);
        ids.extend(listed.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()));
    }
    Ok(ids)
}
