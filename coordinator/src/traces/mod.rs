//! What becomes of jobs, as traces of OpenTelemetry. A trace is a job: what it was in (queued, starting, running, recovering), its generations,
//! the starts of its ranks, its checkpoints, and of some steps where the time of each rank went. Decides nothing, and nothing waits for it.
//!
//! T1 (I6): what follows from entries is told when they are durable. T2: volatile: a coordinator that starts anew goes on with spans that begin
//! at its start, and says so by `stoke.recovered`. T3: ids are made of the cluster's and the job's, so that no context has to be carried.

mod export;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};
use stoke_protocol::ids::{ClusterId, Generation, JobId, LogIndex, NodeId, Step};
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::rank::{RankEvent, RankId, StepTimes};

pub use self::export::OtlpError;
pub(crate) use self::export::{Queue, start};
use crate::state::cluster::Cluster;
use crate::state::event::{Event, Record};
use crate::state::machine::Job;
use crate::state::words::state_word;
use crate::state::{Effect, Time};

/// Checkpoints of a job that are under way. One that is abandoned stays until a later one is committed.
const CHECKPOINTS_MAX: usize = 16;

pub(crate) struct Traces {
    cluster: ClusterId,
    queue: Queue,
    jobs: BTreeMap<JobId, Open>,
    /// Until the entry is durable.
    waiting: VecDeque<(LogIndex, Waiting)>,
}

enum Waiting {
    Ended(SpanData),
    /// It ends when its entry is durable: then the submitter is answered.
    Submitted(SpanData),
}

/// Of a job that has not ended: what is under way, and since when.
struct Open {
    state: JobState,
    since: Time,
    generation: Option<(Generation, Time)>,
    starting: BTreeMap<RankId, Time>,
    checkpoints: BTreeMap<Step, Time>,
    recovered: bool,
}

impl Open {
    fn new(job: &Job, now: Time, recovered: bool) -> Self {
        let generation = job.run.as_ref().map(|run| (run.generation, now));
        let (starting, checkpoints) = (BTreeMap::new(), BTreeMap::new());
        Self { state: job.state, since: now, generation, starting, checkpoints, recovered }
    }
}

impl Traces {
    /// Of a cluster as the journal has it.
    pub fn new(id: ClusterId, cluster: &Cluster, now: Time, queue: Queue) -> Self {
        let active = cluster.jobs().iter().filter(|job| !job.state.is_terminal());
        let jobs = active.map(|job| (job.id, Open::new(job, now, true))).collect();
        Self { cluster: id, queue, jobs, waiting: VecDeque::new() }
    }

    /// What a step of the state has made of entries; `now` where it has none.
    pub fn hear(&mut self, cluster: &Cluster, now: Time, (records, effects): (&[Record], &[Effect])) {
        for record in records {
            self.entry(cluster, record);
        }
        let at = records.last().map_or(now, |record| record.at);
        for effect in effects {
            if let Effect::Changed { job } = effect {
                self.changed(cluster, *job, at);
            }
        }
    }

    /// Everything up to an entry is durable.
    pub fn durable(&mut self, last: LogIndex, now: Time) {
        while self.waiting.front().is_some_and(|(index, _)| *index <= last) {
            match self.waiting.pop_front() {
                Some((_, Waiting::Ended(span))) => self.queue.push(span),
                Some((_, Waiting::Submitted(span))) => self.queue.push(SpanData { end_time: wall(now), ..span }),
                None => return,
            }
        }
    }

    /// Where the time of some steps went. The session they came over is the node's that has the rank.
    pub fn steps(&self, cluster: &Cluster, (id, node): (RankId, NodeId), steps: &[StepTimes]) {
        let Some(job) = cluster.jobs().get(id.job).filter(|job| job.is_on(id, node) && job.expects(id)) else { return };
        // A program of a user's own may say anything, as often as it likes.
        let steps = steps.iter().take(StepTimes::TOLD_MAX).filter(|times| times.generation <= job.generation);
        let (trace, node) = (Trace::of(self.cluster, job.id), node_name(cluster, node));
        for times in steps {
            if !self.queue.has_room() {
                return;
            }
            let StepTimes { generation, step, began_us, compute_us, exchange_us, apply_us } = *times;
            let key = format!("{generation}/{step}/{id}");
            let micros = |us: u64| UNIX_EPOCH + Duration::from_micros(us);
            let mut at = began_us;
            let mut parts = Vec::new();
            for (name, us) in [("compute", compute_us), ("exchange", exchange_us), ("apply", apply_us)] {
                let end = at.saturating_add(us.into());
                let span = trace.span(name, (&key, trace.id("step", &key)), (micros(at), micros(end)));
                parts.push(span);
                at = end;
            }
            let parent = trace.id("generation", &generation.to_string());
            let mut whole = trace.span("step", (&key, parent), (micros(began_us), micros(at)));
            whole.attributes.extend([
                KeyValue::new("stoke.step", number(step.0)),
                KeyValue::new("stoke.generation", number(generation.0)),
                KeyValue::new("stoke.rank", i64::from(id.rank.0)),
                KeyValue::new("stoke.node", node.clone()),
            ]);
            parts.into_iter().chain([whole]).for_each(|span| self.queue.push(span));
        }
    }

    fn entry(&mut self, cluster: &Cluster, record: &Record) {
        let at = record.at;
        match &record.event {
            Event::Submitted(_) => {
                let Some(job) = cluster.jobs().get(cluster.jobs().last()) else { return };
                let submitted = Open { state: JobState::Queued, generation: None, ..Open::new(job, at, false) };
                self.jobs.insert(job.id, submitted);
                let trace = Trace::of(self.cluster, job.id);
                let mut span = trace.child("submit", "", (at, at));
                span.span_kind = SpanKind::Server;
                span.attributes.push(KeyValue::new("enduser.id", job.owner.clone()));
                self.waiting.push_back((cluster.index(), Waiting::Submitted(span)));
            }
            Event::GenerationStarted { job, generation, placement } => {
                let Some(open) = self.jobs.get_mut(job) else { return };
                let ranks = (0..placement.len()).map(|rank| stoke_protocol::ids::Rank(rank as u32));
                open.starting.extend(ranks.map(|rank| (RankId { job: *job, generation: *generation, rank }, at)));
            }
            Event::RanksPlaced { job, generation, places } => {
                let Some(open) = self.jobs.get_mut(job) else { return };
                let ids = places.iter().map(|(rank, _)| RankId { job: *job, generation: *generation, rank: *rank });
                open.starting.extend(ids.map(|id| (id, at)));
            }
            Event::Reported { node, report, .. } => self.reported(cluster, at, (report.id, *node, &report.event)),
            _ => {}
        }
    }

    fn reported(&mut self, cluster: &Cluster, at: Time, (id, node, event): (RankId, NodeId, &RankEvent)) {
        let Some(job) = cluster.jobs().get(id.job).filter(|job| job.is_on(id, node)) else { return };
        let Some(open) = self.jobs.get_mut(&id.job) else { return };
        let trace = Trace::of(self.cluster, job.id);
        let span = match event {
            RankEvent::Ready { .. } => {
                let Some(since) = open.starting.remove(&id) else { return };
                rank_start(trace, id, node_name(cluster, node), (since, at))
            }
            RankEvent::ShardStored { step, .. } => {
                open.checkpoints.entry(*step).or_insert(at);
                if open.checkpoints.len() > CHECKPOINTS_MAX {
                    open.checkpoints.pop_first();
                }
                return;
            }
            RankEvent::ManifestStored { step, uri, .. } => {
                let Some(since) = open.checkpoints.get(step).copied() else { return };
                open.checkpoints = open.checkpoints.split_off(&Step(step.0.saturating_add(1)));
                let mut span = trace.child("checkpoint", &step.to_string(), (since, at));
                span.attributes
                    .extend([KeyValue::new("stoke.step", number(step.0)), KeyValue::new("url.full", uri.clone())]);
                span
            }
            RankEvent::NotStored { step, error, .. } => {
                let since = open.checkpoints.remove(step).unwrap_or(at);
                let mut span = trace.child("checkpoint", &step.to_string(), (since, at));
                span.attributes.push(KeyValue::new("stoke.step", number(step.0)));
                span.status = Status::error(error.clone());
                span
            }
            _ => return,
        };
        self.waiting.push_back((cluster.index(), Waiting::Ended(span)));
    }

    /// A job looks different: what was under way may have ended.
    fn changed(&mut self, cluster: &Cluster, id: JobId, at: Time) {
        let Some(job) = cluster.jobs().get(id) else {
            self.jobs.remove(&id);
            return;
        };
        let Some(open) = self.jobs.get_mut(&id) else { return };
        let trace = Trace::of(self.cluster, id);
        let mut ended = Vec::new();
        let run = job.run.as_ref().filter(|_| !job.state.is_terminal() && job.state != JobState::Queued);
        let is_live = |id: &RankId| run.and_then(|run| run.ranks.get(id)).is_some_and(|rank| !rank.gone);
        for (id, since) in std::mem::take(&mut open.starting) {
            if is_live(&id) {
                open.starting.insert(id, since);
            } else {
                let mut span = rank_start(trace, id, String::new(), (since, at));
                span.status = Status::error("it was gone before it was ready");
                ended.push(span);
            }
        }
        let generation = run.map(|run| run.generation);
        if open.generation.map(|(generation, _)| generation) != generation {
            if let Some((before, since)) = open.generation {
                let mut span = trace.child("generation", &before.to_string(), (since, at));
                span.attributes.push(KeyValue::new("stoke.generation", number(before.0)));
                if let Some((world, _)) = job.worlds.get(&before) {
                    span.attributes.push(KeyValue::new("stoke.world_size", i64::from(*world)));
                }
                // A membership that nobody's loss has ended was followed by the next in order.
                if let Some(loss) = lost(job, before) {
                    span.status = Status::error(loss);
                }
                ended.push(span);
            }
            open.generation = generation.map(|generation| (generation, at));
        }
        if open.state != job.state {
            let mut span = trace.child(state_word(open.state), &format!("{}", open.since.0), (open.since, at));
            if job.state == JobState::Recovering || job.state == JobState::Failed {
                span.status = Status::error(job.reason.clone());
            }
            ended.push(span);
            (open.state, open.since) = (job.state, at);
        }
        if open.recovered {
            ended.iter_mut().for_each(|span| span.attributes.push(KeyValue::new("stoke.recovered", true)));
        }
        if job.state.is_terminal() {
            ended.push(whole(trace, job, at));
            self.jobs.remove(&id);
        }
        self.waiting.extend(ended.into_iter().map(|span| (cluster.index(), Waiting::Ended(span))));
    }
}

/// Who was lost, where a generation ended by that, in the words of the job's timeline.
fn lost(job: &Job, generation: Generation) -> Option<String> {
    let beginning = format!("{generation} ended: ");
    let lines = job.timeline.lines().into_iter().rev();
    lines.map(|line| line.text).find_map(|text| Some(text.strip_prefix(&beginning)?.to_owned()))
}

/// The root of a job's trace.
fn whole(trace: Trace, job: &Job, at: Time) -> SpanData {
    let mut span = trace.child(ROOT, "", (job.submitted, at));
    span.parent_span_id = SpanId::INVALID;
    span.attributes.extend([
        KeyValue::new("stoke.job.name", job.name.clone()),
        KeyValue::new("stoke.job.key", job.key.clone()),
        KeyValue::new("stoke.job.trainer", job.trainer.clone()),
        KeyValue::new("stoke.job.state", state_word(job.state)),
        KeyValue::new("stoke.job.recoveries", i64::from(job.recoveries)),
        KeyValue::new("enduser.id", job.owner.clone()),
    ]);
    span.status = match job.state {
        JobState::Succeeded => Status::Ok,
        JobState::Failed => Status::error(job.reason.clone()),
        _ => Status::Unset,
    };
    span
}

fn rank_start(trace: Trace, id: RankId, node: String, within: (Time, Time)) -> SpanData {
    let mut span = trace.child("rank start", &id.to_string(), within);
    span.attributes.extend([
        KeyValue::new("stoke.rank", i64::from(id.rank.0)),
        KeyValue::new("stoke.generation", number(id.generation.0)),
    ]);
    if !node.is_empty() {
        span.attributes.push(KeyValue::new("stoke.node", node));
    }
    span
}

/// The span that all others are below.
const ROOT: &str = "job";

/// A job's trace (T3).
#[derive(Clone, Copy)]
struct Trace {
    id: TraceId,
    job: JobId,
}

impl Trace {
    fn of(cluster: ClusterId, job: JobId) -> Self {
        let digest =
            blake3::Hasher::new().update(b"stoke trace").update(&cluster.0).update(&job.0.to_le_bytes()).finalize();
        let mut id = [0; 16];
        id.copy_from_slice(&digest.as_bytes()[..16]);
        Self { id: TraceId::from_bytes(id), job }
    }

    /// Of a span. Name and key together are one of a kind in the trace.
    fn id(&self, name: &str, key: &str) -> SpanId {
        let hasher = &mut blake3::Hasher::new();
        let digest =
            hasher.update(&self.id.to_bytes()).update(name.as_bytes()).update(b"/").update(key.as_bytes()).finalize();
        let mut id = [0; 8];
        id.copy_from_slice(&digest.as_bytes()[..8]);
        SpanId::from_bytes(id)
    }

    /// A span below the root.
    fn child(&self, name: &'static str, key: &str, (from, until): (Time, Time)) -> SpanData {
        self.span(name, (key, self.id(ROOT, "")), (wall(from), wall(until)))
    }

    fn span(
        &self,
        name: &'static str,
        (key, parent): (&str, SpanId),
        (start_time, end_time): (SystemTime, SystemTime),
    ) -> SpanData {
        SpanData {
            span_context: SpanContext::new(self.id, self.id(name, key), TraceFlags::SAMPLED, false, TraceState::NONE),
            parent_span_id: parent,
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: name.into(),
            start_time,
            end_time,
            attributes: vec![KeyValue::new("stoke.job.id", self.job.to_string())],
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::builder("stoke")
                .with_version(env!("CARGO_PKG_VERSION"))
                .build(),
        }
    }
}

fn wall(time: Time) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(time.0)
}

/// Attributes have signed numbers.
fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn node_name(cluster: &Cluster, node: NodeId) -> String {
    cluster.members().node(node).map_or_else(|| node.to_string(), |member| member.name.clone())
}
