//! Keys and values of the tokens so far, in pages, and attention over them. Owns the layout of a page; which sequence has which pages is its
//! caller's.
//!
//! K4: a value of a row depends on the row's query and on the keys and values up to its position alone: not on the rows beside it, on which pages
//! they lie in, or on whether the tokens before came one by one or many at a time.

use rayon::prelude::*;

use super::activations::Rows;
use super::isa::Isa;
use super::vector::{LANES, by_halves, exp};

/// Keys and values of all layers, in pages of [`Cache::PAGE`] tokens. f32.
#[derive(Debug)]
pub struct Cache {
    layers: usize,
    kv_heads: usize,
    /// Of a head, up to whole lanes.
    width: usize,
    head_size: usize,
    /// Page by page, layer by layer, head by head: keys with the tokens side by side, then values token by token.
    values: Vec<f32>,
}

/// Where a row of a batch stands: which pages its sequence has, and how many tokens were before it.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    pub pages: &'a [u32],
    pub position: usize,
}

/// Heads of the queries, and how the layer scores them.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    pub layer: usize,
    /// Heads of queries that share a head of keys and values.
    pub group: usize,
    /// 1 / sqrt(head size).
    pub scale: f32,
}

impl Cache {
    /// Tokens of a page: a lane each.
    pub const PAGE: usize = LANES;

    pub fn new(layers: usize, (kv_heads, head_size): (usize, usize), pages: usize) -> Self {
        let width = head_size.next_multiple_of(LANES);
        let values = vec![0.0; pages * Self::page_values(layers, (kv_heads, head_size))];
        Self { layers, kv_heads, width, head_size, values }
    }

    /// Bytes of a page.
    pub fn page_bytes(layers: usize, heads: (usize, usize)) -> usize {
        Self::page_values(layers, heads) * size_of::<f32>()
    }

    fn page_values(layers: usize, (kv_heads, head_size): (usize, usize)) -> usize {
        layers * kv_heads * 2 * head_size.next_multiple_of(LANES) * Self::PAGE
    }

    pub fn pages(&self) -> usize {
        self.values.len() / self.values_of_page()
    }

    /// All keys and values of a page.
    pub fn page(&self, page: u32) -> &[f32] {
        let count = self.values_of_page();
        &self.values[page as usize * count..][..count]
    }

    pub fn page_mut(&mut self, page: u32) -> &mut [f32] {
        let count = self.values_of_page();
        &mut self.values[page as usize * count..][..count]
    }

    fn values_of_page(&self) -> usize {
        self.layers * self.kv_heads * 2 * self.width * Self::PAGE
    }

    /// Where the keys of a head begin; the values follow.
    fn at(&self, page: u32, layer: usize, head: usize) -> usize {
        ((page as usize * self.layers + layer) * self.kv_heads + head) * 2 * self.width * Self::PAGE
    }

    fn half(&self) -> usize {
        self.width * Self::PAGE
    }

    /// Keeps the keys and values of one token, all heads one behind the other.
    pub fn put(&mut self, layer: usize, place: Place<'_>, keys: &[f32], values: &[f32]) {
        let (page, slot) = (place.pages[place.position / Self::PAGE], place.position % Self::PAGE);
        let heads = keys.chunks_exact(self.head_size).zip(values.chunks_exact(self.head_size));
        for (head, (keys, values)) in heads.enumerate() {
            let at = self.at(page, layer, head);
            for (dimension, key) in keys.iter().enumerate() {
                self.values[at + dimension * Self::PAGE + slot] = *key;
            }
            let at = at + self.half() + slot * self.width;
            self.values[at..at + self.head_size].copy_from_slice(values);
        }
    }

    /// `out[m]` = for each head, softmax(scale * q k) v over the row's tokens up to its own.
    pub fn attend(&self, isa: Isa, attention: Attention, queries: &Rows, places: &[Place<'_>], out: &mut Rows) {
        out.resize(places.len());
        let group = attention.group * self.head_size;
        let rows = out.values.par_chunks_exact_mut(group).zip(queries.values.par_chunks_exact(group)).enumerate();
        rows.for_each_init(Vec::new, |scores, (at, (out, queries))| {
            let (row, head) = (at / self.kv_heads, at % self.kv_heads);
            let heads = out.chunks_exact_mut(self.head_size).zip(queries.chunks_exact(self.head_size));
            for (out, query) in heads {
                isa.run(
                    #[inline(always)]
                    || self.attend_one((attention, head), query, places[row], scores, out),
                );
            }
        });
    }

    /// One head of one row.
    #[inline(always)]
    fn attend_one(
        &self,
        (attention, head): (Attention, usize),
        query: &[f32],
        place: Place<'_>,
        scores: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let tokens = place.position + 1;
        let pages = &place.pages[..tokens.div_ceil(Self::PAGE)];
        scores.clear();
        for page in pages {
            let at = self.at(*page, attention.layer, head);
            let (keys, _) = self.values[at..at + self.half()].as_chunks::<LANES>();
            let made = score(query, keys, attention.scale);
            scores.extend_from_slice(&made);
        }
        let (_, sum) = soften(&mut scores[..tokens]);
        scores[tokens..].fill(0.0);
        let scale = 1.0 / sum;
        let pages = || {
            let values = pages.iter().map(|page| self.at(*page, attention.layer, head) + self.half());
            values.map(|at| &self.values[at..at + self.half()]).zip(scores.as_chunks::<LANES>().0)
        };
        let mut from = 0;
        while from + 4 * LANES <= out.len() {
            weigh::<4>(pages(), (from, self.width), scale, &mut out[from..]);
            from += 4 * LANES;
        }
        while from < out.len() {
            weigh::<1>(pages(), (from, self.width), scale, &mut out[from..]);
            from += LANES;
        }
    }
}

/// Up to `16 * B` values, from one on, of the weighted sum of all tokens. `B` chains of sums, which do not wait for each other.
#[inline(always)]
fn weigh<'a, const B: usize>(
    pages: impl Iterator<Item = (&'a [f32], &'a [f32; LANES])>,
    (from, width): (usize, usize),
    scale: f32,
    out: &mut [f32],
) {
    let mut lanes = [[0.0f32; LANES]; B];
    for (values, weights) in pages {
        for (values, weight) in values.chunks_exact(width).zip(weights) {
            let (values, _) = values[from..from + B * LANES].as_chunks::<LANES>();
            for (lanes, values) in lanes.iter_mut().zip(values) {
                for lane in 0..LANES {
                    lanes[lane] = weight.mul_add(values[lane], lanes[lane]);
                }
            }
        }
    }
    for (out, value) in out.iter_mut().zip(lanes.as_flattened()) {
        *out = value * scale;
    }
}

/// The products of a query with the keys of a page, times `scale`; a token a lane. Four chains of sums, which do not wait for each other.
#[inline(always)]
fn score(query: &[f32], keys: &[[f32; LANES]], scale: f32) -> [f32; LANES] {
    let mut lanes = [[0.0f32; LANES]; 4];
    let (query, rest) = query.as_chunks::<4>();
    // Behind a head's dimensions keys have empty ones, up to whole lanes.
    let (keys, keys_rest) = (keys[..4 * query.len()].as_chunks::<4>().0, &keys[4 * query.len()..]);
    for (query, keys) in query.iter().zip(keys) {
        for chain in 0..4 {
            for lane in 0..LANES {
                lanes[chain][lane] = query[chain].mul_add(keys[chain][lane], lanes[chain][lane]);
            }
        }
    }
    for (query, keys) in rest.iter().zip(keys_rest) {
        for lane in 0..LANES {
            lanes[0][lane] = query.mul_add(keys[lane], lanes[0][lane]);
        }
    }
    let mut scores = [0.0; LANES];
    for lane in 0..LANES {
        scores[lane] = ((lanes[0][lane] + lanes[1][lane]) + (lanes[2][lane] + lanes[3][lane])) * scale;
    }
    scores
}

/// Each score to e^(score - largest); gives the largest, and their sum.
#[inline(always)]
pub fn soften(scores: &mut [f32]) -> (f32, f32) {
    let (whole, rest) = scores.as_chunks_mut::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for scores in whole.iter() {
        for lane in 0..LANES {
            lanes[lane] = if scores[lane] > lanes[lane] { scores[lane] } else { lanes[lane] };
        }
    }
    let all = lanes.iter().chain(rest.iter());
    let largest = all.fold(f32::NEG_INFINITY, |largest, score| if *score > largest { *score } else { largest });
    let mut lanes = [0.0f32; LANES];
    for scores in whole {
        for lane in 0..LANES {
            scores[lane] = exp(scores[lane] - largest);
            lanes[lane] += scores[lane];
        }
    }
    for (lane, score) in rest.iter_mut().enumerate() {
        *score = exp(*score - largest);
        lanes[lane] += *score;
    }
    (largest, by_halves(lanes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a head: no whole number of lanes, nor of chains.
    const HEAD: usize = 22;

    /// Tokens of two heads, in pages that lie in no order.
    fn filled(tokens: usize, pages: &[u32]) -> Cache {
        let mut cache = Cache::new(2, (2, HEAD), 8);
        for position in 0..tokens {
            let value = |at: usize| ((position * 31 + at * 17) % 97) as f32 / 50.0 - 1.0;
            let keys: Vec<f32> = (0..2 * HEAD).map(value).collect();
            let values: Vec<f32> = (2 * HEAD..4 * HEAD).map(value).collect();
            cache.put(1, Place { pages, position }, &keys, &values);
        }
        cache
    }

    fn attended(isa: Isa, tokens: usize, pages: &[u32], positions: &[usize]) -> Rows {
        let cache = filled(tokens, pages);
        let (mut queries, mut out) = (Rows::new(4 * HEAD), Rows::new(4 * HEAD));
        queries.resize(positions.len());
        for (row, position) in positions.iter().enumerate() {
            let query = (0..4 * HEAD).map(|at| ((position * 7 + at * 13) % 89) as f32 / 40.0 - 1.0);
            queries.row_mut(row).iter_mut().zip(query).for_each(|(to, value)| *to = value);
        }
        let places: Vec<Place<'_>> = positions.iter().map(|position| Place { pages, position: *position }).collect();
        let attention = Attention { layer: 1, group: 2, scale: 1.0 / (HEAD as f32).sqrt() };
        cache.attend(isa, attention, &queries, &places, &mut out);
        out
    }

    #[test]
    fn attention_is_the_weighted_mean_of_the_values() {
        let (pages, positions) = ([5, 2, 7], [0, 15, 16, 40]);
        let out = attended(Isa::best(), 41, &pages, &positions);
        for (row, position) in positions.iter().enumerate() {
            for head in 0..4usize {
                let value = |token: usize, at: usize| f64::from(((token * 31 + at * 17) % 97) as f32 / 50.0 - 1.0);
                let query = |at: usize| f64::from(((position * 7 + (head * HEAD + at) * 13) % 89) as f32 / 40.0 - 1.0);
                let kv = head / 2 * HEAD;
                let weight = |token: usize| {
                    let score: f64 = (0..HEAD).map(|at| query(at) * value(token, kv + at)).sum();
                    (score / (HEAD as f64).sqrt()).exp()
                };
                let weights: Vec<f64> = (0..=*position).map(weight).collect();
                let whole: f64 = weights.iter().sum();
                for at in 0..HEAD {
                    let mean: f64 =
                        (0..=*position).map(|token| weights[token] * value(token, 2 * HEAD + kv + at)).sum();
                    let found = f64::from(out.row(row)[head * HEAD + at]);
                    assert!((found - mean / whole).abs() < 1e-6, "row {row} head {head} value {at}: {found}");
                }
            }
        }
    }

    #[test]
    fn attention_has_the_same_bits_alone_in_other_pages_and_on_every_instruction_set() {
        let bits = |rows: &Rows, row: usize| rows.row(row).iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let best = Isa::best();
        let together = attended(best, 41, &[5, 2, 7], &[3, 16, 40]);
        // Keys and values behind the position do not count.
        assert_eq!(bits(&together, 1), bits(&attended(best, 17, &[0, 1], &[16]), 0));
        for isa in Isa::available() {
            assert_eq!(bits(&together, 2), bits(&attended(isa, 41, &[1, 3, 4], &[40]), 0));
        }
    }
}
