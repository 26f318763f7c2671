//! An encoder of the BERT class on the CPU kernels: one vector for each text (Devlin et al. 2018; names and formulas are those of transformers'
//! `BertModel`, pooling that of sentence-transformers). Owns the order of a layer's work and where texts are cut.
//!
//! E1: the embedding of a text does not depend on the texts beside it, on the number of threads, nor on the processor (K5, K6). Texts lie one behind
//! the other as rows, without padding.

mod config;

use std::ops::Range;

use super::error::ModelError;
use super::kernels::{Dense, Isa, LayerNorm, Matrix, Rows, Then, add, attend_all};
use super::tokenizer::Tokenizer;
use super::weights::Weights;
pub use config::{EncoderConfig, Pooling};

/// Rows that go through the layers together, if no text is longer: more make no product faster, and take more memory.
const ROWS_MAX: usize = 512;

/// A model that makes embeddings, with its tokenizer. Its layers are packed in memory as f32; the token embedding stays mapped.
pub struct Encoder<'w> {
    config: EncoderConfig,
    tokenizer: Tokenizer,
    isa: Isa,
    words: Matrix<'w>,
    /// Of each position, with the first token type's added.
    positions: Rows,
    norm: LayerNorm,
    blocks: Vec<Block>,
    scratch: Scratch,
}

/// One layer.
struct Block {
    /// Queries of all heads, then keys, then values.
    query_key_value: Dense,
    attention_output: Dense,
    attention_norm: LayerNorm,
    intermediate: Dense,
    output: Dense,
    norm: LayerNorm,
}

/// What a layer works on. Kept over batches.
struct Scratch {
    hidden: Rows,
    query_key_value: Rows,
    attended: Rows,
    intermediate: Rows,
    added: Rows,
}

/// A text as the model reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// With those around the text; at most [`EncoderConfig::tokens_max`].
    pub ids: Vec<u32>,
    /// Tokens of the text that did not fit and were left out, from its end.
    pub left_out: usize,
}

/// The tokenizer of an encoder, and where it cuts.
#[derive(Clone)]
pub struct Reader {
    config: EncoderConfig,
    tokenizer: Tokenizer,
}

impl Reader {
    /// The tokens of a text. One that is too long is cut at its end as sentence-transformers cuts it: the tokens around it stay.
    pub fn read(&self, text: &str) -> Result<Tokens, ModelError> {
        let lower = self.config.lower_case.then(|| text.to_lowercase());
        let text = lower.as_deref().unwrap_or(text);
        let mut ids = self.tokenizer.encode_framed(text)?;
        let left_out = ids.len().saturating_sub(self.config.tokens_max);
        if left_out > 0 {
            let own = self.tokenizer.encode(text)?;
            let before = ids.windows(own.len().max(1)).position(|ids| ids == own).unwrap_or(0);
            let end = before + own.len();
            ids.drain(end.saturating_sub(left_out)..end);
        }
        Ok(Tokens { ids, left_out })
    }
}

impl<'w> Encoder<'w> {
    /// All tensors are looked up, and their shapes compared with the config's; layers are copied.
    pub fn open(weights: &'w Weights) -> Result<Self, ModelError> {
        let config = weights.encoder_config()?;
        let tokenizer = Tokenizer::open(weights)?;
        if tokenizer.vocabulary() > config.vocab {
            let (ids, rows) = (tokenizer.vocabulary(), config.vocab);
            return Err(ModelError::Key {
                path: weights.path().to_owned(),
                key: "vocab_size".to_owned(),
                problem: format!("is {rows}, and the tokenizer has {ids} tokens"),
            });
        }
        // So that a text which is cut keeps a token of its own.
        let around = tokenizer.encode_framed("")?.len();
        if around >= config.tokens_max {
            return Err(ModelError::Key {
                path: weights.path().to_owned(),
                key: "max_seq_length".to_owned(),
                problem: format!("is {}, and the tokenizer puts {around} tokens around every text", config.tokens_max),
            });
        }
        let hidden = config.hidden;
        let embedding = |part: &str, rows| weights.shaped(&format!("embeddings.{part}.weight"), &[rows, hidden]);
        let words = embedding("word_embeddings", config.vocab)?;
        let mut positions = Rows::new(hidden);
        positions.values = embedding("position_embeddings", config.positions)?.dequantise();
        let first_type = &embedding("token_type_embeddings", config.types)?.dequantise()[..hidden];
        let isa = Isa::best();
        (0..config.positions).for_each(|row| add(isa, positions.row_mut(row), first_type));
        let open = Open { weights, config: &config };
        Ok(Self {
            words: Matrix { kind: words.kind, rows: config.vocab, columns: hidden, bytes: words.bytes },
            norm: open.norm("embeddings.LayerNorm")?,
            blocks: (0..config.layers).map(|layer| open.block(layer)).collect::<Result<Vec<_>, ModelError>>()?,
            scratch: Scratch::new(&config),
            positions,
            isa,
            tokenizer,
            config,
        })
    }

    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// What cuts texts into tokens, for other threads than the one that computes.
    pub fn reader(&self) -> Reader {
        Reader { config: self.config.clone(), tokenizer: self.tokenizer.clone() }
    }

    /// See [`Reader::read`].
    pub fn read(&self, text: &str) -> Result<Tokens, ModelError> {
        self.reader().read(text)
    }

    /// The embedding of each text, [`EncoderConfig::hidden`] values. Computes over the threads of the current pool.
    ///
    /// # Panics
    /// If a text has no token, more than [`EncoderConfig::tokens_max`], or one that the vocabulary has not: [`Encoder::read`] gives none of these.
    pub fn encode(&mut self, texts: &[Vec<u32>]) -> Vec<Vec<f32>> {
        let mut made = Vec::with_capacity(texts.len());
        let mut from = 0;
        while from < texts.len() {
            let mut rows = 0;
            let fitting = texts[from..].iter().take_while(|text| {
                rows += text.len();
                rows <= ROWS_MAX
            });
            let to = from + fitting.count().max(1);
            self.batch(&texts[from..to], &mut made);
            from = to;
        }
        made
    }

    fn batch(&mut self, texts: &[Vec<u32>], made: &mut Vec<Vec<f32>>) {
        let mut ranges: Vec<Range<usize>> = Vec::with_capacity(texts.len());
        for text in texts {
            assert!((1..=self.config.tokens_max).contains(&text.len()), "E2: a text of tokens that fit");
            let start = ranges.last().map_or(0, |range| range.end);
            ranges.push(start..start + text.len());
        }
        self.embed(texts);
        for block in &self.blocks {
            block.forward(self.isa, self.config.heads, &ranges, &mut self.scratch);
        }
        made.extend(ranges.into_iter().map(|range| self.pool(range)));
    }

    fn embed(&mut self, texts: &[Vec<u32>]) {
        let Self { scratch: Scratch { hidden, added, .. }, words, positions, .. } = self;
        let rows = texts.iter().map(Vec::len).sum();
        hidden.resize(rows);
        added.resize(rows);
        let places = texts.iter().flat_map(|text| text.iter().enumerate());
        for (row, (position, id)) in places.enumerate() {
            words.kind.dequantise(words.row(*id as usize), hidden.row_mut(row));
            added.row_mut(row).copy_from_slice(positions.row(position));
        }
        self.norm.add(self.isa, hidden, added);
    }

    /// One vector of a text's rows.
    fn pool(&self, rows: Range<usize>) -> Vec<f32> {
        let hidden = &self.scratch.hidden;
        let mut pooled = hidden.row(rows.start).to_vec();
        match self.config.pooling {
            Pooling::First => {}
            Pooling::Mean => {
                let count = rows.len() as f32;
                (rows.start + 1..rows.end).for_each(|row| add(self.isa, &mut pooled, hidden.row(row)));
                pooled.iter_mut().for_each(|value| *value /= count);
            }
        }
        if self.config.normalised {
            // As PyTorch's `normalize`, which gives zeros for zeros. Few values: added in 64 bits, one after the other.
            let square: f64 = pooled.iter().map(|value| f64::from(*value).powi(2)).sum();
            let length = square.sqrt().max(1e-12) as f32;
            pooled.iter_mut().for_each(|value| *value /= length);
        }
        pooled
    }
}

impl Block {
    fn forward(&self, isa: Isa, heads: usize, texts: &[Range<usize>], scratch: &mut Scratch) {
        let Scratch { hidden, query_key_value, attended, intermediate, added } = scratch;
        self.query_key_value.times(isa, hidden, Then::Nothing, query_key_value);
        attend_all(isa, query_key_value, (heads, hidden.width / heads), texts, attended);
        self.attention_output.times(isa, attended, Then::Nothing, added);
        self.attention_norm.add(isa, hidden, added);
        self.intermediate.times(isa, hidden, Then::Gelu, intermediate);
        self.output.times(isa, intermediate, Then::Nothing, added);
        self.norm.add(isa, hidden, added);
    }
}

impl Scratch {
    fn new(config: &EncoderConfig) -> Self {
        let [hidden, attended, added] = [(); 3].map(|()| Rows::new(config.hidden));
        let (query_key_value, intermediate) = (Rows::new(3 * config.hidden), Rows::new(config.ffn));
        Self { hidden, query_key_value, attended, intermediate, added }
    }
}

/// Reads layers.
struct Open<'w, 'c> {
    weights: &'w Weights,
    config: &'c EncoderConfig,
}

impl Open<'_, '_> {
    fn block(&self, layer: usize) -> Result<Block, ModelError> {
        let EncoderConfig { hidden, ffn, .. } = *self.config;
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        let attention = ["query", "key", "value"].map(|part| name(&format!("attention.self.{part}")));
        Ok(Block {
            query_key_value: self.dense(&attention, (hidden, hidden))?,
            attention_output: self.dense(&[name("attention.output.dense")], (hidden, hidden))?,
            attention_norm: self.norm(&name("attention.output.LayerNorm"))?,
            intermediate: self.dense(&[name("intermediate.dense")], (ffn, hidden))?,
            output: self.dense(&[name("output.dense")], (hidden, ffn))?,
            norm: self.norm(&name("output.LayerNorm"))?,
        })
    }

    /// Several layers of the same shape that read the same rows, as one.
    fn dense(&self, names: &[String], (rows, columns): (usize, usize)) -> Result<Dense, ModelError> {
        let (mut weights, mut bias) = (Vec::new(), Vec::new());
        for name in names {
            weights.extend(self.weights.shaped(&format!("{name}.weight"), &[rows, columns])?.dequantise());
            bias.extend(self.weights.shaped(&format!("{name}.bias"), &[rows])?.dequantise());
        }
        Ok(Dense::new(columns, &weights, bias))
    }

    fn norm(&self, name: &str) -> Result<LayerNorm, ModelError> {
        let vector = |part: &str| {
            let raw = self.weights.shaped(&format!("{name}.{part}"), &[self.config.hidden]);
            raw.map(|raw| raw.dequantise())
        };
        Ok(LayerNorm { weight: vector("weight")?, bias: vector("bias")?, epsilon: self.config.epsilon })
    }
}
