//! How the members of a generation go on without those that are gone, while the coordinator is away. Owns the way from its membership to a
//! smaller one; whether it is away is the caller's to know.
//!
//! Q1 (I18): only a quorum of the coordinator's own membership goes on, whatever ballots came between; two that have nobody in common never
//! both do. Q2: a rank takes part in one term at a time, and only in a higher ballot than its last. Q3: never fewer than the job's floor, and
//! never anybody new: growing and placing again are the coordinator's.
//!
//! The bits do not depend on it: the state after a step is a function of the step, and the catalogue takes checkpoints from the coordinator's
//! own memberships only (ranks whose gradients are rounded on the wire, where it would not be so, wait instead: T4). The quorum keeps two halves from doing the same work twice.

use stoke_protocol::ids::Term;
use stoke_protocol::message::peer::{Opening, Proposal};
use stoke_protocol::message::rank::{Member, Membership, Purpose, RankId};
use stoke_protocol::transport::TransportError;

use super::mesh::Mesh;

/// What a rank knows when it has lost somebody and nobody tells it how to go on.
#[derive(Clone, Copy)]
pub struct Sight<'a> {
    /// The coordinator's membership.
    pub given: &'a Membership,
    pub own: RankId,
    /// The newest term that this rank has taken part in.
    pub entered: Term,
    /// The newest proposal of each peer.
    pub proposals: &'a [(RankId, Proposal)],
    /// The fewest ranks that may go on.
    pub floor: usize,
}

/// How it goes on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    /// As another one proposes.
    Take(Proposal),
    /// This rank is the first of those that live: it proposes.
    Propose(Proposal),
}

impl Mesh {
    /// Waits until a quorum with this rank in it can go on: the first of those that are left proposes it, the others take it over. Cancel-safe.
    pub async fn go_on(&self, given: &Membership, floor: usize) -> Membership {
        loop {
            let changed = self.changed();
            let (entered, proposals) = self.proposals();
            let sight = Sight { given, own: self.own(), entered, proposals: &proposals, floor };
            match decide(&sight, |peer| self.lives(peer)) {
                Some(Decision::Take(proposal)) => return membership(given, &proposal),
                Some(Decision::Propose(proposal)) => {
                    self.send(&proposal);
                    return membership(given, &proposal);
                }
                None => changed.await,
            }
        }
    }

    /// To all that it names. One that cannot be told is found by the meeting that follows.
    fn send(&self, proposal: &Proposal) {
        for peer in proposal.members.iter().filter(|id| **id != self.own()) {
            let Some(connection) = self.connection(*peer) else { continue };
            let opening = Opening::Proposal(proposal.clone());
            self.io().spawn(async move {
                let mut stream = connection.open_bulk().await?;
                stream.write_header(&opening).await?;
                stream.finish()?;
                Ok::<_, TransportError>(())
            });
        }
    }
}

/// None: wait, for a proposal or for the coordinator.
pub fn decide(sight: &Sight<'_>, lives: impl Fn(RankId) -> bool) -> Option<Decision> {
    let Sight { given, own, entered, proposals, floor } = *sight;
    let position = given.position(own)?;
    let acceptable = |(from, proposal): &&(RankId, Proposal)| {
        let Proposal { term, members } = proposal;
        let drawn = given.position(*from) == term.ballot.checked_rem(given.members.len() as u32);
        let theirs = members.first() == Some(from) && drawn;
        theirs && term.generation == given.generation && *term > entered && members.contains(&own)
    };
    let enough = |(_, proposal): &&(RankId, Proposal)| may_go_on(given, &proposal.members, floor);
    let offers = proposals.iter().filter(acceptable).filter(enough);
    if let Some((_, proposal)) = offers.min_by_key(|(from, _)| given.position(*from)) {
        return Some(Decision::Take(proposal.clone()));
    }
    let here = |member: &&Member| member.id == own || lives(member.id);
    let members: Vec<RankId> = given.members.iter().filter(here).map(|member| member.id).collect();
    if members.first() != Some(&own) || !may_go_on(given, &members, floor) {
        return None;
    }
    // Higher than every one that was seen, and nobody else's.
    let seen = proposals.iter().map(|(_, proposal)| proposal.term).chain([entered]);
    let seen = seen.filter(|term| term.generation == given.generation).map(|term| term.ballot).max().unwrap_or(0);
    let world = given.members.len() as u32;
    let ballot = (seen / world).checked_add(1)?.checked_mul(world)?.checked_add(position)?;
    let term = Term { generation: given.generation, ballot };
    Some(Decision::Propose(Proposal { term, members: members.into() }))
}

/// Q1, Q3: enough of the members, each once, in their order.
fn may_go_on(given: &Membership, members: &[RankId], floor: usize) -> bool {
    let known = members.iter().all(|id| given.position(*id).is_some());
    let ordered = members.windows(2).all(|two| given.position(two[0]) < given.position(two[1]));
    known && ordered && members.len() >= floor && given.is_quorum(members)
}

/// What a proposal makes of the coordinator's membership.
pub fn membership(given: &Membership, proposal: &Proposal) -> Membership {
    let Term { generation, ballot } = proposal.term;
    let members = given.members.iter().filter(|member| proposal.members.contains(&member.id)).copied().collect();
    Membership {
        generation,
        members,
        joining: vec![].into(),
        after: None,
        ballot,
        purpose: Purpose::Train,
        restarts: 0,
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use stoke_protocol::ids::{Generation, JobId, Rank};

    use super::*;

    fn rank(rank: u32) -> RankId {
        RankId { job: JobId(1), generation: Generation(1), rank: Rank(rank) }
    }

    fn given(world: u32) -> Membership {
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let members = (0..world).map(|at| Member { id: rank(at), address }).collect();
        Membership {
            generation: Generation(3),
            members,
            joining: vec![].into(),
            after: None,
            ballot: 0,
            purpose: Purpose::Train,
            restarts: 0,
        }
    }

    fn proposal(ballot: u32, members: &[u32]) -> Proposal {
        let term = Term { generation: Generation(3), ballot };
        Proposal { term, members: members.iter().map(|at| rank(*at)).collect() }
    }

    fn decided(world: u32, own: u32, living: &[u32], proposals: &[(RankId, Proposal)]) -> Option<Decision> {
        let given = given(world);
        let entered = Term { generation: Generation(3), ballot: 0 };
        let sight = Sight { given: &given, own: rank(own), entered, proposals, floor: 1 };
        decide(&sight, |id| living.contains(&id.rank.0))
    }

    #[test]
    fn the_first_of_those_that_live_proposes_if_they_are_a_quorum() {
        assert_eq!(decided(3, 0, &[1], &[]), Some(Decision::Propose(proposal(3, &[0, 1]))));
        assert_eq!(decided(3, 1, &[2], &[]), Some(Decision::Propose(proposal(4, &[1, 2]))));
        assert_eq!(decided(3, 1, &[0], &[]), None, "the first one's to say");
        assert_eq!(decided(3, 2, &[], &[]), None, "one of three");
        assert_eq!(decided(2, 0, &[], &[]), Some(Decision::Propose(proposal(2, &[0]))), "the half with the first");
        assert_eq!(decided(2, 1, &[], &[]), None, "the other half");
    }

    #[test]
    fn no_two_quorums_have_nobody_in_common() {
        for world in 1..=7_u32 {
            let given = given(world);
            let set = |bits: u32| (0..world).filter(|at| bits & 1 << at != 0).map(rank).collect::<Vec<_>>();
            let quorums: Vec<u32> = (0..1 << world).filter(|bits| given.is_quorum(&set(*bits))).collect();
            assert!(quorums.iter().all(|one| quorums.iter().all(|other| one & other != 0)), "{world}");
        }
    }

    #[test]
    fn only_what_its_sender_may_propose_is_taken() {
        let take = |from: u32, offer: Proposal| decided(3, 2, &[0, 1], &[(rank(from), offer)]);
        assert_eq!(take(0, proposal(3, &[0, 2])), Some(Decision::Take(proposal(3, &[0, 2]))));
        for (from, offer, why) in [
            (1, proposal(3, &[0, 2]), "speaks for another"),
            (0, proposal(4, &[0, 2]), "a ballot that is not its own"),
            (0, proposal(0, &[0, 2]), "not above what was entered"),
            (0, proposal(3, &[0, 1]), "without this rank"),
            (1, proposal(4, &[1, 2, 0]), "not in order"),
            (0, proposal(3, &[0, 2, 7]), "with somebody new"),
            (2, proposal(5, &[2]), "no quorum"),
        ] {
            assert_eq!(take(from, offer), None, "{why}");
        }
        let two = [(rank(1), proposal(4, &[1, 2])), (rank(0), proposal(3, &[0, 2]))];
        assert_eq!(decided(3, 2, &[0, 1], &two), Some(Decision::Take(proposal(3, &[0, 2]))), "the first one's");
    }

    #[test]
    fn never_fewer_than_the_floor_go_on() {
        let given = given(3);
        let sight = Sight { given: &given, own: rank(0), entered: Term::default(), proposals: &[], floor: 3 };
        assert_eq!(decide(&sight, |id| id.rank.0 == 1), None);
    }
}
