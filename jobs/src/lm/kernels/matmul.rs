//! Matrices of weights times rows of activations, over all threads. Owns how the work is cut; a value is the same however it is cut (K1).
//!
//! K3 (`lm/tree.rs`): where a matrix can be split by its columns over ranks (`parts` more than one), each value is the sum of that many partial sums
//! in one binary tree, whoever computes them.

use std::ops::Range;

use rayon::prelude::*;

use super::activations::Rows;
use super::dot::{Operands, dots};
use super::isa::{Isa, Set};
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{Plain, Simd};
use crate::lm::weights::Kind;

/// Rows of activations that a row of weights is multiplied with while it is in the cache.
const TILE: usize = 4;
/// Rows of weights that one thread takes at a time: fewer are not worth the wake-up.
const ROWS_MIN: usize = 16;
/// Sums that wait for the one beside them: of up to 2^23 parts, more than there are heads.
const DEPTH_MAX: usize = 24;

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
        let whole = x.len() / TILE * TILE;
        let work = Work {
            matrix: *self,
            skipped: self.kind.row_bytes(first),
            tiles: (0..whole).step_by(TILE).map(|first| Tile::new(x, first, &cuts)).collect(),
            ones: (whole..x.len()).map(|first| Tile::new(x, first, &cuts)).collect(),
            to: Out { values: out.values.as_mut_ptr(), width: self.rows },
        };
        work.check();
        let each = self.rows.div_ceil(rayon::current_num_threads()).max(ROWS_MIN);
        (0..self.rows.div_ceil(each)).into_par_iter().for_each(|share| {
            let rows = share * each..((share + 1) * each).min(self.rows);
            // SAFETY: they were looked at above; each value of `out` belongs to one row of weights, which one thread has.
            unsafe { work.compute(isa, rows) };
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

/// A product: what threads share of it.
struct Work<'a> {
    matrix: Matrix<'a>,
    /// Bytes of a row before the columns that are meant.
    skipped: usize,
    tiles: Vec<Tile<'a, TILE>>,
    ones: Vec<Tile<'a, 1>>,
    to: Out,
}

impl Work<'_> {
    /// What [`dots`] takes on trust.
    fn check(&self) {
        let Matrix { kind, rows, columns, bytes } = self.matrix;
        assert_eq!(bytes.len(), rows * kind.row_bytes(columns), "K2: bytes of the matrix");
        let left = kind.row_bytes(columns) - self.skipped;
        self.tiles.iter().flat_map(|tile| &tile.parts).for_each(|operands| operands.check(kind, left));
        self.ones.iter().flat_map(|one| &one.parts).for_each(|operands| operands.check(kind, left));
    }

    /// # Safety
    /// [`Work::check`] has held, and no other thread has one of these rows.
    unsafe fn compute(&self, isa: Isa, rows: Range<usize>) {
        match isa.set() {
            // SAFETY: an `Isa` is one that the processor has; the rest is the caller's.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { self.avx512(rows) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { self.avx2(rows) },
            // SAFETY: the caller's.
            Set::Plain => unsafe { self.with::<Plain>(rows) },
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512vnni,avx512bw,avx512dq")]
    unsafe fn avx512(&self, rows: Range<usize>) {
        // SAFETY: the caller's.
        unsafe { self.with::<Avx512>(rows) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2(&self, rows: Range<usize>) {
        // SAFETY: the caller's.
        unsafe { self.with::<Avx2>(rows) }
    }

    #[inline(always)]
    unsafe fn with<S: Simd>(&self, rows: Range<usize>) {
        for row in rows {
            let weights = &self.matrix.row(row)[self.skipped..];
            // SAFETY: the caller's.
            unsafe {
                for tile in &self.tiles {
                    let made = tree::<S, TILE>(self.matrix.kind, weights, &tile.parts);
                    for (m, value) in (tile.first..).zip(made) {
                        self.to.set(m, row, value);
                    }
                }
                for one in &self.ones {
                    let [value] = tree::<S, 1>(self.matrix.kind, weights, &one.parts);
                    self.to.set(one.first, row, value);
                }
            }
        }
    }
}

/// K3: the sum over the parts, of which there is one at least. Sums of a power of two of neighbours come together as soon as both are there, and the
/// rest from right to left: that is the tree, without recursion, which would not be inlined.
#[inline(always)]
unsafe fn tree<S: Simd, const M: usize>(kind: Kind, weights: &[u8], parts: &[Operands<'_, M>]) -> [f32; M] {
    let mut sums = [[0.0; M]; DEPTH_MAX];
    let mut depth = 0;
    for (at, operands) in parts.iter().enumerate() {
        // SAFETY: the caller's.
        let mut sum = unsafe { dots::<S, M>(kind, weights, operands) };
        let together = if at + 1 == parts.len() { depth } else { at.trailing_ones() as usize };
        for _ in 0..together {
            depth -= 1;
            for m in 0..M {
                sum[m] += sums[depth][m];
            }
        }
        sums[depth] = sum;
        depth += 1;
    }
    sums[0]
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
