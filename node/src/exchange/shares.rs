//! Which rank keeps the optimizer's state of which parameters (ZeRO stage 1, Rajbhandari et al., 2020), and who hands what to whom when other ranks train.
//! Pure arithmetic on the parameters' sizes and the members' standings: every rank comes to the same.
//!
//! Whole parameters are dealt, the largest first, each to the rank that has least (as PyTorch's ZeroRedundancyOptimizer deals them): the state of one is in one
//! piece, in a checkpoint too. So no share is smaller than the largest parameter.
//! X18: the state of each parameter is at its owner and at the owner's buddy, half the world away: where several machines have as many ranks each, on another one.

use std::collections::BTreeMap;
use std::ops::Range;

use stoke_protocol::message::peer::{Keeps, Kept};

/// The deal among the ranks of a world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shares {
    /// Of each parameter, by place.
    owners: Vec<u32>,
    /// Where each begins in the vector of all parameters, rank by rank.
    offsets: Vec<usize>,
    /// Where each rank's begin there, and the end.
    bounds: Vec<usize>,
}

/// What one member has and another one lacks of what it is to keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parcel {
    pub from: u32,
    pub to: u32,
    /// By place, ascending. None at all: of a state that is in no parameter.
    pub params: Vec<usize>,
}

impl Shares {
    /// Of parameters of these sizes.
    pub fn deal(sizes: &[usize], world: u32) -> Self {
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        order.sort_by_key(|place| (std::cmp::Reverse(sizes[*place]), *place));
        let (mut owners, mut dealt) = (vec![0; sizes.len()], vec![0usize; world as usize]);
        for place in order {
            let (owner, least) =
                dealt.iter_mut().enumerate().min_by_key(|(rank, values)| (**values, *rank)).expect("ranks");
            *least += sizes[place];
            owners[place] = owner as u32;
        }
        let mut bounds = vec![0];
        for values in &dealt {
            bounds.push(bounds[bounds.len() - 1] + values);
        }
        let mut next = bounds.clone();
        let offset = |(owner, size): (&u32, &usize)| {
            let offset = next[*owner as usize];
            next[*owner as usize] += size;
            offset
        };
        let offsets = owners.iter().zip(sizes).map(offset).collect();
        Self { owners, offsets, bounds }
    }

    pub fn world(&self) -> u32 {
        self.bounds.len() as u32 - 1
    }

    /// Of all parameters.
    pub fn values(&self) -> usize {
        self.bounds[self.bounds.len() - 1]
    }

    /// The values of a rank's parameters in the vector of all.
    pub fn range(&self, rank: u32) -> Range<usize> {
        self.bounds[rank as usize]..self.bounds[rank as usize + 1]
    }

    /// Where a parameter begins there.
    pub fn offset(&self, place: usize) -> usize {
        self.offsets[place]
    }

    pub fn owner(&self, place: usize) -> u32 {
        self.owners[place]
    }

    /// The rank that has a copy of another one's state.
    pub fn buddy(&self, rank: u32) -> u32 {
        (rank + self.world() / 2) % self.world()
    }

    /// The parameters of a rank by place, ascending.
    pub fn owned(&self, rank: u32) -> Vec<usize> {
        self.places(|place| self.owners[place] == rank)
    }

    /// Those of which it keeps the state: its own, and those whose owner's buddy it is.
    pub fn kept(&self, rank: u32) -> Vec<usize> {
        self.places(|place| self.keeps(rank, place))
    }

    pub fn keeps(&self, rank: u32, place: usize) -> bool {
        let owner = self.owners[place];
        owner == rank || self.buddy(owner) == rank
    }

    fn places(&self, is_meant: impl Fn(usize) -> bool) -> Vec<usize> {
        (0..self.owners.len()).filter(|place| is_meant(*place)).collect()
    }
}

/// What the members of a generation hand to each other before they train, by what each has of the state of this step. An error is a parameter that nobody has.
pub fn hand_over(sizes: &[usize], keeps: &[Keeps]) -> Result<Vec<Parcel>, usize> {
    let dealt = Shares::deal(sizes, keeps.len() as u32);
    let mut worlds: BTreeMap<u32, Shares> = BTreeMap::new();
    for Kept { world, .. } in keeps.iter().flat_map(Keeps::iter) {
        worlds.entry(world).or_insert_with(|| Shares::deal(sizes, world));
    }
    let has = |member: u32, place: usize| {
        keeps[member as usize].iter().any(|kept| worlds[&kept.world].keeps(kept.position, place))
    };
    let mut parcels: BTreeMap<(u32, u32), Vec<usize>> = BTreeMap::new();
    for place in 0..sizes.len() {
        let holders: Vec<u32> = (0..dealt.world()).filter(|member| has(*member, place)).collect();
        if holders.is_empty() {
            return Err(place);
        }
        let owner = dealt.owner(place);
        let mut takers = vec![owner, dealt.buddy(owner)];
        takers.dedup();
        for taker in takers.into_iter().filter(|taker| !has(*taker, place)) {
            // In turn, so that not one gives everything.
            let giver = holders[(place + taker as usize) % holders.len()];
            parcels.entry((giver, taker)).or_default().push(place);
        }
    }
    // Whoever has nothing learns at least where the others are.
    let has_nothing = |member: &u32| keeps[*member as usize].is_empty();
    let knows = (0..dealt.world()).find(|member| !has_nothing(member));
    for member in (0..dealt.world()).filter(has_nothing) {
        let is_given = parcels.keys().any(|(_, to)| *to == member);
        if let Some(giver) = knows.filter(|_| !is_given) {
            parcels.insert((giver, member), Vec::new());
        }
    }
    Ok(parcels.into_iter().map(|((from, to), params)| Parcel { from, to, params }).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn sizes(rng: &mut ChaCha8Rng) -> Vec<usize> {
        (0..rng.random_range(1..40)).map(|_| rng.random_range(1..5_000)).collect()
    }

    #[test]
    fn parameters_are_dealt_evenly_and_lie_rank_by_rank() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for _ in 0..200 {
            let (sizes, world) = (sizes(&mut rng), rng.random_range(1..9));
            let shares = Shares::deal(&sizes, world);
            let mut values = vec![None; shares.values()];
            assert_eq!(shares.values(), sizes.iter().sum::<usize>());
            for (place, size) in sizes.iter().enumerate() {
                let range = shares.offset(place)..shares.offset(place) + size;
                let own = shares.range(shares.owner(place));
                assert!(own.start <= range.start && range.end <= own.end);
                values[range].iter_mut().for_each(|value| assert!(value.replace(place).is_none()));
            }
            assert!(values.iter().all(Option::is_some));
            let dealt: Vec<usize> = (0..world).map(|rank| shares.range(rank).len()).collect();
            let (least, most) = (dealt.iter().min().unwrap(), dealt.iter().max().unwrap());
            assert!(most - least <= *sizes.iter().max().unwrap(), "{dealt:?}");
            for rank in 0..world {
                assert_eq!(
                    shares.kept(rank).len(),
                    (0..sizes.len()).filter(|place| shares.keeps(rank, *place)).count()
                );
                assert!(world == 1 || shares.buddy(rank) != rank);
            }
        }
    }

    #[test]
    fn one_rank_and_both_of_two_keep_everything() {
        let sizes = [7, 3, 9, 1];
        assert_eq!(Shares::deal(&sizes, 1).kept(0), [0, 1, 2, 3]);
        let two = Shares::deal(&sizes, 2);
        assert_eq!((two.owned(0), two.owned(1)), (vec![2, 3], vec![0, 1]));
        assert_eq!((two.kept(0), two.kept(1)), (vec![0, 1, 2, 3], vec![0, 1, 2, 3]));
        let four = Shares::deal(&sizes, 4);
        assert_eq!((four.owned(0), four.kept(0)), (vec![2], vec![1, 2]));
    }

    /// Members of any worlds before, some with nothing: afterwards each has what it is to keep, or nobody has it.
    #[test]
    fn everybody_is_handed_what_it_lacks_by_somebody_who_has_it() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut lost = 0;
        for _ in 0..500 {
            let (sizes, world, before) = (sizes(&mut rng), rng.random_range(1..7), rng.random_range(1..7));
            let part = |rng: &mut ChaCha8Rng| Kept { world: before, position: rng.random_range(0..before) };
            let parts =
                |rng: &mut ChaCha8Rng| (0..[0, 1, 1, 1, 2][rng.random_range(0..5)]).map(|_| part(rng)).collect();
            let kept: Vec<Keeps> = (0..world).map(|_| parts(&mut rng)).collect();
            let old = Shares::deal(&sizes, before);
            let of = |keeps: &Keeps| keeps.iter().flat_map(|kept| old.kept(kept.position)).collect();
            let mut has: Vec<BTreeSet<usize>> = kept.iter().map(of).collect();
            match hand_over(&sizes, &kept) {
                Err(place) => {
                    lost += 1;
                    assert!(has.iter().all(|has| !has.contains(&place)));
                }
                Ok(parcels) => {
                    let before = has.clone();
                    for Parcel { from, to, params } in &parcels {
                        assert!(from != to && !kept[*from as usize].is_empty());
                        assert!(params.windows(2).all(|two| two[0] < two[1]));
                        for place in params {
                            assert!(before[*from as usize].contains(place));
                            assert!(has[*to as usize].insert(*place), "given twice");
                        }
                    }
                    let new = Shares::deal(&sizes, world);
                    for rank in 0..world {
                        assert!(new.kept(rank).iter().all(|place| has[rank as usize].contains(place)));
                        let is_told = !kept[rank as usize].is_empty() || parcels.iter().any(|parcel| parcel.to == rank);
                        assert!(is_told, "it would not know the step");
                    }
                }
            }
        }
        assert!((50..450).contains(&lost), "{lost}");
    }

    /// The loss of any one rank, and of several that are not buddies, loses nothing.
    #[test]
    fn what_a_lost_rank_kept_its_buddies_have() {
        let sizes: Vec<usize> = (1..60).map(|size| size * 16).collect();
        let world = 8;
        let without = |lost: &[u32]| -> Vec<Keeps> {
            let members = (0..world).filter(|rank| !lost.contains(rank));
            members.map(|position| Keeps::from_iter([Kept { world, position }])).collect()
        };
        for rank in 0..world {
            assert!(hand_over(&sizes, &without(&[rank])).is_ok());
        }
        assert!(hand_over(&sizes, &without(&[0, 1, 2, 3])).is_ok());
        assert!(hand_over(&sizes, &without(&[1, 5])).is_err());
        let nobody_lacks = vec![Keeps::from_iter([Kept::ALL]); 5];
        assert_eq!(hand_over(&sizes, &nobody_lacks), Ok(Vec::new()));
    }

    /// Of four one is lost; of the other three one has let go of what it had, because all had theirs, and a second one is lost before the first knows it.
    #[test]
    fn what_was_handed_over_counts_before_all_are_known_to_have_theirs() {
        let sizes: Vec<usize> = (1..60).map(|size| size * 16).collect();
        let kept = |world, position| Kept { world, position };
        let second = Keeps::from_iter([kept(3, 1)]);
        let mut first = Keeps::from_iter([kept(4, 0)]);
        assert!(hand_over(&sizes, &[first, second]).is_err());
        first.push(kept(3, 0));
        assert!(hand_over(&sizes, &[first, second]).is_ok());
        for position in 0..9 {
            first.push(kept(9, position));
        }
        assert_eq!(first.iter().collect::<Vec<_>>(), [kept(4, 0), kept(9, 6), kept(9, 7), kept(9, 8)]);
    }
}
