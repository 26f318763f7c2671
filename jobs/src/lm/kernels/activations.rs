//! Rows of activations, also in the form that quantised weights are multiplied with. Owns the rounding; knows no weights.

use super::isa::Isa;
use super::vector::ROUNDS;

/// Values that share a scale, as in the weight files.
pub const BLOCK: usize = 32;

/// Rows of f32, one behind the other. `width` values each.
#[derive(Debug, Default)]
pub struct Rows {
    pub width: usize,
    pub values: Vec<f32>,
    quantised: Vec<i8>,
    /// Of each block: its scale, and its scale times the sum of its bytes.
    scales: Vec<[f32; 2]>,
}

/// One row as signed bytes.
#[derive(Clone, Copy)]
pub struct Quantised<'a> {
    pub values: &'a [i8],
    pub scales: &'a [[f32; 2]],
}

impl Rows {
    pub fn new(width: usize) -> Self {
        Self { width, ..Self::default() }
    }

    /// So many rows, of any values.
    pub fn resize(&mut self, rows: usize) {
        self.values.resize(rows * self.width, 0.0);
    }

    pub fn len(&self) -> usize {
        self.values.len().checked_div(self.width).unwrap_or(0)
    }

    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..(row + 1) * self.width]
    }

    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.values[row * self.width..(row + 1) * self.width]
    }

    /// Rounds all rows, each block of 32 to 255 steps of its largest value (as ggml's Q8_0, with a scale of f32): within half a step,
    /// 1/254 of that value. A row that is no whole number of blocks ends with a shorter one, filled with zeros.
    pub fn quantise(&mut self, isa: Isa) {
        let blocks = self.width.div_ceil(BLOCK);
        self.quantised.resize(self.len() * blocks * BLOCK, 0);
        self.scales.resize(self.len() * blocks, [0.0; 2]);
        let rows = self.values.chunks_exact(self.width);
        let made = self.quantised.chunks_exact_mut(blocks * BLOCK).zip(self.scales.chunks_exact_mut(blocks));
        for (row, (bytes, scales)) in rows.zip(made) {
            for ((values, bytes), scale) in row.chunks(BLOCK).zip(bytes.chunks_exact_mut(BLOCK)).zip(scales) {
                *scale = isa.run(
                    #[inline(always)]
                    || quantise(values, bytes),
                );
            }
        }
    }

    /// A row, if it was rounded.
    pub fn quantised(&self, row: usize) -> Option<Quantised<'_>> {
        let blocks = self.width.div_ceil(BLOCK);
        let (bytes, scales) = (row * blocks * BLOCK, row * blocks);
        let values = self.quantised.get(bytes..bytes + blocks * BLOCK)?;
        Some(Quantised { values, scales: &self.scales[scales..scales + blocks] })
    }
}

#[inline(always)]
fn quantise(values: &[f32], bytes: &mut [i8]) -> [f32; 2] {
    // Sizes are in the order of their bits, and what is not a number is larger than all: then the scale shows it.
    let mut largest = 0u32;
    for value in values {
        largest = largest.max(value.to_bits() & 0x7fff_ffff);
    }
    let scale = f32::from_bits(largest) / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    bytes.fill(0);
    let mut sum = 0i32;
    for (byte, value) in bytes.iter_mut().zip(values) {
        *byte = value.mul_add(inverse, ROUNDS).to_bits() as i8;
        sum += i32::from(*byte);
    }
    [scale, scale * sum as f32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounded_values_are_within_half_a_step() {
        let mut rows = Rows::new(40);
        rows.values = (0..80).map(|at| ((at * 37 % 80) as f32 - 40.0) * 0.3).collect();
        rows.quantise(Isa::best());
        for row in 0..2 {
            let made = rows.quantised(row).unwrap();
            assert_eq!((made.values.len(), made.scales.len()), (64, 2));
            for (at, value) in rows.row(row).iter().enumerate() {
                let [scale, _] = made.scales[at / BLOCK];
                assert!((f32::from(made.values[at]) * scale - value).abs() <= scale * 0.500_1, "{value}");
            }
            let sum: i32 = made.values[..BLOCK].iter().map(|byte| i32::from(*byte)).sum();
            assert_eq!(made.scales[0][1], made.scales[0][0] * sum as f32);
            assert!(made.values[40..].iter().all(|byte| *byte == 0));
        }
        let mut zero = Rows::new(BLOCK);
        zero.resize(1);
        zero.quantise(Isa::best());
        assert_eq!(zero.quantised(0).unwrap().scales, [[0.0; 2]]);
    }
}
