//! Who owns which values, and in which pieces they travel. Pure arithmetic on (values, lanes, world, observers, rank): every rank computes
//! the same plan and checks what it receives against it.
//!
//! Ranks are numbered by their place in the generation: `0..world` own lanes and values; the `observers` after them own nothing and receive
//! every sum.
//!
//! X5: the chunks of all ranks are disjoint, ordered by rank and cover the vector; the pieces of a chunk likewise.

use std::ops::Range;

use stoke_protocol::lanes::{self, Fold, Subtree};

use super::sum::VALUE_BYTES;

/// Chunks begin at multiples of this many values (a cache line), so that ranks never share one.
const ALIGNMENT_VALUES: usize = 16;

/// The largest piece: what a receiver must be ready to hold. More pieces in flight make better pipelines, larger ones fewer headers.
pub const PIECE_VALUES_MAX: usize = 256 * 1024 / VALUE_BYTES;

/// The smallest piece that is worth its header and its wake-ups.
const PIECE_VALUES_MIN: usize = 64 * 1024 / VALUE_BYTES;

/// Values that one fold may add, over all ranks: 8 MiB keep the network thread for about a millisecond. Large worlds have smaller pieces.
const FOLD_VALUES_MAX: usize = 8 * 1024 * 1024 / VALUE_BYTES;

/// Pieces that a chunk should have at least, so that the first sums go out while the last partials still come in.
const PIECES_MIN: usize = 8;

/// The plan of one membership's operations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub values: usize,
    pub lanes: u32,
    pub world: u32,
    pub observers: u32,
    pub rank: u32,
    piece: usize,
    /// The canonical subtrees of all ranks, left to right.
    pub leaves: Vec<Subtree>,
    /// For each rank, its subtrees' positions in `leaves`.
    leaves_of: Vec<Range<usize>>,
    /// The fold of all leaves to the root.
    pub fold: Vec<Fold>,
}

impl Plan {
    pub fn new(values: usize, lanes: u32, (world, observers): (u32, u32), rank: u32) -> Self {
        assert!(world > 0 && rank < world + observers, "X5: rank {rank} of {world} and {observers} observers");
        let mut leaves = Vec::new();
        let leaves_of = lanes::assign(lanes, world)
            .into_iter()
            .map(|owned| {
                let first = leaves.len();
                leaves.extend(lanes::subtrees(owned, lanes));
                first..leaves.len()
            })
            .collect();
        let fold = lanes::fold(Subtree::root(lanes), &leaves);
        let largest = (FOLD_VALUES_MAX / world as usize).clamp(PIECE_VALUES_MIN, PIECE_VALUES_MAX);
        let piece = (values / world as usize / PIECES_MIN).clamp(PIECE_VALUES_MIN, largest);
        let piece = piece.next_multiple_of(ALIGNMENT_VALUES);
        Self { values, lanes, world, observers, rank, piece, leaves, leaves_of, fold }
    }

    /// The values whose sum `rank` computes; none for an observer.
    pub fn chunk(&self, rank: u32) -> Range<usize> {
        self.boundary(rank)..self.boundary(rank + 1)
    }

    /// The positions among `leaves` of the subtrees that `rank` sums; none for an observer.
    pub fn leaves_of(&self, rank: u32) -> Range<usize> {
        self.leaves_of.get(rank as usize).cloned().unwrap_or_default()
    }

    /// The number of pieces of a rank's chunk.
    pub fn pieces(&self, rank: u32) -> usize {
        self.chunk(rank).len().div_ceil(self.piece)
    }

    /// The values of piece `index` of a rank's chunk.
    pub fn piece(&self, rank: u32, index: usize) -> Range<usize> {
        let chunk = self.chunk(rank);
        let start = chunk.start + index * self.piece;
        start..(start + self.piece).min(chunk.end)
    }

    /// All others that own values, the next in rank order first, so that not everybody sends to rank 0 at once.
    pub fn peers(&self) -> impl Iterator<Item = u32> + use<> {
        let (world, rank) = (self.world, self.rank);
        (0..world).map(move |distance| (rank + distance) % world).filter(move |peer| *peer != rank)
    }

    /// All others that receive the sums of this rank's values.
    pub fn listeners(&self) -> impl Iterator<Item = u32> + use<> {
        self.peers().chain(self.world..self.world + self.observers)
    }

    fn boundary(&self, rank: u32) -> usize {
        if rank >= self.world {
            return self.values;
        }
        let even = self.values as u128 * u128::from(rank) / u128::from(self.world);
        even as usize / ALIGNMENT_VALUES * ALIGNMENT_VALUES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_and_pieces_cover_any_vector_once() {
        for values in [0, 1, 15, 16, 17, 100, 1000, 65_537, 3_000_001] {
            for world in [1, 2, 3, 7, 8] {
                let mut next = 0;
                for rank in 0..world {
                    let plan = Plan::new(values, 8, (world, 1), rank);
                    for index in 0..plan.pieces(rank) {
                        let piece = plan.piece(rank, index);
                        assert_eq!(piece.start, next, "{values} values, {world} ranks");
                        assert!((1..=PIECE_VALUES_MAX).contains(&piece.len()));
                        next = piece.end;
                    }
                    assert_eq!(next, plan.chunk(rank).end);
                    assert!(rank + 1 == world || next % ALIGNMENT_VALUES == 0);
                }
                assert_eq!(next, values);
            }
        }
    }

    #[test]
    fn peers_begin_with_the_next_rank() {
        let plan = Plan::new(100, 8, (4, 2), 2);
        assert_eq!(plan.peers().collect::<Vec<_>>(), [3, 0, 1]);
        assert_eq!(plan.listeners().collect::<Vec<_>>(), [3, 0, 1, 4, 5]);
        assert_eq!(Plan::new(100, 8, (1, 0), 0).listeners().count(), 0);
        let observer = Plan::new(100, 8, (2, 1), 2);
        assert_eq!(observer.peers().collect::<Vec<_>>(), [0, 1]);
        assert_eq!((observer.pieces(2), observer.leaves_of(2)), (0, 0..0));
    }
}
