//! What rides behind the trainer's flat vector and is summed with it: how many members have been told of the next generation (T2), and which
//! samples each lane was computed from. Owns the layout and what a complete sum must show; computes no gradient and sends nothing.
//!
//! I20: a step is applied only if its sum shows each lane once, over the positions that follow those of the lane before it, from the end of the
//! ledger to the end of the step's batch. What is looked at is what was summed, so that a lane that was left out, taken twice or computed from
//! other samples is seen by every rank in the same sum, whoever gave it and whether it still lives.

use std::ops::Range;

use stoke_jobs::Plan;
use stoke_protocol::ledger::Ledger;

/// How many members have been told.
const TOLD: usize = 1;
/// Of each lane: the mark of its first position, and its samples as the trainer counted them.
const LANE: usize = 2;
/// A position is marked by its remainder, plus one: no lane has the mark 0, and twice a mark is exact in f32 too.
const MARKS: u64 = 1 << 23;

pub struct Tail {
    /// Values of the trainer.
    flat: usize,
    lanes: usize,
    /// Of the lane that was given last.
    given: Vec<f32>,
}

impl Tail {
    pub fn new(flat: usize, lanes: u32) -> Self {
        let lanes = lanes as usize;
        Self { flat, lanes, given: vec![0.0; TOLD + LANE * lanes] }
    }

    /// Values of the whole vector.
    pub fn values(&self) -> usize {
        self.flat + self.given.len()
    }

    /// What stands behind the trainer's values of `lane`. `told` is 1 in one lane of a member that has been told, else 0.
    pub fn of_lane(&mut self, lane: u32, told: u32, positions: &Range<u64>, counted: f32) -> &[f32] {
        self.given.fill(0.0);
        self.given[0] = told as f32;
        self.given[TOLD + LANE * lane as usize..][..LANE].copy_from_slice(&[mark(positions.start), counted]);
        &self.given
    }

    /// Members that have been told of the next generation.
    pub fn told(&self, sum: &[f32]) -> f32 {
        sum[self.flat]
    }

    /// The ledger with a step whose sum is complete, or what is wrong with the step.
    pub fn record(&self, ledger: Ledger, step: u64, plan: &Plan, sum: &[f32]) -> Result<Ledger, String> {
        let mut next = ledger.end;
        let lanes = sum[self.flat + TOLD..].chunks_exact(LANE);
        assert_eq!(lanes.len(), self.lanes, "I20: a mark for each lane");
        for (lane, given) in (0..).zip(lanes) {
            let positions = plan.lane_positions(step, lane);
            let wrong = |what: String| {
                let Range { start, end } = positions;
                format!("step {step} is refused: lane {lane}, samples [{start}, {end}), {what}")
            };
            let (found, expected) = (given[0], mark(positions.start));
            if positions.start != next {
                return Err(wrong(format!("does not follow the ledger {ledger}, which reaches {next} before it")));
            } else if found == 0.0 {
                return Err(wrong("is in the sum of nobody".to_owned()));
            } else if found == 2.0 * expected {
                return Err(wrong("was summed twice".to_owned()));
            } else if found != expected {
                return Err(wrong(format!("was computed from others (mark {found}, not {expected})")));
            } else if given[1] != (positions.end - positions.start) as f32 {
                return Err(wrong(format!("counts {} samples", given[1])));
            }
            next = positions.end;
        }
        match (step + 1) * plan.batch as u64 {
            end if end == next => Ok(Ledger { end, ..ledger }),
            end => Err(format!("step {step} is refused: its lanes reach position {next}, its batch {end}")),
        }
    }
}

fn mark(position: u64) -> f32 {
    (position % MARKS + 1) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLAT: usize = 5;
    const LANES: u32 = 4;

    fn plan() -> Plan {
        Plan {
            seed: 1,
            batch: 40,
            lanes: LANES as usize,
            steps: 10,
            accumulate: 1,
            threads: 1,
            clip_norm: None,
            precision: stoke_jobs::Floats::F32,
            diloco: None,
        }
    }

    /// The sum of a step to which each of `given` was added: the slot that it was given in, and the lane and step that were computed.
    fn sum(given: &[(u32, u32, u64)]) -> Vec<f32> {
        let mut tail = Tail::new(FLAT, LANES);
        let mut sum = vec![0.0; tail.values()];
        for (slot, lane, step) in given {
            let of_lane = tail.of_lane(*slot, 0, &plan().lane_positions(*step, *lane), 10.0);
            sum[FLAT..].iter_mut().zip(of_lane).for_each(|(sum, value)| *sum += value);
        }
        sum
    }

    #[test]
    fn every_lane_once_extends_the_ledger_and_anything_else_names_the_step_and_the_lane() {
        let tail = Tail::new(FLAT, LANES);
        let ledger = Ledger { first: 0, end: 120 };
        let record = |given: &[(u32, u32, u64)]| tail.record(ledger, 3, &plan(), &sum(given));
        let right = [(0, 0, 3), (1, 1, 3), (2, 2, 3), (3, 3, 3)];
        assert_eq!(record(&right), Ok(Ledger { first: 0, end: 160 }));
        let told = |words: &str, given: &[(u32, u32, u64)]| {
            let error = record(given).unwrap_err();
            assert!(error.contains(words) && error.contains("step 3"), "{error}");
        };
        told("lane 2, samples [140, 150), is in the sum of nobody", &[right[0], right[1], right[3]]);
        told("lane 1, samples [130, 140), was summed twice", &[right[0], right[1], right[1], right[2], right[3]]);
        told("lane 3, samples [150, 160), was computed from others", &[right[0], right[1], right[2], (3, 2, 3)]);
        told("lane 0, samples [120, 130), was computed from others", &[(0, 0, 2), right[1], right[2], right[3]]);
        let mut short = sum(&right);
        short[FLAT + TOLD + LANE + 1] = 9.0;
        assert!(tail.record(ledger, 3, &plan(), &short).unwrap_err().contains("lane 1, samples [130, 140), counts 9"));
        let behind = tail.record(Ledger { first: 0, end: 80 }, 3, &plan(), &sum(&right)).unwrap_err();
        assert!(behind.contains("does not follow the ledger [0, 80)"), "{behind}");
    }

    #[test]
    fn marks_tell_a_lane_from_none_and_from_two_of_it_at_any_position() {
        for position in [0, 1, MARKS - 1, MARKS, u64::MAX] {
            let once = mark(position);
            assert!(once > 0.0 && once + once != once && (once + once) / 2.0 == once, "{position}");
            assert_ne!(mark(position), mark(position.wrapping_add(1)), "{position}");
        }
    }
}
