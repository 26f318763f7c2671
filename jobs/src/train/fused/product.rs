//! Products of matrices that lie in slices.

use gemm::Parallelism;

/// A matrix in a slice: its first value, and the steps from row to row and from column to column.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    values: &'a [f32],
    row: usize,
    column: usize,
}

impl<'a> Matrix<'a> {
    /// Row by row, `width` apart.
    pub fn rows(values: &'a [f32], width: usize) -> Self {
        Self { values, row: width, column: 1 }
    }

    pub fn transposed(self) -> Self {
        Self { row: self.column, column: self.row, ..self }
    }

    fn has(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row + (columns - 1) * self.column < self.values.len()
    }
}

/// `out` = (`out` where it `adds`) + a b, for a of [rows, inner] and b of [inner, columns]; rows of `out` are `width` apart. On this thread.
pub(super) fn multiply(
    (out, width, adds): (&mut [f32], usize, bool),
    a: Matrix<'_>,
    b: Matrix<'_>,
    size: (usize, usize, usize),
) {
    let (rows, _, columns) = size;
    assert!(rows == 0 || (rows - 1) * width + columns <= out.len(), "the result has room");
    // SAFETY: `out` has the room, and is nobody else's.
    unsafe { product((out.as_mut_ptr(), width, adds), a, b, size, Parallelism::None) }
}

/// a b, for a of [rows, inner] and b of [inner, columns], row by row. On all threads of the pool, with the same bits for any number.
pub(super) fn multiplied(a: Matrix<'_>, b: Matrix<'_>, size: (usize, usize, usize)) -> Vec<f32> {
    let (rows, _, columns) = size;
    let mut out = Vec::with_capacity(rows * columns);
    let threads = match rayon::current_num_threads() {
        1 => Parallelism::None,
        more => Parallelism::Rayon(more),
    };
    // SAFETY: there is room for the product, which is written whole and not read before; its length is set when it is there.
    unsafe {
        product((out.as_mut_ptr(), columns, false), a, b, size, threads);
        out.set_len(rows * columns);
    }
    out
}

/// # Safety
/// `out` points to room for the product, whose rows are `width` apart; it holds values where the product `adds` to them.
unsafe fn product(
    (out, width, adds): (*mut f32, usize, bool),
    a: Matrix<'_>,
    b: Matrix<'_>,
    (rows, inner, columns): (usize, usize, usize),
    threads: Parallelism,
) {
    assert!(inner > 0 && a.has(rows, inner) && b.has(inner, columns), "operands are whole");
    let step = |step: usize| step as isize;
    // SAFETY: the operands lie in their slices, as was just checked; the rest is the caller's.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            inner,
            out,
            1,
            step(width),
            adds,
            a.values.as_ptr(),
            step(a.column),
            step(a.row),
            b.values.as_ptr(),
            step(b.column),
            step(b.row),
            1.0,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}
