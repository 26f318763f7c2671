//! A transformer that predicts the next byte (Vaswani et al., 2017; norms before the blocks, RMS as in Zhang and Sennrich, 2019). First weights come from
//! `Init`, keyed by (seed, path): Burn's own would differ from rank to rank.

use burn::module::{Module, Param};
use burn::tensor::activation::{relu, softmax};
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde::Deserialize;
use stoke_jobs::layers::{Embedding, Init, Linear};
use stoke_jobs::{JobError, Loss, Spec, cross_entropy};

const BYTES: usize = 256;
/// A position begins as the vectors of so many bytes, the last of them its own: what attention would learn in its first thousand steps.
const BEGINNING: usize = 4;
/// Of a byte's vector.
const VECTOR: usize = 32;
/// Of the hidden layer in a block, over the width.
const EXPANSION: usize = 4;
const EPSILON: f32 = 1e-5;
/// A score that leaves nothing of a byte that is yet to come.
const HIDDEN: f32 = -1e9;

/// `[model]`
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Bytes that are looked back at.
    pub context: usize,
    pub width: usize,
    pub heads: usize,
    pub layers: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { context: 64, width: 96, heads: 4, layers: 2 }
    }
}

impl Config {
    pub fn check(&self, spec: &Spec<'_>) -> Result<(), JobError> {
        let sizes = [("context", self.context, 4096), ("width", self.width, 4096), ("layers", self.layers, 64)];
        if let Some((key, _, max)) = sizes.iter().find(|(_, size, max)| size == &0 || size > max) {
            let mend = format!("write a number from 1 to {max}");
            return Err(spec.mistake("model", key, &format!("{key} is out of range"), &mend));
        }
        if self.heads == 0 || !self.width.is_multiple_of(self.heads) {
            let mend = format!("write a divisor of width = {}", self.width);
            return Err(spec.mistake("model", "heads", "heads does not divide width", &mend));
        }
        Ok(())
    }
}

#[derive(Module, Debug)]
pub struct Net {
    bytes: Embedding,
    beginning: Linear,
    positions: Param<Tensor<2>>,
    blocks: Vec<Block>,
    norm: Norm,
    head: Linear,
}

#[derive(Module, Debug)]
struct Block {
    attention_norm: Norm,
    qkv: Linear,
    out: Linear,
    hidden_norm: Norm,
    up: Linear,
    down: Linear,
}

#[derive(Module, Debug)]
struct Norm {
    scale: Param<Tensor<1>>,
}

impl Net {
    pub fn new(init: &Init<'_>, config: &Config) -> Self {
        let (width, hidden) = (config.width, EXPANSION * config.width);
        let block = |at: usize| {
            let linear =
                |name: &str, inputs, outputs| Linear::new(init, &format!("blocks.{at}.{name}"), inputs, outputs);
            Block {
                attention_norm: Norm::new(init, width),
                qkv: linear("qkv", width, 3 * width),
                out: linear("out", width, width),
                hidden_norm: Norm::new(init, width),
                up: linear("up", width, hidden),
                down: linear("down", hidden, width),
            }
        };
        Self {
            bytes: Embedding::new(init, "bytes", BYTES, VECTOR),
            beginning: Linear::new(init, "beginning", BEGINNING * VECTOR, width),
            positions: init.uniform("positions", [config.context, width], 1.0),
            blocks: (0..config.layers).map(block).collect(),
            norm: Norm::new(init, width),
            head: Linear::new(init, "head", width, BYTES),
        }
    }

    /// Summed over windows (each `length + 1` bytes) and over the `length` bytes that are predicted of each.
    pub fn loss(&self, config: &Config, windows: &[&[u8]], device: &Device) -> Loss {
        let inputs: Vec<&[u8]> = windows.iter().map(|window| &window[..window.len() - 1]).collect();
        let targets: Vec<u8> = windows.iter().flat_map(|window| &window[1..]).copied().collect();
        cross_entropy(self.forward(config, &inputs, device), &targets)
    }

    /// Logits [rows * length, 256] of the bytes that follow each byte of each row. All rows have one length, of at most the context.
    pub fn forward<'a>(&self, config: &Config, rows: &[&'a [u8]], device: &Device) -> Tensor<2> {
        let (count, length, width) = (rows.len(), rows[0].len(), config.width);
        // Before the first byte of a row are zeros.
        let byte = |row: &[u8], at: usize, back: usize| at.checked_sub(back).map_or(0, |at| i32::from(row[at]));
        let grams = |row: &'a [u8]| (0..length).flat_map(move |at| (0..BEGINNING).map(move |back| byte(row, at, back)));
        let bytes: Vec<i32> = rows.iter().flat_map(|row| grams(row)).collect();
        let bytes = Tensor::<1, Int>::from_data(TensorData::new(bytes, [count * length * BEGINNING]), device);
        let bytes = self.bytes.forward(bytes).reshape([count * length, BEGINNING * VECTOR]);
        let positions = self.positions.val().slice([0..length, 0..width]).unsqueeze::<3>();
        let mut x = (self.beginning.forward(bytes).reshape([count, length, width]) + positions)
            .reshape([count * length, width]);
        let mask = mask(length, device);
        for block in &self.blocks {
            x = block.forward(x, (count, length, config.heads), &mask);
        }
        self.head.forward(self.norm.forward(x))
    }
}

impl Block {
    /// [rows * length, width] -> the same
    fn forward(&self, x: Tensor<2>, (rows, length, heads): (usize, usize, usize), mask: &Tensor<4>) -> Tensor<2> {
        let [all, width] = x.dims();
        let qkv = self.qkv.forward(self.attention_norm.forward(x.clone()));
        let part = |at: usize| {
            let part = qkv.clone().slice([0..all, at * width..(at + 1) * width]);
            part.reshape([rows, length, heads, width / heads]).swap_dims(1, 2)
        };
        let scale = ((width / heads) as f32).sqrt();
        let scores = part(0).matmul(part(1).transpose()) / scale + mask.clone();
        let mixed = softmax(scores, 3).matmul(part(2)).swap_dims(1, 2).reshape([all, width]);
        let x = x + self.out.forward(mixed);
        let hidden = relu(self.up.forward(self.hidden_norm.forward(x.clone())));
        x + self.down.forward(hidden)
    }
}

impl Norm {
    fn new(init: &Init<'_>, width: usize) -> Self {
        Self { scale: init.constant([width], 1.0) }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let size = (x.clone().powi_scalar(2).mean_dim(1) + EPSILON).sqrt();
        x / size * self.scale.val().unsqueeze()
    }
}

/// [1, 1, length, length]: what is added to the score that a byte (row) gives another (column).
fn mask(length: usize, device: &Device) -> Tensor<4> {
    let score = |at: usize| if at % length > at / length { HIDDEN } else { 0.0 };
    let scores: Vec<f32> = (0..length * length).map(score).collect();
    Tensor::from_data(TensorData::new(scores, [1, 1, length, length]), device)
}
