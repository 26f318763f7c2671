//! A set of values by their places: which of a vector are being sent, which are complete. Pure.

use std::ops::Range;

/// Disjoint ranges in order; those that touch are one. Empty ranges leave no trace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(Vec<Range<usize>>);

impl Ranges {
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Adds a range, whatever of it is there already.
    pub fn insert(&mut self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        let first = self.0.partition_point(|own| own.end < range.start);
        let behind = first + self.0[first..].partition_point(|own| own.start <= range.end);
        let touched = &self.0[first..behind];
        let start = touched.first().map_or(range.start, |own| own.start.min(range.start));
        let end = touched.last().map_or(range.end, |own| own.end.max(range.end));
        self.0.splice(first..behind, std::iter::once(start..end));
    }

    /// Whether a range is there from end to end.
    pub fn contain(&self, range: &Range<usize>) -> bool {
        let first = self.0.partition_point(|own| own.end < range.end);
        range.is_empty() || self.0.get(first).is_some_and(|own| own.start <= range.start)
    }

    /// Whether anything of a range is there.
    pub fn touch(&self, range: &Range<usize>) -> bool {
        let first = self.0.partition_point(|own| own.end <= range.start);
        !range.is_empty() && self.0.get(first).is_some_and(|own| own.start < range.end)
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn ranges_hold_what_was_inserted() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(12);
        for _ in 0..200 {
            let (mut ranges, mut plain) = (Ranges::default(), [false; 40]);
            let range = |rng: &mut rand_chacha::ChaCha8Rng| {
                let start = rng.random_range(0..=40);
                start..rng.random_range(start..=40)
            };
            for _ in 0..rng.random_range(0..12) {
                let inserted = range(&mut rng);
                plain[inserted.clone()].fill(true);
                ranges.insert(inserted);
                let asked = range(&mut rng);
                let of = &plain[asked.clone()];
                assert_eq!(ranges.contain(&asked), of.iter().all(|there| *there), "{ranges:?} of {asked:?}");
                assert_eq!(ranges.touch(&asked), of.iter().any(|there| *there), "{ranges:?} of {asked:?}");
                assert!(ranges.0.windows(2).all(|pair| pair[0].end < pair[1].start), "{ranges:?}");
            }
            ranges.clear();
            assert_eq!(ranges, Ranges::default());
        }
    }
}
