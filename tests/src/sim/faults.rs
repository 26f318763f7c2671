//! What a seed draws: the size of the cluster, which faults may happen, how often, and when. Swarm testing: each seed has a random subset of
//! the faults, because a run with all of them hides what one of them alone would show. Owns the draw; the world makes them happen.

use super::random::Stream;
use super::world::Ms;

/// One seed's draw.
#[derive(Clone, Debug)]
pub struct Faults {
    pub nodes: usize,
    pub clients: usize,
    /// Until then faults happen and clients ask for new work.
    pub chaos_ms: Ms,
    pub failover_grace_ms: Ms,
    /// Journal entries between snapshots.
    pub snapshot_every: u64,
    pub schedule: Vec<(Ms, Fault)>,
    pub rates: Rates,
}

/// Probabilities of what may happen at any time; all zero in the calm.
#[derive(Clone, Copy, Debug, Default)]
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
    /// A rank's weights differ from its peers'.
    pub wrong_digest: f64,
    /// A generation cannot read the newest checkpoint and takes an older one.
    pub damaged_checkpoint: f64,
    /// The journal's disk takes `slow_ms` at most, not a few milliseconds.
    pub slow_disk: f64,
    pub slow_ms: Ms,
    /// A connection's first packets are late, and its agent does not wait for them.
    pub flap: f64,
    /// A client's question or its answer is lost.
    pub client_loss: f64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    CoordinatorCrash {
        down: Ms,
    },
    CoordinatorPause {
        lasts: Ms,
    },
    /// An old copy of the journal is started in the coordinator's place, for a while.
    OldCopy {
        lasts: Ms,
    },
    AgentCrash {
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
        signal: i32,
    },
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

impl Faults {
    pub fn draw(seed: u64) -> Self {
        let mut random = Stream::new(seed, "faults");
        let random = &mut random;
        let nodes = random.between(1, 5) as usize;
        let chaos_ms = random.between(40_000, 120_000);
        let mut schedule = Vec::new();
        for kind in 0..13 {
            if !random.chance(0.4) {
                continue;
            }
            let mut at = random.between(2_000, chaos_ms);
            while at < chaos_ms {
                schedule.push((at, fault(kind, nodes, random)));
                at += random.between(APART_MS.0, APART_MS.1);
            }
        }
        Self {
            nodes,
            clients: random.between(2, 4) as usize,
            chaos_ms,
            failover_grace_ms: *random.pick(&[10_000, 15_000, 30_000]).unwrap_or(&10_000),
            snapshot_every: random.between(30, 600),
            schedule,
            rates: rates(random),
        }
    }
}

fn fault(kind: u64, nodes: usize, random: &mut Stream) -> Fault {
    let node = random.next() as usize % nodes;
    // Half are over before a lease is, half outlast lease and grace.
    let lasts = if random.chance(0.5) { random.between(200, 4_000) } else { random.between(4_000, 25_000) };
    let down = random.between(100, 12_000);
    match kind {
        0 => Fault::CoordinatorCrash { down },
        1 => Fault::CoordinatorPause { lasts: lasts.min(12_000) },
        2 => Fault::OldCopy { lasts: random.between(2_000, 9_000) },
        3 => Fault::AgentCrash { node, down },
        4 => Fault::AgentStop { node, down },
        5 => Fault::NodePause { node, lasts },
        6 => Fault::CutUp { node, lasts },
        7 => Fault::CutDown { node, lasts },
        8 => Fault::CutBoth { node, lasts },
        9 => Fault::SessionBreak { node },
        10 => Fault::RankKill { signal: if random.chance(0.5) { 9 } else { 11 } },
        11 => Fault::DiskLimit { bytes: random.between(1_000, 150_000), lasts },
        _ => Fault::WallJump { ms: random.between(0, 20_000_000) as i64 - 10_000_000 },
    }
}

fn rates(random: &mut Stream) -> Rates {
    let mut some = |most: f64| if random.chance(0.45) { random.unit() * most } else { 0.0 };
    let rates = Rates {
        loss: some(0.3),
        tail: some(0.1),
        tail_ms: 0,
        duplicate: some(0.2),
        rank_dies: some(0.3),
        spawn_fails: some(0.2),
        deaf: some(0.3),
        wrong_digest: some(0.1),
        damaged_checkpoint: some(0.8),
        slow_disk: some(0.2),
        slow_ms: 0,
        flap: some(0.7),
        client_loss: some(0.3),
        peers_part: some(0.05),
    };
    Rates { tail_ms: random.between(200, 6_000), slow_ms: random.between(50, 4_000), ..rates }
}
