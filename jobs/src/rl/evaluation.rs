//! How good a policy is: whole episodes with its best actions, from seeds that training does not use. Owns the statistics that a policy without an env of
//! its own sees observations through; counts nothing of what it sees.

use super::actor::{Acted, Actor, Choices, Explore, Place};
use super::draws::{Draws, Stream};
use super::env::{Actions, StepBuffer, VecEnv};
use super::error::{RlError, check_len};
use super::running::Running;
use super::space::Space;

/// What a policy sees observations through, where it was trained on normalised ones.
#[derive(Debug, Clone, PartialEq)]
pub struct Normaliser(pub(super) Running);

impl Normaliser {
    /// The statistics of two lanes together.
    pub fn merge(&mut self, other: &Self) {
        self.0.merge(&other.0);
    }
}

/// Plays until so many episodes have ended, each of them in an env and with a seed of its own; their returns in order. An episode that is longer than
/// `steps_max` counts with what it has until then: an environment may have no limit.
pub fn evaluate(
    actor: &mut Actor,
    env: &mut dyn VecEnv,
    normaliser: Option<&Normaliser>,
    (seed, steps_max): (u64, u32),
) -> Result<Vec<f64>, RlError> {
    let (envs, len) = (env.num_envs(), env.spec().observation_len());
    check_len("numbers of the policy's observation", actor.policy().observation_len(), len)?;
    let seeds: Vec<u64> =
        (0..envs as u64).map(|env| Draws::new(seed, Stream::Evaluation, [env, 0, 0]).bits()).collect();
    let mut buffer = StepBuffer::new(env);
    env.reset(&seeds, &mut buffer.observations)?;
    let (mut sums, mut over) = (vec![0f64; envs], vec![false; envs]);
    let space = env.spec().action.clone();
    let (mut choices, mut log_probs, mut values) = (Choices::default(), Vec::new(), Vec::new());
    for _ in 0..steps_max {
        if let Some(Normaliser(running)) = normaliser {
            buffer.observations.chunks_mut(len).for_each(|row| running.normalise(row));
        }
        choices.clear();
        log_probs.clear();
        values.clear();
        let mut acted = Acted { choices: &mut choices, log_probs: &mut log_probs, values: &mut values };
        let places = (0..envs).map(|env| Place { env: env as u64, step: 0 });
        actor.act(&buffer.observations, places, Explore::Greedy, &mut acted)?;
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
                *over = buffer.terminated[index] || buffer.truncated[index];
            }
        }
        if !over.contains(&false) {
            break;
        }
    }
    Ok(sums)
}
