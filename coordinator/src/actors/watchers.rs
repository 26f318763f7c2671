//! Who watches which job. Owns the pace: changes are gathered, and a watcher that does not keep up gets the newest view, not all of them.

use std::collections::{BTreeMap, BTreeSet};

use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::JobView;
use tokio::sync::mpsc;

/// Watchers of all jobs; more are refused by closing their channel.
const WATCHERS_MAX: usize = 4_096;

#[derive(Default)]
pub(super) struct Watchers {
    jobs: BTreeMap<JobId, Vec<mpsc::Sender<JobView>>>,
    changed: BTreeSet<JobId>,
    count: usize,
}

impl Watchers {
    pub fn add(&mut self, job: JobId, views: mpsc::Sender<JobView>) {
        if self.count < WATCHERS_MAX {
            self.count += 1;
            self.jobs.entry(job).or_default().push(views);
            self.changed.insert(job);
        }
    }

    pub fn changed(&mut self, job: JobId) {
        if self.jobs.contains_key(&job) {
            self.changed.insert(job);
        }
    }

    /// Jobs whose watchers have not been told of the newest change.
    pub fn take_changed(&mut self) -> BTreeSet<JobId> {
        std::mem::take(&mut self.changed)
    }

    /// Tells all watchers of a job. One that is full is told next time; after the last view all are let go.
    pub fn tell(&mut self, view: &JobView) {
        let Some(watchers) = self.jobs.get_mut(&view.job) else { return };
        let before = watchers.len();
        let last = view.state.is_terminal();
        let mut behind = false;
        watchers.retain(|watcher| match watcher.try_send(view.clone()) {
            Ok(()) => !last,
            Err(mpsc::error::TrySendError::Full(_)) => {
                behind = true;
                true
            }
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        });
        self.count -= before - watchers.len();
        if watchers.is_empty() {
            self.jobs.remove(&view.job);
        } else if behind {
            self.changed.insert(view.job);
        }
    }
}
