//! What a model's files say of its shape, in one form. Owns which models can be computed: what would give other numbers is refused by name.

use std::ops::Range;
use std::path::Path;

use serde::Deserialize;

use super::error::ModelError;
use super::tree::owned;
use super::weights::Gguf;

/// Bounds far above any model of this class, so that no product of two of them overflows and no buffer is sized by damage.
const LAYERS_MAX: usize = 1 << 10;
const WIDTH_MAX: usize = 1 << 20;
const VOCABULARY_MAX: usize = 1 << 24;
const CONTEXT_MAX: usize = 1 << 28;

/// The default of llama.cpp and transformers alike.
const ROPE_BASE: f32 = 10_000.0;

/// Which values of a head the rotary embedding turns together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rope {
    /// 2i and 2i + 1: GGUF files of architecture `llama`, whose rows of q and k are permuted for it.
    Pairs,
    /// i and i + head_size / 2 ("rotate half"): Hugging Face, and GGUF files of `qwen2`.
    Halves,
}

/// The shape of a decoder of the Llama class: RMSNorm, rotary embedding, grouped-query attention, SwiGLU, no bias but of q, k and v.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// `llama` or `qwen2`.
    pub architecture: String,
    pub layers: usize,
    /// Values of the residual stream.
    pub hidden: usize,
    /// Heads of the queries.
    pub heads: usize,
    /// Heads of keys and values; divides `heads`.
    pub kv_heads: usize,
    /// Values of one head; even.
    pub head_size: usize,
    /// Values between the two halves of the feed-forward network.
    pub ffn: usize,
    /// Rows of the token embedding.
    pub vocab: usize,
    /// Most tokens that the model was trained for.
    pub context: usize,
    pub rms_epsilon: f32,
    pub rope_base: f32,
    pub rope: Rope,
    /// The output layer is the token embedding, and there is no `lm_head.weight`.
    pub tied_embeddings: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
}

impl DecoderConfig {
    /// From the metadata of a GGUF file; keys as llama.cpp writes them (`gguf-py/gguf/constants.py`).
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let architecture = gguf.string("general.architecture")?;
        let rope = match architecture {
            "llama" => Rope::Pairs,
            "qwen2" => Rope::Halves,
            other => return Err(unsupported(gguf.path(), format!("architecture {other:?}"))),
        };
        refuse_gguf(gguf, architecture)?;
        let key = |name: &str| format!("{architecture}.{name}");
        let size = |name: &str| gguf.u32(&key(name)).map(|value| value as usize);
        let or = |name: &str, default: usize| {
            gguf.optional_u32(&key(name)).map(|value| value.map_or(default, |value| value as usize))
        };
        let (hidden, heads) = (size("embedding_length")?, size("attention.head_count")?);
        // Some files say nothing of the vocabulary but by the embedding itself.
        let embedded = gguf.tensor("model.embed_tokens.weight").map_or(0, |tensor| tensor.rows());
        let config = Self {
            architecture: architecture.to_owned(),
            layers: size("block_count")?,
            hidden,
            heads,
            kv_heads: or("attention.head_count_kv", heads)?,
            head_size: or("attention.key_length", hidden / heads.max(1))?,
            ffn: size("feed_forward_length")?,
            vocab: or("vocab_size", embedded)?,
            context: size("context_length")?,
            rms_epsilon: gguf.f32(&key("attention.layer_norm_rms_epsilon"))?,
            rope_base: gguf.optional_f32(&key("rope.freq_base"))?.unwrap_or(ROPE_BASE),
            rope,
            tied_embeddings: gguf.tensor("lm_head.weight").is_none(),
            qkv_bias: gguf.tensor("model.layers.0.self_attn.q_proj.bias").is_some(),
        };
        for name in ["rope.dimension_count", "attention.value_length"] {
            if or(name, config.head_size)? != config.head_size {
                return Err(unsupported(gguf.path(), format!("a {} other than the size of a head", key(name))));
            }
        }
        config.check(gguf.path())
    }

    /// From the text of a `config.json`; `path` is its name in messages. Keys and defaults are those of transformers' `LlamaConfig` and `Qwen2Config`.
    pub fn from_json(path: &Path, text: &str) -> Result<Self, ModelError> {
        let damaged = |source| ModelError::Json { path: path.to_owned(), source };
        let Kinds { architectures } = serde_json::from_str(text).map_err(damaged)?;
        let architecture = match architectures.first().map(String::as_str) {
            Some("LlamaForCausalLM") => "llama",
            Some("Qwen2ForCausalLM") => "qwen2",
            other => return Err(unsupported(path, format!("architecture {:?}", other.unwrap_or("none")))),
        };
        let json: Json = serde_json::from_str(text).map_err(damaged)?;
        json.refuse(path)?;
        let heads = json.num_attention_heads;
        let rope = json.rope_parameters.as_ref();
        let config = Self {
            architecture: architecture.to_owned(),
            layers: json.num_hidden_layers,
            hidden: json.hidden_size,
            heads,
            kv_heads: json.num_key_value_heads.unwrap_or(heads),
            head_size: json.head_dim.unwrap_or(json.hidden_size / heads.max(1)),
            ffn: json.intermediate_size,
            vocab: json.vocab_size,
            context: json.max_position_embeddings,
            rms_epsilon: json.rms_norm_eps,
            rope_base: rope.and_then(|rope| rope.rope_theta).or(json.rope_theta).unwrap_or(ROPE_BASE),
            rope: Rope::Halves,
            tied_embeddings: json.tie_word_embeddings,
            qkv_bias: architecture == "qwen2",
        };
        config.check(path)
    }

    /// The layers of each of so many stages, as equal in work for the tokens of an answer as they can be: the last stage has the output layer too, which
    /// counts as many layers as it has weights. None: there are not so many layers.
    pub fn stages(&self, stages: usize) -> Option<Vec<Range<usize>>> {
        let before = stages.checked_sub(1).filter(|_| stages <= self.layers)?;
        let (heads, shared) = (self.heads * self.head_size, self.kv_heads * self.head_size);
        let layer = self.hidden * (2 * heads + 2 * shared + 3 * self.ffn);
        let output = (self.vocab * self.hidden) as f64 / layer as f64;
        let last = ((self.layers as f64 + output) / stages as f64 - output).round().max(1.0) as usize;
        let rest = self.layers - last.min(self.layers - before);
        let first = (0..before).map(|stage| owned(rest, stage, before));
        Some(first.chain(std::iter::once(rest..self.layers)).collect())
    }

    /// The numbers must make a model.
    fn check(self, path: &Path) -> Result<Self, ModelError> {
        for (key, value, max) in [
            ("number of layers", self.layers, LAYERS_MAX),
            ("hidden size", self.hidden, WIDTH_MAX),
            ("number of heads", self.heads, WIDTH_MAX),
            ("number of key and value heads", self.kv_heads, WIDTH_MAX),
            ("head size", self.head_size, WIDTH_MAX),
            ("width of heads together", self.heads.saturating_mul(self.head_size), WIDTH_MAX),
            ("feed-forward size", self.ffn, WIDTH_MAX),
            ("vocabulary size", self.vocab, VOCABULARY_MAX),
            ("context length", self.context, CONTEXT_MAX),
        ] {
            if !(1..=max).contains(&value) {
                return Err(key_error(path, key, format!("is {value}, not from 1 to {max}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let problem = format!("is {}, which does not divide {} heads", self.kv_heads, self.heads);
            return Err(key_error(path, "number of key and value heads", problem));
        }
        if !self.head_size.is_multiple_of(2) {
            return Err(key_error(path, "head size", format!("is {}, which is odd", self.head_size)));
        }
        for (key, value) in [("RMS epsilon", self.rms_epsilon), ("rotary base", self.rope_base)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(key_error(path, key, format!("is {value}, not a number above 0")));
            }
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
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f32,
    rope_theta: Option<f32>,
    rope_scaling: Option<RopeJson>,
    /// Where transformers 5 writes both.
    rope_parameters: Option<RopeJson>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    hidden_act: Option<String>,
    partial_rotary_factor: Option<f32>,
}

#[derive(Deserialize)]
struct RopeJson {
    rope_type: Option<String>,
    /// Its name in files of older transformers; some have both.
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f32>,
    partial_rotary_factor: Option<f32>,
}

impl Json {
    fn refuse(&self, path: &Path) -> Result<(), ModelError> {
        let ropes = || [&self.rope_scaling, &self.rope_parameters].into_iter().flatten();
        let mut partial = ropes().filter_map(|rope| rope.partial_rotary_factor).chain(self.partial_rotary_factor);
        let scaled = ropes()
            .flat_map(|rope| [rope.rope_type.as_deref(), rope.old_type.as_deref()])
            .flatten()
            .find(|kind| *kind != "default");
        let act = self.hidden_act.as_deref().unwrap_or("silu");
        for (refused, what) in [
            (scaled.is_some(), format!("rope_scaling of type {:?}", scaled.unwrap_or_default())),
            (self.attention_bias, "attention_bias (a bias of the attention's output)".to_owned()),
            (self.mlp_bias, "mlp_bias".to_owned()),
            (self.use_sliding_window, "use_sliding_window".to_owned()),
            (act != "silu", format!("hidden_act {act:?}")),
            (partial.any(|factor| factor != 1.0), "partial_rotary_factor".to_owned()),
        ] {
            if refused {
                return Err(unsupported(path, what));
            }
        }
        Ok(())
    }
}

/// What would change the numbers of a GGUF model.
fn refuse_gguf(gguf: &Gguf, architecture: &str) -> Result<(), ModelError> {
    let key = |name: &str| format!("{architecture}.{name}");
    let scaling = gguf.optional_string(&key("rope.scaling.type"))?.unwrap_or("none");
    let factor = |name: &str| {
        gguf.optional_f32(&key(name)).map(|factor| factor.is_some_and(|factor| ![0.0, 1.0].contains(&factor)))
    };
    let positive = |name: &str| gguf.optional_u32(&key(name)).map(|value| value.is_some_and(|value| value > 0));
    for (refused, what) in [
        (scaling != "none", format!("rope scaling of type {scaling:?}")),
        // llama.cpp takes a factor without a type for linear scaling.
        (factor("rope.scaling.factor")? || factor("rope.scale_linear")?, "rope scaling by a factor".to_owned()),
        (gguf.tensor("rope_freqs.weight").is_some(), "rope scaling by tensor rope_freqs.weight".to_owned()),
        (
            gguf.optional_u32("split.count")?.is_some_and(|count| count > 1),
            "a model in several GGUF files (llama-gguf-split --merge makes one of them)".to_owned(),
        ),
        (positive("expert_count")?, "a mixture of experts".to_owned()),
        (positive("attention.sliding_window")?, "sliding window attention".to_owned()),
    ] {
        if refused {
            return Err(unsupported(gguf.path(), what));
        }
    }
    Ok(())
}

fn unsupported(path: &Path, what: String) -> ModelError {
    let mend = "supported are models of LlamaForCausalLM and Qwen2ForCausalLM, in GGUF llama and qwen2, \
                without scaled rotary embedding, sliding windows and experts";
    ModelError::Unsupported { path: path.to_owned(), what, mend: mend.to_owned() }
}

fn key_error(path: &Path, key: &str, problem: String) -> ModelError {
    ModelError::Key { path: path.to_owned(), key: key.to_owned(), problem }
}
