//! Orders to sweep what prunes took out of sight: one at a time, and of a job the newest. Part of the agent's state; removes nothing itself.

use std::collections::BTreeMap;

use stoke_protocol::ids::{Generation, JobId, LogIndex, Step};

/// What stays in the folder of a job that was pruned, see `ToNode::Sweep`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sweep {
    pub index: LogIndex,
    pub checkpoints: String,
    pub newest: (Step, Generation),
    pub keep: Vec<String>,
}

#[derive(Debug, Default)]
pub(super) struct Sweeps {
    waiting: BTreeMap<JobId, Sweep>,
    under_way: Option<(JobId, LogIndex)>,
}

impl Sweeps {
    /// Takes an order; gives the one to begin with, if none is under way.
    pub fn order(&mut self, job: JobId, sweep: Sweep) -> Option<(JobId, Sweep)> {
        // The one that is under way is answered in whichever session is up then.
        if self.under_way != Some((job, sweep.index)) {
            self.waiting.insert(job, sweep);
        }
        self.next()
    }

    /// The one under way has ended; gives the next.
    pub fn ended(&mut self) -> Option<(JobId, Sweep)> {
        self.under_way = None;
        self.next()
    }

    fn next(&mut self) -> Option<(JobId, Sweep)> {
        let next = if self.under_way.is_none() { self.waiting.pop_first() } else { None };
        self.under_way = next.as_ref().map(|(job, sweep)| (*job, sweep.index)).or(self.under_way);
        next
    }
}
