//! Dot products of one row of weights, as it lies in its file, with rows of activations. Owns the loop over a row of each kind; the lanes are
//! `simd.rs`'s. A result depends on the two rows and the range alone (K1), never on how many rows are computed together.
//!
//! Lanes are handled in loops, not in closures of `map` and the like: those are compiled without the instructions wherever they are not inlined.

use std::ops::Range;

use super::activations::{BLOCK, Quantised};
use super::simd::{Four, Simd};
use crate::lm::weights::{Kind, bf16_to_f32, f16_to_f32};

/// Activations of `M` rows, and which of a row's values are meant.
pub struct Operands<'a, const M: usize> {
    pub plain: [&'a [f32]; M],
    /// Where they were rounded: what weights in blocks are multiplied with.
    pub quantised: Option<[Quantised<'a>; M]>,
    /// In values; whole blocks where the weights have blocks.
    pub values: Range<usize>,
}

impl<const M: usize> Operands<'_, M> {
    /// Whether rows of so many bytes have the values that are meant, and the activations too.
    pub fn check(&self, kind: Kind, bytes: usize) {
        let end = self.values.end;
        assert!(end <= bytes / kind.block_bytes() * kind.block_values(), "K2: values of the row");
        assert!(self.plain.iter().all(|x| end <= x.len()), "K2: values of the activations");
        let blocks = end.div_ceil(BLOCK);
        let has = |x: &Quantised<'_>| end <= x.values.len() && blocks <= x.scales.len();
        assert!(self.quantised.iter().flatten().all(has), "K2: rounded activations");
    }
}

/// The dot products of one row of weights with `M` rows of activations.
///
/// # Safety
/// The processor has the instructions of `S`, and the caller is compiled for them; [`Operands::check`] has held for rows of this length.
#[inline(always)]
pub unsafe fn dots<S: Simd, const M: usize>(kind: Kind, row: &[u8], operands: &Operands<'_, M>) -> [f32; M] {
    // SAFETY: the caller's.
    unsafe {
        let values = &operands.values;
        match (kind, &operands.quantised) {
            (Kind::Q4_1, Some(x)) => q4_1::<S, M>(row, values, x),
            (Kind::Q4_0, Some(x)) => scaled_blocks::<S, M, 18>(
                row,
                values,
                x,
                #[inline(always)]
                |first, second| S::nibbles(first, second),
                #[inline(always)]
                |weights, x| S::products_centred(weights, x),
            ),
            (Kind::Q8_0, Some(x)) => scaled_blocks::<S, M, 34>(
                row,
                values,
                x,
                #[inline(always)]
                |first, second| S::bytes(first, second),
                #[inline(always)]
                |weights, x| S::products_signed(weights, x),
            ),
            (Kind::Q4_0 | Kind::Q4_1 | Kind::Q8_0, None) => exact::<S, M>(kind, row, operands),
            (Kind::F32, _) => {
                plain::<S, M, 4>(row, operands, |at| S::load(at.cast()), |at| f32::from_le_bytes(read(at)))
            }
            (Kind::F16, _) => {
                plain::<S, M, 2>(row, operands, |at| S::load_f16(at), |at| f16_to_f32(u16::from_le_bytes(read(at))))
            }
            (Kind::Bf16, _) => {
                plain::<S, M, 2>(row, operands, |at| S::load_bf16(at), |at| bf16_to_f32(u16::from_le_bytes(read(at))))
            }
        }
    }
}

#[inline(always)]
unsafe fn read<const N: usize>(at: *const u8) -> [u8; N] {
    // SAFETY: the caller's.
    unsafe { at.cast::<[u8; N]>().read_unaligned() }
}

/// Blocks of a scale, a least value and 32 values of four bits above it: `w = scale * q + least`.
#[inline(always)]
unsafe fn q4_1<S: Simd, const M: usize>(row: &[u8], values: &Range<usize>, x: &[Quantised<'_>; M]) -> [f32; M] {
    // SAFETY: the caller looked at the ranges.
    unsafe {
        let (mut lanes, mut least) = ([S::zero(); M], [S::Four::zero(); M]);
        pairs::<20, M>(
            row,
            values,
            x,
            #[inline(always)]
            |[first, second], x| {
                let (halves, weights) = (S::Four::halves(first, second), S::nibbles(first.add(4), second.add(4)));
                for (m, (bytes, scales)) in x.into_iter().enumerate() {
                    let scales = halves.times(scales);
                    lanes[m] = S::scaled(scales, S::products_unsigned(weights, bytes), lanes[m]);
                    least[m] = least[m].plus(scales);
                }
            },
        );
        let mut sums = [0.0; M];
        for m in 0..M {
            sums[m] = S::sum(lanes[m]) + least[m].odd_sum();
        }
        sums
    }
}

/// Blocks of a scale and 32 signed values: `w = scale * q`.
#[inline(always)]
unsafe fn scaled_blocks<S: Simd, const M: usize, const BYTES: usize>(
    row: &[u8],
    values: &Range<usize>,
    x: &[Quantised<'_>; M],
    load: impl Fn(*const u8, *const u8) -> S::Pair,
    products: impl Fn(S::Pair, *const i8) -> S::Sums,
) -> [f32; M] {
    // SAFETY: the caller looked at the ranges.
    unsafe {
        let mut lanes = [S::zero(); M];
        pairs::<BYTES, M>(
            row,
            values,
            x,
            #[inline(always)]
            |[first, second], x| {
                // The second half of each is no scale but two values; what becomes of it is not used.
                let (halves, weights) = (S::Four::halves(first, second), load(first.add(2), second.add(2)));
                for (m, (bytes, scales)) in x.into_iter().enumerate() {
                    lanes[m] = S::scaled(halves.times(scales), products(weights, bytes), lanes[m]);
                }
            },
        );
        let mut sums = [0.0; M];
        for m in 0..M {
            sums[m] = S::sum(lanes[m]);
        }
        sums
    }
}

/// Calls `each` with every two blocks and what they are multiplied with: bytes, and two scales of four numbers. A last one alone has zeros beside it.
#[inline(always)]
unsafe fn pairs<const BYTES: usize, const M: usize>(
    row: &[u8],
    values: &Range<usize>,
    x: &[Quantised<'_>; M],
    mut each: impl FnMut([*const u8; 2], [(*const i8, *const f32); M]),
) {
    let (from, to) = (values.start / BLOCK, values.end / BLOCK);
    // SAFETY: the caller looked at the ranges.
    unsafe {
        let at = |block: usize| row.as_ptr().add(block * BYTES);
        let mut block = from;
        while block + 2 <= to {
            let x = x.map(|x| (x.values.as_ptr().add(block * BLOCK), x.scales.as_ptr().add(block).cast()));
            each([at(block), at(block + 1)], x);
            block += 2;
        }
        if block < to {
            let filled: [([i8; 2 * BLOCK], [[f32; 2]; 2]); M] = x.map(|x| {
                let mut bytes = [0; 2 * BLOCK];
                bytes[..BLOCK].copy_from_slice(&x.values[block * BLOCK..][..BLOCK]);
                (bytes, [x.scales[block], [0.0; 2]])
            });
            let nothing = [0u8; BYTES];
            let x = std::array::from_fn(|m| (filled[m].0.as_ptr(), filled[m].1.as_ptr().cast()));
            each([at(block), nothing.as_ptr()], x);
        }
    }
}

/// Blocks times activations that were not rounded.
#[inline(always)]
unsafe fn exact<S: Simd, const M: usize>(kind: Kind, row: &[u8], operands: &Operands<'_, M>) -> [f32; M] {
    let mut lanes = [[0.0f32; 16]; M];
    let mut weights = [0.0f32; BLOCK];
    for block in operands.values.start / BLOCK..operands.values.end / BLOCK {
        kind.dequantise(&row[block * kind.block_bytes()..][..kind.block_bytes()], &mut weights);
        for (lanes, x) in lanes.iter_mut().zip(&operands.plain) {
            let x = &x[block * BLOCK..][..BLOCK];
            for value in 0..BLOCK {
                lanes[value % 16] = weights[value].mul_add(x[value], lanes[value % 16]);
            }
        }
    }
    lanes.map(super::vector::by_halves)
}

/// Values that are numbers each.
#[inline(always)]
unsafe fn plain<S: Simd, const M: usize, const BYTES: usize>(
    row: &[u8],
    operands: &Operands<'_, M>,
    load: impl Fn(*const u8) -> S::Lanes,
    one: impl Fn(*const u8) -> f32,
) -> [f32; M] {
    // SAFETY: the caller looked at the ranges.
    unsafe {
        let mut lanes = [S::zero(); M];
        let Range { start, end } = operands.values.clone();
        let mut at = start;
        while at + 16 <= end {
            let weights = load(row.as_ptr().add(at * BYTES));
            for (m, x) in operands.plain.iter().enumerate() {
                lanes[m] = S::fused(weights, S::load(x.as_ptr().add(at)), lanes[m]);
            }
            at += 16;
        }
        // What is left of a row fills no lanes: it is added in order at the end.
        let mut sums = [0.0; M];
        for m in 0..M {
            sums[m] = S::sum(lanes[m]);
            for value in at..end {
                sums[m] = one(row.as_ptr().add(value * BYTES)).mul_add(operands.plain[m][value], sums[m]);
            }
        }
        sums
    }
}
