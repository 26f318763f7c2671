//! A decoder of the Llama class on the CPU kernels: RMSNorm, rotary embedding, grouped-query attention, SwiGLU (Touvron et al. 2023; names and
//! formulas are those of transformers' `LlamaForCausalLM`). Owns the order of a layer's work; the keys and values of sequences are its caller's.
//!
//! D1: what a row of a batch gives does not depend on the rows beside it, nor on whether the tokens before it came one by one or many at a time
//! (K1 to K4). So an answer that is begun again from its tokens goes on with the same bits.

use std::ops::Range;

use super::config::DecoderConfig;
use super::error::ModelError;
use super::kernels::{Attention, Cache, Isa, Matrix, Place, Rotary, Rows, add, gate, rms_norm};
use super::weights::Weights;

/// Layers of a model, with the embedding before them or the output behind them where they are the first or the last.
pub struct Decoder<'w> {
    config: DecoderConfig,
    isa: Isa,
    precision: Precision,
    layers: Range<usize>,
    blocks: Vec<Block<'w>>,
    embedding: Matrix<'w>,
    norm: Vec<f32>,
    head: Matrix<'w>,
    rotary: Rotary,
}

/// What weights in blocks are multiplied with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Precision {
    /// Activations rounded to 8 bits, each block of 32 by its largest value, as llama.cpp does: fast.
    #[default]
    Rounded,
    /// Activations as they are: what a computation on the dequantised weights gives, and several times slower.
    Full,
}

/// One layer.
struct Block<'w> {
    attention_norm: Vec<f32>,
    query: Linear<'w>,
    key: Linear<'w>,
    value: Linear<'w>,
    output: Linear<'w>,
    ffn_norm: Vec<f32>,
    gate: Linear<'w>,
    up: Linear<'w>,
    down: Linear<'w>,
}

struct Linear<'w> {
    weights: Matrix<'w>,
    bias: Option<Vec<f32>>,
}

/// What a layer works on. Kept over batches, so that nothing is allocated while tokens are made.
#[derive(Debug)]
pub struct Scratch {
    normed: Rows,
    query: Rows,
    key: Rows,
    value: Rows,
    attended: Rows,
    gate: Rows,
    up: Rows,
    added: Rows,
}

impl<'w> Decoder<'w> {
    /// All tensors of these layers are looked up, and their shapes compared with the config's. `context`: most tokens of a sequence.
    pub fn new(
        weights: &'w Weights,
        layers: Range<usize>,
        context: usize,
        precision: Precision,
    ) -> Result<Self, ModelError> {
        let config = weights.config()?;
        assert!(layers.end <= config.layers && !layers.is_empty(), "D2: layers of the model");
        let heads = config.heads * config.head_size;
        let shared = config.kv_heads * config.head_size;
        let block = |layer: usize| {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let linear = |part: &str, (rows, columns): (usize, usize), bias: bool| {
                let bias = bias.then(|| vector(weights, &name(&format!("{part}.bias")), rows)).transpose()?;
                Ok(Linear { weights: matrix(weights, &name(&format!("{part}.weight")), (rows, columns))?, bias })
            };
            Ok(Block {
                attention_norm: vector(weights, &name("input_layernorm.weight"), config.hidden)?,
                query: linear("self_attn.q_proj", (heads, config.hidden), config.qkv_bias)?,
                key: linear("self_attn.k_proj", (shared, config.hidden), config.qkv_bias)?,
                value: linear("self_attn.v_proj", (shared, config.hidden), config.qkv_bias)?,
                output: linear("self_attn.o_proj", (config.hidden, heads), false)?,
                ffn_norm: vector(weights, &name("post_attention_layernorm.weight"), config.hidden)?,
                gate: linear("mlp.gate_proj", (config.ffn, config.hidden), false)?,
                up: linear("mlp.up_proj", (config.ffn, config.hidden), false)?,
                down: linear("mlp.down_proj", (config.hidden, config.ffn), false)?,
            })
        };
        let embedding = matrix(weights, "model.embed_tokens.weight", (config.vocab, config.hidden))?;
        let head = match config.tied_embeddings {
            true => embedding,
            false => matrix(weights, "lm_head.weight", (config.vocab, config.hidden))?,
        };
        Ok(Self {
            blocks: layers.clone().map(block).collect::<Result<Vec<_>, ModelError>>()?,
            norm: vector(weights, "model.norm.weight", config.hidden)?,
            rotary: Rotary::new(config.rope, (config.head_size, config.rope_base), context),
            isa: Isa::best(),
            precision,
            embedding,
            head,
            layers,
            config,
        })
    }

    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Room for the keys and values of this many pages of tokens, of these layers.
    pub fn cache(&self, pages: usize) -> Cache {
        Cache::new(self.layers.len(), (self.config.kv_heads, self.config.head_size), pages)
    }

    pub fn scratch(&self) -> Scratch {
        let DecoderConfig { hidden, heads, kv_heads, head_size, ffn, .. } = self.config;
        let [normed, added] = [(); 2].map(|()| Rows::new(hidden));
        let [query, attended] = [(); 2].map(|()| Rows::new(heads * head_size));
        let [key, value] = [(); 2].map(|()| Rows::new(kv_heads * head_size));
        let [gate, up] = [(); 2].map(|()| Rows::new(ffn));
        Scratch { normed, query, key, value, attended, gate, up, added }
    }

    /// The rows that the first layer takes: the embeddings of these tokens, each below the vocabulary's size.
    pub fn embed(&self, tokens: &[u32]) -> Rows {
        let mut hidden = Rows::new(self.config.hidden);
        hidden.resize(tokens.len());
        for (row, token) in tokens.iter().enumerate() {
            self.embedding.kind.dequantise(self.embedding.row(*token as usize), hidden.row_mut(row));
        }
        hidden
    }

    /// Takes each row of the batch through these layers. `places`: where it stands; the keys and values of the tokens before it are in the cache, or
    /// come from rows of this batch, in the order of their positions.
    pub fn forward(&self, hidden: &mut Rows, places: &[Place<'_>], cache: &mut Cache, scratch: &mut Scratch) {
        assert_eq!(hidden.len(), places.len(), "D2: a place for each row");
        for (layer, block) in self.blocks.iter().enumerate() {
            self.attention(layer, block, hidden, places, cache, scratch);
            self.feed_forward(block, hidden, scratch);
        }
    }

    fn attention(
        &self,
        layer: usize,
        block: &Block<'_>,
        hidden: &mut Rows,
        places: &[Place<'_>],
        cache: &mut Cache,
        scratch: &mut Scratch,
    ) {
        let Scratch { normed, query, key, value, attended, added, .. } = scratch;
        self.norm(hidden, &block.attention_norm, normed);
        block.query.times(self.isa, normed, 1, query);
        block.key.times(self.isa, normed, 1, key);
        block.value.times(self.isa, normed, 1, value);
        for (row, place) in places.iter().enumerate() {
            self.rotary.turn(self.isa, query.row_mut(row), place.position);
            self.rotary.turn(self.isa, key.row_mut(row), place.position);
            cache.put(layer, *place, key.row(row), value.row(row));
        }
        let DecoderConfig { heads, kv_heads, head_size, .. } = self.config;
        let attention = Attention { layer, group: heads / kv_heads, scale: 1.0 / (head_size as f32).sqrt() };
        cache.attend(self.isa, attention, query, places, attended);
        self.round(attended);
        block.output.times(self.isa, attended, kv_heads, added);
        add(self.isa, &mut hidden.values, &added.values);
    }

    fn feed_forward(&self, block: &Block<'_>, hidden: &mut Rows, scratch: &mut Scratch) {
        let Scratch { normed, gate: gated, up, added, .. } = scratch;
        self.norm(hidden, &block.ffn_norm, normed);
        block.gate.times(self.isa, normed, 1, gated);
        block.up.times(self.isa, normed, 1, up);
        gate(self.isa, &mut gated.values, &up.values);
        self.round(gated);
        block.down.times(self.isa, gated, self.config.kv_heads, added);
        add(self.isa, &mut hidden.values, &added.values);
    }

    /// The logits of rows that have been through the last layer: one for each token of the vocabulary.
    pub fn logits(&self, hidden: &Rows, scratch: &mut Scratch) -> Rows {
        let mut logits = Rows::new(self.config.vocab);
        self.norm(hidden, &self.norm, &mut scratch.normed);
        self.head.times(self.isa, &scratch.normed, 1, &mut logits);
        logits
    }

    fn norm(&self, hidden: &Rows, weight: &[f32], normed: &mut Rows) {
        normed.resize(hidden.len());
        for row in 0..hidden.len() {
            rms_norm(self.isa, hidden.row(row), (weight, self.config.rms_epsilon), normed.row_mut(row));
        }
        self.round(normed);
    }

    fn round(&self, rows: &mut Rows) {
        match self.precision {
            Precision::Rounded => rows.quantise(self.isa),
            Precision::Full => {}
        }
    }
}

impl Linear<'_> {
    fn times(&self, isa: Isa, x: &Rows, parts: usize, out: &mut Rows) {
        self.weights.times(isa, x, parts, out);
        if let Some(bias) = &self.bias {
            (0..out.len()).for_each(|row| add(isa, out.row_mut(row), bias));
        }
    }
}

fn matrix<'w>(weights: &'w Weights, name: &str, (rows, columns): (usize, usize)) -> Result<Matrix<'w>, ModelError> {
    let raw = weights.shaped(name, &[rows, columns])?;
    Ok(Matrix { kind: raw.kind, rows, columns, bytes: raw.bytes })
}

fn vector(weights: &Weights, name: &str, values: usize) -> Result<Vec<f32>, ModelError> {
    weights.shaped(name, &[values]).map(|raw| raw.dequantise())
}
