//! The same of Burn's own operations: for devices that are no CPU, for bf16, and what the tests compare with. Of bf16, norms, turns, softmax and loss are
//! computed in f32.

use burn::tensor::activation::{log_softmax, silu, softmax};
use burn::tensor::{Device, Int, Tensor, TensorData};

use super::Heads;
use crate::train::precision::wide;

/// A score that leaves nothing of what is yet to come.
const HIDDEN: f32 = -1e9;

pub(super) fn rms_norm(x: Tensor<2>, scale: Tensor<1>, epsilon: f32) -> Tensor<2> {
    let (dtype, x) = (x.dtype(), wide(x));
    let size = (x.clone().powi_scalar(2).mean_dim(1) + epsilon).sqrt();
    (x / size * wide(scale).unsqueeze()).cast(dtype)
}

pub(super) fn swiglu(x: Tensor<2>) -> Tensor<2> {
    let [rows, both] = x.dims();
    let part = |at: usize| x.clone().slice([0..rows, at * both / 2..(at + 1) * both / 2]);
    silu(part(0)) * part(1)
}

pub(super) fn attention(x: Tensor<2>, heads: &Heads) -> Tensor<2> {
    let [rows, _] = x.dims();
    let Heads { length, heads: queries, kv_heads, size, .. } = *heads;
    let (texts, device, dtype) = (rows / length, x.device(), x.dtype());
    // [texts, heads, length, size]
    let part = |first: usize, count: usize| {
        let part = x.clone().slice([0..rows, first * size..(first + count) * size]);
        part.reshape([texts, length, count, size]).swap_dims(1, 2)
    };
    // Each of the shared ones as often as it is shared.
    let shared = |part: Tensor<4>| {
        let each = queries / kv_heads;
        let part = part.reshape([texts, kv_heads, 1, length * size]).repeat_dim(2, each);
        part.reshape([texts, queries, length, size])
    };
    let [cosines, sines] = angles(heads, &device);
    let turned = |part: Tensor<4>| {
        let [texts, count, ..] = part.dims();
        let part = wide(part);
        let half = |at: usize| part.clone().slice([0..texts, 0..count, 0..length, at * size / 2..(at + 1) * size / 2]);
        let first = half(0) * cosines.clone() - half(1) * sines.clone();
        let second = half(1) * cosines.clone() + half(0) * sines.clone();
        Tensor::cat(vec![first, second], 3).cast(dtype)
    };
    let (keys, values) = (shared(turned(part(queries, kv_heads))), shared(part(queries + kv_heads, kv_heads)));
    let scores = wide(turned(part(0, queries)).matmul(keys.transpose())) * heads.scale() + mask(length, &device);
    softmax(scores, 3).cast(dtype).matmul(values).swap_dims(1, 2).reshape([rows, queries * size])
}

pub(super) fn cross_entropy(logits: Tensor<2>, targets: &[u32]) -> Tensor<1> {
    let device = logits.device();
    let rows = targets.len();
    let targets: Vec<i64> = targets.iter().map(|target| i64::from(*target)).collect();
    let logits = wide(logits);
    let targets = Tensor::<2, Int>::from_data(TensorData::new(targets, [rows, 1]), &device);
    let correct = logits.clone().detach().argmax(1).equal(targets.clone()).float().sum();
    Tensor::cat(vec![log_softmax(logits, 1).gather(1, targets).sum().neg(), correct], 0)
}

/// Cosines and sines of each position, [1, 1, length, size / 2].
fn angles(heads: &Heads, device: &Device) -> [Tensor<4>; 2] {
    let half = heads.size / 2;
    [0, half].map(|first| {
        let of = |position: usize| heads.rotary.angles(position)[first..first + half].iter().copied();
        let values: Vec<f32> = (0..heads.length).flat_map(of).collect();
        Tensor::from_data(TensorData::new(values, [1, 1, heads.length, half]), device)
    })
}

/// [1, 1, length, length]: what is added to the score that a position (row) gives another (column).
fn mask(length: usize, device: &Device) -> Tensor<4> {
    let score = |at: usize| if at % length > at / length { HIDDEN } else { 0.0 };
    let scores: Vec<f32> = (0..length * length).map(score).collect();
    Tensor::from_data(TensorData::new(scores, [1, 1, length, length]), device)
}
