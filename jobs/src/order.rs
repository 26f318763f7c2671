//! The order of samples: f(seed, epoch, position), in constant memory, the same for any world size.
//!
//! A keyed Feistel network permutes the smallest even-bit power of two that holds the set; positions that fall outside
//! walk the cycle until they fall inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), which keeps
//! it a permutation. It shuffles; it is no cipher.

const ROUNDS: u64 = 6;

/// Dataset index of the global position `cursor` (sample number since the job began) in a set of `samples`: epoch
/// `cursor / samples` is a permutation of the set keyed by (seed, epoch), so each epoch has each sample exactly once.
///
/// # Panics
/// When `samples` is 0.
pub fn order(seed: u64, samples: u64, cursor: u64) -> u64 {
    assert!(samples > 0, "an empty set has no order");
    let (epoch, mut position) = (cursor / samples, cursor % samples);
    let bits = (u64::BITS - (samples - 1).leading_zeros()).max(2);
    let half = bits.div_ceil(2);
    let key = mix(seed ^ mix(epoch.wrapping_add(0x9e37_79b9_7f4a_7c15)));
    loop {
        position = feistel(position, half, key);
        if position < samples {
            return position;
        }
    }
}

fn feistel(value: u64, half: u32, key: u64) -> u64 {
    let mask = (1u64 << half) - 1;
    let (mut left, mut right) = (value >> half, value & mask);
    for round in 0..ROUNDS {
        let mixed = mix(right ^ key.wrapping_add(round.wrapping_mul(0xd134_2543_de82_ef95)));
        (left, right) = (right, left ^ (mixed & mask));
    }
    left << half | right
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::order;

    #[test]
    fn every_epoch_is_a_permutation() {
        for samples in [1, 2, 3, 5, 16, 17, 100, 1000, 4097] {
            for epoch in 0..3 {
                let mut seen: Vec<u64> = (0..samples).map(|i| order(7, samples, epoch * samples + i)).collect();
                seen.sort_unstable();
                assert_eq!(seen, (0..samples).collect::<Vec<_>>(), "{samples} samples, epoch {epoch}");
            }
        }
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let epoch = |seed, n: u64| (0..1000).map(|i| order(seed, 1000, n * 1000 + i)).collect::<Vec<_>>();
        assert_ne!(epoch(7, 0), epoch(7, 1));
        assert_ne!(epoch(7, 0), epoch(8, 0));
        assert_eq!(epoch(7, 0), epoch(7, 0));
    }

    #[test]
    fn neighbours_are_scattered() {
        // For a random order, the mean distance of neighbours is samples / 3.
        let n = 10_000u64;
        let order: Vec<u64> = (0..n).map(|i| order(1, n, i)).collect();
        let mean = order.windows(2).map(|w| w[0].abs_diff(w[1])).sum::<u64>() as f64 / (n - 1) as f64;
        assert!((mean / (n as f64 / 3.0) - 1.0).abs() < 0.05, "mean distance {mean}");
    }
}
