//! The one tree in which partial sums over a matrix's columns are added (K3), and which of its nodes a share of the columns makes. Pure arithmetic;
//! moves nothing.
//!
//! K3: a value that is a sum over columns is the sum of one partial sum for each head of keys and values, in a binary tree whose left half is the
//! largest power of two below the number of leaves. A share has a contiguous range of leaves; it adds what lies below the largest nodes inside
//! its range, and whoever adds those nodes of all shares adds the same numbers in the same order as one that has all.

use std::ops::Range;

use super::kernels::{Isa, Rows, add};

/// The nodes of the tree over `leaves` that lie wholly in `owned` and in no larger one that does, from left to right.
pub fn subtrees(leaves: usize, owned: &Range<usize>) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    collect(0..leaves, owned, &mut found);
    found
}

fn collect(node: Range<usize>, owned: &Range<usize>, found: &mut Vec<Range<usize>>) {
    if node.end <= owned.start || owned.end <= node.start {
        return;
    }
    if owned.start <= node.start && node.end <= owned.end {
        return found.push(node);
    }
    let (left, right) = halves(&node);
    collect(left, owned, found);
    collect(right, owned, found);
}

/// The two nodes below one of more than one leaf.
fn halves(node: &Range<usize>) -> (Range<usize>, Range<usize>) {
    let middle = node.start + node.len().next_power_of_two() / 2;
    (node.start..middle, middle..node.end)
}

/// The leaves of a share: contiguous, and as equal as they can be, the first ones larger.
pub fn owned(leaves: usize, part: usize, parts: usize) -> Range<usize> {
    let (each, extra) = (leaves / parts, leaves % parts);
    let start = |part: usize| part * each + part.min(extra);
    start(part)..start(part + 1)
}

/// The sum at the root, from the nodes of all shares: `partials[part]` are those of [`subtrees`] of the share, each as many rows. Left in the first
/// of the first share. Whose nodes are no cover of the tree gets nothing: `None`.
pub fn root(leaves: usize, partials: &mut [Vec<Rows>]) -> Option<()> {
    let parts = partials.len();
    let nodes = (0..parts).flat_map(|part| subtrees(leaves, &owned(leaves, part, parts)).into_iter());
    let nodes: Vec<Range<usize>> = nodes.collect();
    let mut rows: Vec<&mut Rows> = partials.iter_mut().flatten().collect();
    let first = rows.first()?.values.len();
    if rows.len() != nodes.len() || rows.iter().any(|rows| rows.values.len() != first) {
        return None;
    }
    fold(0..leaves, &nodes, &mut rows);
    Some(())
}

/// Adds all of a node into the first of its rows, which are those of the `nodes` that cover it.
fn fold(node: Range<usize>, nodes: &[Range<usize>], rows: &mut [&mut Rows]) {
    if nodes.len() == 1 {
        return;
    }
    let (left, right) = halves(&node);
    let cut = nodes.partition_point(|node| node.end <= left.end);
    let (left_rows, right_rows) = rows.split_at_mut(cut);
    fold(left, &nodes[..cut], left_rows);
    fold(right, &nodes[cut..], right_rows);
    add(Isa::best(), &mut left_rows[0].values, &right_rows[0].values);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums that round: their order shows.
    fn leaf(at: usize) -> f32 {
        ((at * 7_919 + 13) % 1_009) as f32 / 3.0 * 10f32.powi(at as i32 % 7 - 3)
    }

    fn whole(node: Range<usize>) -> f32 {
        if node.len() == 1 {
            return leaf(node.start);
        }
        let (left, right) = halves(&node);
        whole(left) + whole(right)
    }

    #[test]
    fn every_number_of_shares_adds_in_the_same_order() {
        for leaves in 1..=20 {
            for parts in 1..=leaves {
                let share = |part| {
                    let nodes = subtrees(leaves, &owned(leaves, part, parts));
                    assert!(!nodes.is_empty());
                    let rows = nodes.into_iter().map(|node| {
                        let mut rows = Rows::new(1);
                        rows.values = vec![whole(node)];
                        rows
                    });
                    rows.collect::<Vec<_>>()
                };
                let mut partials: Vec<Vec<Rows>> = (0..parts).map(share).collect();
                root(leaves, &mut partials).unwrap();
                let found = partials[0][0].values[0];
                assert_eq!(found.to_bits(), whole(0..leaves).to_bits(), "{leaves} leaves over {parts} shares");
                partials[0].push(Rows::new(1));
                assert_eq!(root(leaves, &mut partials), None, "one too many");
            }
        }
        assert_eq!(subtrees(8, &(3..8)), [3..4, 4..8]);
        assert_eq!(root(3, &mut []), None);
    }
}
