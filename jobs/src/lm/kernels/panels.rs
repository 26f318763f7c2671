//! Matrices of plain numbers, packed for many rows at a time: what an encoder multiplies with. Owns the packing and how the work is cut.
//!
//! K5: a value is one chain of fused multiply-adds, from its first value on in the order of the depth. So it has the same bits whatever rows,
//! columns and threads are beside it, and on every instruction set: how large the tiles are that a processor likes is of no account.

use rayon::prelude::*;

use super::activations::Rows;
use super::gelu::gelu;
use super::isa::{Isa, Set};
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{Plain, Simd};
use super::vector::LANES;

/// Columns of a panel: three vectors of [`LANES`]. Fewer in the last one.
const WIDTH: usize = 3 * LANES;
/// Rows that one task of a product takes: they stay in the second cache beside a panel.
const BLOCK: usize = 96;

/// A matrix of `depth` rows and `columns`, panel by panel: in each, row by row, whole vectors.
#[derive(Debug, Default)]
pub struct Panels {
    depth: usize,
    columns: usize,
    values: Vec<f32>,
}

/// Some rows, `stride` values from one to the next.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    pub values: &'a [f32],
    pub stride: usize,
    pub rows: usize,
}

/// Where products go: row by row, `stride` values from one to the next.
#[derive(Clone, Copy)]
pub struct Right {
    pub values: *mut f32,
    pub stride: usize,
}

// SAFETY: who writes through it has places of its own, which is the contract of the functions that take it.
unsafe impl Sync for Right {}
// SAFETY: as above.
unsafe impl Send for Right {}

impl Right {
    /// So many values on.
    ///
    /// # Safety
    /// Inside of what it writes to.
    pub unsafe fn at(self, values: usize) -> Self {
        // SAFETY: the caller's.
        Self { values: unsafe { self.values.add(values) }, stride: self.stride }
    }
}

impl Panels {
    /// Takes a matrix column by column.
    pub fn fill_columns<'a>(&mut self, depth: usize, columns: impl ExactSizeIterator<Item = &'a [f32]>) {
        self.clear(depth, columns.len());
        for (column, values) in columns.enumerate() {
            assert_eq!(values.len(), depth, "K2: a column of the matrix");
            let (at, lanes) = (column / WIDTH * WIDTH * depth + column % WIDTH, self.lanes(column / WIDTH));
            for (row, value) in values.iter().enumerate() {
                self.values[at + row * lanes] = *value;
            }
        }
    }

    /// Takes a matrix row by row.
    pub fn fill_rows<'a>(&mut self, columns: usize, rows: impl ExactSizeIterator<Item = &'a [f32]>) {
        let depth = rows.len();
        self.clear(depth, columns);
        for (row, values) in rows.enumerate() {
            assert_eq!(values.len(), columns, "K2: a row of the matrix");
            for (panel, values) in values.chunks(WIDTH).enumerate() {
                let at = panel * WIDTH * depth + row * self.lanes(panel);
                self.values[at..at + values.len()].copy_from_slice(values);
            }
        }
    }

    fn clear(&mut self, depth: usize, columns: usize) {
        (self.depth, self.columns) = (depth, columns);
        self.values.clear();
        self.values.resize(depth * columns.next_multiple_of(LANES), 0.0);
    }

    pub fn len(&self) -> usize {
        self.columns.div_ceil(WIDTH)
    }

    /// Columns of a panel, up to whole vectors.
    fn lanes(&self, panel: usize) -> usize {
        (self.columns.next_multiple_of(LANES) - panel * WIDTH).min(WIDTH)
    }

    /// `out[m][c] = first[c] + x[m] * column c`, for the columns of one panel. `first`: of all columns; none: zeros.
    ///
    /// # Safety
    /// `out` has a row of so many columns for each row of `x`, and nobody else reads or writes this panel's columns of them meanwhile.
    pub unsafe fn times(&self, isa: Isa, x: Left<'_>, panel: usize, first: Option<&[f32]>, out: Right) {
        let begin = panel * WIDTH;
        let lanes = self.lanes(panel);
        let read = x.rows.checked_sub(1).map_or(0, |last| last * x.stride + self.depth);
        assert!(x.values.len() >= read && out.stride >= self.columns, "K2: rows as deep as the matrix");
        assert!(first.is_none_or(|first| first.len() == self.columns), "K2: a first value for each column");
        let columns = (self.columns - begin).min(WIDTH);
        let mut start = [0.0; WIDTH];
        if let Some(first) = first {
            start[..columns].copy_from_slice(&first[begin..begin + columns]);
        }
        let panel = &self.values[begin * self.depth..][..lanes * self.depth];
        // SAFETY: inside, by the caller's contract.
        let out = unsafe { out.at(begin) };
        let work = Work { x, depth: self.depth, panel, start: &start, columns, out };
        match isa.set() {
            // SAFETY: an `Isa` is one that the processor has; ranges were just looked at, and `out` is the caller's.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { avx512(&work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { avx2(&work) },
            // SAFETY: as above.
            Set::Plain => unsafe { work.all::<Plain, 2>() },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512vnni,avx512bw,avx512dq")]
unsafe fn avx512(work: &Work<'_>) {
    // SAFETY: the caller's. 24 of 32 registers hold sums.
    unsafe { work.all::<Avx512, 8>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2(work: &Work<'_>) {
    // SAFETY: the caller's. 12 of 16 registers hold sums.
    unsafe { work.all::<Avx2, 2>() }
}

/// One panel times some rows.
struct Work<'a> {
    x: Left<'a>,
    depth: usize,
    panel: &'a [f32],
    start: &'a [f32; WIDTH],
    columns: usize,
    out: Right,
}

impl Work<'_> {
    /// In tiles of at most `MAX` rows, as equal as they can be: a tile of one row waits for its own sums.
    #[inline(always)]
    unsafe fn all<S: Simd, const MAX: usize>(&self) {
        // SAFETY: the caller's.
        unsafe {
            match self.columns.div_ceil(LANES) {
                0 | 1 => self.wide::<S, MAX, 1>(),
                2 => self.wide::<S, MAX, 2>(),
                _ => self.wide::<S, MAX, 3>(),
            }
        }
    }

    #[inline(always)]
    unsafe fn wide<S: Simd, const MAX: usize, const N: usize>(&self) {
        let tiles = self.x.rows.div_ceil(MAX);
        let mut from = 0;
        for tile in 1..=tiles {
            let to = self.x.rows * tile / tiles;
            // SAFETY: the caller's.
            unsafe {
                match to - from {
                    1 => self.tile::<S, 1, N>(from),
                    2 => self.tile::<S, 2, N>(from),
                    3 => self.tile::<S, 3, N>(from),
                    4 => self.tile::<S, 4, N>(from),
                    5 => self.tile::<S, 5, N>(from),
                    6 => self.tile::<S, 6, N>(from),
                    7 => self.tile::<S, 7, N>(from),
                    _ => self.tile::<S, 8, N>(from),
                }
            }
            from = to;
        }
    }

    /// `M` rows times `16 * N` columns, all sums in registers.
    #[inline(always)]
    unsafe fn tile<S: Simd, const M: usize, const N: usize>(&self, row: usize) {
        // SAFETY: the caller looked at the ranges; `row + M` is at most the number of rows.
        unsafe {
            let mut sums = [[S::zero(); N]; M];
            for sums in &mut sums {
                for (n, sum) in sums.iter_mut().enumerate() {
                    *sum = S::load(self.start.as_ptr().add(n * LANES));
                }
            }
            let x = self.x.values.as_ptr().add(row * self.x.stride);
            let mut panel = self.panel.as_ptr();
            for k in 0..self.depth {
                let mut columns = [S::zero(); N];
                for (n, column) in columns.iter_mut().enumerate() {
                    *column = S::load(panel.add(n * LANES));
                }
                for (m, sums) in sums.iter_mut().enumerate() {
                    let value = S::splat(*x.add(m * self.x.stride + k));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = S::fused(value, column, *sum);
                    }
                }
                panel = panel.add(N * LANES);
            }
            for (m, sums) in sums.iter().enumerate() {
                let out = self.out.values.add((row + m) * self.out.stride);
                for (n, sum) in sums.iter().enumerate() {
                    let (at, left) = (out.add(n * LANES), self.columns.saturating_sub(n * LANES));
                    if left >= LANES {
                        S::store(*sum, at);
                    } else {
                        let mut lanes = [0.0f32; LANES];
                        S::store(*sum, lanes.as_mut_ptr());
                        at.copy_from_nonoverlapping(lanes.as_ptr(), left);
                    }
                }
            }
        }
    }
}

/// A layer of weights and biases (PyTorch's `Linear`), packed.
#[derive(Debug)]
pub struct Dense {
    weights: Panels,
    bias: Vec<f32>,
}

/// What is done to the products at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Then {
    Nothing,
    Gelu,
}

impl Dense {
    /// `weights`: a row for each output, `inputs` wide, one behind the other.
    pub fn new(inputs: usize, weights: &[f32], bias: Vec<f32>) -> Self {
        assert_eq!(weights.len(), inputs * bias.len(), "K2: a bias for each row of weights");
        let mut packed = Panels::default();
        packed.fill_columns(inputs, weights.chunks_exact(inputs));
        Self { weights: packed, bias }
    }

    /// Values of a row that it makes.
    pub fn outputs(&self) -> usize {
        self.bias.len()
    }

    /// `out[m] = then(weights * x[m] + bias)`, over all threads.
    pub fn times(&self, isa: Isa, x: &Rows, then: Then, out: &mut Rows) {
        assert_eq!((x.width, out.width), (self.weights.depth, self.outputs()), "K2: shapes fit");
        out.resize(x.len());
        let (panels, stride) = (self.weights.len(), out.width);
        let to = Right { values: out.values.as_mut_ptr(), stride };
        (0..x.len().div_ceil(BLOCK) * panels).into_par_iter().for_each(|task| {
            let (from, panel) = (task / panels * BLOCK, task % panels);
            let rows = (x.len() - from).min(BLOCK);
            let left = Left { values: &x.values[from * x.width..], stride: x.width, rows };
            // SAFETY: `out` has as many rows, and these columns of these rows are this task's alone.
            let to = unsafe { to.at(from * stride) };
            // SAFETY: as above.
            unsafe { self.weights.times(isa, left, panel, Some(&self.bias), to) };
            if then == Then::Gelu {
                let columns = (self.outputs() - panel * WIDTH).min(WIDTH);
                for row in 0..rows {
                    // SAFETY: as above; nobody else refers to them.
                    let values =
                        unsafe { std::slice::from_raw_parts_mut(to.values.add(row * stride + panel * WIDTH), columns) };
                    gelu(isa, values);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, step: usize) -> Vec<f32> {
        (0..count).map(|at| ((at * step % 211) as f32 - 105.0) / 90.0).collect()
    }

    fn rows(count: usize, width: usize) -> Rows {
        let mut rows = Rows::new(width);
        rows.values = numbers(count * width, 97);
        rows
    }

    fn product(isa: Isa, x: &Rows, outputs: usize) -> Rows {
        let mut out = Rows::new(outputs);
        let dense = Dense::new(x.width, &numbers(outputs * x.width, 61), numbers(outputs, 37));
        dense.times(isa, x, Then::Nothing, &mut out);
        out
    }

    #[test]
    fn products_are_those_of_a_plain_sum_in_any_shape() {
        for (count, depth, outputs) in [(1, 1, 1), (5, 40, 16), (9, 33, 47), (100, 17, 49), (203, 8, 96), (3, 70, 83)] {
            let x = rows(count, depth);
            let out = product(Isa::best(), &x, outputs);
            let (weights, bias) = (numbers(outputs * depth, 61), numbers(outputs, 37));
            for m in 0..count {
                for (at, found) in out.row(m).iter().enumerate() {
                    let terms = x.row(m).iter().zip(&weights[at * depth..]);
                    let sum = terms.fold(bias[at], |sum, (x, weight)| x.mul_add(*weight, sum));
                    assert_eq!(found.to_bits(), sum.to_bits(), "{count} rows of {depth}, value {at} of {outputs}");
                }
            }
        }
    }

    #[test]
    fn a_matrix_is_the_same_by_rows_and_by_columns() {
        let (depth, columns) = (19, 67);
        let values = numbers(depth * columns, 53);
        let turned: Vec<f32> = (0..columns * depth).map(|at| values[at % depth * columns + at / depth]).collect();
        let (mut by_rows, mut by_columns) = (Panels::default(), Panels::default());
        by_rows.fill_rows(columns, values.chunks_exact(columns));
        by_columns.fill_columns(depth, turned.chunks_exact(depth));
        assert_eq!(by_rows.values, by_columns.values);
    }

    #[test]
    fn products_have_the_same_bits_alone_together_and_on_every_instruction_set() {
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let x = rows(13, 50);
        let whole = product(Isa::best(), &x, 70);
        for isa in Isa::available() {
            assert_eq!(bits(&product(isa, &x, 70).values), bits(&whole.values), "{isa:?}");
        }
        for m in 0..13 {
            let mut alone = Rows::new(50);
            alone.values = x.row(m).to_vec();
            assert_eq!(bits(product(Isa::best(), &alone, 70).row(0)), bits(whole.row(m)), "row {m}");
        }
    }
}
