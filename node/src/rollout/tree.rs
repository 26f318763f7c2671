//! Who passes weights on to whom. All learners of a job have the same weights at the same time, so each of them sends them to a share of the players only,
//! and big ones go on from player to player: nobody sends more than a few copies. Pure.

use stoke_protocol::message::rank::{Member, RankId};

/// Copies of big weights that one rank sends.
const FAN_OUT: usize = 2;
/// Smaller ones go to all players of a share at once: another hop costs more than the bytes.
const SMALL_BYTES_MAX: usize = 1 << 20;

/// Who learns and who plays.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Cast {
    pub learners: Vec<RankId>,
    pub players: Vec<Member>,
}

impl Cast {
    /// Whether a learner sends weights of so many bytes to a player itself.
    pub fn feeds(&self, learner: RankId, player: RankId, bytes: usize) -> bool {
        self.share(learner).take(fan_out(bytes)).any(|member| member.id == player)
    }

    /// To whom a player of this learner's share passes them on.
    pub fn children(&self, learner: RankId, player: RankId, bytes: usize) -> Vec<Member> {
        let fan_out = fan_out(bytes);
        let Some(at) = self.share(learner).position(|member| member.id == player) else { return Vec::new() };
        // The first `fan_out` are the learner's, the next those of the first player, and so on.
        let first = at.saturating_add(1).saturating_mul(fan_out);
        self.share(learner).skip(first).take(fan_out).collect()
    }

    fn share(&self, learner: RankId) -> impl Iterator<Item = Member> {
        let at = self.learners.iter().position(|id| *id == learner);
        let step = self.learners.len().max(1);
        at.into_iter().flat_map(move |at| self.players.iter().skip(at).step_by(step)).copied()
    }
}

fn fan_out(bytes: usize) -> usize {
    if bytes > SMALL_BYTES_MAX { FAN_OUT } else { usize::MAX }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::{Generation, JobId, ROLLOUT_SLOTS, Rank};

    use super::*;

    fn id(rank: u32) -> RankId {
        RankId { job: JobId(1), generation: Generation(1), rank: Rank(rank) }
    }

    fn cast(learners: u32, players: u32) -> Cast {
        let player = |at| Member { id: id(ROLLOUT_SLOTS + at), address: "[::1]:9".parse().expect("an address") };
        Cast { learners: (0..learners).map(id).collect(), players: (0..players).map(player).collect() }
    }

    /// How often each player is given the weights, and the most copies that one rank sends.
    fn given(cast: &Cast, bytes: usize) -> (Vec<usize>, usize) {
        let mut given = vec![0; cast.players.len()];
        let mut most = 0;
        let place = |player: RankId| cast.players.iter().position(|member| member.id == player).expect("a player");
        for learner in &cast.learners {
            let fed = cast.players.iter().filter(|player| cast.feeds(*learner, player.id, bytes));
            most = most.max(fed.clone().count());
            fed.for_each(|player| given[place(player.id)] += 1);
            for player in &cast.players {
                let children = cast.children(*learner, player.id, bytes);
                most = most.max(children.len());
                children.iter().for_each(|child| given[place(child.id)] += 1);
            }
        }
        (given, most)
    }

    #[test]
    fn each_player_is_given_weights_once_and_nobody_sends_more_than_two_copies() {
        for (learners, players) in [(1, 1), (1, 2), (1, 7), (1, 100), (2, 1), (3, 8), (4, 33)] {
            let cast = cast(learners, players);
            let (given, most) = given(&cast, SMALL_BYTES_MAX + 1);
            assert!(given.iter().all(|times| *times == 1), "{learners} {players}: {given:?}");
            assert!(most <= FAN_OUT, "{learners} {players}: {most}");
        }
    }

    #[test]
    fn small_weights_go_to_a_share_of_the_players_at_once() {
        let cast = cast(3, 8);
        let (given, most) = given(&cast, SMALL_BYTES_MAX);
        assert_eq!((given, most), (vec![1; 8], 3));
    }

    #[test]
    fn a_rank_that_does_not_learn_feeds_nobody() {
        let cast = cast(2, 4);
        assert!(!cast.players.iter().any(|player| cast.feeds(id(2), player.id, 1)));
        assert!(cast.children(id(0), id(5), 1).is_empty());
    }
}
