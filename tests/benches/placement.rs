//! Placements a second of the real control machine, at 1,000 and 10,000 simulated nodes: one decision is the whole way of a submission
//! (authorise, parse the spec, journal record, plan, generation, orders to agents), without network and disk.
//!
//!     cargo bench -p stoke-tests --bench placement

use std::time::Instant;

use stoke_coordinator::state::{Cluster, Control, Effect, Input, Mono, Now, Options, SessionId, Step, Ticket, Time};
use stoke_protocol::codec;
use stoke_protocol::identity::{Subject, UserRole};
use stoke_protocol::ids::{ClusterId, Digest, Epoch, Incarnation, LogIndex, NodeId};
use stoke_protocol::message::client::{Request, TokenScope};
use stoke_protocol::message::join::Wants;
use stoke_protocol::message::node::{Capacity, NodeHello};

const CLUSTER: ClusterId = ClusterId([1; 16]);
const JOBS: u64 = 1_000;
const RANKS: u32 = 8;

fn main() {
    println!(
        "{:>8} {:>6} {:>6} {:>14} {:>14} {:>12} {:>12}",
        "nodes", "jobs", "ranks", "gangs/s", "ranks/s", "median us", "p99 us"
    );
    for nodes in [1_000, 10_000] {
        let mut bench = Bench::with_nodes(nodes);
        let mut times: Vec<f64> = (0..JOBS).map(|job| bench.submit(job)).collect();
        let total: f64 = times.iter().sum();
        assert_eq!(bench.control.cluster().placements(), JOBS, "every gang was placed");
        times.sort_by(f64::total_cmp);
        let rate = JOBS as f64 / total;
        println!(
            "{nodes:>8} {JOBS:>6} {RANKS:>6} {rate:>14.0} {:>14.0} {:>12.1} {:>12.1}",
            rate * f64::from(RANKS),
            times[times.len() / 2] * 1e6,
            times[times.len() * 99 / 100] * 1e6
        );
    }
}

struct Bench {
    control: Control,
    ticket: u64,
}

impl Bench {
    fn with_nodes(nodes: u64) -> Self {
        let now = Now { wall: Time(1), mono: Mono(1) };
        let mut bench = Self { control: Control::new(Cluster::default(), Options::default(), now), ticket: 0 };
        bench.step(Input::Found { cluster: CLUSTER, admin: "admin".into() });
        bench.step(Input::Start { version: "bench".into() });
        for number in 1..=nodes {
            bench.join(number);
        }
        bench
    }

    fn step(&mut self, input: Input) -> Step {
        self.control.step(Now { wall: Time(2), mono: Mono(2) }, input)
    }

    fn ask(&mut self, request: Request) -> Step {
        self.ticket += 1;
        let caller = Subject::User { name: "admin".into(), role: UserRole::Admin };
        self.step(Input::Request { ticket: Ticket(self.ticket), caller, request, secret_hash: Digest([7; 32]) })
    }

    fn join(&mut self, number: u64) {
        let made = self.ask(Request::TokenCreate { scope: TokenScope::Node, ttl_seconds: 3_600 });
        let token = made.effects.iter().find_map(|effect| match effect {
            Effect::TokenMade { token, .. } => Some(*token),
            _ => None,
        });
        let wants = Wants::Node { name: format!("n{number}") };
        let token = token.expect("an admin makes tokens");
        self.ticket += 1;
        self.step(Input::Join { ticket: Ticket(self.ticket), token, secret_hash: Digest([7; 32]), wants });
        let capacity = Capacity { cpus: 64, memory_bytes: 256 << 30, disk_bytes: 1 << 40, ..Capacity::default() };
        let hello = NodeHello {
            cluster: CLUSTER,
            node: NodeId(number),
            name: format!("n{number}"),
            incarnation: Incarnation(1),
            session: 1,
            epoch_seen: Epoch(0),
            index_seen: LogIndex(0),
            capacity,
            gateway: None,
            ranks: Vec::new().into(),
        };
        self.step(Input::Hello {
            session: SessionId(number),
            node: NodeId(number),
            address: "10.0.0.1:1".into(),
            hello,
        });
    }

    /// Seconds for one submission, records encoded for the journal.
    fn submit(&mut self, job: u64) -> f64 {
        let spec = format!(
            "name = \"bench\"\ntrainer = \"domains\"\n[train]\nsteps = 10\nbatch = 256\n[resources]\nranks = {RANKS}\ncpus = {}\nmemory = \"4GiB\"\n",
            1 + job % 4
        );
        let started = Instant::now();
        let step = self.ask(Request::Submit { key: format!("k{job}"), spec });
        for record in &step.records {
            codec::encode_record(record).expect("records encode");
        }
        started.elapsed().as_secs_f64()
    }
}
