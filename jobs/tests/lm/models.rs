//! The real models: what their files say, and the values in them.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use stoke_jobs::lm::{DecoderConfig, Kind, ModelError, Rope, Weights};

use crate::common::model;

fn smollm2() -> Weights {
    let file = model("smollm2-135m-instruct").join("SmolLM2-135M-Instruct.Q4_1.gguf");
    Weights::open(&file).expect("the model opens")
}

#[test]
fn smollm2_says_its_shape() {
    assert_eq!(
        smollm2().config().unwrap(),
        DecoderConfig {
            architecture: "llama".into(),
            layers: 30,
            hidden: 576,
            heads: 9,
            kv_heads: 3,
            head_size: 64,
            ffn: 1536,
            vocab: 49_152,
            context: 8_192,
            rms_epsilon: 1e-5,
            rope_base: 100_000.0,
            rope: Rope::Pairs,
            tied_embeddings: true,
            qkv_bias: false,
        }
    );
}

#[test]
fn stages_are_as_equal_in_work_as_layers_allow() {
    let config = smollm2().config().unwrap();
    // The output layer has as many weights as eight layers.
    assert_eq!(config.stages(1).unwrap(), vec![0..30; 1]);
    assert_eq!(config.stages(2).unwrap(), [0..19, 19..30]);
    assert_eq!(config.stages(3).unwrap(), [0..13, 13..25, 25..30]);
    for stages in 1..=30 {
        let cut = config.stages(stages).unwrap();
        assert_eq!((cut.len(), cut[0].start, cut[stages - 1].end), (stages, 0, 30));
        assert!(cut.windows(2).all(|pair| pair[0].end == pair[1].start) && cut.iter().all(|layers| !layers.is_empty()));
    }
    assert_eq!((config.stages(0), config.stages(31)), (None, None));
}

#[test]
fn smollm2_has_every_tensor_in_its_shape() {
    let weights = smollm2();
    let (hidden, kv, ffn) = (576, 192, 1536);
    let mut expected = vec![
        ("model.embed_tokens.weight".to_owned(), vec![49_152, hidden], Kind::Q8_0),
        ("model.norm.weight".to_owned(), vec![hidden], Kind::F32),
    ];
    for layer in 0..30 {
        for (name, shape, kind) in [
            ("input_layernorm", vec![hidden], Kind::F32),
            ("self_attn.q_proj", vec![hidden, hidden], Kind::Q4_1),
            ("self_attn.k_proj", vec![kv, hidden], Kind::Q4_1),
            ("self_attn.v_proj", vec![kv, hidden], Kind::Q4_1),
            ("self_attn.o_proj", vec![hidden, hidden], Kind::Q4_1),
            ("post_attention_layernorm", vec![hidden], Kind::F32),
            ("mlp.gate_proj", vec![ffn, hidden], Kind::Q4_1),
            ("mlp.up_proj", vec![ffn, hidden], Kind::Q4_1),
            ("mlp.down_proj", vec![hidden, ffn], Kind::Q4_1),
        ] {
            expected.push((format!("model.layers.{layer}.{name}.weight"), shape, kind));
        }
    }
    assert_eq!(expected.len(), 272);
    assert_eq!(weights.names().count(), 272);
    for (name, shape, kind) in expected {
        let tensor = weights.shaped(&name, &shape).unwrap();
        assert_eq!(tensor.kind, kind, "{name}");
        assert_eq!(tensor.bytes.len(), tensor.rows() * kind.row_bytes(tensor.row_values()), "{name}");
        assert!(tensor.dequantise().iter().all(|value| value.is_finite()), "{name}");
    }
}

#[test]
fn smollm2_says_its_tokens() {
    let weights = smollm2();
    let gguf = weights.gguf().expect("a GGUF file");
    let tokens = gguf.strings("tokenizer.ggml.tokens").unwrap();
    assert_eq!(tokens.len(), 49_152);
    assert_eq!(tokens[1], "<|im_start|>");
    assert_eq!(gguf.i32s("tokenizer.ggml.token_type").unwrap()[..3], [3, 3, 3]);
    assert_eq!(gguf.u32("tokenizer.ggml.eos_token_id").unwrap(), 2);
    assert!(!gguf.bool("tokenizer.ggml.add_bos_token").unwrap());
    assert_eq!(gguf.optional_f32s("tokenizer.ggml.scores").unwrap(), None);
    let error = gguf.u32("tokenizer.ggml.model").unwrap_err().to_string();
    assert!(error.contains("key tokenizer.ggml.model is a string of 4 bytes, not an integer"), "{error}");
}

#[test]
fn minilm_opens_and_is_no_decoder() {
    let weights = Weights::open(&model("all-minilm-l6-v2")).expect("the model opens");
    let words = weights.shaped("embeddings.word_embeddings.weight", &[30_522, 384]).unwrap();
    assert_eq!(words.kind, Kind::F32);
    let error = weights.config().unwrap_err();
    assert!(matches!(error, ModelError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("architecture \"BertModel\""), "{error}");
    let error = weights.tensor("embeddings.position_ids").unwrap_err().to_string();
    assert!(error.contains("of type I64 is not supported"), "{error}");
}

/// What ggml's own Python package reads from the same bytes: `jobs/reference/dequantise.py`.
#[test]
fn values_are_those_of_ggml() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/golden/dequantise.json");
    let golden: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let every: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for kind in Kind::ALL {
        let blocks = every.len() / kind.block_bytes();
        let mut values = vec![0.0; blocks * kind.block_values()];
        kind.dequantise(&every[..blocks * kind.block_bytes()], &mut values);
        assert_eq!(hash(values), golden["patterns"][kind.name()], "{}", kind.name());
    }
    let weights = smollm2();
    let tensors = golden["smollm2"].as_object().unwrap();
    assert_eq!(tensors.len(), 29);
    for (name, expected) in tensors {
        let tensor = weights.tensor(name).unwrap();
        assert_eq!(
            (json!(tensor.shape), tensor.kind.name()),
            (expected["shape"].clone(), expected["kind"].as_str().unwrap())
        );
        assert_eq!(hash(tensor.dequantise()), expected["blake3"], "{name}");
    }
}

/// Of the values in order; not a number counts as 0, because its bits differ between processors.
fn hash(values: Vec<f32>) -> String {
    let mut hasher = blake3::Hasher::new();
    for value in values {
        hasher.update(&if value.is_nan() { 0.0f32 } else { value }.to_le_bytes());
    }
    hasher.finalize().to_hex().to_string()
}
