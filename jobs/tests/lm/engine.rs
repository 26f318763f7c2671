//! Requests together on the real model: each answer is the one that it would be alone, also when it is begun again in its middle.

use std::collections::BTreeMap;

use stoke_jobs::lm::engine::{Ask, Engine, Limits, Request};
use stoke_jobs::lm::{Decoder, Precision, Sampling, Share, Weights};

use crate::common::model;

const TOKENS_MAX: usize = 24;
/// `<|im_end|>`.
const LAST: u32 = 2;

fn ask(id: u64, prompt: &[u32], answered: &[u32], sampling: &Sampling) -> Ask {
    let request = Request { id, prompt: prompt.to_vec(), answered: answered.to_vec(), tokens_max: TOKENS_MAX };
    Ask { request, sampling: sampling.clone(), last: vec![LAST] }
}

/// What is made of these requests, which come one step after the other.
fn answers(weights: &Weights, pages: u32, asks: Vec<Ask>) -> BTreeMap<u64, Vec<u32>> {
    let decoder = Decoder::new(weights, 0..30, 512, Precision::Rounded, Share::WHOLE).unwrap();
    let limits = Limits { running_max: 4, rows_max: 24, batches_max: 1, waiting_max: 16, context: 512 };
    let mut engine = Engine::new(decoder, pages, limits);
    let mut answers: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    let mut asks = asks.into_iter();
    loop {
        let came = asks.next().map(|ask| engine.submit(ask).unwrap());
        for made in engine.step() {
            answers.entry(made.id).or_default().push(made.token);
        }
        if came.is_none() && engine.load() == (0, 0) {
            return answers;
        }
    }
}

#[test]
fn answers_are_those_of_each_request_alone_and_go_on_from_their_middle() {
    let file = model("smollm2-135m-instruct").join("SmolLM2-135M-Instruct.Q4_1.gguf");
    let weights = Weights::open(&file).unwrap();
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/golden/lm/smollm2.json");
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let prompts = golden["prompts"].as_array().unwrap().iter().step_by(9);
    let prompts: Vec<Vec<u32>> =
        prompts.map(|prompt| serde_json::from_value(prompt["prompt"].clone()).unwrap()).collect();
    let greedy = Sampling::default();
    let drawn = Sampling { temperature: 0.8, top_p: 0.9, repetition_penalty: 1.1, seed: 7, ..Sampling::default() };
    let sampling = |at: usize| if at.is_multiple_of(2) { &greedy } else { &drawn };
    let all = || prompts.iter().enumerate().map(|(at, prompt)| (at, ask(at as u64, prompt, &[], sampling(at))));
    let alone: BTreeMap<u64, Vec<u32>> = all().flat_map(|(_, ask)| answers(&weights, 32, vec![ask])).collect();
    assert!(alone.values().any(|answer| answer.len() == TOKENS_MAX) && alone.len() == prompts.len());
    // So few pages that some give way to others.
    for pages in [200, 28] {
        assert_eq!(answers(&weights, pages, all().map(|(_, ask)| ask).collect()), alone, "{pages} pages");
    }
    for (at, prompt) in prompts.iter().enumerate() {
        let whole = &alone[&(at as u64)];
        for cut in [1, whole.len() / 2, whole.len() - 1].into_iter().filter(|cut| *cut < whole.len()) {
            let rest = answers(&weights, 64, vec![ask(9, prompt, &whole[..cut], sampling(at))]);
            assert_eq!(rest[&9], whole[cut..], "request {at} from token {cut}");
        }
    }
}
