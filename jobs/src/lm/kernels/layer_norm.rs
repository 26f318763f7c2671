//! Layer normalisation after a sum, as BERT has it (Ba, Kiros and Hinton 2016; PyTorch's `LayerNorm`). A row is one thread's alone (K1).

use rayon::prelude::*;

use super::activations::Rows;
use super::isa::Isa;
use super::vector::{LANES, by_halves};

/// Rows that a thread takes at least: fewer are not worth the wake-up.
const ROWS_MIN: usize = 16;

/// Weight and bias of a norm, and what is added to the variance.
#[derive(Debug)]
pub struct LayerNorm {
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
    pub epsilon: f32,
}

impl LayerNorm {
    /// `x = (s - mean(s)) / sqrt(variance(s) + epsilon) * weight + bias` of the sum `s = x + y`, row by row.
    pub fn add(&self, isa: Isa, x: &mut Rows, y: &Rows) {
        assert_eq!((x.width, x.values.len()), (self.weight.len(), y.values.len()), "K2: shapes fit");
        let rows = x.values.par_chunks_exact_mut(x.width).zip(y.values.par_chunks_exact(x.width));
        rows.with_min_len(ROWS_MIN).for_each(|(x, y)| {
            isa.run(
                #[inline(always)]
                || self.one(x, y),
            );
        });
    }

    #[inline(always)]
    fn one(&self, x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
        let mean = sum(
            x,
            #[inline(always)]
            |value| value,
        ) / x.len() as f32;
        let variance = sum(
            x,
            #[inline(always)]
            |value| (value - mean) * (value - mean),
        ) / x.len() as f32;
        let inverse = 1.0 / (variance + self.epsilon).sqrt();
        for ((x, weight), bias) in x.iter_mut().zip(&self.weight).zip(&self.bias) {
            *x = ((*x - mean) * inverse).mul_add(*weight, *bias);
        }
    }
}

/// Of what is made of each value: 16 lanes, added by halves.
#[inline(always)]
fn sum(x: &[f32], of: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for values in whole {
        for lane in 0..LANES {
            lanes[lane] += of(values[lane]);
        }
    }
    for (lane, value) in rest.iter().enumerate() {
        lanes[lane] += of(*value);
    }
    by_halves(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_are_those_of_their_formula_on_every_instruction_set() {
        let width = 83;
        let value = |at: usize| ((at * 53 % 97) as f32 - 30.0) / 7.0;
        let norm = LayerNorm {
            weight: (0..width).map(|at| 1.0 + at as f32 / 100.0).collect(),
            bias: (0..width).map(|at| 0.5 - at as f32 / 90.0).collect(),
            epsilon: 1e-5,
        };
        let (x, y): (Vec<f32>, Vec<f32>) = (0..3 * width).map(|at| (value(at), value(at * 7 + 3))).unzip();
        let made = Isa::available().into_iter().map(|isa| {
            let [mut sums, mut added] = [(); 2].map(|()| Rows::new(width));
            (sums.values, added.values) = (x.clone(), y.clone());
            norm.add(isa, &mut sums, &added);
            sums.values
        });
        let made: Vec<Vec<f32>> = made.collect();
        for row in 0..3 {
            let sums: Vec<f64> =
                (row * width..(row + 1) * width).map(|at| f64::from(x[at]) + f64::from(y[at])).collect();
            let mean = sums.iter().sum::<f64>() / width as f64;
            let variance = sums.iter().map(|sum| (sum - mean).powi(2)).sum::<f64>() / width as f64;
            for (at, sum) in sums.iter().enumerate() {
                let scaled = (sum - mean) / (variance + 1e-5).sqrt();
                let expected = scaled * f64::from(norm.weight[at]) + f64::from(norm.bias[at]);
                let found = made[0][row * width + at];
                assert!((f64::from(found) - expected).abs() < 2e-6, "row {row} value {at}: {found} and {expected}");
            }
        }
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert!(made.iter().all(|other| bits(other) == bits(&made[0])));
    }
}
