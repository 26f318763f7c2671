//! Layers with first weights that are the same on every rank: what the built-in models are made of, and a user's own may be. Weights are drawn here and not by Burn,
//! whose random numbers come from one generator a process: each parameter has its own generator, keyed by (seed, path),
//! so a parameter starts the same on every rank, whatever else the process has drawn.

use std::cell::Cell;

use burn::module::{Module, Param, ParamId};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::precision::rows;

/// Gives parameters their first values and their ids (1, 2, ... in order of creation: equal on every rank).
pub struct Init<'a> {
    /// None: nothing is drawn.
    seed: Option<u64>,
    device: &'a Device,
    next_id: Cell<u64>,
}

impl<'a> Init<'a> {
    /// `device` is an autodiff device for training, a plain one for inference.
    pub fn new(seed: u64, device: &'a Device) -> Self {
        Init { seed: Some(seed), device, next_id: Cell::new(1) }
    }

    /// Zeros in place of draws, for a model whose weights are put into it.
    pub(crate) fn zeros(device: &'a Device) -> Self {
        Init { seed: None, device, next_id: Cell::new(1) }
    }

    fn generator(&self, path: &str) -> Option<ChaCha8Rng> {
        let mut hasher = blake3::Hasher::new_derive_key("stoke-jobs 2025 first weights");
        hasher.update(&self.seed?.to_le_bytes()).update(path.as_bytes());
        Some(ChaCha8Rng::from_seed(*hasher.finalize().as_bytes()))
    }

    /// `path` names the parameter and keys its draws: give each its own. Uniform in [-bound, bound), from the upper 24 bits of each draw.
    pub fn uniform<const D: usize>(&self, path: &str, shape: [usize; D], bound: f32) -> Param<Tensor<D>> {
        let Some(mut generator) = self.generator(path) else { return self.constant(shape, 0.0) };
        let draw = |_| (((generator.next_u32() >> 8) as f32) / (1 << 23) as f32 - 1.0) * bound;
        self.param((0..shape.iter().product()).map(draw).collect(), shape)
    }

    /// The same value everywhere, e.g. 1 for the scale of a norm.
    pub fn constant<const D: usize>(&self, shape: [usize; D], value: f32) -> Param<Tensor<D>> {
        self.param(vec![value; shape.iter().product()], shape)
    }

    /// Standard normal, by Box and Muller's transform.
    pub fn normal<const D: usize>(&self, path: &str, shape: [usize; D]) -> Param<Tensor<D>> {
        self.normal_of(path, shape, 1.0)
    }

    /// Normal around 0 with this standard deviation.
    pub fn normal_of<const D: usize>(&self, path: &str, shape: [usize; D], deviation: f32) -> Param<Tensor<D>> {
        let Some(mut generator) = self.generator(path) else { return self.constant(shape, 0.0) };
        let mut unit = || (f64::from(generator.next_u32()) + 0.5) / 2f64.powi(32);
        let mut normal = || (-2.0 * unit().ln()).sqrt() * (2.0 * std::f64::consts::PI * unit()).cos();
        let draw = |_| normal() as f32 * deviation;
        self.param((0..shape.iter().product()).map(draw).collect(), shape)
    }

    fn param<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Param<Tensor<D>> {
        let id = self.next_id.replace(self.next_id.get() + 1);
        let tensor = Tensor::<D>::from_data(TensorData::new(values, shape), self.device);
        let tensor = if self.device.is_autodiff() { tensor.require_grad() } else { tensor };
        Param::initialized(ParamId::from(id), tensor)
    }
}

/// `x W + b`. W is [inputs, outputs]: PyTorch's `nn.Linear` keeps its transpose.
#[derive(Module, Debug)]
pub struct Linear {
    weight: Param<Tensor<2>>,
    bias: Param<Tensor<1>>,
}

impl Linear {
    /// Weights and biases uniform in +-1/sqrt(inputs): PyTorch's default for `nn.Linear`, and for a convolution whose
    /// window has `inputs` values.
    pub fn new(init: &Init<'_>, path: &str, inputs: usize, outputs: usize) -> Self {
        let bound = 1.0 / (inputs as f32).sqrt();
        Linear {
            weight: init.uniform(&format!("{path}.weight"), [inputs, outputs], bound),
            bias: init.uniform(&format!("{path}.bias"), [outputs], bound),
        }
    }

    /// [rows, inputs] -> [rows, outputs], in what the weights are.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let weight = self.weight.val();
        x.cast(weight.dtype()).matmul(weight) + self.bias.val().unsqueeze()
    }

    /// A convolution and max-pooling over `count` windows, then relu: [groups * count, inputs] -> [groups, outputs].
    /// The bias is added after the largest value is taken, which gives the same number (rounding keeps order) and
    /// saves a pass over all windows in each direction.
    pub fn forward_largest(&self, windows: Tensor<2>, count: usize) -> Tensor<2> {
        let [rows, _] = windows.dims();
        let [_, outputs] = self.weight.dims();
        let weight = self.weight.val();
        let values = windows.cast(weight.dtype()).matmul(weight).reshape([rows / count, count, outputs]);
        relu(values.max_dim(1).reshape([rows / count, outputs]) + self.bias.val().unsqueeze())
    }
}

/// One learned vector a symbol.
#[derive(Module, Debug)]
pub struct Embedding {
    weight: Param<Tensor<2>>,
}

impl Embedding {
    /// Standard normal: PyTorch's default for `nn.Embedding`.
    pub fn new(init: &Init<'_>, path: &str, symbols: usize, width: usize) -> Self {
        Embedding { weight: init.normal(&format!("{path}.weight"), [symbols, width]) }
    }

    /// [count] symbols -> [count, width]
    pub fn forward(&self, symbols: Tensor<1, Int>) -> Tensor<2> {
        rows(self.weight.val(), symbols)
    }
}
