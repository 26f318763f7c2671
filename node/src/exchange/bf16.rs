//! Values as bf16 on the wire: half the bytes, where a job asks for it. Owns the rounding and what it left over; who sends what to whom is the plan's.
//!
//! X17: what a host sends of its sums is rounded to the nearest bf16, ties to even, after what the rounding before left over was added (error feedback:
//! Seide et al., "1-Bit Stochastic Gradient Descent", 2014). Sums are folded in f32 from what came. The owner rounds a sum in the same way before anybody
//! reads it, itself too: all ranks have the same bits. What stands behind the gradients, counts and marks, goes as it is.

use std::ops::Range;

use bytes::Bytes;

use super::frame::Rope;
use super::sum::{NARROW_BYTES, VALUE_BYTES, as_bytes, with_features};

/// Which values of the vector are rounded on the wire: the first so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rounded(pub usize);

/// What the rounding of values has left over, in each of some vectors: in those that a host gives, or in the sum.
pub struct LeftOver {
    rounded: Rounded,
    vectors: Vec<Vec<f32>>,
}

impl Rounded {
    /// How many of a piece's values are.
    fn of(self, piece: &Range<usize>) -> usize {
        self.0.clamp(piece.start, piece.end) - piece.start
    }

    /// Bytes of a piece on the wire.
    pub fn bytes(self, piece: &Range<usize>) -> usize {
        let rounded = self.of(piece);
        rounded * NARROW_BYTES + (piece.len() - rounded) * VALUE_BYTES
    }

    /// The values of a piece that came as these bytes.
    pub fn read(self, piece: &Range<usize>, wire: Rope) -> Rope {
        wire.narrow(self.of(piece))
    }
}

impl LeftOver {
    /// Of whole vectors. Memory is taken only where something is left over.
    pub fn new(rounded: Rounded, values: usize, vectors: usize) -> Self {
        // A clone of zeros would be written.
        let vectors = (0..vectors).map(|_| vec![0.0; rounded.of(&(0..values))]).collect();
        Self { rounded, vectors }
    }

    /// Nothing is left over any more: what was sent last counts for nothing.
    pub fn forget(&mut self) {
        self.vectors.iter_mut().for_each(|left| *left = vec![0.0; left.len()]);
    }

    /// A piece of a vector, as bytes of f32, for the wire.
    pub fn give(&mut self, vector: usize, piece: &Range<usize>, values: &[u8]) -> Bytes {
        let left = self.of(vector, piece);
        let (values, exact) = values.split_at(left.len() * VALUE_BYTES);
        let mut wire = vec![0; left.len() * NARROW_BYTES + exact.len()];
        let (narrow, rest) = wire.split_at_mut(left.len() * NARROW_BYTES);
        round_bytes(values, left, narrow);
        rest.copy_from_slice(exact);
        wire.into()
    }

    /// Rounds a piece of the only vector where it lies, and gives it for the wire.
    pub fn round(&mut self, piece: &Range<usize>, values: &mut [f32]) -> Bytes {
        let left = self.of(0, piece);
        let (values, exact) = values.split_at_mut(left.len());
        let mut wire = vec![0; left.len() * NARROW_BYTES + size_of_val(exact)];
        let (narrow, rest) = wire.split_at_mut(left.len() * NARROW_BYTES);
        round_values(values, left, narrow);
        rest.copy_from_slice(as_bytes(exact));
        wire.into()
    }

    fn of(&mut self, vector: usize, piece: &Range<usize>) -> &mut [f32] {
        let rounded = self.rounded.of(piece);
        let left = &mut self.vectors[vector];
        let first = piece.start.min(left.len());
        &mut left[first..][..rounded]
    }
}

/// Values as their bytes, to bf16.
fn round_bytes(values: &[u8], left: &mut [f32], narrow: &mut [u8]) {
    with_features!(round_bytes_plain(values: &[u8], left: &mut [f32], narrow: &mut [u8]));
}

/// Values where they lie, and the same as bf16.
fn round_values(values: &mut [f32], left: &mut [f32], narrow: &mut [u8]) {
    with_features!(round_values_plain(values: &mut [f32], left: &mut [f32], narrow: &mut [u8]));
}

#[inline(always)]
fn round_bytes_plain(values: &[u8], left: &mut [f32], narrow: &mut [u8]) {
    let narrow = narrow.as_chunks_mut::<NARROW_BYTES>().0.iter_mut();
    for ((narrow, value), left) in narrow.zip(values.as_chunks::<VALUE_BYTES>().0).zip(left) {
        *narrow = narrowed(round(f32::from_le_bytes(*value), left));
    }
}

#[inline(always)]
fn round_values_plain(values: &mut [f32], left: &mut [f32], narrow: &mut [u8]) {
    let narrow = narrow.as_chunks_mut::<NARROW_BYTES>().0.iter_mut();
    for ((narrow, value), left) in narrow.zip(values).zip(left) {
        *value = round(*value, left);
        *narrow = narrowed(*value);
    }
}

#[inline(always)]
fn narrowed(rounded: f32) -> [u8; NARROW_BYTES] {
    ((rounded.to_bits() >> 16) as u16).to_le_bytes()
}

/// The nearest bf16 to the value and what is left over of those before, ties to even; what is left over now stays.
#[inline(always)]
fn round(value: f32, left: &mut f32) -> f32 {
    let value = value + *left;
    let bits = value.to_bits();
    let nearest = f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000);
    // What is not finite stays so: a NaN whose last bits round it to infinity would be none any more.
    let rounded = if value.is_nan() { f32::NAN } else { nearest };
    // Nothing is left over of infinity, lest NaN be added to every value after it.
    *left = if rounded.is_finite() { value - rounded } else { 0.0 };
    rounded
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn a_value_is_rounded_to_the_nearest_and_what_is_left_over_counts() {
        let plain = |value: f32| round(value, &mut 0.0);
        // Between 1 and 2 neighbours are 2^-7 apart, between a half and 1 they are 2^-8.
        let above = 1.0 + 2f32.powi(-7);
        assert_eq!([1.0, 1.003, 1.005, -1.005].map(plain), [1.0, 1.0, above, -above]);
        assert_eq!([1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8)].map(plain), [1.0, 1.0 + 2f32.powi(-6)], "ties");
        let mut left = 0.0;
        assert_eq!([1.003, 1.003, 1.003].map(|value| round(value, &mut left)), [1.0, above, 1.0]);
        assert!((left - (0.009 - 2f32.powi(-7))).abs() < 1e-6, "{left}");
    }

    #[test]
    fn values_over_the_wire_are_those_that_were_rounded_and_the_rest_is_exact() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        for _ in 0..300 {
            let values: usize = rng.random_range(0..80);
            let rounded = Rounded(rng.random_range(0..=values));
            let start = rng.random_range(0..=values);
            let piece = start..rng.random_range(start..=values);
            let of: Vec<f32> = piece.clone().map(|_| rng.random::<f32>() - 0.5).collect();
            let (mut giver, mut owner) = (LeftOver::new(rounded, values, 1), LeftOver::new(rounded, values, 1));
            let mut sum = of.clone();
            let wires = [giver.give(0, &piece, as_bytes(&of)), owner.round(&piece, &mut sum)];
            for wire in wires {
                assert_eq!(wire.len(), rounded.bytes(&piece));
                let (mut rope, mut rest) = (Rope::default(), wire);
                while !rest.is_empty() {
                    rope.push(rest.split_to(rng.random_range(1..=rest.len().min(7))));
                }
                let mut read = vec![0.0; piece.len()];
                rounded.read(&piece, rope).cursor().copy_to(&mut read);
                assert_eq!(read, sum);
            }
            for (at, (sum, of)) in piece.zip(sum.iter().zip(&of)) {
                let error = (sum - of).abs();
                assert!(if at < rounded.0 { error <= of.abs() / 256.0 } else { error == 0.0 }, "{of} became {sum}");
            }
        }
    }

    #[test]
    fn what_was_sent_follows_what_was_given_however_small_the_parts() {
        let piece = 0..2;
        let mut left = LeftOver::new(Rounded(2), 2, 1);
        let (mut sent, mut read) = ([0f64; 2], [0f32; 2]);
        for _ in 0..1000 {
            // The second is lost by rounding alone: to 8 bits, 1 and a thousandth is 1.
            let wire = left.give(0, &piece, as_bytes(&[0.1, 1.001]));
            Rounded(2).read(&piece, Rope::whole(wire)).cursor().copy_to(&mut read);
            sent.iter_mut().zip(read).for_each(|(sent, read)| *sent += f64::from(read));
        }
        assert!((sent[0] - 100.0).abs() < 1e-3 && (sent[1] - 1001.0).abs() < 1e-2, "{sent:?}");
    }

    #[test]
    fn what_is_not_finite_stays_so_and_spoils_nothing_after_it() {
        let (piece, mut left) = (0..3, LeftOver::new(Rounded(3), 3, 1));
        let nan = f32::from_bits(0x7f80_0001);
        let mut sum = [nan, f32::INFINITY, f32::MAX];
        left.round(&piece, &mut sum);
        assert!(sum[0].is_nan() && sum[1] == f32::INFINITY && sum[2] == f32::INFINITY, "{sum:?}");
        let mut sum = [1.0; 3];
        left.round(&piece, &mut sum);
        assert_eq!(sum, [1.0; 3]);
        // Large and finite, and of a step that was left out.
        left.round(&piece, &mut [1.001e20; 3]);
        left.forget();
        let mut sum = [1.0; 3];
        left.round(&piece, &mut sum);
        assert_eq!(sum, [1.0; 3]);
    }
}
