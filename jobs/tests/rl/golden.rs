//! Every native environment of gymnasium's beside gymnasium 1.4.0 itself: 10,000 steps of ten envs. The golden files, their format and the rules by
//! which the envs act are those of jobs/reference/rl/environments.py.
//!
//! Rewards (f32), ends and limits are equal, bit for bit; so are observations on the machine where the files were made, and elsewhere they are
//! within 1e-6 of their size or of 1 (sine and cosine of `trig` differ from numpy's by a unit in the last place of f64 at times). Acrobot takes them
//! from the C library, as numpy does, because its two links are chaos: with another C library (the files are glibc 2.36's, on a processor with
//! fused multiply-add) its course may part from the file within an episode, as gymnasium's own would.

use std::path::{Path, PathBuf};

use stoke_jobs::rl::{Actions, Pcg64, Space, StepBuffer, make};

const SEEDS: [u64; 10] = [0, 1, 2, 3, 42, 123_456_789, 1 << 32, (1 << 32) + 5, (1 << 40) + 7, (1 << 63) + 1];
const TOLERANCE: f64 = 1e-6;

#[test]
fn cart_pole_is_gymnasiums() {
    compare("CartPole-v1", |o| f64::from(u8::from(o[2] + 0.5 * o[3] + 0.05 * o[0] + 0.1 * o[1] > 0.0)));
}

#[test]
fn acrobot_is_gymnasiums() {
    compare("Acrobot-v1", |o| if o[4] + 0.5 * o[3] < 0.0 { 2.0 } else { 0.0 });
}

#[test]
fn mountain_car_is_gymnasiums() {
    compare("MountainCar-v0", |o| if o[1] >= 0.0 { 2.0 } else { 0.0 });
}

#[test]
fn continuous_mountain_car_is_gymnasiums() {
    compare("MountainCarContinuous-v0", |o| if o[1] >= 0.0 { 1.2 } else { -1.2 });
}

#[test]
fn pendulum_is_gymnasiums() {
    compare("Pendulum-v1", |o| if o[2] >= 0.0 { 1.5 } else { -1.5 });
}

/// Beside the golden file, and beside the whole record where `STOKE_RL_WHOLE` names its folder.
fn compare(name: &str, rule: fn(&[f64]) -> f64) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/golden/rl");
    let whole = std::env::var_os("STOKE_RL_WHOLE").map(PathBuf::from);
    for folder in [Some(golden), whole].into_iter().flatten() {
        let bytes = std::fs::read(folder.join(format!("{name}.bin"))).expect("a golden file");
        Comparison::new(name, &bytes).run(rule);
    }
}

/// What the file says of one index.
struct Record {
    first: Vec<f32>,
    /// Observation and reward of every `stride`-th step.
    samples: Vec<f32>,
    sums: Vec<f64>,
    reward_hash: u64,
    ends: Vec<u32>,
}

struct Comparison {
    name: String,
    stride: usize,
    steps: usize,
    records: Vec<Record>,
    worst: f64,
}

impl Comparison {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let mut reader = Reader(bytes);
        let [stride, steps, envs, len] = [(); 4].map(|()| reader.word() as usize);
        let mut records = Vec::new();
        for _ in 0..envs {
            let samples = steps / stride;
            let first = (0..len).map(|_| f32::from_bits(reader.word())).collect();
            let values = (0..samples * (len + 1)).map(|_| f32::from_bits(reader.word())).collect();
            let sums = (0..samples).map(|_| f64::from_bits(reader.long())).collect();
            let reward_hash = reader.long();
            let ends = (0..reader.word()).map(|_| reader.word()).collect();
            records.push(Record { first, samples: values, sums, reward_hash, ends });
        }
        assert!(reader.0.is_empty() && records.len() == SEEDS.len());
        Self { name: name.to_owned(), stride, steps, records, worst: 0.0 }
    }

    fn run(mut self, rule: fn(&[f64]) -> f64) {
        let mut env = make(&self.name, SEEDS.len()).expect("a native environment");
        let mut buffer = StepBuffer::new(&*env);
        let len = env.spec().observation_len();
        let mut draws = SEEDS.map(|seed| Pcg64::new(seed ^ 1));
        let mut hashes = [0xcbf2_9ce4_8422_2325u64; SEEDS.len()];
        let mut running = [0.0; SEEDS.len()];
        let mut ends = vec![Vec::new(); SEEDS.len()];
        env.reset(&SEEDS, &mut buffer.observations).expect("a reset");
        for (index, seen) in buffer.observations.chunks(len).enumerate() {
            let expected = self.records[index].first.clone();
            self.near(seen, &expected, (index, 0));
        }
        for step in 0..self.steps {
            let chosen: Vec<f64> = (0..SEEDS.len())
                .map(|index| {
                    let seen = &buffer.observations[index * len..][..len];
                    choose(&env.spec().action, rule, (index, draws[index].unit()), seen)
                })
                .collect();
            let (choices, values): (Vec<u32>, Vec<f32>) = chosen.iter().map(|&a| (a as u32, a as f32)).unzip();
            let actions = match env.spec().action {
                Space::Discrete { .. } => Actions::Discrete(&choices),
                Space::Box { .. } => Actions::Box(&values),
            };
            env.step(actions, buffer.step()).expect("a step");
            for index in 0..SEEDS.len() {
                let (seen, reward) = (&buffer.observations[index * len..][..len], buffer.rewards[index]);
                hashes[index] = fnv(hashes[index], &reward.to_le_bytes());
                let weighted = |(i, &value): (usize, &f32)| f64::from(value) * (i + 1) as f64 / len as f64;
                running[index] += seen.iter().enumerate().map(weighted).sum::<f64>();
                if buffer.terminated[index] || buffer.truncated[index] {
                    ends[index].push(step as u32 * 2 + u32::from(!buffer.terminated[index]));
                }
                if (step + 1) % self.stride == 0 {
                    let sample = step / self.stride;
                    self.sampled(seen, reward, (index, sample));
                    let expected = self.records[index].sums[sample];
                    let allowed = TOLERANCE * (self.stride * len) as f64;
                    let sum = std::mem::take(&mut running[index]);
                    assert!((sum - expected).abs() < allowed, "env {index}, up to step {step}: {sum}, {expected}");
                }
            }
        }
        for (index, record) in self.records.iter().enumerate() {
            assert_eq!(ends[index], record.ends, "{}: ends of env {index}", self.name);
            assert_eq!(hashes[index], record.reward_hash, "{}: rewards of env {index}", self.name);
        }
        println!("{}, every step of {}: observations within {:e}", self.name, self.stride, self.worst);
    }

    fn sampled(&mut self, seen: &[f32], reward: f32, (index, sample): (usize, usize)) {
        let row = self.records[index].samples[sample * (seen.len() + 1)..][..=seen.len()].to_vec();
        let step = (sample + 1) * self.stride;
        self.near(seen, &row[..seen.len()], (index, step));
        let expected = row[seen.len()];
        assert_eq!(reward.to_bits(), expected.to_bits(), "{}, env {index}, step {step}: {reward}", self.name);
    }

    fn near(&mut self, seen: &[f32], expected: &[f32], place: (usize, usize)) {
        for (&seen, &expected) in seen.iter().zip(expected) {
            let off = f64::from((seen - expected).abs()) / f64::from(expected.abs().max(1.0));
            self.worst = self.worst.max(off);
            assert!(off <= TOLERANCE, "{}, index and step {place:?}: {seen}, gymnasium {expected}", self.name);
        }
    }
}

/// `choose` of environments.py.
fn choose(space: &Space, rule: fn(&[f64]) -> f64, (index, draw): (usize, f64), seen: &[f32]) -> f64 {
    if index % 2 == 1 && draw >= 0.1 {
        return rule(&seen.iter().map(|&value| f64::from(value)).collect::<Vec<_>>());
    }
    let again = draw * 7919.0 % 1.0;
    match space {
        Space::Discrete { n } => (again * f64::from(*n)).floor(),
        Space::Box { high, .. } => f64::from(high[0]) * (3.0 * again - 1.5),
    }
}

fn fnv(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn word(&mut self) -> u32 {
        let (word, rest) = self.0.split_first_chunk().expect("a whole file");
        self.0 = rest;
        u32::from_le_bytes(*word)
    }

    fn long(&mut self) -> u64 {
        let (word, rest) = self.0.split_first_chunk().expect("a whole file");
        self.0 = rest;
        u64::from_le_bytes(*word)
    }
}
