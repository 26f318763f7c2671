//! When each fault of a schedule strikes, and the draw that picks its victim: a pure function of schedule and seed. Knows no clock and no
//! process.
//!
//! P1: each item has random numbers of its own, so that another item added behind it moves nothing of it.
//! P2: moments come in order, and an item's own moments grow.

use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::schedule::{Amount, Fault, Item, Schedule, When};

/// A moment moves by up to this share of its period either way: less than half, so that moments of an item keep their order.
const JITTER_SHARE: f64 = 0.2;
/// A single moment was written as it is meant: it moves less.
const JITTER_AT_MAX: Duration = Duration::from_millis(500);

/// One fault that is due.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Strike {
    /// From the beginning.
    pub at: Duration,
    pub fault: Fault,
    pub hold: Duration,
    pub amount: Option<Amount>,
    /// Picks among those who are there when it strikes.
    pub draw: u64,
}

pub struct Plan {
    items: Vec<Upcoming>,
}

struct Upcoming {
    item: Item,
    random: ChaCha8Rng,
    /// How many there were.
    count: u32,
    next: Option<Strike>,
}

impl Plan {
    pub fn new(schedule: &Schedule, seed: u64) -> Self {
        let items = schedule.items.iter().enumerate().map(|(index, item)| {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&seed.to_le_bytes());
            key[8..16].copy_from_slice(&(index as u64).to_le_bytes());
            let mut upcoming = Upcoming { item: *item, random: ChaCha8Rng::from_seed(key), count: 0, next: None };
            upcoming.draw();
            upcoming
        });
        Self { items: items.collect() }
    }

    /// When the next fault is due; none when all have been.
    pub fn due(&self) -> Option<Duration> {
        self.items.iter().filter_map(|item| item.next).map(|strike| strike.at).min()
    }

    /// The next fault, if it is due at `now`.
    pub fn take(&mut self, now: Duration) -> Option<Strike> {
        let first =
            self.items.iter_mut().filter(|item| item.next.is_some()).min_by_key(|item| item.next.map(|s| s.at))?;
        let strike = first.next.filter(|strike| strike.at <= now)?;
        first.draw();
        Some(strike)
    }
}

impl Upcoming {
    fn draw(&mut self) {
        self.count += 1;
        let (jitter, draw) = (self.random.next_u64(), self.random.next_u64());
        let (base, moves) = match self.item.when {
            When::Every(period) => (period * self.count, period.mul_f64(JITTER_SHARE)),
            When::At(at) if self.count == 1 => (at, at.mul_f64(JITTER_SHARE).min(JITTER_AT_MAX)),
            When::At(_) => {
                self.next = None;
                return;
            }
        };
        // 53 bits are a fraction of one, exactly.
        let share = (jitter >> 11) as f64 / (1u64 << 53) as f64;
        let at = base.saturating_sub(moves) + moves.mul_f64(2.0 * share);
        self.next = Some(Strike { at, fault: self.item.fault, hold: self.item.hold, amount: self.item.amount, draw });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strikes(text: &str, seed: u64, count: usize) -> Vec<Strike> {
        let mut plan = Plan::new(&Schedule::parse(text).unwrap(), seed);
        (0..count).map_while(|_| plan.take(Duration::MAX)).collect()
    }

    #[test]
    fn a_seed_is_one_plan_and_another_seed_another() {
        let text = "kill-rank every 3s, pause-node every 5s for 1s";
        assert_eq!(strikes(text, 7, 50), strikes(text, 7, 50));
        assert_ne!(strikes(text, 7, 50), strikes(text, 8, 50));
    }

    #[test]
    fn moments_come_in_order_and_stay_near_their_period() {
        let found = strikes("kill-rank every 3s, kill-node every 700ms", 1, 500);
        assert!(found.is_sorted_by_key(|strike| strike.at), "P2");
        let ranks = found.iter().filter(|strike| strike.fault == Fault::KillRank);
        for (index, strike) in ranks.enumerate() {
            let from_period = (strike.at.as_secs_f64() - 3.0 * (index + 1) as f64).abs();
            assert!(from_period <= 0.6 + 1e-9, "{index}: {strike:?}");
        }
    }

    #[test]
    fn another_item_moves_nothing_of_the_first() {
        let alone = strikes("kill-rank every 3s", 5, 20);
        let beside = strikes("kill-rank every 3s; kill-coordinator every 1s", 5, 100);
        let same: Vec<Strike> = beside.into_iter().filter(|strike| strike.fault == Fault::KillRank).take(20).collect();
        assert_eq!(alone, same, "P1");
    }

    #[test]
    fn a_single_moment_is_one_strike_near_its_time() {
        let found = strikes("kill-coordinator at 10s", 3, 10);
        assert_eq!(found.len(), 1);
        assert!((found[0].at.as_secs_f64() - 10.0).abs() <= 0.5, "{found:?}");
        let plan = Plan::new(&Schedule::parse("kill-rank at 1s").unwrap(), 3);
        let mut early = plan;
        assert_eq!(early.take(Duration::ZERO), None);
        assert!(early.due().is_some());
    }
}
