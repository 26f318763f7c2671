//! What the tests share: specs over the committed data with small models, and one rank's whole step.

use std::path::Path;

use stoke_jobs::{Applied, Diloco, Floats, LaneWork, Plan, Train};

pub fn jobs() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The text of a spec in this crate's folder, with absolute paths.
pub fn spec(file: &str) -> String {
    let path = jobs().join(file);
    let text = std::fs::read_to_string(&path).expect("the spec is there");
    stoke_jobs::absolute_paths(&text, path.parent().expect("a file has a folder")).expect("a good spec")
}

pub fn plan(spec: &str) -> Plan {
    let table: toml::Table = spec.parse().expect("a good spec");
    let train = &table["train"];
    let number = |key: &str| train[key].as_integer().expect("a number") as u64;
    let diloco = train.get("diloco").map(|diloco| Diloco {
        local_steps: diloco["local_steps"].as_integer().expect("a number") as u32,
        outer_lr: diloco["outer_lr"].as_float().expect("a number"),
        outer_momentum: diloco["outer_momentum"].as_float().expect("a number"),
    });
    Plan {
        seed: number("seed"),
        batch: number("batch") as usize * diloco.map_or(1, |diloco| diloco.local_steps as usize),
        lanes: number("lanes") as usize,
        steps: train.get("steps").map_or(100, |steps| steps.as_integer().expect("a number") as u64),
        accumulate: 1,
        threads: 1,
        clip_norm: Some(train["clip_norm"].as_float().expect("a number") as f32),
        precision: match train.get("precision").and_then(toml::Value::as_str) {
            Some("bf16") => Floats::Bf16,
            _ => Floats::F32,
        },
        diloco,
    }
}

pub fn load(spec: &str, plan: &Plan) -> Box<dyn Train> {
    let table: toml::Table = spec.parse().expect("a good spec");
    stoke_jobs::load(spec, table["trainer"].as_str().expect("a string"), plan.clone()).expect("a good spec")
}

/// One lane's flat vector.
pub fn lane(train: &mut dyn Train, plan: &Plan, step: u64, lane: u32) -> Vec<f32> {
    let mut flat = vec![f32::NAN; train.layout().flat_len()];
    let samples = plan.lane_samples(train.samples(), step, lane);
    let work = LaneWork::new(step, lane, &samples);
    let mut put = |offset: usize, piece: &[f32]| flat[offset..offset + piece.len()].copy_from_slice(piece);
    train.lane(work, &mut put).expect("a good lane");
    flat
}

/// The sum over the lanes.
pub fn sum(train: &mut dyn Train, plan: &Plan, step: u64) -> Vec<f32> {
    let mut total = lane(train, plan, step, 0);
    for index in 1..plan.lanes as u32 {
        total.iter_mut().zip(lane(train, plan, step, index)).for_each(|(total, part)| *total += part);
    }
    total
}

pub fn step(train: &mut dyn Train, plan: &Plan, step: u64) -> Applied {
    let sum = sum(train, plan, step);
    train.apply(step, &sum).expect("a finite step")
}
