//! What can be done to a run: faults that are planned at a time, and rates of mishaps that may happen at any time. Swarm testing: each seed has a
//! random subset of both, because a run with all of them hides what one of them alone would show. Owns how they are drawn; the world makes
//! them happen.

use serde::{Deserialize, Serialize};

use super::plan::TimedFault;
use super::random::Stream;
use super::world::Ms;

/// Probabilities of what may happen at any time; all zero in the calm.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Rates {
    /// A packet is lost: its frame comes a retransmission later; a datagram not at all.
    pub loss: f64,
    /// A packet takes `tail_ms` at most, not a few milliseconds.
    pub tail: f64,
    pub tail_ms: Ms,
    pub duplicate: f64,
    /// A rank's process ends by itself before its time.
    pub rank_dies: f64,
    pub spawn_fails: f64,
    /// A rank does not stop when it is told to.
    pub deaf: f64,
    /// Two members of a generation lose each other in a step.
    pub peers_part: f64,
    /// A shard or a manifest cannot be written (F19).
    pub store_fails: f64,
    /// A rank's process takes several times as long for a step (F34).
    pub slow_rank: f64,
    /// A rank's weights differ from its peers'.
    pub wrong_digest: f64,
    /// A generation finds the checkpoint damaged that it was to begin with (F23).
    pub damaged_checkpoint: f64,
    /// A generation begins with an older checkpoint than it was told.
    pub older_checkpoint: f64,
    /// The journal's disk takes `slow_ms` at most, not a few milliseconds.
    pub slow_disk: f64,
    pub slow_ms: Ms,
    /// A connection's first packets are late, and its agent does not wait for them.
    pub flap: f64,
    /// A client's question or its answer is lost.
    pub client_loss: f64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "fault", rename_all = "kebab-case")]
pub enum Fault {
    CoordinatorCrash {
        down: Ms,
    },
    CoordinatorPause {
        lasts: Ms,
    },
    /// An old copy of the journal is started in the coordinator's place, for a while; it ends somewhere before what all nodes have seen.
    OldCopy {
        depth: u64,
        lasts: Ms,
    },
    /// The agent dies; its ranks live.
    AgentCrash {
        node: usize,
        down: Ms,
    },
    /// The agent dies, its ranks with it.
    NodeCrash {
        node: usize,
        down: Ms,
    },
    /// The agent is asked to end and ends.
    AgentStop {
        node: usize,
        down: Ms,
    },
    /// The machine stops for a while, its ranks with it.
    NodePause {
        node: usize,
        lasts: Ms,
    },
    /// The agent dies and is back at once; not drawn by itself but by a connection.
    Flap {
        node: usize,
    },
    /// Nothing comes from the node to the coordinator.
    CutUp {
        node: usize,
        lasts: Ms,
    },
    /// Nothing comes from the coordinator to the node.
    CutDown {
        node: usize,
        lasts: Ms,
    },
    CutBoth {
        node: usize,
        lasts: Ms,
    },
    SessionBreak {
        node: usize,
    },
    /// One process, killed from outside.
    RankKill {
        pick: u64,
        signal: i32,
    },
    /// Every process of one job (F2).
    JobKill {
        pick: u64,
    },
    /// One process is stopped for a while (F4, F10): its agent kills it when it has said nothing for long.
    RankPause {
        pick: u64,
        lasts: Ms,
    },
    /// A node speaks of a rank of another one (F31), and ends.
    Lie {
        node: usize,
        pick: u64,
    },
    /// The next sync of the journal fails, once (F20).
    SyncFails,
    /// The journal's disk has only so much room, for a while.
    DiskLimit {
        bytes: u64,
        lasts: Ms,
    },
    WallJump {
        ms: i64,
    },
}

/// Simulated time that faults of one kind are apart, at most and at least.
const APART_MS: (Ms, Ms) = (3_000, 25_000);
const KINDS: u64 = 18;
/// Of the coordinator's crashes, so many leave it away for long (F8).
const AWAY: f64 = 0.1;

pub fn draw(random: &mut Stream, nodes: usize, chaos_ms: Ms) -> Vec<TimedFault> {
    let mut schedule = Vec::new();
    for kind in 0..KINDS {
        if !random.chance("armed", 0.4) {
            continue;
        }
        let mut at = random.between("first", 2_000, chaos_ms);
        while at < chaos_ms {
            schedule.push(TimedFault { at, fault: fault(kind, nodes, random) });
            at += random.between("apart", APART_MS.0, APART_MS.1);
        }
    }
    schedule.sort_by_key(|fault| fault.at);
    schedule
}

fn fault(kind: u64, nodes: usize, random: &mut Stream) -> Fault {
    let node = random.between("node", 0, nodes as u64 - 1) as usize;
    // Half are over before a lease is, half outlast lease and grace.
    let short = random.chance("short", 0.5);
    let lasts = if short { random.between("lasts", 200, 4_000) } else { random.between("lasts", 4_000, 25_000) };
    let down = random.between("down", 100, 12_000);
    match kind {
        0 => {
            let away = random.chance("away", AWAY);
            Fault::CoordinatorCrash { down: if away { random.between("away-for", 20_000, 90_000) } else { down } }
        }
        1 => Fault::CoordinatorPause { lasts: lasts.min(12_000) },
        2 => Fault::OldCopy { depth: random.between("depth", 0, 1_000_000), lasts: lasts.clamp(2_000, 9_000) },
        3 => Fault::AgentCrash { node, down },
        4 => Fault::AgentStop { node, down },
        5 => Fault::NodePause { node, lasts },
        6 => Fault::CutUp { node, lasts },
        7 => Fault::CutDown { node, lasts },
        8 => Fault::CutBoth { node, lasts },
        9 => Fault::SessionBreak { node },
        10 => {
            let signal = if random.chance("signal", 0.5) { 9 } else { 11 };
            Fault::RankKill { pick: random.between("victim", 0, 1_000), signal }
        }
        11 => Fault::DiskLimit { bytes: random.between("bytes", 1_000, 150_000), lasts },
        12 => Fault::JobKill { pick: random.between("victim", 0, 1_000) },
        13 => Fault::RankPause { pick: random.between("victim", 0, 1_000), lasts },
        14 => Fault::Lie { node, pick: random.between("victim", 0, 1_000) },
        15 => Fault::SyncFails,
        16 => Fault::NodeCrash { node, down },
        _ => Fault::WallJump { ms: random.between("jump", 0, 20_000_000) as i64 - 10_000_000 },
    }
}

impl Fault {
    /// Its name, without what it was drawn with.
    pub fn kind(&self) -> String {
        format!("{self:?}").chars().take_while(char::is_ascii_alphanumeric).collect()
    }

    /// The machine that it happens to.
    pub fn node(&mut self) -> Option<&mut usize> {
        match self {
            Self::AgentCrash { node, .. }
            | Self::NodeCrash { node, .. }
            | Self::AgentStop { node, .. }
            | Self::NodePause { node, .. }
            | Self::Flap { node }
            | Self::CutUp { node, .. }
            | Self::CutDown { node, .. }
            | Self::CutBoth { node, .. }
            | Self::Lie { node, .. }
            | Self::SessionBreak { node } => Some(node),
            Self::CoordinatorCrash { .. }
            | Self::CoordinatorPause { .. }
            | Self::OldCopy { .. }
            | Self::RankKill { .. }
            | Self::RankPause { .. }
            | Self::JobKill { .. }
            | Self::SyncFails
            | Self::DiskLimit { .. }
            | Self::WallJump { .. } => None,
        }
    }

    /// How long it lasts.
    pub fn lasts(&mut self) -> Option<&mut Ms> {
        match self {
            Self::CoordinatorCrash { down: lasts }
            | Self::CoordinatorPause { lasts }
            | Self::OldCopy { lasts, .. }
            | Self::AgentCrash { down: lasts, .. }
            | Self::NodeCrash { down: lasts, .. }
            | Self::AgentStop { down: lasts, .. }
            | Self::NodePause { lasts, .. }
            | Self::CutUp { lasts, .. }
            | Self::CutDown { lasts, .. }
            | Self::CutBoth { lasts, .. }
            | Self::RankPause { lasts, .. }
            | Self::DiskLimit { lasts, .. } => Some(lasts),
            Self::Flap { .. } | Self::SessionBreak { .. } | Self::RankKill { .. } | Self::WallJump { .. } => None,
            Self::JobKill { .. } | Self::Lie { .. } | Self::SyncFails => None,
        }
    }
}

impl Rates {
    pub fn draw(random: &mut Stream) -> Self {
        let mut some = |site, most: f64| if random.chance("armed", 0.45) { random.unit(site) * most } else { 0.0 };
        let rates = Self {
            loss: some("loss", 0.3),
            tail: some("tail", 0.1),
            tail_ms: 0,
            duplicate: some("duplicate", 0.2),
            rank_dies: some("rank-dies", 0.3),
            spawn_fails: some("spawn-fails", 0.2),
            deaf: some("deaf", 0.3),
            store_fails: some("store-fails", 0.2),
            slow_rank: some("slow-rank", 0.2),
            wrong_digest: some("wrong-digest", 0.1),
            damaged_checkpoint: some("damaged-checkpoint", 0.8),
            older_checkpoint: some("older-checkpoint", 0.8),
            slow_disk: some("slow-disk", 0.2),
            slow_ms: 0,
            flap: some("flap", 0.7),
            client_loss: some("client-loss", 0.3),
            peers_part: some("peers-part", 0.05),
        };
        let (tail_ms, slow_ms) = (random.between("tail-ms", 200, 6_000), random.between("slow-ms", 50, 10_000));
        Self { tail_ms, slow_ms, ..rates }
    }

    /// Each rate, to be taken away one by one.
    pub fn all(&mut self) -> [&mut f64; 15] {
        [
            &mut self.loss,
            &mut self.tail,
            &mut self.duplicate,
            &mut self.rank_dies,
            &mut self.spawn_fails,
            &mut self.deaf,
            &mut self.store_fails,
            &mut self.slow_rank,
            &mut self.wrong_digest,
            &mut self.damaged_checkpoint,
            &mut self.older_checkpoint,
            &mut self.slow_disk,
            &mut self.flap,
            &mut self.client_loss,
            &mut self.peers_part,
        ]
    }
}
