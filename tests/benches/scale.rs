//! What 10,000 nodes with 1,000 running jobs cost the real control machine, without network and disk: heartbeats, rounds, progress, losses, the journal and
//! memory.
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench scale

use std::collections::BTreeSet;
use std::time::Instant;

use stoke_coordinator::snapshot_bytes;
use stoke_coordinator::state::Input;
use stoke_protocol::message::node::Capacity;
use stoke_tests::fleet::{Fleet, Pace};
use stoke_tests::report::{Goal, Row};

const NODES: u64 = 10_000;
const JOBS: u64 = 1_000;
const RANKS: u64 = 8;
/// That are lost at once.
const LOST: usize = 100;

fn main() {
    let mut fleet = Fleet::new(Pace::default(), RANKS);
    let capacity = Capacity { cpus: 64, memory_bytes: 256 << 30, disk_bytes: 1 << 40, ..Capacity::default() };
    for _ in 0..NODES {
        fleet.join(capacity.clone());
    }
    let (records, bytes) = (fleet.records, fleet.record_bytes);
    println!("{NODES} nodes joined: {:.0} bytes of journal each", bytes as f64 / NODES as f64);
    let mut placed = Vec::new();
    for job in 0..JOBS {
        let spec = format!(
            "name = \"scale\"\ntrainer = \"domains\"\n[train]\nsteps = 1000000\nbatch = 256\n[resources]\nranks = {RANKS}\ncpus = 8\nmemory = \"32GiB\"\n"
        );
        let busy = fleet.busy;
        fleet.submit(job, spec).expect("a job");
        placed.push((fleet.busy - busy).as_secs_f64());
    }
    placed.sort_by(f64::total_cmp);
    fleet.run(5_000);
    let running = fleet.trainings.values().filter(|training| training.since.is_some()).count();
    assert_eq!(running as u64, JOBS, "every job trains");
    let each = |after: u64, before: u64| (after - before) as f64 / JOBS as f64;
    println!(
        "{JOBS} jobs of {RANKS} ranks, until they train: {:.0} records and {:.0} bytes of journal each",
        each(fleet.records, records),
        each(fleet.record_bytes, bytes)
    );
    let p99 = placed[placed.len() * 99 / 100];
    println!(
        "a submission, with the plan and all orders: median {:.3} ms, p99 {:.3} ms",
        1e3 * placed[placed.len() / 2],
        1e3 * p99
    );
    Row::new(format!("a job of {RANKS} ranks submitted and placed, {NODES} nodes, p99"), "s", &[p99])
        .goal(Goal::AtMost(0.05))
        .report();

    let records = fleet.records;
    let rounds = 20;
    let [beat, tick, progress] = [Fleet::heartbeats, tick, Fleet::progresses].map(|work: fn(&mut Fleet)| {
        let times: Vec<f64> = (0..rounds)
            .map(|_| {
                let begun = Instant::now();
                work(&mut fleet);
                begun.elapsed().as_secs_f64()
            })
            .collect();
        stoke_tests::report::Figure::of(&times).median
    });
    assert_eq!(fleet.records, records, "nothing of this is journalled");
    // Two heartbeats a second of each node, two reports of each job, and four rounds.
    let core = 2.0 * beat + 2.0 * progress + 4.0 * tick;
    println!(
        "a heartbeat {:.2} us, a report of progress {:.2} us, a round {:.2} ms",
        1e6 * beat / NODES as f64,
        1e6 * progress / JOBS as f64,
        1e3 * tick
    );
    println!("a second of this cluster: {:.1}% of a core, nothing in the journal", 100.0 * core);
    Row::new(format!("control of {NODES} nodes and {JOBS} jobs, of a core"), "share", &[core]).report();

    let (records, bytes) = (fleet.records, fleet.record_bytes);
    let ranks = fleet.ranks().len();
    let busy: BTreeSet<_> = fleet.ranks().into_iter().filter_map(|rank| fleet.place(rank)).collect();
    let lost: Vec<_> = busy.into_iter().take(LOST).collect();
    lost.iter().for_each(|node| fleet.kill_node(*node));
    let gone = ranks - fleet.ranks().len();
    fleet.slowest = Default::default();
    fleet.run(10_000);
    let whole = fleet.trainings.keys().filter(|job| fleet.members(**job) == RANKS as usize).count();
    println!(
        "{LOST} nodes with {gone} ranks lost at once: {whole} jobs whole again after 10 s, the longest input {:.1} ms, {} records, {} KiB",
        1e3 * fleet.slowest.as_secs_f64(),
        fleet.records - records,
        (fleet.record_bytes - bytes) >> 10
    );
    assert_eq!(whole as u64, JOBS, "every job is whole again");
    Row::new(format!("{LOST} of {NODES} nodes lost at once, the longest input"), "s", &[fleet.slowest.as_secs_f64()])
        .report();

    let begun = Instant::now();
    let snapshot = snapshot_bytes(fleet.control.cluster());
    println!("a snapshot: {:.1} MiB, {:.0} ms", snapshot.len() as f64 / 1048576.0, 1e3 * begun.elapsed().as_secs_f64());
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("unknown").trim();
    println!("memory of this process, simulated machines included: {memory}");
}

fn tick(fleet: &mut Fleet) {
    fleet.give(Input::Tick);
}
