//! Wiring of language models: weights from files, what they say of the model's shape, and the text that it reads and writes. Compute
//! on the processor; no network, no async.

mod chat;
mod config;
mod decoder;
mod encoder;
pub mod engine;
mod error;
pub mod kernels;
pub mod prompt;
mod sample;
mod tokenizer;
pub mod tree;
pub mod weights;

pub use chat::{ChatTemplate, Message};
pub use config::{DecoderConfig, Rope};
pub use decoder::{Alone, Decoder, Interrupted, Memory, Precision, Share, Sum};
pub use encoder::{Encoder, EncoderConfig, Pooling, Reader, Tokens};
pub use error::ModelError;
pub use sample::{Sampling, likeliest};
pub use tokenizer::{Decoding, TEXT_BYTES_MAX, Tokenizer};
pub use weights::{Gguf, Kind, Raw, Weights};
