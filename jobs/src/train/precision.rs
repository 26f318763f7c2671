//! What lanes compute in, `[train] precision`: a copy of the model that is rounded to bf16, and the casts between both. As PyTorch's FSDP does with
//! `MixedPrecision(param_dtype=bfloat16, reduce_dtype=float32)`: parameters, sums of gradients, the optimizer and checkpoints are f32 whatever lanes compute in.
//!
//! A bf16 has the exponents of an f32 and 8 bits of its 24: nothing under- or overflows that did not, so no loss is scaled; but a sum of many values soon has no
//! room for one more. Products and sums along an axis add in f32 by themselves, on the CPU and on GPUs; what else adds many values is cast to f32 before (`rows`), and so
//! is what loses its digits otherwise (`wide`).

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{FloatDType, Int, Tensor};

/// What the lanes of a job compute in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Floats {
    #[default]
    F32,
    /// Forward and backward, on a copy of the parameters that is rounded to it.
    Bf16,
}

/// The model rounded to bf16, with gradients of its own under the same ids.
pub(crate) fn rounded<M: Module>(model: &M) -> M {
    struct Round;
    impl ModuleMapper for Round {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let (id, weights, mapper) = param.consume();
            let learns = weights.is_require_grad();
            // The inner one: the copy is a leaf, and its gradients end there.
            let weights = Tensor::from_inner(weights.inner().cast(FloatDType::BF16));
            Param::from_mapped_value(id, if learns { weights.require_grad() } else { weights }, mapper)
        }
    }
    model.clone().map(&mut Round)
}

/// As f32; what is, as it is.
pub(crate) fn wide<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.cast(FloatDType::F32)
}

/// These rows of `table`. The gradient of one that is taken many times is a sum of as many, in f32.
pub(crate) fn rows(table: Tensor<2>, at: Tensor<1, Int>) -> Tensor<2> {
    let dtype = table.dtype();
    wide(table).select(0, at).cast(dtype)
}
