//! Tokenizers: ids against other implementations, text that comes back, streams, and files that are wrong.

use std::fs;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::{Value, json};
use stoke_jobs::lm::{ModelError, TEXT_BYTES_MAX, Tokenizer, Weights};
use tempfile::TempDir;

use crate::common::{golden, ids, model};
use crate::metadata::{Metadata, folder};

fn smollm2() -> Weights {
    Weights::open(&model("smollm2-135m-instruct").join("SmolLM2-135M-Instruct.Q4_1.gguf")).expect("the model opens")
}

/// SmolLM2's vocabulary, to be cut as another model family cuts.
fn cut_as(pre: &str) -> Metadata {
    let weights = smollm2();
    let gguf = weights.gguf().expect("a GGUF file");
    Metadata::new(
        &gguf.strings("tokenizer.ggml.tokens").unwrap(),
        &gguf.i32s("tokenizer.ggml.token_type").unwrap(),
        &gguf.strings("tokenizer.ggml.merges").unwrap(),
    )
    .string("tokenizer.ggml.pre", pre)
}

/// A vocabulary of bytes with one merge and three control tokens.
fn small() -> Metadata {
    Metadata::new(
        &["a", "b", "ab", "Ġ", "<s>", "</s>", "<|im_end|>", "user defined"],
        &[1, 1, 1, 1, 3, 3, 3, 4],
        &["a b"],
    )
}

#[test]
fn prompts_have_the_tokens_of_the_reference() {
    let tokenizer = Tokenizer::open(&smollm2()).unwrap();
    for prompt in golden("smollm2.json")["prompts"].as_array().unwrap() {
        let text = prompt["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), ids(&prompt["prompt"]), "{}", prompt["name"]);
        assert_eq!(
            tokenizer.encode_framed(text).unwrap(),
            ids(&prompt["prompt"]),
            "this model wants nothing around a text"
        );
    }
}

#[test]
fn difficult_texts_have_the_tokens_of_the_reference_in_each_family() {
    let (texts, llama) = (golden("texts.json"), golden("llama_cpp.json"));
    for pre in ["smollm", "gpt-2", "llama-bpe", "qwen2", "default"] {
        let tokenizer = cut_as(pre).tokenizer().unwrap();
        for (at, row) in texts.as_array().unwrap().iter().enumerate() {
            let expected = if pre == "default" { &llama["texts_default"][at] } else { &row[pre] };
            let text = row["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text).unwrap(), ids(expected), "{pre}: {text:?}");
        }
    }
}

#[test]
fn an_encoder_frames_its_texts() {
    let tokenizer = Tokenizer::open(&Weights::open(&model("all-minilm-l6-v2")).unwrap()).unwrap();
    for row in golden("texts.json").as_array().unwrap() {
        let (text, expected) = (row["text"].as_str().unwrap(), ids(&row["minilm"]));
        assert_eq!(tokenizer.encode_framed(text).unwrap(), expected, "{text:?}");
        assert_eq!(tokenizer.encode(text).unwrap(), expected[1..expected.len() - 1], "{text:?}");
        assert_eq!(tokenizer.decode(&expected).unwrap(), row["minilm_text"].as_str().unwrap(), "{text:?}");
    }
    // The file says that texts are cut at 128 tokens and padded: how long they may be is for the caller to say.
    assert_eq!(tokenizer.encode(&"word ".repeat(1000)).unwrap().len(), 1000);
}

#[test]
fn a_folder_reads_as_the_gguf_file_does() {
    let metadata = cut_as("smollm");
    let folder = folder(&metadata.tokenizer_json(), &json!({"eos_token_id": [2, 5]}));
    let from_folder = Tokenizer::open(&Weights::open(folder.path()).unwrap()).unwrap();
    let from_gguf = Tokenizer::open(&smollm2()).unwrap();
    assert_eq!(from_folder.vocabulary(), from_gguf.vocabulary());
    assert_eq!(from_folder.end_of_sequence(), [0, 2, 5]);
    for row in golden("texts.json").as_array().unwrap() {
        let text = row["text"].as_str().unwrap();
        let tokens = from_folder.encode(text).unwrap();
        assert_eq!(tokens, from_gguf.encode(text).unwrap(), "{text:?}");
        assert_eq!(from_folder.decode(&tokens).unwrap(), from_gguf.decode(&tokens).unwrap(), "{text:?}");
    }
}

#[test]
fn an_answer_ends_at_the_named_tokens_and_at_known_ones() {
    assert_eq!(Tokenizer::open(&smollm2()).unwrap().end_of_sequence(), [0, 2]);
    assert_eq!(small().tokenizer().unwrap().end_of_sequence(), [5, 6]);
    let named = small().u32("tokenizer.ggml.eos_token_id", 4).u32("tokenizer.ggml.eot_token_id", 6);
    assert_eq!(named.tokenizer().unwrap().end_of_sequence(), [4, 5, 6]);
}

#[test]
fn a_model_that_wants_a_beginning_gets_it_in_frames_only() {
    let metadata = small().u32("tokenizer.ggml.bos_token_id", 4).u32("tokenizer.ggml.eos_token_id", 5);
    let asked = metadata.clone().bool("tokenizer.ggml.add_bos_token", true).bool("tokenizer.ggml.add_eos_token", false);
    assert_eq!(metadata.tokenizer().unwrap().encode_framed("ab").unwrap(), [2]);
    assert_eq!(asked.tokenizer().unwrap().encode_framed("ab").unwrap(), [4, 2]);
    assert_eq!(asked.tokenizer().unwrap().encode("ab").unwrap(), [2]);
}

#[test]
fn control_tokens_are_found_in_text_and_are_no_text() {
    let tokenizer = small().tokenizer().unwrap();
    let tokens = tokenizer.encode("a<s>ab</s>user definedb").unwrap();
    assert_eq!(tokens, [0, 4, 2, 5, 7, 1]);
    assert_eq!(tokenizer.decode(&tokens).unwrap(), "aabuser definedb");
    assert_eq!(tokenizer.encode("xbéa").unwrap(), [1, 0], "bytes without a token are left out");
}

/// Any letters but those with bytes that SmolLM2's vocabulary lacks: six control characters, and the unassigned planes 4 to 11.
fn random_text(random: &mut ChaCha8Rng) -> String {
    let length = random.next_u32() % 60;
    (0..length)
        .map(|_| {
            loop {
                let bound = [0x80, 0x250, 0x3000, 0x1_0000, 0x11_0000][random.next_u32() as usize % 5];
                let Some(letter) = char::from_u32(random.next_u32() % bound) else { continue };
                if !matches!(
                    letter,
                    '\u{4}' | '\u{6}' | '\u{13}' | '\u{14}' | '\u{16}' | '\u{1d}' | '\u{40000}'..='\u{BFFFF}'
                ) {
                    break letter;
                }
            }
        })
        .collect()
}

#[test]
fn random_text_comes_back_whole_and_in_streams() {
    let tokenizer = Tokenizer::open(&smollm2()).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(7);
    for round in 0..2000 {
        let text = random_text(&mut random);
        let tokens = tokenizer.encode(&text).unwrap();
        assert_eq!(tokenizer.decode(&tokens).unwrap(), text, "round {round}");
        let mut stream = tokenizer.stream();
        let given: Vec<String> = tokens.iter().filter_map(|id| stream.push(*id)).collect();
        assert_eq!(given.concat(), text, "round {round}");
        assert!(!given.contains(&String::new()) && stream.finish().is_none(), "round {round}");
    }
}

#[test]
fn random_tokens_give_in_a_stream_what_they_give_at_once() {
    let tokenizer = Tokenizer::open(&smollm2()).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(8);
    for round in 0..500 {
        // Single bytes for the most part (ids up to 260), so that characters break off and begin anywhere.
        let tokens: Vec<u32> =
            (0..40).map(|_| random.next_u32() % [260, 260, 260, 49_152][random.next_u32() as usize % 4]).collect();
        let mut stream = tokenizer.stream();
        let mut text: String = tokens.iter().filter_map(|id| stream.push(*id)).collect();
        text.extend(stream.finish());
        assert_eq!(text, tokenizer.decode(&tokens).unwrap(), "round {round}: {tokens:?}");
    }
}

#[test]
fn a_stream_gives_whole_characters_only() {
    let tokenizer = Tokenizer::open(&smollm2()).unwrap();
    let tokens = tokenizer.encode("𠜎é").unwrap();
    let mut stream = tokenizer.stream();
    let given: Vec<Option<String>> = tokens.iter().map(|id| stream.push(*id)).collect();
    assert_eq!(given, [None, None, None, Some("𠜎".into()), Some("é".into())]);
    let mut broken = tokenizer.stream();
    assert_eq!(broken.push(tokens[0]), None);
    assert_eq!(broken.push(tokenizer.encode("a").unwrap()[0]), Some("\u{FFFD}a".into()));
    assert_eq!(broken.push(tokens[0]), None);
    assert_eq!(broken.push(u32::MAX), None, "an id that padding of the tables allows is no text");
    assert_eq!(broken.finish(), Some("\u{FFFD}".into()));
}

#[test]
fn a_stream_of_words_gives_what_they_give_at_once() {
    let tokenizer = Tokenizer::open(&Weights::open(&model("all-minilm-l6-v2")).unwrap()).unwrap();
    let text = "unbelievable tokenizers stream words ".repeat(30);
    let tokens = tokenizer.encode(&text).unwrap();
    assert!(tokens.len() > 100);
    let mut stream = tokenizer.stream();
    let mut given: String = tokens.iter().filter_map(|id| stream.push(*id)).collect();
    given.extend(stream.finish());
    assert_eq!(given, text.trim_end());
    assert_eq!(given, tokenizer.decode(&tokens).unwrap());
}

#[test]
fn long_runs_are_cut_like_short_ones() {
    for pre in ["smollm", "llama-bpe", "qwen2", "default"] {
        let tokenizer = cut_as(pre).tokenizer().unwrap();
        for run in [" ", "\n", " \n", "a", "7", "-", "é"] {
            let text = format!("{}x", run.repeat((TEXT_BYTES_MAX - 1) / run.len()));
            let tokens = tokenizer.encode(&text).unwrap();
            assert_eq!(tokens.last(), tokenizer.encode(&text[text.len() - 33..]).unwrap().last(), "{pre}: {run:?}");
            assert_eq!(tokenizer.decode(&tokens).unwrap(), text, "{pre}: {run:?}");
        }
    }
    let error = small().tokenizer().unwrap().encode(&"a".repeat(TEXT_BYTES_MAX + 1)).unwrap_err();
    assert!(matches!(error, ModelError::Text { bytes, .. } if bytes == TEXT_BYTES_MAX + 1), "{error}");
}

#[test]
fn an_unknown_id_is_refused() {
    let error = small().tokenizer().unwrap().decode(&[0, 8]).unwrap_err();
    assert_eq!(error.to_string(), "token 8 is not in the vocabulary of 8 tokens (help: send ids from 0 to 7)");
}

#[test]
fn wrong_metadata_is_refused_by_key() {
    let letters = |merges: &[&str]| Metadata::new(&["a", "b", "ab", "abab"], &[1, 1, 1, 1], merges);
    let cases = [
        (small().without("tokenizer.ggml.model"), "key tokenizer.ggml.model is missing"),
        (small().string("tokenizer.ggml.model", "llama"), "tokenizer.ggml.model \"llama\" is not supported"),
        (
            small().string("tokenizer.ggml.pre", "made-up"),
            "tokenizer.ggml.pre \"made-up\" is not supported (help: known are default, gpt-2",
        ),
        (small().without("tokenizer.ggml.tokens"), "key tokenizer.ggml.tokens is missing"),
        (small().without("tokenizer.ggml.merges"), "key tokenizer.ggml.merges is missing"),
        (
            small().string("tokenizer.ggml.tokens", "a"),
            "key tokenizer.ggml.tokens is a string of 1 bytes, not an array",
        ),
        (Metadata::new(&["a", "b"], &[1], &[]), "key tokenizer.ggml.token_type has 1 values for 2 tokens"),
        (letters(&["a c"]), "key tokenizer.ggml.merges needs a token that is not there at 0: \"c\""),
        (letters(&["a b", "b a"]), "needs a token that is not there at 1: \"ba\""),
        (letters(&["abab abab"]), "needs a token that is not there at 0: \"abababab\""),
        (letters(&["ab"]), "is not two tokens at 0: \"ab\""),
        (letters(&[""]), "is not two tokens at 0: \"\""),
        (letters(&[" "]), "is not two tokens at 0: \" \""),
        (small().u32("tokenizer.ggml.eos_token_id", 8), "key tokenizer.ggml.eos_token_id is 8, there are 8 tokens"),
        (
            small().bool("tokenizer.ggml.add_bos_token", true).u32("tokenizer.ggml.bos_token_id", u32::MAX),
            "key tokenizer.ggml.bos_token_id is 4294967295, there are 8 tokens",
        ),
    ];
    for (metadata, words) in cases {
        let error = metadata.tokenizer().err().unwrap_or_else(|| panic!("{words}")).to_string();
        assert!(error.contains(words) && error.contains("(help: "), "{error}\n  for {words}");
    }
}

fn open(folder: &TempDir) -> Result<Tokenizer, ModelError> {
    Tokenizer::open(&Weights::open(folder.path()).expect("the weights are sound"))
}

#[test]
fn a_wrong_folder_is_refused_by_file() {
    let sound = small().tokenizer_json();
    let changed = |change: fn(&mut Value)| {
        let mut json = sound.clone();
        change(&mut json);
        json
    };
    let cases = [
        (changed(|json| json["model"]["merges"][0] = json!(["a", "c"])), "Token `c` out of vocabulary"),
        (changed(|json| json["model"]["merges"][0] = json!(["user defined", "a"])), "its parts contradict each other"),
        (changed(|json| json["model"]["type"] = json!("Magic")), "cannot be read"),
        (changed(|json| json["model"]["vocab"]["zz"] = json!(4_000_000_000u32)), "tokens up to 4000000001"),
        (json!({}), "cannot be read"),
        (json!([1]), "cannot be read"),
    ];
    for (json, words) in cases {
        let error = open(&folder(&json, &json!({}))).err().unwrap_or_else(|| panic!("{words}")).to_string();
        assert!(
            error.contains(words) && error.contains("tokenizer.json") && error.contains("(help: "),
            "{error}\n  for {words}"
        );
    }
    let error = open(&folder(&sound, &json!({"eos_token_id": 99}))).err().unwrap().to_string();
    assert!(error.contains("has no token 99"), "{error}");
    let damaged = folder(&sound, &json!({}));
    for (text, words) in [("{\"a\": ", "cannot be read: "), ("\u{0}", "cannot be read: expected value")] {
        fs::write(damaged.path().join("tokenizer.json"), text).unwrap();
        let error = open(&damaged).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
    }
    fs::remove_file(damaged.path().join("tokenizer.json")).unwrap();
    let error = open(&damaged).err().unwrap().to_string();
    assert!(error.contains("tokenizer.json is not there"), "{error}");
}

/// Puts something else in one random place of a JSON value.
fn spoil(json: &mut Value, random: &mut ChaCha8Rng) {
    let others = [
        json!(null),
        json!(-1),
        json!(1e300),
        json!(u64::MAX),
        json!(""),
        json!("ab"),
        json!([]),
        json!({}),
        json!([[0]]),
        json!(true),
    ];
    let inside = match json {
        Value::Array(values) if !values.is_empty() => {
            let at = random.next_u32() as usize % values.len();
            Some(&mut values[at])
        }
        Value::Object(values) if !values.is_empty() => {
            let at = random.next_u32() as usize % values.len();
            values.values_mut().nth(at)
        }
        _ => None,
    };
    match inside {
        Some(value) if !random.next_u32().is_multiple_of(4) => spoil(value, random),
        Some(_) | None => *json = others[random.next_u32() as usize % others.len()].clone(),
    }
}

#[test]
fn spoilt_tokenizers_are_refused_or_read() {
    let mut random = ChaCha8Rng::seed_from_u64(9);
    let minilm: Value =
        serde_json::from_str(&fs::read_to_string(model("all-minilm-l6-v2").join("tokenizer.json")).unwrap()).unwrap();
    let mut encoder = minilm;
    let few = |vocabulary: &mut Value| vocabulary.as_object_mut().unwrap().retain(|_, id| id.as_u64().unwrap() < 200);
    few(&mut encoder["model"]["vocab"]);
    let mut read = 0;
    for sound in [small().tokenizer_json(), encoder] {
        let folder = folder(&sound, &json!({}));
        let weights = Weights::open(folder.path()).unwrap();
        for _ in 0..400 {
            let mut json = sound.clone();
            spoil(&mut json, &mut random);
            fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
            let Ok(tokenizer) = Tokenizer::open(&weights) else { continue };
            read += 1;
            let tokens = tokenizer.encode_framed("ab <s> x\u{301}é[CLS]").unwrap_or_default();
            let _ = tokenizer.decode(&tokens);
        }
    }
    assert!(read > 40, "{read} of 800 were read");
}
