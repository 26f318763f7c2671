//! The training loop's parts that all built-in trainers share: gradients of a lane, the optimizer step, saving and
//! restoring. A trainer adds data, model and loss (`Task`). It never reads files and never talks to other ranks.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};

use super::fused;
use super::local::{Local, norm};
use super::optimizer::{Rule, Schedule, Update};
use super::parameters::{
    add, add_one, by_name, check_model, check_some, fingerprint_model, gradients, gradients_early, handles, layout,
    load_model, replace,
};
use super::precision::{Floats, rounded};
use super::snapshot::SKIPPED;
use super::{Applied, LaneWork, Layout, Metrics, NamedTensor, ParamSpec, Plan, STATS, Snapshot, Train};
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

    /// Whether a parameter, by its dotted path, is used by one layer of this crate alone: its gradient is whole when that layer has computed it, and may travel
    /// while those of earlier layers are computed.
    fn is_used_once(&self, _path: &str) -> bool {
        false
    }

    /// Whether `loss` computes in what the model's parameters are, for specs with `[train] precision = "bf16"`: then it is given a copy in bf16, and casts what
    /// it makes of the data to that ([`super::layers::Linear`] does). Sums of many values, a softmax and the loss are computed in f32 ([`cross_entropy`] does).
    fn computes_in_bf16(&self) -> bool {
        false
    }

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
    /// What sums over the lanes are applied by.
    update: Update,
    course: Course,
    /// What that is made of: rates, and the spec's update rule.
    given: (ScheduleConfig, Rule),
    plan: Plan,
    skipped: u64,
    pool: rayon::ThreadPool,
}

/// What the lanes do in a step.
enum Course {
    /// Each computes gradients, once.
    Gradients(Schedule),
    Local(Local),
}

impl Course {
    fn new((rates, rule): &(ScheduleConfig, Rule), plan: &Plan) -> Result<Self, JobError> {
        let bad = |problem| JobError::Config { line: 1, problem, mend: "mend [schedule] or [train]".to_owned() };
        Ok(match plan.diloco {
            None => Self::Gradients(Schedule::new(rates, plan.steps).map_err(bad)?),
            Some(diloco) => Self::Local(Local::new(diloco, rule.clone(), rates, plan.steps).map_err(bad)?),
        })
    }
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
        let rule = plan.diloco.map_or_else(|| optimizer.rule(), |diloco| diloco.outer());
        let update = Update::new(rule, &layout);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(plan.threads.max(1))
            .thread_name(|index| format!("compute-{index}"))
            .build()
            .map_err(|error| JobError::Threads { threads: plan.threads, problem: error.to_string() })?;
        let given = (schedule.clone(), optimizer.rule());
        let course = Course::new(&given, &plan)?;
        Ok(Engine { task, model: Some(model), device, layout, update, course, given, plan, skipped: 0, pool })
    }

    fn model(&self) -> &T::Model {
        self.model.as_ref().expect("the model is only away inside apply")
    }
}

/// Gradients summed over samples, in layout order, in passes of so many; with loss, right answers and samples.
fn gradients_of<T: Task>(
    (task, model): (&T, &T::Model),
    layout: &Layout,
    (samples, size): (&[u64], usize),
    device: &Device,
) -> (Vec<TensorData>, [f32; STATS]) {
    let mut total: Vec<TensorData> = Vec::new();
    let mut stats = [0f32; STATS];
    for part in samples.chunks(size) {
        let loss = task.loss(model, part, device);
        add_stats(&mut stats, &loss, part);
        let gradients = gradients(model, layout, loss.sum);
        if total.is_empty() {
            total = gradients;
        } else {
            add(&mut total, &gradients);
        }
    }
    (total, stats)
}

/// Adds the figures of these samples.
fn add_stats(stats: &mut [f32; STATS], loss: &Loss, samples: &[u64]) {
    let sum = loss.sum.clone().inner().into_scalar::<f32>();
    let of_samples = [sum, loss.correct, samples.len() as f32];
    stats.iter_mut().zip(of_samples).for_each(|(total, part)| *total += part);
}

impl<T: Task> Engine<T> {
    /// Gives each gradient of the lane's samples when it is whole: the last pass gives those of the last layers while it computes the others. The figures.
    fn stream(&self, samples: &[u64], sink: &mut dyn FnMut(usize, &[f32])) -> [f32; STATS] {
        assert_eq!(self.plan.precision, Floats::F32, "a lane in bf16 computes on a copy");
        let size = samples.len().div_ceil(self.plan.accumulate.max(1));
        let (before, last) = samples.split_at((samples.len() - 1) / size * size);
        let (task, model, device, layout) = (&self.task, self.model(), &self.device, &*self.layout);
        let (mut total, mut stats) = self.pool.install(|| gradients_of((task, model), layout, (before, size), device));
        let (out, gradients): (_, Receiver<(usize, TensorData)>) = channel();
        self.pool.in_place_scope(|scope| {
            let stats = &mut stats;
            scope.spawn(move |_| {
                let loss = task.loss(model, last, device);
                add_stats(stats, &loss, last);
                gradients_early(model, layout, loss.sum, |path| task.is_used_once(path), out);
            });
            for (place, gradient) in gradients {
                let whole = match total.get_mut(place) {
                    Some(before) => {
                        add_one(before, &gradient);
                        &*before
                    }
                    None => &gradient,
                };
                sink(layout.params[place].offset, whole.as_slice::<f32>().expect("gradients are f32"));
            }
        });
        stats
    }
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
        self.plan.steps = steps;
        self.course = Course::new(&self.given, &self.plan)?;
        Ok(true)
    }

    fn steps_locally(&self) -> bool {
        true
    }

    fn gives_early(&self) -> bool {
        let is_used_once = |param: &ParamSpec| self.task.is_used_once(&param.path);
        // Layers of ours compute in f32.
        let streams = matches!(self.course, Course::Gradients(_)) && self.plan.precision == Floats::F32;
        streams && self.layout.params.iter().any(is_used_once)
    }

    fn computes_in_bf16(&self) -> bool {
        self.task.computes_in_bf16()
    }

    fn lane(&mut self, work: LaneWork<'_>, sink: &mut dyn FnMut(usize, &[f32])) -> Result<(), JobError> {
        let size = self.task.samples();
        if work.samples.is_empty() {
            return Err(JobError::Contract { what: "samples of a lane", got: 0, expected: 1 });
        }
        if let Some(&index) = work.samples.iter().find(|&&index| index >= size) {
            return Err(JobError::Contract { what: "sample index below the set's size", got: index, expected: size });
        }
        if work.early && self.gives_early() {
            let stats = self.stream(work.samples, sink);
            sink(self.layout.len(), &stats);
            return Ok(());
        }
        let (task, device, layout, plan) = (&self.task, &self.device, &self.layout, &self.plan);
        let model = self.model.as_ref().expect("the model is only away inside apply");
        let of = |model: &T::Model, samples: &[u64]| {
            let size = samples.len().div_ceil(plan.accumulate.max(1));
            let copy = (plan.precision == Floats::Bf16).then(|| rounded(model));
            gradients_of((task, copy.as_ref().unwrap_or(model)), layout, (samples, size), device)
        };
        let stats = match &mut self.course {
            Course::Gradients(_) => {
                let (gradients, stats) = self.pool.install(|| of(model, work.samples));
                for (param, gradient) in layout.params.iter().zip(&gradients) {
                    sink(param.offset, gradient.as_slice::<f32>().expect("gradients are f32"));
                }
                stats
            }
            Course::Local(local) => {
                local.begin(work.step).map_err(bad_schedule)?;
                let clip = |norm| clip(norm, plan.clip_norm);
                let (changes, stats) = self.pool.install(|| local.change((model, layout), work, of, clip))?;
                layout.params.iter().zip(&changes).for_each(|(param, change)| sink(param.offset, change));
                stats
            }
        };
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
        let parts = match self.course {
            Course::Gradients(_) => samples,
            Course::Local(_) => self.plan.lanes as f64,
        };
        let grad_norm = norm(gradient) / parts;
        if !grad_norm.is_finite() {
            return Err(JobError::NonFinite { step, what: "the gradient" });
        }
        let (clipped, rate, lr) = match &mut self.course {
            Course::Gradients(schedule) => {
                let rate = schedule.rate(step).map_err(bad_schedule)?;
                (clip(grad_norm, self.plan.clip_norm), rate, rate)
            }
            Course::Local(local) => (1.0, local.outer_lr(), local.begin(step).map_err(bad_schedule)?),
        };
        let scale = (clipped / parts) as f32;
        let model = self.model.take().expect("the model is only away inside apply");
        let (update, layout) = (&mut self.update, &self.layout);
        self.model = Some(self.pool.install(|| update.step(model, layout, gradient, scale, rate)));
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
        let keeps = |place| self.update.keeps(place);
        let state = self.update.load(&self.layout, state, &self.device.clone().inner(), keeps)?;
        let model = self.model.take().expect("the model is only away inside apply");
        self.model = Some(load_model(model, weights));
        self.update.put(state);
        self.skipped = skipped.and_then(|tensor| tensor.values.first().copied()).unwrap_or(0.0) as u64;
        Ok(())
    }

    fn shares_state(&self) -> bool {
        true
    }

    fn keep(&mut self, places: &[usize]) {
        self.update.keep(places);
    }

    fn parameters(&self, places: &[usize], see: &mut dyn FnMut(usize, &[f32])) {
        let handles = handles(self.model());
        for place in places {
            let data = handles[*place].clone().into_data();
            see(*place, data.as_slice().expect("parameters are f32"));
        }
    }

    fn set_parameters<'a>(&mut self, values: &mut dyn FnMut(usize) -> Option<&'a [f32]>) {
        let model = self.model.take().expect("the model is only away inside apply");
        let params = &self.layout.params;
        let of = |place: usize| Some(TensorData::new(values(place)?.to_vec(), params[place].shape.clone()));
        self.model = Some(replace(model, of));
    }

    fn take_part(&mut self, mut tensors: Vec<NamedTensor>) -> Result<(), JobError> {
        let skipped =
            tensors.iter().find(|tensor| tensor.name == SKIPPED).and_then(|tensor| tensor.values.first().copied());
        tensors.retain(|tensor| tensor.name != SKIPPED);
        let (state, weights): (Vec<_>, Vec<_>) =
            tensors.into_iter().partition(|tensor| tensor.name.starts_with("optimizer."));
        let mut weights = check_some(&self.layout, weights)?;
        let given: Vec<bool> = weights.iter().map(Option::is_some).collect();
        let is_given = |place: usize| given[place];
        let state = self.update.load(&self.layout, by_name(state)?, &self.device.clone().inner(), is_given)?;
        self.update.put_some(state, is_given);
        let model = self.model.take().expect("the model is only away inside apply");
        let of = |place: usize| weights[place].take().map(|tensor| TensorData::new(tensor.values, tensor.shape));
        self.model = Some(replace(model, of));
        self.skipped = self.skipped.max(skipped.unwrap_or(0.0) as u64);
        Ok(())
    }

    fn fingerprint(&self) -> u64 {
        fingerprint_model(self.model())
    }
}

fn bad_schedule(problem: String) -> JobError {
    JobError::Config { line: 1, problem, mend: "mend [schedule]".to_owned() }
}

/// PyTorch's `clip_grad_norm_`: the factor that brings a norm down to `clip`, with its 1e-6 in the divisor.
fn clip(norm: f64, clip: Option<f32>) -> f64 {
    clip.map_or(1.0, |clip| (f64::from(clip) / (norm + 1e-6)).min(1.0))
}

#[cfg(test)]
mod tests {
    use burn::module::Param;

    use super::super::layers::Init;
    use super::*;

    /// A line through points on another one, of which only the slope learns.
    struct Line;

    #[derive(Module, Debug)]
    struct Slope {
        slope: Param<Tensor<1>>,
        offset: Param<Tensor<1>>,
    }

    impl Task for Line {
        type Model = Slope;

        fn samples(&self) -> u64 {
            8
        }

        fn loss(&self, model: &Slope, samples: &[u64], device: &Device) -> Loss {
            let x: Vec<f32> = samples.iter().map(|sample| *sample as f32).collect();
            let x = Tensor::<1>::from_data(TensorData::new(x, [samples.len()]), device);
            let off = x.clone() * model.slope.val() + model.offset.val() - x * 3.0;
            Loss { sum: off.powi_scalar(2).sum(), correct: 0.0 }
        }

        fn evaluate(&self, _: &Slope, _: &Device) -> Metrics {
            Metrics::new()
        }
    }

    fn engine() -> Engine<Line> {
        let device = crate::device().autodiff();
        let init = Init::new(1, &device);
        let offset = init.constant([1], 2.0).map(|tensor| tensor.set_require_grad(false));
        let model = Slope { slope: init.constant([1], 1.0), offset };
        let plan = Plan {
            seed: 1,
            batch: 8,
            lanes: 1,
            steps: 20,
            accumulate: 1,
            threads: 1,
            clip_norm: None,
            precision: Floats::F32,
            diloco: None,
        };
        let optimizer: OptimizerConfig = toml::from_str("name = 'adamw'\nweight_decay = 0.5").expect("a good section");
        let schedule: ScheduleConfig = toml::from_str("lr = 0.1").expect("a good section");
        Engine::new(Line, model, device, plan, (&optimizer, &schedule)).expect("a good plan")
    }

    fn step(engine: &mut Engine<Line>, step: u64) {
        let mut sum = vec![0.0; engine.layout().flat_len()];
        let samples: Vec<u64> = (0..8).collect();
        let work = LaneWork::new(step, 0, &samples);
        engine.lane(work, &mut |at, values| sum[at..at + values.len()].copy_from_slice(values)).expect("a lane");
        assert_eq!(sum[1], 0.0, "it has no gradient");
        engine.apply(step, &sum).expect("a finite step");
    }

    #[test]
    fn what_does_not_learn_stays_as_it_is_also_after_a_restore() {
        let mut whole = engine();
        (0..4).for_each(|at| step(&mut whole, at));
        let saved = whole.snapshot().tensors().expect("a state");
        let value = |name: &str| saved.iter().find(|tensor| tensor.name == name).expect("it is there").values[0];
        assert_eq!(value("model.offset"), 2.0);
        assert!(value("model.slope") > 1.0);
        let has_state = |of: &str| saved.iter().any(|tensor| tensor.name.starts_with(&format!("optimizer.{of}")));
        assert!(has_state("slope") && !has_state("offset"));
        let mut restored = engine();
        restored.restore(saved).expect("its own state");
        for engine in [&mut whole, &mut restored] {
            step(engine, 4);
        }
        assert_eq!(whole.fingerprint(), restored.fingerprint());
    }
}
