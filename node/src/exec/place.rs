//! Which rank a process is among the members of a generation, in torchrun's words. Owns the order: ranks of one node stand together, nodes in the order of
//! their first slots. Every member computes the same from the same membership.

use std::net::{IpAddr, SocketAddr};

use stoke_protocol::message::rank::{Member, Membership, RankId};

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    pub rank: u32,
    pub world: u32,
    pub local_rank: u32,
    pub local_world: u32,
    /// Of the node among the nodes.
    pub group: u32,
    pub groups: u32,
    pub master: SocketAddr,
}

impl Place {
    /// `own` is a member. Ranks that are reached by one address are on one node: peers could not be told apart otherwise.
    pub fn of(own: RankId, membership: &Membership) -> Self {
        let members = &membership.members;
        let mut nodes: Vec<(IpAddr, Vec<&Member>)> = Vec::new();
        for member in members.iter() {
            let ip = member.address.ip();
            match nodes.iter_mut().find(|(other, _)| *other == ip) {
                Some((_, ranks)) => ranks.push(member),
                None => nodes.push((ip, vec![member])),
            }
        }
        let (group, local_rank, local_world) = (0..)
            .zip(&nodes)
            .find_map(|(group, (_, ranks))| {
                let local = ranks.iter().position(|member| member.id == own)?;
                Some((group, local as u32, ranks.len() as u32))
            })
            .expect("a rank runs its command only as a member");
        let before: usize = nodes[..group as usize].iter().map(|(_, ranks)| ranks.len()).sum();
        Self {
            rank: before as u32 + local_rank,
            world: members.len() as u32,
            local_rank,
            local_world,
            group,
            groups: nodes.len() as u32,
            master: members.first().map(|first| first.address).expect("it has at least this rank"),
        }
    }

    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let numbers = [
            ("RANK", self.rank),
            ("WORLD_SIZE", self.world),
            ("LOCAL_RANK", self.local_rank),
            ("LOCAL_WORLD_SIZE", self.local_world),
            ("GROUP_RANK", self.group),
            ("GROUP_WORLD_SIZE", self.groups),
            ("ROLE_RANK", self.rank),
            ("ROLE_WORLD_SIZE", self.world),
            ("MASTER_PORT", self.master.port().into()),
        ];
        let numbers = numbers.into_iter().map(|(name, number)| (name, number.to_string()));
        numbers.chain([("MASTER_ADDR", self.master.ip().to_string()), ("ROLE_NAME", "default".to_owned())]).collect()
    }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::{Generation, JobId, Rank};
    use stoke_protocol::message::rank::Purpose;

    use super::*;

    #[test]
    fn ranks_of_a_node_stand_together_and_the_first_member_is_the_master() {
        let id = |rank| RankId { job: JobId(1), generation: Generation(1), rank: Rank(rank) };
        let member = |(rank, address): (u32, &str)| Member { id: id(rank), address: address.parse().unwrap() };
        // Slot 1 is gone.
        let members = [(0, "10.0.0.1:7000"), (2, "10.0.0.2:7002"), (3, "10.0.0.1:7003"), (5, "10.0.0.2:7005")];
        let membership = Membership {
            generation: Generation(3),
            members: members.into_iter().map(member).collect(),
            joining: Vec::new().into(),
            after: None,
            ballot: 0,
            purpose: Purpose::Train,
            restarts: 0,
        };
        let places: Vec<_> = [0, 3, 2, 5].into_iter().map(|rank| Place::of(id(rank), &membership)).collect();
        let found: Vec<_> = places.iter().map(|place| (place.rank, place.group, place.local_rank)).collect();
        assert_eq!(found, [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)]);
        assert!(places.iter().all(|place| (place.world, place.local_world, place.groups) == (4, 2, 2)));
        let variables = places[3].variables();
        for (name, value) in [("RANK", "3"), ("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "7000"), ("GROUP_RANK", "1")]
        {
            assert!(variables.contains(&(name, value.to_owned())), "{variables:?}");
        }
    }
}
