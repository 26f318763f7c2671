//! Replicas that are not the same: whose are right, and what follows. Part of the machine in `machine.rs`; who compares, and when, is the ranks'
//! (parameters travel with their partial sums) and the commit's (each shard tells of the state that it was cut from).
//!
//! D1 (I19): what most members have is right. A member that has something else is named, ended and replaced, and its node has a mark.
//! D2: without a majority nobody is believed, and where sums were applied since the last comparison the majority has them in its parameters too:
//! the job goes back to its last checkpoint, whose shards are of one state.
//! D3: so it does where ranks keep parts of the optimizer's state and one is lost: both that had it are gone, or have something else.

use std::collections::BTreeMap;

use stoke_protocol::ids::{Fingerprint, Generation, JobId, NodeId, Step};
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::rank::{RankEvent, RankId};

use super::cluster::Cluster;
use super::machine::{Job, REASON_CHARS_MAX, Scene, stop_order};
use super::run::Run;

/// Ranks or lanes that a reason names; it travels in a frame and stays in the timeline.
const LISTED_MAX: usize = 16;

/// What members have after `step` steps.
pub struct Comparison {
    pub step: Step,
    /// `parameters` or `state`.
    pub what: &'static str,
    pub replicas: BTreeMap<RankId, Fingerprint>,
}

impl Cluster {
    /// A member says that the members' parameters are not the same, or of which state its shard of a checkpoint is.
    pub(super) fn compared(&mut self, scene: &mut Scene<'_>, by: RankId, event: &RankEvent) {
        if let RankEvent::ShardStored { generation, step, shard, state } = event {
            let (at, stored) = ((*generation, *step), (shard.clone(), *state));
            let stored = self.jobs.drive(by.job, self.placements, |job| job.shard_stored(scene, by, at, stored));
            if let Some(comparison) = stored.flatten() {
                self.decide(scene, by.job, &comparison);
            }
        }
        if let RankEvent::Differ { generation, step, replicas } = event {
            let job = self.jobs.get(by.job).filter(|job| job.state == JobState::Running);
            let run = job.and_then(|job| job.run.as_ref()).filter(|run| run.generation == *generation);
            if run.is_some_and(|run| run.members.contains(&by)) {
                let replicas = replicas.iter().copied().collect();
                self.decide(scene, by.job, &Comparison { step: *step, what: "parameters", replicas });
            }
        }
        if let RankEvent::StateLost { generation, step, error } = event {
            let (begins, lost) = (self.begins(by.job), (*generation, *step));
            let error: String = error.chars().take(REASON_CHARS_MAX).collect();
            self.replan = true;
            self.jobs.drive(by.job, self.placements, |job| {
                job.state_lost(scene, by, lost, &format!("{error}; the job goes back to {begins}"))
            });
        }
    }

    /// D1 and D2.
    fn decide(&mut self, scene: &mut Scene<'_>, id: JobId, comparison: &Comparison) {
        let begins = self.begins(id);
        self.replan = true;
        let wrong = self.jobs.drive(id, self.placements, |job| job.decide(scene, comparison, &begins));
        wrong.unwrap_or_default().into_iter().for_each(|node| self.faults.miscomputed(node));
    }

    /// With what a job would begin again now, in words.
    pub(super) fn begins(&self, id: JobId) -> String {
        let resume = self.jobs.get(id).and_then(|job| job.resume.clone());
        match (self.catalogue.last(id), resume) {
            (Some(last), _) => format!("its checkpoint at {}", last.step),
            (None, Some(uri)) => uri,
            (None, None) => "its beginning".to_owned(),
        }
    }
}

impl Job {
    /// Gives the nodes of members that are wrong. `begins`: with what it would begin again.
    fn decide(&mut self, scene: &mut Scene<'_>, comparison: &Comparison, begins: &str) -> Vec<NodeId> {
        let Comparison { step, what, replicas } = comparison;
        let Some(run) = self.run.as_mut() else { return Vec::new() };
        let mut votes: BTreeMap<Fingerprint, u32> = BTreeMap::new();
        let members = || run.members.iter().filter_map(|id| Some((*id, *replicas.get(id)?)));
        members().for_each(|(_, has)| *votes.entry(has).or_default() += 1);
        let majority = votes.iter().find(|(_, count)| **count as usize * 2 > run.members.len());
        let Some((right, count)) = majority.map(|(right, count)| (*right, *count)) else {
            let all: Vec<String> = members().map(|(id, has)| format!("{} has {has}", named(run, id))).collect();
            let reason = format!(
                "after {step} the ranks' {what} are not the same and none have a majority: {}; the job goes back to {begins}",
                listed(all)
            );
            self.go_back(scene, reason);
            return Vec::new();
        };
        let wrong: Vec<(RankId, Fingerprint)> = members().filter(|(_, has)| *has != right).collect();
        if wrong.is_empty() {
            return Vec::new();
        }
        let words: Vec<String> = wrong.iter().map(|(id, has)| format!("{} has {has}", named(run, *id))).collect();
        let mut reason = format!("after {step} {} as its {what}, {count} others have {right}", listed(words));
        if self.digest_every != 1 {
            reason = format!(
                "{reason}; wrong numbers may be in the sums since the last comparison, the job goes back to {begins}"
            );
            let nodes = wrong.iter().filter_map(|(id, _)| Some(run.ranks.get(id)?.node)).collect();
            self.go_back(scene, reason);
            return nodes;
        }
        let ids: Vec<RankId> = wrong.into_iter().map(|(id, _)| id).collect();
        self.expel(scene, &ids, &reason)
    }

    /// D3. Every member says it; the first is enough.
    fn state_lost(&mut self, scene: &mut Scene<'_>, by: RankId, (generation, step): (Generation, Step), why: &str) {
        let runs = self.run.as_ref().filter(|_| self.state == JobState::Running);
        if runs.is_some_and(|run| run.generation == generation && run.members.contains(&by)) {
            self.go_back(scene, format!("after {step} {why}"));
        }
    }

    /// Members whose machines are at fault are ended and replaced; the others go on. Gives their nodes.
    pub(super) fn expel(&mut self, scene: &mut Scene<'_>, ids: &[RankId], reason: &str) -> Vec<NodeId> {
        let Some(run) = self.run.as_mut() else { return Vec::new() };
        let mut nodes = Vec::new();
        for id in ids {
            if let Some(rank) = run.ranks.get_mut(id) {
                rank.leaving = true;
                nodes.push(rank.node);
                scene.orders.push(stop_order(rank.node, *id, reason));
            }
        }
        self.lose(scene, ids, reason, true);
        nodes
    }

    /// A rollback, with its reason in the timeline (I17).
    pub(super) fn go_back(&mut self, scene: &mut Scene<'_>, reason: String) {
        if !std::mem::replace(&mut self.struck, true) {
            self.failures += 1;
        }
        self.recover(scene, reason);
    }
}

/// In words that fit a message, whatever the number of ranks.
pub(super) fn listed(mut words: Vec<String>) -> String {
    let more = words.len().saturating_sub(LISTED_MAX);
    words.truncate(LISTED_MAX);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", words.join(", "))
}

pub(super) fn named(run: &Run, id: RankId) -> String {
    run.ranks.get(&id).map_or_else(|| id.rank.to_string(), |rank| format!("{} on {}", id.rank, rank.node))
}
