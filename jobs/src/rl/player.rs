//! Who plays the lanes of a job: the one half of it that needs no learner. Owns the envs of the lanes that it plays and a copy of the policy's weights; what it
//! gives follows from lane, state and weights alone (L1), so that it does not matter who plays.

use std::collections::BTreeMap;

use super::actor::{Actor, Explore};
use super::config::{RlConfig, RlPlan};
use super::error::RlError;
use super::evaluation::Normaliser;
use super::rollout::{Rollout, RolloutConfig};
use super::solo::learn;
use super::trajectory::Trajectory;
use crate::JobError;
use crate::train::Broadcast;

/// An environment that fails so often in a row for the same trajectory is given up.
const FAILURES_MAX: u32 = 5;

/// A round of a lane.
#[derive(Debug)]
pub struct Played {
    pub trajectory: Trajectory,
    /// The lane's state behind it.
    pub after: Vec<u8>,
    /// Environments that failed and were made anew.
    pub failures: u32,
}

pub struct Player {
    config: RlConfig,
    plan: RlPlan,
    seed: u64,
    explore: Explore,
    actor: Actor,
    lanes: BTreeMap<u32, Rollout>,
}

impl Player {
    /// Of a whole spec, for a rank that does not learn.
    pub fn of_spec(config_toml: &str, (seed, lanes): (u64, u32)) -> Result<Self, JobError> {
        let config = RlConfig::parse(config_toml)?;
        let spec = config.environment().make(1).map_err(RlError::from)?.spec().clone();
        let plan = config.plan(config_toml, &spec, lanes)?;
        let learner = learn(&config, &plan, &spec, seed)?;
        let actor = Actor::new(learner.policy(), seed);
        Ok(Self::new((config, plan), seed, actor, learner.explore()))
    }

    pub(super) fn new((config, plan): (RlConfig, RlPlan), seed: u64, actor: Actor, explore: Explore) -> Self {
        Self { config, plan, seed, explore, actor, lanes: BTreeMap::new() }
    }

    /// Numbers of the policy's weights.
    pub fn weights_len(&self) -> usize {
        self.actor.policy().layout().len()
    }

    pub fn load(&mut self, version: u64, weights: &[f32]) -> Result<(), RlError> {
        self.actor.load(version, weights)
    }

    pub(super) fn actor(&mut self) -> &mut Actor {
        &mut self.actor
    }

    /// Lanes that are taken up as bytes from here on.
    pub(super) fn forget(&mut self) {
        self.lanes.clear();
    }

    /// A round of a lane by the weights that were loaded last. No bytes: the lane begins.
    pub fn play(&mut self, lane: u32, state: &[u8]) -> Result<Played, RlError> {
        let mut failures = 0;
        loop {
            match self.attempt(lane, state) {
                Err(RlError::Env(error)) if error.is_passing() && failures + 1 < FAILURES_MAX => {
                    self.lanes.remove(&lane);
                    failures += 1;
                }
                played => return played.map(|(trajectory, after)| Played { trajectory, after, failures }),
            }
        }
    }

    /// L1.
    fn attempt(&mut self, lane: u32, state: &[u8]) -> Result<(Trajectory, Vec<u8>), RlError> {
        if !self.lanes.contains_key(&lane) {
            self.lanes.insert(lane, self.rollout()?);
        }
        let rollout = self.lanes.get_mut(&lane).expect("it was just put there");
        if !state.is_empty() {
            return rollout.run(state, &mut self.actor, (self.explore, self.plan.steps));
        }
        if rollout.at() != Some((lane, 0)) {
            rollout.begin(lane)?;
        }
        let trajectory = rollout.play(&mut self.actor, self.explore, self.plan.steps)?;
        Ok((trajectory, rollout.save()?))
    }

    /// The running figures of all lanes together, whoever has played them. None: nothing is normalised.
    pub(super) fn normaliser(&self, states: &[Vec<u8>]) -> Result<Option<Normaliser>, RlError> {
        if self.plan.normalise { super::trainer::normaliser(&self.rollout()?, states) } else { Ok(None) }
    }

    fn rollout(&self) -> Result<Rollout, RlError> {
        let env = self.config.environment().make(self.plan.envs)?;
        let config = RolloutConfig { seed: self.seed, normalise: self.plan.normalise, gamma: self.plan.gamma };
        Ok(Rollout::new(config, env))
    }
}

/// A lane that somebody else may play.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlayOrder {
    pub lane: u32,
    /// Empty: it begins.
    pub state: Vec<u8>,
}

/// What came of one: [`Played`] as bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlayedBytes {
    pub trajectory: Vec<u8>,
    pub after: Vec<u8>,
    pub failures: u32,
}

/// A lane as its learner finds it.
#[derive(Debug)]
pub enum Found {
    Played(PlayedBytes),
    /// Somebody plays it; nobody has begun this one, and the learner is to play it meanwhile.
    Meanwhile(u32),
    /// Nobody plays it: the learner is to.
    Nobody,
}

/// Others who play lanes for a learner.
pub trait Rollouts: Send {
    /// A round begins with these weights; what was ordered before is not wanted any more.
    fn begin(&mut self, version: u64, weights: &[f32], orders: Vec<PlayOrder>);

    /// What has become of a lane that the learner needs. Waits where somebody plays it and nothing else is to be played.
    fn find(&mut self, lane: u32) -> Found;

    fn broadcast(&self) -> Broadcast;
}
