//! Wiring of language models: weights from files, and what they say of the model's shape. Compute on the processor; no network, no async.

mod config;
mod error;
pub mod weights;

pub use config::{DecoderConfig, Rope};
pub use error::ModelError;
pub use weights::{Gguf, Kind, Raw, Weights};
