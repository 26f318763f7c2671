//! What a run is to go through, decided before it begins: machines, what clients ask and when, faults and when, and how likely the small
//! mishaps are. A seed draws a plan; a trace file has one written down, and shrinking takes things out of it. Owns the plan; the world makes it
//! happen.

use serde::{Deserialize, Serialize};
use stoke_coordinator::state::liveness::Timings;

use super::faults::{self, Fault, Rates};
use super::random::Stream;
use super::specs::JobPlan;
use super::world::Ms;

/// Jobs that a run may have: more make it slow and show nothing new.
const JOBS_MAX: usize = 24;
/// Waits of a client between two questions.
const ASKS_APART_MS: (Ms, Ms) = (100, 5_000);
/// Keys of an owner.
const KEYS: u64 = 9;
/// Who may administer, who may only look, who may do with nodes and all jobs what their work needs.
pub const ROOT: usize = 0;
const VIEWER: usize = 1;
const ADA: usize = 2;
const BOB: usize = 3;
const OPERATOR: usize = 4;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Until then faults happen and clients ask for new work.
    pub chaos_ms: Ms,
    pub failover_grace_ms: Ms,
    #[serde(default)]
    pub detection: Detection,
    /// Journal entries between snapshots.
    pub snapshot_every: u64,
    pub rates: Rates,
    pub machines: Vec<MachinePlan>,
    pub asks: Vec<TimedAsk>,
    pub faults: Vec<TimedFault>,
}

/// As `--detection` has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Detection {
    #[default]
    Default,
    Fast,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MachinePlan {
    /// Names its link and its host: stays when other machines go.
    pub name: u64,
    pub cpus: u32,
    pub memory_gib: u64,
    pub gpus: usize,
    pub zone: String,
    /// How fast its clock runs.
    pub rate: f64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TimedFault {
    pub at: Ms,
    #[serde(flatten)]
    pub fault: Fault,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TimedAsk {
    pub at: Ms,
    pub client: usize,
    #[serde(flatten)]
    pub ask: Ask,
}

/// What a client asks. A job is named by who submits it and under which key; nothing is asked of one that nobody has been told of yet.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Ask {
    Submit {
        key: u64,
        job: JobPlan,
    },
    /// The same again.
    Again {
        key: u64,
    },
    /// Under a key that has another job.
    SubmitOther {
        key: u64,
        job: JobPlan,
    },
    /// By somebody who may not.
    SubmitForbidden {
        key: u64,
        job: JobPlan,
    },
    Cancel {
        of: usize,
        key: u64,
    },
    Scale {
        of: usize,
        key: u64,
        ranks: u32,
    },
    /// To pin one of its checkpoints, to take a pin back, or to prune.
    Shelf {
        of: usize,
        key: u64,
        pick: u64,
    },
    /// Without `deadline_ms` it has the one that is usual.
    Drain {
        machine: usize,
        deadline_ms: Option<u64>,
    },
    Undrain {
        machine: usize,
    },
    /// The machine is to be forgotten, if it is lost or empty.
    Remove {
        machine: usize,
    },
    /// A token that nobody joins with, and the end of one.
    Spare,
    Revoke,
    Tokens,
    Renew,
    Checkpoints {
        of: usize,
        key: u64,
    },
    Watch {
        of: usize,
        key: u64,
    },
    Logs {
        of: usize,
        key: u64,
    },
    /// A join with one of the tokens that have been used or revoked.
    Replay {
        pick: u64,
    },
    Job {
        of: usize,
        key: u64,
    },
    Explain {
        of: usize,
        key: u64,
    },
    Nodes,
    Cluster,
    Jobs,
}

impl Ask {
    /// Whose job under which key it is about.
    pub fn job(&self, client: usize) -> Option<(usize, u64)> {
        match self {
            Self::Submit { key, .. } | Self::Again { key } => Some((client, *key)),
            Self::SubmitOther { key, .. } | Self::SubmitForbidden { key, .. } => Some((client, *key)),
            Self::Cancel { of, key } | Self::Scale { of, key, .. } | Self::Shelf { of, key, .. } => Some((*of, *key)),
            Self::Job { of, key } | Self::Explain { of, key } | Self::Checkpoints { of, key } => Some((*of, *key)),
            Self::Watch { of, key } | Self::Logs { of, key } => Some((*of, *key)),
            Self::Drain { .. } | Self::Undrain { .. } | Self::Remove { .. } | Self::Replay { .. } => None,
            Self::Nodes | Self::Cluster | Self::Jobs | Self::Tokens | Self::Renew | Self::Spare | Self::Revoke => None,
        }
    }

    /// The spec in it.
    pub fn spec(&mut self) -> Option<&mut JobPlan> {
        match self {
            Self::Submit { job, .. } | Self::SubmitOther { job, .. } | Self::SubmitForbidden { job, .. } => Some(job),
            Self::Again { .. }
            | Self::Cancel { .. }
            | Self::Scale { .. }
            | Self::Shelf { .. }
            | Self::Replay { .. } => None,
            Self::Drain { .. }
            | Self::Undrain { .. }
            | Self::Remove { .. }
            | Self::Job { .. }
            | Self::Explain { .. } => None,
            Self::Checkpoints { .. } | Self::Watch { .. } | Self::Logs { .. } => None,
            Self::Nodes | Self::Cluster | Self::Jobs | Self::Tokens | Self::Renew | Self::Spare | Self::Revoke => None,
        }
    }

    /// The machine that it is about.
    pub fn machine(&mut self) -> Option<&mut usize> {
        match self {
            Self::Drain { machine, .. } | Self::Undrain { machine } | Self::Remove { machine } => Some(machine),
            Self::Submit { .. } | Self::SubmitOther { .. } | Self::SubmitForbidden { .. } | Self::Again { .. } => None,
            Self::Cancel { .. } | Self::Scale { .. } | Self::Shelf { .. } | Self::Replay { .. } => None,
            Self::Job { .. } | Self::Explain { .. } | Self::Checkpoints { .. } => None,
            Self::Watch { .. }
            | Self::Logs { .. }
            | Self::Nodes
            | Self::Cluster
            | Self::Jobs
            | Self::Tokens
            | Self::Renew
            | Self::Spare
            | Self::Revoke => None,
        }
    }
}

impl Plan {
    pub fn timings(&self) -> Timings {
        let timings = match self.detection {
            Detection::Default => Timings::default(),
            Detection::Fast => Timings::fast(),
        };
        // Short, so that both are over in a run.
        let (yield_max_ms, spared_ms) = (20_000, 20_000);
        Timings { failover_grace_ms: self.failover_grace_ms, yield_max_ms, spared_ms, ..timings }
    }

    pub fn draw(seed: u64) -> Self {
        let mut random = Stream::new(seed, "plan");
        let chaos_ms = random.between("chaos", 40_000, 120_000);
        let nodes = random.between("nodes", 1, 5);
        let clients = 2 + random.between("clients", 1, 3) as usize;
        Self {
            chaos_ms,
            failover_grace_ms: *random.pick("grace", &[10_000, 15_000, 30_000]).unwrap_or(&10_000),
            detection: if random.chance("fast", 0.3) { Detection::Fast } else { Detection::Default },
            snapshot_every: random.between("snapshot-every", 30, 600),
            rates: Rates::draw(&mut Stream::new(seed, "rates")),
            machines: (0..nodes).map(|name| MachinePlan::draw(name, &mut random)).collect(),
            asks: asks(&mut Stream::new(seed, "asks"), clients, nodes, chaos_ms),
            faults: faults::draw(&mut Stream::new(seed, "faults"), nodes as usize, chaos_ms),
        }
    }
}

impl MachinePlan {
    fn draw(name: u64, random: &mut Stream) -> Self {
        Self {
            name,
            cpus: random.between("cpus", 2, 5) as u32,
            memory_gib: random.between("memory", 3, 8),
            gpus: random.between("gpus", 0, 2) as usize,
            zone: if random.chance("zone", 0.5) { "a" } else { "b" }.to_owned(),
            rate: random.drift("rate"),
        }
    }
}

fn asks(random: &mut Stream, clients: usize, nodes: u64, chaos_ms: Ms) -> Vec<TimedAsk> {
    let mut next: Vec<Ms> = (0..clients).map(|client| 50 + 10 * client as Ms).collect();
    let (mut asks, mut jobs) = (Vec::new(), Vec::new());
    // In half of the runs no job makes room for another: where many do, less is trained, and less can go wrong with it.
    let equals = random.chance("equals", 0.5);
    loop {
        let client = (0..clients).min_by_key(|client| next[*client]).unwrap_or(ROOT);
        let at = next[client];
        if at >= chaos_ms {
            return asks;
        }
        if let Some(mut ask) = ask(random, client, nodes, &mut jobs) {
            if let Ask::Submit { job, .. } = &mut ask
                && equals
            {
                job.priority = 0;
            }
            asks.push(TimedAsk { at, client, ask });
        }
        next[client] += random.between("apart", ASKS_APART_MS.0, ASKS_APART_MS.1);
    }
}

/// `jobs` are those that were asked for so far.
fn ask(random: &mut Stream, client: usize, nodes: u64, jobs: &mut Vec<(usize, u64)>) -> Option<Ask> {
    let (kind, key) = (random.between("kind", 0, 19), random.between("key", 1, KEYS));
    let known = random.pick("job", jobs).copied();
    let of = |make: fn(usize, u64) -> Ask| known.map(|(of, key)| make(of, key));
    Some(match (kind, client) {
        (0..=9, VIEWER) => Ask::SubmitForbidden { key, job: JobPlan::draw(random) },
        (0..=9, _) => match jobs.contains(&(client, key)) {
            true if kind < 3 => Ask::Again { key },
            true => Ask::SubmitOther { key, job: JobPlan::draw(random) },
            false if jobs.len() < JOBS_MAX => {
                jobs.push((client, key));
                Ask::Submit { key, job: JobPlan::draw(random) }
            }
            false => return None,
        },
        (10 | 11, 2..) => return of(|of, key| Ask::Cancel { of, key }),
        (17, 2..) => {
            let (of, key) = known?;
            Ask::Scale { of, key, ranks: random.between("ranks", 1, 4) as u32 }
        }
        (18, ADA | BOB) => {
            let (of, key) = known?;
            Ask::Shelf { of, key, pick: random.between("shelf", 0, 31) }
        }
        (18, ROOT | OPERATOR) => {
            let machine = random.between("machine", 0, nodes - 1) as usize;
            match random.between("drain", 0, 5) {
                4 | 5 => Ask::Remove { machine },
                0 => Ask::Drain { machine, deadline_ms: Some(random.between("deadline", 1, 20_000)) },
                1 => Ask::Drain { machine, deadline_ms: None },
                _ => Ask::Undrain { machine },
            }
        }
        (12, ROOT) => Ask::Replay { pick: random.between("token", 0, 7) },
        (19, ROOT) => match random.between("tokens", 0, 2) {
            0 => Ask::Spare,
            1 => Ask::Revoke,
            _ => Ask::Tokens,
        },
        (19, _) => match random.between("look", 0, 3) {
            0 => Ask::Renew,
            1 => return of(|of, key| Ask::Watch { of, key }),
            2 => return of(|of, key| Ask::Logs { of, key }),
            _ => return of(|of, key| Ask::Checkpoints { of, key }),
        },
        (13, _) => return of(|of, key| Ask::Explain { of, key }),
        (14, _) => Ask::Nodes,
        (15, _) => Ask::Cluster,
        (16, _) => Ask::Jobs,
        _ => return of(|of, key| Ask::Job { of, key }),
    })
}
