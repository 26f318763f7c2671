//! Small dense networks on plain numbers, forwards and backwards: what policies are made of. Burn's tensors cost some microseconds an operation,
//! which is more than all arithmetic of a network of 64 units (`docs/rl.md` has the measurement).
//!
//! N1: a value is one chain of fused multiply-adds in the order of the depth: inputs for a layer, outputs for the gradient of its input, rows for
//! the gradient of its weights. So a row has the same bits whatever rows are beside it, on every instruction set.

use super::math::tanh;
use crate::lm::kernels::Isa;

/// Rows that are computed at once: their activations stay in the first two caches.
pub(crate) const BLOCK: usize = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    Tanh,
    Relu,
}

/// `x W + b`, the activation between layers and none after the last. In the flat vector each layer is its W [inputs, outputs], then its b.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mlp {
    layers: Vec<(usize, usize, usize)>,
    activation: Activation,
}

/// What a forward pass leaves for the backward pass, and memory for both.
#[derive(Debug, Clone, Default)]
pub(crate) struct Activations {
    /// After each layer, [rows, outputs]; the last is the network's output.
    layers: Vec<Vec<f32>>,
    /// Gradients of a layer's output and input.
    upper: Vec<f32>,
    lower: Vec<f32>,
    transposed: Vec<f32>,
}

impl Activations {
    pub fn output(&self) -> &[f32] {
        self.layers.last().map_or(&[], |layer| layer)
    }
}

impl Mlp {
    pub fn new(sizes: &[usize], activation: Activation, offset: usize) -> Self {
        let mut next = offset;
        let layer = |pair: &[usize]| {
            let at = next;
            next += pair[0] * pair[1] + pair[1];
            (at, pair[0], pair[1])
        };
        Self { layers: sizes.windows(2).map(layer).collect(), activation }
    }

    pub fn inputs(&self) -> usize {
        self.layers[0].1
    }

    pub fn outputs(&self) -> usize {
        self.layers[self.layers.len() - 1].2
    }

    /// Offset, inputs and outputs of each layer.
    pub fn layers(&self) -> &[(usize, usize, usize)] {
        &self.layers
    }

    /// Elements of the flat vector.
    pub fn len(&self) -> usize {
        self.layers.iter().map(|(_, inputs, outputs)| inputs * outputs + outputs).sum()
    }

    /// `input` is [rows, inputs].
    pub fn forward(&self, isa: Isa, weights: &[f32], input: &[f32], activations: &mut Activations) {
        let rows = input.len() / self.inputs();
        activations.layers.resize_with(self.layers.len(), Vec::new);
        let last = self.layers.len() - 1;
        for (index, &(at, inputs, outputs)) in self.layers.iter().enumerate() {
            let (before, here) = activations.layers.split_at_mut(index);
            let x = if index == 0 { input } else { &before[index - 1] };
            let y = &mut here[0];
            y.clear();
            let (w, b) = weights[at..at + inputs * outputs + outputs].split_at(inputs * outputs);
            (0..rows).for_each(|_| y.extend_from_slice(b));
            let activation = (index < last).then_some(self.activation);
            isa.run(
                #[inline(always)]
                || {
                    product(x, w, inputs, y);
                    match activation {
                        Some(Activation::Tanh) => y.iter_mut().for_each(|value| *value = tanh(*value)),
                        Some(Activation::Relu) => y.iter_mut().for_each(|value| *value = value.max(0.0)),
                        None => {}
                    }
                },
            );
        }
    }

    /// Adds the gradient of the weights to `gradient` (the whole flat vector), from the gradient of the output [rows, outputs] of the forward pass
    /// that `activations` is from.
    pub fn backward(
        &self,
        isa: Isa,
        weights: &[f32],
        (input, output): (&[f32], &[f32]),
        activations: &mut Activations,
        gradient: &mut [f32],
    ) {
        let Activations { layers, upper, lower, transposed } = activations;
        upper.clear();
        upper.extend_from_slice(output);
        for (index, &(at, inputs, outputs)) in self.layers.iter().enumerate().rev() {
            let x = if index == 0 { input } else { &layers[index - 1] };
            let (dw, db) = gradient[at..at + inputs * outputs + outputs].split_at_mut(inputs * outputs);
            let w = &weights[at..at + inputs * outputs];
            isa.run(
                #[inline(always)]
                || {
                    for row in upper.chunks_exact(outputs) {
                        db.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
                    }
                    if outputs < WIDE && inputs >= WIDE {
                        // Few outputs make no vectors: the transposed gradient has the same chains.
                        transpose(dw, outputs, transposed);
                        product_of_columns(upper, x, outputs, transposed);
                        let sums = std::mem::take(transposed);
                        transpose_into(&sums, inputs, dw);
                        *transposed = sums;
                    } else {
                        product_of_columns(x, upper, inputs, dw);
                    }
                    if index > 0 {
                        transpose(w, outputs, transposed);
                        lower.clear();
                        lower.resize(x.len(), 0.0);
                        product(upper, transposed, outputs, lower);
                        match self.activation {
                            Activation::Tanh => {
                                lower.iter_mut().zip(x).for_each(|(gradient, a)| *gradient *= 1.0 - a * a);
                            }
                            Activation::Relu => {
                                lower.iter_mut().zip(x).for_each(|(gradient, a)| {
                                    *gradient = if *a > 0.0 { *gradient } else { 0.0 };
                                });
                            }
                        }
                    }
                },
            );
            std::mem::swap(upper, lower);
        }
    }
}

/// Columns of a tile: two vectors of AVX2, one of AVX-512. With six rows it fills the registers.
const WIDE: usize = 16;

/// `out[m][n] += a[m][k] b[k][n]`: `a` is [rows, depth], `b` [depth, columns], `out` [rows, columns].
#[inline(always)]
fn product(a: &[f32], b: &[f32], depth: usize, out: &mut [f32]) {
    let columns = b.len() / depth;
    let rows = a.len() / depth;
    let mut row = 0;
    while row < rows {
        let (a, out) = (&a[row * depth..], &mut out[row * columns..]);
        row += match rows - row {
            6.. => tiles::<6>(a, b, depth, out),
            4.. => tiles::<4>(a, b, depth, out),
            2.. => tiles::<2>(a, b, depth, out),
            _ => tiles::<1>(a, b, depth, out),
        };
    }
}

#[inline(always)]
fn tiles<const ROWS: usize>(a: &[f32], b: &[f32], depth: usize, out: &mut [f32]) -> usize {
    let columns = b.len() / depth;
    let mut column = 0;
    while column < columns {
        column += match columns - column {
            WIDE.. => tile::<ROWS, WIDE>(a, b, (depth, column), out),
            4.. => tile::<ROWS, 4>(a, b, (depth, column), out),
            _ => tile::<ROWS, 1>(a, b, (depth, column), out),
        };
    }
    ROWS
}

#[inline(always)]
fn tile<const ROWS: usize, const COLUMNS: usize>(
    a: &[f32],
    b: &[f32],
    (depth, column): (usize, usize),
    out: &mut [f32],
) -> usize {
    let columns = b.len() / depth;
    let mut sums = [[0f32; COLUMNS]; ROWS];
    for (row, sums) in sums.iter_mut().enumerate() {
        sums.copy_from_slice(&out[row * columns + column..][..COLUMNS]);
    }
    let a: [&[f32]; ROWS] = std::array::from_fn(|row| &a[row * depth..][..depth]);
    for (k, b) in b.chunks_exact(columns).enumerate() {
        let b = b[column..].first_chunk::<COLUMNS>().expect("a tile is inside");
        for row in 0..ROWS {
            let value = a[row][k];
            for at in 0..COLUMNS {
                sums[row][at] = value.mul_add(b[at], sums[row][at]);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        out[row * columns + column..][..COLUMNS].copy_from_slice(sums);
    }
    COLUMNS
}

/// `out[m][n] += a[k][m] b[k][n]`: `a` is [depth, rows], `b` [depth, columns], `out` [rows, columns].
#[inline(always)]
fn product_of_columns(a: &[f32], b: &[f32], rows: usize, out: &mut [f32]) {
    let mut row = 0;
    while row < rows {
        row += match rows - row {
            6.. => column_tiles::<6>(a, b, (rows, row), out),
            4.. => column_tiles::<4>(a, b, (rows, row), out),
            2.. => column_tiles::<2>(a, b, (rows, row), out),
            _ => column_tiles::<1>(a, b, (rows, row), out),
        };
    }
}

#[inline(always)]
fn column_tiles<const ROWS: usize>(a: &[f32], b: &[f32], (rows, row): (usize, usize), out: &mut [f32]) -> usize {
    let columns = out.len() / rows;
    let mut column = 0;
    while column < columns {
        column += match columns - column {
            WIDE.. => column_tile::<ROWS, WIDE>(a, b, (rows, row), column, out),
            4.. => column_tile::<ROWS, 4>(a, b, (rows, row), column, out),
            _ => column_tile::<ROWS, 1>(a, b, (rows, row), column, out),
        };
    }
    ROWS
}

#[inline(always)]
fn column_tile<const ROWS: usize, const COLUMNS: usize>(
    a: &[f32],
    b: &[f32],
    (rows, row): (usize, usize),
    column: usize,
    out: &mut [f32],
) -> usize {
    let columns = out.len() / rows;
    let mut sums = [[0f32; COLUMNS]; ROWS];
    for (index, sums) in sums.iter_mut().enumerate() {
        sums.copy_from_slice(&out[(row + index) * columns + column..][..COLUMNS]);
    }
    for (a, b) in a.chunks_exact(rows).zip(b.chunks_exact(columns)) {
        let a = a[row..].first_chunk::<ROWS>().expect("a tile is inside");
        let b = b[column..].first_chunk::<COLUMNS>().expect("a tile is inside");
        for index in 0..ROWS {
            for at in 0..COLUMNS {
                sums[index][at] = a[index].mul_add(b[at], sums[index][at]);
            }
        }
    }
    for (index, sums) in sums.iter().enumerate() {
        out[(row + index) * columns + column..][..COLUMNS].copy_from_slice(sums);
    }
    COLUMNS
}

/// [rows, columns] to [columns, rows].
#[inline(always)]
fn transpose(values: &[f32], columns: usize, out: &mut Vec<f32>) {
    out.clear();
    out.resize(values.len(), 0.0);
    transpose_into(values, columns, out);
}

#[inline(always)]
fn transpose_into(values: &[f32], columns: usize, out: &mut [f32]) {
    let rows = values.len() / columns;
    for (row, values) in values.chunks_exact(columns).enumerate() {
        for (column, value) in values.iter().enumerate() {
            out[column * rows + row] = *value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rl::draws::{Draws, Stream};

    fn values(count: usize, step: u64) -> Vec<f32> {
        let mut draws = Draws::new(1, Stream::FirstWeights, [0, 0, step]);
        (0..count).map(|_| draws.normal() as f32 * 0.5).collect()
    }

    fn run(isa: Isa, mlp: &Mlp, rows: usize) -> (Vec<f32>, Vec<f32>) {
        let (weights, input) = (values(mlp.len(), 1), values(rows * mlp.inputs(), 2));
        let output = values(rows * mlp.outputs(), 3);
        let (mut activations, mut gradient) = (Activations::default(), vec![0.0; mlp.len()]);
        mlp.forward(isa, &weights, &input, &mut activations);
        let y = activations.output().to_vec();
        mlp.backward(isa, &weights, (&input, &output), &mut activations, &mut gradient);
        (y, gradient)
    }

    #[test]
    fn rows_have_the_same_bits_in_any_company_and_on_every_instruction_set() {
        let mlp = Mlp::new(&[5, 64, 23, 2], Activation::Tanh, 0);
        let plain = *Isa::available().last().expect("the plain one");
        let (whole, gradient) = run(plain, &mlp, 13);
        for isa in Isa::available() {
            assert!(run(isa, &mlp, 13) == (whole.clone(), gradient.clone()), "{isa:?}");
        }
        let (weights, input) = (values(mlp.len(), 1), values(13 * 5, 2));
        let mut activations = Activations::default();
        for (row, expected) in input.chunks(5).zip(whole.chunks(2)) {
            mlp.forward(Isa::best(), &weights, row, &mut activations);
            assert_eq!(activations.output(), expected);
        }
    }

    #[test]
    fn gradients_are_the_differences_of_the_loss() {
        for activation in [Activation::Tanh, Activation::Relu] {
            let mlp = Mlp::new(&[3, 18, 7, 2], activation, 0);
            let (_, gradient) = run(Isa::best(), &mlp, 9);
            let (input, output) = (values(9 * 3, 2), values(9 * 2, 3));
            let loss = |weights: &[f32]| {
                let mut activations = Activations::default();
                mlp.forward(Isa::best(), weights, &input, &mut activations);
                activations.output().iter().zip(&output).map(|(y, d)| f64::from(y * d)).sum::<f64>()
            };
            for at in (0..mlp.len()).step_by(7) {
                let mut weights = values(mlp.len(), 1);
                weights[at] += 1e-3;
                let above = loss(&weights);
                weights[at] -= 2e-3;
                let slope = (above - loss(&weights)) / 2e-3;
                // Differences in f32 are no better than this.
                assert!(
                    (slope - f64::from(gradient[at])).abs() < 5e-3,
                    "{activation:?} {at}: {slope} {}",
                    gradient[at]
                );
            }
        }
    }
}
