//! Products with weights. Burn's own ones fill and copy each result once more.

use super::product::{Matrix, multiplied};

/// `x` [rows, inner] times `weight`, which is [inner, columns], or [columns, inner] where it is `turned`.
pub(super) fn forward(x: &[f32], weight: &[f32], (inner, columns): (usize, usize), turned: bool) -> Vec<f32> {
    multiplied(Matrix::rows(x, inner), stood(weight, (inner, columns), turned), (x.len() / inner, inner, columns))
}

/// The gradient of `x` from that of the result.
pub(super) fn of_x(gradient: &[f32], weight: &[f32], (inner, columns): (usize, usize), turned: bool) -> Vec<f32> {
    let weight = stood(weight, (inner, columns), turned).transposed();
    multiplied(Matrix::rows(gradient, columns), weight, (gradient.len() / columns, columns, inner))
}

/// The gradient of the weight, which stands as it does.
pub(super) fn of_weight(x: &[f32], gradient: &[f32], (inner, columns): (usize, usize), turned: bool) -> Vec<f32> {
    let rows = x.len() / inner;
    let (x, gradient) = (Matrix::rows(x, inner), Matrix::rows(gradient, columns));
    match turned {
        false => multiplied(x.transposed(), gradient, (inner, rows, columns)),
        true => multiplied(gradient.transposed(), x, (columns, rows, inner)),
    }
}

/// [inner, columns].
fn stood(weight: &[f32], (inner, columns): (usize, usize), turned: bool) -> Matrix<'_> {
    match turned {
        false => Matrix::rows(weight, columns),
        true => Matrix::rows(weight, inner).transposed(),
    }
}
