//! What clients see: the durable state and the volatile rest, put together for one answer. Changes nothing.

use std::collections::BTreeMap;

use stoke_protocol::identity::Subject;
use stoke_protocol::ids::{LogIndex, NodeId, Rank};
use stoke_protocol::list::List;
use stoke_protocol::message::client::{
    ClusterView, Explanation, JobState, JobView, NodeState, NodeView, Pulse, ServesView,
};
use stoke_protocol::message::rank::RankId;
use stoke_protocol::spec::JobSpec;

use super::control::{Control, SessionId};
use super::explain::explain;
use super::load::Total;
use super::machine::Job;
use super::members::{Drain, Node};
use super::run::Run;
use super::scaling::Regulars;
use super::serving::Serves;
use super::split::Cut;
use crate::gauges::LiveJob;

/// Jobs in one answer, the newest: the rest is asked for by id.
const JOBS_SHOWN_MAX: usize = 1_000;

/// A model in numbers: of its replicas together.
pub struct ModelFigures {
    pub model: String,
    pub replicas: u32,
    pub answering: u32,
    pub running: u64,
    pub waiting: u64,
    pub held: u32,
    pub total: Total,
}

impl Control {
    pub(super) fn cluster_view(&self, caller: &Subject) -> ClusterView {
        let Pulse {
            version, epoch, index, nodes_up, nodes, jobs_running, jobs_queued, ranks_slow, you, now_ms, ..
        } = self.pulse(caller, self.cluster.index());
        ClusterView {
            cluster: self.cluster.id().expect("K2: a coordinator answers for a founded cluster"),
            version,
            epoch,
            index,
            state_hash: self.cluster.state_hash(),
            nodes_up,
            nodes,
            jobs_running,
            jobs_queued,
            ranks_slow,
            you,
            now_ms,
            api: self.options.api.clone(),
        }
    }

    pub(super) fn pulse(&self, caller: &Subject, after: LogIndex) -> Pulse {
        let count = |wanted: &dyn Fn(JobState) -> bool| {
            self.cluster.jobs().iter().filter(|job| wanted(job.state)).count() as u32
        };
        Pulse {
            version: self.options.version.clone(),
            epoch: self.cluster.epoch(),
            index: self.cluster.index(),
            nodes_up: self.liveness.live().len() as u32,
            nodes: self.cluster.members().nodes().len() as u32,
            jobs_running: count(&|state| !state.is_terminal() && state != JobState::Queued),
            jobs_queued: count(&|state| state == JobState::Queued),
            ranks_slow: self.stragglers.count() as u32,
            you: caller.to_string(),
            now_ms: self.now.wall.0,
            events: self.happenings.after(after),
        }
    }

    /// Newest first.
    pub(super) fn job_views(&self) -> Vec<JobView> {
        let models = self.regulars();
        self.cluster.jobs().iter().rev().take(JOBS_SHOWN_MAX).map(|job| self.shown(job, &models)).collect()
    }

    /// Those that wait or run, and the newest `ended` of the others; newest first.
    pub(super) fn recent_views(&self, ended: u32) -> Vec<JobView> {
        let models = self.regulars();
        let mut left = ended;
        let is_shown = |job: &&Job| {
            let shown = !job.state.is_terminal() || left > 0;
            left -= u32::from(job.state.is_terminal() && shown);
            shown
        };
        let shown = self.cluster.jobs().iter().rev().filter(is_shown).take(JOBS_SHOWN_MAX);
        shown.map(|job| self.shown(job, &models)).collect()
    }

    /// Of those that run or wait, the oldest first, for metrics.
    pub(crate) fn live_jobs(&self) -> Vec<LiveJob> {
        let models = self.regulars();
        let live = self.cluster.jobs().iter().filter(|job| !job.state.is_terminal()).take(JOBS_SHOWN_MAX);
        let seen =
            live.map(|job| LiveJob { view: self.shown(job, &models), moved_ms: self.histories.moved_ms(job.id) });
        seen.collect()
    }

    pub fn job_view(&self, job: &Job) -> JobView {
        let models = if job.serves.is_some() { self.regulars() } else { BTreeMap::new() };
        self.shown(job, &models)
    }

    fn serves_view(&self, job: &Job, models: &BTreeMap<String, Regulars>) -> Option<ServesView> {
        let Serves { model, task, weights: (weights, precision), .. } = job.serves.clone()?;
        let (replicas, answering, scale) = models.get(&model).map(Regulars::view).unwrap_or_default();
        let (held, _refused) = self.loads.unplaced(self.now.mono, &model);
        let load = job.serving().and_then(|_| self.loads.view(self.now.mono, job.id));
        let ready = job.answers();
        Some(ServesView { model, task, weights, precision, ready, load, replicas, answering, held, scale })
    }

    /// Of every model that is served, for metrics.
    pub fn models(&self) -> Vec<ModelFigures> {
        let figures = |(model, regulars): (String, Regulars)| {
            let loads = regulars.jobs().filter_map(|job| self.loads.of(self.now.mono, job));
            let (running, waiting) = loads.fold((0, 0), |(running, waiting), load| {
                (running + u64::from(load.running), waiting + u64::from(load.waiting))
            });
            let (replicas, answering, _) = regulars.view();
            let (held, _refused) = self.loads.unplaced(self.now.mono, &model);
            let total = self.loads.total(&model);
            ModelFigures { model, replicas, answering, running, waiting, held, total }
        };
        self.regulars().into_iter().map(figures).collect()
    }

    fn shown(&self, job: &Job, models: &BTreeMap<String, Regulars>) -> JobView {
        let run = job.run.as_ref();
        let placed = |run: &Run| {
            run.ranks.iter().filter(|(_, rank)| !rank.leaving).map(|(id, rank)| (id.rank, rank.node)).collect()
        };
        let reason = match (job.state, self.waits.get(&job.id)) {
            (JobState::Queued, _) if job.awaits_cut() => self.surveys.why(job.id).unwrap_or_default().to_owned(),
            (JobState::Queued, Some(wait)) if job.reason.is_empty() => wait.to_string(),
            (JobState::Queued, Some(wait)) => format!("{wait}; before that: {}", job.reason),
            _ => job.reason.clone(),
        };
        JobView {
            job: job.id,
            name: job.name.clone(),
            trainer: job.trainer.clone(),
            serves: self.serves_view(job, models),
            exec: job.exec_view(),
            traffic: job.serves.as_ref().map(Serves::traffic),
            owner: job.owner.clone(),
            state: job.state,
            reason,
            priority: job.priority,
            generation: run.map_or(job.generation, |run| run.generation),
            failures: job.failures,
            recoveries: job.recoveries,
            preemptions: job.preemptions,
            world_sizes: job.worlds.values().map(|(world, _)| *world).collect(),
            placement: run.map(placed).unwrap_or_default(),
            progress: self.progress.get(&job.id).copied(),
            slow: self
                .stragglers
                .slow(job.id)
                .filter(|_| job.is_active())
                .map(|(id, times)| (id.rank, times))
                .collect(),
            checkpoint: self.cluster.catalogue().last(job.id).map(|last| self.cluster.catalogue().view(job.id, last)),
            outcome: job.outcome.clone(),
            submitted_ms: job.submitted.0,
            started_ms: job.started.map(|at| at.0),
            ended_ms: job.ended.map(|at| at.0),
        }
    }

    pub(crate) fn node_views(&self) -> Vec<NodeView> {
        self.cluster.members().nodes().map(|node| self.node_view(node)).collect()
    }

    pub(super) fn node_view(&self, node: &Node) -> NodeView {
        let lease = self.liveness.lease(node.id);
        let heartbeat = lease.and_then(|lease| lease.heartbeat);
        NodeView {
            node: node.id,
            name: node.name.clone(),
            state: self.node_state(node),
            address: node.address.clone(),
            gateway: node.gateway.map(|gateway| gateway.url(&node.address)),
            capacity: node.capacity.clone(),
            cpus_used: node.used.cpus,
            memory_reserved_bytes: node.used.memory_bytes,
            gpus_used: node.used.gpus,
            ranks: node.held.keys().map(|id| (id.job, id.rank)).collect::<List<_>>(),
            cpu_load: heartbeat.map_or(0.0, |heartbeat| heartbeat.cpu_used),
            memory_used_bytes: heartbeat.map_or(0, |heartbeat| heartbeat.memory_used_bytes),
            heat: heartbeat.map(|heartbeat| heartbeat.heat).unwrap_or_default(),
            // A node without a lease is lost since the last change.
            silent_ms: match lease {
                Some(lease) => self.now.mono.since_ms(lease.heard),
                None => self.now.wall.0.saturating_sub(node.changed.0),
            },
            reason: self.node_reason(node),
            drain: node.drain.as_ref().map(Drain::view),
        }
    }

    fn node_state(&self, node: &Node) -> NodeState {
        match (node.up, self.liveness.live().contains(&node.id)) {
            (false, _) => NodeState::Lost,
            (true, false) => NodeState::Silent,
            (true, true) if node.drain.is_some() && node.is_empty() => NodeState::Drained,
            (true, true) if node.drain.is_some() => NodeState::Draining,
            (true, true) if node.is_quarantined() => NodeState::Quarantined,
            (true, true) => NodeState::Up,
        }
    }

    fn node_reason(&self, node: &Node) -> String {
        match &node.drain {
            Some(drain) if node.is_empty() => format!("drained by {}", drain.by),
            Some(drain) => format!("drained by {}: {}", drain.by, self.drain_words(node)),
            None if node.is_quarantined() || node.quarantine.is_some() => node.quarantine_words(),
            None => String::new(),
        }
    }

    pub(super) fn explanation(&self, job: &Job) -> Explanation {
        let nodes = match job.state {
            JobState::Queued if job.awaits_cut() => {
                JobSpec::parse(&job.spec).map(|spec| self.survey_lines(&spec, &job.ask)).unwrap_or_default()
            }
            JobState::Queued => explain(&self.view(), &job.ask),
            _ => self.silent_nodes(job),
        };
        let split = match &job.cut {
            Cut::Chosen(chosen) => Some(Box::new(chosen.split.clone())),
            Cut::Written | Cut::Awaited => None,
        };
        let (job, events) = (Box::new(self.job_view(job)), job.timeline.lines().into());
        Explanation { job, nodes: nodes.into(), events, split }
    }

    /// Nodes of a job's ranks that are not heard of.
    fn silent_nodes(&self, job: &Job) -> Vec<(NodeId, String)> {
        let ranks = job.run.iter().filter(|_| job.is_active()).flat_map(|run| run.ranks.values());
        let silent: std::collections::BTreeSet<NodeId> =
            ranks.map(|rank| rank.node).filter(|node| !self.liveness.live().contains(node)).collect();
        silent.into_iter().map(|node| (node, "is silent, and carries a rank of this job".to_owned())).collect()
    }

    /// Where the logs of a job's ranks are, of the last ones that are gone too; with the session of the node, if it has one.
    pub fn log_sources(&self, job: &Job, rank: Option<Rank>) -> Vec<(RankId, NodeId, Option<SessionId>)> {
        let run = job.run.iter().flat_map(|run| run.ranks.iter().map(|(id, place)| (*id, place.node)));
        let all: BTreeMap<RankId, NodeId> = job.past.iter().copied().chain(run).collect();
        all.into_iter()
            .filter(|(id, _)| rank.is_none_or(|rank| rank == id.rank))
            .map(|(id, node)| (id, node, self.liveness.session(node)))
            .collect()
    }
}
