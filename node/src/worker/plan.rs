//! From a job spec to what a rank computes. Pure.

use stoke_jobs::{JobError, Plan, Train};
use stoke_protocol::spec::{Diloco, Floats, JobSpec, Sharding, Wire};

use crate::checkpoint::Manifest;
use crate::exchange::Shape;

/// Optimizer steps of the whole job: given, or the epochs over `samples` rounded up to whole steps.
pub fn steps_of(spec: &JobSpec, samples: u64) -> Result<u64, String> {
    let (batch, epochs) = (spec.training().samples_a_step(), spec.training().epochs.unwrap_or(1));
    let too_many = || format!("epochs = {epochs} of {samples} samples are too many to count: use fewer");
    match spec.training().steps {
        Some(steps) => Ok(steps),
        None => epochs.checked_mul(samples).map(|samples| samples.div_ceil(batch)).ok_or_else(too_many),
    }
}

/// The part of `[train]` that decides the numbers.
pub fn plan_of(spec: &JobSpec, steps: u64) -> Plan {
    let train = spec.training();
    Plan {
        seed: train.seed,
        batch: train.samples_a_step() as usize,
        lanes: train.lanes as usize,
        steps,
        accumulate: train.accumulate as usize,
        threads: train.threads as usize,
        clip_norm: train.clip_norm,
        precision: match train.precision {
            Floats::F32 => stoke_jobs::Floats::F32,
            Floats::Bf16 => stoke_jobs::Floats::Bf16,
        },
        diloco: train.diloco.map(|Diloco { local_steps, outer_lr, outer_momentum }| stoke_jobs::Diloco {
            local_steps,
            outer_lr,
            outer_momentum,
        }),
    }
}

/// A trainer with its plan. The schedule's length may follow from the size of the data, which only a loaded trainer knows; `too_long` says what is wrong with it.
pub fn loaded<E: From<JobError>>(
    spec: &JobSpec,
    load: impl Fn(Plan) -> Result<Box<dyn Train>, JobError>,
    too_long: impl FnOnce(String) -> E,
) -> Result<(Plan, Box<dyn Train>), E> {
    let plan = plan_of(spec, spec.training().steps.unwrap_or(1));
    let mut train = load(plan.clone())?;
    let refused =
        |problem: String, mend: &str| Err(JobError::Config { line: 1, problem, mend: mend.to_owned() }.into());
    if plan.diloco.is_some() && !train.steps_locally() {
        return refused(format!("the trainer {} makes no local steps", spec.trainer), "remove [train.diloco]");
    }
    if plan.precision != stoke_jobs::Floats::F32 && !train.computes_in_bf16() {
        let problem = format!("precision = \"bf16\": the trainer {} computes in f32", spec.trainer);
        return refused(problem, "remove precision from [train]");
    }
    if spec.training().sharding != Sharding::None && !train.shares_state() {
        let problem = format!("sharding = \"zero1\": the trainer {} keeps its optimizer's state whole", spec.trainer);
        return refused(problem, "remove sharding from [train]");
    }
    if spec.training().steps.is_some() {
        return Ok((plan, train));
    }
    let plan = plan_of(spec, steps_of(spec, train.samples()).map_err(too_long)?);
    if !train.set_steps(plan.steps)? {
        train = load(plan.clone())?;
    }
    Ok((plan, train))
}

/// What the ranks of a job sum: vectors of so many values, of which the first are the trainer's gradients.
pub fn shape_of(spec: &JobSpec, train: &dyn Train, values: usize) -> Shape {
    let (lanes, wire) = (spec.training().lanes, spec.training().wire);
    let tail = values - train.layout().len();
    Shape { values, tail, lanes, rounded: wire == Wire::Bf16, early: train.gives_early() }
}

/// Whether a checkpoint is due after `step` steps.
pub fn is_due(spec: &JobSpec, step: u64, steps: u64) -> bool {
    step == steps || spec.checkpoint.every.is_some_and(|every| step.is_multiple_of(every))
}

/// Why a checkpoint cannot be continued under this spec, if it cannot: the order of samples and the sum over lanes would be others (I20).
/// `train` was loaded by it.
pub fn mismatch(manifest: &Manifest, (spec, train): (&JobSpec, &dyn Train), steps: u64) -> Option<String> {
    let training = spec.training();
    let differs = |key: &str, theirs: String, ours: String| {
        (theirs != ours).then(|| {
            format!("it was trained with {key} = {theirs}, the spec says {ours}: write {key} = {theirs}, or start without it")
        })
    };
    let read = JobSpec::parse(&manifest.spec);
    let theirs = read.as_ref().ok().and_then(|spec| spec.training().diloco);
    let local = match [theirs, training.diloco].map(|diloco| diloco.map(|diloco| diloco.local_steps)) {
        [None, Some(_)] if read.is_err() => {
            Some("its spec cannot be read, and with it its local steps: start without it".to_owned())
        }
        [None, Some(_)] => {
            Some("it was trained without local steps: remove [train.diloco], or start without it".to_owned())
        }
        [Some(theirs), ours] if ours != Some(theirs) => {
            let ours = ours.map_or("nothing of it".to_owned(), |ours| ours.to_string());
            differs("[train.diloco] local_steps", theirs.to_string(), ours)
        }
        _ => None,
    };
    let a_batch = training.samples_a_step() / u64::from(training.batch);
    let batch = manifest.cursor.checked_div(manifest.step.0).map_or(u64::from(training.batch), |step| step / a_batch);
    differs("trainer", manifest.trainer.clone(), spec.trainer.clone())
        .or_else(|| differs("seed", manifest.seed.to_string(), training.seed.to_string()))
        .or_else(|| differs("lanes", manifest.lanes.to_string(), training.lanes.to_string()))
        .or(local)
        .or_else(|| differs("batch", batch.to_string(), training.batch.to_string()))
        .or_else(|| train.continues(&manifest.spec).err())
        .or_else(|| {
            let beyond = manifest.step.0 > steps;
            beyond.then(|| format!("it is at step {}, the job has {steps} steps: ask for more steps", manifest.step.0))
        })
}

#[cfg(test)]
mod tests {
    use stoke_jobs::{Applied, LaneWork, Layout, Metrics, NamedTensor, Snapshot};

    use super::*;

    /// A trainer that can do no more than it must, and is asked for nothing.
    struct Plain;

    impl Train for Plain {
        fn layout(&self) -> &Layout {
            unreachable!()
        }
        fn samples(&self) -> u64 {
            unreachable!()
        }
        fn lane(&mut self, _: LaneWork<'_>, _: &mut dyn FnMut(usize, &[f32])) -> Result<(), JobError> {
            unreachable!()
        }
        fn apply(&mut self, _: u64, _: &[f32]) -> Result<Applied, JobError> {
            unreachable!()
        }
        fn skip(&mut self) {
            unreachable!()
        }
        fn skipped(&self) -> u64 {
            unreachable!()
        }
        fn evaluate(&mut self) -> Result<Metrics, JobError> {
            unreachable!()
        }
        fn snapshot(&self) -> Snapshot {
            unreachable!()
        }
        fn restore(&mut self, _: Vec<NamedTensor>) -> Result<(), JobError> {
            unreachable!()
        }
        fn fingerprint(&self) -> u64 {
            unreachable!()
        }
    }

    #[test]
    fn what_a_trainer_cannot_do_is_refused_with_the_key_and_the_mend() {
        let load = |train: &str| {
            let spec = spec(&format!("steps = 10\nbatch = 8\n{train}"));
            let loaded = loaded::<JobError>(&spec, |_| Ok(Box::new(Plain)), |_| unreachable!());
            loaded.map(|(plan, _)| plan.precision).map_err(|error| error.to_string())
        };
        assert_eq!(load(""), Ok(stoke_jobs::Floats::F32));
        assert_eq!(load("precision = \"f32\""), Ok(stoke_jobs::Floats::F32));
        let words = "line 1: precision = \"bf16\": the trainer digits computes in f32 (remove precision from [train])";
        assert_eq!(load("precision = \"bf16\""), Err(words.to_owned()));
        let words = "line 1: sharding = \"zero1\": the trainer digits keeps its optimizer's state whole (remove sharding from [train])";
        assert_eq!(load("sharding = \"zero1\""), Err(words.to_owned()));
        let words = "line 1: the trainer digits makes no local steps (remove [train.diloco])";
        assert_eq!(load("[train.diloco]\nlocal_steps = 2"), Err(words.to_owned()));
    }

    fn spec(train: &str) -> JobSpec {
        JobSpec::parse(&format!("name = \"t\"\ntrainer = \"digits\"\n[train]\n{train}\n[checkpoint]\nevery = 4\n"))
            .unwrap()
    }

    #[test]
    fn epochs_are_rounded_up_to_whole_steps() {
        assert_eq!(steps_of(&spec("epochs = 3\nbatch = 64"), 100), Ok(5));
        assert_eq!(steps_of(&spec("epochs = 2\nbatch = 8"), 8), Ok(2));
        assert!(
            steps_of(&spec("epochs = 797214403116365\nbatch = 256"), 46_278).unwrap_err().contains("797214403116365")
        );
        assert_eq!(steps_of(&spec("steps = 7\nbatch = 8"), 8), Ok(7));
    }

    #[test]
    fn checkpoints_are_due_at_their_interval_and_at_the_end() {
        let spec = spec("steps = 10\nbatch = 8");
        assert_eq!((1..=10).filter(|step| is_due(&spec, *step, 10)).collect::<Vec<_>>(), [4, 8, 10]);
    }
}
