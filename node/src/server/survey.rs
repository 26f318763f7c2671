//! What this machine has of a model that is to be served: its shape, from the headers of its files, and how fast one of its layers is here. Owns the
//! measurement; how the model is cut is the coordinator's (`state/split.rs`).

use std::time::{Duration, Instant};

use stoke_jobs::lm::kernels::{Cache, Place};
use stoke_jobs::lm::{Alone, Decoder, DecoderConfig, Share, Weights};
use stoke_protocol::message::split::{Survey, Surveyed};

use super::model::{decoder, precision};
use crate::worker::text_of;

/// Layers are measured one behind the other until their weights are so many bytes: more than caches hold, as when a whole model is computed.
const SPAN_BYTES: u64 = 64 << 20;
/// A machine that does other things too is measured until it has had so long; the fastest round counts.
const MEASURE: Duration = Duration::from_millis(50);
const ROUNDS_MIN: u32 = 3;

/// Blocks for as long as a part of the weights takes to be read, and a little more. The error is for people: what is wrong, and what to do.
pub fn survey(asked: &Survey) -> Result<Surveyed, String> {
    let (weights, config) = decoder(&asked.model)?;
    let (layers, embedding_bytes, output_bytes) = sizes(&weights, &config);
    let layer_bytes = layers.iter().copied().max().unwrap_or(1).max(1);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(asked.threads as usize).build();
    let pool = pool.map_err(|error| format!("start compute threads: {error}"))?;
    let span = SPAN_BYTES.div_ceil(layer_bytes).clamp(1, config.layers as u64) as usize;
    let precision = precision(asked.precision);
    let decoder = Decoder::new(&weights, 0..span, Cache::PAGE, precision, Share::WHOLE);
    let decoder = decoder.map_err(|error| text_of(&error))?;
    let round = pool.install(|| fastest(&decoder));
    Ok(Surveyed {
        layers: config.layers as u32,
        layer_bytes,
        embedding_bytes,
        output_bytes,
        kv_heads: config.kv_heads as u32,
        parts_max: parts_max(&weights, &config, precision),
        token_bytes: (Cache::page_bytes(1, (1, config.head_size)) / Cache::PAGE) as u32,
        context: config.context as u32,
        vocabulary: config.vocab as u32,
        layer_ns: u64::try_from(round.as_nanos() / span as u128).unwrap_or(u64::MAX).max(1),
    })
}

/// Bytes of each layer, of the embedding, and of the output layer where it is another tensor.
fn sizes(weights: &Weights, config: &DecoderConfig) -> (Vec<u64>, u64, u64) {
    let (mut layers, mut embedding, mut output) = (vec![0; config.layers], 0, 0);
    for name in weights.names() {
        let bytes = weights.tensor(name).map_or(0, |tensor| tensor.bytes.len() as u64);
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        match (layer.and_then(|layer| layers.get_mut(layer)), name) {
            (Some(layer), _) => *layer += bytes,
            (None, "model.embed_tokens.weight") => embedding = bytes,
            (None, "lm_head.weight") if !config.tied_embeddings => output = bytes,
            (None, _) => {}
        }
    }
    (layers, embedding, output)
}

/// One row through the layers, as when a single answer is made.
fn fastest(decoder: &Decoder<'_>) -> Duration {
    let mut memory = decoder.memory(1);
    let mut round = || {
        let mut hidden = decoder.embed([0].into_iter());
        let began = Instant::now();
        let place = Place { pages: &[0], position: 0 };
        decoder.forward(&mut hidden, &[place], &mut memory, &mut Alone).expect("nobody else has a part of the sum");
        began.elapsed()
    };
    // The first one reads the file.
    round();
    let began = Instant::now();
    let (mut least, mut rounds) = (Duration::MAX, 0);
    while rounds < ROUNDS_MIN || began.elapsed() < MEASURE {
        least = least.min(round());
        rounds += 1;
    }
    least
}

/// Weights in blocks cannot be cut everywhere.
fn parts_max(weights: &Weights, config: &DecoderConfig, precision: stoke_jobs::lm::Precision) -> u32 {
    let cuts = |parts: &usize| {
        (0..*parts).all(|part| Decoder::new(weights, 0..1, 1, precision, Share { part, parts: *parts }).is_ok())
    };
    (1..=config.kv_heads).rev().find(cuts).unwrap_or(1) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use stoke_protocol::spec::Precision;

    #[test]
    fn a_model_is_measured_and_one_that_is_not_there_is_named() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../jobs/reference/golden/lm/qwen2");
        let asked = |model: &str| Survey { model: model.into(), precision: Precision::Rounded, threads: 1 };
        let found = survey(&asked(golden)).unwrap();
        assert!(found.layers > 0 && found.layer_bytes > 0 && found.embedding_bytes > 0 && found.layer_ns > 0);
        assert!((1..=found.kv_heads).contains(&found.parts_max), "{found:?}");
        let missing = survey(&asked("/no/such/model")).unwrap_err();
        assert!(missing.contains("/no/such/model"), "{missing}");
    }
}
