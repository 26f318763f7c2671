//! Nodes that are emptied. Owns a drain from the wish to its end: the ranks that are told to move, the deadline, and what stands in the way;
//! how a rank moves is its job's (`moves.rs`), and where it goes is the planner's. Parts of `cluster.rs` and `control.rs`.
//!
//! D1 (I16): from the entry that asks for it on, a node gets no new ranks. D2: a drain outlives restarts of the coordinator and of the agent. Its
//! deadline goes on over a restart by the coordinator's own clock, and never takes longer than it was given from there on.

use std::collections::BTreeMap;

use stoke_protocol::identity::Subject;
use stoke_protocol::ids::{JobId, NodeId};
use stoke_protocol::message::client::{JobState, Reply};
use stoke_protocol::message::rank::RankId;

use super::cluster::{Cluster, Refused};
use super::control::{Control, Step};
use super::event::Event;
use super::machine::Scene;
use super::members::{Drain, Node};
use super::requests::{Answer, invalid, owner, refusal};
use super::run::Move;
use super::time::{Mono, Now};

/// A deadline is a number of hours, not of years.
const DEADLINE_MS_MAX: u64 = 30 * 24 * 3_600_000;
const NODES_MEND: &str = "`stoke nodes` lists the nodes";
/// Ranks of which a reason tells; the rest is counted.
const TOLD_MAX: usize = 8;

impl Cluster {
    pub(super) fn check_node(&self, node: NodeId) -> Result<&Node, Refused> {
        self.members.node(node).ok_or_else(|| Refused::NotFound(format!("there is no {node}")))
    }

    pub(super) fn check_lift(&self, node: NodeId) -> Result<(), Refused> {
        match self.check_node(node)?.drain {
            Some(_) => Ok(()),
            None => Err(Refused::Conflict(format!("{node} is not being drained"))),
        }
    }

    pub(super) fn check_overdue(&self, node: NodeId) -> Result<(), Refused> {
        match &self.check_node(node)?.drain {
            Some(Drain { overdue: false, deadline_ms: Some(_), .. }) => Ok(()),
            Some(_) | None => Err(Refused::Conflict(format!("{node} has no deadline"))),
        }
    }

    pub(super) fn drain(&mut self, scene: &mut Scene<'_>, node: NodeId, (deadline_ms, by): (Option<u64>, &str)) {
        let since = scene.at;
        self.members.drain(node, Some(Drain { by: by.to_owned(), since, deadline_ms, overdue: false }));
        self.each_held(node, |job, ids| ids.iter().for_each(|id| job.move_away(scene, *id, Move::Drained)));
    }

    pub(super) fn lift_drain(&mut self, scene: &mut Scene<'_>, node: NodeId) {
        self.members.drain(node, None);
        self.each_held(node, |job, ids| ids.iter().for_each(|id| job.stay(scene, *id)));
    }

    pub(super) fn drain_overdue(&mut self, scene: &mut Scene<'_>, node: NodeId) {
        let drain = self.members.node(node).and_then(|node| node.drain.clone());
        self.members.drain(node, drain.map(|drain| Drain { overdue: true, ..drain }));
        let reason = "was stopped: its node is being drained, and the deadline is over";
        self.each_held(node, |job, ids| job.withdraw(scene, ids, reason));
    }

    fn each_held(&mut self, node: NodeId, mut drive: impl FnMut(&mut super::machine::Job, &[RankId])) {
        self.replan = true;
        let mut held: BTreeMap<JobId, Vec<RankId>> = BTreeMap::new();
        for id in self.members.node(node).into_iter().flat_map(|node| node.held.keys()) {
            held.entry(id.job).or_default().push(*id);
        }
        for (job, ids) in held {
            self.jobs.drive(job, self.placements, |job| drive(job, &ids));
        }
    }
}

impl Control {
    pub(super) fn ask_drain(
        &mut self,
        step: &mut Step,
        caller: &Subject,
        (node, deadline_ms): (NodeId, Option<u64>),
    ) -> Answer {
        if deadline_ms.is_some_and(|deadline| deadline > DEADLINE_MS_MAX) {
            return Err(invalid("a deadline of more than 30 days".into(), "use less, or none"));
        }
        let found = self.cluster.check_node(node).map_err(|refused| refusal(refused, NODES_MEND))?;
        let before = found.drain.as_ref().filter(|drain| !drain.overdue);
        if before.is_none_or(|drain| drain.deadline_ms != deadline_ms) {
            self.commit(step, Event::DrainAsked { node, deadline_ms, by: owner(caller) })
                .map_err(|refused| refusal(refused, NODES_MEND))?;
            match deadline_ms {
                Some(deadline_ms) => drop(self.deadlines.insert(node, self.now.mono.plus_ms(deadline_ms))),
                None => drop(self.deadlines.remove(&node)),
            }
            // So that the answer tells what stands in the way.
            self.place(step);
        }
        self.node_answer(node)
    }

    pub(super) fn ask_undrain(&mut self, step: &mut Step, caller: &Subject, node: NodeId) -> Answer {
        if self.cluster.check_node(node).is_ok_and(|node| node.drain.is_some()) {
            self.deadlines.remove(&node);
            self.commit(step, Event::DrainLifted { node, by: owner(caller) })
                .map_err(|refused| refusal(refused, NODES_MEND))?;
        }
        self.node_answer(node)
    }

    pub(super) fn node_answer(&self, node: NodeId) -> Answer {
        let found = self.cluster.check_node(node).map_err(|refused| refusal(refused, NODES_MEND))?;
        Ok(Reply::Node(Box::new(self.node_view(found))))
    }

    /// Deadlines of drains that a coordinator which has just started finds in its journal.
    pub(super) fn deadlines(cluster: &Cluster, now: Now) -> BTreeMap<NodeId, Mono> {
        let drains = cluster.members().nodes().filter_map(|node| Some((node.id, node.drain.as_ref()?)));
        let open = drains.filter(|(_, drain)| !drain.overdue);
        let left = open.filter_map(|(node, drain)| {
            let whole = drain.deadline_ms?;
            Some((node, whole - whole.min(now.wall.0.saturating_sub(drain.since.0))))
        });
        left.map(|(node, left_ms)| (node, now.mono.plus_ms(left_ms))).collect()
    }

    pub(super) fn end_drains(&mut self, step: &mut Step) {
        let now = self.now.mono;
        let due: Vec<NodeId> = self.deadlines.iter().filter(|(_, due)| now >= **due).map(|(node, _)| *node).collect();
        for node in due {
            self.deadlines.remove(&node);
            if self.cluster.members().node(node).is_some_and(|node| !node.is_empty()) {
                // A drain that was lifted meanwhile has none.
                let _unchanged = self.commit(step, Event::DrainOverdue { node });
            }
        }
    }

    /// For those who watch how ranks do: a rank is to move to another node, where there is room for it.
    pub fn replace(&mut self, step: &mut Step, id: RankId, reason: String) -> Result<(), Refused> {
        self.commit(step, Event::MoveAsked { id, reason })
    }

    /// What a drain still waits for.
    pub(super) fn drain_words(&self, node: &Node) -> String {
        let mut words: Vec<String> = node.held.keys().take(TOLD_MAX).map(|id| self.rank_words(*id)).collect();
        if node.held.len() > TOLD_MAX {
            words.push(format!("and {} more", node.held.len() - TOLD_MAX));
        }
        words.join("; ")
    }

    fn rank_words(&self, id: RankId) -> String {
        let name = format!("{} {}", id.job, id.rank);
        let Some(job) = self.cluster.jobs().get(id.job) else { return format!("{name} is being stopped") };
        let Some(run) = job.run.as_ref().filter(|_| job.expects(id)) else { return format!("{name} is being stopped") };
        if job.state == JobState::Starting {
            return format!("{name} starts, and moves then");
        }
        if run.ranks.values().any(|rank| rank.outcome.is_some()) {
            return format!("{name} is about to end with its job");
        }
        if let Some(to) = run.successor(id).and_then(|successor| run.ranks.get(&successor)) {
            return format!("{name} moves to {}", to.node);
        }
        match self.stuck.get(&id) {
            Some(why) => format!("{name} {why}"),
            None => format!("{name} waits for a successor"),
        }
    }
}
