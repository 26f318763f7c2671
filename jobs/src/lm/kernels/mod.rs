//! Wiring of the CPU kernels: what a decoder's layers are computed with.
//!
//! Results depend on the operands alone: not on the number of threads, of rows that are computed together or of ranks, nor on the processor.

mod activations;
mod attend;
mod dot;
mod isa;
mod matmul;
mod simd;
mod vector;

pub use activations::Rows;
pub use attend::{Attention, Cache, Place};
pub use isa::Isa;
pub use matmul::Matrix;
pub use vector::{Rotary, add, gate, rms_norm};
