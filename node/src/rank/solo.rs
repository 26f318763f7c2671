//! Training in one process, for whoever writes a trainer: no cluster, no checkpoints, the same sums in the same tree, and so the same bits. Owns the loop; what
//! it prints is for people.

use std::error::Error;
use std::path::Path;

use stoke_jobs::{LaneWork, Trainers, absolute_paths};
use stoke_protocol::ids::Digest;
use stoke_protocol::spec::JobSpec;

use crate::exchange::LaneSums;
use crate::objects::Objects;
use crate::worker::loaded;

/// Lines that a whole training prints, about.
const LINES: u64 = 20;

/// Trains as the spec says, or for so many of its steps, and evaluates. Paths of the spec are relative to `base`.
pub fn train(
    trainers: Trainers,
    (spec, text): (&JobSpec, &str),
    base: &Path,
    steps_max: Option<u64>,
) -> Result<(), Box<dyn Error>> {
    stoke_jobs::read_stores_by(Box::new(Objects));
    let text = absolute_paths(text, base)?;
    let load = |plan| trainers.load(&text, &spec.trainer, plan);
    let (plan, mut trainer) = loaded::<Box<dyn Error>>(spec, load, Into::into)?;
    let steps = plan.steps;
    let (samples, lanes) = (trainer.samples(), spec.training().lanes);
    println!("{samples} samples, {} parameters, {steps} steps of {}", trainer.layout().len(), plan.batch);
    let mut sums = LaneSums::new(trainer.layout().flat_len(), lanes, 0..lanes);
    let last = steps_max.unwrap_or(steps).min(steps);
    for step in 0..last {
        trainer.prepare(step, 0..lanes)?;
        for lane in 0..lanes {
            let samples = plan.lane_samples(samples, step, lane);
            sums.begin(lane);
            trainer.lane(LaneWork::new(step, lane, &samples), &mut |offset, values| sums.push(offset, values))?;
        }
        let [whole] = sums.finish() else { unreachable!("L2: all lanes are one subtree") };
        let applied = trainer.apply(step, whole.values.read())?;
        if (step + 1).is_multiple_of((last / LINES).max(1)) || step + 1 == last {
            let (loss, accuracy) = (applied.loss, applied.accuracy);
            println!("step {}/{steps} loss {loss:.4} accuracy {accuracy:.4} lr {:.2e}", step + 1, applied.lr);
        }
    }
    for (name, value) in trainer.evaluate()? {
        println!("held-out {name} {value:.4}");
    }
    println!("weights_blake3 {}", Digest(trainer.weights_blake3()));
    Ok(())
}
