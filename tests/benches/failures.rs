//! 54 days of 16,384 ranks under the failures of Llama 3's pre-training, replayed in simulated time against the real control machine: 64 jobs of 256 ranks
//! on 2,048 nodes of 8 GPUs and 32 that wait. Every decision (losses, new generations, placement, quarantine) is the control machine's own; what is not its
//! own takes the times below. Prints how much of the time the jobs trained.
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench failures
//!
//! The mix is table 5 of "The Llama 3 Herd of Models" (2024): 419 unexpected interruptions in 54 days, each of which stopped that job as a whole; its authors
//! report more than 90% of effective time.

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use stoke_protocol::ids::{JobId, NodeId};
use stoke_protocol::message::node::{Capacity, Gpu};
use stoke_protocol::message::rank::RankId;
use stoke_tests::fleet::{Fleet, Pace};
use stoke_tests::report::{Goal, Row};

const NODES: u64 = 2_048;
const SPARE: u64 = 32;
const GPUS: u64 = 8;
const JOBS: u64 = 64;
const RANKS: u64 = 256;
const LANES: u64 = 1_024;
const DAY_MS: u64 = 86_400_000;
const DAYS: u64 = 54;
/// A step, the start of a process on a GPU, the meeting of a generation, and the copy of the state to one that joins.
const PACE: Pace = Pace { boot_ms: 30_000, form_ms: 1_000, join_ms: 20_000, step_ms: 5_000 };
/// A step that takes ten times as long as the longest hangs (`node/src/worker/beat.rs`).
const HANGS_MS: u64 = 10 * PACE.step_ms;
/// Until a machine that was lost is back.
const REPAIR_MS: u64 = 4 * 3_600_000;
/// Until a job must be whole again.
const WHOLE_MS: u64 = 600_000;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Fault {
    /// The process of a rank dies.
    Rank,
    /// And two times more on the same machine, when it was started again.
    FaultyGpu,
    /// The machine falls silent.
    Node,
    /// A rank stands still.
    Hang,
    /// A rank computes wrong numbers.
    Corrupt,
}

/// Component, interruptions, and what a cluster sees of it.
const MIX: [(&str, u32, Fault); 18] = [
    ("faulty GPU", 148, Fault::FaultyGpu),
    ("GPU HBM3 memory", 72, Fault::Rank),
    ("software bug", 54, Fault::Rank),
    ("network switch or cable", 35, Fault::Node),
    ("unplanned host maintenance", 32, Fault::Node),
    ("GPU SRAM memory", 19, Fault::Rank),
    ("GPU system processor", 17, Fault::Rank),
    ("NIC", 7, Fault::Node),
    ("NCCL watchdog timeouts", 7, Fault::Hang),
    ("silent data corruption", 6, Fault::Corrupt),
    ("GPU thermal interface and sensor", 6, Fault::Rank),
    ("SSD", 3, Fault::Node),
    ("power supply", 3, Fault::Node),
    ("server chassis", 2, Fault::Node),
    ("IO expansion board", 2, Fault::Node),
    ("dependency", 2, Fault::Rank),
    ("CPU", 2, Fault::Node),
    ("system memory", 2, Fault::Node),
];

fn main() {
    let seed = std::env::var("STOKE_BENCH_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut fleet = cluster();
    let began_ms = fleet.now_ms;
    let end_ms = began_ms + DAYS * DAY_MS;
    fleet.trainings.values_mut().for_each(|training| training.lost_ms = 0);
    let mut faults: Vec<(u64, Fault)> = MIX
        .iter()
        .flat_map(|(_, count, fault)| (0..*count).map(|_| *fault))
        .map(|fault| (began_ms + random.random_range(0..DAYS * DAY_MS - WHOLE_MS), fault))
        .collect();
    faults.sort_by_key(|(at, _)| *at);
    let mut repairs: Vec<(u64, NodeId)> = Vec::new();
    let mut pauses: Vec<(Fault, f64)> = Vec::new();
    for (at, fault) in &faults {
        while let Some((back, node)) = repairs.first().copied().filter(|(back, _)| back < at) {
            fleet.skip(back.saturating_sub(fleet.now_ms));
            fleet.connect(node);
            fleet.run(5_000);
            repairs.remove(0);
        }
        fleet.skip(at.saturating_sub(fleet.now_ms));
        let before = lost_ms(&fleet);
        let victim = *fleet.ranks().choose(&mut random).expect("ranks");
        repairs.extend(befall(&mut fleet, *fault, victim).map(|node| (fleet.now_ms + REPAIR_MS, node)));
        until_whole(&mut fleet, victim.job);
        pauses.push((*fault, (lost_ms(&fleet) - before) as f64 / 1e3));
    }
    fleet.skip(end_ms - fleet.now_ms);
    told(&fleet, &pauses);
}

/// All jobs train at full strength.
fn cluster() -> Fleet {
    let mut fleet = Fleet::new(PACE, LANES);
    let gpu = || Gpu { name: "H100".into(), memory_bytes: 80 << 30 };
    let capacity = Capacity {
        cpus: 128,
        memory_bytes: 2 << 40,
        disk_bytes: 1 << 42,
        gpus: (0..GPUS).map(|_| gpu()).collect(),
        ..Capacity::default()
    };
    for _ in 0..NODES + SPARE {
        fleet.join(capacity.clone());
    }
    for job in 0..JOBS {
        let spec = format!(
            "name = \"replay\"\ntrainer = \"domains\"\n[train]\nsteps = 1000000000\nbatch = {LANES}\nlanes = {LANES}\n[resources]\nranks = {RANKS}\ngpus = 1\ncpus = 8\nmemory = \"64GiB\"\n"
        );
        fleet.submit(job, spec).expect("a job");
    }
    fleet.run(PACE.boot_ms + 10_000);
    let whole = fleet.trainings.iter().filter(|(job, found)| found.since.is_some() && is_whole(&fleet, **job)).count();
    assert_eq!(whole as u64, JOBS, "every job trains");
    fleet
}

fn is_whole(fleet: &Fleet, job: JobId) -> bool {
    fleet.members(job) as u64 == RANKS && fleet.trainings[&job].since.is_some()
}

/// The machine that is lost, where one is.
fn befall(fleet: &mut Fleet, fault: Fault, victim: RankId) -> Option<NodeId> {
    match fault {
        Fault::Rank => fleet.kill_rank(victim),
        Fault::FaultyGpu => {
            let node = fleet.place(victim);
            fleet.kill_rank(victim);
            for _ in 0..2 {
                until_whole(fleet, victim.job);
                let again = fleet.ranks().into_iter().rfind(|id| id.job == victim.job && fleet.place(*id) == node);
                again.into_iter().for_each(|id| fleet.kill_rank(id));
            }
        }
        Fault::Node => {
            let node = fleet.place(victim);
            node.into_iter().for_each(|node| fleet.kill_node(node));
            return node;
        }
        Fault::Hang => {
            fleet.stand_still(victim.job);
            fleet.run(HANGS_MS);
            fleet.kill_rank(victim);
        }
        Fault::Corrupt => fleet.corrupt(victim),
    }
    None
}

fn until_whole(fleet: &mut Fleet, job: JobId) {
    let until = fleet.now_ms + WHOLE_MS;
    fleet.run(1_000);
    while !(fleet.is_calm() && is_whole(fleet, job)) {
        assert!(fleet.now_ms < until, "{job} is not whole again: {} ranks", fleet.members(job));
        fleet.run(1_000);
    }
}

fn lost_ms(fleet: &Fleet) -> u64 {
    fleet.trainings.values().map(|training| training.lost_ms).sum()
}

fn told(fleet: &Fleet, pauses: &[(Fault, f64)]) {
    println!(
        "{:<11} {:>6} {:>12} {:>12}   seconds of one job that are lost to each",
        "fault", "count", "median", "most"
    );
    for fault in [Fault::Rank, Fault::FaultyGpu, Fault::Node, Fault::Hang, Fault::Corrupt] {
        let mut lost: Vec<f64> = pauses.iter().filter(|(other, _)| *other == fault).map(|(_, lost)| *lost).collect();
        lost.sort_by(f64::total_cmp);
        println!(
            "{:<11} {:>6} {:>12.1} {:>12.1}",
            format!("{fault:?}"),
            lost.len(),
            lost[lost.len() / 2],
            lost[lost.len() - 1]
        );
    }
    let all = (DAYS * DAY_MS) as f64;
    let shares: Vec<f64> = fleet.trainings.values().map(|training| 1.0 - training.lost_ms as f64 / all).collect();
    let mean = shares.iter().sum::<f64>() / shares.len() as f64;
    let least = shares.iter().copied().fold(1.0, f64::min);
    // As if each loss had held all ranks, as it held that job.
    let as_one = 1.0 - lost_ms(fleet) as f64 / all;
    println!("time in which the jobs trained: {:.4}%, of the worst one {:.4}%", 100.0 * mean, 100.0 * least);
    println!("if every failure had held all {} ranks: {:.3}% (goal 98%)", JOBS * RANKS, 100.0 * as_one);
    println!(
        "{} inputs of the control machine in {:.0} s, {} records and {} KiB of journal",
        fleet.calls,
        fleet.busy.as_secs_f64(),
        fleet.records,
        fleet.record_bytes >> 10
    );
    let what =
        format!("{DAYS} days of {} ranks, {} failures, each holding all: time that trains", JOBS * RANKS, pauses.len());
    Row::new(what, "share", &[as_one]).goal(Goal::AtLeast(0.98)).report();
}
