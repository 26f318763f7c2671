//! What a checkpoint of a job with `[rl]` holds, for whoever looks at it afterwards: the policy, and how it was learned. Learns nothing.

use std::sync::Arc;

use super::config::{Algorithm, RlConfig};
use super::curve::Curve;
use super::evaluation::{Normaliser, Returns, evaluate};
use super::policy::Policy;
use super::rollout::{Rollout, RolloutConfig};
use super::scan_budget::{Rival, WorldConfig, rivals};
use super::solo::figures_of;
use super::trainer::{STEPS_MAX, lanes_of, normaliser};
use super::{Actor, EnvSpec, Explore, RlError};
use crate::JobError;
use crate::train::NamedTensor;
use crate::train::parameters::check_model;

/// A policy with its weights.
pub struct Learned {
    config: RlConfig,
    env: EnvSpec,
    policy: Arc<Policy>,
    weights: Vec<f32>,
    /// Running figures of the lanes of training: a part of what was learned.
    normaliser: Option<Normaliser>,
}

impl Learned {
    /// Of a checkpoint's tensors. Makes the environment once, to see what it is.
    pub fn new(config_toml: &str, lanes: u32, tensors: &[NamedTensor]) -> Result<Self, JobError> {
        let config = RlConfig::parse(config_toml)?;
        let lane = config.environment().make(config.envs()).map_err(RlError::from)?;
        let env = lane.spec().clone();
        let plan = config.plan(config_toml, &env, lanes)?;
        let figures = figures_of(config.algorithm()).len() + 1;
        let policy = Arc::new(Policy::new(config.policy(), &env, &plan.hidden, figures)?);
        let model = tensors.iter().filter(|tensor| tensor.name.starts_with("model.")).cloned().collect();
        let weights = check_model(policy.layout(), model)?.into_iter().flat_map(|tensor| tensor.values).collect();
        let rollout = RolloutConfig { seed: 0, normalise: plan.normalise, gamma: plan.gamma };
        let normaliser = normaliser(&Rollout::new(rollout, lane), &lanes_of(tensors, lanes)?)?;
        Ok(Self { config, env, policy, weights, normaliser })
    }

    pub fn environment(&self) -> &EnvSpec {
        &self.env
    }

    pub fn algorithm(&self) -> Algorithm {
        self.config.algorithm()
    }

    /// `explore`: `Sample` or `Greedy`.
    pub fn evaluate(&self, (seed, episodes): (u64, usize), explore: Explore) -> Result<Returns, JobError> {
        let mut actor = Actor::new(&self.policy, seed);
        actor.load(0, &self.weights)?;
        let mut env = self.config.environment().make(episodes).map_err(RlError::from)?;
        Ok(evaluate(&mut actor, &mut *env, self.normaliser.as_ref(), (seed, STEPS_MAX, explore))?)
    }

    /// Of `scan-budget`: its world.
    pub fn world(&self) -> Result<Option<WorldConfig>, JobError> {
        Ok(self.config.environment().world().map_err(RlError::from)?)
    }

    /// Baselines and oracles in the worlds of [`Self::evaluate`] with this seed.
    pub fn rivals(&self, world: &WorldConfig, (seed, episodes): (u64, usize)) -> Result<Vec<Rival>, JobError> {
        Ok(rivals(world, seed, episodes).map_err(RlError::from)?)
    }
}

/// How a job has learned, from a checkpoint's tensors.
pub fn curve(config_toml: &str, tensors: &[NamedTensor]) -> Result<Curve, JobError> {
    let config = RlConfig::parse(config_toml)?;
    Curve::of(tensors, figures_of(config.algorithm()))
}
