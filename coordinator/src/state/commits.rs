//! How a job's checkpoints come to be visible: shards are collected, one commit at a time is under way, and what cannot be used gives way. Part of
//! the machine in `machine.rs`; what is visible is the catalogue's (`checkpoints.rs`).

use stoke_protocol::ids::{Fingerprint, Generation, Step};
use stoke_protocol::list::List;
use stoke_protocol::message::node::ToNode;
use stoke_protocol::message::rank::{RankId, ShardRecord};

use super::effect::Order;
use super::machine::{Job, REASON_CHARS_MAX, Scene};
use super::planted::PlantedBug;
use super::replicas::Comparison;
use super::run::{Run, complete, mixed};

/// Checkpoints that a run may have in preparation: a rank that never stores its shard must not fill the state.
const PREPARED_MAX: usize = 8;

impl Job {
    /// A shard is durable (J8). Gives what is to be judged when the shards are not of one state: then there is no commit.
    pub fn shard_stored(
        &mut self,
        scene: &mut Scene<'_>,
        id: RankId,
        (generation, step): (Generation, Step),
        (shard, state): (ShardRecord, Fingerprint),
    ) -> Option<Comparison> {
        let active = self.is_active();
        let run = self.run.as_mut().filter(|_| active)?;
        let unfenced = matches!(scene.bug, Some(PlantedBug::ShardsUnfenced | PlantedBug::ReportsUnfenced));
        let position = run.members.iter().position(|member| *member == id);
        let placed = position.is_some_and(|position| position as u32 == shard.index);
        if run.committed.is_some_and(|committed| step <= committed)
            || !(generation == run.generation && placed || unfenced && (shard.index as usize) < run.members.len())
        {
            return None;
        }
        if run.prepared.len() >= PREPARED_MAX && !run.prepared.contains_key(&step) {
            let oldest = run.prepared.keys().find(|old| Some(**old) != run.committing).copied();
            match oldest {
                Some(oldest) if oldest < step => drop(run.prepared.remove(&oldest)),
                Some(_) | None => return None,
            }
        }
        run.prepared.entry(step).or_default().insert(shard.index, (shard, state));
        if let Some(replicas) = mixed(run, step) {
            run.prepared.remove(&step);
            return Some(Comparison { step, what: "state", replicas });
        }
        self.commit_next(scene);
        None
    }

    /// Orders the newest complete checkpoint to be committed, if none is under way.
    fn commit_next(&mut self, scene: &mut Scene<'_>) {
        let Some(run) = self.run.as_mut().filter(|run| run.committing.is_none()) else { return };
        let newest = run.prepared.keys().rev().find_map(|step| Some((*step, complete(run, *step, scene.bug)?)));
        let Some((step, shards)) = newest else { return };
        run.committing = Some(step);
        run.prepared.retain(|older, _| *older >= step);
        self.order_commit(scene, step, shards);
    }

    /// A checkpoint will not be: a shard or its manifest could not be written, or is not taken.
    pub fn not_stored(&mut self, scene: &mut Scene<'_>, id: RankId, at: (Generation, Step), words: String) {
        let (generation, step) = at;
        let Some(run) = self.run.as_mut().filter(|run| run.generation == generation) else { return };
        if !run.members.contains(&id) {
            return;
        }
        run.prepared.remove(&step);
        run.committing.take_if(|committing| *committing == step);
        // J10: what is visible stays, whatever is said of it later.
        if run.committed.is_none_or(|committed| committed < step) || scene.bug == Some(PlantedBug::CommittedAbandoned) {
            to_each(scene, run, |id| ToNode::Abandon { id, generation, step });
        }
        self.note(scene, words.chars().take(REASON_CHARS_MAX).collect());
        self.commit_next(scene);
        // One that makes room does not wait for another try: it begins at the checkpoint before.
        self.stop_for_another(scene);
        self.changed(scene);
    }

    /// The checkpoint that a gang was to begin with cannot be used. `mine`: it was one of this job's, and the one before it is taken.
    pub fn damaged(&mut self, scene: &mut Scene<'_>, id: RankId, (uri, mine): (&str, bool), error: &str) {
        let first =
            mine || self.run.as_ref().is_some_and(|run| run.resume.as_ref().is_some_and(|origin| origin.uri == uri));
        if !self.is_active() || !self.knows(id) || !first {
            return;
        }
        let error: String = error.chars().take(REASON_CHARS_MAX).collect();
        if !mine && self.resume.as_deref() == Some(uri) {
            // There is no other one to take.
            self.doomed = true;
        }
        if self.doomed {
            self.recover(scene, format!("{} failed: {error}", id.rank));
        } else if mine {
            self.recover(scene, format!("{uri} is damaged, an earlier one is taken: {error}"));
        }
    }

    pub(super) fn order_commit(&self, scene: &mut Scene<'_>, step: Step, shards: List<ShardRecord>) {
        let Some(run) = &self.run else { return };
        let Some((id, first)) = run.members.first().and_then(|id| Some((*id, run.ranks.get(id)?))) else { return };
        let message = ToNode::Commit { id, generation: run.generation, step, shards };
        scene.orders.push(Order::Send { node: first.node, message });
    }

    /// The shards of a prepared checkpoint, when a manifest of it may count (J8).
    pub fn prepared(&self, id: RankId, step: Step, bug: Option<PlantedBug>) -> Option<List<ShardRecord>> {
        let run = self.run.as_ref().filter(|run| self.is_active() && run.members.first() == Some(&id))?;
        complete(run, step, bug)
    }

    /// The checkpoint at `step` is in the catalogue.
    pub fn committed(&mut self, scene: &mut Scene<'_>, step: Step, kept: Vec<String>) {
        let Some(run) = self.run.as_mut() else { return };
        run.committed = Some(step);
        run.committing.take_if(|committing| *committing <= step);
        run.prepared.retain(|prepared, _| *prepared > step);
        if self.reached.is_some_and(|reached| step > reached) {
            self.failures = 0;
        }
        self.reached = self.reached.max(Some(step));
        to_each(scene, run, |id| ToNode::Committed { id, step, keep: kept.clone().into() });
        self.note(scene, format!("checkpoint at {step} committed"));
        self.commit_next(scene);
        self.stop_for_another(scene);
        self.changed(scene);
    }
}

/// To every rank whose process may be there.
fn to_each(scene: &mut Scene<'_>, run: &Run, message: impl Fn(RankId) -> ToNode) {
    let there = run.ranks.iter().filter(|(_, rank)| !rank.gone);
    scene.orders.extend(there.map(|(id, rank)| Order::Send { node: rank.node, message: message(*id) }));
}
