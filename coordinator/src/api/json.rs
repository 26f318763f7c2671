//! What programs read: the JSON shape (of `--json` and of the HTTP API) of everything that the coordinator answers. Field names are stable over releases and do not
//! follow the wire; ids are the strings that people type (`job-7`), moments are milliseconds since the Unix epoch.

use serde_json::{Value, json};
use stoke_protocol::ids::NodeId;
use stoke_protocol::ledger::Ledger;
use stoke_protocol::message::client::{
    CheckpointView, ClusterEvent, ClusterView, DrainView, ExecView, Explanation, JobState, JobView, LoadView,
    NodeState, NodeView, OutcomeView, Point, Pulse, ScaleView, ServesView, TokenScope, TokenState, TokenView,
};
use stoke_protocol::message::node::{Gpu, GpuUse, LogChunk};
use stoke_protocol::message::rank::{Exit, Progress, RlProgress};
use stoke_protocol::message::serve::Traffic;
use stoke_protocol::message::split::{Planned, Split, SplitRank};

pub fn cluster(view: &ClusterView) -> Value {
    json!({
        "cluster": view.cluster.to_string(),
        "version": view.version,
        "epoch": view.epoch.0,
        "index": view.index.0,
        "state_hash": view.state_hash.to_string(),
        "nodes_up": view.nodes_up,
        "nodes": view.nodes,
        "jobs_running": view.jobs_running,
        "jobs_queued": view.jobs_queued,
        "ranks_slow": view.ranks_slow,
        "you": view.you,
        "now_ms": view.now_ms,
        "api": view.api,
    })
}

pub fn node(view: &NodeView) -> Value {
    let told = view.heat.gpus.iter().copied().chain(std::iter::repeat(None));
    let gpu = |(gpu, told): (&Gpu, Option<GpuUse>)| {
        json!({
            "name": gpu.name,
            "memory_bytes": gpu.memory_bytes,
            "busy": told.map(|told| float(told.busy)),
            "memory_used_bytes": told.map(|told| told.memory_used_bytes),
        })
    };
    let gpus: Vec<Value> = view.capacity.gpus.iter().zip(told).map(gpu).collect();
    let labels: serde_json::Map<String, Value> =
        view.capacity.labels.iter().map(|(key, value)| (key.clone(), Value::from(value.clone()))).collect();
    let ranks: Vec<Value> =
        view.ranks.iter().map(|(job, rank)| json!({ "job": job.to_string(), "rank": rank.0 })).collect();
    json!({
        "node": view.node.to_string(),
        "name": view.name,
        "state": node_state(view.state),
        "address": view.address,
        "gateway": view.gateway,
        "version": view.capacity.version,
        "cpus": view.capacity.cpus,
        "cpus_used": view.cpus_used,
        "memory_bytes": view.capacity.memory_bytes,
        "memory_reserved_bytes": view.memory_reserved_bytes,
        "disk_bytes": view.capacity.disk_bytes,
        "gpus": gpus,
        "gpus_used": view.gpus_used,
        "labels": labels,
        "ranks": ranks,
        "cpu_load": float(view.cpu_load),
        "memory_used_bytes": view.memory_used_bytes,
        "temperature_c": view.heat.temperature_c.map(float),
        "silent_ms": view.silent_ms,
        "reason": view.reason,
        "drain": view.drain.as_ref().map(drain),
    })
}

fn drain(view: &DrainView) -> Value {
    json!({
        "by": view.by,
        "since_ms": view.since_ms,
        "deadline_ms": view.deadline_ms,
        "overdue": view.overdue,
    })
}

pub fn job(view: &JobView) -> Value {
    let placement: Vec<Value> =
        view.placement.iter().map(|(rank, node)| json!({ "rank": rank.0, "node": node.to_string() })).collect();
    json!({
        "job": view.job.to_string(),
        "name": view.name,
        "trainer": view.trainer,
        "serves": view.serves.as_ref().map(served),
        "exec": view.exec.as_ref().map(exec),
        "traffic": view.traffic.map(traffic),
        "share": view.traffic.and_then(share),
        "owner": view.owner,
        "state": job_state(view.state),
        "reason": view.reason,
        "priority": view.priority,
        "generation": view.generation.0,
        "failures": view.failures,
        "recoveries": view.recoveries,
        "preemptions": view.preemptions,
        "world_sizes": view.world_sizes.0,
        "placement": placement,
        "progress": view.progress.as_ref().map(progress),
        "slow": view.slow.iter().map(|(rank, times)| json!({ "rank": rank.0, "times": float(*times) })).collect::<Vec<_>>(),
        "checkpoint": view.checkpoint.as_ref().map(checkpoint),
        "outcome": view.outcome.as_ref().map(outcome),
        "submitted_ms": view.submitted_ms,
        "started_ms": view.started_ms,
        "ended_ms": view.ended_ms,
    })
}

/// How the commands of a job do: an exit is of a rank, with a code or a signal.
pub fn exec(view: &ExecView) -> Value {
    let ends = view.exits.iter().map(|(rank, exit)| {
        let (code, signal) = match exit {
            Exit::Code(code) => (Some(code), None),
            Exit::Signal(signal) => (None, Some(signal)),
            Exit::NotStarted(_) | Exit::AgentRestarted | Exit::AgentStopped | Exit::Unseen => (None, None),
        };
        json!({ "rank": rank.0, "code": code, "signal": signal })
    });
    let artifact = view.artifact.map(|artifact| artifact.to_string());
    json!({ "restarts": view.restarts, "attempts": view.attempts, "artifact": artifact, "exits": ends.collect::<Vec<_>>() })
}

fn progress(progress: &Progress) -> Value {
    json!({
        "step": progress.step.0,
        "steps": progress.steps.0,
        "loss": float(progress.loss),
        "accuracy": float(progress.accuracy),
        "learning_rate": progress.learning_rate,
        "samples_per_second": progress.samples_per_second,
        "compute_ms": float(progress.compute_ms),
        "exchange_ms": float(progress.exchange_ms),
        "apply_ms": float(progress.apply_ms),
        "samples": progress.samples,
        "skipped_steps": progress.skipped,
        "rl": progress.rl.as_ref().map(rl_progress),
    })
}

fn rl_progress(rl: &RlProgress) -> Value {
    let figure = |value: Option<f32>| value.map_or(Value::Null, float);
    json!({
        "round": rl.round,
        "rounds": rl.rounds,
        "env_steps": rl.env_steps,
        "env_steps_per_second": rl.env_steps_per_second,
        "episodes": rl.episodes,
        "episode_return": figure(rl.episode_return),
        "explained_variance": figure(rl.explained_variance),
        "approx_kl": figure(rl.approx_kl),
        "entropy": figure(rl.entropy),
        "lag": figure(rl.lag),
        "environment_failures": rl.environment_failures,
        "environment_strays": rl.environment_strays,
        "played_here": rl.played_here,
        "played_elsewhere": rl.played_elsewhere,
        "weights_sent": rl.weights_sent,
        "broadcast_seconds": figure(rl.broadcast_seconds),
    })
}

pub fn outcome(view: &OutcomeView) -> Value {
    json!({
        "step": view.step.0,
        "loss": float(view.loss),
        "samples": view.samples,
        "ledger": ledger(view.ledger),
        "skipped_steps": view.skipped,
        "weights_blake3": view.weights_blake3.to_string(),
        "metrics": view.metrics,
    })
}

pub fn pulse(view: &Pulse) -> Value {
    json!({
        "version": view.version,
        "epoch": view.epoch.0,
        "index": view.index.0,
        "nodes_up": view.nodes_up,
        "nodes": view.nodes,
        "jobs_running": view.jobs_running,
        "jobs_queued": view.jobs_queued,
        "ranks_slow": view.ranks_slow,
        "you": view.you,
        "now_ms": view.now_ms,
        "events": view.events.iter().map(event).collect::<Vec<_>>(),
    })
}

/// Something that has happened in the cluster.
fn event(event: &ClusterEvent) -> Value {
    json!({
        "at_ms": event.at_ms,
        "index": event.index.0,
        "job": event.job.map(|job| job.to_string()),
        "node": event.node.map(|node| node.to_string()),
        "grave": event.grave,
        "text": event.text,
    })
}

/// A point of how a job went.
pub fn point(point: &Point) -> Value {
    json!({
        "at_ms": point.at_ms,
        "step": point.step.0,
        "loss": float(point.loss),
        "accuracy": float(point.accuracy),
        "samples_per_second": float(point.samples_per_second),
        "env_steps": point.env_steps,
        "episode_return": point.episode_return.map(float),
    })
}

/// Ranges of positions whose samples are in committed steps, each in exactly one.
pub fn ledger(ledger: Ledger) -> Value {
    json!([[ledger.first, ledger.end]])
}

pub fn checkpoint(view: &CheckpointView) -> Value {
    json!({
        "job": view.job.to_string(),
        "generation": view.generation.0,
        "step": view.step.0,
        "uri": view.uri,
        "shards": view.shards,
        "bytes": view.bytes,
        "committed_ms": view.committed_ms,
        "pinned": view.pinned,
        "manifest_blake3": view.manifest_blake3.to_string(),
    })
}

pub fn explanation(view: &Explanation) -> Value {
    let nodes: Vec<Value> =
        view.nodes.iter().map(|(node, reason)| json!({ "node": node.to_string(), "reason": reason })).collect();
    let events: Vec<Value> = view
        .events
        .iter()
        .map(|event| json!({ "at_ms": event.at_ms, "index": event.index.0, "text": event.text }))
        .collect();
    let on = |rank: usize| view.job.placement.iter().find(|(id, _)| id.0 as usize == rank).map(|(_, node)| *node);
    let split = view.split.as_deref().map(|view| split(view, on));
    json!({ "job": job(&view.job), "nodes": nodes, "events": events, "split": split })
}

pub fn planned(view: &Planned) -> Value {
    let nodes: Vec<Value> =
        view.nodes.iter().map(|(node, reason)| json!({ "node": node.to_string(), "reason": reason })).collect();
    let fits_now = view.split.is_some() && view.reason.is_empty();
    let split = view.split.as_ref().map(|view| split(view, |_| None));
    json!({ "model": view.model, "split": split, "fits_now": fits_now, "reason": view.reason, "nodes": nodes })
}

/// Layers from the first to the last. `on`: where a rank is, if it has been placed.
fn split(view: &Split, on: impl Fn(usize) -> Option<NodeId>) -> Value {
    let rank = |(number, rank): (usize, &SplitRank)| {
        json!({
            "rank": number,
            "stage": rank.stage,
            "part": rank.part,
            "layers": [rank.layers.0, rank.layers.1.saturating_sub(1)],
            "memory_bytes": rank.memory_bytes,
            "node": on(number).unwrap_or(rank.node).to_string(),
            "planned_node": rank.node.to_string(),
            "layer_ms": rank.layer_ns as f64 / 1e6,
            "rtt_ms": f64::from(rank.rtt_us) / 1e3,
        })
    };
    json!({
        "stages": view.stages,
        "tensor": view.tensor,
        "ranks": view.ranks.iter().enumerate().map(rank).collect::<Vec<_>>(),
        "token_ms": view.token_ns as f64 / 1e6,
        "slowest_stage_ms": view.stage_ns as f64 / 1e6,
        "why": view.why,
    })
}

pub fn token(view: &TokenView) -> Value {
    json!({
        "token": view.token.to_string(),
        "role": scope(view.scope),
        "state": token_state(view.state),
        "expires_ms": view.expires_ms,
        "created_by": view.created_by,
    })
}

/// One object a line of a rank's output.
pub fn log_lines(chunk: &LogChunk) -> impl Iterator<Item = Value> {
    chunk.lines.iter().map(|line| {
        json!({
            "job": chunk.id.job.to_string(),
            "generation": chunk.id.generation.0,
            "rank": chunk.id.rank.0,
            "line": line,
        })
    })
}

/// Part of a job's document; field names are stable.
fn served(serves: &ServesView) -> Value {
    let ServesView { model, task, weights, precision, ready, load, replicas, answering, held, scale } = serves;
    json!({
        "model": model,
        "task": task,
        "weights": weights,
        "precision": precision,
        "ready": ready,
        "replicas": replicas,
        "answering": answering,
        "held": held,
        "load": load.as_ref().map(load_of),
        "scale": scale.as_ref().map(|ScaleView { min, max, requests, first_token_ms }| {
            json!({ "min": min, "max": max, "requests": requests, "first_token_ms": first_token_ms })
        }),
    })
}

fn load_of(load: &LoadView) -> Value {
    json!({
        "running": load.running,
        "waiting": load.waiting,
        "answers": load.answers,
        "tokens": load.tokens,
        "tokens_per_second": float(load.tokens_per_second),
        "first_token_p50_ms": load.first_token_p50_ms,
        "first_token_p99_ms": load.first_token_p99_ms,
    })
}

/// Which of its model's new requests a job gets.
fn traffic(traffic: Traffic) -> &'static str {
    match traffic {
        Traffic::Rest => "rest",
        Traffic::Share { .. } => "share",
        Traffic::Shadow => "shadow",
        Traffic::Leaving => "leaving",
    }
}

/// The same for people.
pub fn traffic_words(traffic: Traffic) -> String {
    match traffic {
        Traffic::Rest => "all new ones that no share takes".into(),
        Traffic::Share { millionths } => format!("a share of {} of the new ones", f64::from(millionths) / 1e6),
        Traffic::Shadow => "a copy of each new one; nobody gets its answers".into(),
        Traffic::Leaving => "no new ones: it leaves".into(),
    }
}

pub fn share(traffic: Traffic) -> Option<f64> {
    match traffic {
        Traffic::Share { millionths } => Some(f64::from(millionths) / 1e6),
        Traffic::Rest | Traffic::Shadow | Traffic::Leaving => None,
    }
}

pub fn job_state(state: JobState) -> &'static str {
    match state {
        JobState::Queued => "queued",
        JobState::Starting => "starting",
        JobState::Running => "running",
        JobState::Recovering => "recovering",
        JobState::Cancelling => "cancelling",
        JobState::Succeeded => "succeeded",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

pub fn node_state(state: NodeState) -> &'static str {
    match state {
        NodeState::Up => "up",
        NodeState::Silent => "silent",
        NodeState::Lost => "lost",
        NodeState::Draining => "draining",
        NodeState::Drained => "drained",
        NodeState::Quarantined => "quarantined",
    }
}

pub fn scope(scope: TokenScope) -> &'static str {
    match scope {
        TokenScope::Node => "node",
        TokenScope::Admin => "admin",
        TokenScope::Operator => "operator",
        TokenScope::Submitter => "submitter",
        TokenScope::Viewer => "viewer",
    }
}

pub fn token_state(state: TokenState) -> &'static str {
    match state {
        TokenState::Open => "open",
        TokenState::Used => "used",
        TokenState::Expired => "expired",
        TokenState::Revoked => "revoked",
    }
}

/// The shortest decimal that reads back as this `f32`; null when it is not finite.
pub fn float(value: f32) -> Value {
    value.to_string().parse::<f64>().ok().filter(|value| value.is_finite()).map_or(Value::Null, Value::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_stay_short_and_valid() {
        assert_eq!(float(0.1).to_string(), "0.1");
        assert_eq!(float(f32::NAN), Value::Null);
        assert_eq!(float(f32::INFINITY), Value::Null);
    }
}
