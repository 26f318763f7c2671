//! all-MiniLM-L6-v2 on our kernels against what sentence-transformers makes of the same folder (`jobs/reference/lm/minilm.py`), against itself, and
//! folders that are wrong.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use stoke_jobs::lm::{Encoder, EncoderConfig, ModelError, Pooling, Weights};
use tempfile::TempDir;

use crate::common::{golden, model};

#[derive(Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
    millionths: Vec<i32>,
}

fn texts() -> Vec<Text> {
    serde_json::from_value(golden("minilm.json")["texts"].clone()).unwrap()
}

fn weights() -> Weights {
    Weights::open(&model("all-minilm-l6-v2")).unwrap()
}

#[test]
fn embeddings_and_tokens_are_those_of_sentence_transformers() {
    let (weights, texts) = (weights(), texts());
    let mut encoder = Encoder::open(&weights).unwrap();
    for text in &texts {
        let tokens = encoder.read(&text.text).unwrap();
        assert_eq!(tokens.ids, text.ids, "{:?}", text.text);
        assert_eq!(tokens.left_out > 0, tokens.ids.len() == 256, "{:?}", text.text);
    }
    let ids: Vec<Vec<u32>> = texts.iter().map(|text| text.ids.clone()).collect();
    let made = encoder.encode(&ids);
    assert_eq!(made.len(), texts.len());
    for (text, found) in texts.iter().zip(&made) {
        let expected: Vec<f64> = text.millionths.iter().map(|value| f64::from(*value) / 1e6).collect();
        let found: Vec<f64> = found.iter().map(|value| f64::from(*value)).collect();
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let cosine = dot(&found, &expected) / (dot(&found, &found) * dot(&expected, &expected)).sqrt();
        assert!(1.0 - cosine < 1e-9, "{:?}: {}", text.text, 1.0 - cosine);
        assert!((dot(&found, &found) - 1.0).abs() < 1e-6, "{:?}", text.text);
        // Half a millionth is the golden file's; PyTorch in 32 bits is 1.6e-7 from itself in 64.
        let error = found.iter().zip(&expected).fold(0.0f64, |error, (x, y)| error.max((x - y).abs()));
        assert!(error < 1.5e-6, "{:?}: {error}", text.text);
    }
}

#[test]
fn embeddings_have_the_same_bits_alone_in_another_order_and_on_any_number_of_threads() {
    let (weights, texts) = (weights(), texts());
    let mut encoder = Encoder::open(&weights).unwrap();
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    let ids: Vec<Vec<u32>> = texts.into_iter().map(|text| text.ids).collect();
    let whole = encoder.encode(&ids);
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let turned: Vec<Vec<u32>> = ids.iter().rev().cloned().collect();
        let made = pool.install(|| encoder.encode(&turned));
        for (at, (made, whole)) in made.iter().rev().zip(&whole).enumerate() {
            assert_eq!(bits(made), bits(whole), "text {at}, {threads} threads");
        }
    }
    for (at, text) in ids.iter().enumerate().step_by(5) {
        assert_eq!(bits(&encoder.encode(std::slice::from_ref(text))[0]), bits(&whole[at]), "text {at} alone");
    }
    assert!(encoder.encode(&[]).is_empty());
}

#[test]
fn minilm_says_its_shape() {
    assert_eq!(
        weights().encoder_config().unwrap(),
        EncoderConfig {
            layers: 6,
            hidden: 384,
            heads: 12,
            ffn: 1536,
            vocab: 30_522,
            positions: 512,
            types: 2,
            epsilon: 1e-12,
            pooling: Pooling::Mean,
            normalised: true,
            tokens_max: 256,
            lower_case: false,
        }
    );
}

/// MiniLM's folder with some files replaced, or added; none: taken away.
fn folder(files: &[(&str, Option<Value>)]) -> TempDir {
    let (real, made) = (model("all-minilm-l6-v2"), tempfile::tempdir().unwrap());
    for name in
        ["config.json", "model.safetensors", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json"]
    {
        std::os::unix::fs::symlink(real.join(name), made.path().join(name)).unwrap();
    }
    fs::create_dir(made.path().join("1_Pooling")).unwrap();
    fs::copy(real.join("1_Pooling/config.json"), made.path().join("1_Pooling/config.json")).unwrap();
    for (name, value) in files {
        let path = made.path().join(name);
        let _ = fs::remove_file(&path);
        if let Some(value) = value {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value.to_string()).unwrap();
        }
    }
    made
}

/// `config.json` with one key changed.
fn changed(key: &str, value: Value) -> Value {
    let text = fs::read_to_string(model("all-minilm-l6-v2").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config[key] = value;
    config
}

fn open(folder: &Path) -> Result<EncoderConfig, ModelError> {
    let weights = Weights::open(folder)?;
    Encoder::open(&weights).map(|encoder| encoder.config().clone())
}

#[test]
fn modules_say_how_token_vectors_become_one() {
    let module = |kind: &str, path: &str| json!({"idx": 0, "name": "0", "path": path, "type": format!("sentence_transformers.models.{kind}")});
    let first = json!({"word_embedding_dimension": 384, "pooling_mode_cls_token": true});
    let modules = json!([module("Transformer", ""), module("Pooling", "pool")]);
    let made = folder(&[("modules.json", Some(modules.clone())), ("pool/config.json", Some(first))]);
    let config = open(made.path()).unwrap();
    assert_eq!((config.pooling, config.normalised), (Pooling::First, false));
    let weights = Weights::open(made.path()).unwrap();
    let mut encoder = Encoder::open(&weights).unwrap();
    let ids = encoder.read("a first token").unwrap().ids;
    let long = encoder.encode(&[ids])[0].iter().map(|value| value * value).sum::<f32>().sqrt();
    assert!((long - 1.0).abs() > 0.1, "not scaled: {long}");
    let mut scaled = modules.clone();
    scaled.as_array_mut().unwrap().push(module("Normalize", "2_Normalize"));
    let made = folder(&[("modules.json", Some(scaled))]);
    let config = open(made.path()).unwrap();
    assert_eq!((config.pooling, config.normalised), (Pooling::Mean, true));
    for (modules, problem) in [
        (json!([module("Dense", "2_Dense")]), "module \"sentence_transformers.models.Dense\""),
        (json!([module("Pooling", "../elsewhere")]), "\"../elsewhere\", which is no folder beside it"),
        (json!({}), "cannot be read"),
    ] {
        let error = open(folder(&[("modules.json", Some(modules))]).path()).unwrap_err().to_string();
        assert!(error.contains(problem) && error.contains("modules.json"), "{error}");
    }
}

#[test]
fn what_cannot_be_computed_is_refused_by_name() {
    let max = json!({"pooling_mode_max_tokens": true});
    for (file, value, problem) in [
        ("config.json", changed("hidden_act", json!("gelu_new")), "hidden_act \"gelu_new\" is not supported"),
        ("config.json", changed("position_embedding_type", json!("relative_key")), "\"relative_key\" is not supported"),
        ("config.json", changed("is_decoder", json!(true)), "is_decoder"),
        (
            "config.json",
            changed("architectures", json!(["MPNetModel"])),
            "architecture \"MPNetModel\" is not supported",
        ),
        ("config.json", changed("num_attention_heads", json!(7)), "key num_attention_heads is 7"),
        (
            "config.json",
            changed("num_hidden_layers", json!(7)),
            "tensor encoder.layer.6.attention.self.query.weight is missing",
        ),
        (
            "config.json",
            changed("hidden_size", json!(768)),
            "tensor embeddings.word_embeddings.weight has the shape [30522, 384]",
        ),
        ("config.json", changed("vocab_size", json!(100)), "the tokenizer has 30522 tokens"),
        ("config.json", changed("layer_norm_eps", json!(0)), "key layer_norm_eps is 0"),
        ("config.json", changed("intermediate_size", json!("many")), "config.json cannot be read"),
        ("sentence_bert_config.json", json!({"max_seq_length": 513}), "is 513, not from 3 to 512"),
        ("sentence_bert_config.json", json!({"max_seq_length": 2}), "is 2, not from 3 to 512"),
        ("1_Pooling/config.json", max, "pooling other than one of the mean and the first token is not supported"),
    ] {
        let error = open(folder(&[(file, Some(value))]).path()).unwrap_err().to_string();
        assert!(error.contains(problem) && error.contains("help: "), "{problem}: {error}");
    }
    let gguf = model("smollm2-135m-instruct");
    let error = open(&gguf).unwrap_err().to_string();
    assert!(error.contains("an embedding model in a GGUF file is not supported"), "{error}");
}

/// As sentence-transformers: its own file counts, or else what the tokenizer and the positions allow.
#[test]
fn the_longest_text_is_what_the_files_say() {
    let length = |files: &[(&str, Option<Value>)]| open(folder(files).path()).unwrap().tokens_max;
    assert_eq!(length(&[("sentence_bert_config.json", Some(json!({"max_seq_length": 40})))]), 40);
    assert_eq!(length(&[("sentence_bert_config.json", None)]), 512);
    let short = ("tokenizer_config.json", Some(json!({"model_max_length": 100})));
    assert_eq!(length(&[("sentence_bert_config.json", None), short]), 100);
    let made = folder(&[("sentence_bert_config.json", Some(json!({"max_seq_length": 6, "do_lower_case": true})))]);
    let weights = Weights::open(made.path()).unwrap();
    let encoder = Encoder::open(&weights).unwrap();
    let tokens = encoder.read("ONE two three four five six").unwrap();
    assert_eq!((tokens.ids.as_slice(), tokens.left_out), (&[101, 2028, 2048, 2093, 2176, 102][..], 2));
}
