//! How good a policy is: whole episodes from seeds that training does not use. Owns the statistics that a policy without an env of
//! its own sees observations through; counts nothing of what it sees.

use super::actor::{Acted, Actor, Choices, Explore, Place};
use super::draws::{Draws, Stream};
use super::env::{Actions, StepBuffer, VecEnv};
use super::error::{RlError, check_len};
use super::running::Running;
use super::space::Space;
use crate::train::Metrics;

/// What a policy sees observations through, where it was trained on normalised ones.
#[derive(Debug, Clone, PartialEq)]
pub struct Normaliser(pub(super) Running);

impl Normaliser {
    /// The statistics of two lanes together.
    pub fn merge(&mut self, other: &Self) {
        self.0.merge(&other.0);
    }
}

/// Returns and lengths of episodes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Returns {
    /// Of episodes, as the environment rewards them.
    pub returns: Vec<f64>,
    pub lengths: Vec<u32>,
}

impl Returns {
    pub fn mean(&self) -> f64 {
        self.returns.iter().sum::<f64>() / self.returns.len().max(1) as f64
    }

    /// Of the sample; 0 of one.
    pub fn deviation(&self) -> f64 {
        let mean = self.mean();
        let squares: f64 = self.returns.iter().map(|value| (value - mean) * (value - mean)).sum();
        (squares / (self.returns.len().max(2) - 1) as f64).sqrt()
    }

    /// Mean length.
    pub fn length(&self) -> f64 {
        self.lengths.iter().map(|length| f64::from(*length)).sum::<f64>() / self.lengths.len().max(1) as f64
    }

    pub fn metrics(&self) -> Metrics {
        let named = [
            ("eval_return_mean", self.mean()),
            ("eval_return_std", self.deviation()),
            ("eval_length_mean", self.length()),
        ];
        named.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// Plays, as `explore` says (`Greedy` or `Sample`), until so many episodes have ended, each of them in an env and with a seed of its own. An episode that is longer than
/// `steps_max` counts with what it has until then: an environment may have no limit.
pub fn evaluate(
    actor: &mut Actor,
    env: &mut dyn VecEnv,
    normaliser: Option<&Normaliser>,
    (seed, steps_max, explore): (u64, u32, Explore),
) -> Result<Returns, RlError> {
    let (envs, len) = (env.num_envs(), env.spec().observation_len());
    check_len("numbers of the policy's observation", actor.policy().observation_len(), len)?;
    let seeds: Vec<u64> =
        (0..envs as u64).map(|env| Draws::new(seed, Stream::Evaluation, [env, 0, 0]).bits()).collect();
    let mut buffer = StepBuffer::new(env);
    env.reset(&seeds, &mut buffer.observations)?;
    let (mut sums, mut lengths, mut over) = (vec![0f64; envs], vec![0u32; envs], vec![false; envs]);
    let space = env.spec().action.clone();
    let (mut choices, mut log_probs, mut values) = (Choices::default(), Vec::new(), Vec::new());
    for step in 0..steps_max {
        if let Some(Normaliser(running)) = normaliser {
            buffer.observations.chunks_mut(len).for_each(|row| running.normalise(row));
        }
        choices.clear();
        log_probs.clear();
        values.clear();
        let mut acted = Acted { choices: &mut choices, log_probs: &mut log_probs, values: &mut values };
        let places = (0..envs).map(|env| Place { env: env as u64, step: step.into() });
        actor.act(&buffer.observations, places, explore, &mut acted)?;
        if let Space::Box { low, high } = &space {
            for row in choices.continuous.chunks_mut(low.len()) {
                let bounds = low.iter().zip(high);
                row.iter_mut().zip(bounds).for_each(|(value, (low, high))| *value = value.max(*low).min(*high));
            }
            env.step(Actions::Box(&choices.continuous), buffer.step())?;
        } else {
            env.step(Actions::Discrete(&choices.discrete), buffer.step())?;
        }
        for (index, (sum, over)) in sums.iter_mut().zip(&mut over).enumerate() {
            if !*over {
                *sum += f64::from(buffer.rewards[index]);
                lengths[index] += 1;
                *over = buffer.terminated[index] || buffer.truncated[index];
            }
        }
        if !over.contains(&false) {
            break;
        }
    }
    Ok(Returns { returns: sums, lengths })
}
