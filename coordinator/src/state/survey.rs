//! Models whose cut is left to the cluster: which nodes are asked about them, what they have said, and when the cut is chosen. Owns the questions and
//! the answers; how a model is cut is `split.rs`'s. Volatile: a restart forgets it and asks again, but for cuts that were chosen. Part of `control.rs`.
//!
//! V1: a cut is chosen once all nodes that may carry the job have answered, or have had long enough; a job of a model that is cut in the same way by
//!   its spec as one that serves gets the same cut. A job that no node could ever serve fails; whatever time or more nodes may mend is waited for.
//! V2: a node has one question about a model at a time, and is asked again only when its answer is old, or was a problem that may be mended.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use stoke_protocol::codec;
use stoke_protocol::ids::{Digest, JobId, NodeId};
use stoke_protocol::message::client::Reply;
use stoke_protocol::message::node::ToNode;
use stoke_protocol::message::split::{Planned, SURVEYING, Split, Survey, Surveyed};
use stoke_protocol::spec::{Bytes, JobSpec, Serve};

use super::control::{Control, SessionId, Step, Ticket};
use super::effect::Effect;
use super::event::Event;
use super::explain;
use super::machine::{Ask, Job};
use super::members::{Node, Room};
use super::requests::{self, invalid, unavailable};
use super::room::{Left, carries};
use super::serving::Serves;
use super::split::{self, Chosen, Cut, Offer, Unfit};
use super::time::Mono;

/// A part of the weights is read from a disk and computed with; whoever needs longer is left out.
const ANSWER_MS_MAX: u64 = 30_000;
/// What was wrong may be mended: asked again after so long while somebody waits for it.
const AGAIN_MS: u64 = 5_000;
/// A job fails when every node of the cluster has said so often in a row that it cannot serve the model.
const REFUSALS: u32 = 2;
/// Other files may lie there by now, and other ranks compute.
const FRESH_MS: u64 = 600_000;
/// Nodes that are asked about a model, those with most processors free: more would make a plan slow.
const NODES_MAX: usize = 256;
/// Jobs whose cut is looked for at a time; the next ones have their turn with the next look.
const JOBS_MAX: usize = 256;
/// A cut that was not found is looked for again when nodes or room have changed, and at most so often.
const LOOK_MS: u64 = 1_000;
const CLIENTS_MAX: usize = 64;
/// Models that are asked for at the same time, and whose answers are kept: each is a question to all nodes.
const MODELS_MAX: usize = 64;
/// As in `jobs/src/lm/config.rs`.
const LAYERS_MAX: u32 = 1 << 10;
/// A node's words about a model are cut here: a line for each stands in one reply.
const WORDS_CHARS_MAX: usize = 300;

#[derive(Debug, Default)]
pub(super) struct Surveys {
    models: BTreeMap<Survey, BTreeMap<NodeId, Asked>>,
    clients: Vec<Client>,
    /// Jobs in the queue without a cut.
    uncut: BTreeMap<JobId, Uncut>,
    /// Whose turn it is.
    next: JobId,
    /// Something was said or asked since the last look.
    stirred: bool,
    /// Nodes or room have changed since.
    changed: bool,
    looked: Mono,
    /// It is time to see who has to be asked again.
    due: bool,
}

#[derive(Debug)]
struct Uncut {
    /// None: it is one of another release.
    spec: Option<Box<JobSpec>>,
    why: String,
}

#[derive(Debug)]
struct Asked {
    session: SessionId,
    at: Mono,
    answer: Option<Answer>,
    /// How often in a row it has said that it cannot serve the model.
    refusals: u32,
}

#[derive(Clone, PartialEq, Debug)]
struct Answer {
    at: Mono,
    rtt_us: u32,
    found: Result<Surveyed, String>,
}

/// What comes of a look at a job or a spec.
struct Plan {
    split: Split,
    /// Why it has to wait for room, if it has to.
    waits: Option<String>,
}

/// Somebody who waits for a plan.
#[derive(Debug)]
struct Client {
    ticket: Ticket,
    since: Mono,
    spec: Box<JobSpec>,
    ask: Ask,
}

impl Surveys {
    pub fn new<'a>(queue: impl Iterator<Item = &'a Job>) -> Self {
        let mut surveys = Self::default();
        queue.for_each(|job| surveys.note(job.id, Some(job)));
        surveys
    }

    /// A job looks different now.
    pub fn note(&mut self, id: JobId, job: Option<&Job>) {
        if job.is_some_and(Job::awaits_cut) {
            let (Some(job), Entry::Vacant(entry)) = (job, self.uncut.entry(id)) else { return };
            let (spec, why) = match JobSpec::parse(&job.spec) {
                Ok(spec) => (Some(Box::new(spec)), "its model is being surveyed".to_owned()),
                Err(error) => (None, format!("its spec is one of another release: {error}")),
            };
            entry.insert(Uncut { spec, why });
            self.stirred = true;
        } else {
            self.uncut.remove(&id);
        }
    }

    pub fn forget(&mut self, ticket: Ticket) {
        self.clients.retain(|client| client.ticket != ticket);
    }

    pub fn why(&self, job: JobId) -> Option<&str> {
        self.uncut.get(&job).map(|uncut| uncut.why.as_str())
    }

    pub fn tick(&mut self) {
        self.due = true;
    }

    /// Jobs whose turn it is.
    fn turn(&self) -> impl Iterator<Item = (JobId, &JobSpec)> {
        let jobs = self.uncut.range(self.next..).chain(self.uncut.range(..self.next)).take(JOBS_MAX);
        jobs.filter_map(|(id, uncut)| Some((*id, uncut.spec.as_deref()?)))
    }

    fn answer(&self, survey: &Survey, node: NodeId) -> Option<&Answer> {
        self.models.get(survey)?.get(&node)?.answer.as_ref()
    }
}

/// What is asked about the model of a spec.
fn survey_of(spec: &JobSpec) -> Option<Survey> {
    let serve = spec.serve.as_ref()?;
    Some(Survey { model: serve.model.clone(), precision: serve.precision, threads: serve.threads })
}

impl Control {
    pub(super) fn take_surveyed(
        &mut self,
        session: SessionId,
        rtt_us: u32,
        (survey, found): (Survey, Result<Surveyed, String>),
    ) {
        let now = self.now.mono;
        self.replan |= self.liveness.heard(now, session, None);
        let Some((node, _)) = self.liveness.node(session) else { return };
        let Some(asked) = self.surveys.models.get_mut(&survey).and_then(|nodes| nodes.get_mut(&node)) else { return };
        let found = match found {
            Ok(found) if !is_possible(&found) => Err(format!("says what no model has: {found:?}")),
            found => found,
        };
        let found = found.map_err(|words| words.chars().take(WORDS_CHARS_MAX).collect());
        asked.refusals = if found.is_ok() { 0 } else { asked.refusals.saturating_add(1) };
        asked.answer = Some(Answer { at: now, rtt_us, found });
        self.surveys.stirred = true;
    }

    /// `stoke explain SPEC`: answered when the nodes have been asked.
    pub(super) fn ask_plan(&mut self, step: &mut Step, ticket: Ticket, text: &str) {
        let refusal = match JobSpec::parse(text) {
            Err(error) => invalid(format!("spec: {error}"), "mend the spec"),
            Ok(spec) if spec.serve.is_none() => {
                invalid("the spec has no section [serve]".into(), "only models that are served are cut over nodes")
            }
            Ok(spec) if !spec.awaits_split() => invalid(
                "there is nothing to plan: encoders and classifiers are not cut, they have one rank with what [resources] says".into(),
                "serve it: `stoke explain JOB` tells where it goes, or what it waits for",
            ),
            Ok(_) if self.surveys.clients.len() >= CLIENTS_MAX => {
                unavailable("too many plans are being made".into(), "try again in a moment")
            }
            Ok(spec) => {
                let ask = self.submission("", String::new(), &spec).ask;
                let client = Client { ticket, since: self.now.mono, spec: Box::new(spec), ask };
                self.surveys.clients.push(client);
                self.surveys.stirred = true;
                return;
            }
        };
        requests::refuse(step, ticket, refusal);
    }

    /// Asks nodes, and chooses cuts, when something has changed.
    pub(super) fn cut_models(&mut self, step: &mut Step) {
        let waited_for = !(self.surveys.uncut.is_empty() && self.surveys.clients.is_empty());
        if !waited_for {
            return;
        }
        self.surveys.changed |= self.replan | self.cluster.replan;
        if !std::mem::take(&mut self.surveys.due) && !self.surveys.stirred && !self.surveys.changed {
            return;
        }
        self.ask_nodes(step);
        let rested = self.now.mono.since_ms(self.surveys.looked) >= LOOK_MS;
        if std::mem::take(&mut self.surveys.stirred) || self.surveys.changed && rested {
            (self.surveys.changed, self.surveys.looked) = (false, self.now.mono);
            let jobs: Vec<(JobId, JobSpec)> = self.surveys.turn().map(|(id, spec)| (id, spec.clone())).collect();
            self.surveys.next = jobs.last().map_or(JobId(0), |(id, _)| id.next());
            jobs.into_iter().for_each(|(id, spec)| self.cut_job(step, id, spec));
        }
        self.answer_clients(step);
    }

    /// V2.
    fn ask_nodes(&mut self, step: &mut Step) {
        let now = self.now.mono;
        let wanted = self.wanted();
        if self.surveys.models.len() > MODELS_MAX {
            self.surveys.models.retain(|survey, _| wanted.iter().any(|(wanted, ..)| wanted == survey));
        }
        for (survey, ask, since) in wanted {
            let nodes = self.may_carry(&ask);
            let models = &mut self.surveys.models;
            let book = models.entry(survey.clone()).or_default();
            for node in nodes {
                let Some(session) = self.liveness.session(node) else { continue };
                if let Some(asked) = book.get_mut(&node).filter(|asked| asked.session == session) {
                    let age = now.since_ms(asked.at);
                    let due = match &asked.answer {
                        None if age >= ANSWER_MS_MAX => {
                            let found =
                                Err(format!("has said nothing about the model for {} s", ANSWER_MS_MAX / 1_000));
                            asked.refusals = 0;
                            asked.answer = Some(Answer { at: now, rtt_us: 0, found });
                            self.surveys.stirred = true;
                            true
                        }
                        None => false,
                        Some(Answer { found: Ok(_), .. }) => age >= FRESH_MS,
                        Some(Answer { found: Err(_), at, .. }) => age >= AGAIN_MS || *at < since && asked.at < since,
                    };
                    if !due {
                        continue;
                    }
                    asked.at = now;
                } else {
                    book.insert(node, Asked { session, at: now, answer: None, refusals: 0 });
                }
                step.effects.push(Effect::Send { session, message: ToNode::Survey(survey.clone()) });
            }
        }
    }

    /// Models that are asked for, of which nodes, and since when. Of jobs, whoever has answered has answered.
    fn wanted(&self) -> Vec<(Survey, Ask, Mono)> {
        let clients = self.surveys.clients.iter();
        let clients = clients.filter_map(|client| Some((survey_of(&client.spec)?, client.ask.clone(), client.since)));
        let job = |(id, spec)| Some((survey_of(spec)?, self.cluster.jobs().get(id)?.ask.clone(), Mono(0)));
        let mut found: Vec<(Survey, Ask, Mono)> = Vec::new();
        for (survey, ask, since) in clients.chain(self.surveys.turn().filter_map(job)) {
            let same = |(other, theirs, _): &(Survey, Ask, Mono)| *other == survey && theirs.labels == ask.labels;
            match found.iter().position(same) {
                Some(at) => found[at].2 = since.max(found[at].2),
                None if found.len() < MODELS_MAX => found.push((survey, ask, since)),
                None => {}
            }
        }
        found
    }

    /// Nodes that could have ranks of this kind, whatever is free there.
    fn may_carry(&self, ask: &Ask) -> Vec<NodeId> {
        let left = Left::new(self.cluster.members(), self.liveness.live(), self.cluster.planted_bug());
        let nodes = self.cluster.members().by_cpus().iter().rev();
        let nodes = nodes.filter_map(|(_, id)| self.cluster.members().node(*id));
        let nodes = nodes.filter(|node| left.is_usable(node) && carries(node, ask)).map(|node| node.id);
        nodes.take(NODES_MAX).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// V1.
    fn cut_job(&mut self, step: &mut Step, id: JobId, spec: JobSpec) {
        let Some(job) = self.cluster.jobs().get(id) else { return };
        let asked = asked(&spec);
        let split = match self.cut_alike(job, asked) {
            Some(other) => self.place_alike(job, &spec, other),
            None => self.plan_split(&spec, &job.ask).map(|plan| plan.split),
        };
        let cut = split.and_then(|split| complete(spec, split, asked).map_err(Unfit::Wrong));
        let event = match cut {
            Ok(chosen) => Event::SplitChosen { job: id, chosen: Box::new(chosen) },
            Err(Unfit::Wrong(reason)) => Event::SplitRefused { job: id, reason },
            Err(Unfit::Short(why)) => {
                if let Some(uncut) = self.surveys.uncut.get_mut(&id).filter(|uncut| uncut.why != why) {
                    uncut.why = why;
                    step.effects.push(Effect::Changed { job: id });
                }
                return;
            }
        };
        let committed = self.commit(step, event);
        assert!(committed.is_ok(), "V1: {id} waits for its cut: {committed:?}");
    }

    /// The cut of another job of the same model that has not ended, where both specs leave it in the same way.
    fn cut_alike(&self, job: &Job, asked: Digest) -> Option<(JobId, Split)> {
        let model = &job.serves.as_ref()?.model;
        self.cluster.serving(model).filter(|(other, _)| other.owner == job.owner).find_map(|(other, _)| {
            let Cut::Chosen(chosen) = &other.cut else { return None };
            (chosen.asked == asked).then(|| (other.id, chosen.split.clone()))
        })
    }

    /// The same layers, on nodes of its own where there are some: on those of the other job where nothing better is known.
    fn place_alike(&self, job: &Job, spec: &JobSpec, (other, theirs): (JobId, Split)) -> Result<Split, Unfit> {
        match self.plan_split(&cut_as(spec.clone(), &theirs), &job.ask) {
            Ok(Plan { split, .. }) => Ok(Split { why: format!("as {other} is"), ..split }),
            Err(Unfit::Short(words)) if !self.silent(spec, &job.ask).is_empty() => Err(Unfit::Short(words)),
            Err(_) => Ok(theirs),
        }
    }

    /// Nodes that have not answered yet.
    fn silent(&self, spec: &JobSpec, ask: &Ask) -> Vec<NodeId> {
        let Some(survey) = survey_of(spec) else { return Vec::new() };
        let mut nodes = self.may_carry(ask);
        nodes.retain(|node| self.surveys.answer(&survey, *node).is_none());
        nodes
    }

    /// Nodes that have ranks of a model, or are to get some: another job of it is safer elsewhere, and does not compete with them.
    fn carrying(&self, spec: &JobSpec) -> BTreeSet<NodeId> {
        let Some(serves) = Serves::of(spec) else { return BTreeSet::new() };
        let jobs = self.cluster.serving(&serves.model).map(|(job, _)| job);
        let nodes = jobs.flat_map(|job| match (&job.run, &job.cut) {
            (Some(run), _) => run.ranks.values().filter(|rank| rank.is_wanted()).map(|rank| rank.node).collect(),
            (None, Cut::Chosen(chosen)) => chosen.split.ranks.iter().map(|rank| rank.node).collect(),
            (None, Cut::Awaited | Cut::Written) => Vec::new(),
        });
        nodes.collect()
    }

    /// By what is free now, on nodes without other jobs of the model if they will do; or, where that is too little, by what would be if nothing else
    /// ran: then the job waits for room.
    fn plan_split(&self, spec: &JobSpec, ask: &Ask) -> Result<Plan, Unfit> {
        let short = |words: String| Err(Unfit::Short(words));
        let Some(survey) = survey_of(spec) else { return short("the spec has no section [serve]".into()) };
        let nodes = self.may_carry(ask);
        if nodes.is_empty() {
            return short("no node is up that may have its ranks: `stoke explain` says why not".into());
        }
        let silent = self.silent(spec, ask);
        if !silent.is_empty() {
            return short(format!("its model is being surveyed on {}", listed(&silent)));
        }
        let has = self.having(&survey, &nodes);
        let Some(model) = commonest(&has) else { return Err(self.nowhere(&survey, ask, &nodes)) };
        let alike = || has.iter().filter(|(.., found)| shape(found) == model);
        let carrying = self.carrying(spec);
        let offers = |room: &dyn Fn(&Node) -> Room, shunned: &BTreeSet<NodeId>| -> Vec<Offer> {
            let offer = |(node, rtt_us, found): &(&Node, u32, Surveyed)| Offer {
                node: node.id,
                free: room(node),
                layer_ns: found.layer_ns,
                rtt_us: *rtt_us,
            };
            alike().map(offer).filter(|offer| !shunned.contains(&offer.node)).collect()
        };
        let plan = |offers: Vec<Offer>| split::split(spec, &model, &offers);
        let none = BTreeSet::new();
        match plan(offers(&Node::free, &carrying)).or_else(|_| plan(offers(&Node::free, &none))) {
            Ok(split) => Ok(Plan { split, waits: None }),
            Err(Unfit::Wrong(words)) => Err(Unfit::Wrong(words)),
            Err(Unfit::Short(words)) => match plan(offers(&|node| Room::of(&node.capacity), &none)) {
                Ok(split) => Ok(Plan { split, waits: Some(words) }),
                Err(_) => Err(Unfit::Short(words)),
            },
        }
    }

    /// No node that was asked has the model: for good where there are no others, and they stay with it.
    fn nowhere(&self, survey: &Survey, ask: &Ask, nodes: &[NodeId]) -> Unfit {
        let said = nodes.iter().filter_map(|node| {
            let asked = self.surveys.models.get(survey)?.get(node)?;
            Some((*node, asked.answer.as_ref()?.found.clone().err()?, asked.refusals))
        });
        let said: Vec<(NodeId, String, u32)> = said.collect();
        let all = self.cluster.members().nodes().filter(|node| carries(node, ask)).count() == nodes.len();
        let for_good = all && said.iter().all(|(.., refusals)| *refusals >= REFUSALS);
        let words = nowhere(&survey.model, said.into_iter().map(|(node, words, _)| (node, words)).collect());
        if for_good { Unfit::Wrong(words) } else { Unfit::Short(words) }
    }

    /// Nodes that have a model under this name, and how it is there.
    fn having(&self, survey: &Survey, nodes: &[NodeId]) -> Vec<(&Node, u32, Surveyed)> {
        let answer = |node: &NodeId| {
            let answer = self.surveys.answer(survey, *node)?;
            Some((self.cluster.members().node(*node)?, answer.rtt_us, answer.found.clone().ok()?))
        };
        nodes.iter().filter_map(answer).collect()
    }

    fn answer_clients(&mut self, step: &mut Step) {
        for client in std::mem::take(&mut self.surveys.clients) {
            let since = self.now.mono.since_ms(client.since);
            if !self.is_surveyed(&client) && since < ANSWER_MS_MAX {
                self.surveys.clients.push(client);
                continue;
            }
            let (split, reason) = match self.plan_split(&client.spec, &client.ask) {
                Ok(Plan { split, waits }) => (Some(split), waits.unwrap_or_default()),
                Err(unfit) => (None, unfit.words().to_owned()),
            };
            let nodes = self.survey_lines(&client.spec, &client.ask).into();
            let model = client.spec.serve.as_ref().map(|serve| serve.model.clone()).unwrap_or_default();
            let reply = Box::new(Reply::Planned(Box::new(Planned { model, split, reason, nodes })));
            step.effects.push(Effect::Reply { ticket: client.ticket, reply });
        }
    }

    /// Whether all nodes have answered; with a problem since it was asked.
    fn is_surveyed(&self, client: &Client) -> bool {
        let Some(survey) = survey_of(&client.spec) else { return true };
        self.may_carry(&client.ask).into_iter().all(|node| {
            let answer = self.surveys.answer(&survey, node);
            answer.is_some_and(|answer| answer.found.is_ok() || answer.at >= client.since)
        })
    }

    /// A line for each node: what it has of the model, or why it is not asked.
    pub(super) fn survey_lines(&self, spec: &JobSpec, ask: &Ask) -> Vec<(NodeId, String)> {
        let Some(survey) = survey_of(spec) else { return Vec::new() };
        let asked = self.may_carry(ask);
        let model = commonest(&self.having(&survey, &asked));
        let lines = explain::explain(&self.view(), ask).into_iter();
        lines
            .map(
                |(node, line)| {
                    if asked.contains(&node) { (node, self.survey_line((&survey, model), node)) } else { (node, line) }
                },
            )
            .collect()
    }

    fn survey_line(&self, (survey, model): (&Survey, Option<Surveyed>), node: NodeId) -> String {
        let free = self.cluster.members().node(node).map(Node::free).unwrap_or_default();
        match self.surveys.answer(survey, node) {
            None => SURVEYING.into(),
            Some(Answer { found: Err(words), .. }) => words.clone(),
            Some(Answer { found: Ok(found), .. }) if Some(shape(found)) != model => {
                "has another model under this name than most nodes, and gets no rank of it".into()
            }
            Some(Answer { found: Ok(found), rtt_us, .. }) => format!(
                "has the model: a layer takes {:.3} ms, {:.2} ms to the coordinator and back; {} of memory and {} cpus are free",
                found.layer_ns as f64 / 1e6,
                f64::from(*rtt_us) / 1e3,
                Bytes(free.memory_bytes >> 20 << 20),
                free.cpus
            ),
        }
    }
}

/// What a cut follows from. Whatever else a spec says, of replicas, shares or priorities, changes none.
fn asked(spec: &JobSpec) -> Digest {
    let cut = spec.serve.as_ref().map(|Serve { stages, tensor, layers, context, cache, keep, running, .. }| {
        (survey_of(spec), (stages, tensor, layers), (context, cache, keep, running), &spec.resources)
    });
    let bytes = codec::encode_record(&cut).expect("a spec has only types that encode");
    Digest(*blake3::hash(&bytes).as_bytes())
}

/// With the same layers in the same ranks.
fn cut_as(mut spec: JobSpec, split: &Split) -> JobSpec {
    if let Some(serve) = &mut spec.serve {
        let of = |stage: u32| {
            split.ranks.iter().find(|rank| rank.stage == stage).map_or(0, |rank| rank.layers.1 - rank.layers.0)
        };
        serve.layers = Some((0..split.stages).map(of).collect());
        (serve.stages, serve.tensor) = (Some(split.stages), Some(split.tensor));
    }
    spec
}

/// The spec as the ranks get it.
fn complete(spec: JobSpec, split: Split, asked: Digest) -> Result<Chosen, String> {
    let text = cut_as(spec, &split).to_toml();
    match JobSpec::parse(&text) {
        Ok(_) => Ok(Chosen { split, spec: text, asked }),
        Err(error) => Err(format!("its spec with the cut into {} ranks: {error}", split.ranks.len())),
    }
}

/// Without how fast it is.
fn shape(found: &Surveyed) -> Surveyed {
    Surveyed { layer_ns: 0, ..*found }
}

/// No model of this class is larger, and no sum of these overflows.
fn is_possible(found: &Surveyed) -> bool {
    let bytes = [found.layer_bytes, found.embedding_bytes, found.output_bytes];
    (1..=LAYERS_MAX).contains(&found.layers)
        && bytes.iter().all(|bytes| *bytes < 1 << 50)
        && (1..1 << 20).contains(&found.kv_heads)
        && (1..=found.kv_heads).contains(&found.parts_max)
        && found.token_bytes < 1 << 24
        && found.vocabulary < 1 << 24
        && (1..1 << 28).contains(&found.context)
        && (1..1 << 40).contains(&found.layer_ns)
}

/// Most nodes have this one under the model's name.
fn commonest(has: &[(&Node, u32, Surveyed)]) -> Option<Surveyed> {
    let count = |model: &Surveyed| has.iter().filter(|(.., found)| shape(found) == *model).count();
    // Of as many, what the first node has.
    has.iter().rev().map(|(.., found)| shape(found)).max_by_key(count)
}

fn nowhere(model: &str, said: Vec<(NodeId, String)>) -> String {
    let first = said.first().map(|(_, words)| words.clone()).unwrap_or_default();
    let nodes: Vec<NodeId> = said.iter().map(|(node, _)| *node).collect();
    if said.iter().all(|(_, words)| *words == first) {
        return format!("no node can serve {model:?}: {} said: {first}", listed(&nodes));
    }
    let shown: Vec<String> = said.iter().take(4).map(|(node, words)| format!("{node}: {words}")).collect();
    format!("no node can serve {model:?}: {}", shown.join("; "))
}

fn listed(nodes: &[NodeId]) -> String {
    let shown: Vec<String> = nodes.iter().take(4).map(NodeId::to_string).collect();
    match nodes.len().saturating_sub(4) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
