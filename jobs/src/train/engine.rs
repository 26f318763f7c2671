//! The training loop's parts that all built-in trainers share: gradients of a lane, the optimizer step, saving and
//! restoring. A trainer adds data, model and loss (`Task`). It never reads files and never talks to other ranks.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};

use super::fused;
use super::optimizer::{Schedule, Update};
use super::parameters::{add, by_name, check_model, fingerprint_model, gradients, layout, load_model};
use super::snapshot::SKIPPED;
use super::{Applied, LaneWork, Layout, Metrics, NamedTensor, Plan, STATS, Snapshot, Train};
use crate::JobError;
use crate::config::{OptimizerConfig, ScheduleConfig};

/// What a trainer is, apart from the loop: data, model and loss. [`Engine`] makes a trainer of it.
pub trait Task: Send + Sync {
    /// Its parameters come from [`super::layers::Init`], or from whatever else gives the same bits in every process: Burn's own initialisers do not.
    type Model: Module + Sync;

    /// Size of the training set; at least 1.
    fn samples(&self) -> u64;

    /// Loss of training samples (indices below `samples()`, at least one), summed over them. A function of the model and the samples alone: draws, where a
    /// loss needs some, are keyed by the samples. `device` is where the model is; it has autodiff.
    fn loss(&self, model: &Self::Model, samples: &[u64], device: &Device) -> Loss;

    /// Metrics of the model (without autodiff) on the held-out data, by name. Called once, behind the last step, on one rank.
    fn evaluate(&self, model: &Self::Model, device: &Device) -> Metrics;

    /// See [`Train::continues`].
    fn continues(&self, _config_toml: &str) -> Result<(), String> {
        Ok(())
    }
}

/// Loss of a batch: a sum over its samples, because lanes are added before they are divided.
pub struct Loss {
    /// A scalar with a graph behind it. Not the mean.
    pub sum: Tensor<1>,
    /// How many of the samples were answered rightly; of a sample with several answers, the share that was right. Reported as `accuracy`.
    pub correct: f32,
}

/// Summed cross-entropy of logits [rows, classes], one label a row, and how many rows have it as their first largest.
pub fn cross_entropy(logits: Tensor<2>, labels: &[u8]) -> Loss {
    Loss::of(fused::cross_entropy(logits, labels.iter().map(|label| u32::from(*label)).collect()))
}

impl Loss {
    /// Of both figures in one tensor.
    pub(crate) fn of(figures: Tensor<1>) -> Self {
        let correct = figures.clone().narrow(0, 1, 1).into_scalar::<f32>();
        Self { sum: figures.narrow(0, 0, 1), correct }
    }
}

/// A [`Train`] from a [`Task`], its model, an optimizer and threads: gradients of lanes (in `[train] accumulate` parts), clipping by the global norm, one of
/// Burn's update rules at the schedule's rate, checkpoints of all of it.
pub struct Engine<T: Task> {
    task: T,
    /// None only while `apply` has it.
    model: Option<T::Model>,
    device: Device,
    layout: Arc<Layout>,
    update: Update,
    schedule: Schedule,
    /// What it was made of.
    scheduled: ScheduleConfig,
    plan: Plan,
    skipped: u64,
    pool: rayon::ThreadPool,
}

impl<T: Task> Engine<T> {
    /// `model` is on `device`, which has autodiff: `stoke_jobs::device().autodiff()`.
    pub fn new(
        task: T,
        model: T::Model,
        device: Device,
        plan: Plan,
        (optimizer, schedule): (&OptimizerConfig, &ScheduleConfig),
    ) -> Result<Self, JobError> {
        let layout = Arc::new(layout(&model));
        let (schedule, scheduled) = (scheduled(schedule, plan.steps)?, schedule.clone());
        let update = Update::new(optimizer.rule(), &layout);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(plan.threads.max(1))
            .thread_name(|index| format!("compute-{index}"))
            .build()
            .map_err(|error| JobError::Threads { threads: plan.threads, problem: error.to_string() })?;
        Ok(Engine { task, model: Some(model), device, layout, update, schedule, scheduled, plan, skipped: 0, pool })
    }

    fn model(&self) -> &T::Model {
        self.model.as_ref().expect("the model is only away inside apply")
    }
}

fn scheduled(config: &ScheduleConfig, steps: u64) -> Result<Schedule, JobError> {
    let bad = |problem| JobError::Config { line: 1, problem, mend: "mend [schedule] or [train]".to_owned() };
    Schedule::new(config, steps).map_err(bad)
}

impl<T: Task> Train for Engine<T> {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn samples(&self) -> u64 {
        self.task.samples()
    }

    fn continues(&self, config_toml: &str) -> Result<(), String> {
        self.task.continues(config_toml)
    }

    fn set_steps(&mut self, steps: u64) -> Result<bool, JobError> {
        self.schedule = scheduled(&self.scheduled, steps)?;
        self.plan.steps = steps;
        Ok(true)
    }

    fn lane(&mut self, work: LaneWork<'_>, sink: &mut dyn FnMut(usize, &[f32])) -> Result<(), JobError> {
        let size = self.task.samples();
        if work.samples.is_empty() {
            return Err(JobError::Contract { what: "samples of a lane", got: 0, expected: 1 });
        }
        if let Some(&index) = work.samples.iter().find(|&&index| index >= size) {
            return Err(JobError::Contract { what: "sample index below the set's size", got: index, expected: size });
        }
        let micro = work.samples.len().div_ceil(self.plan.accumulate.max(1));
        let (task, device, layout) = (&self.task, &self.device, &self.layout);
        let model = self.model.as_ref().expect("the model is only away inside apply");
        let (gradients, stats) = self.pool.install(|| {
            let mut total: Vec<TensorData> = Vec::new();
            let mut stats = [0f32; STATS];
            for part in work.samples.chunks(micro) {
                let loss = task.loss(model, part, device);
                let sum = loss.sum.clone().inner().into_scalar::<f32>();
                let part_stats = [sum, loss.correct, part.len() as f32];
                stats.iter_mut().zip(part_stats).for_each(|(total, part)| *total += part);
                let gradients = gradients(model, layout, loss.sum);
                if total.is_empty() {
                    total = gradients;
                } else {
                    add(&mut total, &gradients);
                }
            }
            (total, stats)
        });
        for (param, gradient) in layout.params.iter().zip(&gradients) {
            sink(param.offset, gradient.as_slice::<f32>().expect("gradients are f32"));
        }
        sink(layout.len(), &stats);
        Ok(())
    }

    fn apply(&mut self, step: u64, sum: &[f32]) -> Result<Applied, JobError> {
        if sum.len() != self.layout.flat_len() {
            let (got, expected) = (sum.len() as u64, self.layout.flat_len() as u64);
            return Err(JobError::Contract { what: "length of the gradient sum", got, expected });
        }
        let (gradient, stats) = sum.split_at(self.layout.len());
        let [loss, correct, samples] = [stats[0], stats[1], stats[2]].map(f64::from);
        if !loss.is_finite() {
            return Err(JobError::NonFinite { step, what: "the loss" });
        }
        if !(samples >= 1.0 && samples.is_finite()) {
            return Err(JobError::Contract { what: "samples in the gradient sum", got: 0, expected: 1 });
        }
        let square: f64 = gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
        let grad_norm = square.sqrt() / samples;
        if !grad_norm.is_finite() {
            return Err(JobError::NonFinite { step, what: "the gradient" });
        }
        let bad = |problem| JobError::Config { line: 1, problem, mend: "mend [schedule]".to_owned() };
        let lr = self.schedule.rate(step).map_err(bad)?;
        let scale = (clip(grad_norm, self.plan.clip_norm) / samples) as f32;
        let model = self.model.take().expect("the model is only away inside apply");
        let (update, layout) = (&mut self.update, &self.layout);
        self.model = Some(self.pool.install(|| update.step(model, layout, gradient, scale, lr)));
        Ok(Applied { loss: loss / samples, accuracy: correct / samples, grad_norm, lr, samples: samples as u64 })
    }

    fn skip(&mut self) {
        self.skipped += 1;
    }

    fn skipped(&self) -> u64 {
        self.skipped
    }

    fn evaluate(&mut self) -> Result<Metrics, JobError> {
        let model = self.model.as_ref().expect("the model is only away inside apply");
        let (task, device) = (&self.task, self.device.clone().inner());
        Ok(self.pool.install(|| task.evaluate(&model.valid(), &device)))
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot::new(self.model(), &self.layout, (&self.update, self.skipped))
    }

    fn restore(&mut self, mut tensors: Vec<NamedTensor>) -> Result<(), JobError> {
        let skipped = tensors.iter().position(|tensor| tensor.name == SKIPPED).map(|at| tensors.swap_remove(at));
        let (state, weights): (Vec<_>, Vec<_>) =
            tensors.into_iter().partition(|tensor| tensor.name.starts_with("optimizer."));
        let weights = check_model(&self.layout, weights)?;
        let state = by_name(state)?;
        let state = self.update.load(&self.layout, state, &self.device.clone().inner())?;
        let model = self.model.take().expect("the model is only away inside apply");
        self.model = Some(load_model(model, weights));
        self.update.put(state);
        self.skipped = skipped.and_then(|tensor| tensor.values.first().copied()).unwrap_or(0.0) as u64;
        Ok(())
    }

    fn fingerprint(&self) -> u64 {
        fingerprint_model(self.model())
    }
}

/// PyTorch's `clip_grad_norm_`: the factor that brings a norm down to `clip`, with its 1e-6 in the divisor.
fn clip(norm: f64, clip: Option<f32>) -> f64 {
    clip.map_or(1.0, |clip| (f64::from(clip) / (norm + 1e-6)).min(1.0))
}
