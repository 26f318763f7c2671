//! The one arithmetic of the exchange: element-wise f32 addition, on slices and on bytes as they came from the wire (little-endian,
//! unaligned). Owns the choice of instruction set; never multiplies, fuses or reorders.
//!
//! X1: every variant does exactly one IEEE addition an element, so the result has the same bits on every instruction set.

#[cfg(target_endian = "big")]
compile_error!("values go over the wire as they lie in memory, and the wire is little-endian");

/// Bytes of one value on the wire.
pub const VALUE_BYTES: usize = size_of::<f32>();

/// Bytes of a value that is bf16 there.
pub const NARROW_BYTES: usize = 2;

/// Calls a function that is inlined, compiled for the widest vectors of this machine.
macro_rules! with_features {
    ($plain:ident($($name:ident: $type:ty),*)) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f")]
            fn avx512($($name: $type),*) {
                $plain($($name),*);
            }
            #[target_feature(enable = "avx2")]
            fn avx2($($name: $type),*) {
                $plain($($name),*);
            }
            if is_x86_feature_detected!("avx512f") {
                // SAFETY: the features of the callee were just detected.
                return unsafe { avx512($($name),*) };
            }
            if is_x86_feature_detected!("avx2") {
                // SAFETY: as above.
                return unsafe { avx2($($name),*) };
            }
        }
        $plain($($name),*);
    }};
}
pub(super) use with_features;

/// `y[i] += x[i]`; the slices have equal lengths.
pub fn add(y: &mut [f32], x: &[f32]) {
    add_bytes(y, as_bytes(x));
}

/// `y[i] += x[i]` where `x` is the values' little-endian bytes at any alignment, `4 * y.len()` of them.
pub fn add_bytes(y: &mut [f32], x: &[u8]) {
    assert_eq!(y.len() * VALUE_BYTES, x.len(), "X1: operands of equal lengths");
    with_features!(add_plain(y: &mut [f32], x: &[u8]));
}

/// The same where `x` is bf16, `2 * y.len()` bytes.
pub fn add_narrow(y: &mut [f32], x: &[u8]) {
    assert_eq!(y.len() * NARROW_BYTES, x.len(), "X1: operands of equal lengths");
    with_features!(add_narrow_plain(y: &mut [f32], x: &[u8]));
}

/// `y[i] = x[i]` where `x` is bf16, `2 * y.len()` bytes.
pub fn copy_narrow(y: &mut [f32], x: &[u8]) {
    assert_eq!(y.len() * NARROW_BYTES, x.len(), "X1: operands of equal lengths");
    with_features!(copy_narrow_plain(y: &mut [f32], x: &[u8]));
}

/// `y[i] = x[i]` from wire bytes, `4 * y.len()` of them.
pub fn copy_bytes(y: &mut [f32], x: &[u8]) {
    as_bytes_mut(y).copy_from_slice(x);
}

/// The values as they go over the wire.
pub fn as_bytes(values: &[f32]) -> &[u8] {
    // SAFETY: any f32 is four initialised bytes, and u8 has no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn as_bytes_mut(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: as in `as_bytes`; and any four bytes are an f32.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// The compiler vectorises these with the features of the function that they are inlined into.
#[inline(always)]
fn add_plain(y: &mut [f32], x: &[u8]) {
    let (x, _) = x.as_chunks::<VALUE_BYTES>();
    for (y, x) in y.iter_mut().zip(x) {
        *y += f32::from_le_bytes(*x);
    }
}

#[inline(always)]
fn add_narrow_plain(y: &mut [f32], x: &[u8]) {
    let (x, _) = x.as_chunks::<NARROW_BYTES>();
    for (y, x) in y.iter_mut().zip(x) {
        *y += widened(*x);
    }
}

#[inline(always)]
fn copy_narrow_plain(y: &mut [f32], x: &[u8]) {
    let (x, _) = x.as_chunks::<NARROW_BYTES>();
    for (y, x) in y.iter_mut().zip(x) {
        *y = widened(*x);
    }
}

#[inline(always)]
fn widened(narrow: [u8; NARROW_BYTES]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(narrow)) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(seed: u32, count: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Exponents far apart, so that rounding happens at nearly every addition.
            (state as i32 as f32) * 2f32.powi((state >> 27) as i32 - 16)
        })
        .take(count)
        .collect()
    }

    #[test]
    fn additions_have_the_same_bits_on_every_instruction_set_and_alignment() {
        for count in [0, 1, 3, 16, 31, 1000] {
            let (y, x) = (values(1, count), values(2, count));
            let plain: Vec<u32> = y.iter().zip(&x).map(|(y, x)| (y + x).to_bits()).collect();
            for shift in 0..4 {
                let mut shifted = vec![0u8; shift];
                shifted.extend_from_slice(as_bytes(&x));
                let mut sum = y.clone();
                add_bytes(&mut sum, &shifted[shift..]);
                assert_eq!(sum.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), plain);
                let mut copy = vec![0.0; count];
                copy_bytes(&mut copy, &shifted[shift..]);
                assert_eq!(copy, x);
            }
            let mut sum = y.clone();
            add(&mut sum, &x);
            assert_eq!(sum.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), plain);
        }
    }
}
