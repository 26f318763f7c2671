//! Matrices of weights times rows of activations, over all threads. Owns how the work is cut; a value is the same however it is cut (K1).
//!
//! K3 (`lm/tree.rs`): where a matrix can be split by its columns over ranks (`parts` more than one), each value is the sum of that many partial sums
//! in one binary tree, whoever computes them.

use std::ops::Range;

use rayon::prelude::*;

use super::activations::Rows;
use super::dot::{Operands, dots};
use super::isa::Isa;
use crate::lm::tree::halves;
use crate::lm::weights::Kind;

/// Rows of activations that a row of weights is multiplied with while it is in the cache.
const TILE: usize = 4;
/// Rows of weights that one thread takes at a time: fewer are not worth the wake-up.
const ROWS_MIN: usize = 16;

/// Weights as they lie in a file: `rows` of `columns` values, each row contiguous.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub kind: Kind,
    pub rows: usize,
    pub columns: usize,
    pub bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    pub fn row(&self, row: usize) -> &'a [u8] {
        let bytes = self.kind.row_bytes(self.columns);
        &self.bytes[row * bytes..(row + 1) * bytes]
    }

    /// So many of its rows.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        let bytes = self.kind.row_bytes(self.columns);
        Self { rows: rows.len(), bytes: &self.bytes[rows.start * bytes..rows.end * bytes], ..*self }
    }

    /// `out[m][r]` = row `r` of the weights times row `m` of `x`, for all of them. Weights in blocks are multiplied with the
    /// rounded `x` where it was rounded. The columns are cut into `parts`.
    pub fn times(&self, isa: Isa, x: &Rows, parts: usize, out: &mut Rows) {
        assert_eq!(x.width, self.columns, "K2: shapes fit");
        let cuts: Vec<Range<usize>> = (0..parts).map(|part| self.part(part, parts)).collect();
        self.columns_times(isa, x, (0, &cuts), out);
    }

    /// The same over some columns, the sum over `cuts` in their tree: `x` has values for the columns from `first` on, at which a block begins.
    pub fn columns_times(&self, isa: Isa, x: &Rows, (first, cuts): (usize, &[Range<usize>]), out: &mut Rows) {
        assert_eq!(out.width, self.rows, "K2: shapes fit");
        assert!(cuts.iter().all(|cut| first <= cut.start && cut.end <= first + x.width), "K2: columns of the share");
        out.resize(x.len());
        let cuts: Vec<Range<usize>> = cuts.iter().map(|cut| cut.start - first..cut.end - first).collect();
        let skipped = self.kind.row_bytes(first);
        let whole = x.len() / TILE * TILE;
        let tiles: Vec<Tile<'_, TILE>> = (0..whole).step_by(TILE).map(|first| Tile::new(x, first, &cuts)).collect();
        let ones: Vec<Tile<'_, 1>> = (whole..x.len()).map(|first| Tile::new(x, first, &cuts)).collect();
        let to = Out { values: out.values.as_mut_ptr(), width: self.rows };
        let each = self.rows.div_ceil(rayon::current_num_threads()).max(ROWS_MIN);
        (0..self.rows.div_ceil(each)).into_par_iter().for_each(|share| {
            for row in share * each..((share + 1) * each).min(self.rows) {
                let weights = &self.row(row)[skipped..];
                for tile in &tiles {
                    let made = tree(isa, self.kind, weights, &tile.parts);
                    for (m, value) in (tile.first..).zip(made) {
                        // SAFETY: each value of `out` belongs to one row of weights, which one thread has.
                        unsafe { to.set(m, row, value) };
                    }
                }
                for one in &ones {
                    let [value] = tree(isa, self.kind, weights, &one.parts);
                    // SAFETY: as above.
                    unsafe { to.set(one.first, row, value) };
                }
            }
        });
    }

    /// The columns of a part: whole blocks, as equal as they can be, the first ones larger.
    pub fn part(&self, part: usize, parts: usize) -> Range<usize> {
        let unit = self.kind.block_values();
        let (each, extra) = (self.columns / unit / parts, self.columns / unit % parts);
        let start = |part: usize| (part * each + part.min(extra)) * unit;
        start(part)..if part + 1 == parts { self.columns } else { start(part + 1) }
    }
}

/// Some rows of activations, cut into parts.
struct Tile<'a, const M: usize> {
    first: usize,
    parts: Vec<Operands<'a, M>>,
}

impl<'a, const M: usize> Tile<'a, M> {
    fn new(x: &'a Rows, first: usize, cuts: &[Range<usize>]) -> Self {
        let plain: [&[f32]; M] = std::array::from_fn(|at| x.row(first + at));
        let rounded: [_; M] = std::array::from_fn(|at| x.quantised(first + at));
        let quantised = rounded[0].map(|one| rounded.map(|other| other.unwrap_or(one)));
        let parts = cuts.iter().map(|values| Operands { plain, quantised, values: values.clone() });
        Self { first, parts: parts.collect() }
    }
}

/// K3.
fn tree<const M: usize>(isa: Isa, kind: Kind, weights: &[u8], parts: &[Operands<'_, M>]) -> [f32; M] {
    if let [operands] = parts {
        return dots(isa, kind, weights, operands);
    }
    let (left, right) = parts.split_at(halves(&(0..parts.len())).0.end);
    let (left, right) = (tree::<M>(isa, kind, weights, left), tree::<M>(isa, kind, weights, right));
    std::array::from_fn(|at| left[at] + right[at])
}

/// Where threads put their values: each to places of its own.
#[derive(Clone, Copy)]
struct Out {
    values: *mut f32,
    width: usize,
}

// SAFETY: two threads never write the same place, and nobody reads before all are done.
unsafe impl Sync for Out {}
// SAFETY: as above.
unsafe impl Send for Out {}

impl Out {
    /// # Safety
    /// The place is inside, and no other thread writes it.
    unsafe fn set(&self, m: usize, row: usize, value: f32) {
        // SAFETY: the caller's.
        unsafe { self.values.add(m * self.width + row).write(value) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lm::tree::{owned, root, subtrees};

    /// Bytes of a row of a kind, whose scales are ordinary numbers.
    fn weights(kind: Kind, rows: usize, columns: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..rows * kind.row_bytes(columns)).map(|at| (at * 151 % 251) as u8).collect();
        let half = |at: usize| 0x2c00u16 + (at * 37 % 512) as u16;
        for (at, block) in bytes.chunks_exact_mut(kind.block_bytes()).enumerate() {
            match kind {
                Kind::F32 => block.copy_from_slice(&((at * 29 % 101) as f32 / 64.0 - 0.7).to_le_bytes()),
                Kind::F16 | Kind::Bf16 => block.copy_from_slice(&(half(at) ^ ((at as u16 & 1) << 15)).to_le_bytes()),
                Kind::Q8_0 | Kind::Q4_0 => block[..2].copy_from_slice(&half(at).to_le_bytes()),
                Kind::Q4_1 => {
                    block[..2].copy_from_slice(&half(at).to_le_bytes());
                    block[2..4].copy_from_slice(&(0x8000 | half(at + 3)).to_le_bytes());
                }
            }
        }
        bytes
    }

    fn activations(rows: usize, width: usize) -> Rows {
        let mut x = Rows::new(width);
        x.values = (0..rows * width).map(|at| ((at * 97 % 211) as f32 - 105.0) / 50.0).collect();
        x.quantise(Isa::best());
        x
    }

    fn product(kind: Kind, isa: Isa, x: &Rows, parts: usize) -> Rows {
        let bytes = weights(kind, 37, x.width);
        let mut out = Rows::new(37);
        Matrix { kind, rows: 37, columns: x.width, bytes: &bytes }.times(isa, x, parts, &mut out);
        out
    }

    #[test]
    fn products_are_those_of_the_dequantised_weights_and_rounded_activations() {
        for kind in Kind::ALL {
            let x = activations(6, 192);
            let out = product(kind, Isa::best(), &x, 1);
            let mut values = vec![0.0; 37 * 192];
            kind.dequantise(&weights(kind, 37, 192), &mut values);
            for m in 0..6 {
                let rounded = x.quantised(m).unwrap();
                let as_used = |at: usize| match kind.block_values() {
                    1 => f64::from(x.row(m)[at]),
                    _ => f64::from(rounded.values[at]) * f64::from(rounded.scales[at / 32][0]),
                };
                for (row, found) in out.row(m).iter().enumerate() {
                    let terms = (0..192).map(|at| f64::from(values[row * 192 + at]) * as_used(at));
                    let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term: f64| (sum + term, size + term.abs()));
                    let error = (f64::from(*found) - sum).abs();
                    assert!(error <= size * 1e-6, "{kind:?} {m} {row}: {found} is not {sum}");
                }
            }
        }
    }

    #[test]
    fn shares_of_the_columns_add_up_to_the_bits_of_the_whole() {
        for (kind, parts) in Kind::ALL.into_iter().flat_map(|kind| [2, 3, 5].map(|parts| (kind, parts))) {
            let x = activations(5, 192);
            let bytes = weights(kind, 37, 192);
            let matrix = Matrix { kind, rows: 37, columns: 192, bytes: &bytes };
            for shares in 1..=parts {
                let mut partials: Vec<Vec<Rows>> = (0..shares)
                    .map(|share| {
                        let owned = owned(parts, share, shares);
                        let (from, to) = (matrix.part(owned.start, parts).start, matrix.part(owned.end - 1, parts).end);
                        let mut own = Rows::new(to - from);
                        (0..5).for_each(|row| own.values.extend_from_slice(&x.row(row)[from..to]));
                        own.quantise(Isa::best());
                        let made = subtrees(parts, &owned).into_iter().map(|node| {
                            let cuts: Vec<_> = node.map(|part| matrix.part(part, parts)).collect();
                            let mut out = Rows::new(37);
                            matrix.columns_times(Isa::best(), &own, (from, &cuts), &mut out);
                            out
                        });
                        made.collect()
                    })
                    .collect();
                root(parts, &mut partials).unwrap();
                let whole = product(kind, Isa::best(), &x, parts);
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&partials[0][0].values), bits(&whole.values), "{kind:?}, {parts} over {shares}");
            }
        }
    }

    #[test]
    fn products_have_the_same_bits_alone_together_and_on_every_instruction_set() {
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        for (kind, parts) in Kind::ALL.into_iter().flat_map(|kind| [1, 3].map(|parts| (kind, parts))) {
            let x = activations(7, 160);
            let whole = product(kind, Isa::best(), &x, parts);
            for isa in Isa::available() {
                assert_eq!(bits(&product(kind, isa, &x, parts).values), bits(&whole.values), "{kind:?} {isa:?}");
            }
            for m in 0..7 {
                let mut alone = Rows::new(160);
                alone.values = x.row(m).to_vec();
                alone.quantise(Isa::best());
                let made = product(kind, Isa::best(), &alone, parts);
                assert_eq!(bits(made.row(0)), bits(whole.row(m)), "{kind:?} row {m}");
            }
        }
    }
}
