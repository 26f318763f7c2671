//! A policy with weights that acts: observations in, actions out. Owns a copy of the weights and their version; never learns.
//!
//! A row's bits do not depend on how many rows there are (N1), and its random numbers are those of (seed, env, step): any step can be played
//! again anywhere.

use std::sync::Arc;

use super::draws::{Draws, Stream};
use super::error::{RlError, check_len};
use super::math::exp;
use super::net::Activations;
use super::policy::{LN_SQRT_TAU, Policy, argmax, log_softmax};
use super::{Actions, Space};
use crate::lm::kernels::Isa;

/// How an actor chooses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Explore {
    /// From the policy's distribution. Of values: the best one.
    Sample,
    /// The most probable action, or the best one.
    Greedy,
    /// Any action with a probability that falls in a line from `start` to `end` over the first `steps` of an env, else the best one.
    Epsilon { start: f64, end: f64, steps: u64 },
}

impl Explore {
    fn epsilon(self, step: u64) -> f64 {
        match self {
            Self::Epsilon { start, end, steps } => {
                let share = (step as f64 / steps.max(1) as f64).min(1.0);
                start + (end - start) * share
            }
            Self::Sample | Self::Greedy => 0.0,
        }
    }
}

/// Actions of some rows; one of the vectors is empty.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Choices {
    /// [rows]
    pub discrete: Vec<u32>,
    /// [rows x numbers], as drawn: environments cut them to their bounds.
    pub continuous: Vec<f32>,
}

impl Choices {
    pub fn actions(&self, space: &Space) -> Actions<'_> {
        match space {
            Space::Discrete { .. } => Actions::Discrete(&self.discrete),
            Space::Box { .. } => Actions::Box(&self.continuous),
        }
    }

    pub fn clear(&mut self) {
        self.discrete.clear();
        self.continuous.clear();
    }
}

/// Where the draws of a row stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Number of the env in the job.
    pub env: u64,
    /// Steps that it has done, those that began episodes included.
    pub step: u64,
}

#[derive(Debug, Clone)]
pub struct Actor {
    policy: Arc<Policy>,
    isa: Isa,
    seed: u64,
    version: u64,
    weights: Vec<f32>,
    outputs: Activations,
    values: Activations,
    row: Vec<f32>,
    room: Vec<f32>,
}

impl Actor {
    /// `seed` is the job's. The weights are zeros before the first [`Self::load`].
    pub fn new(policy: &Arc<Policy>, seed: u64) -> Self {
        Self {
            policy: policy.clone(),
            isa: Isa::best(),
            seed,
            version: 0,
            weights: vec![0.0; policy.layout().len()],
            outputs: Activations::default(),
            values: Activations::default(),
            row: Vec::new(),
            room: Vec::new(),
        }
    }

    pub fn policy(&self) -> &Arc<Policy> {
        &self.policy
    }

    /// Updates that had been applied to the weights.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Takes weights: the flat vector in layout order, without figures.
    pub fn load(&mut self, version: u64, weights: &[f32]) -> Result<(), RlError> {
        check_len("weights of a policy", weights.len(), self.weights.len())?;
        self.weights.copy_from_slice(weights);
        self.version = version;
        Ok(())
    }

    /// Appends an action, its log-probability and the value of the state for each row of `observations` [rows x numbers]. Of a policy of values the
    /// log-probability is 0 and the value that of the best action.
    pub fn act(
        &mut self,
        observations: &[f32],
        places: impl ExactSizeIterator<Item = Place>,
        explore: Explore,
        acted: &mut Acted<'_>,
    ) -> Result<(), RlError> {
        check_len("numbers of observations", observations.len(), places.len() * self.policy.observation_len())?;
        let input = self.policy.actor_input(observations, &mut self.room);
        self.policy.actor.forward(self.isa, &self.weights, input, &mut self.outputs);
        self.value(observations, acted.values);
        let width = self.policy.width();
        self.row.resize(width, 0.0);
        for (row, place) in self.outputs.output().chunks_exact(width).zip(places) {
            let mut draws = Draws::new(self.seed, Stream::Actions, [place.env, place.step, 0]);
            let log_prob = match self.policy.log_std {
                Some(at) => {
                    normal(row, &self.weights[at..at + width], explore, &mut draws, &mut acted.choices.continuous)
                }
                None => {
                    let (choice, log_prob) = if self.policy.critic.is_some() {
                        categorical(row, &mut self.row, explore, &mut draws)
                    } else if draws.unit() < explore.epsilon(place.step) {
                        (draws.below(width as u32), 0.0)
                    } else {
                        (argmax(row), 0.0)
                    };
                    acted.choices.discrete.push(choice);
                    log_prob
                }
            };
            acted.log_probs.push(log_prob);
        }
        Ok(())
    }

    /// Appends the value of each state.
    pub fn value(&mut self, observations: &[f32], values: &mut Vec<f32>) {
        match &self.policy.critic {
            Some(critic) => {
                let input = self.policy.critic_input(observations, &mut self.room);
                critic.forward(self.isa, &self.weights, input, &mut self.values);
                values.extend_from_slice(self.values.output());
            }
            None => {
                self.policy.actor.forward(self.isa, &self.weights, observations, &mut self.values);
                let rows = self.values.output().chunks_exact(self.policy.actor.outputs());
                values.extend(rows.map(|row| row[argmax(row) as usize]));
            }
        }
    }
}

/// Where actions go.
pub struct Acted<'a> {
    pub choices: &'a mut Choices,
    pub log_probs: &'a mut Vec<f32>,
    pub values: &'a mut Vec<f32>,
}

fn categorical(logits: &[f32], log_probs: &mut [f32], explore: Explore, draws: &mut Draws) -> (u32, f32) {
    log_softmax(logits, log_probs);
    let choice = if explore == Explore::Greedy {
        argmax(logits)
    } else {
        let (target, mut sum) = (draws.unit() as f32, 0.0);
        let below = log_probs.iter().position(|&log_prob| {
            sum += exp(log_prob);
            target < sum
        });
        // The sum may end just below 1.
        below.unwrap_or(logits.len() - 1) as u32
    };
    (choice, log_probs[choice as usize])
}

fn normal(means: &[f32], log_std: &[f32], explore: Explore, draws: &mut Draws, actions: &mut Vec<f32>) -> f32 {
    let mut log_prob = 0.0;
    for (mean, log_std) in means.iter().zip(log_std) {
        let action = match explore {
            Explore::Greedy => *mean,
            Explore::Sample | Explore::Epsilon { .. } => mean + exp(*log_std) * draws.normal() as f32,
        };
        actions.push(action);
        // As `normal_log_prob` computes it from the action, or the first ratio would not be 1.
        let off = (action - mean) * exp(-log_std);
        log_prob += -0.5 * off * off - log_std - LN_SQRT_TAU;
    }
    log_prob
}
