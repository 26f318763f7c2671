//! SmolLM2 on our kernels against what transformers computes on the same weights (`jobs/reference/lm/smollm2.py`), and against itself: an answer
//! does not depend on how it is cut.

use std::path::Path;

use serde::Deserialize;
use stoke_jobs::lm::kernels::{Cache, Place, Rows};
use stoke_jobs::lm::{Alone, Decoder, Memory, Precision, Share, Weights, likeliest};

use crate::common::model;

const CONTEXT: usize = 1_024;

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    name: String,
    prompt: Vec<u32>,
    /// Greedy, in 64 bits.
    continuation: Vec<u32>,
    /// Between the two best logits of each.
    margins: Vec<f32>,
    logits: Vec<Logits>,
}

/// The best ones for a token of the continuation.
#[derive(Deserialize)]
struct Logits {
    at: usize,
    ids: Vec<usize>,
    values: Vec<f32>,
}

fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/golden/lm/smollm2.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn weights() -> Weights {
    Weights::open(&model("smollm2-135m-instruct").join("SmolLM2-135M-Instruct.Q4_1.gguf")).unwrap()
}

/// One sequence on layers of the model.
struct Sequence<'w> {
    decoder: Decoder<'w>,
    memory: Memory,
    pages: Vec<u32>,
}

impl<'w> Sequence<'w> {
    fn new(weights: &'w Weights, layers: std::ops::Range<usize>, precision: Precision) -> Self {
        let decoder = Decoder::new(weights, layers, CONTEXT, precision, Share::WHOLE).unwrap();
        let pages = CONTEXT / Cache::PAGE;
        Self { memory: decoder.memory(pages), decoder, pages: (0..pages as u32).rev().collect() }
    }

    /// Rows at the positions from `first` on.
    fn forward(&mut self, first: usize, hidden: &mut Rows) {
        let places = (first..first + hidden.len()).map(|position| Place { pages: &self.pages, position });
        let places: Vec<Place<'_>> = places.collect();
        self.decoder.forward(hidden, &places, &mut self.memory, &mut Alone).unwrap();
    }

    /// The logits after each of these tokens, which begin at the position `first`.
    fn logits(&mut self, first: usize, tokens: &[u32]) -> Rows {
        let mut hidden = self.decoder.embed(tokens.iter().copied());
        self.forward(first, &mut hidden);
        self.decoder.logits(&hidden, &mut self.memory)
    }
}

/// The logits for each token of the continuation, which is given.
fn followed(sequence: &mut Sequence<'_>, prompt: &Prompt) -> Vec<Vec<f32>> {
    let tokens = [&prompt.prompt[..], &prompt.continuation].concat();
    let logits = sequence.logits(0, &tokens);
    (0..prompt.continuation.len()).map(|at| logits.row(prompt.prompt.len() - 1 + at).to_vec()).collect()
}

/// The largest difference from the golden logits.
fn largest_error(prompt: &Prompt, found: &[Vec<f32>]) -> f32 {
    let errors = prompt.logits.iter().flat_map(|golden| {
        let row = &found[golden.at];
        golden.ids.iter().zip(&golden.values).map(|(id, value)| (row[*id] - value).abs())
    });
    errors.fold(0.0, f32::max)
}

#[test]
fn activations_as_they_are_give_the_logits_and_tokens_of_transformers() {
    let weights = weights();
    let mut sequence = Sequence::new(&weights, 0..30, Precision::Full);
    for prompt in golden().prompts.iter().step_by(13) {
        let found = followed(&mut sequence, prompt);
        // transformers in 32 bits is 0.008 from itself in 64.
        let error = largest_error(prompt, &found);
        assert!(error < 0.004, "{}: {error}", prompt.name);
        let tokens: Vec<u32> = found.iter().map(|logits| likeliest(logits)).collect();
        assert_eq!(tokens, prompt.continuation, "{}", prompt.name);
    }
}

/// Rotate-half, biases, an output layer of its own, bf16 in a safetensors folder, and sizes that are no whole number of lanes.
#[test]
fn a_qwen2_in_a_folder_gives_the_logits_of_transformers() {
    #[derive(Deserialize)]
    struct Qwen2 {
        tokens: Vec<u32>,
        logits: Vec<Vec<f32>>,
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/golden/lm/qwen2");
    let golden: Qwen2 = serde_json::from_slice(&std::fs::read(folder.join("logits.json")).unwrap()).unwrap();
    let weights = Weights::open(&folder).unwrap();
    let config = weights.config().unwrap();
    assert!(config.qkv_bias && !config.tied_embeddings && config.head_size == 10);
    // Weights without blocks are multiplied with activations as they are, either way.
    for precision in [Precision::Full, Precision::Rounded] {
        let found = Sequence::new(&weights, 0..2, precision).logits(0, &golden.tokens);
        let pairs = golden.logits.iter().flatten().zip(&found.values);
        // Logits are up to 8 in size.
        let error = pairs.fold(0.0f32, |error, (golden, found)| error.max((golden - found).abs()));
        assert!(error < 2e-5, "{precision:?}: {error}");
    }
}

/// As llama.cpp does it; that gives PyTorch's tokens to the end for 18 of these 50 prompts.
#[test]
fn rounded_activations_give_the_tokens_of_transformers_where_the_choice_is_clear() {
    let weights = weights();
    let mut sequence = Sequence::new(&weights, 0..30, Precision::Rounded);
    let (mut same, mut all) = (0, 0);
    for prompt in &golden().prompts {
        for (at, logits) in followed(&mut sequence, prompt).iter().enumerate() {
            let is_same = likeliest(logits) == prompt.continuation[at];
            assert!(is_same || prompt.margins[at] < 1.0, "{}, token {at}: margin {}", prompt.name, prompt.margins[at]);
            same += u32::from(is_same);
            all += 1;
        }
    }
    assert!(same * 100 >= all * 96, "{same} of {all} tokens");
}

#[test]
fn logits_have_the_same_bits_however_the_work_is_cut() {
    let (weights, golden) = (weights(), golden());
    let prompt = &golden.prompts[0];
    let tokens = [&prompt.prompt[..], &prompt.continuation].concat();
    let new = |layers| Sequence::new(&weights, layers, Precision::Rounded);
    let whole = new(0..30).logits(0, &tokens);
    let last = tokens.len() - 1;
    let bits = |rows: &Rows, row: usize| rows.row(row).iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    // Token by token, and some at a time.
    for size in [1, 7] {
        let mut sequence = new(0..30);
        let chunks = tokens.chunks(size).enumerate();
        let made: Vec<Rows> = chunks.map(|(at, chunk)| sequence.logits(at * size, chunk)).collect();
        let row = made.last().unwrap();
        assert_eq!(bits(row, row.len() - 1), bits(&whole, last), "{size} at a time");
    }
    // Over stages, each with the keys and values of its own layers.
    let mut stages = [new(0..11), new(11..12), new(12..30)];
    let mut hidden = stages[0].decoder.embed(tokens.iter().copied());
    stages.iter_mut().for_each(|stage| stage.forward(0, &mut hidden));
    let [.., last_stage] = &mut stages;
    let made = last_stage.decoder.logits(&hidden, &mut last_stage.memory);
    assert_eq!(bits(&made, last), bits(&whole, last), "three stages");
    // Beside another sequence, in turn.
    let Sequence { decoder, mut memory, pages } = new(0..30);
    let other = &golden.prompts[1].prompt;
    let (own, others) = pages.split_at(pages.len() / 2);
    let mut rows: Vec<(u32, Place<'_>)> = Vec::new();
    for position in 0..tokens.len().max(other.len()) {
        let of = |tokens: &[u32], pages| tokens.get(position).map(|token| (*token, Place { pages, position }));
        rows.extend(of(&tokens, own).into_iter().chain(of(other, others)));
    }
    let (ids, places): (Vec<u32>, Vec<Place<'_>>) = rows.iter().copied().unzip();
    let mut hidden = decoder.embed(ids.into_iter());
    decoder.forward(&mut hidden, &places, &mut memory, &mut Alone).unwrap();
    let made = decoder.logits(&hidden, &mut memory);
    let row = rows.iter().rposition(|(_, place)| place.pages == own && place.position == last).unwrap();
    assert_eq!(bits(&made, row), bits(&whole, last), "beside another sequence");
}
