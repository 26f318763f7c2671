//! All jobs: ids, idempotency keys, the queue, and what is forgotten. Owns who is in line; what becomes of one job is `machine.rs`.
//!
//! Q1: the queue holds exactly the jobs that are `Queued`, by priority, then by submission. Q2 (I7): one job a key and owner.
//! Q3: jobs that have not ended are never forgotten. Q4: jobs that lack ranks, or whose ranks lost each other, are known
//! without a search.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::JobState;

use super::event::Submission;
use super::machine::Job;
use super::time::Time;

/// Jobs that have ended and are remembered, with their keys. More would let the snapshot grow for ever.
pub const ENDED_MAX: usize = 10_000;
/// Jobs that have not ended: more wait at the submitter's.
pub const ACTIVE_MAX: usize = 10_000;
/// Bytes of an idempotency key.
pub const KEY_BYTES_MAX: usize = 128;

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Jobs {
    last: JobId,
    jobs: BTreeMap<JobId, Job>,
    keys: BTreeMap<(String, String), JobId>,
    queue: BTreeSet<(Reverse<i32>, JobId)>,
    ended: BTreeSet<JobId>,
    /// Running jobs without all their ranks, or with ranks that are to move.
    lacking: BTreeSet<JobId>,
    /// Running jobs whose ranks have lost each other.
    parted: BTreeSet<JobId>,
    /// Jobs with ranks that are on their way out, ended ones too.
    leaving: BTreeSet<JobId>,
    /// Jobs that could make room for a more urgent one.
    yielders: BTreeSet<(i32, Reverse<JobId>)>,
}

impl Jobs {
    pub fn get(&self, id: JobId) -> Option<&Job> {
        self.jobs.get(&id)
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Job> + ExactSizeIterator {
        self.jobs.values()
    }

    pub fn by_key(&self, owner: &str, key: &str) -> Option<&Job> {
        self.jobs.get(self.keys.get(&(owner.to_owned(), key.to_owned()))?)
    }

    pub fn last(&self) -> JobId {
        self.last
    }

    /// Jobs that have not ended.
    pub fn active(&self) -> usize {
        self.jobs.len() - self.ended.len()
    }

    /// First in line first.
    pub fn queue(&self) -> impl ExactSizeIterator<Item = &Job> {
        self.queue.iter().map(|(_, id)| &self.jobs[id])
    }

    /// Running jobs that lack ranks, or successors of ranks that are to move.
    pub fn lacking(&self) -> impl Iterator<Item = &Job> {
        self.lacking.iter().map(|id| &self.jobs[id])
    }

    /// Jobs that could make room for one of this priority: the least urgent first, among equals the newest.
    pub fn yielders(&self, priority: i32) -> impl Iterator<Item = &Job> {
        self.yielders.iter().take_while(move |(own, _)| *own < priority).map(|(_, Reverse(id))| &self.jobs[id])
    }

    /// Jobs whose room, or a part of it, is on its way back.
    pub fn leaving(&self) -> impl Iterator<Item = &Job> {
        self.leaving.iter().map(|id| &self.jobs[id])
    }

    /// Running jobs whose ranks have lost each other.
    pub fn parted(&self) -> impl Iterator<Item = &Job> {
        self.parted.iter().map(|id| &self.jobs[id])
    }

    pub fn submit(&mut self, now: Time, queued_after: u64, submission: Submission) -> JobId {
        self.last = self.last.next();
        let id = self.last;
        let job = Job::new(id, now, queued_after, submission);
        self.queue.insert((Reverse(job.priority), id));
        self.keys.insert((job.owner.clone(), job.key.clone()), id);
        self.jobs.insert(id, job);
        id
    }

    /// Drives one job and keeps the queue true. `queued_after` is noted when the job comes into the queue.
    pub fn drive<T>(&mut self, id: JobId, queued_after: u64, drive: impl FnOnce(&mut Job) -> T) -> Option<T> {
        let job = self.jobs.get_mut(&id)?;
        let before = job.state;
        let driven = drive(job);
        let place = (Reverse(job.priority), id);
        if before != JobState::Queued && job.state == JobState::Queued {
            job.queued_after = queued_after;
            self.queue.insert(place);
        }
        if before == JobState::Queued && job.state != JobState::Queued {
            self.queue.remove(&place);
        }
        if job.state.is_terminal() {
            self.ended.insert(id);
        }
        let tables = [
            (&mut self.lacking, job.is_lacking()),
            (&mut self.parted, job.is_parted()),
            (&mut self.leaving, job.is_leaving()),
        ];
        for (table, belongs) in tables {
            if belongs {
                table.insert(id);
            } else {
                table.remove(&id);
            }
        }
        let (yielder, may_yield) = ((job.priority, Reverse(id)), job.may_yield());
        if may_yield {
            self.yielders.insert(yielder);
        } else {
            self.yielders.remove(&yielder);
        }
        Some(driven)
    }

    /// Only for `PlantedBug::CancelledStaysQueued`.
    pub(super) fn queue_again(&mut self, id: JobId) {
        if let Some(job) = self.jobs.get(&id) {
            self.queue.insert((Reverse(job.priority), id));
        }
    }

    /// Takes the oldest job that has ended and is one too many, but for those that are held.
    pub fn forget_one(&mut self, is_held: impl Fn(JobId) -> bool) -> Option<JobId> {
        if self.ended.len() <= ENDED_MAX {
            return None;
        }
        let id = self.ended.iter().copied().find(|id| !is_held(*id))?;
        self.ended.remove(&id);
        self.leaving.remove(&id);
        let job = self.jobs.remove(&id)?;
        self.keys.remove(&(job.owner, job.key));
        Some(id)
    }

    /// Q1 and Q2; the error names the job.
    pub fn check(&self) -> Result<(), String> {
        let mut keys = BTreeSet::new();
        for job in self.jobs.values() {
            let queued = self.queue.contains(&(Reverse(job.priority), job.id));
            if queued != (job.state == JobState::Queued) {
                return Err(format!("Q1: {} is {:?}, in the queue: {queued}", job.id, job.state));
            }
            if !keys.insert((&job.owner, &job.key)) {
                return Err(format!("I7: {} has the key {:?} of an earlier job", job.id, job.key));
            }
            if job.is_lacking() != self.lacking.contains(&job.id) {
                let (missing, moving) = (job.missing(), job.moving());
                return Err(format!("Q4: {} lacks {missing:?} and moves {moving:?}, the table says otherwise", job.id));
            }
            let tables = (self.leaving.contains(&job.id), self.yielders.contains(&(job.priority, Reverse(job.id))));
            if tables != (job.is_leaving(), job.may_yield()) {
                return Err(format!("Q4: the tables are wrong about the room that {} gives or could give", job.id));
            }
            if job.is_parted() != self.parted.contains(&job.id) {
                return Err(format!("Q4: the table is wrong about ranks of {} that lost each other", job.id));
            }
            if job.state.is_terminal() != self.ended.contains(&job.id) {
                return Err(format!("Q3: {} is {:?}, the table of ended jobs is wrong about it", job.id, job.state));
            }
        }
        Ok(())
    }
}
