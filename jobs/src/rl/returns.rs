//! What steps were worth: generalised advantage estimation (Schulman et al., 2016) and V-trace (Espeholt et al., 2018). Pure functions over flat
//! vectors, step after step and in each env after env.
//!
//! After a terminated step nothing is worth anything; after a truncated one the next row's value stands for what would have come; a row that is no
//! transition gives nothing and takes nothing.

use super::trajectory::{ENDED, TERMINATED, TRANSITION};

/// What both need of a trajectory.
#[derive(Debug, Clone, Copy)]
pub struct Steps<'a> {
    pub envs: usize,
    /// [steps, envs]
    pub rewards: &'a [f32],
    /// [steps, envs]
    pub flags: &'a [u8],
    /// [steps + 1, envs]
    pub values: &'a [f32],
    pub gamma: f32,
}

/// Fills advantages and returns (advantage + value), both [steps, envs]; 0 and the value where there is no transition.
///
/// # Panics
/// When the lengths do not fit each other.
pub fn gae(steps: Steps<'_>, lambda: f32, advantages: &mut [f32], returns: &mut [f32]) {
    let rows = steps.check(&[advantages.len(), returns.len()]);
    for env in 0..steps.envs {
        let mut running = 0.0;
        for row in (env..rows).step_by(steps.envs).rev() {
            let flags = steps.flags[row];
            let value = steps.values[row];
            running = if flags & TRANSITION == 0 {
                0.0
            } else {
                let next = if flags & TERMINATED == 0 { steps.values[row + steps.envs] } else { 0.0 };
                let later = if flags & ENDED == 0 { running } else { 0.0 };
                steps.rewards[row] + steps.gamma * next - value + steps.gamma * lambda * later
            };
            advantages[row] = running;
            returns[row] = running + value;
        }
    }
}

/// V-trace's truncation levels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Truncation {
    pub rho: f32,
    pub c: f32,
    pub policy_rho: f32,
}

/// Fills the targets of the values and the advantages of the policy gradient, both [steps, envs], from the ratios of the learner's probability of each
/// action to the actor's. `steps.values` are the learner's.
///
/// # Panics
/// When the lengths do not fit each other.
pub fn vtrace(steps: Steps<'_>, ratios: &[f32], truncation: Truncation, targets: &mut [f32], advantages: &mut [f32]) {
    let rows = steps.check(&[ratios.len(), targets.len(), advantages.len()]);
    for env in 0..steps.envs {
        // Of the next row: its target less its value.
        let mut running = 0.0;
        for row in (env..rows).step_by(steps.envs).rev() {
            let (flags, value) = (steps.flags[row], steps.values[row]);
            if flags & TRANSITION == 0 {
                (targets[row], advantages[row], running) = (value, 0.0, 0.0);
                continue;
            }
            let next = if flags & TERMINATED == 0 { steps.values[row + steps.envs] } else { 0.0 };
            let later = if flags & ENDED == 0 { running } else { 0.0 };
            let ratio = ratios[row];
            let off = steps.rewards[row] + steps.gamma * next - value;
            advantages[row] = ratio.min(truncation.policy_rho) * (off + steps.gamma * later);
            running = ratio.min(truncation.rho) * off + steps.gamma * ratio.min(truncation.c) * later;
            targets[row] = value + running;
        }
    }
}

impl Steps<'_> {
    /// Rows.
    fn check(&self, lengths: &[usize]) -> usize {
        let rows = self.rewards.len();
        assert!(lengths.iter().all(|&len| len == rows) && self.flags.len() == rows, "a number for each row");
        assert!(self.envs > 0 && rows.is_multiple_of(self.envs), "rows are whole steps");
        assert_eq!(self.values.len(), rows + self.envs, "a value for each row and after the last");
        rows
    }
}
