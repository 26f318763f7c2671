//! A checksum over the bits of numbers, fast enough to be taken at every step: replicas of the same parameters are compared by it. It guards
//! against faults, not against people: whatever leaves the machine or a process's life has a BLAKE3 besides.
//!
//! Numbers that differ in one place, in any of their bits, always differ in their fingerprint: every step below is a bijection of the lane for
//! a given word, and of the word for a given lane. Other differences go unseen once in 2^64.

/// Independent lanes, so that their multiplications overlap: about eight bytes a clock cycle.
const LANES: usize = 8;

/// Odd, so that multiplying is a bijection: 2^64 over the golden ratio.
const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;

/// Where the best-mixed bits, the highest, meet the next word.
const TURN: u32 = 29;

/// Takes slices one after the other; their borders count.
pub(crate) struct Fingerprint {
    lanes: [u64; LANES],
    values: u64,
}

impl Fingerprint {
    pub fn new() -> Self {
        // Zeros must not be a fixed point.
        Self { lanes: std::array::from_fn(|lane| mix(FACTOR, lane as u64)), values: 0 }
    }

    pub fn add(&mut self, values: &[f32]) {
        let (rounds, rest) = values.as_chunks::<{ 2 * LANES }>();
        for round in rounds {
            for (lane, pair) in self.lanes.iter_mut().zip(round.as_chunks::<2>().0) {
                *lane = mix(*lane, u64::from(pair[0].to_bits()) | u64::from(pair[1].to_bits()) << 32);
            }
        }
        for (value, lane) in rest.iter().zip((0..LANES).cycle()) {
            self.lanes[lane] = mix(self.lanes[lane], value.to_bits().into());
        }
        self.values += values.len() as u64;
        self.lanes[0] = mix(self.lanes[0], self.values);
    }

    pub fn finish(self) -> u64 {
        self.lanes.into_iter().fold(self.values, mix)
    }
}

fn mix(lane: u64, word: u64) -> u64 {
    let mixed = lane ^ word;
    // A product leaves high bits high: they are brought down before it, so that it spreads them too.
    (mixed ^ mixed >> 32).wrapping_mul(FACTOR).rotate_left(TURN)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn of(slices: &[&[f32]]) -> u64 {
        let mut fingerprint = Fingerprint::new();
        slices.iter().for_each(|values| fingerprint.add(values));
        fingerprint.finish()
    }

    #[test]
    fn every_single_bit_counts() {
        let values: Vec<f32> = (0..77).map(|index| index as f32 * 0.37 - 9.0).collect();
        let mut seen = BTreeSet::from([of(&[&values])]);
        for index in 0..values.len() {
            for bit in 0..32 {
                let mut flipped = values.clone();
                flipped[index] = f32::from_bits(values[index].to_bits() ^ 1 << bit);
                assert!(seen.insert(of(&[&flipped])), "bit {bit} of value {index}");
            }
        }
    }

    #[test]
    fn two_signs_places_and_borders_count() {
        let values: Vec<f32> = (1..=64).map(|index| index as f32).collect();
        let mut seen = BTreeSet::from([of(&[&values])]);
        for other in 1..values.len() {
            // Two flips of the highest bit, which a product alone would let cancel.
            let mut signs = values.clone();
            signs[0] = -signs[0];
            signs[other] = -signs[other];
            assert!(seen.insert(of(&[&signs])), "signs of 0 and {other}");
            let mut swapped = values.clone();
            swapped.swap(0, other);
            assert!(seen.insert(of(&[&swapped])), "0 and {other} swapped");
            assert!(seen.insert(of(&[&values[..other], &values[other..]])), "cut at {other}");
        }
        assert_ne!(of(&[&[0.0; 16]]), of(&[&[0.0; 32]]));
        assert_ne!(of(&[&[0.0]]), of(&[&[-0.0]]));
    }
}
