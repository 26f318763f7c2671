//! A decoder of the Llama class on the CPU kernels: RMSNorm, rotary embedding, grouped-query attention, SwiGLU (Touvron et al. 2023; names and
//! formulas are those of transformers' `LlamaForCausalLM`). Owns the order of a layer's work, and which part of each layer a share has; how sums of
//! several shares come together is its caller's.
//!
//! D1: what a row of a batch gives does not depend on the rows beside it, nor on whether the tokens before it came one by one or many at a time
//! (K1 to K4). So an answer that is begun again from its tokens goes on with the same bits. D2: rows, places and shapes fit each other. D3: nor does it
//! depend on how many shares the layers are cut into (Megatron's cut: Shoeybi et al. 2019), because their sums are added in one tree (K3).

use std::ops::Range;

use super::config::DecoderConfig;
use super::error::ModelError;
use super::kernels::{Attention, Cache, Isa, Matrix, Place, Rotary, Rows, add, gate, rms_norm};
use super::tree::{owned, subtrees};
use super::weights::{Kind, Weights};

/// Layers of a model, or one share of each of them, with the embedding before them or the output behind them where they are the first or the last.
pub struct Decoder<'w> {
    config: DecoderConfig,
    isa: Isa,
    precision: Precision,
    layers: Range<usize>,
    context: usize,
    /// Heads of keys and values that are this share's, of each layer.
    kv_heads: Range<usize>,
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

/// Which part of each layer: some of the heads, and of the values between the two halves of the feed-forward network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Share {
    /// From 0.
    pub part: usize,
    /// Not more than there are heads of keys and values.
    pub parts: usize,
}

impl Share {
    pub const WHOLE: Self = Self { part: 0, parts: 1 };
}

/// Brings the sums of all shares of a layer together; every share calls it at the same places of the same batches.
pub trait Sum {
    /// `partials`: the sums that this share makes, one for each node of the tree (`tree::subtrees` of its heads). Leaves the sum at the root, as
    /// `tree::root` adds it, in the first.
    fn sum(&mut self, partials: &mut [Rows]) -> Result<(), Interrupted>;
}

/// Of the one share that is the whole.
#[derive(Clone, Copy, Debug)]
pub struct Alone;

impl Sum for Alone {
    fn sum(&mut self, partials: &mut [Rows]) -> Result<(), Interrupted> {
        assert_eq!(partials.len(), 1, "D3: the whole makes the root itself");
        Ok(())
    }
}

/// The sums of the other shares did not come: the batch is lost, and with it what the cache should hold from then on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the batch was given up: the other ranks of its layers are gone or in another generation")]
pub struct Interrupted;

/// One layer.
struct Block<'w> {
    attention_norm: Vec<f32>,
    query: Linear<'w>,
    key: Linear<'w>,
    value: Linear<'w>,
    output: Columns<'w>,
    ffn_norm: Vec<f32>,
    gate: Linear<'w>,
    up: Linear<'w>,
    down: Columns<'w>,
}

/// The rows of a matrix that are this share's.
struct Linear<'w> {
    weights: Matrix<'w>,
    bias: Option<Vec<f32>>,
}

/// The columns of a matrix that are this share's.
struct Columns<'w> {
    weights: Matrix<'w>,
    columns: Range<usize>,
    /// Of each node of the tree that the share makes, the columns of its leaves.
    nodes: Vec<Vec<Range<usize>>>,
}

/// What layers remember and work on: keys and values, and room that is kept over batches, so that nothing is allocated while tokens are made.
#[derive(Debug)]
pub struct Memory {
    cache: Cache,
    normed: Rows,
    query: Rows,
    key: Rows,
    value: Rows,
    attended: Rows,
    gate: Rows,
    up: Rows,
    /// One for each node of the tree that the share makes.
    partials: Vec<Rows>,
}

impl Memory {
    /// The keys and values of one page of the cache, of this decoder's layers and heads.
    pub fn page(&self, page: u32) -> &[f32] {
        self.cache.page(page)
    }

    pub fn page_mut(&mut self, page: u32) -> &mut [f32] {
        self.cache.page_mut(page)
    }
}

impl<'w> Decoder<'w> {
    /// All tensors of these layers are looked up, and their shapes compared with the config's. `context`: most tokens of a sequence.
    pub fn new(
        weights: &'w Weights,
        layers: Range<usize>,
        context: usize,
        precision: Precision,
        share: Share,
    ) -> Result<Self, ModelError> {
        let config = weights.config()?;
        assert!(layers.end <= config.layers && !layers.is_empty(), "D2: layers of the model");
        assert!(share.part < share.parts, "D2: a share of the model");
        if share.parts > config.kv_heads {
            let (parts, heads) = (share.parts, config.kv_heads);
            let what = format!("cutting each layer into {parts} parts, where it has {heads} heads of keys and values,");
            let mend = format!("use up to {heads} parts, and more stages for more ranks");
            return Err(ModelError::Unsupported { path: weights.path().to_owned(), what, mend });
        }
        let embedding = matrix(weights, "model.embed_tokens.weight", (config.vocab, config.hidden))?;
        let head = match config.tied_embeddings {
            true => embedding,
            false => matrix(weights, "lm_head.weight", (config.vocab, config.hidden))?,
        };
        let block = |layer: usize| Block::new(weights, &config, layer, share);
        Ok(Self {
            blocks: layers.clone().map(block).collect::<Result<Vec<_>, ModelError>>()?,
            kv_heads: owned(config.kv_heads, share.part, share.parts),
            norm: vector(weights, "model.norm.weight", 0..config.hidden, config.hidden)?,
            rotary: Rotary::new(config.rope, (config.head_size, config.rope_base), context),
            isa: Isa::best(),
            context,
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

    /// Most tokens of a sequence.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Room for the keys and values of this many pages of tokens, of this share of these layers.
    pub fn memory(&self, pages: usize) -> Memory {
        let DecoderConfig { hidden, heads, kv_heads, head_size, .. } = self.config;
        let shared = self.kv_heads.len() * head_size;
        let [query, attended] = [(); 2].map(|()| Rows::new(heads / kv_heads * shared));
        let [key, value] = [(); 2].map(|()| Rows::new(shared));
        // As wide as a layer's share is.
        let [gate, up] = [(); 2].map(|()| Rows::new(0));
        let nodes = subtrees(kv_heads, &self.kv_heads).len();
        let partials = (0..nodes).map(|_| Rows::new(hidden)).collect();
        let cache = Cache::new(self.layers.len(), (self.kv_heads.len(), head_size), pages);
        Memory { cache, normed: Rows::new(hidden), query, key, value, attended, gate, up, partials }
    }

    /// The rows that the first layer takes: the embeddings of these tokens, each below the vocabulary's size.
    pub fn embed(&self, tokens: impl ExactSizeIterator<Item = u32>) -> Rows {
        let mut hidden = Rows::new(self.config.hidden);
        hidden.resize(tokens.len());
        for (row, token) in tokens.enumerate() {
            self.embedding.kind.dequantise(self.embedding.row(token as usize), hidden.row_mut(row));
        }
        hidden
    }

    /// Takes each row of the batch through these layers. `places`: where it stands; the keys and values of the tokens before it are in the cache, or
    /// come from rows of this batch, in the order of their positions.
    pub fn forward(
        &self,
        hidden: &mut Rows,
        places: &[Place<'_>],
        memory: &mut Memory,
        sum: &mut dyn Sum,
    ) -> Result<(), Interrupted> {
        assert_eq!((hidden.len(), hidden.width), (places.len(), self.config.hidden), "D2: a place for each row");
        for (layer, block) in self.blocks.iter().enumerate() {
            self.attention((layer, block), hidden, places, memory, sum)?;
            self.feed_forward(block, hidden, memory, sum)?;
        }
        Ok(())
    }

    fn attention(
        &self,
        (layer, block): (usize, &Block<'_>),
        hidden: &mut Rows,
        places: &[Place<'_>],
        memory: &mut Memory,
        sum: &mut dyn Sum,
    ) -> Result<(), Interrupted> {
        let Memory { cache, normed, query, key, value, attended, partials, .. } = memory;
        self.norm(hidden, &block.attention_norm, normed);
        block.query.times(self.isa, normed, query);
        block.key.times(self.isa, normed, key);
        block.value.times(self.isa, normed, value);
        for (row, place) in places.iter().enumerate() {
            self.rotary.turn(self.isa, query.row_mut(row), place.position);
            self.rotary.turn(self.isa, key.row_mut(row), place.position);
            cache.put(layer, *place, key.row(row), value.row(row));
        }
        let DecoderConfig { heads, kv_heads, head_size, .. } = self.config;
        let attention = Attention { layer, group: heads / kv_heads, scale: 1.0 / (head_size as f32).sqrt() };
        cache.attend(self.isa, attention, query, places, attended);
        self.round(attended);
        block.output.times(self.isa, attended, partials);
        self.add(hidden, partials, sum)
    }

    fn feed_forward(
        &self,
        block: &Block<'_>,
        hidden: &mut Rows,
        memory: &mut Memory,
        sum: &mut dyn Sum,
    ) -> Result<(), Interrupted> {
        let Memory { normed, gate: gated, up, partials, .. } = memory;
        self.norm(hidden, &block.ffn_norm, normed);
        (gated.width, up.width) = (block.down.columns.len(), block.down.columns.len());
        block.gate.times(self.isa, normed, gated);
        block.up.times(self.isa, normed, up);
        gate(self.isa, &mut gated.values, &up.values);
        self.round(gated);
        block.down.times(self.isa, gated, partials);
        self.add(hidden, partials, sum)
    }

    /// The logits of rows that have been through the last layer: one for each token of the vocabulary.
    pub fn logits(&self, hidden: &Rows, memory: &mut Memory) -> Rows {
        let mut logits = Rows::new(self.config.vocab);
        self.norm(hidden, &self.norm, &mut memory.normed);
        self.head.times(self.isa, &memory.normed, 1, &mut logits);
        logits
    }

    fn add(&self, hidden: &mut Rows, partials: &mut [Rows], sum: &mut dyn Sum) -> Result<(), Interrupted> {
        sum.sum(partials)?;
        assert_eq!(partials[0].values.len(), hidden.values.len(), "D2: a sum for each row");
        add(self.isa, &mut hidden.values, &partials[0].values);
        Ok(())
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

impl<'w> Block<'w> {
    /// A share of one layer. Only its own tensors' bytes will be read.
    fn new(weights: &'w Weights, config: &DecoderConfig, layer: usize, share: Share) -> Result<Self, ModelError> {
        let DecoderConfig { hidden, heads, kv_heads, head_size, ffn, qkv_bias, .. } = *config;
        let (width, shared) = (heads * head_size, kv_heads * head_size);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let norm = |part: &str| vector(weights, &name(part), 0..hidden, hidden);
        let linear = |part: &str, own: Range<usize>, rows: usize, bias: bool| {
            let bias = bias.then(|| vector(weights, &name(&format!("{part}.bias")), own.clone(), rows)).transpose()?;
            let weights = matrix(weights, &name(&format!("{part}.weight")), (rows, hidden))?.rows(own);
            Ok::<_, ModelError>(Linear { weights, bias })
        };
        let columns = |part: &str, columns: usize| {
            let weights = matrix(weights, &name(&format!("{part}.weight")), (hidden, columns))?;
            Ok::<_, ModelError>(Columns::new(weights, kv_heads, share))
        };
        let (output, down) = (columns("self_attn.o_proj", width)?, columns("mlp.down_proj", ffn)?);
        let own = owned(kv_heads, share.part, share.parts);
        let of = |size: usize| own.start * size..own.end * size;
        if share.parts > 1 {
            let even = (0..kv_heads).all(|head| output.weights.part(head, kv_heads).start == head * width / kv_heads);
            if !even || down.columns.is_empty() {
                return Err(uncut(weights, &name("self_attn.o_proj.weight"), output.weights.kind, width / kv_heads));
            }
        }
        Ok(Self {
            attention_norm: norm("input_layernorm.weight")?,
            query: linear("self_attn.q_proj", of(width / kv_heads), width, qkv_bias)?,
            key: linear("self_attn.k_proj", of(head_size), shared, qkv_bias)?,
            value: linear("self_attn.v_proj", of(head_size), shared, qkv_bias)?,
            ffn_norm: norm("post_attention_layernorm.weight")?,
            gate: linear("mlp.gate_proj", down.columns.clone(), ffn, false)?,
            up: linear("mlp.up_proj", down.columns.clone(), ffn, false)?,
            output,
            down,
        })
    }
}

impl Linear<'_> {
    fn times(&self, isa: Isa, x: &Rows, out: &mut Rows) {
        self.weights.times(isa, x, 1, out);
        if let Some(bias) = &self.bias {
            (0..out.len()).for_each(|row| add(isa, out.row_mut(row), bias));
        }
    }
}

impl<'w> Columns<'w> {
    /// The share of the columns over `leaves` partial sums (K3).
    fn new(weights: Matrix<'w>, leaves: usize, share: Share) -> Self {
        let own = owned(leaves, share.part, share.parts);
        let columns = weights.part(own.start, leaves).start..weights.part(own.end - 1, leaves).end;
        let leaves_of = |node: Range<usize>| node.map(|leaf| weights.part(leaf, leaves)).collect();
        let nodes = subtrees(leaves, &own).into_iter().map(leaves_of).collect();
        Self { weights, columns, nodes }
    }

    /// `x` has the values of the share's columns alone.
    fn times(&self, isa: Isa, x: &Rows, out: &mut [Rows]) {
        assert_eq!((x.width, out.len()), (self.columns.len(), self.nodes.len()), "D2: shapes fit");
        for (out, cuts) in out.iter_mut().zip(&self.nodes) {
            self.weights.columns_times(isa, x, (self.columns.start, cuts), out);
        }
    }
}

fn uncut(weights: &Weights, tensor: &str, kind: Kind, columns: usize) -> ModelError {
    let (name, values) = (kind.name(), kind.block_values());
    let what = format!(
        "cutting {tensor} ({name}) between heads, which have {columns} columns each and blocks of {values} values,"
    );
    let mend = "use one part and more stages, or weights of F32, F16 or BF16".to_owned();
    ModelError::Unsupported { path: weights.path().to_owned(), what, mend }
}

fn matrix<'w>(weights: &'w Weights, name: &str, (rows, columns): (usize, usize)) -> Result<Matrix<'w>, ModelError> {
    let raw = weights.shaped(name, &[rows, columns])?;
    Ok(Matrix { kind: raw.kind, rows, columns, bytes: raw.bytes })
}

/// Some of so many values.
fn vector(weights: &Weights, name: &str, own: Range<usize>, values: usize) -> Result<Vec<f32>, ModelError> {
    weights.shaped(name, &[values]).map(|raw| raw.dequantise()[own].to_vec())
}
