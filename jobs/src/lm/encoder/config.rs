//! What an encoder's folder says of its shape, of how token vectors become one, and of the longest text. Owns which encoders can be computed: what
//! would give other numbers is refused by name.
//!
//! Files and defaults are those of transformers' `BertConfig` and of sentence-transformers (`modules.json`, `sentence_bert_config.json`,
//! `1_Pooling/config.json`).

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::lm::error::ModelError;
use crate::lm::tokenizer::read;

/// Bounds far above any model of this class, so that no product of two of them overflows and no buffer is sized by damage.
const LAYERS_MAX: usize = 1 << 10;
const WIDTH_MAX: usize = 1 << 16;
const VOCABULARY_MAX: usize = 1 << 24;
const POSITIONS_MAX: usize = 1 << 20;
/// `[CLS]` and `[SEP]`, and one token between them.
const TOKENS_MIN: usize = 3;

/// The shape of an encoder of the BERT class: LayerNorm behind each sum, learnt positions, GELU.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderConfig {
    pub layers: usize,
    /// Values of a token, and of an embedding.
    pub hidden: usize,
    pub heads: usize,
    /// Values between the two halves of the feed-forward network.
    pub ffn: usize,
    /// Rows of the token embedding.
    pub vocab: usize,
    /// Rows of the position embedding.
    pub positions: usize,
    /// Rows of the embedding of token types; the first one is used.
    pub types: usize,
    pub epsilon: f32,
    pub pooling: Pooling,
    /// Embeddings are scaled to length 1.
    pub normalised: bool,
    /// Longest text in tokens, with those around it.
    pub tokens_max: usize,
    /// Texts become lower case before they are cut into tokens, beside what the tokenizer does.
    pub lower_case: bool,
}

/// How the vectors of a text's tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Of all tokens, with those around the text.
    Mean,
    /// The first token's.
    First,
}

impl EncoderConfig {
    /// From `config.json`, whose text is given, and the files beside it.
    pub(in crate::lm) fn open(path: &Path, text: &str) -> Result<Self, ModelError> {
        let folder = path.parent().unwrap_or(Path::new("."));
        let damaged = |source| ModelError::Json { path: path.to_owned(), source };
        let Kinds { architectures } = serde_json::from_str(text).map_err(damaged)?;
        match architectures.first().map(String::as_str) {
            Some("BertModel") => {}
            other => return Err(unsupported(path, format!("architecture {:?}", other.unwrap_or("none")))),
        }
        let json: Json = serde_json::from_str(text).map_err(damaged)?;
        json.refuse(path)?;
        let modules = Modules::open(folder)?;
        let sentence: Sentence = json_file(&folder.join("sentence_bert_config.json"))?.unwrap_or_default();
        let tokenizer: TokenizerJson = json_file(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        // As sentence-transformers: what its own file says, or else what tokenizer and positions allow.
        let known = tokenizer.model_max_length.map_or(usize::MAX, |length| length.max(0.0) as usize);
        let tokens_max = sentence.max_seq_length.unwrap_or(known.min(json.max_position_embeddings));
        let config = Self {
            layers: json.num_hidden_layers,
            hidden: json.hidden_size,
            heads: json.num_attention_heads,
            ffn: json.intermediate_size,
            vocab: json.vocab_size,
            positions: json.max_position_embeddings,
            types: json.type_vocab_size,
            epsilon: json.layer_norm_eps,
            pooling: modules.pooling,
            normalised: modules.normalised,
            tokens_max,
            lower_case: sentence.do_lower_case,
        };
        config.check(path)
    }

    /// The numbers must make a model.
    fn check(self, path: &Path) -> Result<Self, ModelError> {
        for (key, value, from, max) in [
            ("num_hidden_layers", self.layers, 1, LAYERS_MAX),
            ("hidden_size", self.hidden, 1, WIDTH_MAX),
            ("num_attention_heads", self.heads, 1, WIDTH_MAX),
            ("intermediate_size", self.ffn, 1, WIDTH_MAX),
            ("vocab_size", self.vocab, 1, VOCABULARY_MAX),
            ("max_position_embeddings", self.positions, TOKENS_MIN, POSITIONS_MAX),
            ("type_vocab_size", self.types, 1, VOCABULARY_MAX),
            ("max_seq_length (sentence_bert_config.json)", self.tokens_max, TOKENS_MIN, self.positions),
        ] {
            if !(from..=max).contains(&value) {
                return Err(key_error(path, key, format!("is {value}, not from {from} to {max}")));
            }
        }
        if !self.hidden.is_multiple_of(self.heads) {
            let problem = format!("is {}, which does not divide hidden_size {}", self.heads, self.hidden);
            return Err(key_error(path, "num_attention_heads", problem));
        }
        if !(self.epsilon.is_finite() && self.epsilon > 0.0) {
            return Err(key_error(path, "layer_norm_eps", format!("is {}, not a number above 0", self.epsilon)));
        }
        Ok(self)
    }
}

/// Only the kind of model, so that another kind is named before its other keys are missed.
#[derive(Deserialize)]
struct Kinds {
    #[serde(default)]
    architectures: Vec<String>,
}

/// The keys of `config.json` that change numbers.
#[derive(Deserialize)]
struct Json {
    num_hidden_layers: usize,
    hidden_size: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    type_vocab_size: usize,
    layer_norm_eps: f32,
    hidden_act: String,
    position_embedding_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
}

impl Json {
    fn refuse(&self, path: &Path) -> Result<(), ModelError> {
        let positions = self.position_embedding_type.as_deref().unwrap_or("absolute");
        for (refused, what) in [
            (self.hidden_act != "gelu", format!("hidden_act {:?}", self.hidden_act)),
            (positions != "absolute", format!("position_embedding_type {positions:?}")),
            (self.is_decoder, "is_decoder (attention to earlier tokens only)".to_owned()),
        ] {
            if refused {
                return Err(unsupported(path, what));
            }
        }
        Ok(())
    }
}

#[derive(Deserialize, Default)]
struct Sentence {
    max_seq_length: Option<usize>,
    #[serde(default)]
    do_lower_case: bool,
}

#[derive(Deserialize, Default)]
struct TokenizerJson {
    /// Some files say 1e30, which is no whole number.
    model_max_length: Option<f64>,
}

/// What follows the encoder.
struct Modules {
    pooling: Pooling,
    normalised: bool,
}

#[derive(Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

impl Modules {
    /// Folders without `modules.json` pool as `1_Pooling/config.json` says, or by the mean, and their embeddings are scaled to length 1: people
    /// compare them by their product.
    fn open(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("modules.json");
        let Some(listed) = json_file::<Vec<Module>>(&path)? else {
            return Ok(Self { pooling: pooling(&folder.join("1_Pooling/config.json"))?, normalised: true });
        };
        let mut made = Self { pooling: Pooling::Mean, normalised: false };
        for module in listed {
            match module.kind.rsplit('.').next().unwrap_or_default() {
                "Transformer" if module.path.is_empty() => {}
                "Pooling" => made.pooling = pooling(&inside(&path, &module.path)?)?,
                "Normalize" => made.normalised = true,
                _ => return Err(unsupported(&path, format!("module {:?} in {:?}", module.kind, module.path))),
            }
        }
        Ok(made)
    }
}

/// The configuration of a module, whose folder `modules.json` names: one beside it.
fn inside(modules: &Path, name: &str) -> Result<PathBuf, ModelError> {
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\']) {
        let problem = format!("it names {name:?}, which is no folder beside it");
        return Err(ModelError::Damaged { path: modules.to_owned(), problem });
    }
    Ok(modules.with_file_name(name).join("config.json"))
}

/// The keys of a pooling's `config.json`: one of them is true.
#[derive(Deserialize)]
struct PoolingJson {
    #[serde(default)]
    pooling_mode_mean_tokens: bool,
    #[serde(default)]
    pooling_mode_cls_token: bool,
    #[serde(default)]
    pooling_mode_max_tokens: bool,
    #[serde(default)]
    pooling_mode_mean_sqrt_len_tokens: bool,
    #[serde(default)]
    pooling_mode_weightedmean_tokens: bool,
    #[serde(default)]
    pooling_mode_lasttoken: bool,
}

fn pooling(path: &Path) -> Result<Pooling, ModelError> {
    let Some(json) = json_file::<PoolingJson>(path)? else { return Ok(Pooling::Mean) };
    let others = [
        json.pooling_mode_max_tokens,
        json.pooling_mode_mean_sqrt_len_tokens,
        json.pooling_mode_weightedmean_tokens,
        json.pooling_mode_lasttoken,
    ];
    match (json.pooling_mode_mean_tokens, json.pooling_mode_cls_token, others.contains(&true)) {
        (true, false, false) => Ok(Pooling::Mean),
        (false, true, false) => Ok(Pooling::First),
        _ => Err(unsupported(path, "pooling other than one of the mean and the first token".to_owned())),
    }
}

/// A JSON file; nothing if there is none.
fn json_file<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, ModelError> {
    let Some(text) = read(path)? else { return Ok(None) };
    serde_json::from_str(&text).map(Some).map_err(|source| ModelError::Json { path: path.to_owned(), source })
}

fn unsupported(path: &Path, what: String) -> ModelError {
    let mend = "embeddings are made by models of BertModel with learnt absolute positions and exact GELU, \
                pooled by the mean or the first token";
    ModelError::Unsupported { path: path.to_owned(), what, mend: mend.to_owned() }
}

fn key_error(path: &Path, key: &str, problem: String) -> ModelError {
    ModelError::Key { path: path.to_owned(), key: key.to_owned(), problem }
}
