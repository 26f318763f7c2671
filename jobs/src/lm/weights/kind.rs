//! How the values of a tensor are stored, and what they are as f32. Owns the block layouts; never opens a file.
//!
//! The layouts and formulas are ggml's (`ggml-common.h`, `ggml-quants.c`, functions `dequantize_row_*`). A quantised product of a 4 or 8 bit
//! integer and an f16 scale has at most 19 bits and is exact in f32, so at most one rounding is left and fused multiply-add changes nothing.

/// Values of a quantised block.
const BLOCK: usize = 32;

/// How the values of a tensor are stored. Little-endian everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "ggml's names, by which people know them")]
pub enum Kind {
    F32,
    F16,
    /// The upper half of an f32.
    Bf16,
    /// Blocks of 32: f16 scale d, then 32 i8 q. Value q·d.
    Q8_0,
    /// Blocks of 32: f16 scale d, then 16 bytes with q of value j low and of value j + 16 high. Value (q - 8)·d.
    Q4_0,
    /// Blocks of 32: f16 scale d, f16 least m, then 16 bytes as in `Q4_0`. Value q·d + m.
    Q4_1,
}

impl Kind {
    pub const ALL: [Kind; 6] = [Kind::F32, Kind::F16, Kind::Bf16, Kind::Q8_0, Kind::Q4_0, Kind::Q4_1];

    /// The name that users and files know.
    pub fn name(self) -> &'static str {
        match self {
            Kind::F32 => "F32",
            Kind::F16 => "F16",
            Kind::Bf16 => "BF16",
            Kind::Q8_0 => "Q8_0",
            Kind::Q4_0 => "Q4_0",
            Kind::Q4_1 => "Q4_1",
        }
    }

    /// Values that share one block: a row is a whole number of blocks.
    pub fn block_values(self) -> usize {
        match self {
            Kind::F32 | Kind::F16 | Kind::Bf16 => 1,
            Kind::Q8_0 | Kind::Q4_0 | Kind::Q4_1 => BLOCK,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Kind::F32 => 4,
            Kind::F16 | Kind::Bf16 => 2,
            Kind::Q8_0 => 2 + BLOCK,
            Kind::Q4_0 => 2 + BLOCK / 2,
            Kind::Q4_1 => 4 + BLOCK / 2,
        }
    }

    /// Bytes of a row of `values`, which must be a multiple of [`Kind::block_values`].
    pub fn row_bytes(self, values: usize) -> usize {
        debug_assert_eq!(values % self.block_values(), 0, "a row is whole blocks");
        values / self.block_values() * self.block_bytes()
    }

    /// Bytes of a tensor whose rows have `shape`'s last dimension: none if a dimension is 0, a row is not whole blocks, or the product overflows.
    pub(super) fn tensor_bytes(self, shape: &[usize]) -> Option<usize> {
        let values = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size))?;
        let row = shape.last().copied().unwrap_or(1);
        if values == 0 || !row.is_multiple_of(self.block_values()) {
            return None;
        }
        (values / self.block_values()).checked_mul(self.block_bytes())
    }

    /// The values in `bytes`, whole blocks, as f32 into `out`.
    ///
    /// # Panics
    /// If the lengths do not fit each other.
    pub fn dequantise(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), self.row_bytes(out.len()), "W1: as many bytes as the values need");
        let blocks = bytes.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(self.block_values()));
        match self {
            Kind::F32 => {
                blocks.for_each(|(block, out)| out[0] = f32::from_le_bytes(block.try_into().expect("4 bytes")))
            }
            Kind::F16 => blocks.for_each(|(block, out)| out[0] = f16_to_f32(half(block))),
            Kind::Bf16 => blocks.for_each(|(block, out)| out[0] = bf16_to_f32(half(block))),
            Kind::Q8_0 => blocks.for_each(|(block, out)| {
                let d = f16_to_f32(half(block));
                for (out, &q) in out.iter_mut().zip(&block[2..]) {
                    *out = f32::from(q as i8) * d;
                }
            }),
            Kind::Q4_0 => blocks.for_each(|(block, out)| {
                let d = f16_to_f32(half(block));
                nibbles(&block[2..], out, |q| f32::from(q as i8 - 8) * d);
            }),
            Kind::Q4_1 => blocks.for_each(|(block, out)| {
                let (d, m) = (f16_to_f32(half(block)), f16_to_f32(half(&block[2..])));
                nibbles(&block[4..], out, |q| f32::from(q) * d + m);
            }),
        }
    }
}

/// A tensor as it lies in its file. W1: `bytes` is as long as `kind` and `shape` ask, and no dimension is 0; whoever makes one has checked it.
#[derive(Debug, Clone)]
pub struct Raw<'a> {
    pub kind: Kind,
    /// Row-major, the outermost dimension first: [out, in] of a matrix.
    pub shape: Vec<usize>,
    /// All rows, without gaps. Not aligned for more than single bytes.
    pub bytes: &'a [u8],
}

impl<'a> Raw<'a> {
    /// Product of all dimensions but the last; 1 of a vector.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, outer)| outer.iter().product())
    }

    /// The last dimension: values that lie side by side.
    pub fn row_values(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The bytes of one row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let bytes = self.kind.row_bytes(self.row_values());
        &self.bytes[row * bytes..][..bytes]
    }

    /// All values as f32, row by row: 4 bytes a value of new memory.
    pub fn dequantise(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows() * self.row_values()];
        self.kind.dequantise(self.bytes, &mut values);
        values
    }
}

/// IEEE 754 half precision to single; exact.
#[inline]
pub fn f16_to_f32(bits: u16) -> f32 {
    let (sign, magnitude) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff));
    let value = match magnitude >> 10 {
        // Subnormal: a count of 2^-24.
        0 => (magnitude as f32 * f32::from_bits(0x3380_0000)).to_bits(),
        31 => 0x7f80_0000 | (magnitude & 0x3ff) << 13,
        // The bias of the exponent goes from 15 to 127.
        _ => (magnitude << 13) + (112 << 23),
    };
    f32::from_bits(sign | value)
}

/// bfloat16 to single; exact.
#[inline]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

fn half(bytes: &[u8]) -> u16 {
    u16::from_le_bytes([bytes[0], bytes[1]])
}

/// The low halves of `packed` are the first values of the block, the high halves the rest.
fn nibbles(packed: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(packed.len());
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(packed) {
        *low = value(byte & 0x0f);
        *high = value(byte >> 4);
    }
}
