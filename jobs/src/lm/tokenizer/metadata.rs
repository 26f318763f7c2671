//! A tokenizer from a GGUF's metadata: byte-level BPE (`tokenizer.ggml.model` "gpt2"). Checks everything that it reads, because the
//! crate that does the merging takes its input on trust.

use std::collections::HashMap;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::cut::{Cut, NAMES, cut};
use super::pieces::Pieces;
use super::{Frame, Parts, ends};
use crate::lm::{Gguf, ModelError};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

/// Values of `token_type` (gguf.md): 2 is the unknown token, 3 a control token, 4 one that a user defined and that is plain text.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

pub(super) fn open(gguf: &Gguf) -> Result<Parts, ModelError> {
    let model = gguf.string(MODEL)?;
    if model != "gpt2" {
        return Err(unsupported(
            gguf,
            format!("{MODEL} {model:?}"),
            "take a model with a byte-level BPE vocabulary, or its folder with tokenizer.json",
        ));
    }
    let pre = gguf.optional_string(PRE)?.unwrap_or("default");
    let Some(cut) = cut(pre) else {
        return Err(unsupported(
            gguf,
            format!("{PRE} {pre:?}"),
            &format!("known are {NAMES}; or take the model's folder with tokenizer.json"),
        ));
    };
    with(gguf, &cut)
}

fn with(gguf: &Gguf, cut: &Cut) -> Result<Parts, ModelError> {
    let tokens = gguf.strings(TOKENS)?;
    let types = gguf.optional_i32s(TYPES)?.unwrap_or_else(|| vec![1; tokens.len()]);
    if types.len() != tokens.len() {
        return Err(key(gguf, TYPES, format!("has {} values for {} tokens", types.len(), tokens.len())));
    }
    let vocabulary: HashMap<&str, u32> = tokens.iter().zip(0..).map(|(token, id)| (*token, id)).collect();
    let merges = merges(gguf, &vocabulary)?;
    let failed = |cause: tokenizers::Error| key(gguf, MERGES, cause.to_string());
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary.iter().map(|(token, id)| ((*token).to_owned(), *id)).collect::<Vocab>(), merges)
        .ignore_merges(cut.whole)
        .build()
        .map_err(failed)?;
    let mut made = tokenizers::Tokenizer::new(bpe);
    made.with_pre_tokenizer(Some(cuts(cut).map_err(failed)?));
    made.with_decoder(Some(ByteLevel::default()));
    let added = |kind: i32| matches!(kind, UNKNOWN | CONTROL | USER_DEFINED);
    let extra = tokens.iter().zip(&types).filter(|(_, kind)| added(**kind));
    made.add_special_tokens(
        extra.map(|(token, kind)| AddedToken::from(*token, *kind != USER_DEFINED).normalized(false)),
    )
    .map_err(failed)?;
    let control =
        tokens.iter().zip(&types).filter(|(token, kind)| matches!(**kind, UNKNOWN | CONTROL) && !token.is_empty());
    let control = control.map(|(token, _)| (*token).to_owned()).collect();
    let pieces = tokens.iter().zip(&types).map(|(token, kind)| match *kind {
        UNKNOWN | CONTROL => Vec::new(),
        USER_DEFINED => token.as_bytes().to_vec(),
        _ => super::pieces::bytes(token),
    });
    Ok(Parts {
        path: gguf.path().to_owned(),
        ends: ended(gguf, &tokens, &types)?,
        control,
        frame: frame(gguf, tokens.len())?,
        pieces: Pieces::bytes(pieces),
        crate_tokenizer: made,
    })
}

/// The merges as pairs, each checked to join two tokens to a third.
fn merges(gguf: &Gguf, vocabulary: &HashMap<&str, u32>) -> Result<Vec<(String, String)>, ModelError> {
    let mut pairs = Vec::new();
    for (at, merge) in gguf.strings(MERGES)?.into_iter().enumerate() {
        // A token may itself begin with a space only in the first place, where it is not looked for.
        let first = merge.chars().next().map_or(0, char::len_utf8);
        let Some((left, right)) =
            merge[first..].find(' ').map(|space| (&merge[..first + space], &merge[first + space + 1..]))
        else {
            return Err(key(gguf, MERGES, format!("is not two tokens at {at}: {merge:?}")));
        };
        check_merge(at, left, right, |token| vocabulary.contains_key(token))
            .map_err(|problem| key(gguf, MERGES, problem))?;
        pairs.push((left.to_owned(), right.to_owned()));
    }
    Ok(pairs)
}

/// Whether merge number `at` joins two tokens to a third; the problem if not. Without this the crate panics on some merges.
fn check_merge(at: usize, left: &str, right: &str, known: impl Fn(&str) -> bool) -> Result<(), String> {
    match [left, right, &format!("{left}{right}")].into_iter().find(|token| !known(token)) {
        Some(absent) => Err(format!("needs a token that is not there at {at}: {absent:?}")),
        None => Ok(()),
    }
}

fn cuts(cut: &Cut) -> Result<Sequence, tokenizers::Error> {
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for pattern in cut.patterns {
        let pattern = SplitPattern::Regex((*pattern).to_owned());
        steps.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into());
    }
    steps.push(ByteLevel::new(false, true, false).into());
    Ok(Sequence::new(steps))
}

fn ended(gguf: &Gguf, tokens: &[&str], types: &[i32]) -> Result<Vec<u32>, ModelError> {
    let mut named = Vec::new();
    for name in ["eos", "eot", "eom"] {
        named.extend(token_id(gguf, &format!("tokenizer.ggml.{name}_token_id"), tokens.len())?);
    }
    let control = tokens.iter().zip(types).zip(0..).filter(|((_, kind), _)| **kind == CONTROL);
    Ok(ends(named, control.map(|((token, _), id)| (id, *token))))
}

fn frame(gguf: &Gguf, vocabulary: usize) -> Result<Frame, ModelError> {
    let wanted = |flag: &str, id: &str| match gguf.optional_bool(flag)? {
        Some(true) => token_id(gguf, id, vocabulary),
        Some(false) | None => Ok(None),
    };
    Ok(Frame::Ids {
        before: wanted("tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id")?,
        after: wanted("tokenizer.ggml.add_eos_token", "tokenizer.ggml.eos_token_id")?,
    })
}

/// The id that a key names, checked to be one.
pub(in crate::lm) fn token_id(gguf: &Gguf, name: &str, vocabulary: usize) -> Result<Option<u32>, ModelError> {
    match gguf.optional_u32(name)? {
        Some(id) if id as usize >= vocabulary => {
            Err(key(gguf, name, format!("is {id}, there are {vocabulary} tokens")))
        }
        id => Ok(id),
    }
}

fn key(gguf: &Gguf, key: &str, problem: String) -> ModelError {
    ModelError::Key { path: gguf.path().to_owned(), key: key.to_owned(), problem }
}

fn unsupported(gguf: &Gguf, what: String, mend: &str) -> ModelError {
    ModelError::Unsupported { path: gguf.path().to_owned(), what, mend: mend.to_owned() }
}
