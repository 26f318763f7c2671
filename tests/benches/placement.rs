//! Placements a second of the real control machine, at 1,000 and 10,000 simulated nodes: one decision is the whole way of a submission
//! (authorise, parse the spec, journal record, plan, generation, orders to agents), without network and disk.
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench placement

use stoke_protocol::message::node::Capacity;
use stoke_tests::fleet::{Fleet, Pace};
use stoke_tests::report::{Goal, Row};

const JOBS: u64 = 1_000;
const RANKS: u32 = 8;

fn main() {
    println!(
        "{:>8} {:>6} {:>6} {:>14} {:>14} {:>12} {:>12}",
        "nodes", "jobs", "ranks", "gangs/s", "ranks/s", "median us", "p99 us"
    );
    for nodes in [1_000, 10_000] {
        let mut fleet = Fleet::new(Pace::default(), RANKS.into());
        let capacity = Capacity { cpus: 64, memory_bytes: 256 << 30, disk_bytes: 1 << 40, ..Capacity::default() };
        for _ in 0..nodes {
            fleet.join(capacity.clone());
        }
        let mut times: Vec<f64> = (0..JOBS).map(|job| submit(&mut fleet, job)).collect();
        let total: f64 = times.iter().sum();
        assert_eq!(fleet.control.cluster().placements(), JOBS, "every gang was placed");
        times.sort_by(f64::total_cmp);
        let p99 = times[times.len() * 99 / 100];
        let what = format!("a gang of {RANKS} placed among {nodes} nodes, p99");
        Row::new(what, "s", &[p99]).goal(Goal::AtMost(0.05)).report();
        let rate = JOBS as f64 / total;
        println!(
            "{nodes:>8} {JOBS:>6} {RANKS:>6} {rate:>14.0} {:>14.0} {:>12.1} {:>12.1}",
            rate * f64::from(RANKS),
            times[times.len() / 2] * 1e6,
            p99 * 1e6
        );
    }
}

/// Seconds for one submission, records encoded for the journal.
fn submit(fleet: &mut Fleet, job: u64) -> f64 {
    let spec = format!(
        "name = \"bench\"\ntrainer = \"domains\"\n[train]\nsteps = 10\nbatch = 256\n[resources]\nranks = {RANKS}\ncpus = {}\nmemory = \"4GiB\"\n",
        1 + job % 4
    );
    let busy = fleet.busy;
    fleet.submit(job, spec).expect("a job");
    (fleet.busy - busy).as_secs_f64()
}
