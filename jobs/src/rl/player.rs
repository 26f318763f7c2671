//! Who plays the lanes of a job: the one half of it that needs no learner. Owns the envs of the lanes that it plays and a copy of the policy's weights; what it
//! gives follows from lane, state and weights alone (L1), so that it does not matter who plays.
//!
//! L2: envs whose lane others play meanwhile are taken for the next lane that comes here: there are as many (of a bridge: Python processes) as lanes were
//! played here in two rounds, however many lanes come by in the course of time.

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
    /// Environments that gave something else when the episode's actions were played again.
    pub strays: u32,
}

/// The envs of a lane that is or was played here.
struct Seat {
    rollout: Rollout,
    /// The round in which it was played last.
    round: u64,
}

pub struct Player {
    config: RlConfig,
    plan: RlPlan,
    seed: u64,
    explore: Explore,
    actor: Actor,
    lanes: BTreeMap<u32, Seat>,
    /// Weights that were loaded so far.
    round: u64,
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
        Self { config, plan, seed, explore, actor, lanes: BTreeMap::new(), round: 0 }
    }

    /// Numbers of the policy's weights.
    pub fn weights_len(&self) -> usize {
        self.actor.policy().layout().len()
    }

    /// What is played until the next call is a round.
    pub fn load(&mut self, version: u64, weights: &[f32]) -> Result<(), RlError> {
        self.round += u64::from(self.actor.version() != version);
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
                played => {
                    let strays = self.lanes.get_mut(&lane).map_or(0, |seat| seat.rollout.take_strays());
                    return played.map(|(trajectory, after)| Played { trajectory, after, failures, strays });
                }
            }
        }
    }

    /// L1.
    fn attempt(&mut self, lane: u32, state: &[u8]) -> Result<(Trajectory, Vec<u8>), RlError> {
        if !self.lanes.contains_key(&lane) {
            let free = self.lanes.iter().find(|(_, seat)| seat.round + 1 < self.round).map(|(lane, _)| *lane);
            let seat = free.and_then(|free| self.lanes.remove(&free));
            let rollout = seat.map_or_else(|| self.rollout(), |seat| Ok(seat.rollout))?;
            self.lanes.insert(lane, Seat { rollout, round: 0 });
        }
        let Seat { rollout, round } = self.lanes.get_mut(&lane).expect("it was just put there");
        *round = self.round;
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
    pub strays: u32,
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

    /// Environments that failed where a lane was given up, since the last call.
    fn take_failures(&mut self) -> u32;

    fn broadcast(&self) -> Broadcast;
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: &str = "[rl]\nalgorithm = \"ppo\"\nenvironment = \"CartPole-v1\"\nsteps = 8\nminibatches = 1\n";

    /// L2.
    #[test]
    fn envs_of_lanes_that_are_played_elsewhere_are_taken_for_others() {
        let mut player = Player::of_spec(SPEC, (1, 16)).expect("a player");
        let weights = vec![0.01; player.weights_len()];
        let mut states = vec![Vec::new(); 16];
        for round in 1..=32 {
            player.load(round, &weights).expect("weights");
            for lane in [2 * round as u32 % 16, (2 * round as u32 + 1) % 16] {
                let played = player.play(lane, &states[lane as usize]).expect("a lane");
                let mut fresh = Player::of_spec(SPEC, (1, 16)).expect("a player");
                fresh.load(round, &weights).expect("weights");
                let alone = fresh.play(lane, &states[lane as usize]).expect("a lane");
                assert_eq!((&played.trajectory, &played.after), (&alone.trajectory, &alone.after));
                states[lane as usize] = played.after;
            }
            assert!(player.lanes.len() <= 4, "{}", player.lanes.len());
        }
    }
}
