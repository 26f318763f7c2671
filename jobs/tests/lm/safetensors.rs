//! Folders of safetensors files, sound and damaged, and what `config.json` may say.

use std::fs;
use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use stoke_jobs::lm::{DecoderConfig, Kind, ModelError, Rope, Weights};
use tempfile::TempDir;

use crate::read;

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "torch_dtype": "bfloat16",
    })
}

/// A shard of named tensors, each of 2 x 3 values.
fn shard(tensors: &[(&str, Dtype)]) -> Vec<u8> {
    let bytes: Vec<u8> = (0..48).collect();
    let views = tensors.iter().map(|(name, kind)| {
        (name.to_string(), TensorView::new(*kind, vec![2, 3], &bytes[..6 * kind.bitsize() / 8]).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// A file of a header and some bytes after it.
fn raw(header: &str, bytes: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; bytes]].concat()
}

fn folder(files: &[(&str, Vec<u8>)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn config() -> (&'static str, Vec<u8>) {
    ("config.json", llama().to_string().into_bytes())
}

fn index(map: Value) -> (&'static str, Vec<u8>) {
    ("model.safetensors.index.json", json!({ "metadata": {}, "weight_map": map }).to_string().into_bytes())
}

#[test]
fn a_folder_of_one_file_reads_as_it_was_written() {
    let file = shard(&[("a", Dtype::F32), ("b", Dtype::F16), ("c", Dtype::BF16), ("d", Dtype::I64)]);
    let folder = folder(&[config(), ("model.safetensors", file)]);
    let weights = Weights::open(folder.path()).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b", "c", "d"]);
    assert!(weights.gguf().is_none() && weights.contains("d") && !weights.contains("e"));
    assert_eq!((weights.path(), weights.config().unwrap().layers), (folder.path(), 2));
    for (name, kind) in [("a", Kind::F32), ("b", Kind::F16), ("c", Kind::Bf16)] {
        let tensor = weights.shaped(name, &[2, 3]).unwrap();
        assert_eq!((tensor.kind, tensor.rows(), tensor.row_values()), (kind, 2, 3));
        assert!(tensor.bytes.iter().copied().eq(0..6 * kind.block_bytes() as u8));
        assert_eq!(tensor.dequantise().len(), 6);
    }
    let error = weights.tensor("d").unwrap_err().to_string();
    assert!(error.contains("tensor \"d\" of type I64 is not supported (help: use weights of F32"), "{error}");
    let error = weights.tensor("e").unwrap_err().to_string();
    assert!(error.contains("tensor e is missing (help: "), "{error}");
}

#[test]
fn a_model_in_several_files_reads_each_tensor_from_the_file_that_the_index_names() {
    // Both files have "a": the index decides.
    let (one, two) = (shard(&[("a", Dtype::F32), ("b", Dtype::F32)]), shard(&[("a", Dtype::F16)]));
    let map = index(json!({ "a": "two.safetensors", "b": "one.safetensors" }));
    let folder = folder(&[config(), ("one.safetensors", one), ("two.safetensors", two), map]);
    let weights = Weights::open(folder.path()).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!((weights.tensor("a").unwrap().kind, weights.tensor("b").unwrap().kind), (Kind::F16, Kind::F32));
}

#[test]
fn damaged_folders_are_errors_that_say_what_is_wrong() {
    let good = || ("model.safetensors", shard(&[("a", Dtype::F32)]));
    let file = |bytes| vec![config(), ("model.safetensors", bytes)];
    let cut = good().1[..40].to_vec();
    let short = good().1[..good().1.len() - 1].to_vec();
    let cases = [
        (vec![good()], "config.json: No such file or directory (os error 2) (help: check the path"),
        (vec![config()], "model.safetensors: No such file or directory (os error 2) (help: check the path"),
        (file(vec![]), "the file ends within its header"),
        (file(vec![1, 2, 3]), "the file ends within its header"),
        (file(cut), "the file ends within its header"),
        (file(short), "the file is not as long as its header says"),
        (file(u64::MAX.to_le_bytes().into()), "the length of its header is 18446744073709551615, more than 16777216"),
        (file(raw("{", 0)), "invalid JSON in header"),
        (file(raw(&"[".repeat(100_000), 0)), "invalid JSON in header"),
        (file(raw("\u{0}", 0)), "invalid JSON in header"),
        (
            file(raw(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4)),
            "invalid shape, data type, or offset",
        ),
        (file(raw(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8)), "invalid offset for tensor `a`"),
        (file(raw(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}"#, 8)), "invalid offset for tensor `a`"),
        (
            file(raw(r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}}"#, 4)),
            "overflow computing buffer size",
        ),
        (
            file(raw(
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                4,
            )),
            "invalid offset for tensor",
        ),
        (vec![config(), good(), ("model.safetensors.index.json", b"{}".into())], "missing field `weight_map`"),
        (vec![config(), index(json!({ "a": "../x.safetensors" }))], "no safetensors file of this folder"),
        (vec![config(), index(json!({ "a": "/etc/passwd" }))], "no safetensors file of this folder"),
        (
            vec![config(), index(json!({ "a": "gone.safetensors" }))],
            "gone.safetensors: No such file or directory (os error 2) (help: check the path",
        ),
        (vec![config(), good(), index(json!({ "b": "model.safetensors" }))], "tensor \"b\" is not in "),
    ];
    for (files, words) in cases {
        let folder = folder(&files);
        let error = Weights::open(folder.path()).expect_err(words).to_string();
        assert!(error.contains(words) && error.contains("(help: "), "{error}");
    }
    let endless = folder(&[good()]);
    std::os::unix::fs::symlink("/dev/zero", endless.path().join("config.json")).unwrap();
    let error = Weights::open(endless.path()).unwrap_err().to_string();
    assert!(error.contains("config.json: it is not a regular file (help: "), "{error}");
    let empty = folder(&file(raw(r#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#, 0)));
    let error = Weights::open(empty.path()).unwrap().tensor("a").unwrap_err().to_string();
    assert!(error.contains("of the shape [0] is not supported"), "{error}");
}

/// 10,000 files with a few changed bytes, cut or not: every one is refused or reads within its bounds.
#[test]
fn mutated_shards_are_refused_or_read() {
    let seed = shard(&[("a", Dtype::F32), ("b", Dtype::F16)]);
    let mut rng = ChaCha8Rng::seed_from_u64(0x7361_6665);
    let mut opened = 0;
    for _ in 0..10_000 {
        let mut bytes = seed.clone();
        for _ in 0..1 + rng.next_u32() % 3 {
            let at = rng.next_u32() as usize % bytes.len().max(1);
            match rng.next_u32() % 8 {
                0 => bytes.truncate(at),
                1 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = b"09[]{},\""[at % 8]),
                _ => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (at % 8)),
            }
        }
        opened += u32::from(read::shard(&bytes));
    }
    assert!((500..9_500).contains(&opened), "{opened} of 10,000 opened: the mutations test one side only");
}

fn parse(json: &Value) -> Result<DecoderConfig, ModelError> {
    DecoderConfig::from_json(Path::new("m/config.json"), &json.to_string())
}

#[test]
fn a_config_says_its_shape_with_the_defaults_of_transformers() {
    let expected = DecoderConfig {
        architecture: "llama".into(),
        layers: 2,
        hidden: 64,
        heads: 4,
        kv_heads: 4,
        head_size: 16,
        ffn: 128,
        vocab: 100,
        context: 256,
        rms_epsilon: 1e-5,
        rope_base: 10_000.0,
        rope: Rope::Halves,
        tied_embeddings: false,
        qkv_bias: false,
    };
    assert_eq!(parse(&llama()).unwrap(), expected);

    let mut json = llama();
    for (key, value) in [
        ("architectures", json!(["Qwen2ForCausalLM"])),
        ("num_key_value_heads", json!(2)),
        ("head_dim", json!(32)),
        ("rope_theta", json!(1_000_000.0)),
        ("rope_scaling", json!(null)),
        ("tie_word_embeddings", json!(true)),
        ("use_sliding_window", json!(false)),
    ] {
        json[key] = value;
    }
    let qwen = DecoderConfig {
        architecture: "qwen2".into(),
        kv_heads: 2,
        head_size: 32,
        rope_base: 1e6,
        tied_embeddings: true,
        qkv_bias: true,
        ..expected
    };
    assert_eq!(parse(&json).unwrap(), qwen);
    json["rope_theta"] = json!(null);
    json["rope_parameters"] = json!({ "rope_type": "default", "type": "default", "rope_theta": 1_000_000 });
    assert_eq!(parse(&json).unwrap(), qwen);
}

#[test]
fn a_config_that_would_be_computed_wrongly_is_refused_by_name() {
    for (key, value, words) in [
        ("architectures", json!(["GPT2LMHeadModel"]), "architecture \"GPT2LMHeadModel\" is not supported"),
        ("architectures", json!([]), "architecture \"none\" is not supported"),
        ("rope_scaling", json!({ "rope_type": "llama3", "factor": 8.0 }), "rope_scaling of type \"llama3\""),
        ("rope_scaling", json!({ "type": "linear", "factor": 2.0 }), "rope_scaling of type \"linear\""),
        ("rope_parameters", json!({ "rope_type": "yarn" }), "rope_scaling of type \"yarn\""),
        ("attention_bias", json!(true), "attention_bias"),
        ("mlp_bias", json!(true), "mlp_bias is not supported"),
        ("use_sliding_window", json!(true), "use_sliding_window is not supported"),
        ("hidden_act", json!("gelu"), "hidden_act \"gelu\" is not supported"),
        ("partial_rotary_factor", json!(0.5), "partial_rotary_factor is not supported"),
        ("rope_parameters", json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor is not supported"),
        ("num_attention_heads", json!(0), "number of heads is 0"),
        ("num_key_value_heads", json!(3), "is 3, which does not divide 4 heads"),
        ("head_dim", json!(15), "head size is 15, which is odd"),
        ("head_dim", json!(1 << 20), "width of heads together is 4194304"),
        ("vocab_size", json!(1u64 << 40), "vocabulary size is 1099511627776, not from 1 to 16777216"),
        ("hidden_size", json!(-1), "invalid value: integer `-1`"),
        ("rms_norm_eps", json!(0), "RMS epsilon is 0, not a number above 0"),
        ("rope_theta", json!(-1.0), "rotary base is -1"),
        ("rope_theta", json!("big"), "invalid type: string"),
    ] {
        let mut json = llama();
        json[key] = value;
        let error = parse(&json).expect_err(words).to_string();
        assert!(error.contains(words) && error.contains("m/config.json") && error.contains("(help: "), "{error}");
    }
    let mut json = llama();
    json.as_object_mut().unwrap().remove("vocab_size");
    assert!(parse(&json).unwrap_err().to_string().contains("missing field `vocab_size`"));
}
