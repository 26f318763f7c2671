//! What the checksum of the parameters (`train.digest_every = 1`, I19) costs beside the step that it guards, in the same process and in turn: the
//! lanes of one of two ranks and the update, one thread; the exchange, which would make the share smaller, left out. And its speed over parameters
//! that lie in no cache, against a plain copy of them.
//!
//!     cargo bench -p stoke-cli -p stoke-tests --bench digest

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use stoke_jobs::{Floats, LaneWork, NamedTensor, Plan, Train};

const STEPS: u64 = 200;
const RANKS: u32 = 2;
const LARGE_VALUES: usize = 64 << 20;
const ROUNDS: usize = 7;

fn main() {
    println!("{:<10} {:>10} {:>12} {:>12} {:>8}", "spec", "parameters", "step ms", "digest ms", "share");
    ["domains", "digits"].iter().for_each(|spec| beside_a_step(spec));
    over_memory();
}

fn beside_a_step(name: &str) {
    let folder =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").join("jobs/specs");
    let text = std::fs::read_to_string(folder.join(format!("{name}.toml"))).expect("the spec is there");
    let text = stoke_jobs::absolute_paths(&text, &folder).expect("a good spec");
    let spec = stoke_protocol::spec::JobSpec::parse(&text).expect("a good spec");
    let lanes = spec.training().lanes;
    let plan = Plan {
        seed: spec.training().seed,
        batch: spec.training().batch as usize,
        lanes: lanes as usize,
        steps: STEPS,
        accumulate: 1,
        threads: 1,
        clip_norm: spec.training().clip_norm,
        precision: Floats::F32,
        diloco: None,
    };
    let mut train = stoke_jobs::load(&text, &spec.trainer, plan.clone()).expect("a good spec");
    let (mut steps, mut digests) = (Vec::new(), Vec::new());
    let mut sum = vec![0f32; train.layout().flat_len()];
    for step in 0..STEPS {
        let begun = Instant::now();
        sum.fill(0.0);
        (0..lanes / RANKS).for_each(|lane| add_lane(&mut *train, (&plan, step, lane), &mut sum));
        train.apply(step, &sum).expect("a finite step");
        steps.push(begun.elapsed().as_secs_f64() * 1e3);
        let begun = Instant::now();
        black_box(train.fingerprint());
        digests.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    let (step, digest) = (median(steps), median(digests));
    let parameters = train.layout().len();
    println!("{name:<10} {parameters:>10} {step:>12.3} {digest:>12.4} {:>7.3}%", 100.0 * digest / step);
}

fn add_lane(train: &mut dyn Train, (plan, step, lane): (&Plan, u64, u32), sum: &mut [f32]) {
    let samples = plan.lane_samples(train.samples(), step, lane);
    let mut add = |offset: usize, piece: &[f32]| {
        sum[offset..offset + piece.len()].iter_mut().zip(piece).for_each(|(sum, value)| *sum += value);
    };
    train.lane(LaneWork::new(step, lane, &samples), &mut add).expect("a good lane");
}

fn over_memory() {
    let values: Vec<f32> = (0..LARGE_VALUES).map(|index| index as f32 * 0.37).collect();
    let tensors = [NamedTensor { name: "model.large".into(), shape: vec![LARGE_VALUES], values }];
    let (mut digests, mut copies) = (Vec::new(), Vec::new());
    let mut copy = vec![0f32; LARGE_VALUES];
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        black_box(stoke_jobs::fingerprint(&tensors));
        digests.push(begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        copy.copy_from_slice(black_box(&tensors[0].values));
        black_box(&copy);
        copies.push(begun.elapsed().as_secs_f64());
    }
    let rate = |seconds: f64| (LARGE_VALUES * size_of::<f32>()) as f64 / seconds / 1e9;
    let (digest, copied) = (rate(median(digests)), rate(median(copies)));
    println!("over {} MiB: {digest:.1} GB/s, a copy {copied:.1} GB/s", (LARGE_VALUES * size_of::<f32>()) >> 20);
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
