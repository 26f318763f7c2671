//! Text that the model writes. Draws come from a generator that the length of the text keys, so the same weights write the same text.

use burn::tensor::Device;
use serde::Deserialize;
use stoke_jobs::{JobError, Spec};

use crate::model::{Config, Net};

/// `[sample]`, a section of this program's own.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    prompt: String,
    bytes: usize,
    temperature: f32,
}

impl Sampling {
    pub fn check(&self, spec: &Spec<'_>) -> Result<(), JobError> {
        if self.prompt.is_empty() {
            return Err(spec.mistake("sample", "prompt", "prompt is empty", "write how the text begins"));
        }
        if !(self.temperature > 0.0 && self.temperature <= 10.0) {
            return Err(spec.mistake(
                "sample",
                "temperature",
                "temperature is out of range",
                "write a number such as 0.7",
            ));
        }
        Ok(())
    }
}

pub fn text(net: &Net, config: &Config, sampling: &Sampling, device: &Device) -> String {
    let mut text = sampling.prompt.clone().into_bytes();
    for _ in 0..sampling.bytes {
        let seen = &text[text.len().saturating_sub(config.context)..];
        let logits = net.forward(config, &[seen], device).into_data();
        let logits = logits.as_slice::<f32>().expect("logits are f32");
        let last = &logits[logits.len() - 256..];
        text.push(draw(last, sampling.temperature, uniform(text.len() as u64)));
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// A byte with the probability that softmax gives it.
fn draw(logits: &[f32], temperature: f32, at: f32) -> u8 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = logits.iter().map(|logit| ((logit - max) / temperature).exp()).collect();
    let mut left = at * weights.iter().sum::<f32>();
    let found = weights.iter().position(|weight| {
        left -= weight;
        left < 0.0
    });
    found.unwrap_or(0) as u8
}

/// In [0, 1): SplitMix64's `key`-th number (Steele, Lea and Flood, 2014).
fn uniform(key: u64) -> f32 {
    let mut x = key.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) >> 40) as f32 / (1u64 << 24) as f32
}
