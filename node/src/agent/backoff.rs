//! How long to wait before dialling again. Pure; the randomness is the caller's seed, so that a simulation repeats.

use std::time::Duration;

/// A coordinator that restarts is back within a second or so.
const FIRST_MS: u64 = 100;
/// A thousand nodes that wait up to so long come back at 400 a second at most (F16, F17).
const MOST_MS: u64 = 5_000;

/// Doubling waits, each drawn from the upper half of its range.
#[derive(Debug)]
pub struct Backoff {
    attempts: u32,
    random: u64,
}

impl Backoff {
    pub fn new(seed: u64) -> Self {
        Self { attempts: 0, random: seed }
    }

    /// The last attempt was a success.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }

    /// The wait before the next attempt.
    pub fn wait(&mut self) -> Duration {
        let most = (FIRST_MS << self.attempts.min(10)).min(MOST_MS);
        self.attempts += 1;
        Duration::from_millis(most / 2 + self.draw() % (most / 2 + 1))
    }

    /// SplitMix64 (Steele, Lea and Flood, 2014).
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.random;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_their_bound_and_differ_between_nodes() {
        let waits = |seed| (0..12).scan(Backoff::new(seed), |backoff, _| Some(backoff.wait())).collect::<Vec<_>>();
        let one = waits(1);
        assert!(one[0] <= Duration::from_millis(FIRST_MS) && one[0] >= Duration::from_millis(FIRST_MS / 2));
        assert!(one.iter().all(|wait| wait.as_millis() <= u128::from(MOST_MS)));
        assert!(one[11].as_millis() >= u128::from(MOST_MS / 2));
        assert_ne!(one, waits(2));
        assert_eq!(one, waits(1));
    }
}
