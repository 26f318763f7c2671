//! `stoke infer`: a real language model answers through the binary, and what is wrong is said with its mend. The numbers are compared with other
//! implementations in `jobs/tests/lm`.

use std::path::PathBuf;

use crate::harness::{run, run_with_input, text};

/// A model that `jobs/models/fetch.py` has fetched, as check.sh does first.
fn model(name: &str) -> String {
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
    infer(&model("all-minilm-l6-v2"), &["x"]).expect(2).says(&["is not supported"]);
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
