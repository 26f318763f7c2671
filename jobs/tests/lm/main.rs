//! Language models through the public interface, with files that the tests build and with real ones.

mod answer;
mod chat;
mod common;
mod decoder;
mod encoder;
mod engine;
mod gguf;
mod metadata;
mod models;
mod read;
mod safetensors;
mod stages;
mod tokenizer;
