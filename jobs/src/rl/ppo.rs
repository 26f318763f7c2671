//! Proximal policy optimisation (Schulman et al., 2017), as CleanRL's `ppo.py` and `ppo_continuous_action.py` have it: GAE, clipped ratios and values,
//! entropy, advantages normalised a minibatch, epochs over shuffled minibatches. Owns the loss and its gradient; the update is `Learner`'s.
//!
//! Minibatches are shuffled within a lane, so that a lane's part of each is a function of its own trajectory; mean and deviation of the advantages are
//! those of the whole minibatch, from sums over all lanes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::actor::Explore;
use super::config::PpoConfig;
use super::draws::{Draws, Stream};
use super::error::{RlError, check_len};
use super::learn::{COMMON, Learn, Round, Scale, common, part, round};
use super::learner::{Adam, Learner, Updated};
use super::loss::{Heads, Row};
use super::math::exp;
use super::policy::Policy;
use super::returns::{Steps, gae};
use super::trajectory::Trajectory;

pub(crate) const FIGURES: [&str; 5] = ["policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction"];

/// A lane's trajectory, ready to learn from.
#[derive(Debug)]
struct Batch {
    trajectory: Trajectory,
    advantages: Vec<f32>,
    returns: Vec<f32>,
    /// Of each epoch: the rows that are transitions, shuffled.
    orders: Vec<Vec<u32>>,
}

pub struct Ppo {
    config: PpoConfig,
    seed: u64,
    learner: Learner,
    round: u64,
    batches: BTreeMap<u32, Batch>,
    /// Of each update of the round. Empty before `begin`.
    scales: Vec<Scale>,
    heads: Heads,
}

impl Ppo {
    /// Figures of its flat vector.
    pub const FIGURES: usize = FIGURES.len() + 1;

    pub fn new(config: PpoConfig, policy: &Arc<Policy>, seed: u64) -> Self {
        let adam = Adam { epsilon: 1e-5, max_grad_norm: config.max_grad_norm };
        Self {
            seed,
            learner: Learner::new(policy, adam, seed),
            round: 0,
            batches: BTreeMap::new(),
            scales: Vec::new(),
            heads: Heads::new(policy),
            config,
        }
    }

    /// What is there of another round is of no use.
    fn enter(&mut self, round: u64) {
        if round != self.round {
            self.round = round;
            self.batches.clear();
        }
    }

    fn updates(&self) -> usize {
        self.config.epochs * self.config.minibatches
    }

    fn batch(&self, lane: u32) -> Result<&Batch, RlError> {
        self.batches.get(&lane).ok_or(RlError::Contract { what: "trajectories of a lane", got: 0, expected: 1 })
    }

    /// The rows of a lane that an update takes.
    fn rows(config: &PpoConfig, batch: &Batch, update: usize) -> Range<usize> {
        part(batch.orders[0].len(), update % config.minibatches, config.minibatches)
    }
}

#[cfg(test)]
impl Ppo {
    /// Rows of a lane's part of an update, with their normalised advantages and their returns.
    pub(crate) fn minibatch(&self, update: usize, lane: u32) -> (Vec<u32>, Vec<f32>, Vec<f32>) {
        let (batch, scale) = (&self.batches[&lane], self.scales[update]);
        let order = &batch.orders[update / self.config.minibatches];
        let rows = order[Self::rows(&self.config, batch, update)].to_vec();
        let advantage = |&row: &u32| scale.apply(batch.advantages[row as usize]);
        let advantages = rows.iter().map(advantage).collect();
        let returns = rows.iter().map(|&row| batch.returns[row as usize]).collect();
        (rows, advantages, returns)
    }
}

impl Learn for Ppo {
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

    fn take(&mut self, round: u64, lane: u32, trajectory: Trajectory) -> Result<(), RlError> {
        if round == self.round && self.batches.contains_key(&lane) {
            return Ok(());
        }
        // The policy is that of the round's beginning: also for a learner that takes over a lane in the middle of it.
        let lag = self.learner.version().checked_sub(trajectory.version);
        let begun = round * trajectory.steps as u64;
        let contract = |what, got, expected| Err(RlError::Contract { what, got, expected });
        if trajectory.lane != lane {
            return contract("lane of a trajectory", trajectory.lane.into(), lane.into());
        }
        if trajectory.begun != begun {
            return contract("first step of a trajectory", trajectory.begun, begun);
        }
        if lag.is_none_or(|lag| lag >= self.updates() as u64) {
            return contract("version of a trajectory's policy", trajectory.version, self.learner.version());
        }
        self.enter(round);
        self.scales.clear();
        let rows = trajectory.rows();
        let (mut advantages, mut returns) = (vec![0.0; rows], vec![0.0; rows]);
        let steps = Steps {
            envs: trajectory.envs,
            rewards: &trajectory.rewards,
            flags: &trajectory.flags,
            values: &trajectory.values,
            gamma: self.config.gamma as f32,
        };
        gae(steps, self.config.gae_lambda as f32, &mut advantages, &mut returns);
        let transitions = trajectory.transitions();
        let order = |epoch: usize| {
            let mut rows = transitions.clone();
            Draws::new(self.seed, Stream::Minibatches, [round, epoch as u64, lane.into()]).shuffle(&mut rows);
            rows
        };
        let orders = (0..self.config.epochs).map(order).collect();
        self.batches.insert(lane, Batch { trajectory, advantages, returns, orders });
        Ok(())
    }

    fn updates_max(&self) -> u32 {
        self.updates() as u32
    }

    /// Of each update: rows, advantages, their squares. Then [`COMMON`].
    fn sums_len(&self) -> usize {
        3 * self.updates() + COMMON
    }

    fn sums(&self, lane: u32, out: &mut [f32]) -> Result<(), RlError> {
        check_len("sums of a lane", out.len(), self.sums_len())?;
        let batch = self.batch(lane)?;
        for (update, out) in out[..3 * self.updates()].chunks_exact_mut(3).enumerate() {
            let order = &batch.orders[update / self.config.minibatches];
            let rows = &order[Self::rows(&self.config, batch, update)];
            out.copy_from_slice(&Scale::moments(&batch.advantages, rows));
        }
        let figures = common(&batch.trajectory, &batch.orders[0], Some(&batch.returns));
        out[3 * self.updates()..].copy_from_slice(&figures);
        Ok(())
    }

    fn begin(&mut self, number: u64, sums: &[f32]) -> Result<Round, RlError> {
        check_len("sums of a round", sums.len(), self.sums_len())?;
        let (moments, figures) = sums.split_at(3 * self.updates());
        if sums.iter().any(|sum| !sum.is_finite()) {
            return Err(RlError::NonFinite { update: self.learner.version(), what: "an advantage" });
        }
        self.enter(number);
        let normalise = self.config.normalise_advantages;
        let scale = |moments| if normalise { Scale::new(moments) } else { Scale::NONE };
        self.scales = moments.chunks_exact(3).map(scale).collect();
        Ok(round(self.updates() as u32, figures))
    }

    fn gradient(&mut self, update: u32, lane: u32, out: &mut [f32]) -> Result<(), RlError> {
        check_len("length of a gradient", out.len(), self.learner.layout().flat_len())?;
        out.fill(0.0);
        let Some(&scale) = self.scales.get(update as usize) else {
            return Err(RlError::Contract { what: "updates of a round", got: update.into(), expected: 0 });
        };
        let batch = self.batches.get(&lane);
        let batch = batch.ok_or(RlError::Contract { what: "trajectories of a lane", got: 0, expected: 1 })?;
        let order = &batch.orders[update as usize / self.config.minibatches];
        let rows = &order[Self::rows(&self.config, batch, update as usize)];
        let (gradient, figures) = out.split_at_mut(self.learner.layout().len());
        let mut sums = [0f64; Ppo::FIGURES];
        let config = &self.config;
        for rows in rows.chunks(self.learner.policy().block()) {
            self.heads.forward(self.learner.weights(), &batch.trajectory, rows);
            self.heads.differentiate(&batch.trajectory, rows, |at, row| {
                let slopes = loss(config, &row, (batch, at, scale));
                sums.iter_mut().zip(slopes.figures).for_each(|(sum, figure)| *sum += f64::from(figure));
                (slopes.log_prob, slopes.entropy, slopes.value)
            });
            self.heads.backward(self.learner.weights(), gradient);
        }
        figures.iter_mut().zip(sums).for_each(|(figure, sum)| *figure = sum as f32);
        Ok(())
    }

    fn apply(&mut self, _: u32, sum: &[f32]) -> Result<Updated, RlError> {
        let lr = self.config.rate.at(self.round);
        self.learner.apply(sum, lr)
    }

    fn keep(&mut self, lanes: Range<u32>) {
        self.batches.retain(|lane, _| lanes.contains(lane));
    }
}

/// Slopes of the loss of one row by log-probability, entropy and value, and its figures.
struct Slopes {
    log_prob: f32,
    entropy: f32,
    value: f32,
    figures: [f32; Ppo::FIGURES],
}

#[inline(always)]
fn loss(config: &PpoConfig, row: &Row, (batch, at, scale): (&Batch, usize, Scale)) -> Slopes {
    let (clip, entropy_coef, value_coef) = (config.clip as f32, config.ent_coef as f32, config.vf_coef as f32);
    let advantage = scale.apply(batch.advantages[at]);
    let log_ratio = row.log_prob - batch.trajectory.log_probs[at];
    let ratio = exp(log_ratio);
    let (free, cut) = (-advantage * ratio, -advantage * ratio.clamp(1.0 - clip, 1.0 + clip));
    let outside = (ratio - 1.0).abs() > clip;
    // Where both are equal the ratio is inside, and both slopes are the same.
    let log_prob = if free >= cut { free } else { 0.0 };
    let (target, old) = (batch.returns[at], batch.trajectory.values[at]);
    let off = row.value - target;
    let (mut value_loss, mut value_slope) = (off * off, off);
    if config.clip_values {
        let moved = row.value - old;
        let near = old + moved.clamp(-clip, clip) - target;
        if near * near > value_loss {
            value_loss = near * near;
            value_slope = if moved.abs() <= clip { near } else { 0.0 };
        }
    }
    Slopes {
        log_prob,
        entropy: -entropy_coef,
        value: value_coef * value_slope,
        figures: [
            free.max(cut),
            0.5 * value_loss,
            row.entropy,
            (ratio - 1.0) - log_ratio,
            if outside { 1.0 } else { 0.0 },
            1.0,
        ],
    }
}
