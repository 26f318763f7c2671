//! All lanes of a job in this process: the plainest loop over rollouts and a learner, for tests, benches and debugging. The bits are those of a cluster,
//! however many learners and rollout ranks it has (A1, E2).

use std::collections::VecDeque;
use std::sync::Arc;

use super::actor::{Actor, Explore};
use super::config::{Algorithm, AlgorithmConfig, RlConfig, RlPlan};
use super::dqn::{self, Dqn};
use super::env::VecEnv;
use super::error::RlError;
use super::evaluation::{Normaliser, evaluate};
use super::impala::{self, Impala};
use super::learn::{Learn, Round, tree_sum};
use super::learner::Updated;
use super::policy::Policy;
use super::ppo::{self, Ppo};
use super::rollout::{Rollout, RolloutConfig};

/// The learner of a plan, at the job's beginning.
pub fn learn(config: &RlConfig, plan: &RlPlan, env: &super::EnvSpec, seed: u64) -> Result<Box<dyn Learn>, RlError> {
    // With the number of samples.
    let figures = figures_of(config.algorithm()).len() + 1;
    let policy = Arc::new(Policy::new(config.policy(), env, &plan.hidden, figures)?);
    Ok(match &plan.algorithm {
        AlgorithmConfig::Ppo(config) => Box::new(Ppo::new(config.clone(), &policy, seed)),
        AlgorithmConfig::Impala(config) => Box::new(Impala::new(config.clone(), &policy, seed)),
        AlgorithmConfig::Dqn(config) => Box::new(Dqn::new(config.clone(), &policy, seed)),
    })
}

/// Names of the figures of an algorithm's updates.
pub(crate) fn figures_of(algorithm: Algorithm) -> &'static [&'static str] {
    match algorithm {
        Algorithm::Ppo => &ppo::FIGURES,
        Algorithm::Impala => &impala::FIGURES,
        Algorithm::Dqn => &dqn::FIGURES,
    }
}

/// What came of a round: its beginning, and its updates.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    pub round: Round,
    pub updates: Vec<Updated>,
}

pub struct Solo {
    pub plan: RlPlan,
    /// Rounds that the actor's weights are behind, as a slow broadcast would have them.
    lag: usize,
    learn: Box<dyn Learn>,
    actor: Actor,
    lanes: Vec<Rollout>,
    round: u64,
    /// Weights on their way to the actor, with their versions.
    broadcast: VecDeque<(u64, Vec<f32>)>,
    parts: Vec<Vec<f32>>,
}

impl Solo {
    /// Reads `[rl]` of a spec.
    pub fn new(config_toml: &str, lanes: u32, seed: u64) -> Result<Self, RlError> {
        let config = RlConfig::parse(config_toml)?;
        let environment = config.environment();
        let spec = environment.make(1)?.spec().clone();
        let plan = config.plan(config_toml, &spec, lanes)?;
        let learn = learn(&config, &plan, &spec, seed)?;
        let rollout = RolloutConfig { seed, normalise: plan.normalise, gamma: plan.gamma };
        let mut rollouts = Vec::new();
        for lane in 0..lanes {
            let mut played = Rollout::new(rollout, environment.make(plan.envs)?);
            played.begin(lane)?;
            rollouts.push(played);
        }
        let actor = Actor::new(learn.policy(), seed);
        let parts = vec![Vec::new(); lanes as usize];
        Ok(Self { plan, lag: 0, learn, actor, lanes: rollouts, round: 0, broadcast: VecDeque::new(), parts })
    }

    /// Lets the actor be so many rounds behind.
    pub fn behind(mut self, rounds: usize) -> Self {
        self.lag = rounds;
        self
    }

    pub fn learner(&self) -> &dyn Learn {
        &*self.learn
    }

    /// Returns of as many whole episodes with the best actions, from seeds that training does not use.
    pub fn evaluate(&mut self, env: &mut dyn VecEnv, seed: u64, steps_max: u32) -> Result<Vec<f64>, RlError> {
        let learner = self.learn.learner();
        self.actor.load(learner.version(), learner.weights())?;
        let mut normaliser: Option<Normaliser> = None;
        for lane in &mut self.lanes {
            let state = lane.save()?;
            match (&mut normaliser, lane.normaliser(&state)?) {
                (Some(all), Some(lane)) => all.merge(&lane),
                (_, lane) => normaliser = lane,
            }
        }
        Ok(evaluate(&mut self.actor, env, normaliser.as_ref(), (seed, steps_max, Explore::Greedy))?.returns)
    }

    pub fn round(&mut self) -> Result<Report, RlError> {
        let learner = self.learn.learner();
        self.broadcast.push_back((learner.version(), learner.weights().to_vec()));
        if self.broadcast.len() > self.lag + 1 {
            self.broadcast.pop_front();
        }
        let (version, weights) = self.broadcast.front().expect("one was just pushed");
        self.actor.load(*version, weights)?;
        for (lane, rollout) in self.lanes.iter_mut().enumerate() {
            let trajectory = rollout.play(&mut self.actor, self.learn.explore(), self.plan.steps)?;
            self.learn.take(self.round, lane as u32, trajectory)?;
        }
        for (lane, part) in self.parts.iter_mut().enumerate() {
            part.resize(self.learn.sums_len(), 0.0);
            self.learn.sums(lane as u32, part)?;
        }
        let round = self.learn.begin(self.round, tree_sum(&mut self.parts))?;
        let mut updates = Vec::with_capacity(round.updates as usize);
        for update in 0..round.updates {
            for (lane, part) in self.parts.iter_mut().enumerate() {
                part.resize(self.learn.learner().layout().flat_len(), 0.0);
                self.learn.gradient(update, lane as u32, part)?;
            }
            updates.push(self.learn.apply(update, tree_sum(&mut self.parts))?);
        }
        self.round += 1;
        Ok(Report { round, updates })
    }
}
