//! GELU as BERT has it, with the exact error function (Hendrycks and Gimpel 2016; PyTorch's `gelu` without approximation).

use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use super::isa::Isa;

/// `x = x * (1 + erf(x / sqrt(2))) / 2`. Within 3e-7 times the size of x, or 1 if that is larger.
pub fn gelu(isa: Isa, x: &mut [f32]) {
    isa.run(
        #[inline(always)]
        || {
            for x in x {
                *x = 0.5 * *x * (1.0 + erf(*x * FRAC_1_SQRT_2));
            }
        },
    );
}

/// erf(x) within 4 units in the last place (4.8e-7 of its size): x P(x^2) / Q(x^2), fitted by least squares with weights until the largest error
/// was least (1.9e-8 before rounding). Where |x| is above 3.925 it is 1 in f32. No branches, so that it is computed for many values at once.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    const P: [f32; 6] = [2.046_019e-6, 2.848_416_6e-4, 3.772_513_7e-3, 5.276_918e-2, 1.905_930_6e-1, FRAC_2_SQRT_PI];
    const Q: [f32; 6] = [3.804_759e-5, 1.163_847e-3, 1.498_312_5e-2, 1.141_824_1e-1, 5.022_414_3e-1, 1.0];
    // Not `clamp`: what is not a number stays so.
    let low = if x < -3.925 { -3.925 } else { x };
    let x = if low > 3.925 { 3.925 } else { low };
    let square = x * x;
    let (mut p, mut q) = (P[0], Q[0]);
    for (over, under) in P[1..].iter().zip(&Q[1..]) {
        p = p.mul_add(square, *over);
        q = q.mul_add(square, *under);
    }
    let found = x * p / q;
    let found = if found < -1.0 { -1.0 } else { found };
    if found > 1.0 { 1.0 } else { found }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2 / sqrt(pi) e^(-x^2) times the sum of 2^n x^(2n + 1) / (1 * 3 * ... * (2n + 1)): no term is negative, so nothing is lost.
    fn exact(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= 2.0 * x * x / f64::from(2 * n + 1);
            sum += term;
        }
        std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
    }

    #[test]
    fn error_functions_are_within_four_units_in_the_last_place() {
        for at in 1..=60_000 {
            let x = at as f32 * 1e-4;
            let exact = exact(f64::from(x));
            let error = (f64::from(erf(x)) - exact).abs() / exact;
            assert!(error <= 4.0 * f64::from(f32::EPSILON), "erf({x}): {} and {exact}", erf(x));
            assert_eq!(erf(-x).to_bits(), (-erf(x)).to_bits());
        }
        assert_eq!((erf(0.0), erf(1e9), erf(f32::NEG_INFINITY)), (0.0, 1.0, -1.0));
        assert!(erf(f32::NAN).is_nan());
    }

    #[test]
    fn gelu_is_exact_and_has_the_same_bits_on_every_instruction_set() {
        let x: Vec<f32> = (-5_000..5_000).map(|at| at as f32 * 1.7e-3).collect();
        let made = Isa::available().into_iter().map(|isa| {
            let mut made = x.clone();
            gelu(isa, &mut made);
            made
        });
        let made: Vec<Vec<f32>> = made.collect();
        for (at, x) in x.iter().enumerate() {
            let wide = f64::from(*x);
            let sign = if wide < 0.0 { -1.0 } else { 1.0 };
            let expected = 0.5 * wide * (1.0 + sign * exact(wide.abs() * std::f64::consts::FRAC_1_SQRT_2));
            assert!((f64::from(made[0][at]) - expected).abs() <= 3e-7 * wide.abs().max(1.0), "{x}: {}", made[0][at]);
            assert!(made.iter().all(|other| other[at].to_bits() == made[0][at].to_bits()), "{x}");
        }
    }
}
