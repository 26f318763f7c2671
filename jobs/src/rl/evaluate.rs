//! Episodes of a policy that was learned, with seeds that training never had: what it is worth. Owns the loop; learns nothing.

use std::sync::Arc;

use super::actor::{Actor, Explore};
use super::config::{RlConfig, RlPlan};
use super::error::RlError;
use super::make_env::make_env;
use super::policy::Policy;
use super::rollout::{Rollout, RolloutConfig};
use crate::train::Metrics;

/// Lanes of training are below it: their seeds are others.
const LANE: u32 = 1 << 30;
/// Steps at a time, of each env.
const STEPS: usize = 128;
/// Episodes that take longer are given up.
const ENV_STEPS_MAX: u64 = 1_000_000;

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

    pub fn metrics(&self) -> Metrics {
        let length =
            self.lengths.iter().map(|length| f64::from(*length)).sum::<f64>() / self.lengths.len().max(1) as f64;
        let named =
            [("eval_return_mean", self.mean()), ("eval_return_std", self.deviation()), ("eval_length_mean", length)];
        named.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// Episodes by the best action. `seed` is the evaluation's: each env plays one episode. Where observations are normalised, `lane` is a lane of training as bytes
/// (its running figures are a part of what was learned): its envs go on, and each one's first episode, which has begun in training, is left out.
pub fn evaluate(
    config: &RlConfig,
    plan: &RlPlan,
    (policy, weights): (&Arc<Policy>, &[f32]),
    (seed, episodes): (u64, usize),
    lane: &[u8],
) -> Result<Returns, RlError> {
    let mut actor = Actor::new(policy, seed);
    actor.load(0, weights)?;
    let goes_on = plan.normalise && !lane.is_empty();
    let (envs, left_out) = if goes_on { (plan.envs, 1) } else { (episodes, 0) };
    let rollout = RolloutConfig { seed, normalise: plan.normalise, gamma: plan.gamma };
    let mut player = Rollout::new(rollout, make_env(config, envs)?);
    if goes_on {
        player.load(lane)?
    } else {
        player.begin(LANE)?
    }
    let wanted = left_out + episodes.div_ceil(envs);
    let mut ended: Vec<Vec<(f64, u32)>> = vec![Vec::new(); envs];
    let mut steps = 0;
    while ended.iter().any(|ended| ended.len() < wanted) && steps < ENV_STEPS_MAX {
        let trajectory = player.play(&mut actor, Explore::Greedy, STEPS)?;
        steps += STEPS as u64;
        for episode in &trajectory.episodes {
            let ended = &mut ended[episode.env as usize];
            if ended.len() < wanted {
                ended.push((episode.sum, episode.length));
            }
        }
    }
    let counted = || ended.iter().flat_map(|ended| ended.iter().skip(left_out)).take(episodes);
    let returns = counted().map(|(sum, _)| *sum).collect();
    Ok(Returns { returns, lengths: counted().map(|(_, length)| *length).collect() })
}
