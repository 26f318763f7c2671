//! `stoke infer` and `stoke embed`: real models answer through the binary, and what is wrong is said with its mend. The numbers are compared with
//! other implementations in `jobs/tests/lm`.

use std::path::PathBuf;

use crate::harness::{run, run_with_input, text};

/// A model that `jobs/models/fetch.py` has fetched, as check.sh does first.
pub fn model(name: &str) -> String {
    let models = std::env::var_os("STOKE_MODELS").map(PathBuf::from);
    let models = models.or_else(|| Some(std::env::home_dir()?.join(".cache/stoke/models"))).expect("a home folder");
    let folder = models.join(name);
    assert!(folder.is_dir(), "{} is not there: run `python3 jobs/models/fetch.py`", folder.display());
    folder.to_str().expect("UTF-8").to_owned()
}

/// The answer of transformers on the same weights (`jobs/reference/golden/lm/smollm2.json`).
#[test]
fn an_answer_is_that_of_transformers_on_the_same_weights() {
    let model = model("smollm2-135m-instruct");
    let system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
    let asked = ["infer", "--model", &model, "--full-precision", "--system", system, "What is the capital of France?"];
    let answer = run([&asked[..], &["--json"]].concat()).expect(0).json();
    assert_eq!(
        (text(&answer["text"]), text(&answer["finish_reason"])),
        ("The capital of France is Paris.".into(), "stop".into())
    );
    assert_eq!((&answer["prompt_tokens"], &answer["completion_tokens"]), (&37.into(), &8.into()));
    let plain = run(asked).expect(0).says(&["37 tokens read", "8 made"]);
    assert_eq!(plain.stdout, "The capital of France is Paris.\n");
}

#[test]
fn answers_are_drawn_by_their_seed_and_cut_where_asked() {
    let model = model("smollm2-135m-instruct");
    let ask = |more: &[&str]| {
        let asked = ["infer", "--model", &model, "--json", "--max-tokens", "12", "--temperature", "0.9"];
        run_with_input([&asked[..], more].concat(), "Name three ports.\n").expect(0).json()
    };
    let first = ask(&["--seed", "1", "--threads", "1"]);
    assert_eq!((&first["completion_tokens"], text(&first["finish_reason"])), (&12.into(), "length".into()));
    assert_eq!(first["text"], ask(&["--seed", "1", "--threads", "2", "-"])["text"]);
    assert_ne!(first["text"], ask(&["--seed", "2"])["text"]);
    let raw = run(["infer", "--model", &model, "--raw", "--max-tokens", "3", "220 smtp.example.org ESMTP"]).expect(0);
    raw.says(&["3 made", "cut off by --max-tokens"]);
}

#[test]
fn what_is_wrong_with_a_model_or_a_prompt_is_said_with_its_mend() {
    let good = model("smollm2-135m-instruct");
    let infer = |model: &str, more: &[&str]| run([&["infer", "--model", model], more].concat());
    infer("/nowhere/model.gguf", &["x"]).expect(2).says(&["open the model", "/nowhere/model.gguf"]);
    infer(&model("all-minilm-l6-v2"), &["x"]).expect(2).says(&["makes vectors of texts", "stoke embed --model"]);
    infer("nowhere", &["x"]).expect(3).says(&["no model nowhere in", "smollm2-135m-instruct"]);
    infer("job-3", &["x"]).expect(2).says(&["is a job of the cluster", "gateway"]);
    // By its name in the folder of models.
    assert_eq!(
        infer("smollm2-135m-instruct", &["--max-tokens", "3", "x"]).expect(0).stdout,
        infer(&good, &["--max-tokens", "3", "x"]).expect(0).stdout
    );
    infer(&good, &["--temperature", "-1", "x"]).expect(2).says(&["temperature is -1, and must be from 0"]);
    infer(&good, &["--top-p", "2", "x"]).expect(2).says(&["top_p is 2"]);
    infer(&good, &["--max-tokens", "100000", "x"]).expect(2).says(&["more than the 8192", "--max-tokens"]);
    infer(&good, &["--raw", ""]).expect(2).says(&["the prompt is empty"]);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = PathBuf::from(&good).join("SmolLM2-135M-Instruct.Q4_1.gguf");
    let bytes = std::fs::read(file).expect("the model can be read");
    let cut = dir.path().join("cut.gguf");
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).expect("a temporary file");
    let ended = infer(cut.to_str().expect("UTF-8"), &["--json", "x"]).expect(2);
    assert!(text(&ended.json()["error"]["message"]).contains("open the model"), "{}", ended.stdout);
    infer(cut.to_str().expect("UTF-8"), &["x"]).expect(2).says(&["cut.gguf", "help: fetch it again"]);
}

/// Vectors of `--json` lines.
fn vectors(ended: &crate::harness::Ended) -> Vec<Vec<f64>> {
    let lines = ended.stdout.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
    lines.map(|line| serde_json::from_value(line["embedding"].clone()).expect("a vector")).collect()
}

/// The vectors of sentence-transformers (`jobs/reference/golden/lm/minilm.json`).
#[test]
fn embeddings_are_those_of_sentence_transformers_from_arguments_and_from_lines() {
    let model = model("all-minilm-l6-v2");
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../jobs/reference/golden/lm/minilm.json");
    let golden = std::fs::read(golden).expect("the golden file");
    let golden: serde_json::Value = serde_json::from_slice(&golden).expect("JSON");
    let texts = ["What is the capital of France?", "Paris is the capital of France.", "vpn01.corp.internal"];
    let made = run([&["embed", "--model", &model, "--json"], &texts[..]].concat()).expect(0);
    let found = vectors(&made);
    assert_eq!(found.len(), texts.len());
    for (text, found) in texts.iter().zip(&found) {
        let known = golden["texts"].as_array().expect("texts").iter().find(|known| text == &known["text"]);
        let known: Vec<f64> =
            serde_json::from_value(known.expect("a golden text")["millionths"].clone()).expect("values");
        assert_eq!((known.len(), found.len()), (384, 384));
        assert!(found.iter().zip(&known).all(|(found, known)| (found - known / 1e6).abs() < 2e-6), "{text}");
    }
    let product = |a: usize, b: usize| found[a].iter().zip(&found[b]).map(|(a, b)| a * b).sum::<f64>();
    assert!(product(0, 1) > 0.8 && product(0, 2) < 0.3, "{} {}", product(0, 1), product(0, 2));
    let input = texts.join("\n") + "\n";
    let lines = run_with_input(["embed", "--model", &model, "--json", "--threads", "1", "-"], &input).expect(0);
    assert_eq!(lines.stdout, made.stdout);
    let plain = run_with_input(["embed", "--model", &model], &input).expect(0).says(&["3 texts", "384 values each"]);
    let plain: Vec<Vec<f64>> = plain.stdout.lines().map(|line| serde_json::from_str(line).expect("an array")).collect();
    assert_eq!(plain, found);
}

#[test]
fn what_is_wrong_with_texts_to_embed_is_said_and_long_ones_are_cut() {
    let good = model("all-minilm-l6-v2");
    let long = "word ".repeat(300);
    let line = run(["embed", "--model", &good, "--json", &long]).expect(0).json();
    assert_eq!((&line["tokens"], &line["tokens_left_out"]), (&256.into(), &46.into()));
    run(["embed", "--model", &good, "short", &long])
        .expect(0)
        .says(&["text 2 is longer than the 256 tokens", "46 at its end"]);
    // An empty line is a text, no line is none.
    assert_eq!(run_with_input(["embed", "--model", &good], "\na\n\nb").expect(0).stdout.lines().count(), 4);
    run_with_input(["embed", "--model", &good], "").expect(2).says(&["there is no text", "help: "]);
    let longest = "x".repeat((512 << 10) + 1);
    run_with_input(["embed", "--model", &good], &format!("a\n{longest}\n"))
        .expect(2)
        .says(&["line 2", "is longer than 524288 bytes"]);
    run(["embed", "--model", "/nowhere", "x"]).expect(2).says(&["open the model", "/nowhere"]);
    let decoder = model("smollm2-135m-instruct");
    run(["embed", "--model", &decoder, "x"]).expect(2).says(&["makes text, and no vectors", "stoke infer --model"]);
    run(["embed", "x"]).expect(2).says(&["--model"]);
}
