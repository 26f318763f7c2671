//! Small GGUF files with nothing but metadata, and folders with a tokenizer: what tests of tokenizers and templates open.

use std::fs;

use serde_json::{Value, json};
use stoke_jobs::lm::{ModelError, Tokenizer, Weights};
use tempfile::TempDir;

use crate::common::{File, string, text, typed, u32};

/// A file without tensors, and the vocabulary in it.
#[derive(Clone)]
pub struct Metadata {
    file: File,
    tokens: Vec<String>,
    types: Vec<i32>,
    merges: Vec<String>,
}

/// As `common::array`, for the many values of a real vocabulary.
fn array(kind: u32, values: &[Vec<u8>]) -> Vec<u8> {
    typed(9, &[&kind.to_le_bytes()[..], &(values.len() as u64).to_le_bytes(), &values.concat()].concat())
}

impl Metadata {
    /// A byte-level vocabulary.
    pub fn new(tokens: &[&str], types: &[i32], merges: &[&str]) -> Self {
        let texts = |texts: &[&str]| texts.iter().map(text).collect::<Vec<_>>();
        let kinds: Vec<Vec<u8>> = types.iter().map(|kind| kind.to_le_bytes().to_vec()).collect();
        let owned = |texts: &[&str]| texts.iter().map(|one| (*one).to_owned()).collect();
        let file = File { keys: Vec::new(), tensors: Vec::new(), ..File::small() };
        Self { file, tokens: owned(tokens), types: types.to_vec(), merges: owned(merges) }
            .string("general.architecture", "llama")
            .string("tokenizer.ggml.model", "gpt2")
            .key("tokenizer.ggml.tokens", array(8, &texts(tokens)))
            .key("tokenizer.ggml.token_type", array(5, &kinds))
            .key("tokenizer.ggml.merges", array(8, &texts(merges)))
    }

    pub fn string(self, name: &str, value: &str) -> Self {
        self.key(name, string(value))
    }

    pub fn u32(self, name: &str, value: u32) -> Self {
        self.key(name, u32(value))
    }

    pub fn bool(self, name: &str, value: bool) -> Self {
        self.key(name, typed(7, &[u8::from(value)]))
    }

    pub fn without(mut self, name: &str) -> Self {
        self.file.keys.retain(|(key, _)| key != name.as_bytes());
        self
    }

    /// Opens it as a file.
    pub fn weights(&self) -> Weights {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("small.gguf");
        fs::write(&file, self.file.bytes()).unwrap();
        Weights::open(&file).expect("the file is sound")
    }

    pub fn tokenizer(&self) -> Result<Tokenizer, ModelError> {
        Tokenizer::open(&self.weights())
    }

    /// The same vocabulary as a `tokenizer.json`, cut as SmolLM2 cuts.
    pub fn tokenizer_json(&self) -> Value {
        let numbered = self.tokens.iter().zip(&self.types).zip(0u32..);
        let added: Vec<Value> = numbered
            .clone()
            .filter(|((_, kind), _)| **kind != 1)
            .map(|((token, kind), id)| {
                json!({"id": id, "content": token, "special": *kind == 3, "normalized": false,
                    "single_word": false, "lstrip": false, "rstrip": false})
            })
            .collect();
        let vocabulary: serde_json::Map<String, Value> =
            numbered.map(|((token, _), id)| (token.clone(), json!(id))).collect();
        let merges: Vec<[&str; 2]> = self.merges.iter().map(|merge| merge.split_once(' ').unwrap().into()).collect();
        let byte_level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
        json!({
            "version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": null, "added_tokens": added, "normalizer": null,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level(true)]},
            "post_processor": null, "decoder": byte_level(true),
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": merges},
        })
    }

    fn key(mut self, name: &str, value: Vec<u8>) -> Self {
        self.file.key(name, value);
        self
    }
}

/// A folder of a model with one tensor, this tokenizer and this `config.json`.
pub fn folder(tokenizer: &Value, config: &Value) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: Vec<u8>| fs::write(folder.path().join(name), bytes).unwrap();
    let value = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &[0; 4]).unwrap();
    write("model.safetensors", safetensors::serialize([("model.norm.weight", value)], None).unwrap());
    write("tokenizer.json", tokenizer.to_string().into_bytes());
    write("config.json", config.to_string().into_bytes());
    folder
}
