//! What Prometheus is told of each live job and each node, name and help side by side. Owns the labels: jobs that run or wait and nodes of the cluster, so that there are no more series
//! than there is work. Decides nothing.

use stoke_protocol::exposition::{Exposition, Kind};
use stoke_protocol::message::client::{JobState, JobView, NodeState, NodeView};

use crate::api::json::node_state;

/// A number's name, its help, and where it is; none: it has no such number now.
type Figure<T> = (Kind, &'static str, &'static str, fn(&T) -> Option<f64>);

/// A job as metrics see it.
pub(crate) struct LiveJob {
    pub view: JobView,
    /// When it last got further, in milliseconds since the Unix epoch.
    pub moved_ms: Option<u64>,
}

const JOBS: [Figure<LiveJob>; 21] = [
    (Kind::Gauge, "stoke_job_submitted_timestamp_seconds", "When it was submitted", |job| {
        seconds(job.view.submitted_ms)
    }),
    (Kind::Gauge, "stoke_job_waiting", "1: it is in the queue", |job| flag(job.view.state == JobState::Queued)),
    (Kind::Gauge, "stoke_job_step", "Steps that are done", |job| Some(job.view.progress?.step.0 as f64)),
    (Kind::Gauge, "stoke_job_steps", "Steps that there are to do", |job| Some(job.view.progress?.steps.0 as f64)),
    (Kind::Gauge, "stoke_job_moved_timestamp_seconds", "When it last got further", |job| seconds(job.moved_ms?)),
    (Kind::Gauge, "stoke_job_world_size", "Ranks that it has", |job| Some(job.view.placement.len() as f64)),
    (Kind::Gauge, "stoke_job_loss", "Of the newest step", |job| Some(job.view.progress?.loss.into())),
    (Kind::Gauge, "stoke_job_samples_per_second", "Over all ranks", |job| Some(job.view.progress?.samples_per_second)),
    (Kind::Gauge, "stoke_job_compute_seconds", "Mean of a step: forward and backward", |job| {
        Some(f64::from(job.view.progress?.compute_ms) / 1e3)
    }),
    (Kind::Gauge, "stoke_job_exchange_seconds", "Mean of a step: sums between ranks", |job| {
        Some(f64::from(job.view.progress?.exchange_ms) / 1e3)
    }),
    (Kind::Gauge, "stoke_job_apply_seconds", "Mean of a step: the optimizer", |job| {
        Some(f64::from(job.view.progress?.apply_ms) / 1e3)
    }),
    (
        Kind::Counter,
        "stoke_job_recoveries_total",
        "Generations that ended because ranks were lost, and after which it went on",
        |job| Some(job.view.recoveries.into()),
    ),
    (Kind::Counter, "stoke_job_preemptions_total", "Times that it made room", |job| Some(job.view.preemptions.into())),
    (Kind::Gauge, "stoke_job_checkpoint_timestamp_seconds", "When its newest checkpoint was committed", |job| {
        seconds(job.view.checkpoint.as_ref()?.committed_ms)
    }),
    (Kind::Gauge, "stoke_job_checkpoint_bytes", "Of its newest checkpoint", |job| {
        Some(job.view.checkpoint.as_ref()?.bytes as f64)
    }),
    (Kind::Counter, "stoke_job_env_steps_total", "Steps of environments", |job| {
        Some(job.view.progress?.rl?.env_steps as f64)
    }),
    (Kind::Gauge, "stoke_job_episode_return", "Mean of the last hundred episodes", |job| {
        Some(job.view.progress?.rl?.episode_return?.into())
    }),
    (Kind::Gauge, "stoke_job_policy_lag", "Updates that trajectories are behind", |job| {
        Some(job.view.progress?.rl?.lag?.into())
    }),
    (Kind::Counter, "stoke_job_environment_failures_total", "Environments that failed and were made anew", |job| {
        Some(job.view.progress?.rl?.environment_failures as f64)
    }),
    (
        Kind::Counter,
        "stoke_job_environment_strays_total",
        "Environments that gave something else when their actions were played again",
        |job| Some(job.view.progress?.rl?.environment_strays as f64),
    ),
    (
        Kind::Gauge,
        "stoke_job_broadcast_seconds",
        "From a round's beginning until all ranks that play had its weights",
        |job| Some(job.view.progress?.rl?.broadcast_seconds?.into()),
    ),
];

const NODES: [Figure<NodeView>; 11] = [
    (Kind::Gauge, "stoke_node_up", "1: it is heard", |node| {
        flag(!matches!(node.state, NodeState::Lost | NodeState::Silent))
    }),
    (Kind::Gauge, "stoke_node_schedulable", "1: it may get ranks", |node| flag(node.state == NodeState::Up)),
    (Kind::Gauge, "stoke_node_silent_seconds", "Since it was last heard", |node| Some(node.silent_ms as f64 / 1e3)),
    (Kind::Gauge, "stoke_node_cpus", "That ranks may have", |node| Some(node.capacity.cpus.into())),
    (Kind::Gauge, "stoke_node_cpus_used", "That ranks have", |node| Some(node.cpus_used.into())),
    (Kind::Gauge, "stoke_node_cpu_load_ratio", "Share of all processors that is busy", |node| {
        Some(node.cpu_load.into())
    }),
    (Kind::Gauge, "stoke_node_memory_bytes", "That ranks may have", |node| Some(node.capacity.memory_bytes as f64)),
    (Kind::Gauge, "stoke_node_memory_reserved_bytes", "That ranks have", |node| {
        Some(node.memory_reserved_bytes as f64)
    }),
    (Kind::Gauge, "stoke_node_gpus", "That ranks may have", |node| Some(node.capacity.gpus.len() as f64)),
    (Kind::Gauge, "stoke_node_gpus_used", "That ranks have", |node| Some(node.gpus_used.into())),
    (Kind::Gauge, "stoke_node_ranks", "Rank processes", |node| Some(node.ranks.len() as f64)),
];

const NODE_STATES: [NodeState; 6] = [
    NodeState::Up,
    NodeState::Silent,
    NodeState::Lost,
    NodeState::Draining,
    NodeState::Drained,
    NodeState::Quarantined,
];

/// How many nodes are in each state, in the words of `stoke nodes`.
pub(crate) fn by_state(nodes: &[NodeView]) -> [(&'static str, usize); NODE_STATES.len()] {
    NODE_STATES.map(|state| (node_state(state), nodes.iter().filter(|node| node.state == state).count()))
}

/// All of it as Prometheus reads it.
pub(crate) fn text(jobs: &[LiveJob], nodes: &[NodeView]) -> String {
    let mut text = Exposition::default();
    for (kind, name, help, figure) in JOBS {
        text.family(kind, name, help);
        for job in jobs {
            let id = job.view.job.to_string();
            let labels = [("job", id.as_str()), ("name", job.view.name.as_str())];
            figure(job).into_iter().for_each(|value| text.labelled(name, &labels, value));
        }
    }
    for (kind, name, help, figure) in NODES {
        text.family(kind, name, help);
        for node in nodes {
            let id = node.node.to_string();
            let labels = [("node", id.as_str()), ("name", node.name.as_str())];
            figure(node).into_iter().for_each(|value| text.labelled(name, &labels, value));
        }
    }
    text.text()
}

fn seconds(ms: u64) -> Option<f64> {
    Some(ms as f64 / 1e3)
}

fn flag(is_so: bool) -> Option<f64> {
    Some(if is_so { 1.0 } else { 0.0 })
}
