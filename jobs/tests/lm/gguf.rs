//! GGUF files, sound and damaged. A damage must be a typed error that says what is wrong and what to do.

use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use stoke_jobs::lm::{DecoderConfig, Gguf, Kind, ModelError, Rope, Weights};

use crate::common::{File, Tensor, array, f32, string, text, typed, u32};
use crate::read;

fn open(bytes: &[u8]) -> Result<Gguf, ModelError> {
    Gguf::from_bytes(Path::new("small.gguf"), bytes)
}

#[test]
fn a_small_file_reads_as_it_was_written() {
    for (version, alignment) in [(2, 32), (3, 32), (3, 64), (3, 8)] {
        let mut file = File { version, alignment, ..File::small() };
        file.key("general.alignment", u32(alignment as u32));
        let gguf = open(&file.bytes()).unwrap();
        assert_eq!(gguf.string("general.architecture").unwrap(), "llama");
        assert_eq!(gguf.strings("tokenizer.ggml.tokens").unwrap(), ["a", "é", ""]);
        assert_eq!(gguf.f32s("tokenizer.ggml.scores").unwrap(), [0.5, -1.0]);
        assert_eq!(gguf.i32s("tokenizer.ggml.token_type").unwrap(), [3, -1]);
        assert!(gguf.bool("tokenizer.ggml.add_bos_token").unwrap());
        let names: Vec<&str> = gguf.names().collect();
        assert_eq!(names.len(), 6);
        for (tensor, name) in file.tensors.iter().zip([
            "model.embed_tokens.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.k_proj.weight",
            "model.layers.0.self_attn.v_proj.weight",
            "model.layers.0.mlp.up_proj.weight",
            "model.norm.weight",
        ]) {
            let raw = gguf.tensor(name).unwrap();
            assert_eq!(raw.bytes, tensor.bytes, "{name}");
            assert_eq!(raw.dequantise().len(), tensor.dimensions.iter().product::<u64>() as usize, "{name}");
        }
        let keys = gguf.tensor("model.layers.0.self_attn.k_proj.weight").unwrap();
        assert_eq!((keys.kind, &keys.shape[..], keys.rows(), keys.row_values()), (Kind::F16, &[16, 32][..], 16, 32));
        assert_eq!(keys.row(1), &keys.bytes[64..128]);
    }
}

#[test]
fn a_small_file_says_its_shape_with_defaults() {
    let mut file = File::small();
    let expected = DecoderConfig {
        architecture: "llama".into(),
        layers: 1,
        hidden: 32,
        heads: 2,
        kv_heads: 1,
        head_size: 16,
        ffn: 64,
        vocab: 8,
        context: 64,
        rms_epsilon: 1e-5,
        rope_base: 10_000.0,
        rope: Rope::Pairs,
        tied_embeddings: true,
        qkv_bias: false,
    };
    let config = |file: &File| DecoderConfig::from_gguf(&open(&file.bytes()).unwrap()).unwrap();
    assert_eq!(config(&file), expected);

    for (name, _) in &mut file.keys {
        *name = String::from_utf8(name.clone()).unwrap().replace("llama.", "qwen2.").into_bytes();
    }
    file.key("general.architecture", string("qwen2"));
    file.key("qwen2.rope.freq_base", f32(1e6));
    for name in ["blk.0.attn_q.bias", "output.weight"] {
        let bytes = vec![0; 128];
        file.tensors.push(Tensor { name: name.into(), dimensions: vec![32], kind: 0, bytes, offset: None });
    }
    let qwen = DecoderConfig {
        architecture: "qwen2".into(),
        rope: Rope::Halves,
        rope_base: 1e6,
        tied_embeddings: false,
        qkv_bias: true,
        ..expected
    };
    assert_eq!(config(&file), qwen);
}

#[test]
fn what_would_be_computed_wrongly_is_refused_by_name() {
    type Change = fn(&mut File);
    let cases: [(Change, &str); 16] = [
        (|file| file.key("general.architecture", string("gemma3")), "architecture \"gemma3\" is not supported"),
        (|file| file.key("llama.rope.scaling.type", string("yarn")), "rope scaling of type \"yarn\" is not supported"),
        (|file| file.key("llama.rope.scaling.factor", f32(4.0)), "rope scaling by a factor is not supported"),
        (|file| file.key("llama.rope.scale_linear", f32(2.0)), "rope scaling by a factor is not supported"),
        (|file| file.key("split.count", u32(2)), "a model in several GGUF files (llama-gguf-split --merge"),
        (|file| file.tensors[5].name = "rope_freqs.weight".into(), "rope_freqs.weight is not supported"),
        (|file| file.key("llama.expert_count", u32(8)), "a mixture of experts is not supported"),
        (|file| file.key("llama.attention.sliding_window", u32(512)), "sliding window attention is not supported"),
        (|file| file.key("llama.rope.dimension_count", u32(8)), "llama.rope.dimension_count other than the size"),
        (|file| file.key("llama.attention.head_count", u32(0)), "number of heads is 0, not from 1"),
        (|file| file.key("llama.attention.head_count_kv", u32(3)), "is 3, which does not divide 2 heads"),
        (|file| file.key("llama.attention.key_length", u32(5)), "head size is 5, which is odd"),
        (|file| file.key("llama.block_count", u32(u32::MAX)), "number of layers is 4294967295, not from 1 to 1024"),
        (|file| file.key("llama.block_count", f32(1.0)), "key llama.block_count is the f32 1, not an integer"),
        (|file| file.key("llama.attention.layer_norm_rms_epsilon", f32(f32::NAN)), "RMS epsilon is NaN"),
        (|file| file.keys.retain(|(key, _)| key != b"llama.embedding_length"), "key llama.embedding_length is missing"),
    ];
    for (change, words) in cases {
        let mut file = File::small();
        change(&mut file);
        let error = DecoderConfig::from_gguf(&open(&file.bytes()).unwrap()).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("small.gguf") && error.contains("(help: "), "{error}");
    }
}

#[test]
fn damages_are_errors_that_say_what_is_wrong() {
    type Damage = fn(&mut File);
    let cases: [(Damage, &str); 30] = [
        (|file| file.magic = *b"GGML", "small.gguf is damaged: it does not begin with \"GGUF\", at byte 0"),
        (|file| file.version = 1, "GGUF version 1 is not supported"),
        (|file| file.version = 4, "GGUF version 4 is not supported"),
        (|file| file.version = 3u32.swap_bytes(), "big-endian GGUF is not supported"),
        (|file| file.counts[0] = Some(u64::MAX), "the number of tensors is 18446744073709551615, more than 65536"),
        (|file| file.counts[1] = Some(1 << 40), "the number of keys is 1099511627776, more than 65536"),
        (|file| file.counts[1] = Some(13), "small.gguf is damaged: "),
        (|file| file.counts[0] = Some(65_536), "small.gguf is damaged: "),
        (|file| file.keys[0].0 = vec![0xff, 0xfe], "a key is not UTF-8"),
        (|file| file.keys[0].0 = vec![b'k'; 513], "the length of a key is 513, more than 512"),
        (|file| file.keys.push(file.keys[0].clone()), "the key \"general.architecture\" is there twice"),
        (|file| file.key("k", typed(13, &[])), "the value of \"k\" is of type 13, which GGUF does not know"),
        (|file| file.key("k", typed(7, &[2])), "the value of \"k\" is a truth value of 2"),
        (|file| file.key("k", typed(8, &u64::MAX.to_le_bytes())), "the length of the value of \"k\" is 1844674"),
        (|file| file.key("k", typed(8, &text([0xc3]))), "the value of \"k\" is not UTF-8"),
        (|file| file.key("k", array(9, &[array(4, &[[0; 4]])])), "the value of \"k\" is an array of arrays"),
        (|file| file.key("k", typed(9, &[5, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0])), "the number of values of the value of"),
        (|file| file.key("k", typed(9, &[8, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0])), "small.gguf is damaged: "),
        (|file| file.key("general.alignment", u32(0)), "general.alignment is the integer 0, not a power of two"),
        (|file| file.key("general.alignment", u32(48)), "general.alignment is the integer 48, not a power of two"),
        (|file| file.key("general.alignment", string("32")), "general.alignment is a string of 2 bytes, not a power"),
        (|file| file.tensors[1].name = file.tensors[0].name.clone(), "tensor \"token_embd.weight\" is there twice"),
        // The same tensor by the other of its names.
        (
            |file| file.tensors[1].name = "model.embed_tokens.weight".into(),
            "\"model.embed_tokens.weight\" is there twice",
        ),
        (|file| file.tensors[0].dimensions = vec![], "has 0 dimensions, not 1 to 4"),
        (|file| file.tensors[0].dimensions = vec![1; 5], "has 5 dimensions, not 1 to 4"),
        (|file| file.tensors[0].dimensions = vec![33, 8], "of type Q8_0 cannot have the shape [8, 33]"),
        (|file| file.tensors[0].dimensions = vec![32, 0], "of type Q8_0 cannot have the shape [0, 32]"),
        (|file| file.tensors[0].dimensions = vec![1 << 32, 1 << 32, 1 << 32], "cannot have the shape"),
        (|file| file.tensors[0].kind = 14, "tensor \"token_embd.weight\" of type Q6_K is not supported"),
        (|file| file.tensors[0].kind = 4, "of type 4 is not supported (help: use a file of F32, F16"),
    ];
    let layouts: [(Damage, &str); 6] = [
        (|file| file.tensors[1].offset = Some(0), "tensor \"blk.0.attn_q.weight\" lies on another tensor"),
        (|file| file.tensors[0].offset = Some(256), "tensor \"blk.0.attn_q.weight\" lies on another tensor"),
        (|file| file.tensors[5].offset = Some(33), "begins at 33, not at a multiple of 32"),
        (|file| file.tensors[5].offset = Some(u64::MAX - 31), "tensor \"output_norm.weight\""),
        (|file| file.tensors[5].offset = Some(1 << 40), "needs 128 bytes from byte 1099511"),
        (|file| file.tensors[5].dimensions = vec![64], "needs 256 bytes from byte"),
    ];
    for (damage, words) in cases.into_iter().chain(layouts) {
        let mut file = File::small();
        damage(&mut file);
        let error = open(&file.bytes()).expect_err(words).to_string();
        assert!(error.contains(words) && error.contains("small.gguf") && error.contains("(help: "), "{error}");
    }
}

#[test]
fn a_file_cut_anywhere_is_damaged() {
    let bytes = File::small().bytes();
    open(&bytes).unwrap();
    for length in 0..bytes.len() {
        let error = open(&bytes[..length]).expect_err("cut");
        assert!(matches!(error, ModelError::Damaged { .. }), "{length}: {error}");
    }
}

/// 10,000 files with a few changed bytes, cut or not: every one is refused or reads within its bounds.
#[test]
fn mutated_files_are_refused_or_read() {
    let seed = File::small().bytes();
    let mut rng = ChaCha8Rng::seed_from_u64(0x6767_7566);
    let mut opened = 0;
    for _ in 0..10_000 {
        let mut bytes = seed.clone();
        for _ in 0..1 + rng.next_u32() % 4 {
            // Most of the header is in the first kilobyte, and damage there is what matters.
            let reach = if rng.next_u32().is_multiple_of(8) { bytes.len() } else { bytes.len().min(1024) };
            let at = rng.next_u32() as usize % reach.max(1);
            match rng.next_u32() % 8 {
                0 => bytes.truncate(at),
                1 => bytes.iter_mut().skip(at).take(8).for_each(|byte| *byte = 0xff),
                2 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = [0, 1, 0x7f, 0x80, 0xff][at % 5]),
                _ => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (at % 8)),
            }
        }
        opened += u32::from(read::gguf(&bytes));
    }
    assert!((500..9_500).contains(&opened), "{opened} of 10,000 opened: the mutations test one side only");
}

#[test]
fn what_is_no_file_or_no_model_says_what_to_name() {
    let dir = tempfile::tempdir().unwrap();
    let error = Weights::open(&dir.path().join("none.gguf")).unwrap_err();
    assert!(error.to_string().contains("jobs/models/fetch.py"), "{error}");
    assert!(std::error::Error::source(&error).is_some());
    let file = dir.path().join("small.gguf");
    std::fs::write(&file, File::small().bytes()).unwrap();
    let weights = Weights::open(&file).unwrap();
    assert_eq!((weights.path(), weights.names().count()), (&*file, 6));
    assert_eq!(Weights::open(dir.path()).unwrap().path(), file, "the only GGUF file of the folder");
    std::fs::copy(&file, dir.path().join("other.gguf")).unwrap();
    let error = Weights::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("a folder with 2 .gguf files is not supported (help: name one of them)"), "{error}");
    let error = Weights::open(&dir.path().join("model.safetensors")).unwrap_err().to_string();
    assert!(error.contains("a safetensors file by itself is not supported (help: name its folder"), "{error}");
    let error = weights.tensor("lm_head.weight").unwrap_err().to_string();
    assert!(error.contains("small.gguf: tensor lm_head.weight is missing (help: "), "{error}");
    let error = weights.shaped("model.norm.weight", &[64]).unwrap_err().to_string();
    assert!(error.contains("has the shape [32], and the configuration asks for [64]"), "{error}");
    std::fs::write(&file, []).unwrap();
    assert!(Weights::open(&file).unwrap_err().to_string().contains("the file ends after 0 bytes"));
    let error = Weights::open(Path::new("/dev/null")).unwrap_err();
    assert!(error.to_string().contains("name a .gguf file"), "{error}");
}
