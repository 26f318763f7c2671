//! Our side of the comparison of language models (`lm_peers.py`, which says what the workload is and runs the peers): prints one line of JSON.
//!
//!     RAYON_NUM_THREADS=2 cargo bench -p stoke-cli -p stoke-tests --bench lm -- decoder|encoder MODEL WORKLOAD
//!
//! Measures what the rest of the program calls: the engine with its schedule and sampling, and the encoder.

use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};
use stoke_jobs::lm::engine::{Ask, Engine, Limits, Request};
use stoke_jobs::lm::kernels::Cache;
use stoke_jobs::lm::{Decoder, Encoder, Precision, Sampling, Share, Weights};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Tokens of a sequence at most.
const CONTEXT: usize = 1_024;
/// Rows of a batch, as `stoke infer` has them.
const ROWS_MAX: usize = 256;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let [part, model, workload] = arguments.as_slice() else {
        println!("usage: lm decoder|encoder MODEL WORKLOAD; lm_peers.py runs it");
        return;
    };
    let weights = Weights::open(Path::new(model)).expect("the model opens");
    let workload = std::fs::read(workload).expect("the workload can be read");
    let workload: Value = serde_json::from_slice(&workload).expect("the workload is JSON");
    let mut figures = match part.as_str() {
        "decoder" => decoder(&weights, &workload),
        "encoder" => encoder(&weights, &workload),
        other => panic!("there is no part {other:?}"),
    };
    figures["peak_mib"] = json!(peak_mib());
    println!("{figures}");
}

fn decoder(weights: &Weights, workload: &Value) -> Value {
    let layers = weights.config().expect("a decoder").layers;
    let decoder = Decoder::new(weights, 0..layers, CONTEXT, Precision::Rounded, Share::WHOLE).expect("the model opens");
    let limits = Limits { running_max: 8, rows_max: ROWS_MAX, batches_max: 1, waiting_max: 8, context: CONTEXT };
    let mut engine = Engine::new(decoder, 8 * (CONTEXT / Cache::PAGE) as u32, limits);
    let (long, short) = (ids(&workload["long"]), ids(&workload["short"]));
    let (firsts, eight) = (lists(&workload["firsts"]), lists(&workload["eight"]));
    let steps = workload["steps"].as_u64().expect("a number of steps") as usize;
    // Once for the pages of the file.
    answer(&mut engine, std::slice::from_ref(&short), 2);
    let waits = firsts.iter().map(|prompt| answer(&mut engine, std::slice::from_ref(prompt), 1).0);
    let first = waits.fold([0.0; 2], |sum, first| [sum[0] + first[0], sum[1] + first[1]]);
    let (prefill, _) = answer(&mut engine, std::slice::from_ref(&long), 1);
    let (_, one) = answer(&mut engine, std::slice::from_ref(&short), steps + 1);
    let (_, all) = answer(&mut engine, &eight, steps + 1);
    json!({
        "first_token_ms": first.map(|seconds| seconds * 1e3 / firsts.len() as f64),
        "prefill": prefill.map(|seconds| long.len() as f64 / seconds),
        "decode_1": one.map(|seconds| steps as f64 / seconds),
        "decode_8": all.map(|seconds| (8 * steps) as f64 / seconds),
    })
}

/// What it takes until all prompts have their first token, and from then on until each has `tokens`.
fn answer(engine: &mut Engine<'_>, prompts: &[Vec<u32>], tokens: usize) -> (Seconds, Seconds) {
    let begun = Clock::start();
    for (id, prompt) in prompts.iter().enumerate() {
        let request = Request { id: id as u64, prompt: prompt.clone(), answered: Vec::new(), tokens_max: tokens };
        engine.submit(Ask { request, sampling: Sampling::default(), last: Vec::new() }).expect("room for the prompts");
    }
    let (mut made, mut first) = (vec![0; prompts.len()], None);
    while engine.load() != (0, 0) {
        for token in engine.step() {
            made[token.id as usize] += 1;
        }
        if made.iter().all(|made| *made > 0) {
            first.get_or_insert_with(|| (begun.elapsed(), Clock::start()));
        }
    }
    assert!(made.iter().all(|made| *made == tokens), "each prompt has its tokens: {made:?}");
    let (first, begun) = first.expect("a first token");
    (first, begun.elapsed())
}

fn encoder(weights: &Weights, workload: &Value) -> Value {
    let mut encoder = Encoder::open(weights).expect("the model opens");
    let texts = lists(&workload["texts"]);
    let rounds = workload["rounds"].as_u64().expect("a number of rounds") as usize;
    encoder.encode(&texts);
    let mut rate = |size: usize| {
        let begun = Clock::start();
        for _ in 0..rounds {
            texts.chunks(size).for_each(|texts| assert_eq!(encoder.encode(texts).len(), texts.len()));
        }
        begun.elapsed().map(|seconds| (rounds * texts.len()) as f64 / seconds)
    };
    json!({"embed_1": rate(1), "embed_32": rate(32)})
}

/// By the wall, and of the processors.
type Seconds = [f64; 2];

struct Clock {
    wall: Instant,
    processors: f64,
}

impl Clock {
    fn start() -> Self {
        Self { wall: Instant::now(), processors: processor_seconds() }
    }

    fn elapsed(&self) -> Seconds {
        // Linux counts hundredths.
        [self.wall.elapsed().as_secs_f64(), (processor_seconds() - self.processors).max(0.005)]
    }
}

/// What this process has had of them.
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    let (_, fields) = stat.rsplit_once(')').expect("a name in brackets");
    let ticks = fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<f64>().expect("ticks"));
    ticks.sum::<f64>() / 100.0
}

fn ids(json: &Value) -> Vec<u32> {
    serde_json::from_value(json.clone()).expect("token ids")
}

fn lists(json: &Value) -> Vec<Vec<u32>> {
    json.as_array().expect("lists").iter().map(ids).collect()
}

/// The most memory that this process ever had, with what it mapped of files and read.
fn peak_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("Linux counts it");
    let kib = line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok());
    kib.expect("a number of KiB") / 1024.0
}
