//! The gate of a feed-forward network.

use rayon::prelude::*;

use super::ROWS;
use crate::lm::kernels::{Isa, exp};

pub(super) fn forward(x: &[f32], width: usize) -> Vec<f32> {
    let isa = Isa::best();
    let mut out = vec![0.0; x.len() / 2];
    out.par_chunks_mut(ROWS * width).zip(x.par_chunks(2 * ROWS * width)).for_each(|(out, x)| {
        isa.run(
            #[inline(always)]
            || {
                for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(2 * width)) {
                    let (gate, up) = x.split_at(width);
                    for at in 0..width {
                        out[at] = gate[at] * sigmoid(gate[at]) * up[at];
                    }
                }
            },
        );
    });
    out
}

pub(super) fn backward(x: &[f32], gradient: &[f32], width: usize) -> Vec<f32> {
    let isa = Isa::best();
    let mut dx = vec![0.0; x.len()];
    let chunks = dx.par_chunks_mut(2 * ROWS * width).zip(x.par_chunks(2 * ROWS * width));
    chunks.zip(gradient.par_chunks(ROWS * width)).for_each(|((dx, x), gradient)| {
        isa.run(
            #[inline(always)]
            || {
                let rows = dx.chunks_exact_mut(2 * width).zip(x.chunks_exact(2 * width));
                for ((dx, x), gradient) in rows.zip(gradient.chunks_exact(width)) {
                    let ((gate, up), (dgate, dup)) = (x.split_at(width), dx.split_at_mut(width));
                    for at in 0..width {
                        let open = sigmoid(gate[at]);
                        let slope = open * (1.0 - open).mul_add(gate[at], 1.0);
                        dgate[at] = gradient[at] * up[at] * slope;
                        dup[at] = gradient[at] * gate[at] * open;
                    }
                }
            },
        );
    });
    dx
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}
