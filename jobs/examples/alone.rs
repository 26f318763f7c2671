//! Trains a spec in this one process, without a cluster: for measuring and for debugging a trainer.
//!     cargo run --release -p stoke-jobs --example alone -- jobs/specs/domains.toml [STEPS | --weights FILE]
//! `--weights` writes the first weights as safetensors, for the PyTorch references, and stops. Otherwise it does what a cluster of one rank does: the lanes in turn, their binary tree sum, the step.

use std::path::Path;
use std::time::Instant;

use safetensors::tensor::{Dtype, TensorView};
use stoke_jobs::{Diloco, Floats, LaneWork, NamedTensor, Plan, Train};

/// As in the `stoke` binary: training allocates and frees large buffers all the time, which the system's allocator hands
/// back to the kernel each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let file = args.next().ok_or("usage: alone SPEC [STEPS]")?;
    let (steps_max, weights) = match (args.next().as_deref(), args.next()) {
        (Some("--weights"), file) => (Some(0), Some(file.ok_or("--weights needs a file")?)),
        (Some(steps), _) => (Some(steps.parse::<u64>()?), None),
        (None, _) => (None, None),
    };
    let text = std::fs::read_to_string(&file)?;
    let text = stoke_jobs::absolute_paths(&text, Path::new(&file).parent().ok_or("a spec is a file")?)?;
    let spec: toml::Table = text.parse()?;
    let trainer = spec["trainer"].as_str().ok_or("trainer is a string")?;
    let mut plan = plan(&spec["train"])?;
    let start = Instant::now();
    let samples = stoke_jobs::load(&text, trainer, plan.clone())?.samples();
    println!("{samples} training samples read in {:.2?}", start.elapsed());
    if let Some(epochs) = spec["train"].get("epochs").and_then(toml::Value::as_integer) {
        plan.steps = (epochs as u64 * samples).div_ceil(plan.batch as u64);
    }
    let mut train = stoke_jobs::load(&text, trainer, plan.clone())?;
    println!("{} parameters, {} steps", train.layout().len(), plan.steps);
    if let Some(file) = weights {
        return Ok(std::fs::write(file, safetensors(&train.save()?)?)?);
    }
    let start = Instant::now();
    for step in 0..steps_max.unwrap_or(plan.steps) {
        let sum = gradients(&mut *train, &plan, step)?;
        let applied = train.apply(step, &sum)?;
        if step % 50 == 0 {
            let rate = (step + 1) as f64 * plan.batch as f64 / start.elapsed().as_secs_f64();
            println!("step {step} {applied:.4?} {rate:.0} samples/s");
        }
    }
    println!("trained in {:.2?}", start.elapsed());
    let start = Instant::now();
    println!("{:#.4?} in {:.2?}", train.evaluate()?, start.elapsed());
    println!("weights {}", train.weights_blake3().map(|byte| format!("{byte:02x}")).concat());
    Ok(())
}

fn plan(train: &toml::Value) -> Result<Plan, Error> {
    let number = |key: &str, default: i64| train.get(key).and_then(toml::Value::as_integer).unwrap_or(default);
    Ok(Plan {
        seed: number("seed", 0) as u64,
        batch: (number("batch", 256) * train.get("diloco").map_or(1, |of| of["local_steps"].as_integer().unwrap_or(1)))
            as usize,
        lanes: number("lanes", 8) as usize,
        steps: number("steps", 1) as u64,
        accumulate: number("accumulate", 1) as usize,
        threads: number("threads", 1) as usize,
        clip_norm: train.get("clip_norm").and_then(toml::Value::as_float).map(|norm| norm as f32),
        precision: match train.get("precision").and_then(toml::Value::as_str) {
            Some("bf16") => Floats::Bf16,
            Some("f32") | None => Floats::F32,
            Some(other) => return Err(format!("precision = {other:?}: write f32 or bf16").into()),
        },
        diloco: train.get("diloco").map(|diloco| Diloco {
            local_steps: diloco["local_steps"].as_integer().unwrap_or(1) as u32,
            outer_lr: diloco.get("outer_lr").and_then(toml::Value::as_float).unwrap_or(0.7),
            outer_momentum: diloco.get("outer_momentum").and_then(toml::Value::as_float).unwrap_or(0.9),
        }),
    })
}

fn safetensors(tensors: &[NamedTensor]) -> Result<Vec<u8>, Error> {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| t.values.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let mut views = Vec::new();
    for (tensor, bytes) in tensors.iter().zip(&bytes) {
        views.push((&tensor.name, TensorView::new(Dtype::F32, tensor.shape.clone(), bytes)?));
    }
    Ok(safetensors::serialize(views, None)?)
}

/// The lanes' flat vectors, added in a binary tree.
fn gradients(train: &mut dyn Train, plan: &Plan, step: u64) -> Result<Vec<f32>, Error> {
    let (samples, len) = (train.samples(), train.layout().flat_len());
    let mut lanes = Vec::new();
    for lane in 0..plan.lanes as u32 {
        let indices = plan.lane_samples(samples, step, lane);
        let mut flat = vec![0f32; len];
        train.lane(LaneWork::new(step, lane, &indices), &mut |offset, piece| {
            flat[offset..offset + piece.len()].copy_from_slice(piece);
        })?;
        lanes.push(flat);
    }
    let mut width = 1;
    while width < lanes.len() {
        for left in (0..lanes.len() - width).step_by(2 * width) {
            let (head, tail) = lanes.split_at_mut(left + width);
            head[left].iter_mut().zip(&tail[0]).for_each(|(sum, part)| *sum += part);
        }
        width *= 2;
    }
    Ok(lanes.swap_remove(0))
}
