//! What was seen to happen, so that invariants can be checked that no single state shows: what clients were told, what a step changed, which
//! coordinators were obeyed. Remembers; judges only where a fact is gone a moment later, and then notes it for the table of invariants.

use std::collections::{BTreeMap, BTreeSet};

use stoke_coordinator::state::liveness::Liveness;
use stoke_coordinator::state::machine::Job;
use stoke_coordinator::state::{Cluster, Control, Event, Input, Record};
use stoke_node::agent::fence::Fence;
use stoke_protocol::ids::{ClusterId, Digest, Epoch, Generation, JobId, LogIndex, NodeId};
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::rank::{RankEvent, RankId};

pub const CLUSTER: ClusterId = ClusterId([5; 16]);

/// What was seen to break which invariant, in one word and in many.
pub type Noted = (&'static str, String);

#[derive(Default)]
pub struct Oracle {
    /// The first thing that was seen to be wrong.
    pub noted: Option<Noted>,
    /// The highest epoch that a coordinator has had.
    epoch: Epoch,
    /// Submissions by owner and key.
    pub submissions: BTreeMap<(String, String), Submission>,
    /// Jobs whose cancel was answered.
    pub cancelled: BTreeSet<JobId>,
    /// Ends of jobs that clients were shown.
    pub shown: BTreeMap<JobId, JobState>,
    /// What must never come to be: keys of those who may not submit.
    pub forbidden: BTreeSet<String>,
    /// How often a checkpoint of a job was told to be damaged: the newest may be an older one then.
    pub damages: BTreeMap<JobId, u64>,
    pub spawned: u64,
    pub replays: u64,
}

/// What a client knows of its submission.
#[derive(Clone, Debug)]
pub struct Submission {
    pub spec: String,
    /// Told to the client: the floor of what must be there (I6).
    pub acked: Option<JobId>,
}

/// A job that an input must not change.
pub struct Before {
    job: Job,
    why: &'static str,
    report: RankId,
}

impl Oracle {
    pub fn note(&mut self, name: &'static str, what: impl FnOnce() -> String) {
        if self.noted.is_none() {
            self.noted = Some((name, what()));
        }
    }

    /// An agent has taken a coordinator for one to obey (I1).
    pub fn obeyed(&mut self, machine: usize, before: Fence, now: Fence) {
        if now.epoch < before.epoch || now.index < before.index {
            self.note("I1", || format!("machine {machine} obeys {now:?} after {before:?}"));
        }
    }

    pub fn started(&mut self, epoch: Epoch) {
        if epoch <= self.epoch {
            let before = self.epoch;
            self.note("I1", || format!("a coordinator starts as {epoch} after {before}"));
        }
        self.epoch = epoch;
    }

    /// Something is durable.
    pub fn recorded(&mut self, event: &Event) {
        if let Event::Reported { report, .. } = event
            && let RankEvent::Damaged { .. } = &report.event
        {
            *self.damages.entry(report.id.job).or_default() += 1;
        }
    }

    /// A restart has replayed the journal (I8).
    pub fn replayed(&mut self, last: LogIndex, hash: Digest, shadow_last: LogIndex, shadow: Digest) {
        self.replays += 1;
        if last < shadow_last {
            self.note("I6", || format!("the journal ends at {last} after a crash, {shadow_last} was durable"));
        }
        if hash != shadow {
            self.note("I8", || format!("replay up to {last} gives {hash}, the fold gave {shadow}"));
        }
    }

    /// `lost`: the coordinator has taken its node for lost, so that an order may still be on its way there after the answer. It is told to stop when
    /// it is back.
    pub fn spawned(&mut self, id: RankId, lost: bool) {
        self.spawned += 1;
        if !lost && self.cancelled.contains(&id.job) {
            self.note("I10", || format!("{id} starts after its job's cancel was answered"));
        }
    }

    /// The job that an input is about, if nothing may come of it.
    pub fn before(&self, cluster: &Cluster, input: &Input, liveness: &Liveness) -> Option<Before> {
        let Input::Report { session, report } = input else { return None };
        let id = report.id;
        let job = cluster.jobs().get(id.job)?;
        let (node, incarnation) = liveness.node(*session)?;
        let found = cluster.members().node(node)?;
        let rank = job.run.as_ref().and_then(|run| run.ranks.get(&id));
        let stale = |generation: Generation| job.run.as_ref().is_none_or(|run| generation < run.generation);
        let why = if rank.is_none() {
            "a rank that is gone"
        } else if matches!(
            &report.event,
            RankEvent::ShardStored { generation, .. }
                | RankEvent::ManifestStored { generation, .. }
                | RankEvent::Joined { generation, .. }
                | RankEvent::Resumed { generation, .. } if stale(*generation)
        ) {
            "an older generation"
        } else if found.incarnation != incarnation {
            "an older incarnation"
        } else if report.sequence <= found.reported {
            "a second time"
        } else if rank.is_some_and(|rank| rank.gone) {
            "a rank that is gone"
        } else if rank.is_some_and(|rank| rank.node != node) {
            "another node's rank"
        } else {
            return None;
        };
        Some(Before { job: job.clone(), why, report: id })
    }

    /// What a step has recorded and changed. `graced` tells which nodes may be taken as lost.
    pub fn after(
        &mut self,
        control: &Control,
        before: Option<Before>,
        records: &[Record],
        graced: &dyn Fn(NodeId) -> bool,
    ) {
        if let Some(Before { job, why, report }) = before {
            let now = control.cluster().jobs().get(job.id);
            // Room that an exit has freed may let the same job be placed.
            let placed = now.is_some_and(|now| now.generation > job.generation);
            if !placed && now != Some(&job) {
                let name = if why == "an older incarnation" { "I5" } else { "I2" };
                self.note(name, || format!("a report of {report} ({why}) has changed its job"));
            }
        }
        // A step lifts drains before it places, so those that are left were there when it did.
        let drained: BTreeSet<NodeId> =
            control.cluster().members().nodes().filter(|node| node.drain.is_some()).map(|node| node.id).collect();
        for record in records {
            match &record.event {
                Event::GenerationStarted { job, placement, generation } => {
                    let silent = |node: &&NodeId| !control.liveness().live().contains(*node);
                    if let Some(node) = placement.iter().find(silent) {
                        self.note("I16", || format!("{job} {generation} is placed on {node}, which is silent"));
                    }
                    if let Some(node) = placement.iter().find(|node| drained.contains(node)) {
                        self.note("I16", || format!("{job} {generation} is placed on {node}, which is drained"));
                    }
                    let ask = control.cluster().jobs().get(*job).map_or(0, |job| job.ask.ranks as usize);
                    if placement.len() != ask {
                        self.note("I14", || format!("{job} {generation} is placed with {} of {ask}", placement.len()));
                    }
                }
                Event::RanksPlaced { job, places, .. } => {
                    let silent = |node: &NodeId| !control.liveness().live().contains(node);
                    if let Some((rank, node)) = places.iter().find(|(_, node)| silent(node)) {
                        self.note("I16", || format!("{rank} of {job} is placed on {node}, which is silent"));
                    }
                    if let Some((rank, node)) = places.iter().find(|(_, node)| drained.contains(node)) {
                        self.note("I16", || format!("{rank} of {job} is placed on {node}, which is drained"));
                    }
                }
                Event::NodeLost { node, .. } if !graced(*node) => {
                    self.note("I4", || {
                        format!("{node} is taken as lost within the failover grace, and had not connected")
                    });
                }
                _ => {}
            }
        }
    }
}
