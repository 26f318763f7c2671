//! What must hold after every entry, for the whole state at once. The fold checks its own steps as it goes; this is the second pair of eyes,
//! for the simulator (after each event), for snapshots and for starts. Never changes anything.

use stoke_protocol::ids::NodeId;
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::rank::RankId;

use super::cluster::Cluster;
use super::machine::Job;
use super::run::Run;
use super::split::Cut;

impl Cluster {
    /// Every invariant that can be seen in one state; the error starts with its number.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.members.check()?;
        self.jobs.check()?;
        for job in self.jobs.iter() {
            self.check_job(job)?;
            self.catalogue.check_job(job.id, job.keep, &job.worlds)?;
        }
        // Removed nodes too: ids are given in order, and never twice.
        let joined = self.members.last().0 + self.users.len().saturating_sub(1) as u64;
        if joined != self.tokens.spent() {
            return Err(format!("I33: {joined} members have joined, {} tokens were used", self.tokens.spent()));
        }
        self.check_revisions()?;
        self.check_held()
    }

    fn check_job(&self, job: &Job) -> Result<(), String> {
        if job.is_bounded() && job.failures > job.attempts_max {
            return Err(format!("I11: {} has failed {} times of {}", job.id, job.failures, job.attempts_max));
        }
        let Some(run) = &job.run else {
            return match job.state {
                JobState::Queued | JobState::Cancelled => Ok(()),
                // No node could serve its model.
                JobState::Failed if job.cut == Cut::Awaited => Ok(()),
                JobState::Starting | JobState::Running | JobState::Recovering | JobState::Cancelling => {
                    Err(format!("J1: {} is {:?} without ranks", job.id, job.state))
                }
                JobState::Succeeded | JobState::Failed => Err(format!("J3: {} has ended without ranks", job.id)),
            };
        };
        if job.state == JobState::Starting && run.ranks.len() != job.ask.ranks as usize {
            return Err(format!("I14: {} starts with {} of {} ranks", job.id, run.ranks.len(), job.ask.ranks));
        }
        if run.generation > job.generation {
            return Err(format!("I2: {} runs in {}, its newest is {}", job.id, run.generation, job.generation));
        }
        if job.state == JobState::Running {
            check_members(job, run)?;
        }
        match job.state {
            JobState::Queued if !run.is_over() => Err(format!("I3: {} is queued while its ranks live", job.id)),
            JobState::Recovering | JobState::Cancelling if run.is_over() => {
                Err(format!("I37: {} waits for ranks that are all gone", job.id))
            }
            JobState::Succeeded => check_digests(job, run),
            JobState::Queued | JobState::Starting | JobState::Running | JobState::Recovering => Ok(()),
            JobState::Cancelling | JobState::Failed | JobState::Cancelled => Ok(()),
        }
    }

    /// I15: a rank that may have a process holds its room, on its own node and no other.
    fn check_held(&self) -> Result<(), String> {
        let held = |node: NodeId, id: RankId| self.members.node(node).is_some_and(|node| node.held.contains_key(&id));
        for job in self.jobs.iter() {
            let Some(run) = &job.run else { continue };
            for (id, place) in &run.ranks {
                if !place.gone && !held(place.node, *id) {
                    return Err(format!("I15: {id} is alive and its room on {} is free", place.node));
                }
            }
        }
        for node in self.members.nodes() {
            for id in node.held.keys() {
                let run = self.jobs.get(id.job).and_then(|job| job.run.as_ref());
                let place = run.and_then(|run| run.ranks.get(id));
                if place.is_some_and(|place| place.node != node.id) {
                    return Err(format!("I3: {id} holds room on {} and was placed elsewhere", node.id));
                }
            }
        }
        Ok(())
    }
}

/// J1, I3 and J9: who trains is there, is ready, and has its slot for itself.
fn check_members(job: &Job, run: &Run) -> Result<(), String> {
    let id = job.id;
    let live = run.members.iter().filter(|id| run.ranks.get(id).is_some_and(|rank| !rank.gone)).count();
    if live == 0 || !run.is_finishing() && live < job.least_live() {
        return Err(format!("J9: {id} goes on with {live} ranks, its least is {}", job.ranks_min));
    }
    let mut slots = std::collections::BTreeSet::new();
    for member in run.members.iter().chain(&run.joining) {
        let Some(rank) = run.ranks.get(member) else {
            return Err(format!("J1: {member} is a member without a process"));
        };
        if rank.address.is_none() || rank.leaving {
            return Err(format!("J1: {member} is a member and not ready, or on its way out"));
        }
        // V1: beside a rank that moves there may be its successor.
        if !slots.insert(member.rank) && !run.succeeds(*member) {
            return Err(format!("I3: two ranks of {id} have the slot {}", member.rank));
        }
    }
    Ok(())
}

fn check_digests(job: &Job, run: &Run) -> Result<(), String> {
    let outcome = |id| run.ranks.get(id).and_then(|rank| rank.outcome.as_ref());
    let mut digests = run.members.iter().map(|id| outcome(id).map(|outcome| outcome.weights_blake3));
    let first = digests.next().flatten();
    if first.is_none() || digests.any(|digest| digest != first) {
        return Err(format!("I19: {} succeeded with different weights", job.id));
    }
    Ok(())
}
