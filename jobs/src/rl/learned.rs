//! What a checkpoint of a job with `[rl]` holds, for whoever looks at it afterwards: the policy, and how it was learned. Learns nothing.

use std::sync::Arc;

use super::config::{Algorithm, RlConfig};
use super::curve::Curve;
use super::evaluate::{Returns, evaluate};
use super::make_env::make_env;
use super::policy::Policy;
use super::solo::figures_of;
use super::trainer::first_lane;
use super::{EnvSpec, Explore, RlPlan};
use crate::JobError;
use crate::train::NamedTensor;
use crate::train::parameters::check_model;

/// A policy with its weights.
pub struct Learned {
    config: RlConfig,
    plan: RlPlan,
    env: EnvSpec,
    policy: Arc<Policy>,
    weights: Vec<f32>,
    /// A lane of training as bytes: its envs' running figures are a part of what was learned.
    lane: Vec<u8>,
}

impl Learned {
    /// Of a checkpoint's tensors. Makes the environment once, to see what it is.
    pub fn new(config_toml: &str, lanes: u32, tensors: &[NamedTensor]) -> Result<Self, JobError> {
        let config = RlConfig::parse(config_toml)?;
        let env = make_env(&config, 1).map_err(super::RlError::from)?.spec().clone();
        let plan = config.plan(&env, lanes);
        let figures = figures_of(config.algorithm()).len() + 1;
        let policy = Arc::new(Policy::new(config.policy(), &env, &plan.hidden, figures)?);
        let model = tensors.iter().filter(|tensor| tensor.name.starts_with("model.")).cloned().collect();
        let weights = check_model(policy.layout(), model)?.into_iter().flat_map(|tensor| tensor.values).collect();
        let lane = first_lane(tensors, lanes)?;
        Ok(Self { config, plan, env, policy, weights, lane })
    }

    pub fn environment(&self) -> &EnvSpec {
        &self.env
    }

    pub fn algorithm(&self) -> Algorithm {
        self.config.algorithm()
    }

    /// `explore`: `Sample` or `Greedy`.
    pub fn evaluate(&self, (seed, episodes): (u64, usize), explore: Explore) -> Result<Returns, JobError> {
        let policy = (&self.policy, &self.weights[..]);
        Ok(evaluate(&self.config, &self.plan, policy, (seed, episodes, explore), &self.lane)?)
    }
}

/// How a job has learned, from a checkpoint's tensors.
pub fn curve(config_toml: &str, tensors: &[NamedTensor]) -> Result<Curve, JobError> {
    let config = RlConfig::parse(config_toml)?;
    Curve::of(tensors, figures_of(config.algorithm()))
}
