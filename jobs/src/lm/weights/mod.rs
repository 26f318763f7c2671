//! Wiring of weights: how values are stored, the two file formats, and one way to read either.

mod files;
pub mod gguf;
mod kind;
mod names;
pub mod safetensors;
mod value;

pub use files::Weights;
pub use gguf::Gguf;
pub use kind::{Kind, Raw, bf16_to_f32, f16_to_f32};
