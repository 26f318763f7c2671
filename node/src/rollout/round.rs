//! A learner's round with ranks that play: which lanes wait, who plays which, what each player is to be sent next, and what has come back. Decides; sends and
//! receives nothing.
//!
//! W2: a lane is wanted once a round: what comes of an earlier round, or for a lane that the learner has played meanwhile, is dropped.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoke_jobs::Broadcast;
use stoke_jobs::rl::{Found, PlayOrder, PlayedBytes};
use stoke_protocol::message::peer::WeightsId;
use stoke_protocol::message::rank::{Member, RankId};

use super::feed::digest_of;
use super::tree::Cast;

/// Orders of one player under way: while one is played the next one is there already.
const CREDITS: usize = 2;

pub struct Round {
    own: RankId,
    cast: Cast,
    weights: Option<(WeightsId, Bytes)>,
    begun: Instant,
    waiting: VecDeque<(u64, PlayOrder)>,
    /// Orders under way.
    sent: BTreeMap<u64, Sent>,
    done: BTreeMap<u32, PlayedBytes>,
    next: u64,
    /// The longest that a player has taken for an order, of late.
    longest: Option<Duration>,
    /// Lanes that players gave up.
    failures: u32,
    links: BTreeMap<RankId, Link>,
    /// Who has the weights.
    loaded: BTreeSet<RankId>,
    broadcast: Broadcast,
}

struct Sent {
    lane: u32,
    to: RankId,
    at: Instant,
    order: PlayOrder,
}

/// A player that is connected.
struct Link {
    credits: usize,
    /// The weights that this rank has sent it.
    weights: Option<WeightsId>,
    /// They have not come from where they were to come from.
    wanting: bool,
    /// To whom it was told to pass them on.
    children: Vec<Member>,
}

/// What a player is to be sent.
pub enum Next {
    PassOn(Vec<Member>),
    Weights(WeightsId, Bytes),
    Play(u64, PlayOrder, WeightsId),
}

/// A lane that the learner needs.
pub enum Lane {
    Found(Found),
    /// Under way for so long, and there is nothing else to play.
    Sent(Duration),
}

impl Round {
    pub fn new(own: RankId) -> Self {
        Self {
            own,
            cast: Cast::default(),
            weights: None,
            begun: Instant::now(),
            waiting: VecDeque::new(),
            sent: BTreeMap::new(),
            done: BTreeMap::new(),
            next: 0,
            longest: None,
            failures: 0,
            links: BTreeMap::new(),
            loaded: BTreeSet::new(),
            broadcast: Broadcast::default(),
        }
    }

    pub fn begin(&mut self, version: u64, weights: &[f32], orders: Vec<PlayOrder>) {
        let bytes: Bytes = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
        let id = WeightsId { version, digest: digest_of(&bytes) };
        if self.weights.as_ref().is_none_or(|(before, _)| *before != id) {
            self.weights = Some((id, bytes));
            self.begun = Instant::now();
            self.loaded.clear();
        }
        self.sent.clear();
        self.done.clear();
        let first = self.next;
        self.next += orders.len() as u64;
        self.waiting = (first..).zip(orders).collect();
    }

    pub fn cast(&mut self, cast: Cast) {
        for gone in std::mem::replace(&mut self.cast, cast).players {
            if !self.cast.players.contains(&gone) {
                self.disconnected(gone.id);
            }
        }
    }

    pub fn connected(&mut self, player: RankId) {
        let link = Link { credits: CREDITS, weights: None, wanting: false, children: Vec::new() };
        self.links.insert(player, link);
    }

    /// What a player that is gone had is somebody else's.
    pub fn disconnected(&mut self, player: RankId) {
        self.links.remove(&player);
        self.loaded.remove(&player);
        let numbers: Vec<u64> =
            self.sent.iter().filter(|(_, sent)| sent.to == player).map(|(number, _)| *number).collect();
        for number in numbers {
            self.take_back(number);
        }
    }

    /// Whether it was under way.
    fn take_back(&mut self, number: u64) -> bool {
        let sent = self.sent.remove(&number);
        let found = sent.is_some();
        self.waiting.extend(sent.map(|sent| (number, sent.order)));
        self.waiting.rotate_right(usize::from(found));
        found
    }

    /// The next thing for a player, which is taken to be sent.
    pub fn next(&mut self, player: RankId) -> Option<Next> {
        let players = self.links.len();
        let link = self.links.get_mut(&player)?;
        let (id, bytes) = self.weights.as_ref()?;
        let children = self.cast.children(self.own, player, bytes.len());
        if link.children != children {
            link.children.clone_from(&children);
            return Some(Next::PassOn(children));
        }
        if link.weights != Some(*id) && (link.wanting || self.cast.feeds(self.own, player, bytes.len())) {
            (link.weights, link.wanting) = (Some(*id), false);
            self.broadcast.bytes += bytes.len() as u64;
            return Some(Next::Weights(*id, bytes.clone()));
        }
        // Near the end lanes are for whoever is free first.
        let ahead = link.credits > 0 && self.waiting.len() > players;
        let free = link.credits == CREDITS || ahead;
        let (number, order) = free.then(|| self.waiting.pop_front()).flatten()?;
        link.credits -= 1;
        self.sent.insert(number, Sent { lane: order.lane, to: player, at: Instant::now(), order: order.clone() });
        Some(Next::Play(number, order, *id))
    }

    pub fn answered(&mut self, player: RankId, number: u64, played: PlayedBytes) {
        self.credit(player);
        // W2.
        let Some(sent) = self.sent.remove(&number) else { return };
        let taken = sent.at.elapsed();
        // One slow lane is forgotten after some dozen that were not.
        self.longest = Some(self.longest.map_or(taken, |longest| taken.max(longest - longest / 16)));
        self.done.insert(sent.lane, played);
    }

    /// It could not be played there.
    pub fn failed(&mut self, player: RankId, number: u64) {
        self.credit(player);
        self.failures += 1;
        self.sent.remove(&number);
    }

    pub fn take_failures(&mut self) -> u32 {
        std::mem::take(&mut self.failures)
    }

    /// A player has an order, but not its weights.
    pub fn wanting(&mut self, player: RankId, number: u64) {
        self.credit(player);
        // W2.
        if self.take_back(number)
            && let Some(link) = self.links.get_mut(&player)
        {
            (link.weights, link.wanting) = (None, true);
        }
    }

    fn credit(&mut self, player: RankId) {
        if let Some(link) = self.links.get_mut(&player) {
            link.credits += 1;
        }
    }

    pub fn loaded(&mut self, player: RankId, id: WeightsId) {
        let news = self.weights.as_ref().is_some_and(|(newest, _)| *newest == id) && self.loaded.insert(player);
        if news && self.cast.players.iter().all(|player| self.loaded.contains(&player.id)) {
            self.broadcast.seconds = Some(self.begun.elapsed().as_secs_f32());
        }
    }

    pub fn find(&mut self, lane: u32) -> Lane {
        if let Some(played) = self.done.remove(&lane) {
            return Lane::Found(Found::Played(played));
        }
        let Some(sent) = self.sent.values().find(|sent| sent.lane == lane) else {
            self.waiting.retain(|(_, order)| order.lane != lane);
            return Lane::Found(Found::Nobody);
        };
        // The last is the one that players would come to last.
        match self.waiting.pop_back() {
            Some((_, order)) => Lane::Found(Found::Meanwhile(order.lane)),
            None => Lane::Sent(sent.at.elapsed()),
        }
    }

    /// The learner plays it itself.
    pub fn give_up(&mut self, lane: u32) {
        self.sent.retain(|_, sent| sent.lane != lane);
    }

    pub fn longest(&self) -> Option<Duration> {
        self.longest
    }

    pub fn broadcast(&self) -> Broadcast {
        self.broadcast
    }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::{Generation, JobId, ROLLOUT_SLOTS, Rank};

    use super::*;

    fn id(rank: u32) -> RankId {
        RankId { job: JobId(1), generation: Generation(1), rank: Rank(rank) }
    }

    fn player(at: u32) -> RankId {
        id(ROLLOUT_SLOTS + at)
    }

    /// With players that are connected, and four lanes to play.
    fn round(learners: u32, players: u32) -> Round {
        let member = |at| Member { id: player(at), address: "[::1]:9".parse().expect("an address") };
        let mut round = Round::new(id(0));
        round.cast(Cast { learners: (0..learners).map(id).collect(), players: (0..players).map(member).collect() });
        (0..players).for_each(|at| round.connected(player(at)));
        round.begin(7, &[1.0, 2.0], orders());
        round
    }

    fn orders() -> Vec<PlayOrder> {
        (0..4).map(|lane| PlayOrder { lane, state: vec![lane as u8] }).collect()
    }

    fn played() -> PlayedBytes {
        PlayedBytes { trajectory: vec![1], after: vec![2], failures: 0, strays: 0 }
    }

    /// What a player is sent until there is nothing more: weights, and lanes with the numbers of their orders.
    fn sent(round: &mut Round, player: RankId) -> (bool, Vec<(u32, u64)>) {
        let (mut weights, mut lanes) = (false, Vec::new());
        while let Some(next) = round.next(player) {
            match next {
                Next::PassOn(_) => panic!("small weights are not passed on"),
                Next::Weights(id, bytes) => {
                    assert_eq!((id.version, bytes.len()), (7, 8));
                    weights = true;
                }
                Next::Play(number, order, _) => lanes.push((order.lane, number)),
            }
        }
        (weights, lanes)
    }

    #[test]
    fn weights_go_to_a_share_and_lanes_to_whoever_comes() {
        let mut round = round(2, 2);
        // The second player has its weights from the other learner.
        assert_eq!(sent(&mut round, player(1)), (false, vec![(0, 0), (1, 1)]));
        // The last lane is for whoever is free first: here for the learner.
        assert_eq!(sent(&mut round, player(0)), (true, vec![(2, 2)]));
        round.answered(player(1), 0, played());
        assert!(matches!(round.find(0), Lane::Found(Found::Played(_))));
        assert!(matches!(round.find(1), Lane::Found(Found::Meanwhile(3))));
        assert!(matches!(round.find(1), Lane::Sent(_)));
        assert_eq!(sent(&mut round, player(1)), (false, vec![]));
        assert_eq!(round.broadcast().bytes, 8);
    }

    #[test]
    fn player_without_its_weights_is_sent_them_and_the_order_again() {
        let mut round = round(2, 2);
        assert_eq!(sent(&mut round, player(1)), (false, vec![(0, 0), (1, 1)]));
        round.wanting(player(1), 0);
        assert_eq!(sent(&mut round, player(1)), (true, vec![(0, 0)]));
        // Of a round that is over: nothing is wanted any more.
        round.begin(7, &[1.0, 2.0], Vec::new());
        round.wanting(player(1), 1);
        assert_eq!(sent(&mut round, player(1)), (false, vec![]));
    }

    #[test]
    fn what_a_dead_player_had_is_played_by_another_or_by_the_learner() {
        let mut round = round(1, 2);
        assert_eq!(sent(&mut round, player(0)), (true, vec![(0, 0), (1, 1)]));
        round.disconnected(player(0));
        assert!(matches!(round.find(1), Lane::Found(Found::Nobody)));
        assert_eq!(sent(&mut round, player(1)), (true, vec![(0, 0), (2, 2)]));
        round.failed(player(1), 0);
        assert_eq!(round.take_failures(), 1);
        assert!(matches!(round.find(0), Lane::Found(Found::Nobody)));
    }

    #[test]
    fn broadcast_is_over_when_all_have_the_weights_of_the_round() {
        let mut round = round(1, 2);
        let newest = WeightsId { version: 7, digest: digest_of(&[1.0f32, 2.0].map(f32::to_le_bytes).concat()) };
        round.loaded(player(0), newest);
        round.loaded(player(1), WeightsId { version: 6, ..newest });
        assert_eq!(round.broadcast().seconds, None);
        round.loaded(player(1), newest);
        assert!(round.broadcast().seconds.is_some());
    }
}
