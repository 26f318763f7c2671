//! What a data-parallel learner of any algorithm does, round by round. Owns the interface and the sums that all algorithms begin a round with.
//!
//! A round: the trajectory of each lane is taken by the learner that owns the lane; what the lanes have to tell each other is summed over all lanes
//! (`sums`, then `begin` with the same sum on every learner); then, for each update of the round, gradients are summed over all lanes (`gradient`,
//! then `apply` with the same sum everywhere). Whoever sums lanes in the same tree has the same bits, however many learners there are (A1).

use std::sync::Arc;

use super::actor::Explore;
use super::error::RlError;
use super::learner::{Learner, Updated};
use super::policy::Policy;
use super::trajectory::Trajectory;
use crate::train::{NamedTensor, Snapshot};

/// Figures of a round that stand at the end of `sums`, whatever the algorithm: transitions, returns, their squares, squares of what the values missed of
/// them; episodes that ended, their returns and lengths.
pub(crate) const COMMON: usize = 7;

/// What a round begins with.
#[derive(Debug, Clone, PartialEq)]
pub struct Round {
    /// Updates to make of it. 0: nothing is learned yet.
    pub updates: u32,
    pub transitions: u64,
    pub episodes: u64,
    /// Means over the episodes that ended. None: none did.
    pub episode_return: Option<f64>,
    pub episode_length: Option<f64>,
    /// 1 - variance of (return - value) / variance of returns. None: the algorithm has no values, or the returns do not differ.
    pub explained_variance: Option<f64>,
}

pub trait Learn: Send {
    fn learner(&self) -> &Learner;

    /// For counting updates that are left out.
    fn learner_mut(&mut self) -> &mut Learner;

    /// Names of the figures of [`Updated`].
    fn figures(&self) -> &'static [&'static str];

    /// How rollouts of the job choose.
    fn explore(&self) -> Explore;

    /// A lane's trajectory of this round, after the last update of the round before. One that comes again is the same, and counts once.
    fn take(&mut self, round: u64, lane: u32, trajectory: Trajectory) -> Result<(), RlError>;

    /// Numbers of `sums`.
    fn sums_len(&self) -> usize;

    /// What a lane has to tell of its trajectory; replaces `out`.
    fn sums(&self, lane: u32, out: &mut [f32]) -> Result<(), RlError>;

    /// Updates of a round at most.
    fn updates_max(&self) -> u32;

    /// Begins the round with the sum over all lanes.
    fn begin(&mut self, round: u64, sums: &[f32]) -> Result<Round, RlError>;

    /// Takes up a round again that was begun with these sums: trajectories of it have come since, or its state was restored.
    fn resume(&mut self, round: u64, sums: &[f32]) -> Result<(), RlError> {
        self.begin(round, sums).map(drop)
    }

    /// The lane's part of an update of this round: the sum of gradients over its samples, then the figures, the number of samples last; replaces `out`
    /// ([`crate::Layout::flat_len`]).
    fn gradient(&mut self, update: u32, lane: u32, out: &mut [f32]) -> Result<(), RlError>;

    /// One update with the sum over all lanes. A sum that is not finite is refused and changes nothing.
    fn apply(&mut self, update: u32, sum: &[f32]) -> Result<Updated, RlError>;

    /// Forgets what it has of lanes that are not its own any more.
    fn keep(&mut self, lanes: std::ops::Range<u32>);

    fn policy(&self) -> &Arc<Policy> {
        self.learner().policy()
    }

    /// All that a learner needs that goes on from here, but the trajectories of the round.
    fn snapshot(&self) -> Snapshot {
        self.learner().snapshot()
    }

    /// Takes the tensors of [`Self::snapshot`], and forgets what it has of any lane. In the middle of a round trajectories are taken again, and the round
    /// begun again, before the next gradient.
    fn restore(&mut self, tensors: Vec<NamedTensor>) -> Result<(), RlError> {
        self.learner_mut().restore(tensors)?;
        self.keep(0..0);
        Ok(())
    }
}

/// The figures of a lane's trajectory, in the order of [`COMMON`].
pub(crate) fn common(trajectory: &Trajectory, rows: &[u32], returns: Option<&[f32]>) -> [f32; COMMON] {
    let mut sums = [rows.len() as f64, 0.0, 0.0, 0.0, trajectory.episodes.len() as f64, 0.0, 0.0];
    for &row in rows.iter().filter(|_| returns.is_some()) {
        let row = row as usize;
        let (value, target) = (f64::from(trajectory.values[row]), f64::from(returns.expect("checked")[row]));
        sums[1] += target;
        sums[2] += target * target;
        sums[3] += (target - value) * (target - value);
    }
    for episode in &trajectory.episodes {
        sums[5] += episode.sum;
        sums[6] += f64::from(episode.length);
    }
    sums.map(|sum| sum as f32)
}

pub(crate) fn round(updates: u32, sums: &[f32]) -> Round {
    let [count, sum, square, missed, episodes, returns, lengths] = std::array::from_fn(|at| f64::from(sums[at]));
    let mean_of = |sum: f64| (episodes > 0.0).then(|| sum / episodes);
    let variance = square / count - (sum / count) * (sum / count);
    Round {
        updates,
        transitions: count as u64,
        episodes: episodes as u64,
        episode_return: mean_of(returns),
        episode_length: mean_of(lengths),
        explained_variance: (variance > 0.0).then(|| 1.0 - missed / count / variance),
    }
}

/// Mean and deviation by which advantages are normalised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scale {
    mean: f32,
    deviation: f32,
}

impl Scale {
    pub const NONE: Self = Self { mean: 0.0, deviation: 1.0 };

    /// From [`Self::moments`] summed over all lanes: the deviation of a sample, as PyTorch's `std`. One advantage alone has none.
    pub fn new(moments: &[f32]) -> Self {
        let [count, sum, square] = [0, 1, 2].map(|at| f64::from(moments[at]));
        if count < 2.0 {
            return Self::NONE;
        }
        let mean = sum / count;
        let variance = ((square - sum * mean) / (count - 1.0)).max(0.0);
        Self { mean: mean as f32, deviation: variance.sqrt() as f32 + 1e-8 }
    }

    /// How many advantages there are, their sum and that of their squares.
    pub fn moments(advantages: &[f32], rows: &[u32]) -> [f32; 3] {
        let values = || rows.iter().map(|&row| f64::from(advantages[row as usize]));
        [rows.len() as f32, values().sum::<f64>() as f32, values().map(|value| value * value).sum::<f64>() as f32]
    }

    #[inline(always)]
    pub fn apply(self, advantage: f32) -> f32 {
        (advantage - self.mean) / self.deviation
    }
}

/// Rows `part` of `parts` of so many: they differ by one at most, and together they are all.
pub(crate) fn part(rows: usize, part: usize, parts: usize) -> std::ops::Range<usize> {
    part * rows / parts..(part + 1) * rows / parts
}

/// Sums vectors into the first, in the tree in which a job's lanes are summed: the left half of a node is the largest power of two below its size.
///
/// # Panics
/// When there are none.
pub fn tree_sum(parts: &mut [Vec<f32>]) -> &[f32] {
    fn fold(parts: &mut [Vec<f32>]) {
        if parts.len() < 2 {
            return;
        }
        let (left, right) = parts.split_at_mut(parts.len().next_power_of_two() / 2);
        fold(left);
        fold(right);
        left[0].iter_mut().zip(&right[0]).for_each(|(sum, value)| *sum += value);
    }
    fold(parts);
    &parts[0]
}
