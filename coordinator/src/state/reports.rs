//! What agents report of their ranks, and what follows for room, jobs and the catalogue. Owns who may speak of whom (I32) and that what is old
//! changes nothing (I2); what a report means to a job is the job's. Part of `cluster.rs`.

use stoke_protocol::ids::{Digest, Generation, NodeId, Step};
use stoke_protocol::message::node::{Report, ToNode};
use stoke_protocol::message::rank::{Exit, RankEvent, RankId};

use super::checkpoints::{Checkpoint, Keep};
use super::cluster::Cluster;
use super::effect::Order;
use super::elastic::End;
use super::machine::{Job, Scene, stop_order};
use super::planted::PlantedBug;
use super::pruning::needed;
use super::words::exit_words;

impl Cluster {
    pub(super) fn report(&mut self, scene: &mut Scene<'_>, node: NodeId, report: &Report) {
        self.members.reported(node, report.sequence);
        let acknowledge = ToNode::Acknowledge { sequence: report.sequence, index: scene.index };
        scene.orders.push(Order::Send { node, message: acknowledge });
        let id = report.id;
        if !self.members.node(node).is_some_and(|node| node.held.contains_key(&id)) {
            // I32: a node speaks of its own ranks only.
            self.counts.foreign_reports += 1;
            return;
        }
        match &report.event {
            RankEvent::Ready { .. } => self.members.started(node, id.job, true),
            RankEvent::Exited { exit: Exit::NotStarted(_) } => self.members.started(node, id.job, false),
            RankEvent::Exited { .. } | RankEvent::Finished { .. } | RankEvent::Failed { .. } => {}
            RankEvent::ShardStored { .. } | RankEvent::ManifestStored { .. } | RankEvent::Resumed { .. } => {}
            RankEvent::Joined { .. } | RankEvent::PeerLost { .. } | RankEvent::WentOn { .. } => {}
            RankEvent::NotStored { .. } | RankEvent::Damaged { .. } => {}
            RankEvent::Differ { .. } | RankEvent::NotFinite { .. } | RankEvent::StateLost { .. } => {}
            RankEvent::CommandEnded { .. } => {}
        }
        if matches!(report.event, RankEvent::Exited { .. }) {
            self.members.release(node, id, self.bug);
            self.replan = true;
        }
        let run = self.jobs.get(id.job).and_then(|job| job.run.as_ref());
        let known = run.is_some_and(|run| run.ranks.contains_key(&id));
        // A planted bug takes the words of an old rank for those of the one that has its slot now.
        let mistaken =
            run.filter(|_| self.bug == Some(PlantedBug::ReportsUnfenced)).and_then(|run| run.of_slot(id.rank));
        self.judge(scene.at, node, (id, &report.event));
        match mistaken.filter(|_| !known) {
            Some(id) => self.rank_event(scene, id, &report.event),
            None if known => self.rank_event(scene, id, &report.event),
            None => {
                self.counts.stale_reports += 1;
                if !matches!(report.event, RankEvent::Exited { .. }) {
                    scene.orders.push(stop_order(node, id, "the job goes on without it"));
                }
            }
        }
    }

    fn rank_event(&mut self, scene: &mut Scene<'_>, id: RankId, event: &RankEvent) {
        if let RankEvent::ManifestStored { generation, step, uri, manifest_blake3 } = event {
            return self.manifest(scene, id, (*generation, *step), (uri, *manifest_blake3));
        }
        if let RankEvent::Damaged { uri, error } = event {
            let mine = self.catalogue.damage(id.job, uri);
            self.jobs.drive(id.job, self.placements, |job| job.damaged(scene, id, (uri, mine), error));
            return;
        }
        if let RankEvent::Differ { .. } | RankEvent::StateLost { .. } | RankEvent::ShardStored { .. } = event {
            return self.compared(scene, id, event);
        }
        if let RankEvent::NotFinite { .. } = event {
            return self.not_finite(scene, id, event);
        }
        self.jobs.drive(id.job, self.placements, |job| match event {
            RankEvent::Ready { address } => job.ready(scene, id, *address),
            RankEvent::ManifestStored { .. } | RankEvent::Damaged { .. } => {}
            RankEvent::Differ { .. } | RankEvent::StateLost { .. } => {}
            RankEvent::NotFinite { .. } | RankEvent::ShardStored { .. } => {}
            RankEvent::PeerLost { generation, peer, .. } => job.peer_lost(id, *generation, *peer),
            RankEvent::NotStored { generation, step, error } => {
                let words = format!("checkpoint at {step} was not written by {}: {error}", id.rank);
                job.not_stored(scene, id, (*generation, *step), words);
            }
            RankEvent::Finished { generation, outcome } => job.finished(scene, id, *generation, outcome.clone()),
            RankEvent::Failed { error, permanent } => job.failed(scene, id, error, *permanent),
            RankEvent::Exited { exit } => {
                let end = match exit {
                    Exit::Code(0) => End::Left,
                    Exit::AgentRestarted | Exit::AgentStopped => End::Machine,
                    Exit::Code(_) | Exit::Signal(_) | Exit::NotStarted(_) | Exit::Unseen => End::Fault,
                };
                job.gone(scene, &[id], &exit_words(exit), end);
            }
            RankEvent::Resumed { generation, step } => job.resumed(scene, id, *generation, *step),
            RankEvent::Joined { generation, step } => job.joined(scene, id, *generation, *step),
            RankEvent::CommandEnded { generation, exit } => job.command_ended(scene, id, *generation, exit),
            RankEvent::WentOn { generation, step, members } => job.went_on(scene, id, (*generation, *step), members),
        });
        // Whoever waited until parts were handed over may leave.
        let is_sharded = self.jobs.get(id.job).is_some_and(|job| job.sharded);
        self.replan |= is_sharded && matches!(event, RankEvent::Resumed { .. });
        self.replan |= matches!(event, RankEvent::Failed { .. });
        // A gang that runs now, or a rank that owns lanes, may have ranks that are to move, or lack some that play.
        let grown = matches!(event, RankEvent::Ready { .. } | RankEvent::Joined { .. });
        self.replan |= grown && self.jobs.get(id.job).is_some_and(Job::is_lacking);
    }

    /// The second phase of a checkpoint: it becomes visible, or its generation fails with the reason.
    fn manifest(
        &mut self,
        scene: &mut Scene<'_>,
        id: RankId,
        (generation, step): (Generation, Step),
        manifest: (&str, Digest),
    ) {
        let Some(job) = self.jobs.get(id.job).filter(|job| job.is_active()) else { return };
        let (uri, manifest_blake3) = manifest;
        let unfenced = matches!(self.bug, Some(PlantedBug::ShardsUnfenced | PlantedBug::ReportsUnfenced));
        if job.run.as_ref().is_none_or(|run| run.generation != generation) && !unfenced {
            // It came too late: the members that stored it are not the members any more, and those store it again.
            self.counts.stale_reports += 1;
            return;
        }
        let same = |last: &&Checkpoint| last.generation == generation && last.step == step;
        if self.catalogue.last(id.job).filter(same).is_some_and(|last| last.manifest_blake3 == manifest_blake3) {
            // It is told again because the agent that had told it is gone.
            return;
        }
        let outside = || Err(format!("{uri} is not in the job's folder {}", job.checkpoints));
        let checked = match self.catalogue.check(id.job, generation, step) {
            _ if self.bug == Some(PlantedBug::CommittedStepBack) => Ok(()),
            Ok(()) if !uri.strip_prefix(&job.checkpoints).is_some_and(|rest| rest.starts_with('/')) => outside(),
            checked => checked,
        };
        let shards = job.prepared(id, step, self.bug).ok_or("its shards were not all stored".to_owned());
        let shards = match checked.and(shards) {
            Ok(shards) => shards,
            Err(why) => {
                // Its rank is no worse for it; the next checkpoint takes its place.
                let words = format!("checkpoint at {step} not taken: {why}");
                self.jobs.drive(id.job, self.placements, |job| job.not_stored(scene, id, (generation, step), words));
                return;
            }
        };
        let checkpoint = Checkpoint {
            generation,
            step,
            uri: uri.to_owned(),
            shards: shards.len() as u32,
            bytes: shards.iter().map(|shard| shard.bytes).sum(),
            manifest_blake3,
            at: scene.at,
            index: scene.index,
        };
        let needed = needed(&self.jobs);
        let keep = Keep { newest: job.keep, needed: &|uri| needed.contains(uri), bug: self.bug };
        self.catalogue.commit(id.job, checkpoint, &keep);
        let kept = self.catalogue.kept(id.job);
        self.jobs.drive(id.job, self.placements, |job| job.committed(scene, step, kept));
    }
}
