//! Jobs that serve: which heads answer for which model, and that every node's gateway knows it. Owns the routes and when they are told, and what may
//! serve under one name; which of a model's jobs come and go is `revisions.rs`, and ranks are the machine's, the same as for jobs that train.
//!
//! R1: a head is in the routes only while every rank of its gang is a member of the newest generation (I28).
//! R2: jobs of one name are one owner's and do one task: nobody else's job gets requests that were meant for them. Those without a share or a shadow
//!   serve one revision.
//! R3: routes carry the journal's index, and no older ones replace newer ones, whoever coordinates.

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::LogIndex;
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::node::ToNode;
use stoke_protocol::message::serve::{Head, Route, Routes, Traffic};
use stoke_protocol::spec::{Bytes, JobSpec, Precision, Task};

use super::autoscale::Policy;
use super::cluster::{Cluster, Refused};
use super::control::{Control, SessionId, Step};
use super::effect::Effect;
use super::event::Submission;
use super::machine::Job;
use super::time::Time;

/// All of a model's requests.
const WHOLE_MILLIONTHS: u64 = 1_000_000;

/// What a job serves.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Serves {
    /// As clients name it.
    pub model: String,
    pub task: Task,
    /// Its files, and how they are computed with.
    pub weights: (String, Precision),
    /// Tokens of a request, where the spec says it.
    pub context: Option<u32>,
    /// What the context follows from, where it does not.
    pub cache: Option<u64>,
    /// What it gets unless it leaves.
    pub part: Traffic,
    /// Where the model has as many jobs as its requests need.
    pub policy: Option<Policy>,
    pub leave: Option<Leave>,
}

/// A job that takes no new requests.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Leave {
    /// The entry that says so: routes of this index or a newer one show it.
    pub index: LogIndex,
    pub at: Time,
    pub by: String,
}

impl Serves {
    pub fn of(spec: &JobSpec) -> Option<Self> {
        let serve = spec.serve.as_ref()?;
        let part = match (serve.share, serve.shadow) {
            (_, true) => Traffic::Shadow,
            (Some(share), false) => Traffic::Share { millionths: share.millionths() },
            (None, false) => Traffic::Rest,
        };
        Some(Self {
            model: serve.name.clone().unwrap_or_else(|| spec.name.clone()),
            task: serve.task,
            weights: (serve.model.clone(), serve.precision),
            context: serve.context,
            cache: serve.context.is_none().then_some(serve.cache.0),
            part,
            policy: serve.replicas.as_ref().map(Policy::of),
            leave: None,
        })
    }

    /// The same number for the same weights, on every machine and in every release.
    pub fn revision(&self) -> u64 {
        let (model, precision) = &self.weights;
        let precision = match precision {
            Precision::Rounded => 0,
            Precision::Full => 1,
        };
        let hash = blake3::hash(&[model.as_bytes(), &[0, precision]].concat());
        u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"))
    }

    /// What decides how long a request may be.
    fn context_words(&self) -> String {
        match (self.context, self.cache) {
            (Some(tokens), _) => format!("a context of {tokens} tokens"),
            (None, Some(bytes)) => format!("a context that follows from a cache of {}", Bytes(bytes)),
            (None, None) => "a context of its model's".to_owned(),
        }
    }

    pub fn traffic(&self) -> Traffic {
        if self.leave.is_some() { Traffic::Leaving } else { self.part }
    }
}

impl Job {
    /// None for a job that does not serve, has ended, or is about to.
    pub(super) fn serving(&self) -> Option<&Serves> {
        let over = self.state.is_terminal() || self.state == JobState::Cancelling;
        self.serves.as_ref().filter(|_| !over)
    }

    fn route(&self) -> Option<Route> {
        let serves = self.serving()?;
        Some(Route {
            model: serves.model.clone(),
            job: self.id,
            task: serves.task,
            created_ms: self.submitted.0,
            head: self.head(),
            revision: serves.revision(),
            traffic: serves.traffic(),
        })
    }

    /// Whether the gang is whole, and has said that a token went through it.
    pub fn answers(&self) -> bool {
        self.head().is_some_and(|head| self.proven == Some(head.generation))
    }

    /// R1.
    pub(super) fn head(&self) -> Option<Head> {
        let run = self.run.as_ref().filter(|_| self.state == JobState::Running)?;
        let whole = run.members.len() == self.ask.ranks as usize && run.members.iter().all(|id| run.is_live(*id));
        let id = *run.members.first().filter(|_| whole)?;
        Some(Head { id, address: run.ranks.get(&id)?.address?, generation: run.generation })
    }
}

impl Cluster {
    /// R2.
    pub(super) fn check_serves(&self, submission: &Submission) -> Result<(), Refused> {
        let Some(serves) = &submission.serves else { return Ok(()) };
        let model = &serves.model;
        let (mut shares, mut regular) = (0, None);
        for (job, other) in self.serving(model) {
            if job.owner != submission.owner {
                return Err(Refused::Conflict(format!("{model} is served by {} of {} already", job.id, job.owner)));
            }
            let id = job.id;
            if other.task != serves.task {
                return Err(Refused::Conflict(format!(
                    "{id} serves {model} for another task: name this one otherwise with serve.name"
                )));
            }
            if (other.context, other.cache) != (serves.context, serves.cache) {
                return Err(Refused::Conflict(format!(
                    "{id} serves {model} with {}, and this one has {}: a request that one of them takes must be one for all. Use the same, \
                     or name this one otherwise with serve.name",
                    other.context_words(),
                    serves.context_words()
                )));
            }
            match other.traffic() {
                Traffic::Rest => regular = regular.or(Some((job.id, &other.weights))),
                Traffic::Share { millionths } => shares += u64::from(millionths),
                Traffic::Shadow | Traffic::Leaving => {}
            }
        }
        match (serves.part, regular) {
            (Traffic::Rest, Some((id, weights))) if *weights != serves.weights => Err(Refused::Conflict(format!(
                "{model} is served by {id} from {}, this one is {}, and replicas serve the same: give this one another name, or try it \
                 beside that one with `[serve] share = 0.1` or `shadow = true`",
                said(weights),
                said(&serves.weights)
            ))),
            (Traffic::Share { millionths }, Some(_)) if shares + u64::from(millionths) > WHOLE_MILLIONTHS => {
                let taken = shares as f64 / WHOLE_MILLIONTHS as f64;
                Err(Refused::Conflict(format!(
                    "other jobs have a share of {taken} of {model}: together it is 1 at most"
                )))
            }
            (Traffic::Share { .. } | Traffic::Shadow, None) => Err(Refused::Conflict(format!(
                "no job serves {model}, so there is nothing to have a share or a copy of: submit one without `share` and `shadow` first"
            ))),
            (Traffic::Rest | Traffic::Share { .. } | Traffic::Shadow | Traffic::Leaving, _) => Ok(()),
        }
    }

    /// Jobs of this name that have not ended, oldest first.
    pub(super) fn serving<'a>(&'a self, model: &'a str) -> impl DoubleEndedIterator<Item = (&'a Job, &'a Serves)> {
        let serving = self.jobs.iter().filter_map(|job| Some((job, job.serving()?)));
        serving.filter(move |(_, serves)| serves.model == model)
    }

    fn routes(&self) -> Routes {
        Routes { index: self.index, routes: self.jobs.iter().filter_map(Job::route).collect() }
    }
}

fn said((model, precision): &(String, Precision)) -> String {
    match precision {
        Precision::Rounded => format!("{model} in rounded precision"),
        Precision::Full => format!("{model} in full precision"),
    }
}

impl Control {
    /// A gateway that has just connected knows nothing, or what an earlier coordinator told it.
    pub(super) fn tell_routes_to(&self, step: &mut Step, session: SessionId) {
        step.effects.push(Effect::Send { session, message: ToNode::Routes(self.cluster.routes()) });
    }

    /// To every node, if they are not what it was told last.
    pub(super) fn tell_routes(&mut self, step: &mut Step) {
        if !std::mem::take(&mut self.reroute) {
            return;
        }
        let routes = self.cluster.routes();
        if self.routes.as_ref().is_some_and(|told| told.routes == routes.routes) {
            return;
        }
        for session in self.liveness.all_sessions() {
            step.effects.push(Effect::Send { session, message: ToNode::Routes(routes.clone()) });
        }
        self.routes = Some(routes);
    }
}
