//! The loss of logits, with its gradient in the same pass: the exponentials are taken once.

use rayon::prelude::*;

use super::ROWS;
use crate::lm::kernels::{Isa, soften};

/// Sum of the losses of all rows, rows whose largest logit (the first of equal ones) is the target, and the gradient of the sum.
pub(super) fn forward(logits: &[f32], targets: &[u32], classes: usize) -> (f32, f32, Vec<f32>) {
    let isa = Isa::best();
    let mut gradient = logits.to_vec();
    let chunks = gradient.par_chunks_mut(ROWS * classes).zip(logits.par_chunks(ROWS * classes));
    let parts: Vec<(f64, u64)> = chunks
        .zip(targets.par_chunks(ROWS))
        .map(|((gradient, logits), targets)| {
            let mut part = (0.0, 0);
            let rows = gradient.chunks_exact_mut(classes).zip(logits.chunks_exact(classes));
            for ((gradient, logits), target) in rows.zip(targets) {
                let target = *target as usize;
                let (largest, sum) = isa.run(
                    #[inline(always)]
                    || {
                        let (largest, sum) = soften(gradient);
                        let factor = 1.0 / sum;
                        gradient.iter_mut().for_each(|value| *value *= factor);
                        (largest, sum)
                    },
                );
                gradient[target] -= 1.0;
                part.0 += f64::from(sum).ln() + f64::from(largest) - f64::from(logits[target]);
                part.1 += u64::from(logits.iter().position(|logit| *logit == largest) == Some(target));
            }
            part
        })
        .collect();
    let (loss, correct) = parts.iter().fold((0.0, 0), |(loss, correct), part| (loss + part.0, correct + part.1));
    (loss as f32, correct as f32, gradient)
}
