//! Sums that are not finite: whether a step may be left out (`train.on_nan`). Every rank sees the same sum, so every rank decides alike; what a
//! failure means to the job is the coordinator's (`state/not_finite.rs`).

use std::ops::Range;

use stoke_jobs::Plan;
use stoke_protocol::spec::OnNan;

use crate::exchange::Partial;

/// Steps that are left out in a row before the job fails: the parameters are beyond help, or all of the data is.
const IN_A_ROW_MAX: u32 = 10;

/// Rows of a lane with local steps, which has many.
const ROWS_TOLD: u64 = 256;

pub struct Skips {
    allowed: bool,
    in_a_row: u32,
}

impl Skips {
    pub fn new(on_nan: OnNan) -> Self {
        Self { allowed: on_nan == OnNan::Skip, in_a_row: 0 }
    }

    /// Whether one more step may be left out; it counts.
    pub fn take(&mut self) -> bool {
        let may = self.allowed && self.in_a_row < IN_A_ROW_MAX;
        self.in_a_row += u32::from(may);
        may
    }

    /// A step was applied.
    pub fn applied(&mut self) {
        self.in_a_row = 0;
    }
}

pub fn are_finite(partials: &[Partial]) -> bool {
    partials.iter().all(|partial| is_finite(partial.values.read()))
}

pub fn is_finite(values: &[f32]) -> bool {
    values.iter().all(|value| value.is_finite())
}

/// For the log: where the loss or gradient of these lanes comes from.
pub fn tell_rows(plan: &Plan, samples: u64, step: u64, lanes: &[u32]) {
    for lane in lanes {
        let Range { start, end } = plan.lane_positions(step, *lane);
        let rows = plan.samples_at(samples, start..plan.diloco.map_or(end, |_| end.min(start + ROWS_TOLD)));
        tracing::error!(
            step,
            lane,
            of = end - start,
            ?rows,
            "loss or gradient is not finite, also when computed again"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_steps_in_a_row_are_left_out() {
        let mut skips = Skips::new(OnNan::Skip);
        for _ in 0..2 {
            assert!((0..IN_A_ROW_MAX).all(|_| skips.take()));
            assert!(!skips.take());
            skips.applied();
        }
        assert!(!Skips::new(OnNan::Fail).take() && !Skips::new(OnNan::Rollback).take());
    }
}
