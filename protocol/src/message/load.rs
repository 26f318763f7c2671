//! What is seen of models that are served: what a head has under way and has done, and what a gateway could not bring to a head. Volatile everywhere:
//! only the newest matters, and any of it may be lost.

use serde::{Deserialize, Serialize};

/// Upper bounds of the buckets of [`FirstTokens`], in milliseconds; one more bucket has all that took longer.
pub const FIRST_TOKEN_MS: [u32; 13] = [5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 60_000];

/// How long answers took to their first token, counted by bucket: from the question's arrival, and to the first vector or tensor where no tokens
/// are made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FirstTokens {
    pub counts: [u64; FIRST_TOKEN_MS.len() + 1],
    pub sum_ms: u64,
}

/// Of a head. Counts are since its process began, so that one that is lost costs nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Load {
    /// Questions that are computed now.
    pub running: u32,
    /// Questions that were taken and are not computed yet.
    pub waiting: u32,
    /// Answers that came to their end.
    pub answers: u64,
    /// Tokens of answers, or of the texts of vectors.
    pub tokens: u64,
    pub first_tokens: FirstTokens,
}

/// Questions of a gateway that no head has.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Demand {
    pub model: String,
    /// They wait for a head now.
    pub held: u32,
    /// They were refused since the last report, because every head was busy or none came up in time.
    pub refused: u32,
}

impl FirstTokens {
    pub fn add(&mut self, ms: u64) {
        let count = &mut self.counts[bucket(ms)];
        *count = count.saturating_add(1);
        self.sum_ms = self.sum_ms.saturating_add(ms);
    }

    pub fn count(&self) -> u64 {
        self.counts.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// What has come since `before`.
    pub fn since(&self, before: &Self) -> Self {
        let mut more = *self;
        more.counts.iter_mut().zip(before.counts).for_each(|(count, before)| *count = count.saturating_sub(before));
        more.sum_ms = more.sum_ms.saturating_sub(before.sum_ms);
        more
    }

    pub fn merge(&mut self, other: &Self) {
        self.counts.iter_mut().zip(other.counts).for_each(|(count, other)| *count = count.saturating_add(other));
        self.sum_ms = self.sum_ms.saturating_add(other.sum_ms);
    }

    /// Milliseconds within which this part of them came, evenly spread within its bucket as Prometheus takes it; the last bound for any that took
    /// longer. None: there are none.
    pub fn quantile_ms(&self, part: f64) -> Option<u32> {
        let count = self.count();
        let rank = (part.clamp(0.0, 1.0) * count as f64).max(f64::MIN_POSITIVE);
        let (mut below, mut least_ms) = (0u64, 0);
        for (most_ms, count) in FIRST_TOKEN_MS.iter().zip(self.counts) {
            if count > 0 && below as f64 + count as f64 >= rank {
                let within = (rank - below as f64) / count as f64;
                return Some(least_ms + (f64::from(most_ms - least_ms) * within).round() as u32);
            }
            (below, least_ms) = (below.saturating_add(count), *most_ms);
        }
        (count > 0).then_some(least_ms)
    }
}

fn bucket(ms: u64) -> usize {
    FIRST_TOKEN_MS.iter().position(|most| ms <= u64::from(*most)).unwrap_or(FIRST_TOKEN_MS.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_in_the_bucket_of_their_rank() {
        let mut times = FirstTokens::default();
        assert_eq!(times.quantile_ms(0.5), None);
        (0..99).for_each(|_| times.add(150));
        times.add(4_000);
        assert_eq!(times.count(), 100);
        assert_eq!((times.quantile_ms(0.5), times.quantile_ms(0.99)), (Some(151), Some(200)));
        assert_eq!(times.quantile_ms(1.0), Some(5_000));
        let before = times;
        times.add(100_000);
        assert_eq!(times.since(&before).quantile_ms(0.5), Some(60_000), "no bound is above it");
        assert_eq!(times.since(&before).sum_ms, 100_000);
    }

    #[test]
    fn buckets_are_up_to_and_with_their_bound() {
        assert_eq!([0, 5, 6, 60_000, 60_001].map(bucket), [0, 0, 1, 12, 13]);
    }
}
