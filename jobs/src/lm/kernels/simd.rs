//! The instructions that dot products of weights are made of, on each kind of processor. Owns what a lane is; reads no weights by itself.
//!
//! K1: a dot product has 16 lanes of f32, whatever the processor. Quantised blocks of 32 values come in pairs: the first adds to the first eight
//! lanes, the second to the others; value `i` of plain numbers adds to lane `i % 16`. Each lane takes one fused multiply-add a pair, or a value, in
//! the order of the values, and the lanes are added by halves at the end. So a result has the same bits on every instruction set.

use crate::lm::weights::{bf16_to_f32, f16_to_f32};

/// 16 lanes of one instruction set.
///
/// # Safety
/// Every function may only be called where the processor has the instruction set, with pointers to as much as is read.
pub trait Simd: Copy {
    /// 16 values.
    type Lanes: Copy;
    /// The values of two blocks, as bytes.
    type Pair: Copy;
    /// 16 exact sums of four products each.
    type Sums: Copy;
    type Four: Four;

    unsafe fn zero() -> Self::Lanes;
    /// 16 f32, 16 halves, 16 upper halves of f32 (bf16).
    unsafe fn load(values: *const f32) -> Self::Lanes;
    unsafe fn load_f16(values: *const u8) -> Self::Lanes;
    unsafe fn load_bf16(values: *const u8) -> Self::Lanes;
    /// The same value in all lanes.
    unsafe fn splat(value: f32) -> Self::Lanes;
    unsafe fn store(lanes: Self::Lanes, to: *mut f32);
    /// `a * b + lanes`, rounded once.
    unsafe fn fused(a: Self::Lanes, b: Self::Lanes, lanes: Self::Lanes) -> Self::Lanes;
    /// 32 signed bytes each.
    unsafe fn bytes(first: *const u8, second: *const u8) -> Self::Pair;
    /// 32 values of 4 bits each as unsigned bytes: the low halves of 16 bytes, then the high halves.
    unsafe fn nibbles(first: *const u8, second: *const u8) -> Self::Pair;
    /// Lane `j` is the sum over bytes `4j..4j + 4` of `a` (unsigned, below 16) times the signed `b`.
    unsafe fn products_unsigned(a: Self::Pair, b: *const i8) -> Self::Sums;
    /// The same of signed `a`.
    unsafe fn products_signed(a: Self::Pair, b: *const i8) -> Self::Sums;
    /// The same of `a - 8` for unsigned `a` below 16.
    unsafe fn products_centred(a: Self::Pair, b: *const i8) -> Self::Sums;
    /// `lanes + scale * sums`, rounded once; the scale of the first block is the first value, that of the second the third.
    unsafe fn scaled(scales: Self::Four, sums: Self::Sums, lanes: Self::Lanes) -> Self::Lanes;
    /// All lanes, added by halves.
    unsafe fn sum(lanes: Self::Lanes) -> f32;
}

/// Scale and least value of two blocks.
///
/// # Safety
/// As of [`Simd`].
pub trait Four: Copy {
    unsafe fn zero() -> Self;
    /// The two halves at the beginning of each block.
    unsafe fn halves(first: *const u8, second: *const u8) -> Self;
    /// Value by value with four f32.
    unsafe fn times(self, factors: *const f32) -> Self;
    unsafe fn plus(self, other: Self) -> Self;
    /// The second value and the fourth, added.
    unsafe fn odd_sum(self) -> f32;
}

/// Without special instructions: what the others must equal.
#[derive(Clone, Copy)]
pub struct Plain;

impl Simd for Plain {
    type Lanes = [f32; 16];
    type Pair = [u8; 64];
    type Sums = [i32; 16];
    type Four = [f32; 4];

    #[inline(always)]
    unsafe fn zero() -> [f32; 16] {
        [0.0; 16]
    }

    #[inline(always)]
    unsafe fn load(values: *const f32) -> [f32; 16] {
        // SAFETY: the caller's, here and below.
        unsafe { values.cast::<[f32; 16]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_f16(values: *const u8) -> [f32; 16] {
        unsafe { values.cast::<[[u8; 2]; 16]>().read_unaligned() }.map(|half| f16_to_f32(u16::from_le_bytes(half)))
    }

    #[inline(always)]
    unsafe fn load_bf16(values: *const u8) -> [f32; 16] {
        unsafe { values.cast::<[[u8; 2]; 16]>().read_unaligned() }.map(|half| bf16_to_f32(u16::from_le_bytes(half)))
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 16] {
        [value; 16]
    }

    #[inline(always)]
    unsafe fn store(lanes: [f32; 16], to: *mut f32) {
        unsafe { to.cast::<[f32; 16]>().write_unaligned(lanes) }
    }

    #[inline(always)]
    unsafe fn fused(a: [f32; 16], b: [f32; 16], lanes: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], lanes[lane]))
    }

    #[inline(always)]
    unsafe fn bytes(first: *const u8, second: *const u8) -> [u8; 64] {
        let blocks = unsafe { [first, second].map(|block| block.cast::<[u8; 32]>().read_unaligned()) };
        std::array::from_fn(|at| blocks[at / 32][at % 32])
    }

    #[inline(always)]
    unsafe fn nibbles(first: *const u8, second: *const u8) -> [u8; 64] {
        let blocks = unsafe { [first, second].map(|block| block.cast::<[u8; 16]>().read_unaligned()) };
        std::array::from_fn(|at| blocks[at / 32][at % 16] >> (at % 32 / 16 * 4) & 15)
    }

    #[inline(always)]
    unsafe fn products_unsigned(a: [u8; 64], b: *const i8) -> [i32; 16] {
        unsafe { products(a.map(i32::from), b) }
    }

    #[inline(always)]
    unsafe fn products_signed(a: [u8; 64], b: *const i8) -> [i32; 16] {
        unsafe { products(a.map(|value| i32::from(value as i8)), b) }
    }

    #[inline(always)]
    unsafe fn products_centred(a: [u8; 64], b: *const i8) -> [i32; 16] {
        unsafe { products(a.map(|value| i32::from(value) - 8), b) }
    }

    #[inline(always)]
    unsafe fn scaled(scales: [f32; 4], sums: [i32; 16], lanes: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|lane| scales[lane / 8 * 2].mul_add(sums[lane] as f32, lanes[lane]))
    }

    #[inline(always)]
    unsafe fn sum(lanes: [f32; 16]) -> f32 {
        super::vector::by_halves(lanes)
    }
}

impl Four for [f32; 4] {
    #[inline(always)]
    unsafe fn halves(first: *const u8, second: *const u8) -> [f32; 4] {
        let [[a, b], [c, d]] = unsafe { [first, second].map(|block| block.cast::<[[u8; 2]; 2]>().read_unaligned()) };
        [a, b, c, d].map(|half| f16_to_f32(u16::from_le_bytes(half)))
    }

    #[inline(always)]
    unsafe fn times(self, factors: *const f32) -> [f32; 4] {
        let factors = unsafe { factors.cast::<[f32; 4]>().read_unaligned() };
        std::array::from_fn(|at| self[at] * factors[at])
    }

    #[inline(always)]
    unsafe fn zero() -> [f32; 4] {
        [0.0; 4]
    }

    #[inline(always)]
    unsafe fn plus(self, other: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|at| self[at] + other[at])
    }

    #[inline(always)]
    unsafe fn odd_sum(self) -> f32 {
        self[1] + self[3]
    }
}

unsafe fn products(a: [i32; 64], b: *const i8) -> [i32; 16] {
    // SAFETY: the caller's.
    let b = unsafe { b.cast::<[i8; 64]>().read_unaligned() };
    std::array::from_fn(|lane| (4 * lane..4 * lane + 4).map(|value| a[value] * i32::from(b[value])).sum())
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Four, Simd};

    /// AVX2, FMA and F16C.
    #[derive(Clone, Copy)]
    pub struct Avx2;

    /// AVX-512 F, BW, DQ, VL and VNNI, beside those.
    #[derive(Clone, Copy)]
    pub struct Avx512;

    impl Four for __m128 {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller's, here and below.
            unsafe { _mm_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn halves(first: *const u8, second: *const u8) -> Self {
            unsafe {
                let both = _mm_cvtsi32_si128(first.cast::<i32>().read_unaligned());
                _mm_cvtph_ps(_mm_insert_epi32::<1>(both, second.cast::<i32>().read_unaligned()))
            }
        }

        #[inline(always)]
        unsafe fn times(self, factors: *const f32) -> Self {
            unsafe { _mm_mul_ps(self, _mm_loadu_ps(factors)) }
        }

        #[inline(always)]
        unsafe fn plus(self, other: Self) -> Self {
            unsafe { _mm_add_ps(self, other) }
        }

        #[inline(always)]
        unsafe fn odd_sum(self) -> f32 {
            unsafe {
                let second = _mm_movehdup_ps(self);
                _mm_cvtss_f32(_mm_add_ss(second, _mm_movehl_ps(second, second)))
            }
        }
    }

    /// Eight lanes, added by halves.
    #[inline(always)]
    unsafe fn sum_eight(lanes: __m256) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    /// Sums of four products each of unsigned `a` and signed `b`, whose pairs stay below 2^15.
    #[inline(always)]
    unsafe fn products(a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)) }
    }

    impl Simd for Avx2 {
        type Lanes = [__m256; 2];
        type Pair = [__m256i; 2];
        type Sums = [__m256i; 2];
        type Four = __m128;

        #[inline(always)]
        unsafe fn zero() -> [__m256; 2] {
            unsafe { [_mm256_setzero_ps(); 2] }
        }

        #[inline(always)]
        unsafe fn load(values: *const f32) -> [__m256; 2] {
            unsafe { [_mm256_loadu_ps(values), _mm256_loadu_ps(values.add(8))] }
        }

        #[inline(always)]
        unsafe fn load_f16(values: *const u8) -> [__m256; 2] {
            unsafe { [0, 16].map(|at| _mm256_cvtph_ps(_mm_loadu_si128(values.add(at).cast()))) }
        }

        #[inline(always)]
        unsafe fn load_bf16(values: *const u8) -> [__m256; 2] {
            unsafe {
                [0, 16].map(|at| {
                    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(values.add(at).cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                })
            }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> [__m256; 2] {
            unsafe { [_mm256_set1_ps(value); 2] }
        }

        #[inline(always)]
        unsafe fn store(lanes: [__m256; 2], to: *mut f32) {
            unsafe {
                _mm256_storeu_ps(to, lanes[0]);
                _mm256_storeu_ps(to.add(8), lanes[1]);
            }
        }

        #[inline(always)]
        unsafe fn fused(a: [__m256; 2], b: [__m256; 2], lanes: [__m256; 2]) -> [__m256; 2] {
            unsafe { [_mm256_fmadd_ps(a[0], b[0], lanes[0]), _mm256_fmadd_ps(a[1], b[1], lanes[1])] }
        }

        #[inline(always)]
        unsafe fn bytes(first: *const u8, second: *const u8) -> [__m256i; 2] {
            unsafe { [_mm256_loadu_si256(first.cast()), _mm256_loadu_si256(second.cast())] }
        }

        #[inline(always)]
        unsafe fn nibbles(first: *const u8, second: *const u8) -> [__m256i; 2] {
            unsafe {
                [first, second].map(|block| {
                    let packed = _mm_loadu_si128(block.cast());
                    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(packed), packed);
                    _mm256_and_si256(both, _mm256_set1_epi8(15))
                })
            }
        }

        #[inline(always)]
        unsafe fn products_unsigned(a: [__m256i; 2], b: *const i8) -> [__m256i; 2] {
            unsafe {
                [products(a[0], _mm256_loadu_si256(b.cast())), products(a[1], _mm256_loadu_si256(b.add(32).cast()))]
            }
        }

        #[inline(always)]
        unsafe fn products_signed(a: [__m256i; 2], b: *const i8) -> [__m256i; 2] {
            // The sign moves over: the instruction takes one unsigned side. The bytes of -128 are those of 128, which is right as unsigned.
            unsafe {
                let b = [_mm256_loadu_si256(b.cast()), _mm256_loadu_si256(b.add(32).cast())];
                [0, 1].map(|half| products(_mm256_abs_epi8(a[half]), _mm256_sign_epi8(b[half], a[half])))
            }
        }

        #[inline(always)]
        unsafe fn products_centred(a: [__m256i; 2], b: *const i8) -> [__m256i; 2] {
            unsafe { Self::products_signed(a.map(|half| _mm256_sub_epi8(half, _mm256_set1_epi8(8))), b) }
        }

        #[inline(always)]
        unsafe fn scaled(scales: __m128, sums: [__m256i; 2], lanes: [__m256; 2]) -> [__m256; 2] {
            unsafe {
                let first = _mm256_broadcastss_ps(scales);
                let second = _mm256_broadcastss_ps(_mm_movehl_ps(scales, scales));
                [
                    _mm256_fmadd_ps(first, _mm256_cvtepi32_ps(sums[0]), lanes[0]),
                    _mm256_fmadd_ps(second, _mm256_cvtepi32_ps(sums[1]), lanes[1]),
                ]
            }
        }

        #[inline(always)]
        unsafe fn sum(lanes: [__m256; 2]) -> f32 {
            unsafe { sum_eight(_mm256_add_ps(lanes[0], lanes[1])) }
        }
    }

    impl Simd for Avx512 {
        type Lanes = __m512;
        type Pair = __m512i;
        type Sums = __m512i;
        type Four = __m128;

        #[inline(always)]
        unsafe fn zero() -> __m512 {
            unsafe { _mm512_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn load(values: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(values) }
        }

        #[inline(always)]
        unsafe fn load_f16(values: *const u8) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(values.cast())) }
        }

        #[inline(always)]
        unsafe fn load_bf16(values: *const u8) -> __m512 {
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(values.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> __m512 {
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn store(lanes: __m512, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, lanes) }
        }

        #[inline(always)]
        unsafe fn fused(a: __m512, b: __m512, lanes: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, lanes) }
        }

        #[inline(always)]
        unsafe fn bytes(first: *const u8, second: *const u8) -> __m512i {
            unsafe {
                let first = _mm512_castsi256_si512(_mm256_loadu_si256(first.cast()));
                _mm512_inserti64x4::<1>(first, _mm256_loadu_si256(second.cast()))
            }
        }

        #[inline(always)]
        unsafe fn nibbles(first: *const u8, second: *const u8) -> __m512i {
            unsafe {
                let first = _mm256_castsi128_si256(_mm_loadu_si128(first.cast()));
                let both = _mm256_inserti128_si256::<1>(first, _mm_loadu_si128(second.cast()));
                // Each twice, then the second one of each moved down.
                let twice =
                    _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), _mm512_castsi256_si512(both));
                let shifts = _mm512_setr_epi64(0, 0, FOUR_BITS, FOUR_BITS, 0, 0, FOUR_BITS, FOUR_BITS);
                _mm512_and_si512(_mm512_srlv_epi16(twice, shifts), _mm512_set1_epi8(15))
            }
        }

        #[inline(always)]
        unsafe fn products_unsigned(a: __m512i, b: *const i8) -> __m512i {
            unsafe { _mm512_dpbusd_epi32(_mm512_setzero_si512(), a, _mm512_loadu_si512(b.cast())) }
        }

        #[inline(always)]
        unsafe fn products_signed(a: __m512i, b: *const i8) -> __m512i {
            unsafe {
                let b = _mm512_loadu_si512(b.cast());
                let negated = _mm512_mask_sub_epi8(b, _mm512_movepi8_mask(a), _mm512_setzero_si512(), b);
                _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_abs_epi8(a), negated)
            }
        }

        #[inline(always)]
        unsafe fn products_centred(a: __m512i, b: *const i8) -> __m512i {
            unsafe { Self::products_signed(_mm512_sub_epi8(a, _mm512_set1_epi8(8)), b) }
        }

        #[inline(always)]
        unsafe fn scaled(scales: __m128, sums: __m512i, lanes: __m512) -> __m512 {
            unsafe {
                let places = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2);
                let scales = _mm512_permutexvar_ps(places, _mm512_castps128_ps512(scales));
                _mm512_fmadd_ps(scales, _mm512_cvtepi32_ps(sums), lanes)
            }
        }

        #[inline(always)]
        unsafe fn sum(lanes: __m512) -> f32 {
            unsafe { sum_eight(_mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes))) }
        }
    }

    /// Of each of four words.
    const FOUR_BITS: i64 = 0x0004_0004_0004_0004;
}
