//! Wiring of language models: weights from files, and what they say of the model's shape. Compute on the processor; no network, no async.

mod config;
mod decoder;
pub mod engine;
mod error;
pub mod kernels;
mod sample;
pub mod weights;

pub use config::{DecoderConfig, Rope};
pub use decoder::{Decoder, Precision, Scratch};
pub use error::ModelError;
pub use sample::{Sampling, likeliest};
pub use weights::{Gguf, Kind, Raw, Weights};
