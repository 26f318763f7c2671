//! Whether models answer: a token went through the whole gang just now. Owns the probes: one at a time a model, and no more than one a second,
//! however many ask.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use stoke_protocol::ids::JobId;
use stoke_protocol::message::serve::Ask;
use stoke_protocol::spec::Task;

use super::asking::Desk;
use super::received::Event;

/// What a probe has found is true for so long.
const FRESH: Duration = Duration::from_secs(1);
/// A gang that needs longer for one token is not ready.
const PROBE_MAX: Duration = Duration::from_secs(5);

pub(super) const EVERY_TASK: &[Task] = &[Task::Generate, Task::Embed, Task::Infer];

/// The last probe of each model.
pub(super) struct Readiness {
    desk: Arc<Desk>,
    known: Mutex<BTreeMap<Probed, Arc<Probe>>>,
}

/// A model, or one job of it.
type Probed = (String, Option<JobId>);

/// When it was found, and what. Locked while one is on its way, so that those who ask meanwhile wait for it.
type Probe = tokio::sync::Mutex<Option<(Instant, bool)>>;

impl Readiness {
    pub(super) fn new(desk: Arc<Desk>) -> Self {
        Self { desk, known: Mutex::default() }
    }

    /// Whether a model that is served answers, or one of its jobs. None: it is not served, or not by this job.
    pub(super) async fn model(&self, name: &str, job: Option<JobId>) -> Option<bool> {
        let models = self.desk.table().models();
        let is_served = |model: &str, job: Option<JobId>| match job {
            Some(job) => self.desk.table().has(model, job),
            None => models.iter().any(|route| route.model == model),
        };
        if !is_served(name, job) {
            return None;
        }
        let probe = {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.retain(|(model, job), _| is_served(model, *job));
            known.entry((name.to_owned(), job)).or_default().clone()
        };
        let mut last = probe.lock().await;
        if let Some((at, found)) = *last
            && at.elapsed() < FRESH
        {
            return Some(found);
        }
        let mut asking = self.desk.ask(name, EVERY_TASK, Ask::Probe, Some(Instant::now() + PROBE_MAX)).only(job);
        let found = matches!(asking.next().await, Ok(Event::Ended { .. }));
        *last = Some((Instant::now(), found));
        Some(found)
    }

    /// Whether there are models, and all of them answer.
    pub(super) async fn all(&self) -> bool {
        let models = self.desk.table().models();
        let probes = join_all(models.iter().map(|route| self.model(&route.model, None))).await;
        !probes.is_empty() && probes.into_iter().all(|found| found == Some(true))
    }
}
