//! IMPALA (Espeholt et al., 2018): an actor and a critic learn from trajectories of older policies, corrected by V-trace. Owns the loss; whoever hands it
//! trajectories keeps their age within `staleness`. A round is one update from one trajectory of each lane.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::actor::Explore;
use super::config::ImpalaConfig;
use super::error::{RlError, check_len};
use super::learn::{COMMON, Learn, Round, Scale, common, round};
use super::learner::{Adam, Learner, Updated};
use super::loss::Heads;
use super::math::exp;
use super::policy::Policy;
use super::returns::{Steps, vtrace};
use super::trajectory::Trajectory;

pub(crate) const FIGURES: [&str; 5] = ["policy_loss", "value_loss", "entropy", "ratio", "lag"];

/// A lane's trajectory, and what V-trace makes of it under the learner's weights.
#[derive(Debug)]
struct Batch {
    trajectory: Trajectory,
    /// Of the version at which it was taken.
    version: u64,
    ratios: Vec<f32>,
    targets: Vec<f32>,
    advantages: Vec<f32>,
    /// Rows that are transitions.
    rows: Vec<u32>,
}

pub struct Impala {
    config: ImpalaConfig,
    learner: Learner,
    round: u64,
    batches: BTreeMap<u32, Batch>,
    scale: Scale,
    heads: Heads,
}

impl Impala {
    /// Figures of its flat vector.
    pub const FIGURES: usize = FIGURES.len() + 1;

    pub fn new(config: ImpalaConfig, policy: &Arc<Policy>, seed: u64) -> Self {
        let adam = Adam { epsilon: 1e-5, max_grad_norm: config.max_grad_norm };
        let (learner, heads) = (Learner::new(policy, adam, seed), Heads::new(policy));
        Self { config, learner, round: 0, batches: BTreeMap::new(), scale: Scale::NONE, heads }
    }

    fn batch(&self, lane: u32) -> Result<&Batch, RlError> {
        self.batches.get(&lane).ok_or(RlError::Contract { what: "trajectories of a lane", got: 0, expected: 1 })
    }

    /// What is there of another round is of no use.
    fn enter(&mut self, round: u64) {
        if round != self.round {
            self.round = round;
            self.batches.clear();
        }
    }

    fn trace(&mut self, trajectory: Trajectory) -> Batch {
        let (weights, heads) = (self.learner.weights(), &mut self.heads);
        let rows = trajectory.rows();
        let all: Vec<u32> = (0..(rows + trajectory.envs) as u32).collect();
        let (mut values, mut log_probs) = (Vec::with_capacity(all.len()), Vec::with_capacity(rows));
        let (steps, after) = all.split_at(rows);
        for rows in steps.chunks(self.learner.policy().block()) {
            heads.forward(weights, &trajectory, rows);
            heads.log_probs(&trajectory, rows, &mut log_probs);
            values.extend_from_slice(heads.values());
        }
        for rows in after.chunks(self.learner.policy().block()) {
            heads.forward(weights, &trajectory, rows);
            values.extend_from_slice(heads.values());
        }
        let ratio = |(new, old): (&f32, &f32)| exp(new - old);
        let ratios: Vec<f32> = log_probs.iter().zip(&trajectory.log_probs).map(ratio).collect();
        let (mut targets, mut advantages) = (vec![0.0; rows], vec![0.0; rows]);
        let steps = Steps {
            envs: trajectory.envs,
            rewards: &trajectory.rewards,
            flags: &trajectory.flags,
            values: &values,
            gamma: self.config.gamma as f32,
        };
        vtrace(steps, &ratios, self.config.truncation, &mut targets, &mut advantages);
        let (version, rows) = (self.learner.version(), trajectory.transitions());
        Batch { trajectory, version, ratios, targets, advantages, rows }
    }
}

impl Learn for Impala {
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
        Explore::Sample
    }

    /// A trajectory whose policy is more than `staleness` updates behind is refused.
    fn take(&mut self, round: u64, lane: u32, trajectory: Trajectory) -> Result<(), RlError> {
        if round == self.round && self.batches.contains_key(&lane) {
            return Ok(());
        }
        let lag = self.learner.version().checked_sub(trajectory.version);
        let (got, expected) = (lag.unwrap_or(u64::MAX), self.config.staleness.into());
        if got > expected {
            return Err(RlError::Contract { what: "updates that a trajectory is behind", got, expected });
        }
        if trajectory.lane != lane {
            let (got, expected) = (trajectory.lane.into(), lane.into());
            return Err(RlError::Contract { what: "lane of a trajectory", got, expected });
        }
        self.enter(round);
        let batch = self.trace(trajectory);
        self.batches.insert(lane, batch);
        Ok(())
    }

    fn updates_max(&self) -> u32 {
        1
    }

    /// Advantages, their sum and that of their squares. Then [`COMMON`].
    fn sums_len(&self) -> usize {
        3 + COMMON
    }

    fn sums(&self, lane: u32, out: &mut [f32]) -> Result<(), RlError> {
        check_len("sums of a lane", out.len(), self.sums_len())?;
        let batch = self.batch(lane)?;
        out[..3].copy_from_slice(&Scale::moments(&batch.advantages, &batch.rows));
        out[3..].copy_from_slice(&common(&batch.trajectory, &batch.rows, Some(&batch.targets)));
        Ok(())
    }

    fn begin(&mut self, number: u64, sums: &[f32]) -> Result<Round, RlError> {
        check_len("sums of a round", sums.len(), self.sums_len())?;
        if sums.iter().any(|sum| !sum.is_finite()) {
            return Err(RlError::NonFinite { update: self.learner.version(), what: "an advantage" });
        }
        self.enter(number);
        let (moments, figures) = sums.split_at(3);
        self.scale = if self.config.normalise_advantages { Scale::new(moments) } else { Scale::NONE };
        Ok(round(1, figures))
    }

    fn gradient(&mut self, _: u32, lane: u32, out: &mut [f32]) -> Result<(), RlError> {
        check_len("length of a gradient", out.len(), self.learner.layout().flat_len())?;
        let batch = self.batches.get(&lane).filter(|batch| batch.version == self.learner.version());
        let batch = batch.ok_or(RlError::Contract { what: "trajectories of a lane", got: 0, expected: 1 })?;
        out.fill(0.0);
        let (entropy_coef, value_coef) = (self.config.ent_coef as f32, self.config.vf_coef as f32);
        let lag = (batch.version - batch.trajectory.version) as f64;
        let (gradient, figures) = out.split_at_mut(self.learner.layout().len());
        let mut sums = [0f64; Self::FIGURES];
        let (weights, heads, scale) = (self.learner.weights(), &mut self.heads, self.scale);
        for rows in batch.rows.chunks(self.learner.policy().block()) {
            heads.forward(weights, &batch.trajectory, rows);
            heads.differentiate(&batch.trajectory, rows, |at, row| {
                let (off, advantage) = (row.value - batch.targets[at], scale.apply(batch.advantages[at]));
                let losses = [-advantage * row.log_prob, 0.5 * off * off, row.entropy, batch.ratios[at]].map(f64::from);
                let figures = [losses[0], losses[1], losses[2], losses[3], lag, 1.0];
                sums.iter_mut().zip(figures).for_each(|(sum, figure)| *sum += figure);
                (-advantage, -entropy_coef, value_coef * off)
            });
            heads.backward(weights, gradient);
        }
        figures.iter_mut().zip(sums).for_each(|(figure, sum)| *figure = sum as f32);
        Ok(())
    }

    fn apply(&mut self, _: u32, sum: &[f32]) -> Result<Updated, RlError> {
        self.learner.apply(sum, self.config.rate.at(self.round))
    }

    fn keep(&mut self, lanes: Range<u32>) {
        self.batches.retain(|lane, _| lanes.contains(lane));
    }
}
