//! Ranks that play environments for those that learn, in slots of their own. They are no members: they own no lanes, no generation begins or ends
//! with them, and their deaths are no failures of their job, for whoever learns can play its lanes by itself. Owns who is told of them. Part of the
//! machine in `machine.rs`.
//!
//! U1: they are placed while the job runs, where there is room, and replaced one by one. U2: each learner is told of all that are ready, whenever
//!   that changes; the newest list counts.

use stoke_protocol::ids::{ROLLOUT_SLOTS, Rank};
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::node::ToNode;
use stoke_protocol::message::rank::{Member, RankId};

use super::effect::Order;
use super::machine::{Job, Scene};

impl Job {
    /// Slots beside those of the members.
    pub(super) fn rollout_slots(&self) -> impl Iterator<Item = Rank> + use<> {
        (ROLLOUT_SLOTS..ROLLOUT_SLOTS + self.ask.rollouts).map(Rank)
    }

    /// U2.
    pub(super) fn tell_rollouts(&self, scene: &mut Scene<'_>) {
        let Some(run) = self.run.as_ref().filter(|_| self.ask.rollouts > 0 && self.state == JobState::Running) else {
            return;
        };
        for (id, rank) in run.ranks.iter().filter(|(id, rank)| !id.rank.is_rollout() && !rank.gone) {
            if rank.address.is_some() {
                scene.orders.push(Order::Send { node: rank.node, message: self.rollouts_for(*id) });
            }
        }
    }

    /// What a rank is told.
    pub(super) fn rollouts_for(&self, id: RankId) -> ToNode {
        let ranks = self.run.iter().flat_map(|run| &run.ranks);
        let ready = ranks.filter(|(id, rank)| id.rank.is_rollout() && rank.is_wanted());
        let rollouts = ready.filter_map(|(id, rank)| Some(Member { id: *id, address: rank.address? })).collect();
        ToNode::Rollouts { id, rollouts }
    }

    /// Some of them are not there any more, and the learners go on. Those that die again and again come back later and later.
    pub(super) fn lose_rollouts(&mut self, scene: &mut Scene<'_>, reason: &str, fault: bool) {
        self.turned_away += u32::from(fault);
        self.note(scene, reason.to_owned());
        self.tell_rollouts(scene);
        self.changed(scene);
    }
}
