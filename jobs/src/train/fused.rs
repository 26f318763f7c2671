//! Layers of a decoder that Burn composes of many passes over memory, as one pass each: norm, gate, attention and loss, forward and backward. On the CPU and in f32 only;
//! otherwise, and in the tests of these, the same is composed of Burn's own operations (`composed`).
//!
//! K7: a result depends on the operands alone, not on the number of threads: work is cut by rows, and sums over rows are added in the order of fixed chunks.

mod attention;
mod composed;
mod cross_entropy;
mod linear;
mod norm;
mod product;
mod swiglu;
pub(crate) mod tap;

use std::sync::Arc;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::lm::Rope;
use crate::lm::kernels::Rotary;

/// Rows that one thread takes at a time.
const ROWS: usize = 64;

/// How queries, keys and values stand in a row, and how they attend: a row is `[heads + 2 * kv_heads][size]`, queries first.
#[derive(Debug, Clone)]
pub(crate) struct Heads {
    /// Rows of a text: each attends to those of its own text up to itself.
    pub length: usize,
    pub heads: usize,
    /// Divides `heads`: consecutive queries share keys and values.
    pub kv_heads: usize,
    pub size: usize,
    rotary: Arc<Rotary>,
}

impl Heads {
    pub fn new(length: usize, (heads, kv_heads, size): (usize, usize, usize), rope_base: f32) -> Self {
        Self { length, heads, kv_heads, size, rotary: Arc::new(Rotary::new(Rope::Halves, (size, rope_base), length)) }
    }

    /// Of scores.
    fn scale(&self) -> f32 {
        1.0 / (self.size as f32).sqrt()
    }

    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.size
    }
}

/// What the loss is of: the index of the right logit of each row.
pub(crate) type Targets = Arc<Vec<u32>>;

/// x / sqrt(mean(x^2) + epsilon) * scale of each row (Zhang and Sennrich 2019). `x` is [rows, width], `scale` [width].
pub(crate) fn rms_norm(x: Tensor<2>, scale: Tensor<1>, epsilon: f32) -> Tensor<2> {
    match is_fused(&x) {
        true => Tensor::from_dispatch(<Dispatch as Fused>::rms_norm(x.into_dispatch(), scale.into_dispatch(), epsilon)),
        false => composed::rms_norm(x, scale, epsilon),
    }
}

/// `x` [rows, inner] times `weight` [inner, columns]; where it is `turned`, `weight` is [columns, inner].
pub(crate) fn product(x: Tensor<2>, weight: Tensor<2>, turned: bool) -> Tensor<2> {
    match (is_fused(&x), turned) {
        (true, _) => {
            Tensor::from_dispatch(<Dispatch as Fused>::product(x.into_dispatch(), weight.into_dispatch(), turned))
        }
        (false, false) => x.matmul(weight),
        (false, true) => x.matmul(weight.transpose()),
    }
}

/// silu(gate) * up of rows that are `gate`, then `up` (Shazeer 2020): [rows, 2 * width] to [rows, width].
pub(crate) fn swiglu(x: Tensor<2>) -> Tensor<2> {
    match is_fused(&x) {
        true => Tensor::from_dispatch(<Dispatch as Fused>::swiglu(x.into_dispatch())),
        false => composed::swiglu(x),
    }
}

/// Causal attention with rotary embeddings (Vaswani et al. 2017; Su et al. 2021), scaled by 1 / sqrt(size): [rows, (heads + 2 * kv_heads) * size] to
/// [rows, heads * size].
pub(crate) fn attention(x: Tensor<2>, heads: &Heads) -> Tensor<2> {
    match is_fused(&x) {
        true => Tensor::from_dispatch(<Dispatch as Fused>::attention(x.into_dispatch(), heads.clone())),
        false => composed::attention(x, heads),
    }
}

/// The sum over rows of -ln softmax(logits)[target], and how many rows have their largest logit there: [rows, classes] to [2].
/// Only the sum has a gradient.
pub(crate) fn cross_entropy(logits: Tensor<2>, targets: Vec<u32>) -> Tensor<1> {
    match is_fused(&logits) {
        true => {
            let logits = logits.into_dispatch();
            Tensor::from_dispatch(<Dispatch as Fused>::cross_entropy(logits, Arc::new(targets)))
        }
        false => composed::cross_entropy(logits, &targets),
    }
}

/// Names the parameter with this place in the layout to the [`tap`] of this thread.
pub(crate) fn watch<const D: usize>(parameter: Tensor<D>, place: usize) {
    if is_on_flex(&parameter) {
        let _ = <Dispatch as Fused>::watch(parameter.into_dispatch(), place);
    }
}

fn is_fused(x: &Tensor<2>) -> bool {
    x.dtype() == DType::F32 && is_on_flex(x)
}

fn is_on_flex<const D: usize>(x: &Tensor<D>) -> bool {
    x.device().without_autodiff() == Device::flex()
}

/// What Burn dispatches.
#[backend_extension(Flex, Autodiff)]
pub trait Fused: Backend {
    fn rms_norm(x: FloatTensor<Self>, scale: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self>;
    fn product(x: FloatTensor<Self>, weight: FloatTensor<Self>, turned: bool) -> FloatTensor<Self>;
    fn swiglu(x: FloatTensor<Self>) -> FloatTensor<Self>;
    fn attention(x: FloatTensor<Self>, heads: Heads) -> FloatTensor<Self>;
    fn cross_entropy(logits: FloatTensor<Self>, targets: Targets) -> FloatTensor<Self>;
    /// The parameter as it is.
    fn watch(parameter: FloatTensor<Self>, place: usize) -> FloatTensor<Self>;
}

/// What it is computed by.
pub trait Kernels: Backend {
    fn rms_norm_gradients(
        x: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        epsilon: f32,
        gradient: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 2];
    fn product_gradient_of_x(weight: FloatTensor<Self>, turned: bool, gradient: FloatTensor<Self>)
    -> FloatTensor<Self>;
    fn product_gradient_of_weight(x: FloatTensor<Self>, turned: bool, gradient: FloatTensor<Self>)
    -> FloatTensor<Self>;
    fn swiglu_gradient(x: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self>;
    /// The result, and of each row and head the logarithm of the sum that its weights were divided by.
    fn attention_with_sums(x: FloatTensor<Self>, heads: &Heads) -> [FloatTensor<Self>; 2];
    fn attention_gradient(
        x: FloatTensor<Self>,
        results: [FloatTensor<Self>; 2],
        heads: &Heads,
        gradient: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
    /// The result, and the gradient of its sum.
    fn cross_entropy_with_gradient(logits: FloatTensor<Self>, targets: &[u32]) -> [FloatTensor<Self>; 2];
    /// `x` times the first value of `factor`.
    fn times_first(x: FloatTensor<Self>, factor: FloatTensor<Self>) -> FloatTensor<Self>;
    fn into_data(x: FloatTensor<Self>) -> TensorData;
}

type Values = FloatTensor<Flex>;

/// The values of a tensor that `contiguous` has given.
fn values(tensor: &Values) -> &[f32] {
    tensor.as_slice().expect("parameters and activations on the CPU are f32")
}

fn contiguous(tensor: Values) -> Values {
    tensor.to_contiguous()
}

fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Values {
    Values::from_data(TensorData::new(values, shape))
}

/// Inputs and outputs of a weight.
fn sizes(weight: &Values, turned: bool) -> (usize, usize) {
    let shape = weight.layout().shape();
    if turned { (shape[1], shape[0]) } else { (shape[0], shape[1]) }
}

fn last_size(tensor: &Values) -> usize {
    tensor.layout().shape().num_dims().checked_sub(1).map_or(1, |last| tensor.layout().shape()[last])
}

impl Fused for Flex {
    fn rms_norm(x: Values, scale: Values, epsilon: f32) -> Values {
        let (x, scale) = (contiguous(x), contiguous(scale));
        let width = last_size(&x);
        let out = norm::forward(values(&x), values(&scale), epsilon);
        tensor(out, [values(&x).len() / width, width])
    }

    fn product(x: Values, weight: Values, turned: bool) -> Values {
        let (x, weight) = (contiguous(x), contiguous(weight));
        let size = sizes(&weight, turned);
        let out = linear::forward(values(&x), values(&weight), size, turned);
        tensor(out, [values(&x).len() / size.0, size.1])
    }

    fn swiglu(x: Values) -> Values {
        let x = contiguous(x);
        let width = last_size(&x) / 2;
        tensor(swiglu::forward(values(&x), width), [values(&x).len() / (2 * width), width])
    }

    fn attention(x: Values, heads: Heads) -> Values {
        let [out, _] = Self::attention_with_sums(x, &heads);
        out
    }

    fn cross_entropy(logits: Values, targets: Targets) -> Values {
        let [out, _] = Self::cross_entropy_with_gradient(logits, &targets);
        out
    }

    fn watch(parameter: Values, _: usize) -> Values {
        parameter
    }
}

impl Kernels for Flex {
    fn rms_norm_gradients(x: Values, scale: Values, epsilon: f32, gradient: Values) -> [Values; 2] {
        let (x, scale, gradient) = (contiguous(x), contiguous(scale), contiguous(gradient));
        let width = last_size(&x);
        let (dx, dscale) = norm::backward(values(&x), values(&scale), epsilon, values(&gradient));
        [tensor(dx, [values(&x).len() / width, width]), tensor(dscale, [width])]
    }

    fn product_gradient_of_x(weight: Values, turned: bool, gradient: Values) -> Values {
        let (weight, gradient) = (contiguous(weight), contiguous(gradient));
        let size = sizes(&weight, turned);
        let dx = linear::of_x(values(&gradient), values(&weight), size, turned);
        tensor(dx, [values(&gradient).len() / size.1, size.0])
    }

    fn product_gradient_of_weight(x: Values, turned: bool, gradient: Values) -> Values {
        let (x, gradient) = (contiguous(x), contiguous(gradient));
        let size = (last_size(&x), last_size(&gradient));
        let dweight = linear::of_weight(values(&x), values(&gradient), size, turned);
        tensor(dweight, if turned { [size.1, size.0] } else { [size.0, size.1] })
    }

    fn swiglu_gradient(x: Values, gradient: Values) -> Values {
        let (x, gradient) = (contiguous(x), contiguous(gradient));
        let width = last_size(&gradient);
        tensor(swiglu::backward(values(&x), values(&gradient), width), [values(&x).len() / (2 * width), 2 * width])
    }

    fn attention_with_sums(x: Values, heads: &Heads) -> [Values; 2] {
        let x = contiguous(x);
        let rows = values(&x).len() / heads.width();
        let (out, sums) = attention::forward(values(&x), heads);
        [tensor(out, [rows, heads.heads * heads.size]), tensor(sums, [rows, heads.heads])]
    }

    fn attention_gradient(x: Values, results: [Values; 2], heads: &Heads, gradient: Values) -> Values {
        let (x, gradient) = (contiguous(x), contiguous(gradient));
        let [out, sums] = &results;
        let dx = attention::backward(values(&x), (values(out), values(sums)), heads, values(&gradient));
        let rows = dx.len() / heads.width();
        tensor(dx, [rows, heads.width()])
    }

    fn cross_entropy_with_gradient(logits: Values, targets: &[u32]) -> [Values; 2] {
        let logits = contiguous(logits);
        let classes = last_size(&logits);
        let (loss, correct, gradient) = cross_entropy::forward(values(&logits), targets, classes);
        [tensor(vec![loss, correct], [2]), tensor(gradient, [targets.len(), classes])]
    }

    fn times_first(x: Values, factor: Values) -> Values {
        let factor = values(&contiguous(factor))[0];
        let mut x = x;
        if factor != 1.0 {
            x.storage_mut::<f32>().iter_mut().for_each(|value| *value *= factor);
        }
        x
    }

    fn into_data(x: Values) -> TensorData {
        x.into_data()
    }
}

#[derive(Debug)]
struct RmsNorm;

#[derive(Debug)]
struct Product;

#[derive(Debug)]
struct Swiglu;

#[derive(Debug)]
struct Attention;

#[derive(Debug)]
struct CrossEntropy;

impl<B: Kernels> Backward<B, 2> for RmsNorm {
    type State = (FloatTensor<B>, FloatTensor<B>, f32);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let (x, scale, epsilon) = ops.state;
        let [of_x, of_scale] = B::rms_norm_gradients(x, scale, epsilon, gradient);
        let [x_node, scale_node] = ops.parents;
        if let Some(node) = scale_node {
            give::<B>(node.id, of_scale, grads);
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, of_x);
        }
    }
}

impl<B: Kernels> Backward<B, 2> for Product {
    type State = (FloatTensor<B>, FloatTensor<B>, bool);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let ((x, weight, turned), [x_node, weight_node]) = (ops.state, ops.parents);
        if let Some(node) = weight_node {
            give::<B>(node.id, B::product_gradient_of_weight(x, turned, gradient.clone()), grads);
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::product_gradient_of_x(weight, turned, gradient));
        }
    }
}

/// The gradient of a weight: on its way if somebody waits for it, or registered.
fn give<B: Kernels>(weight: NodeId, gradient: FloatTensor<B>, grads: &mut Gradients) {
    match tap::place(weight.value) {
        // The buffer moves out: nobody else has it.
        Some(place) => tap::give(place, B::into_data(gradient)),
        None => grads.register::<B>(weight, gradient),
    }
}

impl<B: Kernels> Backward<B, 1> for Swiglu {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        if let [Some(parent)] = ops.parents {
            grads.register::<B>(parent.id, B::swiglu_gradient(ops.state, gradient));
        }
    }
}

impl<B: Kernels> Backward<B, 1> for Attention {
    type State = (FloatTensor<B>, [FloatTensor<B>; 2], Heads);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        if let [Some(parent)] = ops.parents {
            let (x, results, heads) = ops.state;
            grads.register::<B>(parent.id, B::attention_gradient(x, results, &heads, gradient));
        }
    }
}

impl<B: Kernels> Backward<B, 1> for CrossEntropy {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        if let [Some(parent)] = ops.parents {
            grads.register::<B>(parent.id, B::times_first(ops.state, gradient));
        }
    }
}

impl<B: Fused + Kernels, C: CheckpointStrategy> Fused for Autodiff<B, C> {
    fn rms_norm(x: FloatTensor<Self>, scale: FloatTensor<Self>, epsilon: f32) -> FloatTensor<Self> {
        let (inner, inner_scale) = (x.primitive().clone(), scale.primitive().clone());
        let out = B::rms_norm(inner.clone(), inner_scale.clone(), epsilon);
        match RmsNorm.prepare::<C>([x.node(), scale.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish((inner, inner_scale, epsilon), out),
            OpsKind::UnTracked(prepared) => prepared.finish(out),
        }
    }

    fn product(x: FloatTensor<Self>, weight: FloatTensor<Self>, turned: bool) -> FloatTensor<Self> {
        let (inner, inner_weight) = (x.primitive().clone(), weight.primitive().clone());
        let out = B::product(inner.clone(), inner_weight.clone(), turned);
        match Product.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish((inner, inner_weight, turned), out),
            OpsKind::UnTracked(prepared) => prepared.finish(out),
        }
    }

    fn swiglu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let inner = x.primitive().clone();
        let out = B::swiglu(inner.clone());
        match Swiglu.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish(inner, out),
            OpsKind::UnTracked(prepared) => prepared.finish(out),
        }
    }

    fn attention(x: FloatTensor<Self>, heads: Heads) -> FloatTensor<Self> {
        let inner = x.primitive().clone();
        let [out, sums] = B::attention_with_sums(inner.clone(), &heads);
        match Attention.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish((inner, [out.clone(), sums], heads), out),
            OpsKind::UnTracked(prepared) => prepared.finish(out),
        }
    }

    fn cross_entropy(logits: FloatTensor<Self>, targets: Targets) -> FloatTensor<Self> {
        let [out, gradient] = B::cross_entropy_with_gradient(logits.primitive().clone(), &targets);
        match CrossEntropy.prepare::<C>([logits.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish(gradient, out),
            OpsKind::UnTracked(prepared) => prepared.finish(out),
        }
    }

    fn watch(parameter: FloatTensor<Self>, place: usize) -> FloatTensor<Self> {
        tap::watch(parameter.id().value, place);
        parameter
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor, TensorData};
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{RngCore, SeedableRng};

    use super::*;

    fn normal<const D: usize>(seed: u64, shape: [usize; D]) -> Tensor<D> {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let mut value = |_| (0..4).map(|_| generator.next_u32() as f32 / 2f32.powi(31) - 1.0).sum::<f32>();
        let values: Vec<f32> = (0..shape.iter().product()).map(&mut value).collect();
        Tensor::from_data(TensorData::new(values, shape), &Device::flex().autodiff()).require_grad()
    }

    fn bits<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_into_vec().expect("f32")
    }

    /// What a function gives, and the gradient of its input where that of its result is random.
    fn with_gradient<const R: usize>(x: &Tensor<2>, of: impl Fn(Tensor<2>) -> Tensor<R>) -> [Vec<f32>; 2] {
        let out = of(x.clone());
        let weights = normal(7, out.dims()).detach();
        let gradients = (out.clone() * weights).sum().backward();
        [bits(out.inner()), bits(x.grad(&gradients).expect("a gradient"))]
    }

    #[track_caller]
    fn close(ours: &[Vec<f32>; 2], theirs: &[Vec<f32>; 2]) {
        for (ours, theirs) in ours.iter().zip(theirs) {
            assert_eq!(ours.len(), theirs.len());
            let largest = theirs.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            let error = ours.iter().zip(theirs).fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
            assert!(error < 2e-6 * largest, "{error} of {largest}");
        }
    }

    #[test]
    fn fused_layers_are_those_that_burn_composes() {
        for rows in [1, 3, 130] {
            let (x, scale) = (normal(1, [rows, 40]), normal(2, [40]).detach());
            let ours = with_gradient(&x, |x| rms_norm(x, scale.clone(), 1e-5));
            close(&ours, &with_gradient(&x, |x| composed::rms_norm(x, scale.clone(), 1e-5)));
            close(&with_gradient(&x, swiglu), &with_gradient(&x, composed::swiglu));
        }
    }

    #[test]
    fn products_and_their_gradients_are_those_of_burn() {
        let (x, weight) = (normal(1, [130, 40]), normal(2, [40, 24]));
        let fixed = |tensor: &Tensor<2>| tensor.clone().detach();
        for turned in [false, true] {
            let stood = |weight: Tensor<2>| if turned { weight.transpose() } else { weight };
            let given = fixed(&stood(weight.clone()));
            let ours = with_gradient(&x, |x| product(x, given.clone(), turned));
            close(&ours, &with_gradient(&x, |x| x.matmul(fixed(&weight))));
            // Turned twice, so that the gradients of both stand alike.
            let ours = with_gradient(&weight, |weight| product(fixed(&x), stood(weight), turned));
            close(&ours, &with_gradient(&weight, |weight| fixed(&x).matmul(weight)));
        }
    }

    #[test]
    fn the_scale_of_a_norm_has_its_gradient() {
        let (x, scale) = (normal(1, [130, 40]).detach(), normal(2, [1, 40]));
        let flat = |scale: Tensor<2>| scale.reshape([40]);
        let ours = with_gradient(&scale, |scale| rms_norm(x.clone(), flat(scale), 1e-5));
        close(&ours, &with_gradient(&scale, |scale| composed::rms_norm(x.clone(), flat(scale), 1e-5)));
    }

    #[test]
    fn fused_attention_is_the_one_that_burn_composes() {
        for (texts, length, heads) in [(1, 1, (1, 1, 2)), (3, 5, (4, 2, 6)), (2, 130, (2, 2, 16)), (2, 64, (6, 2, 8))] {
            let heads = Heads::new(length, heads, 10_000.0);
            let x = normal(3, [texts * length, heads.width()]);
            close(&with_gradient(&x, |x| attention(x, &heads)), &with_gradient(&x, |x| composed::attention(x, &heads)));
        }
    }

    #[test]
    fn the_fused_loss_is_the_one_that_burn_composes() {
        let x = normal(4, [130, 37]);
        let targets: Vec<u32> = (0..130).map(|row| row * 5 % 37).collect();
        let sum = |out: Tensor<1>| out.narrow(0, 0, 1);
        let ours = with_gradient(&x, |x| sum(cross_entropy(x, targets.clone())));
        close(&ours, &with_gradient(&x, |x| sum(composed::cross_entropy(x, &targets))));
        let correct = |out: Tensor<1>| bits(out.inner())[1];
        let ours = correct(cross_entropy(x.clone(), targets.clone()));
        assert!(ours > 0.0 && ours == correct(composed::cross_entropy(x, &targets)), "{ours}");
    }

    #[test]
    fn results_have_the_same_bits_on_any_number_of_threads() {
        let heads = Heads::new(33, (4, 2, 8), 10_000.0);
        let scale = normal(2, [64]);
        let all = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| {
                let x = normal(5, [33 * 8, 64]);
                let attended = with_gradient(&x, |x| attention(x, &heads));
                let normed = with_gradient(&x, |x| rms_norm(x, scale.clone(), 1e-5));
                let lost = with_gradient(&x, |x| cross_entropy(x, vec![3; 33 * 8]).narrow(0, 0, 1));
                let weight = normal(6, [64, 700]).detach();
                let multiplied = with_gradient(&x, |x| product(x, weight.clone(), false));
                [attended, normed, lost, multiplied, with_gradient(&x, swiglu)]
            })
        };
        let one = all(1);
        assert!([2, 5].into_iter().all(|threads| all(threads) == one));
    }
}
