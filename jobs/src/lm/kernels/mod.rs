//! Wiring of the CPU kernels: what the layers of a decoder or an encoder are computed with.
//!
//! Results depend on the operands alone: not on the number of threads, of rows that are computed together or of ranks, nor on the processor.

mod activations;
mod attend;
mod attend_all;
mod dot;
mod gelu;
mod isa;
mod layer_norm;
mod matmul;
mod panels;
mod simd;
mod vector;

pub use activations::Rows;
pub use attend::{Attention, Cache, Place, soften};
pub use attend_all::attend_all;
pub use isa::Isa;
pub use layer_norm::LayerNorm;
pub use matmul::Matrix;
pub use panels::{Dense, Then};
pub use vector::{Rotary, add, exp, gate, rms_norm, sum_by_lanes};
