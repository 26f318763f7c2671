//! Exponential, logarithm and hyperbolic tangent that have the same bits on every processor and C library: a rollout that is played again on
//! another machine must choose the same actions. Plain multiplications and additions in a fixed order, without a branch where loops are to become
//! vector code. Coefficients of Cephes (Moshier, 1989: `expf`), fdlibm (`e_log.c`) and Eigen (`ptanh`).

/// exp(x), within 2 units of the last place between -87 and 88; beyond, the value at the nearer end.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // 1.5 * 2^23: leaves the nearest whole number in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * (r * r) + r + 1.0;
    let scale = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    y * scale
}

/// tanh(x), within 4e-7 of its value, relative.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let x = x.clamp(-7.905_311, 7.905_311);
    let z = x * x;
    let p = -2.760_768_5e-16;
    let p = p * z + 2.000_188e-13;
    let p = p * z + -8.604_672e-11;
    let p = p * z + 5.122_297e-8;
    let p = p * z + 1.485_722_4e-5;
    let p = p * z + 6.372_619e-4;
    let p = p * z + 4.893_524_6e-3;
    let q = 1.198_258_4e-6;
    let q = q * z + 1.185_347_1e-4;
    let q = q * z + 2.268_434_6e-3;
    let q = q * z + 4.893_525e-3;
    x * p / q
}

/// The natural logarithm of a positive, normal number, within 1 unit of the last place.
pub(crate) fn ln(x: f64) -> f64 {
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    let bits = x.to_bits();
    let mut k = (bits >> 52) as i64 - 1023;
    let mut f = f64::from_bits(bits & 0x000f_ffff_ffff_ffff | 0x3ff0_0000_0000_0000);
    if f > std::f64::consts::SQRT_2 {
        f *= 0.5;
        k += 1;
    }
    let f = f - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    let w = z * z;
    let odd = w * (3.999_999_999_940_942e-1 + w * (2.222_219_843_214_978_4e-1 + w * 1.531_383_769_920_937_3e-1));
    let even = z
        * (6.666_666_666_666_735e-1
            + w * (2.857_142_874_366_239e-1 + w * (1.818_357_216_161_805e-1 + w * 1.479_819_860_511_658_6e-1)));
    let r = odd + even;
    let half = 0.5 * f * f;
    let k = k as f64;
    k * LN2_HIGH - ((half - (s * (half + r) + k * LN2_LOW)) - f)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_near_the_true_ones() {
        let (mut exp_off, mut tanh_off, mut ln_off) = (0f64, 0f64, 0f64);
        for step in -400_000..400_000 {
            let x = step as f32 * 2.1e-4;
            let truth = f64::from(x).exp();
            exp_off = exp_off.max((f64::from(exp(x)) / truth - 1.0).abs());
            let x = step as f32 * 5e-5;
            let truth = f64::from(x).tanh();
            if step != 0 {
                tanh_off = tanh_off.max((f64::from(tanh(x)) / truth - 1.0).abs());
            }
            let x = f64::exp(f64::from(step) * 1e-4);
            ln_off = ln_off.max((ln(x) - x.ln()).abs() / x.ln().abs().max(1e-3));
        }
        assert!(exp_off < 2.5e-7, "{exp_off:e}");
        assert!(tanh_off < 4e-7, "{tanh_off:e}");
        assert!(ln_off < 3e-16, "{ln_off:e}");
        assert_eq!((exp(0.0), tanh(0.0), ln(1.0)), (1.0, 0.0, 0.0));
        assert!(exp(-1e9) > 0.0 && exp(f32::INFINITY).is_finite() && exp(f32::NAN).is_nan());
    }
}
