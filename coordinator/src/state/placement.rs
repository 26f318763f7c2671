//! Who is placed where, and why the others wait. A decision without memory: `plan(&View, &Options) -> Plan`; the journal keeps what was
//! decided, not how, so that a later release may plan otherwise and old journals still replay.
//!
//! P1 (I14): a gang is placed whole or not at all, and no room is held for a part of one.
//! P2: jobs are looked at by priority, then by submission. A later one may go first (backfill) when an earlier one does not fit, but only
//!   until `passes_max` gangs were placed since the earlier one came into the queue: then room is kept for it, so that it cannot starve.
//! P3 (I16): only nodes that are up and heard of get ranks.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use stoke_protocol::ids::{JobId, NodeId};

use super::jobs::Jobs;
use super::machine::Ask;
use super::members::Members;
use super::planted::PlantedBug;
use super::room::Left;

/// What a plan looks at.
pub struct View<'a> {
    pub members: &'a Members,
    /// Nodes with a session and a lease.
    pub live: &'a BTreeSet<NodeId>,
    pub jobs: &'a Jobs,
    /// Gangs placed in the cluster so far.
    pub placements: u64,
    pub bug: Option<PlantedBug>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Gangs that may be placed while a job waits before room is kept for it.
    pub passes_max: u64,
    /// Jobs that room is kept for at a time: more would empty the cluster for jobs that cannot run yet.
    pub kept_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { passes_max: 16, kept_max: 4 }
    }
}

/// Which jobs go where, and why the others wait.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Plan {
    pub placed: Vec<(JobId, Vec<NodeId>)>,
    pub waits: BTreeMap<JobId, Wait>,
}

/// Why a job stays in the queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wait {
    NoNodes,
    /// It would not fit into the empty cluster.
    Impossible {
        room: u32,
        ranks: u32,
        ask: String,
    },
    /// It does not fit now.
    NoRoom {
        room: u32,
        ranks: u32,
    },
    /// It does not fit now, and room is kept for it from now on.
    Kept {
        room: u32,
        ranks: u32,
    },
    /// It would fit, but the room is kept for a job that has waited too long.
    Behind {
        job: JobId,
    },
}

pub fn plan(view: &View<'_>, options: &Options) -> Plan {
    let mut plan = Plan::default();
    if view.jobs.queue().len() == 0 {
        return plan;
    }
    let mut left = Left::new(view.members, view.live, view.bug);
    // Room only shrinks while a plan is made: an ask of the same shape that found less room before finds no more now.
    let mut tried: BTreeMap<Shape<'_>, Found> = BTreeMap::new();
    let mut kept: Vec<JobId> = Vec::new();
    for job in view.jobs.queue() {
        let ask = &job.ask;
        let shape = (ask.room, &ask.labels);
        let known = tried.get(&shape).filter(|found| found.room < ask.ranks).copied();
        let found = match known {
            Some(found) => Err(found.room),
            None => left.find(ask),
        };
        let room = match found {
            Ok(placement) => {
                left.give(&placement, ask);
                plan.placed.push((job.id, placement));
                continue;
            }
            Err(room) => room,
        };
        let when_empty = known.map_or_else(|| left.when_empty(ask), |found| found.when_empty);
        tried.insert(shape, Found { room, when_empty });
        let ranks = ask.ranks;
        let passed = view.placements.saturating_sub(job.queued_after) >= options.passes_max;
        let wait = if when_empty < ranks {
            if view.live.is_empty() {
                Wait::NoNodes
            } else {
                Wait::Impossible { room: when_empty, ranks, ask: words(ask) }
            }
        } else if passed && kept.len() < options.kept_max {
            left.keep(ask);
            kept.push(job.id);
            Wait::Kept { room, ranks }
        } else if let Some(first) = kept.first() {
            Wait::Behind { job: *first }
        } else {
            Wait::NoRoom { room, ranks }
        };
        plan.waits.insert(job.id, wait);
    }
    plan
}

type Shape<'a> = (super::members::Room, &'a BTreeMap<String, String>);

/// What was found for a shape: ranks that fit now, and that would fit into the empty cluster.
#[derive(Clone, Copy)]
struct Found {
    room: u32,
    when_empty: u32,
}

/// What each rank needs, for people.
pub fn words(ask: &Ask) -> String {
    let mut words = format!("{} cpu and {} memory", ask.room.cpus, stoke_protocol::spec::Bytes(ask.room.memory_bytes));
    if ask.room.gpus > 0 {
        words = format!("{words} and {} gpu", ask.room.gpus);
    }
    for (key, value) in &ask.labels {
        words = format!("{words} and label {key}={value}");
    }
    words
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoNodes => f.write_str("no node is up: start one with `stoke node --join TOKEN`"),
            Self::Impossible { room, ranks, ask } => write!(
                f,
                "needs {ranks} ranks of {ask}; all nodes together, if nothing else ran, have room for {room}: ask for less or add nodes"
            ),
            Self::NoRoom { room, ranks } => write!(f, "needs room for {ranks} ranks; there is room for {room} now"),
            Self::Kept { room, ranks } => {
                write!(
                    f,
                    "needs room for {ranks} ranks; there is room for {room} now, and what frees up is kept for it"
                )
            }
            Self::Behind { job } => write!(f, "room is kept for {job}, which has waited too long"),
        }
    }
}
