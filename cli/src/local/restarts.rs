//! When a supervised process that died is started again. A pure decision: no clock, no process.
//!
//! R1: at most [`RESTARTS_MAX`] restarts within [`WINDOW`]; a process that lived longer starts with a clean slate.
//! R2: the wait grows from [`WAIT_FIRST`] by doubling, to at most [`WAIT_MAX`].

use std::collections::VecDeque;
use std::time::Duration;

/// More deaths than this in a minute are not an accident: restarting hides the cause.
pub const RESTARTS_MAX: usize = 5;
const WINDOW: Duration = Duration::from_secs(60);
/// Short, because ranks keep stepping only as long as their checkpoints need no commit.
pub const WAIT_FIRST: Duration = Duration::from_millis(100);
const WAIT_MAX: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub struct Restarts {
    recent: VecDeque<Duration>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Start again after this wait.
    Again { after: Duration },
    /// R1.
    GiveUp,
}

impl Restarts {
    /// The process died at `now`, counted from any fixed moment.
    pub fn died(&mut self, now: Duration) -> Decision {
        self.recent.retain(|at| now.saturating_sub(*at) < WINDOW);
        if self.recent.len() >= RESTARTS_MAX {
            return Decision::GiveUp;
        }
        let after = WAIT_FIRST.saturating_mul(1 << self.recent.len().min(16)).min(WAIT_MAX);
        self.recent.push_back(now);
        Decision::Again { after }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_are_bounded_and_back_off() {
        let mut restarts = Restarts::default();
        let waits: Vec<Decision> = (0..=RESTARTS_MAX as u64).map(|s| restarts.died(Duration::from_secs(s))).collect();
        let again = |ms| Decision::Again { after: Duration::from_millis(ms) };
        assert_eq!(waits, [again(100), again(200), again(400), again(800), again(1600), Decision::GiveUp]);
    }

    #[test]
    fn a_long_life_is_a_clean_slate() {
        let mut restarts = Restarts::default();
        for death in 0..20 {
            assert_eq!(restarts.died(WINDOW * death), Decision::Again { after: WAIT_FIRST });
        }
    }
}
