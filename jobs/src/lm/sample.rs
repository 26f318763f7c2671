//! Which token follows: greedy, or drawn. Owns the order in which candidates are left out and the random numbers; knows no model.
//!
//! S1: the draw for the token at an index of an answer depends on the seed and that index alone, so an answer that is begun again in its middle goes
//! on as it would have.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// How the next token is chosen. The steps and their order are transformers' (`LogitsProcessorList` of `generate`): repetition penalty, temperature,
/// top-k, top-p, min-p.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0: the most likely token, always.
    pub temperature: f32,
    /// Only so many of the most likely tokens; 0: all.
    pub top_k: usize,
    /// Only the most likely tokens that together have at least this probability.
    pub top_p: f32,
    /// Only tokens at least this times as likely as the likeliest.
    pub min_p: f32,
    /// Logits of tokens that are there already are divided by it where they are above zero, and multiplied where below (Keskar et al. 2019).
    pub repetition_penalty: f32,
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// What is wrong with the values, if anything is, and what to write instead.
    pub fn check(&self) -> Result<(), String> {
        let within = |name: &str, value: f32, (least, most): (f32, f32)| match (least..=most).contains(&value) {
            true => Ok(()),
            false if least == f32::MIN_POSITIVE => {
                Err(format!("{name} is {value}, and must be above 0 and at most {most}"))
            }
            false => Err(format!("{name} is {value}, and must be from {least} to {most}")),
        };
        within("temperature", self.temperature, (0.0, 100.0))?;
        within("top_p", self.top_p, (f32::MIN_POSITIVE, 1.0))?;
        within("min_p", self.min_p, (0.0, 1.0))?;
        within("repetition_penalty", self.repetition_penalty, (0.01, 100.0))
    }

    /// The token at `index` of an answer. `before`: the tokens of prompt and answer so far. Changes the logits.
    pub fn choose(&self, logits: &mut [f32], before: &[u32], index: u64) -> u32 {
        if self.repetition_penalty != 1.0 {
            self.penalise(logits, before);
        }
        if self.temperature == 0.0 {
            return likeliest(logits);
        }
        let mut candidates = self.candidates(logits);
        let whole: f32 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        // A block of the generator for each index.
        random.set_word_pos(u128::from(index) * 16);
        let mut left = random.next_u32() as f32 / (u32::MAX as f32 + 1.0) * whole;
        let last = candidates.pop().expect("the likeliest token stays");
        let drawn = candidates.into_iter().find(|(_, weight)| {
            left -= weight;
            left < 0.0
        });
        drawn.unwrap_or(last).0
    }

    fn penalise(&self, logits: &mut [f32], before: &[u32]) {
        let mut seen: Vec<u32> = before.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit < 0.0 { *logit * self.repetition_penalty } else { *logit / self.repetition_penalty };
            }
        }
    }

    /// Tokens that are left, the likeliest first, each with a weight in proportion to its probability. At least one.
    fn candidates(&self, logits: &[f32]) -> Vec<(u32, f32)> {
        let largest = logits[likeliest(logits) as usize];
        let mut found: Vec<(u32, f32)> =
            (0..).zip(logits.iter().map(|logit| (logit - largest) / self.temperature)).collect();
        // Equal ones by their number, so that the order is one.
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if (1..found.len()).contains(&self.top_k) {
            found.select_nth_unstable_by(self.top_k - 1, order);
            found.truncate(self.top_k);
        }
        found.sort_unstable_by(order);
        found.iter_mut().for_each(|(_, logit)| *logit = logit.exp());
        if self.top_p < 1.0 {
            let whole: f32 = found.iter().map(|(_, weight)| weight).sum();
            let mut sum = 0.0;
            let enough = found.iter().position(|(_, weight)| {
                sum += weight;
                sum >= self.top_p * whole
            });
            found.truncate(enough.map_or(found.len(), |last| last + 1));
        }
        // The likeliest has the weight 1.
        let least = found.iter().position(|(_, weight)| *weight < self.min_p);
        found.truncate(least.unwrap_or(found.len()).max(1));
        found
    }
}

/// The token with the largest logit; of equal ones the first.
pub fn likeliest(logits: &[f32]) -> u32 {
    let best = (0..)
        .zip(logits)
        .fold((0, f32::NEG_INFINITY), |best, (token, logit)| if *logit > best.1 { (token, *logit) } else { best });
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    fn drawn(sampling: &Sampling) -> Vec<u32> {
        let mut found: Vec<u32> = (0..500).map(|index| sampling.choose(&mut LOGITS.to_vec(), &[], index)).collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(Sampling::default().choose(&mut LOGITS.to_vec(), &[], 7), 1);
        let penalised = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(penalised.choose(&mut LOGITS.to_vec(), &[1, 4, 1, 99], 7), 3);
        let mut logits = LOGITS.to_vec();
        penalised.choose(&mut logits, &[1, 4], 0);
        assert_eq!(logits, [1.0, 1.5, 2.0, 3.0, -2.0]);
    }

    #[test]
    fn candidates_are_left_out_as_asked() {
        let warm = Sampling { temperature: 2.0, ..Sampling::default() };
        assert_eq!(drawn(&warm), [0, 1, 2, 3, 4]);
        assert_eq!(drawn(&Sampling { top_k: 2, ..warm.clone() }), [1, 3]);
        assert_eq!(drawn(&Sampling { top_k: 1, ..warm.clone() }), [1]);
        assert_eq!(drawn(&Sampling { top_p: 0.6, ..warm.clone() }), [1, 3]);
        assert_eq!(drawn(&Sampling { top_p: 1e-6, ..warm.clone() }), [1]);
        assert_eq!(drawn(&Sampling { min_p: 0.5, ..warm }), [1, 2, 3]);
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_index_alone() {
        let sampling = Sampling { temperature: 1.0, seed: 42, ..Sampling::default() };
        let draw = |index| sampling.choose(&mut LOGITS.to_vec(), &[], index);
        let tokens: Vec<u32> = (0..20_000).map(draw).collect();
        assert_eq!(tokens[77], draw(77));
        let whole: f64 = LOGITS.iter().map(|logit| f64::from(*logit).exp()).sum();
        for (token, logit) in (0..).zip(LOGITS) {
            let (expected, times) =
                (f64::from(logit).exp() / whole, tokens.iter().filter(|drawn| **drawn == token).count());
            assert!(
                (times as f64 / 20_000.0 - expected).abs() < 0.015,
                "{token}: {times} of 20000, {expected} expected"
            );
        }
        let other = Sampling { seed: 43, ..sampling.clone() };
        assert_ne!(
            (0..50).map(|index| other.choose(&mut LOGITS.to_vec(), &[], index)).collect::<Vec<_>>(),
            tokens[..50]
        );
    }

    #[test]
    fn values_that_make_no_sense_are_refused() {
        assert!(Sampling::default().check().is_ok());
        for wrong in [
            Sampling { temperature: -1.0, ..Sampling::default() },
            Sampling { temperature: f32::NAN, ..Sampling::default() },
            Sampling { top_p: 0.0, ..Sampling::default() },
            Sampling { min_p: 1.5, ..Sampling::default() },
            Sampling { repetition_penalty: 0.0, ..Sampling::default() },
        ] {
            assert!(wrong.check().unwrap_err().contains("must be"), "{wrong:?}");
        }
    }
}
