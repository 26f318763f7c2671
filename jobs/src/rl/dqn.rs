//! Deep Q-networks (Mnih et al., 2015) with double targets (van Hasselt et al., 2016), as CleanRL's `dqn.py` has them. Owns the replay rings of its lanes,
//! the target network and the loss. A lane's part of an update is drawn from its own ring, by (seed, update, lane).

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::actor::Explore;
use super::config::DqnConfig;
use super::draws::{Draws, Stream};
use super::error::{RlError, check_len};
use super::learn::{COMMON, Learn, Round, common, part, round};
use super::learner::{Adam, Learner, Updated};
use super::net::{Activations, BLOCK};
use super::policy::{Policy, argmax};
use super::trajectory::{TERMINATED, Trajectory};
use crate::JobError;
use crate::lm::kernels::Isa;
use crate::train::{NamedTensor, Snapshot};

pub(crate) const FIGURES: [&str; 2] = ["td_loss", "q_value"];
/// The target network's weights in a checkpoint.
const TARGET: &str = "optimizer.target";

/// The last transitions of one lane.
#[derive(Debug, Default)]
struct Ring {
    /// [capacity, numbers]
    observations: Vec<f32>,
    next: Vec<f32>,
    actions: Vec<u32>,
    rewards: Vec<f32>,
    terminated: Vec<bool>,
    /// Transitions that were ever pushed.
    pushed: u64,
}

impl Ring {
    fn len(&self) -> usize {
        self.actions.len()
    }

    fn push(&mut self, capacity: usize, trajectory: &Trajectory, row: usize) {
        let len = trajectory.observations.len() / (trajectory.rows() + trajectory.envs);
        let seen = &trajectory.observations[row * len..][..len];
        let next = &trajectory.observations[(row + trajectory.envs) * len..][..len];
        let (action, reward) = (trajectory.actions.discrete[row], trajectory.rewards[row]);
        let terminated = trajectory.flags[row] & TERMINATED != 0;
        if self.len() < capacity {
            self.observations.extend_from_slice(seen);
            self.next.extend_from_slice(next);
            self.actions.push(action);
            self.rewards.push(reward);
            self.terminated.push(terminated);
        } else {
            let at = (self.pushed % capacity as u64) as usize;
            self.observations[at * len..][..len].copy_from_slice(seen);
            self.next[at * len..][..len].copy_from_slice(next);
            (self.actions[at], self.rewards[at], self.terminated[at]) = (action, reward, terminated);
        }
        self.pushed += 1;
    }
}

pub struct Dqn {
    config: DqnConfig,
    seed: u64,
    isa: Isa,
    learner: Learner,
    target: Vec<f32>,
    rings: BTreeMap<u32, Ring>,
    /// Figures of this round's trajectories.
    common: BTreeMap<u32, [f32; COMMON]>,
    round: u64,
    passes: [Activations; 3],
}

impl Dqn {
    /// Figures of its flat vector.
    pub const FIGURES: usize = FIGURES.len() + 1;

    pub fn new(config: DqnConfig, policy: &Arc<Policy>, seed: u64) -> Self {
        let adam = Adam { epsilon: 1e-8, max_grad_norm: config.max_grad_norm };
        let learner = Learner::new(policy, adam, seed);
        Self {
            config,
            seed,
            isa: Isa::best(),
            target: learner.weights().to_vec(),
            learner,
            rings: BTreeMap::new(),
            common: BTreeMap::new(),
            round: 0,
            passes: Default::default(),
        }
    }

    /// What was told of another round is of no use.
    fn enter(&mut self, round: u64) {
        if round != self.round {
            self.round = round;
            self.common.clear();
        }
    }

    /// Updates after so many env steps.
    fn updates_after(&self, steps: u64) -> u64 {
        steps.saturating_sub(self.config.learning_starts) / self.config.train_every
    }
}

impl Learn for Dqn {
    fn learner(&self) -> &Learner {
        &self.learner
    }

    fn learner_mut(&mut self) -> &mut Learner {
        &mut self.learner
    }

    fn figures(&self) -> &'static [&'static str] {
        &FIGURES
    }

    fn explore(&self) -> Explore {
        let [start, end] = self.config.epsilon;
        Explore::Epsilon { start, end, steps: self.config.exploration_steps }
    }

    fn take(&mut self, round: u64, lane: u32, trajectory: Trajectory) -> Result<(), RlError> {
        self.enter(round);
        if self.common.contains_key(&lane) {
            // It came twice, as after a lost answer: its transitions count once.
            return Ok(());
        }
        let ring = self.rings.entry(lane).or_default();
        let transitions = trajectory.transitions();
        for &row in &transitions {
            ring.push(self.config.replay, &trajectory, row as usize);
        }
        self.common.insert(lane, common(&trajectory, &transitions, None));
        Ok(())
    }

    fn updates_max(&self) -> u32 {
        self.config.round_steps.div_ceil(self.config.train_every) as u32
    }

    fn sums_len(&self) -> usize {
        COMMON
    }

    fn sums(&self, lane: u32, out: &mut [f32]) -> Result<(), RlError> {
        check_len("sums of a lane", out.len(), COMMON)?;
        let common = self.common.get(&lane);
        out.copy_from_slice(common.ok_or(RlError::Contract { what: "trajectories of a lane", got: 0, expected: 1 })?);
        Ok(())
    }

    fn begin(&mut self, number: u64, sums: &[f32]) -> Result<Round, RlError> {
        check_len("sums of a round", sums.len(), COMMON)?;
        self.enter(number);
        let (before, after) = (number * self.config.round_steps, (number + 1) * self.config.round_steps);
        if before / self.config.target_every != after / self.config.target_every {
            self.target.copy_from_slice(self.learner.weights());
        }
        let updates = self.updates_after(after) - self.updates_after(before);
        Ok(Round { explained_variance: None, ..round(updates as u32, sums) })
    }

    /// The target network is that of the round's beginning.
    fn resume(&mut self, round: u64, _: &[f32]) -> Result<(), RlError> {
        self.enter(round);
        Ok(())
    }

    fn gradient(&mut self, _: u32, lane: u32, out: &mut [f32]) -> Result<(), RlError> {
        check_len("length of a gradient", out.len(), self.learner.layout().flat_len())?;
        let ring = self.rings.get(&lane).filter(|ring| ring.len() > 0);
        let ring = ring.ok_or(RlError::Contract { what: "transitions of a lane", got: 0, expected: 1 })?;
        let samples = part(self.config.batch, lane as usize, self.config.lanes as usize).len();
        let mut draws = Draws::new(self.seed, Stream::Replay, [self.learner.version(), lane.into(), 0]);
        let rows: Vec<usize> = (0..samples).map(|_| draws.below(ring.len() as u32) as usize).collect();
        out.fill(0.0);
        let (gradient, figures) = out.split_at_mut(self.learner.layout().len());
        let policy = self.learner.policy().clone();
        let (weights, q, len) = (self.learner.weights(), &policy.actor, policy.observation_len());
        let gather = |values: &[f32], rows: &[usize]| -> Vec<f32> {
            rows.iter().flat_map(|&row| &values[row * len..][..len]).copied().collect()
        };
        let width = q.outputs();
        let [online, next_online, next_target] = &mut self.passes;
        let mut sums = [0f64; Dqn::FIGURES];
        for rows in rows.chunks(BLOCK) {
            let (seen, next) = (gather(&ring.observations, rows), gather(&ring.next, rows));
            q.forward(self.isa, weights, &seen, online);
            q.forward(self.isa, &self.target, &next, next_target);
            if self.config.double {
                q.forward(self.isa, weights, &next, next_online);
            }
            let chooser = if self.config.double { next_online.output() } else { next_target.output() };
            let mut slopes = vec![0.0; rows.len() * width];
            for (index, &row) in rows.iter().enumerate() {
                let here = index * width..(index + 1) * width;
                let best = argmax(&chooser[here.clone()]) as usize;
                let later = if ring.terminated[row] { 0.0 } else { next_target.output()[here.clone()][best] };
                let action = ring.actions[row] as usize;
                let value = online.output()[here.clone()][action];
                let off = value - (ring.rewards[row] + self.config.gamma as f32 * later);
                let (loss, slope) = if !self.config.huber {
                    (off * off, 2.0 * off)
                } else if off.abs() <= 1.0 {
                    (0.5 * off * off, off)
                } else {
                    (off.abs() - 0.5, off.signum())
                };
                slopes[here][action] = slope;
                sums.iter_mut().zip([loss, value, 1.0]).for_each(|(sum, figure)| *sum += f64::from(figure));
            }
            q.backward(self.isa, weights, (&seen, &slopes), online, gradient);
        }
        figures.iter_mut().zip(sums).for_each(|(figure, sum)| *figure = sum as f32);
        Ok(())
    }

    fn apply(&mut self, _: u32, sum: &[f32]) -> Result<Updated, RlError> {
        self.learner.apply(sum, self.config.rate.at(self.round))
    }

    fn keep(&mut self, lanes: Range<u32>) {
        self.rings.retain(|lane, _| lanes.contains(lane));
        self.common.retain(|lane, _| lanes.contains(lane));
    }

    /// With the target network. The rings are not part of it: they fill again.
    fn snapshot(&self) -> Snapshot {
        let (name, shape) = (TARGET.to_owned(), vec![self.target.len()]);
        let target = NamedTensor { name, shape, values: self.target.clone() };
        self.learner.snapshot().with(target)
    }

    fn restore(&mut self, mut tensors: Vec<NamedTensor>) -> Result<(), RlError> {
        let missing = |problem: &str| JobError::Tensor { name: TARGET.to_owned(), problem: problem.to_owned() };
        let at = tensors.iter().position(|tensor| tensor.name == TARGET).ok_or_else(|| missing("missing"))?;
        let target = tensors.swap_remove(at).values;
        if target.len() != self.target.len() {
            return Err(missing("another number of weights").into());
        }
        self.learner.restore(tensors)?;
        self.target = target;
        self.keep(0..0);
        Ok(())
    }
}
