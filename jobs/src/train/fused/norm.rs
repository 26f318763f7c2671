//! The norm of rows by their root mean square.

use rayon::prelude::*;

use super::ROWS;
use crate::lm::kernels::{Isa, sum_by_lanes};

pub(super) fn forward(x: &[f32], scale: &[f32], epsilon: f32) -> Vec<f32> {
    let (width, isa) = (scale.len(), Isa::best());
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).for_each(|(out, x)| {
        isa.run(
            #[inline(always)]
            || {
                for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    let factor = inverse(x, epsilon);
                    for at in 0..width {
                        out[at] = x[at] * factor * scale[at];
                    }
                }
            },
        );
    });
    out
}

/// Gradients of `x` and of `scale`.
pub(super) fn backward(x: &[f32], scale: &[f32], epsilon: f32, gradient: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (width, isa) = (scale.len(), Isa::best());
    let mut dx = vec![0.0; x.len()];
    let chunks = dx.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).zip(gradient.par_chunks(ROWS * width));
    let parts: Vec<Vec<f32>> = chunks
        .map(|((dx, x), gradient)| {
            let mut dscale = vec![0.0; width];
            isa.run(
                #[inline(always)]
                || {
                    let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width));
                    for ((dx, x), gradient) in rows.zip(gradient.chunks_exact(width)) {
                        let factor = inverse(x, epsilon);
                        let along = sum_by_lanes(width, |at| gradient[at] * scale[at] * x[at]);
                        let back = along * factor * factor * factor / width as f32;
                        for at in 0..width {
                            dx[at] = (gradient[at] * scale[at]).mul_add(factor, -x[at] * back);
                            dscale[at] = (gradient[at] * x[at]).mul_add(factor, dscale[at]);
                        }
                    }
                },
            );
            dscale
        })
        .collect();
    let mut dscale = vec![0.0; width];
    for part in parts {
        dscale.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    (dx, dscale)
}

#[inline(always)]
fn inverse(x: &[f32], epsilon: f32) -> f32 {
    let squares = sum_by_lanes(x.len(), |at| x[at] * x[at]);
    1.0 / (squares / x.len() as f32 + epsilon).sqrt()
}
