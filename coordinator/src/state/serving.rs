//! Jobs that serve: which heads answer for which model, and that every node's gateway knows it. Owns the routes and when they are told; moves no
//! rank (that is the machine's, the same as for jobs that train).
//!
//! R1: a head is in the routes only while every rank of its gang is a member of the newest generation (I28).
//! R2: jobs of one name are one owner's, and serve the same: nobody else's job gets requests that were meant for them, and an answer that one of them
//!   has begun is the one that another goes on with (I27).
//! R3: routes carry the journal's index, and no older ones replace newer ones, whoever coordinates.

use serde::{Deserialize, Serialize};
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::node::ToNode;
use stoke_protocol::message::serve::{Head, Route, Routes};
use stoke_protocol::spec::{JobSpec, Precision, Task};

use super::cluster::{Cluster, Refused};
use super::control::{Control, SessionId, Step};
use super::effect::Effect;
use super::event::Submission;
use super::machine::Job;

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
}

impl Serves {
    pub fn of(spec: &JobSpec) -> Option<Self> {
        let serve = spec.serve.as_ref()?;
        Some(Self {
            model: serve.name.clone().unwrap_or_else(|| spec.name.clone()),
            task: serve.task,
            weights: (serve.model.clone(), serve.precision),
            context: serve.context,
            cache: serve.context.is_none().then_some(serve.cache.0),
        })
    }
}

impl Job {
    /// None for a job that does not serve, has ended, or is about to.
    fn route(&self) -> Option<Route> {
        let over = self.state.is_terminal() || self.state == JobState::Cancelling;
        let Serves { model, task, .. } = self.serves.as_ref().filter(|_| !over)?;
        Some(Route { model: model.clone(), job: self.id, task: *task, created_ms: self.submitted.0, head: self.head() })
    }

    /// Whether the gang is whole, and has said that a token went through it.
    pub fn answers(&self) -> bool {
        self.head().is_some_and(|head| self.proven == Some(head.generation))
    }

    /// R1.
    fn head(&self) -> Option<Head> {
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
        for job in self.jobs.iter().filter(|job| !job.state.is_terminal()) {
            let Some(other) = job.serves.as_ref().filter(|other| other.model == *model) else { continue };
            if job.owner != submission.owner {
                return Err(Refused::Conflict(format!("{model} is served by {} of {} already", job.id, job.owner)));
            }
            if other != serves {
                let (id, (weights, precision)) = (job.id, &other.weights);
                let context = other.context.map_or("of the model".to_owned(), |context| context.to_string());
                return Err(Refused::Conflict(format!(
                    "{model} is served by {id} already, from {weights} (task {:?}, precision {precision:?}, context {context}), and replicas \
                     serve the same: name this one otherwise with serve.name",
                    other.task
                )));
            }
        }
        Ok(())
    }

    fn routes(&self) -> Routes {
        Routes { index: self.index, routes: self.jobs.iter().filter_map(Job::route).collect() }
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
