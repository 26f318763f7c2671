//! Attention in which every token sees every token of its own text: an encoder's. Owns nothing between calls.
//!
//! Texts lie one behind the other as rows of one batch, without padding. K6: a value of a row depends on the rows of its own text alone.

use std::ops::Range;

use rayon::prelude::*;

use super::activations::Rows;
use super::attend::soften;
use super::isa::Isa;
use super::panels::{Left, Panels, Right};

/// Queries that are scored at a time: their scores stay in the first cache.
const TILE: usize = 8;

/// What one thread works on.
#[derive(Default)]
struct Room {
    keys: Panels,
    values: Panels,
    scores: Vec<f32>,
}

/// `out[m]` = for each of the heads, softmax(q k / sqrt(size)) v over all rows of the same text. `x`: a row's queries of all heads, then the keys, then
/// the values. `texts`: rows of each, none empty, all rows together.
pub fn attend_all(isa: Isa, x: &Rows, (heads, size): (usize, usize), texts: &[Range<usize>], out: &mut Rows) {
    let width = heads * size;
    assert_eq!((x.width, out.width), (3 * width, width), "K2: shapes fit");
    assert_eq!(texts.last().map_or(0, |text| text.end), x.len(), "K2: a text for each row");
    assert!(texts.windows(2).all(|pair| pair[0].end == pair[1].start), "K2: texts do not overlap");
    out.resize(x.len());
    let to = Right { values: out.values.as_mut_ptr(), stride: width };
    (0..texts.len() * heads).into_par_iter().for_each_init(Room::default, |room, task| {
        let (text, at) = (&texts[task / heads], task % heads * size);
        // SAFETY: inside of `out`; these columns of these rows are this task's alone.
        let to = unsafe { to.at(text.start * width + at) };
        // SAFETY: as above.
        unsafe { one_head(isa, (x, at, size), text, room, to) };
    });
}

/// # Safety
/// `out` has `size` values for each row of the text, and nobody else reads or writes them.
unsafe fn one_head(
    isa: Isa,
    (x, at, size): (&Rows, usize, usize),
    text: &Range<usize>,
    Room { keys, values, scores }: &mut Room,
    out: Right,
) {
    let (width, tokens, scale) = (x.width / 3, text.len(), 1.0 / (size as f32).sqrt());
    keys.fill_columns(size, text.clone().map(|row| &x.row(row)[width + at..][..size]));
    values.fill_rows(size, text.clone().map(|row| &x.row(row)[2 * width + at..][..size]));
    scores.clear();
    scores.resize(TILE * tokens, 0.0);
    for from in (0..tokens).step_by(TILE) {
        let rows = (tokens - from).min(TILE);
        let queries = Left { values: &x.values[(text.start + from) * x.width + at..], stride: x.width, rows };
        let made = Right { values: scores.as_mut_ptr(), stride: tokens };
        for panel in 0..keys.len() {
            // SAFETY: there is a row of scores for each query.
            unsafe { keys.times(isa, queries, panel, None, made) };
        }
        let mut sums = [0.0f32; TILE];
        for (scores, sum) in scores.chunks_exact_mut(tokens).zip(&mut sums[..rows]) {
            *sum = isa.run(
                #[inline(always)]
                || {
                    scores.iter_mut().for_each(
                        #[inline(always)]
                        |score| *score *= scale,
                    );
                    soften(scores).1
                },
            );
        }
        let weights = Left { values: scores, stride: tokens, rows };
        for panel in 0..values.len() {
            // SAFETY: the caller's.
            unsafe {
                values.times(isa, weights, panel, None, out.at(from * out.stride));
            }
        }
        for (row, sum) in sums[..rows].iter().enumerate() {
            // SAFETY: the caller's.
            let out = unsafe { std::slice::from_raw_parts_mut(out.at((from + row) * out.stride).values, size) };
            out.iter_mut().for_each(|value| *value /= sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: (usize, usize) = (2, 22);

    fn batch(rows: usize) -> Rows {
        let width = 3 * HEADS.0 * HEADS.1;
        let values = (0..rows * width).map(|at| ((at * 31 + at / 97 * 17) % 97) as f32 / 40.0 - 1.2);
        let mut rows = Rows::new(width);
        rows.values = values.collect();
        rows
    }

    fn attended(isa: Isa, x: &Rows, texts: &[Range<usize>]) -> Rows {
        let mut out = Rows::new(HEADS.0 * HEADS.1);
        attend_all(isa, x, HEADS, texts, &mut out);
        out
    }

    #[test]
    fn attention_is_the_weighted_mean_of_the_values_of_the_text() {
        let (x, width) = (batch(40), HEADS.0 * HEADS.1);
        let texts = [0..1, 1..20, 20..40];
        let out = attended(Isa::best(), &x, &texts);
        for text in texts {
            for row in text.clone() {
                for at in 0..width {
                    let head = at / HEADS.1 * HEADS.1;
                    let value = |row: usize, at: usize| f64::from(x.row(row)[at]);
                    let weight = |other: usize| {
                        let products = (head..head + HEADS.1).map(|at| value(row, at) * value(other, width + at));
                        (products.sum::<f64>() / (HEADS.1 as f64).sqrt()).exp()
                    };
                    let whole: f64 = text.clone().map(weight).sum();
                    let sum: f64 = text.clone().map(|other| weight(other) * value(other, 2 * width + at)).sum();
                    let found = out.row(row)[at];
                    assert!((f64::from(found) - sum / whole).abs() < 2e-6, "row {row} value {at}: {found}");
                }
            }
        }
    }

    #[test]
    fn attention_has_the_same_bits_alone_beside_others_and_on_every_instruction_set() {
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let (x, texts) = (batch(40), [0..7, 7..24, 24..40]);
        let whole = attended(Isa::best(), &x, &texts);
        for isa in Isa::available() {
            assert_eq!(bits(&attended(isa, &x, &texts).values), bits(&whole.values), "{isa:?}");
        }
        let mut alone = Rows::new(x.width);
        alone.values = x.values[7 * x.width..24 * x.width].to_vec();
        let made = attended(Isa::best(), &alone, std::slice::from_ref(&(0..17)));
        assert_eq!(bits(&made.values), bits(&whole.values[7 * whole.width..24 * whole.width]));
    }
}
