//! What the tests share: where the real models and the golden files are, and GGUF files made by hand, right or wrong.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// The folder of a model that `jobs/models/fetch.py` fetches.
pub fn model(name: &str) -> PathBuf {
    let models = std::env::var_os("STOKE_MODELS").filter(|models| !models.is_empty());
    let models = models
        .map(PathBuf::from)
        .or_else(|| Some(std::env::home_dir()?.join(".cache/stoke/models")))
        .expect("a home folder");
    let folder = models.join(name);
    assert!(folder.is_dir(), "{} is not there: run `python3 jobs/models/fetch.py`, as check.sh does", folder.display());
    folder
}

/// A golden file of `jobs/reference/golden/lm/`.
pub fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/golden/lm").join(name);
    serde_json::from_str(&fs::read_to_string(&path).unwrap_or_else(|cause| panic!("{}: {cause}", path.display())))
        .unwrap()
}

/// Token ids in a golden file.
pub fn ids(json: &Value) -> Vec<u32> {
    serde_json::from_value(json.clone()).expect("a list of ids")
}

/// A GGUF file, each part as it is to be written.
#[derive(Clone)]
pub struct File {
    pub magic: [u8; 4],
    pub version: u32,
    /// Instead of the number of tensors and of keys that there are.
    pub counts: [Option<u64>; 2],
    /// Names with the type and bytes of their values.
    pub keys: Vec<(Vec<u8>, Vec<u8>)>,
    pub tensors: Vec<Tensor>,
    pub alignment: usize,
}

#[derive(Clone)]
pub struct Tensor {
    pub name: Vec<u8>,
    /// Innermost first.
    pub dimensions: Vec<u64>,
    /// ggml's number.
    pub kind: u32,
    pub bytes: Vec<u8>,
    /// Instead of the next aligned one.
    pub offset: Option<u64>,
}

impl File {
    /// A llama of one layer, with a tensor of every kind.
    pub fn small() -> Self {
        let keys = [
            ("general.architecture", string("llama")),
            ("llama.block_count", u32(1)),
            ("llama.context_length", u32(64)),
            ("llama.embedding_length", u32(32)),
            ("llama.feed_forward_length", u32(64)),
            ("llama.attention.head_count", u32(2)),
            ("llama.attention.head_count_kv", u32(1)),
            ("llama.attention.layer_norm_rms_epsilon", f32(1e-5)),
            ("tokenizer.ggml.tokens", array(8, &[&text("a")[..], &text("é"), &text("")])),
            ("tokenizer.ggml.scores", array(6, &[0.5f32.to_le_bytes(), (-1.0f32).to_le_bytes()])),
            ("tokenizer.ggml.token_type", array(5, &[3i32.to_le_bytes(), (-1i32).to_le_bytes()])),
            ("tokenizer.ggml.add_bos_token", typed(7, &[1])),
        ];
        let tensors = [
            ("token_embd.weight", vec![32, 8], 8, 8 * 34),
            ("blk.0.attn_q.weight", vec![32, 32], 2, 32 * 18),
            ("blk.0.attn_k.weight", vec![32, 16], 1, 16 * 64),
            ("blk.0.attn_v.weight", vec![32, 16], 30, 16 * 64),
            ("blk.0.ffn_up.weight", vec![32, 64], 3, 64 * 20),
            ("output_norm.weight", vec![32], 0, 32 * 4),
        ];
        Self {
            magic: *b"GGUF",
            version: 3,
            counts: [None; 2],
            keys: keys.map(|(name, value)| (name.into(), value)).into(),
            tensors: tensors
                .map(|(name, dimensions, kind, bytes)| Tensor {
                    name: name.into(),
                    dimensions,
                    kind,
                    bytes: (0..bytes).map(|byte: u32| byte as u8).collect(),
                    offset: None,
                })
                .into(),
            alignment: 32,
        }
    }

    /// Sets a key, or adds it.
    pub fn key(&mut self, name: &str, value: Vec<u8>) {
        self.keys.retain(|(key, _)| key != name.as_bytes());
        self.keys.push((name.into(), value));
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = [&self.magic[..], &self.version.to_le_bytes()].concat();
        for (told, there) in self.counts.iter().zip([self.tensors.len(), self.keys.len()]) {
            out.extend(told.unwrap_or(there as u64).to_le_bytes());
        }
        for (name, value) in &self.keys {
            out.extend(text(name));
            out.extend(value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            data.resize(data.len().next_multiple_of(self.alignment), 0);
            out.extend(text(&tensor.name));
            out.extend((tensor.dimensions.len() as u32).to_le_bytes());
            out.extend(tensor.dimensions.iter().flat_map(|size| size.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.bytes);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }
}

/// A string after its length.
pub fn text(string: impl AsRef<[u8]>) -> Vec<u8> {
    [&(string.as_ref().len() as u64).to_le_bytes()[..], string.as_ref()].concat()
}

/// A value after its type.
pub fn typed(kind: u32, bytes: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], bytes].concat()
}

pub fn string(value: &str) -> Vec<u8> {
    typed(8, &text(value))
}

pub fn u32(value: u32) -> Vec<u8> {
    typed(4, &value.to_le_bytes())
}

pub fn f32(value: f32) -> Vec<u8> {
    typed(6, &value.to_le_bytes())
}

pub fn array(kind: u32, values: &[impl AsRef<[u8]>]) -> Vec<u8> {
    let head = [&kind.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
    typed(9, &values.iter().fold(head, |all, value| [&all, value.as_ref()].concat()))
}
