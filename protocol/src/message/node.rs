//! A node's session with the coordinator: control frames each way on one long-lived stream, heartbeats as datagrams, signing requests and
//! log reads on streams of their own. The node dials; nothing ever connects to a node's control plane.
//!
//! Reconnecting is inventory sync: the node tells what it runs, the coordinator adopts what it expects and decides after.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::load::{Demand, Load};
use super::rank::{Member, Membership, Progress, RankEvent, RankId, ShardRecord, StartRank, StepTimes};
use super::serve::Routes;
use super::split::{Survey, Surveyed};
use crate::ids::{ClusterId, Epoch, Generation, Incarnation, JobId, LogIndex, NodeId, Step};
use crate::list::List;
use crate::spec::Artifact;

/// Agent → coordinator, control stream.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum FromNode {
    /// First frame of a session. Answered by `Welcome`, or the connection is closed with a reason.
    Hello(NodeHello),
    /// What happened to a rank. Sent again after a reconnect until answered by `Acknowledge`.
    Report(Report),
    /// Not acknowledged, may be dropped; the newest of a rank replaces older ones.
    Progress { id: RankId, progress: Progress },
    /// Answers `Sweep`. May be lost; the order comes again then. An error is for people.
    Swept { job: JobId, index: LogIndex, removed: u32, error: Option<String> },
    /// Of a head on this node. Not acknowledged, may be dropped; the newest replaces older ones.
    Load { id: RankId, load: Load },
    /// Of this node's gateway: models with questions that no head has. About once a second while there are any, and once with none after that. Not
    /// acknowledged, may be dropped; the newest replaces older ones.
    Demand(List<Demand>),
    /// Answers `Survey`. May be lost: the question comes again then. An error is for people.
    Surveyed { survey: Survey, found: Result<Surveyed, String> },
    /// Where the time of some of a rank's steps went. Not acknowledged, may be dropped.
    Timed { id: RankId, steps: List<StepTimes> },
}

/// A rank event with the number that orders and acknowledges it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Grows by one within an incarnation, from 1.
    pub sequence: u64,
    pub id: RankId,
    pub event: RankEvent,
}

/// Who the node is, what it has and what it runs.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct NodeHello {
    pub cluster: ClusterId,
    /// Must be the node of the client certificate.
    pub node: NodeId,
    pub name: String,
    pub incarnation: Incarnation,
    /// Grows by one with each hello of an incarnation, from 1: an older connection's may arrive late, and its inventory is out of date.
    pub session: u64,
    /// The highest coordinator epoch and journal index that this node has seen (I1, F32).
    pub epoch_seen: Epoch,
    pub index_seen: LogIndex,
    pub capacity: Capacity,
    /// Where its gateway takes requests over HTTP, if it has one.
    pub gateway: Option<GatewayAt>,
    pub ranks: List<RankInventory>,
}

/// A node's gateway, as it listens.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GatewayAt {
    pub address: SocketAddr,
    pub tls: bool,
}

impl GatewayAt {
    /// Where clients go. One that listens on every address is reached where the node is (`IP:PORT`).
    pub fn url(&self, node: &str) -> String {
        let own = node.parse().ok().map(|node: SocketAddr| node.ip()).filter(|_| self.address.ip().is_unspecified());
        let address = SocketAddr::new(own.unwrap_or(self.address.ip()), self.address.port());
        format!("{}://{address}", if self.tls { "https" } else { "http" })
    }
}

/// A rank that the agent holds, alive or with an unacknowledged end.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RankInventory {
    pub id: RankId,
    pub alive: bool,
    pub step: Step,
}

/// What a machine offers. Measured by the agent at its start, or limited by its operator.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Capacity {
    pub cpus: u32,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
    pub gpus: List<Gpu>,
    /// `key=value`, set by the operator; the agent adds `host` and `os`.
    pub labels: List<(String, String)>,
    /// The `stoke` release of the agent.
    pub version: String,
}

/// One accelerator.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Gpu {
    pub name: String,
    pub memory_bytes: u64,
}

/// Agent → coordinator, datagram, every `heartbeat_ms`. Renews the lease; not answered.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Heartbeat {
    pub incarnation: Incarnation,
    pub sequence: u64,
    /// Between 0 and 1, of all processors.
    pub cpu_used: f32,
    pub memory_used_bytes: u64,
    /// The newest routes that this node's gateway goes by; of one that has no gateway, 0.
    pub routes: LogIndex,
    /// Questions of this gateway at jobs that are leaving by these routes.
    pub leaving: u32,
    pub heat: Heat,
}

/// Accelerators of a node that a heartbeat tells of: it has to fit into a datagram.
pub const GPUS_TOLD_MAX: usize = 16;

/// How hot a machine runs, for people. What cannot be measured there is left out.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Heat {
    /// Of the hottest sensor, in degrees Celsius.
    pub temperature_c: Option<f32>,
    /// In the order of `Capacity::gpus`.
    pub gpus: [Option<GpuUse>; GPUS_TOLD_MAX],
}

#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct GpuUse {
    /// Between 0 and 1.
    pub busy: f32,
    pub memory_used_bytes: u64,
}

/// Coordinator → agent, control stream. All of it is idempotent: after a reconnect it may come again.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum ToNode {
    /// Answers `Hello`. The node keeps `epoch` and refuses lower ones from then on.
    Welcome { epoch: Epoch, index: LogIndex, heartbeat_ms: u64, lease_ms: u64 },
    /// The report is journalled; the agent forgets it.
    Acknowledge { sequence: u64, index: LogIndex },
    /// Start a process, unless this id was started already.
    Start(StartRank),
    /// See `rank::ToRank::Membership`.
    Membership { id: RankId, membership: Membership },
    /// See `rank::ToRank::Commit`.
    Commit { id: RankId, generation: Generation, step: Step, shards: List<ShardRecord> },
    /// See `rank::ToRank::Committed`.
    Committed { id: RankId, step: Step, keep: List<String> },
    /// See `rank::ToRank::Release`.
    Release { id: RankId },
    /// Stop the process: a polite request, then SIGKILL after `grace_ms`. Answered by the report of its exit; a rank that is not there is
    /// reported as exited.
    Stop { id: RankId, reason: String, grace_ms: u64 },
    /// Remove all folders of a job's checkpoints that are older than `newest`, of no newer generation, and that `keep` does not name: the job was
    /// pruned by entry `index`. Answered by `Swept`.
    Sweep { job: JobId, index: LogIndex, checkpoints: String, newest: (Step, Generation), keep: List<String> },
    /// See `rank::ToRank::Abandon`.
    Abandon { id: RankId, generation: Generation, step: Step },
    /// For the node's gateway: where jobs serve. After `Welcome`, and whenever it changes; each replaces the one before.
    Routes(Routes),
    /// What this node has of a model that is to be served. Answered by `Surveyed`.
    Survey(Survey),
    /// See `rank::ToRank::Rollouts`.
    Rollouts { id: RankId, rollouts: List<Member> },
}

/// Agent → coordinator, request stream.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum NodeRequest {
    /// A certificate for a rank of this node's; the coordinator checks that it placed the rank here. Answered by `Certificate`.
    SignRank { id: RankId, csr: List<u8> },
    /// A fresh certificate for the node itself, at two thirds of the old one's life. Answered by `Certificate`.
    Renew { csr: List<u8> },
    /// A part of an artifact that a rank of this node needs. Answered by `ArtifactPart`.
    Artifact { artifact: Artifact, offset: u64 },
}

/// Coordinator → agent, reply.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum NodeReply {
    Certificate {
        certificate: List<u8>,
    },
    Refused {
        reason: String,
    },
    /// From the offset that was asked for; `bytes` is the length of the whole.
    ArtifactPart {
        bytes: u64,
        part: List<u8>,
    },
}

/// Coordinator → agent, request stream that the coordinator opens: read a rank's log. Answered by `LogChunk` frames until `last`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReadLog {
    pub id: RankId,
    /// Only the last so many lines of what is there; none for all.
    pub tail: Option<u32>,
    /// Keep the stream open and send what is written later, until the rank is gone.
    pub follow: bool,
}

/// Agent → coordinator → client: whole lines of a rank's output.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LogChunk {
    pub id: RankId,
    pub lines: List<String>,
    pub last: bool,
}
