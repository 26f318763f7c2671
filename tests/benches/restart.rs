//! What a start of the coordinator costs after `kill -9`, through the `stoke` binary, on a journal of a million entries: from the start of the
//! process to the line that says that it listens. The journal is made by the control machine itself and has as many ended jobs as a
//! coordinator keeps, a snapshot every 4,096 entries as by default, and just short of another 4,096 entries after the newest.
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench restart

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use stoke_coordinator::journal::{Log, RedbLog};
use stoke_coordinator::state::{Cluster, Control, Input, Mono, Now, Options, Ticket, Time};
use stoke_coordinator::{record_bytes, snapshot_bytes};
use stoke_protocol::identity::{Authority, Subject, UserRole};
use stoke_protocol::ids::{Digest, JobId};
use stoke_protocol::message::client::Request;
use stoke_tests::report::Row;

/// STOKE_BENCH_ENTRIES replaces it.
const ENTRIES: u64 = 1_000_000;
/// The coordinator's default.
const SNAPSHOT_ENTRIES: u64 = 4_096;
/// Left of the way to the next snapshot: the restarts' own entries.
const SPARE: u64 = 256;
const STARTS: usize = 20;

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_owned();
    let stoke = stoke_tests::binary::build(&root);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let dir = folder.path().join("coordinator");
    std::fs::create_dir(&dir).expect("a folder");
    let started = Instant::now();
    let (entries, tail) = Maker::new(&dir).fill();
    let bytes = std::fs::metadata(dir.join("journal.redb")).expect("the journal").len();
    let took_s = started.elapsed().as_secs_f64();
    println!("made in {took_s:.0} s: {entries} entries, {tail} after the snapshot, {} MiB on disk", bytes >> 20);
    let mut times_ms: Vec<f64> = (0..STARTS).map(|_| start(&stoke, &dir)).collect();
    times_ms.sort_by(f64::total_cmp);
    Row::new(format!("start of the coordinator after kill -9, {entries} entries"), "ms", &times_ms).report();
    let at = |part: f64| times_ms[((STARTS - 1) as f64 * part).round() as usize];
    println!("{STARTS} starts after kill -9     median {:.0} ms    p99 {:.0} ms", at(0.5), at(0.99));
}

/// Milliseconds from the start of the process until it listens; then it is killed.
fn start(stoke: &Path, dir: &Path) -> f64 {
    let mut command = Command::new(stoke);
    command.args(["coordinator", "--listen", "127.0.0.1:0", "--dir"]).arg(dir);
    let started = Instant::now();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("the coordinator starts");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("read");
    let took_ms = started.elapsed().as_secs_f64() * 1e3;
    child.kill().expect("killed");
    child.wait().expect("it ends");
    assert!(line.contains("listens"), "the coordinator does not start");
    took_ms
}

struct Maker {
    control: Control,
    log: RedbLog,
    pending: Vec<Vec<u8>>,
    snapshot_at: u64,
    ticket: u64,
}

impl Maker {
    fn new(dir: &Path) -> Self {
        let log = RedbLog::open(dir).expect("a journal");
        let authority = Authority::create(&dir.join("ca")).expect("an authority");
        let control = Control::new(Cluster::default(), Options::default(), now(0));
        let mut maker = Self { control, log, pending: Vec::new(), snapshot_at: 0, ticket: 0 };
        maker.step(Input::Found { cluster: authority.cluster(), admin: "admin".into() });
        maker
    }

    /// Entries, and how many of them no snapshot covers.
    fn fill(mut self) -> (u64, u64) {
        let all = std::env::var("STOKE_BENCH_ENTRIES").map_or(ENTRIES, |count| count.parse().expect("a number"));
        let full = |index: u64, snapshot_at: u64| index >= all && index - snapshot_at >= SNAPSHOT_ENTRIES - SPARE;
        let mut job = 0;
        while !full(self.index(), self.snapshot_at) {
            job += 1;
            let spec = format!(
                "name = \"bench\"\ntrainer = \"domains\"\n[train]\nsteps = 10\nbatch = 256\n[resources]\nranks = 8\ncpus = {}\nmemory = \"4GiB\"\n",
                1 + job % 4
            );
            self.ask(Request::Submit { key: format!("k{job}"), spec });
            self.ask(Request::Cancel { job: JobId(job) });
        }
        self.log.append(&self.pending).expect("appended");
        (self.index(), self.index() - self.snapshot_at)
    }

    fn index(&self) -> u64 {
        self.control.cluster().index().0
    }

    fn ask(&mut self, request: Request) {
        self.ticket += 1;
        let caller = Subject::User { name: "admin".into(), role: UserRole::Admin };
        self.step(Input::Request { ticket: Ticket(self.ticket), caller, request, secret_hash: Digest([7; 32]) });
    }

    /// As the cluster actor does: records, then a snapshot when one is due.
    fn step(&mut self, input: Input) {
        let step = self.control.step(now(self.ticket), input);
        self.pending.extend(step.records.iter().map(record_bytes));
        if self.index() - self.snapshot_at >= SNAPSHOT_ENTRIES {
            self.snapshot_at = self.index();
            self.log.append(&std::mem::take(&mut self.pending)).expect("appended");
            let payload = snapshot_bytes(self.control.cluster());
            self.log.snapshot(self.control.cluster().index(), &payload).expect("snapshot");
        }
    }
}

/// A submission a millisecond.
fn now(ms: u64) -> Now {
    Now { wall: Time(ms), mono: Mono(ms) }
}
