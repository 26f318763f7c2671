//! Sine and cosine that have the same bits on every processor and C library, without a branch, so that loops over envs become vector code.
//!
//! The C library's differ between its versions and between processors with and without fused multiply-add; an env that moves to another
//! machine must go on as it would have. Method and constants of fdlibm (Sun Microsystems, 1993: `k_sin.c`, `k_cos.c`, `e_rem_pio2.c`):
//! reduce by multiples of pi/2 in three parts, then a polynomial with the rest of the reduction carried along. Below one unit in the last
//! place from the true value while |x| < [`REACH`].

/// How far from 0 the reduction is exact: the multiple of pi/2 has to be a number of 20 bits.
#[cfg(test)]
const REACH: f64 = 1_000_000.0;

/// 1.5 * 2^52: added to a number below 2^51, it leaves the nearest whole number in the low bits.
const ROUND: f64 = 6_755_399_441_055_744.0;
const PI_2_HIGH: f64 = 1.570_796_326_734_125_6;
const PI_2_MIDDLE: f64 = 6.077_100_506_303_966e-11;
const PI_2_LOW: f64 = 2.022_266_248_795_950_6e-21;

/// The sine and the cosine of `x` radians.
#[inline(always)]
pub(crate) fn sin_cos(x: f64) -> (f64, f64) {
    let rounded = x * std::f64::consts::FRAC_2_PI + ROUND;
    let quadrant = rounded.to_bits();
    let n = rounded - ROUND;
    let first = x - n * PI_2_HIGH;
    let middle = n * PI_2_MIDDLE;
    let second = first - middle;
    let low = n * PI_2_LOW - ((first - second) - middle);
    let x = second - low;
    let rest = (second - x) - low;
    let (sin, cos) = (sin_near(x, rest), cos_near(x, rest));
    let odd = quadrant & 1 == 1;
    let (sin, cos) = (if odd { cos } else { sin }, if odd { sin } else { cos });
    // Quadrants 2 and 3 have a negative sine, 1 and 2 a negative cosine.
    let sin_sign = (quadrant & 2) << 62;
    let cos_sign = (quadrant.wrapping_add(1) & 2) << 62;
    (f64::from_bits(sin.to_bits() ^ sin_sign), f64::from_bits(cos.to_bits() ^ cos_sign))
}

/// The cosine of `x` radians.
#[inline(always)]
pub(crate) fn cos(x: f64) -> f64 {
    sin_cos(x).1
}

/// Sine of `x + rest` for |x| <= pi/4.
#[inline(always)]
fn sin_near(x: f64, rest: f64) -> f64 {
    const S1: f64 = -0.166_666_666_666_666_32;
    const S2: f64 = 0.008_333_333_333_322_49;
    const S3: f64 = -0.000_198_412_698_298_579_5;
    const S4: f64 = 2.755_731_370_707_006_8e-6;
    const S5: f64 = -2.505_076_025_340_686_3e-8;
    const S6: f64 = 1.589_690_995_211_55e-10;
    let z = x * x;
    let w = z * z;
    let r = S2 + z * (S3 + z * S4) + z * w * (S5 + z * S6);
    let v = z * x;
    x - ((z * (0.5 * rest - v * r) - rest) - v * S1)
}

/// Cosine of `x + rest` for |x| <= pi/4.
#[inline(always)]
fn cos_near(x: f64, rest: f64) -> f64 {
    const C1: f64 = 0.041_666_666_666_666_6;
    const C2: f64 = -0.001_388_888_888_887_411;
    const C3: f64 = 2.480_158_728_947_673e-5;
    const C4: f64 = -2.755_731_435_139_066_3e-7;
    const C5: f64 = 2.087_572_321_298_175e-9;
    const C6: f64 = -1.135_964_755_778_819_5e-11;
    let z = x * x;
    let w = z * z;
    let r = z * (C1 + z * (C2 + z * C3)) + w * w * (C4 + z * (C5 + z * C6));
    let half = 0.5 * z;
    let one = 1.0 - half;
    one + (((1.0 - one) - half) + (z * r - x * rest))
}

#[cfg(test)]
mod tests {
    use super::{REACH, sin_cos};
    use crate::rl::Pcg64;

    /// Distance in units in the last place of numbers of this size.
    fn units(a: f64, b: f64) -> f64 {
        (a - b).abs() / f64::from_bits(b.abs().to_bits() & 0x7ff0_0000_0000_0000) * (1u64 << 52) as f64
    }

    #[test]
    fn values_are_the_c_librarys_within_a_unit_in_the_last_place() {
        let mut rng = Pcg64::new(3);
        let mut differ = 0;
        for reach in [0.3, 4.0, 100.0, REACH] {
            for _ in 0..50_000 {
                let x = rng.uniform(-reach, reach);
                let (sin, cos) = sin_cos(x);
                assert!(units(sin, x.sin()) <= 1.0 && units(cos, x.cos()) <= 1.0, "{x}: {sin} {cos}");
                differ += u32::from(sin != x.sin()) + u32::from(cos != x.cos());
            }
        }
        // Both are within 0.6 units of the truth, so they seldom round to different sides of it.
        assert!(differ < 20_000, "{differ} of 400000 differ");
        assert_eq!(sin_cos(0.0), (0.0, 1.0));
    }
}
