//! What a checkpoint costs. On disk: writing, and restoring with every byte verified, against copying and hashing the same bytes. In a job
//! through the `stoke` binary: for how long training is held, against a plain copy of the same bytes in memory, and samples a second with
//! and without checkpoints.
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench checkpoint
//!
//! The disk is that of the temporary folder (TMPDIR). Files were just written and lie in memory when they are read, for both alike. The jobs
//! run one after the other: on a machine that others use, the difference of their rates is theirs too.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::Value;
use stoke_jobs::NamedTensor;
use stoke_node::checkpoint::{self, FORMAT, Folder, Manifest};
use stoke_protocol::ids::{ClusterId, Digest, Generation, JobId, Step};
use stoke_tests::report::{Goal, Row};

const STATE_BYTES: usize = 512 << 20;
const TENSORS: usize = 64;
const ROUNDS: usize = 3;
/// Of the job that is held: about 30 s on two cores.
const STEPS: u64 = 1000;
const EVERY: u64 = 10;

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_owned();
    disk();
    job(&root, &stoke_tests::binary::build(&root));
}

fn disk() {
    let values = STATE_BYTES / TENSORS / size_of::<f32>();
    let tensor = |i: usize| NamedTensor {
        name: format!("model.{i}"),
        shape: vec![values],
        values: (0..values).map(|v| ((v * 31 + i) as f32).sin()).collect(),
    };
    let tensors: Vec<NamedTensor> = (0..TENSORS).map(tensor).collect();
    let (mut writes, mut copies, mut restores, mut reads) = (vec![], vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folder = Folder::at(dir.path().join("c").to_str().expect("UTF-8")).expect("a path");
        writes.push(seconds(|| write(&folder, &tensors)));
        let shard = dir.path().join("c/shard-0-of-1.safetensors");
        let copy = dir.path().join("copy");
        copies.push(seconds(|| {
            fs::copy(&shard, &copy).expect("copy the shard");
            File::open(&copy).expect("open the copy").sync_all().expect("sync the copy");
        }));
        restores.push(seconds(|| assert_eq!(checkpoint::load(folder.uri(), None).expect("whole").1.len(), TENSORS)));
        reads.push(seconds(|| read_and_hash(&copy)));
    }
    println!("{} MiB of state           GB/s   of the plain way", STATE_BYTES >> 20);
    let what = format!("a checkpoint of {} MiB written durably", STATE_BYTES >> 20);
    Row::new(what, "s", &writes).beside("copy and sync", &copies).goal(Goal::AtMost(1.2)).report();
    let what = format!("{} MiB restored, every byte verified", STATE_BYTES >> 20);
    Row::new(what, "s", &restores).beside("read and BLAKE3", &reads).report();
    print_rate("write, durable", &mut writes, &mut copies);
    print_rate("restore, verified", &mut restores, &mut reads);
}

fn write(folder: &Folder, tensors: &[NamedTensor]) {
    let shard = checkpoint::write_shard(folder, 0, 1, tensors).expect("write a shard");
    let manifest = Manifest {
        format: FORMAT.into(),
        cluster: ClusterId([1; 16]),
        job: JobId(1),
        name: "bench".into(),
        trainer: "digits".into(),
        generation: Generation(1),
        step: Step(1),
        cursor: 64,
        ledger: None,
        world: 1,
        lanes: 1,
        seed: 1,
        spec: String::new(),
        shards: vec![shard.into()],
        loss: None,
        weights_blake3: Digest([1; 32]),
        metrics: Default::default(),
    };
    checkpoint::write_manifest(folder, &manifest).expect("write the manifest");
}

/// What `cat` into memory and `b3sum` on one thread do.
fn read_and_hash(path: &Path) {
    let mut bytes = Vec::with_capacity(STATE_BYTES + 4096);
    File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)).expect("read the copy");
    std::hint::black_box((blake3::hash(&bytes), bytes));
}

fn seconds(work: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    work();
    begun.elapsed().as_secs_f64()
}

fn at(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * part).round() as usize]
}

fn print_rate(what: &str, ours: &mut [f64], plain: &mut [f64]) {
    let rate = |seconds: f64| STATE_BYTES as f64 / 1e9 / seconds;
    let (ours, plain) = (rate(at(ours, 0.5)), rate(at(plain, 0.5)));
    println!("{what:<22} {ours:>9.2}   {plain:>9.2} ({:.2})", ours / plain);
}

fn job(root: &Path, stoke: &Path) {
    let cluster = Cluster::up(stoke);
    let spec = root.join("jobs/specs/domains.toml");
    let calm = cluster.train(&spec, STEPS + 1);
    let often = cluster.train(&spec, EVERY);
    let rate = |log: &str| -> f64 {
        let done = log.lines().find(|line| line.contains("steps done")).expect("the steps are done");
        figures(done, "samples_per_second=")[0]
    };
    let (mut held, mut taken) = (figures(&often, "held_us="), figures(&often, "taken_us="));
    let stored: Vec<&str> = often.lines().filter(|line| line.contains("shard stored")).collect();
    let bytes = figures(stored[0], "bytes=")[0] as usize;
    let state = vec![1u8; bytes];
    let mut plain: Vec<f64> =
        held.iter().map(|_| 1e6 * seconds(|| drop(std::hint::black_box(state.clone())))).collect();
    println!("{} checkpoints of {bytes} bytes in a job      median us    p99 us", held.len());
    for (what, values) in [
        ("training is held", &mut held),
        ("  of it taking the state", &mut taken),
        ("plain copy in memory", &mut plain),
    ] {
        println!("{what:<40} {:>12.0} {:>9.0}", at(values, 0.5), at(values, 0.99));
    }
    let (calm, often) = (rate(&calm), rate(&often));
    let count = (STEPS / EVERY) as f64;
    // What one checkpoint cost, held and written beside training, spread over a minute.
    let each = (STEPS * 256) as f64 * (1.0 / often - 1.0 / calm) / count;
    println!(
        "samples/s: {calm:.0} without, {often:.0} with a checkpoint every {EVERY} steps: {:.2} ms each",
        each * 1e3
    );
    let held_ms = at(&mut held, 0.5) / 1e3;
    println!("one checkpoint a minute: {:.4}% of the time, {:.4}% held", 100.0 * each / 60.0, held_ms / 600.0);
}

fn figures(log: &str, name: &str) -> Vec<f64> {
    let figure = |text: &str| text.split_whitespace().next().and_then(|text| text.parse().ok()).expect("a number");
    log.split(name).skip(1).map(figure).collect()
}

/// A local cluster of one node that is taken down when dropped.
struct Cluster<'a> {
    stoke: &'a Path,
    folder: tempfile::TempDir,
}

impl<'a> Cluster<'a> {
    fn up(stoke: &'a Path) -> Self {
        let cluster = Self { stoke, folder: tempfile::tempdir().expect("a temporary folder") };
        cluster.ask(&["up", "--nodes", "1"]);
        cluster
    }

    fn dir(&self) -> PathBuf {
        self.folder.path().join("c")
    }

    fn ask(&self, args: &[&str]) -> String {
        let output = Command::new(self.stoke).arg("--cluster").arg(self.dir()).args(args).output().expect("run stoke");
        assert!(output.status.success(), "stoke {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// The log of the one rank of a whole job.
    fn train(&self, spec: &Path, every: u64) -> String {
        let (steps, every) = (format!("train.steps={STEPS}"), format!("checkpoint.every={every}"));
        let spec = spec.to_str().expect("UTF-8");
        let answer = self.ask(&["submit", spec, "--ranks", "1", "--set", &steps, "--set", &every, "--wait", "--json"]);
        let answer: Value = serde_json::from_str(&answer).expect("one JSON object");
        self.ask(&["logs", answer["job"].as_str().expect("a job"), "--rank", "0"])
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        drop(Command::new(self.stoke).arg("--cluster").arg(self.dir()).arg("down").output());
    }
}
