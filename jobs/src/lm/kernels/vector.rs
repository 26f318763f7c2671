//! What is done to rows value by value, and the sums over a row. Sums have 16 lanes, value `i` in lane `i % 16`, added by halves at the end
//! (K1), so they have the same bits on every instruction set.

use super::isa::Isa;
use crate::lm::config::Rope;

pub const LANES: usize = 16;

/// `y += x`.
pub fn add(isa: Isa, y: &mut [f32], x: &[f32]) {
    isa.run(
        #[inline(always)]
        || {
            for (y, x) in y.iter_mut().zip(x) {
                *y += x;
            }
        },
    );
}

/// `out = x / sqrt(mean(x^2) + epsilon) * weight` (Zhang and Sennrich 2019, as in transformers' `LlamaRMSNorm`).
pub fn rms_norm(isa: Isa, x: &[f32], (weight, epsilon): (&[f32], f32), out: &mut [f32]) {
    isa.run(
        #[inline(always)]
        || {
            let scale = 1.0 / (dot(x, x) / x.len() as f32 + epsilon).sqrt();
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = x * scale * weight;
            }
        },
    );
}

/// `gate = silu(gate) * up`, where `silu(x) = x / (1 + exp(-x))`.
pub fn gate(isa: Isa, gate: &mut [f32], up: &[f32]) {
    isa.run(
        #[inline(always)]
        || {
            for (gate, up) in gate.iter_mut().zip(up) {
                *gate = *gate / (1.0 + exp(-*gate)) * up;
            }
        },
    );
}

#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (x, x_rest) = x.as_chunks::<LANES>();
    let (y, y_rest) = y.as_chunks::<LANES>();
    for (x, y) in x.iter().zip(y) {
        for lane in 0..LANES {
            lanes[lane] = x[lane].mul_add(y[lane], lanes[lane]);
        }
    }
    for (lane, (x, y)) in x_rest.iter().zip(y_rest).enumerate() {
        lanes[lane] = x.mul_add(*y, lanes[lane]);
    }
    by_halves(lanes)
}

#[inline(always)]
pub fn by_halves(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}

/// The sum of `of(at)` for all `at` below `count`, over lanes.
#[inline(always)]
pub fn sum_by_lanes(count: usize, of: impl Fn(usize) -> f32) -> f32 {
    let whole = count / LANES * LANES;
    let mut lanes = [0.0; LANES];
    for first in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += of(first + lane);
        }
    }
    for (lane, at) in (whole..count).enumerate() {
        lanes[lane] += of(at);
    }
    by_halves(lanes)
}

/// 1.5 * 2^23: a number of small size that is added to it is rounded to a whole one, ties to even, which then stands in the low bits.
pub const ROUNDS: f32 = 12_582_912.0;

/// e^x within 2 units in the last place (Cephes' `expf`: x = n ln 2 + r, a polynomial of r), 0 below -87.3 and the largest finite power above 88.3.
/// No branches, so that it is computed for many values at once.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts: the first has few bits, so that n times it is exact.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    const TERMS: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    // Not `clamp`: what is not a number stays so.
    let low = if x < -87.336_54 { -87.336_54 } else { x };
    let clamped = if low > 88.376_26 { 88.376_26 } else { low };
    let shifted = clamped.mul_add(LOG2_E, ROUNDS);
    let n = shifted - ROUNDS;
    let r = n.mul_add(-LN2[1], n.mul_add(-LN2[0], clamped));
    let mut sum = TERMS[0];
    for term in &TERMS[1..] {
        sum = sum.mul_add(r, *term);
    }
    let sum = (r * r).mul_add(sum, r + 1.0);
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUNDS.to_bits()).wrapping_add(127) << 23);
    if x < -87.336_54 { 0.0 } else { sum * power }
}

/// Rotary embedding (Su et al. 2021): angles of every position, as transformers computes them (`inv_freq = base^(-2i / size)`).
#[derive(Debug)]
pub struct Rotary {
    rope: Rope,
    half: usize,
    /// Of each position, the cosines and then the sines of its `half` angles.
    angles: Vec<f32>,
}

impl Rotary {
    pub fn new(rope: Rope, (head_size, base): (usize, f32), positions: usize) -> Self {
        let half = head_size / 2;
        let mut angles = Vec::with_capacity(positions * head_size);
        for position in 0..positions {
            let angle = |at: usize| position as f64 * f64::from(base).powf(-((2 * at) as f64) / head_size as f64);
            angles.extend((0..half).map(|at| angle(at).cos() as f32));
            angles.extend((0..half).map(|at| angle(at).sin() as f32));
        }
        Self { rope, half, angles }
    }

    /// Of a position, the cosines and then the sines.
    pub fn angles(&self, position: usize) -> &[f32] {
        &self.angles[2 * position * self.half..][..2 * self.half]
    }

    /// Turns one head, whose halves belong together, back again.
    pub fn turn_back(&self, isa: Isa, head: &mut [f32], position: usize) {
        let (cosines, sines) = self.angles(position).split_at(self.half);
        isa.run(
            #[inline(always)]
            || {
                let (first, second) = head.split_at_mut(self.half);
                for at in 0..self.half {
                    let (a, b) = (first[at], second[at]);
                    first[at] = a * cosines[at] + b * sines[at];
                    second[at] = b * cosines[at] - a * sines[at];
                }
            },
        );
    }

    /// Turns the heads in `values`, one behind the other, by the angles of `position`.
    pub fn turn(&self, isa: Isa, values: &mut [f32], position: usize) {
        let half = self.half;
        let (cosines, sines) = self.angles(position).split_at(half);
        isa.run(
            #[inline(always)]
            || match self.rope {
                Rope::Halves => {
                    for head in values.chunks_exact_mut(2 * half) {
                        let (first, second) = head.split_at_mut(half);
                        for at in 0..half {
                            let (a, b) = (first[at], second[at]);
                            first[at] = a * cosines[at] - b * sines[at];
                            second[at] = b * cosines[at] + a * sines[at];
                        }
                    }
                }
                Rope::Pairs => {
                    for head in values.chunks_exact_mut(2 * half) {
                        for (at, pair) in head.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                            let [a, b] = *pair;
                            *pair = [a * cosines[at] - b * sines[at], b * cosines[at] + a * sines[at]];
                        }
                    }
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_within_two_units_in_the_last_place() {
        for at in -87_000..88_000 {
            let x = at as f32 * 1e-3;
            let exact = f64::from(x).exp();
            let unit = f64::from(f32::EPSILON) * exact;
            assert!((f64::from(exp(x)) - exact).abs() <= 2.0 * unit, "e^{x}: {} and {exact}", exp(x));
        }
        assert_eq!((exp(0.0), exp(-100.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(exp(1000.0).is_finite() && exp(f32::NAN).is_nan());
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let x: Vec<f32> = (0..83).map(|at| ((at * 53 % 83) as f32 - 41.0) / 7.0).collect();
        let weight: Vec<f32> = (0..83).map(|at| 1.0 + at as f32 / 100.0).collect();
        let made = Isa::available().into_iter().map(|isa| {
            let (mut norm, mut gated, mut turned) = (vec![0.0; 83], x.clone(), x[..64].to_vec());
            rms_norm(isa, &x, (&weight, 1e-5), &mut norm);
            gate(isa, &mut gated, &weight);
            Rotary::new(Rope::Pairs, (16, 1e4), 9).turn(isa, &mut turned, 8);
            Rotary::new(Rope::Halves, (32, 1e5), 9).turn(isa, &mut turned, 7);
            [norm, gated, turned].concat().iter().map(|value| value.to_bits()).collect::<Vec<u32>>()
        });
        let made: Vec<Vec<u32>> = made.collect();
        assert!(made.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
