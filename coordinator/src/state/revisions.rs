//! Which jobs of a model get its requests: how a revision takes over or is taken back, how many replicas there are, and how a job leaves without an
//! answer being cut off. Owns those requests and events; where questions go is the gateways', and what may share a name is `serving.rs`.
//!
//! | job            | event                                            | next           |
//! |----------------|--------------------------------------------------|----------------|
//! | share, shadow  | Promoted, of its revision                        | rest           |
//! | any            | Promoted, of another one                         | leaving        |
//! | share, shadow  | RolledBack                                       | leaving        |
//! | rest           | LeaveAsked (it is one replica too many)          | leaving        |
//! | leaving        | no gateway has a question there, or its time is over | cancelled  |
//!
//! R4: a job that leaves is cancelled when every gateway goes by routes that say so and has no question at such a job, or after `LEAVE_MAX_MS`. One
//!   that has never run, and a shadow, have no answer to end: they are cancelled at once.
//! R5: a model does not lose its last job by any of this.

use stoke_protocol::identity::Subject;
use stoke_protocol::ids::{JobId, LogIndex};
use stoke_protocol::message::client::{JobState, Refusal, RefusalCode, Reply};
use stoke_protocol::message::serve::Traffic;
use stoke_protocol::spec::{JobSpec, REPLICAS_MAX};

use super::autoscale::Policy;
use super::cluster::{Cluster, Refused};
use super::control::{Control, Step};
use super::event::Event;
use super::jobs::ACTIVE_MAX;
use super::machine::{Job, Scene};
use super::requests::{Answer, invalid, owner, refusal, unavailable};
use super::serving::{Leave, Serves};

/// Answers that take longer are cut off: a revision that was taken back must end some time.
pub const LEAVE_MAX_MS: u64 = 600_000;

impl Job {
    /// Takes no new requests from now on (R4).
    fn leave(&mut self, scene: &mut Scene<'_>, why: &str, by: &str) {
        let Some(serves) = self.serves.as_mut().filter(|serves| serves.leave.is_none()) else { return };
        let has_answers = serves.part != Traffic::Shadow && !self.worlds.is_empty();
        if self.state == JobState::Cancelling {
            return;
        }
        serves.leave = Some(Leave { index: scene.index, at: scene.at, by: by.to_owned() });
        if !has_answers {
            return self.cancel(scene, by);
        }
        self.note(scene, format!("takes no new requests: {why} by {by}"));
        self.changed(scene);
    }

    fn promote(&mut self, scene: &mut Scene<'_>, by: &str) {
        let Some(serves) = self.serves.as_mut() else { return };
        if std::mem::replace(&mut serves.part, Traffic::Rest) != Traffic::Rest {
            self.note(scene, format!("promoted by {by}: its revision gets all new requests"));
            self.changed(scene);
        }
    }

    /// The error is for people.
    fn check_promote(&self) -> Result<(), String> {
        let id = self.id;
        match self.serving().map(Serves::traffic) {
            None => Err(format!("{id} serves nothing, or has ended")),
            Some(Traffic::Leaving) => Err(format!("{id} is leaving: submit its spec again")),
            Some(Traffic::Rest | Traffic::Share { .. } | Traffic::Shadow) if self.head().is_none() => {
                Err(format!("{id} does not answer now, and would get all requests: wait until it runs"))
            }
            Some(Traffic::Rest | Traffic::Share { .. } | Traffic::Shadow) => Ok(()),
        }
    }
}

impl Cluster {
    pub(super) fn check_promoted(&self, job: JobId) -> Result<(), Refused> {
        self.ask_job(job, Job::check_promote)
    }

    /// R5.
    pub(super) fn check_rolled_back(&self, model: &str) -> Result<(), Refused> {
        match self.staying(model).any(|(_, serves)| serves.part == Traffic::Rest) {
            true => Ok(()),
            false => {
                Err(Refused::Conflict(format!("no job serves {model} without a share or a shadow: it would be gone")))
            }
        }
    }

    pub(super) fn check_leave(&self, job: JobId) -> Result<(), Refused> {
        self.ask_job(job, |job| match job.serving().map(Serves::traffic) {
            Some(Traffic::Rest | Traffic::Share { .. } | Traffic::Shadow) => Ok(()),
            Some(Traffic::Leaving) | None => Err(format!("{} serves no more", job.id)),
        })
    }

    pub(super) fn promote(&mut self, scene: &mut Scene<'_>, job: JobId, by: &str) {
        let Some(promoted) = self.jobs.get(job).and_then(Job::serving).cloned() else { return };
        let why = format!("{job} was promoted");
        for (id, revision) in self.ids(&promoted.model, |serves| serves.revision()) {
            self.drive(id, |job| match revision == promoted.revision() {
                true => job.promote(scene, by),
                false => job.leave(scene, &why, by),
            });
        }
    }

    pub(super) fn roll_back(&mut self, scene: &mut Scene<'_>, model: &str, by: &str) {
        for (id, part) in self.ids(model, |serves| serves.part) {
            if part != Traffic::Rest {
                self.drive(id, |job| job.leave(scene, "rolled back", by));
            }
        }
    }

    pub(super) fn let_go(&mut self, scene: &mut Scene<'_>, job: JobId, by: &str) {
        self.drive(job, |job| job.leave(scene, "fewer replicas were asked for", by));
    }

    fn ids<T>(&self, model: &str, what: impl Fn(&Serves) -> T) -> Vec<(JobId, T)> {
        self.staying(model).map(|(job, serves)| (job.id, what(serves))).collect()
    }

    /// Jobs of this name that do not leave.
    fn staying<'a>(&'a self, model: &'a str) -> impl DoubleEndedIterator<Item = (&'a Job, &'a Serves)> {
        self.serving(model).filter(|(_, serves)| serves.leave.is_none())
    }

    pub(super) fn regular<'a>(&'a self, model: &'a str) -> impl DoubleEndedIterator<Item = &'a Job> {
        self.staying(model).filter(|(_, serves)| serves.part == Traffic::Rest).map(|(job, _)| job)
    }

    /// R2, as far as one state shows it.
    pub(super) fn check_revisions(&self) -> Result<(), String> {
        let mut known = std::collections::BTreeMap::new();
        for job in self.jobs.iter() {
            let Some(serves) = job.serving().filter(|serves| serves.traffic() == Traffic::Rest) else { continue };
            let (first, weights) = *known.entry(&serves.model).or_insert((job.id, &serves.weights));
            if *weights != serves.weights {
                return Err(format!("R2: {first} and {} serve {} with other weights", job.id, serves.model));
            }
        }
        Ok(())
    }
}

impl Control {
    pub(super) fn promote(&mut self, step: &mut Step, caller: &Subject, id: JobId) -> Answer {
        self.may_change(step, caller, id, "promote")?;
        let job = self.find(id)?;
        let Some(serves) = job.serves.clone() else {
            return Err(invalid(format!("{id} does not serve"), "`stoke jobs` shows which jobs serve what"));
        };
        let done = |other: &Serves| other.part == Traffic::Rest && other.revision() == serves.revision();
        let is_done = job.serving().is_some() && self.cluster.staying(&serves.model).all(|(_, other)| done(other));
        if !is_done || serves.leave.is_some() {
            self.commit(step, Event::Promoted { job: id, by: owner(caller) })
                .map_err(|refused| refusal(refused, &format!("`stoke status {id}` tells what it does")))?;
        }
        Ok(self.served(serves.model, Vec::new()))
    }

    pub(super) fn roll_back(&mut self, step: &mut Step, caller: &Subject, model: String) -> Answer {
        let any = self.any_of(&model)?;
        self.may_change(step, caller, any, "roll back")?;
        if self.cluster.staying(&model).any(|(_, serves)| serves.part != Traffic::Rest) {
            self.commit(step, Event::RolledBack { model: model.clone(), by: owner(caller) })
                .map_err(|refused| refusal(refused, "`stoke serve promote JOB` lets it have all requests"))?;
        }
        Ok(self.served(model, Vec::new()))
    }

    pub(super) fn set_replicas(
        &mut self,
        step: &mut Step,
        caller: &Subject,
        (model, replicas): (String, u32),
    ) -> Answer {
        let any = self.any_of(&model)?;
        self.may_change(step, caller, any, "scale")?;
        if !(1..=REPLICAS_MAX).contains(&replicas) {
            let mend = format!("use 1 to {REPLICAS_MAX}; `stoke cancel JOB` ends the last one");
            return Err(invalid(format!("{replicas} replicas of {model}"), &mend));
        }
        if let Some((ruling, Policy { min, max, .. })) = self.scales(&model) {
            let message =
                format!("{model} has as many replicas as its requests need, {min} to {max}, as {ruling} says");
            let mend = "submit its spec with other bounds, those of the newest job rule: `stoke serve SPEC --set serve.replicas.min=N`; \
                        one without [serve.replicas] leaves the number to you";
            return Err(Refusal { code: RefusalCode::Conflict, message, mend: mend.to_owned() });
        }
        let jobs: Vec<JobId> = self.cluster.regular(&model).map(|job| job.id).collect();
        let Some(newest) = jobs.last() else {
            let message = format!("only jobs with a share or a shadow serve {model}");
            let mend = format!("`stoke serve promote {any}` makes its revision the one to scale");
            return Err(Refusal { code: RefusalCode::Conflict, message, mend });
        };
        for surplus in jobs.iter().skip(replicas as usize).rev() {
            self.commit(step, Event::LeaveAsked { job: *surplus, by: owner(caller) })
                .map_err(|refused| refusal(refused, "try again"))?;
        }
        let missing = (replicas as usize).saturating_sub(jobs.len());
        let added = self.add_replicas(step, *newest, missing)?;
        Ok(self.served(model, added))
    }

    /// All of them, or none and an error.
    pub(super) fn add_replicas(&mut self, step: &mut Step, of: JobId, count: usize) -> Result<Vec<JobId>, Refusal> {
        if count == 0 {
            return Ok(Vec::new());
        }
        self.check_room(count)?;
        let job = self.find(of)?;
        let mut spec = JobSpec::parse(&job.spec).map_err(|error| {
            invalid(format!("the spec of {of} is one of another release: {error}"), "submit it again for a replica")
        })?;
        if let Some(serve) = &mut spec.serve {
            // A promoted job has what its spec asked for no more.
            (serve.share, serve.shadow) = (None, false);
        }
        let owner = job.owner.clone();
        let mut added = Vec::with_capacity(count);
        for number in 1.. {
            if added.len() == count {
                break;
            }
            let key = format!("replica-{number}-of-{of}");
            if self.cluster.jobs().by_key(&owner, &key).is_some() {
                continue;
            }
            let submission = self.submission(&owner, key, &spec);
            self.commit(step, Event::Submitted(Box::new(submission)))
                .map_err(|refused| refusal(refused, "submit its spec again for a replica"))?;
            added.push(self.cluster.jobs().last());
        }
        Ok(added)
    }

    /// Whether so many jobs more are taken.
    pub(super) fn check_room(&self, count: usize) -> Result<(), Refusal> {
        if let Some(low) = &self.storage_low {
            return Err(unavailable(low.clone(), "free some space, then submit again; running jobs go on"));
        }
        if self.cluster.jobs().active() + count > ACTIVE_MAX {
            let message = format!("{ACTIVE_MAX} jobs have not ended, the most that is taken");
            return Err(unavailable(message, "submit again when some have ended"));
        }
        Ok(())
    }

    /// A job that serves this model, one that stays if there is one.
    fn any_of(&self, model: &str) -> Result<JobId, Refusal> {
        let staying = self.cluster.staying(model).next_back().or_else(|| self.cluster.serving(model).next_back());
        staying.map(|(job, _)| job.id).ok_or_else(|| Refusal {
            code: RefusalCode::NotFound,
            message: format!("no job serves {model}"),
            mend: "`stoke jobs` shows what is served".into(),
        })
    }

    fn served(&self, model: String, added: Vec<JobId>) -> Reply {
        let jobs = self.cluster.regular(&model).map(|job| job.id).collect();
        let leaves =
            |job: &&Job| job.serves.as_ref().is_some_and(|serves| serves.model == model && serves.leave.is_some());
        let left = self.cluster.jobs().iter().filter(|job| !job.state.is_terminal()).filter(leaves);
        let leaving = left.map(|job| job.id).collect();
        Reply::Serving { model, jobs, added: added.into(), leaving }
    }

    /// R4: cancels the jobs that have left.
    pub(super) fn end_leaves(&mut self, step: &mut Step) {
        let leaving =
            self.routes.iter().flat_map(|told| told.routes.iter()).filter(|route| route.traffic == Traffic::Leaving);
        let leaving = leaving.filter_map(|route| self.cluster.jobs().get(route.job));
        let ended: Vec<(JobId, String)> = leaving
            .filter_map(|job| Some((job.id, job.serving()?.leave.as_ref()?)))
            .filter(|(_, leave)| self.is_quiet(leave.index) || self.now.wall.0 >= leave.at.0 + LEAVE_MAX_MS)
            .map(|(id, leave)| (id, leave.by.clone()))
            .collect();
        for (job, by) in ended {
            // One that has ended by itself meanwhile needs no more.
            let _unchanged = self.commit(step, Event::CancelAsked { job, by });
        }
    }

    /// Whether no gateway has a question at a job that leaves by the routes of this entry.
    fn is_quiet(&self, index: LogIndex) -> bool {
        let mut gateways = self.cluster.members().nodes().filter(|node| node.up && node.gateway.is_some());
        gateways.all(|node| {
            let heartbeat = self.liveness.lease(node.id).and_then(|lease| lease.heartbeat);
            heartbeat.is_some_and(|heartbeat| heartbeat.routes >= index && heartbeat.leaving == 0)
        })
    }
}
