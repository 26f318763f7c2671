//! Clients' questions: what each changes, and its answer. Owns the words of refusals; never decides who may ask (`authorise.rs`).

use stoke_protocol::identity::Subject;
use stoke_protocol::ids::{Digest, JobId};
use stoke_protocol::message::client::{JobState, Refusal, RefusalCode, Reply, Request, TokenScope};
use stoke_protocol::spec::{JobSpec, Program, Sharding};

use super::authorise::{Verb, authorise};
use super::cluster::Refused;
use super::commands::Runs;
use super::control::{Control, Step, Ticket, refused_words};
use super::effect::Effect;
use super::event::{Event, Submission};
use super::jobs::KEY_BYTES_MAX;
use super::machine::{Ask, Job};
use super::members::Room;
use super::pruning::Mode;
use super::serving::Serves;
use super::split::Cut;
use super::tokens::{TOKENS_OPEN_MAX, TTL_SECONDS_MAX};
use super::words::{rank_count, state_word};

pub(super) type Answer = Result<Reply, Refusal>;

impl Control {
    pub(super) fn request(&mut self, step: &mut Step, ticket: Ticket, caller: &Subject, asked: (Request, Digest)) {
        let (request, secret_hash) = asked;
        let verb = Verb::of(&request);
        if let Err(refusal) = authorise(caller, verb) {
            if verb.is_changing() {
                self.audit(step, caller.to_string(), verb.word().into(), refusal.message.clone());
            }
            return reply(step, ticket, Err(refusal));
        }
        let answer = match request {
            Request::Submit { key, spec } => self.submit(step, caller, key, &spec),
            Request::Plan { spec } => return self.ask_plan(step, ticket, &spec),
            Request::Cancel { job } => return self.cancel(step, ticket, caller, job),
            Request::Scale { job, ranks } => self.scale(step, caller, job, ranks),
            Request::Promote { job } => self.promote(step, caller, job),
            Request::Rollback { model } => self.roll_back(step, caller, model),
            Request::Replicas { model, replicas } => self.set_replicas(step, caller, (model, replicas)),
            Request::Drain { node, deadline_ms } => self.ask_drain(step, caller, (node, deadline_ms)),
            Request::ReleaseNode { node } => self.ask_release(step, caller, node),
            Request::RemoveNode { node } => self.ask_remove(step, caller, node),
            Request::Undrain { node } => self.ask_undrain(step, caller, node),
            Request::TokenCreate { scope, ttl_seconds } => {
                return self.token_create(step, ticket, caller, (scope, ttl_seconds, secret_hash));
            }
            Request::TokenRevoke { token } => self
                .commit(step, Event::TokenRevoked { token, by: caller.to_string() })
                .map(|()| Reply::TokenRevoked { token })
                .map_err(|refused| refusal(refused, "`stoke token list` shows the tokens")),
            Request::TokenList => Ok(Reply::Tokens(self.cluster.tokens().views(self.now.wall).into())),
            Request::Cluster => Ok(Reply::Cluster(self.cluster_view(caller))),
            Request::Jobs => Ok(Reply::Jobs(self.job_views().into())),
            Request::Nodes => Ok(Reply::Nodes(self.node_views().into())),
            Request::Job { job } => self.find(job).map(|job| Reply::Job(Box::new(self.job_view(job)))),
            Request::Explain { job } => self.find(job).map(|job| Reply::Explained(self.explanation(job))),
            Request::Checkpoints { job } => self.checkpoints(job),
            Request::Recent { ended } => Ok(Reply::Jobs(self.recent_views(ended).into())),
            Request::Pulse { after } => Ok(Reply::Pulse(Box::new(self.pulse(caller, after)))),
            Request::History { job, after_ms } => {
                self.find(job).map(|job| Reply::History(self.histories.after(job.id, after_ms).to_vec().into()))
            }
            Request::Pin { job, step: at } => self.pin_checkpoint(step, caller, (job, at)),
            Request::Unpin { job, step: at } => self.unpin_checkpoint(step, caller, (job, at)),
            Request::Prune { job, keep, dry_run } => {
                let mode = if dry_run { Mode::Tell } else { Mode::Do };
                self.prune_checkpoints(step, caller, (job, keep, mode))
            }
            Request::Watch { job } | Request::Logs { job, .. } => match self.find(job) {
                Ok(_) => return step.effects.push(Effect::Granted { ticket }),
                Err(refusal) => Err(refusal),
            },
            Request::Renew { .. } | Request::ArtifactPart { .. } => {
                return step.effects.push(Effect::Granted { ticket });
            }
            Request::Artifact { .. } => {
                let needed = self.needed_artifacts();
                return step.effects.push(Effect::Artifacts { ticket, needed });
            }
        };
        reply(step, ticket, answer);
    }

    /// Whether the caller may change this job; that he may not is audited.
    pub(super) fn may_change(
        &mut self,
        step: &mut Step,
        caller: &Subject,
        id: JobId,
        verb: &str,
    ) -> Result<(), Refusal> {
        let verdict = authorise(caller, whose(self.find(id)?, caller));
        if let Err(refusal) = &verdict {
            self.audit(step, caller.to_string(), format!("{verb} {id}"), refusal.message.clone());
        }
        verdict
    }

    pub(super) fn find(&self, id: JobId) -> Result<&Job, Refusal> {
        self.cluster.jobs().get(id).ok_or_else(|| not_found(id))
    }

    fn submit(&mut self, step: &mut Step, caller: &Subject, key: String, spec: &str) -> Answer {
        if key.is_empty() || key.len() > KEY_BYTES_MAX {
            let message = format!("idempotency key has {} bytes", key.len());
            return Err(invalid(message, &format!("use 1 to {KEY_BYTES_MAX}")));
        }
        let parsed = JobSpec::parse(spec).map_err(|error| invalid(format!("spec: {error}"), "mend the spec"))?;
        let submission = self.submission(&owner(caller), key, &parsed);
        if let Some(job) = self.cluster.jobs().by_key(&submission.owner, &submission.key) {
            let (id, same) = (job.id, job.spec == submission.spec);
            if self.cluster.planted_bug() != Some(super::PlantedBug::KeyIgnored) {
                return if same { Ok(Reply::Submitted { job: id, created: false }) } else { Err(key_taken(id)) };
            }
        }
        self.check_room(1)?;
        let spec_serves = parsed.serve.is_some();
        self.commit(step, Event::Submitted(Box::new(submission)))
            .map(|()| Reply::Submitted { job: self.cluster.jobs().last(), created: true })
            .map_err(|refused| {
                refusal(refused, if spec_serves { "or cancel the other one" } else { "use another key" })
            })
    }

    pub(super) fn submission(&self, owner: &str, key: String, spec: &JobSpec) -> Submission {
        let resources = &spec.resources;
        // A folder that the submitter chose may be shared by clusters, so the job's folder there carries the cluster's name.
        let checkpoints = match &spec.checkpoint.to {
            Some(to) => {
                let cluster = self.cluster.id().map(|id| id.to_string()).unwrap_or_default();
                format!("{}/{}-", to.trim_end_matches('/'), cluster.get(..8).unwrap_or_default())
            }
            None => format!("{}/", self.options.checkpoints.trim_end_matches('/')),
        };
        // One rank a node where the spec does not say: the text stays as it was sent, so that its key holds when nodes come and go.
        let ranks = resources.ranks.unwrap_or_else(|| match &spec.serve {
            Some(serve) => serve.ranks(),
            None => self.cluster.members().up().clamp(resources.ranks_min.unwrap_or(1), spec.ranks_max()),
        });
        Submission {
            key,
            owner: owner.to_owned(),
            name: spec.name.clone(),
            trainer: spec.trainer.clone(),
            spec: spec.to_toml(),
            checkpoints,
            // As the catalogue writes it.
            resume: spec.checkpoint.resume.as_ref().map(|uri| uri.trim_end_matches('/').to_owned()),
            keep: spec.checkpoint.keep,
            priority: spec.priority,
            attempts_max: spec.restart.attempts,
            ranks_min: spec.ranks_min(ranks),
            digest_every: spec.train.as_ref().map_or(0, |train| train.digest_every),
            on_nan: spec.train.as_ref().map(|train| train.on_nan).unwrap_or_default(),
            straggler: spec.train.as_ref().map(|train| train.straggler).unwrap_or_default(),
            sharded: spec.train.as_ref().is_some_and(|train| train.sharding != Sharding::None),
            serves: Serves::of(spec),
            runs: Runs::of(spec),
            program: spec.program.as_ref().and_then(Program::sent),
            cut: if spec.awaits_split() { Cut::Awaited } else { Cut::Written },
            ask: Ask {
                ranks,
                room: Room { cpus: resources.cpus, memory_bytes: resources.memory().0, gpus: resources.gpus },
                labels: resources.labels.clone(),
                seats: Vec::new(),
                rollouts: resources.rollouts,
            },
        }
    }

    fn scale(&mut self, step: &mut Step, caller: &Subject, id: JobId, ranks: u32) -> Answer {
        self.may_change(step, caller, id, "scale")?;
        let job = self.find(id)?;
        if job.serves.is_some() {
            let message = format!("{id} serves, and the number of its ranks is that of its split");
            return Err(invalid(message, "`stoke scale MODEL --replicas N` gives the model more or fewer jobs"));
        }
        let most = JobSpec::parse(&job.spec).map_or(1, |spec| spec.ranks_max());
        if !(1..=most).contains(&ranks) {
            let message = format!("{} for {id}", rank_count(ranks));
            return Err(invalid(message, &format!("use 1 to {most}: a rank owns at least one lane")));
        }
        if job.ask.ranks == ranks && !job.state.is_terminal() {
            return Ok(Reply::Scaled { job: id, ranks });
        }
        self.commit(step, Event::Scaled { job: id, ranks, by: owner(caller) })
            .map(|()| Reply::Scaled { job: id, ranks })
            .map_err(|refused| refusal(refused, "`stoke explain` tells what the job does"))
    }

    fn cancel(&mut self, step: &mut Step, ticket: Ticket, caller: &Subject, id: JobId) {
        if let Err(refusal) = self.may_change(step, caller, id, "cancel") {
            return reply(step, ticket, Err(refusal));
        }
        match self.commit(step, Event::CancelAsked { job: id, by: owner(caller) }) {
            Ok(()) => self.wait_for_cancel(step, ticket, id),
            Err(refused) => {
                let state = self.cluster.jobs().get(id).map(|job| job.state);
                if matches!(state, Some(JobState::Cancelling | JobState::Cancelled)) {
                    return self.wait_for_cancel(step, ticket, id);
                }
                reply(step, ticket, Err(refusal(refused, "nothing is left to cancel")));
            }
        }
    }

    fn token_create(&mut self, step: &mut Step, ticket: Ticket, caller: &Subject, token: (TokenScope, u64, Digest)) {
        let (scope, ttl_seconds, secret_hash) = token;
        let refused = if !(1..=TTL_SECONDS_MAX).contains(&ttl_seconds) {
            Some(invalid(format!("a token of {ttl_seconds} s"), &format!("use 1 to {TTL_SECONDS_MAX} s (30 days)")))
        } else if self.cluster.tokens().open(self.now.wall) >= TOKENS_OPEN_MAX {
            Some(unavailable(format!("{TOKENS_OPEN_MAX} tokens are open"), "revoke some: `stoke token list`"))
        } else {
            self.storage_low.as_ref().map(|low| unavailable(low.clone(), "free some space, then try again"))
        };
        if let Some(refusal) = refused {
            return reply(step, ticket, Err(refusal));
        }
        let expires = self.now.wall.plus_ms(ttl_seconds * 1_000);
        let event = Event::TokenCreated { scope, secret_hash, expires, by: caller.to_string() };
        match self.commit(step, event) {
            Ok(()) => step.effects.push(Effect::TokenMade { ticket, token: self.cluster.tokens().last() }),
            Err(refused) => reply(step, ticket, Err(refusal(refused, "try again"))),
        }
    }

    fn checkpoints(&self, job: Option<JobId>) -> Answer {
        let catalogue = self.cluster.catalogue();
        let views = match job {
            Some(id) => {
                self.find(id)?;
                catalogue.views(id)
            }
            None => catalogue.jobs().flat_map(|id| catalogue.views(id)).collect(),
        };
        Ok(Reply::Checkpoints(views.into()))
    }
}

/// What it takes to change a job.
fn whose(job: &Job, caller: &Subject) -> Verb {
    if job.owner == owner(caller) { Verb::ChangeOwn } else { Verb::ChangeAny }
}

/// Jobs belong to names, whatever the role.
pub(super) fn owner(caller: &Subject) -> String {
    match caller {
        Subject::User { name, .. } => name.clone(),
        Subject::Node(_) | Subject::Rank { .. } | Subject::Coordinator => caller.to_string(),
    }
}

fn reply(step: &mut Step, ticket: Ticket, answer: Answer) {
    let reply = Box::new(answer.unwrap_or_else(Reply::Refused));
    step.effects.push(Effect::Reply { ticket, reply });
}

pub(super) fn refuse(step: &mut Step, ticket: Ticket, refusal: Refusal) {
    reply(step, ticket, Err(refusal));
}

pub(super) fn refuse_busy(step: &mut Step, ticket: Ticket, message: &str) {
    reply(step, ticket, Err(unavailable(message.to_owned(), "try again in a moment")));
}

pub(super) fn refuse_ended(step: &mut Step, ticket: Ticket, job: &Job) {
    let message = format!("{} has {} already", job.id, state_word(job.state));
    let refusal = Refusal { code: RefusalCode::Conflict, message, mend: "nothing is left to cancel".into() };
    reply(step, ticket, Err(refusal));
}

pub(super) fn invalid(message: String, mend: &str) -> Refusal {
    Refusal { code: RefusalCode::Invalid, message, mend: mend.to_owned() }
}

pub(super) fn unavailable(message: String, mend: &str) -> Refusal {
    Refusal { code: RefusalCode::Unavailable, message, mend: mend.to_owned() }
}

pub fn not_found(id: JobId) -> Refusal {
    let (message, mend) = (format!("there is no {id}"), "`stoke jobs` lists the jobs".to_owned());
    Refusal { code: RefusalCode::NotFound, message, mend }
}

fn key_taken(id: JobId) -> Refusal {
    Refusal {
        code: RefusalCode::Conflict,
        message: format!("{id} was submitted under the same idempotency key with another spec"),
        mend: "use another key for another job".into(),
    }
}

pub(super) fn refusal(refused: Refused, mend: &str) -> Refusal {
    let code = match &refused {
        Refused::Stale(_) | Refused::Conflict(_) => RefusalCode::Conflict,
        Refused::Invalid(_) => RefusalCode::Invalid,
        Refused::NotFound(_) => RefusalCode::NotFound,
        Refused::Unavailable(_) => RefusalCode::Unavailable,
    };
    Refusal { code, message: refused_words(refused), mend: mend.to_owned() }
}
