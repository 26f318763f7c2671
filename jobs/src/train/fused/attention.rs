//! Causal attention over whole texts. Scores are never kept: the way back computes them again from the sums (Dao et al. 2022), a block of queries at a time.

use rayon::prelude::*;

use super::Heads;
use super::product::{Matrix, multiply};
use crate::lm::kernels::{Isa, exp, soften, sum_by_lanes};

/// Queries of one block: its scores with all keys stay in the cache.
const BLOCK: usize = 64;

impl Heads {
    /// Turned copies of one head of a text, [length, size].
    fn turned(&self, isa: Isa, x: &[f32], head: usize, factor: f32, out: &mut [f32]) {
        for (position, (out, row)) in out.chunks_exact_mut(self.size).zip(x.chunks_exact(self.width())).enumerate() {
            out.copy_from_slice(&row[head * self.size..][..self.size]);
            self.rotary.turn(isa, out, position);
            if factor != 1.0 {
                out.iter_mut().for_each(|value| *value *= factor);
            }
        }
    }

    /// The other way round, into one head of a text.
    fn turned_back(&self, isa: Isa, from: &mut [f32], factor: f32, (x, head): (&mut [f32], usize)) {
        let rows = x.chunks_exact_mut(self.width());
        for (position, (from, row)) in from.chunks_exact_mut(self.size).zip(rows).enumerate() {
            self.rotary.turn_back(isa, from, position);
            let row = &mut row[head * self.size..][..self.size];
            row.iter_mut().zip(from).for_each(|(row, value)| *row = *value * factor);
        }
    }

    /// Queries that share these keys and values.
    fn sharing(&self, kv_head: usize) -> std::ops::Range<usize> {
        let shared = self.heads / self.kv_heads;
        kv_head * shared..(kv_head + 1) * shared
    }
}

/// Ranges of queries, each with the keys that it may look at.
fn blocks(length: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..length).step_by(BLOCK).map(move |first| (first, (first + BLOCK).min(length)))
}

/// The result [rows, heads * size], and ln of the sum of e^score of each row and head.
pub(super) fn forward(x: &[f32], heads: &Heads) -> (Vec<f32>, Vec<f32>) {
    let (length, size, width) = (heads.length, heads.size, heads.heads * heads.size);
    let rows = x.len() / heads.width();
    let (mut out, mut sums) = (vec![0.0; rows * width], vec![0.0; rows * heads.heads]);
    let texts = out.par_chunks_mut(length * width).zip(sums.par_chunks_mut(length * heads.heads));
    texts.zip(x.par_chunks(length * heads.width())).for_each(|((out, sums), x)| {
        let isa = Isa::best();
        let mut keys = vec![0.0; length * size];
        let mut queries = vec![0.0; length * size];
        let mut scores = vec![0.0; BLOCK * length];
        for kv_head in 0..heads.kv_heads {
            heads.turned(isa, x, heads.heads + kv_head, 1.0, &mut keys);
            let values = &x[(heads.heads + heads.kv_heads + kv_head) * size..];
            for head in heads.sharing(kv_head) {
                heads.turned(isa, x, head, heads.scale(), &mut queries);
                for (first, end) in blocks(length) {
                    let block = end - first;
                    let queries = Matrix::rows(&queries[first * size..], size);
                    let transposed = Matrix::rows(&keys, size).transposed();
                    multiply((&mut scores, end, false), queries, transposed, (block, size, end));
                    for (row, scores) in scores.chunks_exact_mut(end).take(block).enumerate() {
                        let (seen, unseen) = scores.split_at_mut(first + row + 1);
                        let sum = isa.run(
                            #[inline(always)]
                            || {
                                let (largest, sum) = soften(seen);
                                let factor = 1.0 / sum;
                                seen.iter_mut().for_each(|value| *value *= factor);
                                largest + sum.ln()
                            },
                        );
                        unseen.fill(0.0);
                        sums[(first + row) * heads.heads + head] = sum;
                    }
                    let out = &mut out[first * width + head * size..];
                    let weights = Matrix::rows(&scores, end);
                    multiply((out, width, false), weights, Matrix::rows(values, heads.width()), (block, end, size));
                }
            }
        }
    });
    (out, sums)
}

/// The gradient of `x` from that of the result.
pub(super) fn backward(x: &[f32], (out, sums): (&[f32], &[f32]), heads: &Heads, gradient: &[f32]) -> Vec<f32> {
    let (length, size, width) = (heads.length, heads.size, heads.heads * heads.size);
    let mut dx = vec![0.0; x.len()];
    let texts = dx.par_chunks_mut(length * heads.width()).zip(x.par_chunks(length * heads.width()));
    let results = out.par_chunks(length * width).zip(sums.par_chunks(length * heads.heads));
    texts.zip(results).zip(gradient.par_chunks(length * width)).for_each(|(((dx, x), (out, sums)), gradient)| {
        let isa = Isa::best();
        let part = || vec![0.0; length * size];
        let (mut keys, mut queries, mut dkeys, mut dvalues, mut dqueries) = (part(), part(), part(), part(), part());
        let (mut weights, mut dscores) = (vec![0.0; BLOCK * length], vec![0.0; BLOCK * length]);
        for kv_head in 0..heads.kv_heads {
            heads.turned(isa, x, heads.heads + kv_head, 1.0, &mut keys);
            let values = Matrix::rows(&x[(heads.heads + heads.kv_heads + kv_head) * size..], heads.width());
            dkeys.fill(0.0);
            dvalues.fill(0.0);
            for head in heads.sharing(kv_head) {
                heads.turned(isa, x, head, heads.scale(), &mut queries);
                for (first, end) in blocks(length) {
                    let block = end - first;
                    let queries = Matrix::rows(&queries[first * size..], size);
                    let all_keys = Matrix::rows(&keys, size);
                    multiply((&mut weights, end, false), queries, all_keys.transposed(), (block, size, end));
                    let given = Matrix::rows(&gradient[first * width + head * size..], width);
                    multiply((&mut dscores, end, false), given, values.transposed(), (block, size, end));
                    for row in 0..block {
                        let at = first + row;
                        let of = |of: &'_ [f32], column: usize| of[at * width + head * size + column];
                        let (seen, sum) = (at + 1, sums[at * heads.heads + head]);
                        let (weights, dscores) = (&mut weights[row * end..][..end], &mut dscores[row * end..][..end]);
                        isa.run(
                            #[inline(always)]
                            || {
                                let mean = sum_by_lanes(size, |column| of(out, column) * of(gradient, column));
                                for key in 0..seen {
                                    weights[key] = exp(weights[key] - sum);
                                    dscores[key] = weights[key] * (dscores[key] - mean);
                                }
                            },
                        );
                        weights[seen..].fill(0.0);
                        dscores[seen..].fill(0.0);
                    }
                    let (weights, dscores) = (Matrix::rows(&weights, end), Matrix::rows(&dscores, end));
                    multiply((&mut dvalues, size, true), weights.transposed(), given, (end, block, size));
                    multiply((&mut dkeys, size, true), dscores.transposed(), queries, (end, block, size));
                    let dqueries = &mut dqueries[first * size..];
                    multiply((dqueries, size, false), dscores, all_keys, (block, end, size));
                }
                heads.turned_back(isa, &mut dqueries, heads.scale(), (dx, head));
            }
            heads.turned_back(isa, &mut dkeys, 1.0, (dx, heads.heads + kv_head));
            let rows = dx.chunks_exact_mut(heads.width());
            for (row, dvalues) in rows.zip(dvalues.chunks_exact(size)) {
                row[(heads.heads + heads.kv_heads + kv_head) * size..][..size].copy_from_slice(dvalues);
            }
        }
    });
    dx
}
