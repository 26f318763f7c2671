//! Who owns which values, who deals with whom about them, and in which pieces they travel. Pure arithmetic on (values, lanes, world, observers, hosts,
//! rank): every rank computes the same plan and checks what it receives against it.
//!
//! Ranks are numbered by their place in the generation: `0..world` own lanes and values; the `observers` after them own nothing and receive
//! every sum.
//!
//! X5: the pieces of all ranks are disjoint and cover the vector. They are dealt in turn from its end to its beginning, because backward computes the gradients
//! of the last layers first: while it runs, every rank has pieces to send and to add. What stands behind the gradients is known last and comes last.
//! X16: between two hosts each value goes once each way for each of the host's subtrees, whatever ranks they have: a host speaks with an owner
//! by one of its ranks, the delegate, which gives the host's own sums and brings the sum of all back.

use std::ops::Range;

use stoke_protocol::lanes::{self, Fold, Subtree};

use super::sum::VALUE_BYTES;

/// Pieces begin at multiples of this many values (a cache line), so that ranks do not share one (but the first of the tail).
const ALIGNMENT_VALUES: usize = 16;

/// The largest piece: what a receiver must be ready to hold. More pieces in flight make better pipelines, larger ones fewer headers.
pub const PIECE_VALUES_MAX: usize = 256 * 1024 / VALUE_BYTES;

/// The smallest piece that is worth its header and its wake-ups.
const PIECE_VALUES_MIN: usize = 64 * 1024 / VALUE_BYTES;

/// Values that one fold may add, over all partial sums: 8 MiB keep the network thread for about a millisecond. Large worlds have smaller pieces.
const FOLD_VALUES_MAX: usize = 8 * 1024 * 1024 / VALUE_BYTES;

/// Pieces that a rank should have at least, so that the first sums go out while the last partials still come in.
const PIECES_MIN: usize = 8;

/// The members by the memory that they share: the places of each host's ranks in order, hosts by their first. A rank that shares none is a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hosts(Vec<Vec<u32>>);

impl Hosts {
    /// Each of so many ranks by itself.
    pub fn alone(world: u32) -> Self {
        Self((0..world).map(|rank| vec![rank]).collect())
    }

    /// Ranks of one machine together; one that names none is by itself.
    pub fn of<M: PartialEq>(machines: impl IntoIterator<Item = Option<M>>) -> Self {
        let mut hosts: Vec<(Option<M>, Vec<u32>)> = Vec::new();
        for (rank, machine) in (0..).zip(machines) {
            match hosts.iter_mut().find(|(of, _)| machine.is_some() && *of == machine) {
                Some((_, ranks)) => ranks.push(rank),
                None => hosts.push((machine, vec![rank])),
            }
        }
        Self(hosts.into_iter().map(|(_, ranks)| ranks).collect())
    }

    /// The same, but that ranks of a host where one lacks the memory are each by itself.
    pub fn without(self, lacks: impl Fn(u32) -> bool) -> Self {
        let mut hosts = Vec::new();
        for ranks in self.0 {
            if ranks.iter().any(|rank| lacks(*rank)) {
                hosts.extend(ranks.into_iter().map(|rank| vec![rank]));
            } else {
                hosts.push(ranks);
            }
        }
        hosts.sort_unstable();
        Self(hosts)
    }
}

/// The plan of one membership's operations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub values: usize,
    /// Those of them that are known early: the first.
    gradients: usize,
    pub lanes: u32,
    pub world: u32,
    pub observers: u32,
    pub rank: u32,
    /// Pieces that the gradients are cut into.
    pieces: usize,
    /// The most values of what is behind them that a piece has.
    tail_piece: usize,
    hosts: Vec<Vec<u32>>,
    /// For each rank, the position of its host.
    host_of: Vec<usize>,
    /// What this rank folds to the sums of its pieces, left to right: the canonical subtrees of each rank of its own host, and those of each other host.
    pub leaves: Vec<Subtree>,
    /// For each host, the positions in `leaves` of what it gives.
    leaves_of_host: Vec<Vec<usize>>,
    /// The fold of all leaves to the root.
    pub fold: Vec<Fold>,
    /// What this rank's host gives to the others, whoever of it: its own canonical subtrees, each with the positions among `own_leaves` that it is folded from.
    pub host_sums: Vec<(Subtree, Range<usize>)>,
}

impl Plan {
    /// For vectors of so many values, the last `tail` of which are in pieces of their own.
    pub fn new(
        (values, tail): (usize, usize),
        lanes: u32,
        (world, observers): (u32, u32),
        rank: u32,
        hosts: &Hosts,
    ) -> Self {
        assert!(world > 0 && rank < world + observers, "X5: rank {rank} of {world} and {observers} observers");
        let hosts = hosts.0.clone();
        let mut host_of = vec![0; world as usize];
        for (host, ranks) in hosts.iter().enumerate() {
            ranks.iter().for_each(|rank| host_of[*rank as usize] = host);
        }
        let lanes_of = lanes::assign(lanes, world);
        let own = host_of.get(rank as usize).copied();
        let mut leaves: Vec<(Subtree, usize)> = Vec::new();
        for (host, ranks) in hosts.iter().enumerate() {
            let owned = ranks.iter().map(|rank| lanes_of[*rank as usize].clone());
            let owned = if own == Some(host) { owned.collect() } else { joined(owned) };
            leaves.extend(owned.into_iter().flat_map(|range| lanes::subtrees(range, lanes)).map(|leaf| (leaf, host)));
        }
        leaves.sort_unstable();
        let mut leaves_of_host = vec![Vec::new(); hosts.len()];
        leaves.iter().enumerate().for_each(|(position, (_, host))| leaves_of_host[*host].push(position));
        let leaves: Vec<Subtree> = leaves.iter().map(|(leaf, _)| *leaf).collect();
        let host_sums = own.map_or_else(Vec::new, |host| {
            let owned = joined(hosts[host].iter().map(|rank| lanes_of[*rank as usize].clone()));
            let subtrees = owned.into_iter().flat_map(|range| lanes::subtrees(range, lanes));
            let mut next = 0;
            let folded = subtrees.map(|subtree| {
                let within = |position: &&usize| subtree.lanes().contains(&leaves[**position].start);
                let first = next;
                next += leaves_of_host[host][first..].iter().take_while(within).count();
                (subtree, first..next)
            });
            folded.collect()
        });
        let fold = lanes::fold(Subtree::root(lanes), &leaves);
        // About as many as a rank folds: equal on all ranks.
        let partials = hosts.len() + hosts.iter().map(Vec::len).max().unwrap_or(0);
        let largest = (FOLD_VALUES_MAX / partials).clamp(PIECE_VALUES_MIN, PIECE_VALUES_MAX);
        let gradients = values - tail;
        let piece = (gradients / world as usize / PIECES_MIN).clamp(PIECE_VALUES_MIN, largest);
        // As many for each rank, or one for as many as there are values for.
        let rounds = gradients.div_ceil(world as usize * (piece - ALIGNMENT_VALUES)).max(1);
        let most = (gradients / ALIGNMENT_VALUES).max(gradients.min(1));
        let pieces = (world as usize * rounds).min(most);
        Self {
            values,
            gradients,
            lanes,
            world,
            observers,
            rank,
            pieces,
            tail_piece: largest,
            hosts,
            host_of,
            leaves,
            leaves_of_host,
            fold,
            host_sums,
        }
    }

    /// The number of pieces whose sums `rank` computes; none for an observer.
    pub fn pieces(&self, rank: u32) -> usize {
        let (all, rank, world) = (self.all_pieces(), rank as usize, self.world as usize);
        if rank < world { all.saturating_sub(rank).div_ceil(world) } else { 0 }
    }

    /// The values of a rank's piece.
    pub fn piece(&self, rank: u32, index: usize) -> Range<usize> {
        let number = index * self.world as usize + rank as usize;
        match number.checked_sub(self.pieces) {
            None => self.boundary(self.pieces - 1 - number)..self.boundary(self.pieces - number),
            Some(behind) => {
                let start = self.gradients + behind * self.tail_piece;
                start..(start + self.tail_piece).min(self.values)
            }
        }
    }

    /// How many values those are.
    pub fn owned(&self, rank: u32) -> usize {
        (0..self.pieces(rank)).map(|index| self.piece(rank, index).len()).sum()
    }

    /// The owner and the index of each piece that this rank deals with in others' names, the first of each owner before the second of any.
    pub fn given(&self) -> impl Iterator<Item = (u32, usize)> {
        let most = self.owners().map(|owner| self.pieces(owner)).max().unwrap_or(0);
        let of = move |index| self.owners().filter(move |owner| index < self.pieces(*owner)).map(move |to| (to, index));
        (0..most).flat_map(of)
    }

    /// The ranks that this one shares memory with, itself among them; none for an observer.
    pub fn host(&self) -> &[u32] {
        self.host_of.get(self.rank as usize).map_or(&[], |host| &self.hosts[*host])
    }

    /// Whether somebody owns no values: there are too few.
    pub fn leaves_out_some(&self) -> bool {
        self.all_pieces() < self.world as usize
    }

    /// Whether no two ranks share memory.
    pub fn is_flat(&self) -> bool {
        self.hosts() == self.world as usize
    }

    pub fn hosts(&self) -> usize {
        self.hosts.len()
    }

    /// Whether there are ranks that this one shares no memory with.
    pub fn is_spread(&self) -> bool {
        self.hosts() > 1
    }

    /// The subtrees of each rank of this host, left to right: its partial sums, in memory or its own.
    pub fn own_leaves(&self) -> impl Iterator<Item = Subtree> {
        self.own_positions().iter().map(|position| self.leaves[*position])
    }

    /// The positions in `leaves` of those of this host.
    pub fn own_positions(&self) -> &[usize] {
        self.host_of.get(self.rank as usize).map_or(&[], |host| &self.leaves_of_host[*host])
    }

    /// The first of a rank's among [`Plan::own_leaves`].
    pub fn first_leaf_of(&self, rank: u32) -> usize {
        let first = lanes::assign(self.lanes, self.world)[rank as usize].start;
        self.own_leaves().position(|leaf| leaf.start == first).expect("X5: the rank is of this host")
    }

    /// The positions in `leaves` of the sums that another rank gives to this one; none if it is not who speaks for its host.
    pub fn heard_from(&self, rank: u32) -> &[usize] {
        let is_owner = self.rank < self.world;
        if is_owner && self.speaks(rank, self.rank) { &self.leaves_of_host[self.host_of[rank as usize]] } else { &[] }
    }

    /// Whether the sums of `rank`'s values come to this rank from it.
    pub fn is_told_by(&self, rank: u32) -> bool {
        rank < self.world && (self.rank >= self.world || self.speaks(self.rank, rank))
    }

    /// All others to whom this rank gives partial sums, and from whom the sums come: the next in rank order first, so that not everybody sends to
    /// rank 0 at once.
    pub fn owners(&self) -> impl Iterator<Item = u32> {
        self.others().filter(|owner| self.is_told_by(*owner))
    }

    /// All others that receive the sums of this rank's values from it.
    pub fn listeners(&self) -> impl Iterator<Item = u32> {
        let delegates = self.others().filter(|rank| self.rank < self.world && self.speaks(*rank, self.rank));
        delegates.chain(self.world..self.world + self.observers)
    }

    /// All but this one that see the sums.
    pub fn all_others(&self) -> impl Iterator<Item = u32> + use<> {
        let observers = self.world..self.world + self.observers;
        let own = self.rank;
        self.others().chain(observers).filter(move |other| *other != own)
    }

    /// All members but this one.
    pub fn others(&self) -> impl Iterator<Item = u32> + use<> {
        let (world, rank) = (self.world, self.rank);
        (0..world).map(move |distance| (rank + distance) % world).filter(move |other| *other != rank)
    }

    /// Whether `rank` is who speaks for its host with the owner of values, who is of another host (X16).
    fn speaks(&self, rank: u32, owner: u32) -> bool {
        let Some(host) = self.host_of.get(rank as usize) else { return false };
        let ranks = &self.hosts[*host];
        // The owners of other hosts in turn.
        let foreign = owner as usize - ranks.partition_point(|rank| *rank < owner);
        self.host_of[owner as usize] != *host && ranks[foreign % ranks.len()] == rank
    }

    fn all_pieces(&self) -> usize {
        self.pieces + (self.values - self.gradients).div_ceil(self.tail_piece)
    }

    /// Where the first so many pieces of the gradients end, counted from the beginning.
    fn boundary(&self, pieces: usize) -> usize {
        if pieces == self.pieces {
            return self.gradients;
        }
        let even = self.gradients as u128 * pieces as u128 / self.pieces as u128;
        even as usize / ALIGNMENT_VALUES * ALIGNMENT_VALUES
    }
}

/// What a rank sends for one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    pub bytes: u64,
    pub frames: u64,
}

/// The traffic of the first of so many ranks that are each on a machine of their own: about everybody's. Where values go early there are two more of each other rank,
/// of a few bytes.
pub fn traffic(values: usize, lanes: u32, world: u32) -> Traffic {
    let plan = Plan::new((values, 0), lanes, (world, 0), 0, &Hosts::alone(world));
    let (given, listeners) = (plan.host_sums.len(), plan.listeners().count());
    let to_owners: usize = plan.owners().map(|owner| plan.owned(owner) * given).sum();
    let pieces: usize = plan.owners().map(|owner| plan.pieces(owner) * given).sum();
    Traffic {
        bytes: ((to_owners + plan.owned(0) * listeners) * VALUE_BYTES) as u64,
        frames: (pieces + plan.pieces(0) * listeners) as u64,
    }
}

/// Ranges in order, those that touch as one.
fn joined(ranges: impl Iterator<Item = Range<u32>>) -> Vec<Range<u32>> {
    let mut joined: Vec<Range<u32>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_any_vector_once_from_its_end_and_are_dealt_evenly() {
        for values in [0, 1, 15, 16, 17, 100, 1000, 65_537, 200_000, 3_000_001] {
            for (world, tail) in [(1, 0), (2, 0), (3, 1), (7, 12), (8, 70_000)] {
                let tail = tail.min(values);
                let plan = Plan::new((values, tail), 8, (world, 1), 0, &Hosts::alone(world));
                let gradients = values - tail;
                let most = (0..world).map(|rank| plan.pieces(rank)).max().unwrap();
                let (mut end, mut behind) = (gradients, gradients);
                for (index, rank) in (0..most).flat_map(|index| (0..world).map(move |rank| (index, rank))) {
                    if index >= plan.pieces(rank) {
                        continue;
                    }
                    let piece = plan.piece(rank, index);
                    assert!((1..=PIECE_VALUES_MAX).contains(&piece.len()), "{values} values, {world} ranks: {piece:?}");
                    if piece.end <= gradients {
                        assert!(behind == gradients, "the gradients come first");
                        assert_eq!(
                            (piece.end, piece.start % ALIGNMENT_VALUES),
                            (end, 0),
                            "{values} values, {world} ranks"
                        );
                        end = piece.start;
                    } else {
                        assert_eq!((piece.start, end), (behind, 0), "{values} values, {world} ranks");
                        behind = piece.end;
                    }
                }
                assert_eq!((end, behind), (0, values));
                let owned: Vec<usize> = (0..world).map(|rank| plan.owned(rank)).collect();
                assert_eq!(owned.iter().sum::<usize>(), values);
                let uneven = owned.iter().max().unwrap() - owned.iter().min().unwrap();
                assert!(uneven <= tail + 2 * ALIGNMENT_VALUES * most, "{owned:?}");
                assert_eq!(plan.pieces(world), 0, "an observer owns nothing");
            }
        }
    }

    fn of_hosts(world: u32, hosts: &[u32], rank: u32) -> Plan {
        Plan::new((1000, 0), 8, (world, 0), rank, &Hosts::of(hosts.iter().map(|host| (*host > 0).then_some(host))))
    }

    #[test]
    fn others_begin_with_the_next_rank() {
        let alone =
            |values, world, observers, rank| Plan::new((values, 0), 8, (world, observers), rank, &Hosts::alone(world));
        let plan = alone(100, 4, 2, 2);
        assert_eq!(plan.owners().collect::<Vec<_>>(), [3, 0, 1]);
        assert_eq!(plan.listeners().collect::<Vec<_>>(), [3, 0, 1, 4, 5]);
        assert_eq!(alone(100, 1, 0, 0).listeners().count(), 0);
        let observer = alone(100, 2, 1, 2);
        assert_eq!(observer.owners().collect::<Vec<_>>(), [0, 1]);
        assert_eq!((observer.pieces(2), observer.own_leaves().count(), observer.host_sums.len()), (0, 0, 0));
        assert_eq!(alone(100, 2, 1, 0).heard_from(2), [0usize; 0]);
    }

    #[test]
    fn one_rank_of_each_host_deals_with_an_owner() {
        let node = |start, len| Subtree { start, len };
        // 8 lanes: 0 and 1 have half of them together, 2 and 3 the other.
        let plan = of_hosts(4, &[1, 1, 2, 2], 0);
        assert_eq!((plan.host(), plan.is_spread()), (&[0, 1][..], true));
        assert_eq!(plan.leaves, [node(0, 2), node(2, 2), node(4, 4)]);
        assert_eq!(plan.host_sums, [(node(0, 4), 0..2)]);
        assert_eq!((plan.owners().collect::<Vec<_>>(), plan.listeners().collect::<Vec<_>>()), (vec![2], vec![2]));
        assert_eq!((plan.heard_from(1), plan.heard_from(2), plan.heard_from(3)), (&[][..], &[2][..], &[][..]));
        assert_eq!(of_hosts(4, &[1, 1, 2, 2], 1).owners().collect::<Vec<_>>(), [3]);
        // All on one machine: nobody speaks with anybody.
        let plan = of_hosts(4, &[1, 1, 1, 1], 3);
        assert_eq!((plan.owners().count(), plan.listeners().count(), plan.is_spread()), (0, 0, false));
        // Hosts of unequal sizes, one with ranks that are not neighbours.
        let plan = of_hosts(4, &[1, 0, 1, 1], 1);
        assert_eq!(plan.leaves, [node(0, 2), node(2, 2), node(4, 4)]);
        assert_eq!(plan.owners().collect::<Vec<_>>(), [2, 3, 0], "a rank by itself speaks with all");
        assert_eq!(
            plan.listeners().collect::<Vec<_>>(),
            [0],
            "the first of that host speaks with the first owner of another"
        );
        assert_eq!(plan.heard_from(0), [0, 2]);
        let plan = of_hosts(4, &[1, 0, 1, 1], 2);
        assert_eq!(plan.own_leaves().collect::<Vec<_>>(), [node(0, 2), node(4, 2), node(6, 2)]);
        assert_eq!(plan.host_sums, [(node(0, 2), 0..1), (node(4, 4), 1..3)]);
        assert_eq!((plan.first_leaf_of(0), plan.first_leaf_of(2), plan.first_leaf_of(3)), (0, 1, 2));
    }

    /// Who sends and who expects agree, however ranks are spread over hosts, and nothing is sent twice (X16).
    #[test]
    fn what_one_sends_another_expects() {
        use rand::{Rng, SeedableRng};
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(4);
        for _ in 0..300 {
            let world = rng.random_range(1..=8);
            let hosts: Vec<u32> = (0..world).map(|_| rng.random_range(0..4)).collect();
            let plans: Vec<Plan> = (0..world).map(|rank| of_hosts(world, &hosts, rank)).collect();
            for a in &plans {
                for b in plans.iter().filter(|b| b.rank != a.rank) {
                    let (gives, told) = (a.owners().any(|owner| owner == b.rank), a.is_told_by(b.rank));
                    assert_eq!(
                        (gives, told),
                        (!b.heard_from(a.rank).is_empty(), b.listeners().any(|rank| rank == a.rank))
                    );
                    assert_eq!(gives, told);
                    if gives {
                        let theirs: Vec<Subtree> =
                            b.heard_from(a.rank).iter().map(|position| b.leaves[*position]).collect();
                        assert_eq!(
                            theirs,
                            a.host_sums.iter().map(|(subtree, _)| *subtree).collect::<Vec<_>>(),
                            "{hosts:?}"
                        );
                    }
                }
                let heard: usize = plans.iter().map(|b| a.heard_from(b.rank).len()).sum();
                assert_eq!(heard + a.own_leaves().count(), a.leaves.len(), "each leaf comes once: {hosts:?}");
            }
        }
    }
}
