//! The training interface: what a rank asks of a trainer, and the registry of built-in trainers.
//!
//! A step is: `lane` for each lane that the rank owns, a tree sum of the flat gradient vectors over all lanes (the
//! caller's), then `apply` with the same sum on every rank. Everything here is a function of (spec, seed, step, lane):
//! the same call gives the same bits in any process on the same kind of device.

mod digits;
mod domains;
mod engine;
pub(crate) mod fingerprint;
mod fused;
mod language;
pub mod layers;
mod local;
mod metrics;
pub(crate) mod optimizer;
pub(crate) mod parameters;
mod precision;
mod pytorch;
pub(crate) mod snapshot;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use self::fingerprint::Fingerprint;
use self::pytorch::Kind;
pub use engine::{Engine, Loss, Task, cross_entropy};
pub(crate) use language::digest as files_blake3;
pub use precision::Floats;
pub use snapshot::{Snapshot, weights_blake3};

use crate::config::Spec;
use crate::{JobError, data, rl};

/// Figures at the tail of the flat vector, summed over lanes as the gradients are: loss sum, correct predictions, samples.
pub const STATS: usize = 3;

/// Held-out figures by name, e.g. `accuracy`, `roc_auc`.
pub type Metrics = BTreeMap<String, f64>;

/// One parameter in the flat vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamSpec {
    /// Dotted path in the model, e.g. `head.hidden.weight`.
    pub path: String,
    pub shape: Vec<usize>,
    /// First element in the flat vector.
    pub offset: usize,
    /// Elements.
    pub len: usize,
    /// Whether training changes it.
    pub learns: bool,
}

/// Names, shapes and offsets of the parameters in the flat vector, in the model's visit order: equal on every rank.
/// The flat vector is `len()` gradients followed by `figures` figures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pub params: Vec<ParamSpec>,
    /// Figures that are summed with the gradients; the last of them is the number of samples. [`STATS`] of those trainers that have data.
    pub figures: usize,
}

impl Layout {
    /// Parameter elements, without the figures.
    pub fn len(&self) -> usize {
        self.params.last().map_or(0, |last| last.offset + last.len)
    }

    pub fn is_empty(&self) -> bool {
        self.params.is_empty()
    }

    /// Elements of the flat vector: parameters, then figures.
    pub fn flat_len(&self) -> usize {
        self.len() + self.figures
    }

    /// The parameter, by place, whose optimizer's state a saved tensor of this name is a part of.
    pub fn place_of_state(&self, name: &str) -> Option<usize> {
        let rest = name.strip_prefix("optimizer.")?;
        let is_of = |path: &str| rest.strip_prefix(path).is_some_and(|field| field.starts_with('.'));
        self.params.iter().position(|param| is_of(&param.path))
    }

    /// Where the number of samples stands: the last of the figures.
    pub fn samples_at(&self) -> usize {
        self.flat_len() - 1
    }
}

/// How to train: the part of the job's `[train]` section that decides the numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub seed: u64,
    /// Samples of a step, over all lanes. With `diloco` those of all its local steps.
    pub batch: usize,
    pub lanes: usize,
    /// Steps of the whole job: the schedule's length.
    pub steps: u64,
    /// Micro-batches that a lane is cut into, to bound memory. 1 = the lane at once.
    pub accumulate: usize,
    /// Compute threads of this rank. 1 is fastest a core on CPU.
    pub threads: usize,
    /// Largest global gradient norm (of the mean gradient); larger ones are scaled down to it. With `diloco` that of each local step.
    pub clip_norm: Option<f32>,
    /// What lanes compute in; [`Train::computes_in_bf16`] says whether they can.
    pub precision: Floats,
    /// None: the lanes' gradients are summed.
    pub diloco: Option<Diloco>,
}

/// A step of several local steps: each lane trains by itself, and what that has changed is summed over the lanes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Diloco {
    /// At least 1.
    pub local_steps: u32,
    /// What the lanes' mean change is multiplied by.
    pub outer_lr: f64,
    /// Nesterov's; 0: none.
    pub outer_momentum: f64,
}

impl Plan {
    /// Positions of the sample order that one lane takes at one step: its contiguous part of the global batch. Lanes differ by at most one
    /// sample when `batch` is no multiple of `lanes`.
    pub fn lane_positions(&self, step: u64, lane: u32) -> Range<u64> {
        let (batch, lanes, lane) = (self.batch as u64, self.lanes as u64, u64::from(lane));
        let first = step * batch;
        first + lane * batch / lanes..first + (lane + 1) * batch / lanes
    }

    /// Dataset indices at these positions, in order. `samples` is [`Train::samples`].
    pub fn samples_at(&self, samples: u64, positions: Range<u64>) -> Vec<u64> {
        positions.map(|cursor| crate::order(self.seed, samples, cursor)).collect()
    }

    /// Dataset indices of one lane at one step.
    pub fn lane_samples(&self, samples: u64, step: u64, lane: u32) -> Vec<u64> {
        self.samples_at(samples, self.lane_positions(step, lane))
    }
}

/// What one lane computes at one step.
#[derive(Debug, Clone, Copy)]
pub struct LaneWork<'a> {
    /// Steps applied before this one: the first step is 0.
    pub step: u64,
    pub lane: u32,
    /// Dataset indices, each below [`Train::samples`]. At least one.
    pub samples: &'a [u64],
    /// Of a lane that takes long.
    pub pulse: Pulse<'a>,
    /// Values travel on as soon as they are given: it pays to give each when it is known ([`Train::gives_early`]).
    pub early: bool,
}

/// Asked between two parts of long work: whether it is still wanted. Whoever asks gets on, and does not hang.
#[derive(Clone, Copy, Default)]
pub struct Pulse<'a>(Option<&'a (dyn Fn() -> bool + Sync)>);

impl<'a> LaneWork<'a> {
    /// Of a caller who waits for it to its end.
    pub fn new(step: u64, lane: u32, samples: &'a [u64]) -> Self {
        Self { step, lane, samples, pulse: Pulse::default(), early: false }
    }
}

impl<'a> Pulse<'a> {
    pub fn new(ask: &'a (dyn Fn() -> bool + Sync)) -> Self {
        Self(Some(ask))
    }

    /// [`JobError::GivenUp`] where the work is not wanted any more: pass it on.
    pub fn check(&self) -> Result<(), JobError> {
        self.0.is_none_or(|ask| ask()).then_some(()).ok_or(JobError::GivenUp)
    }
}

impl std::fmt::Debug for Pulse<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pulse")
    }
}

/// What a step did. `loss` and `accuracy` are means over the step's samples, before the update; accuracy is NaN where there is none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Applied {
    pub loss: f64,
    pub accuracy: f64,
    /// Norm of the mean gradient, before clipping.
    pub grad_norm: f64,
    /// Learning rate of this step.
    pub lr: f64,
    pub samples: u64,
}

/// How reinforcement learning goes, for reports. None: not known yet, or no figure of the algorithm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RlProgress {
    pub round: u64,
    pub rounds: u64,
    /// Of all envs together.
    pub env_steps: u64,
    pub episodes: u64,
    /// Mean over the last hundred episodes.
    pub episode_return: Option<f32>,
    pub explained_variance: Option<f32>,
    pub approx_kl: Option<f32>,
    pub entropy: Option<f32>,
    /// Updates that trajectories were behind.
    pub lag: Option<f32>,
    pub environment_failures: u64,
    /// That gave something else when the episode's actions were played again.
    pub environment_strays: u64,
    /// Rounds of lanes that this rank has played, and that others have for it.
    pub played_here: u64,
    pub played_elsewhere: u64,
    pub broadcast: Broadcast,
}

/// How weights got to those who play.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Broadcast {
    /// That this rank has sent.
    pub bytes: u64,
    /// From the beginning of a round until all had its weights, in the last round in which that was so.
    pub seconds: Option<f32>,
}

/// A named f32 tensor of a checkpoint: `model.<path>` or `optimizer.<path>.<field>`.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// One rank's trainer. Not thread-safe by design: one actor owns it.
///
/// [`Engine`] is one for any model on Burn, from a [`Task`]: data, model and loss. Whoever implements this trait by themselves keeps its contract:
///
/// - *The same bits anywhere.* What `lane` gives is a function of the spec, the seed, the state, the step and the lane, and of nothing else: not of the rank,
///   the world size, the time, or what was called before. Random numbers (dropout, augmentation) come from a generator that is keyed by (seed, step,
///   lane) for that one call. The same lane is computed again, elsewhere, when a rank dies.
/// - *`apply` is the only thing that changes the state*, apart from `restore` and `skip`: equally on every rank, because every rank is given the same sum.
/// - *`save` is all there is.* A rank that joins is given the tensors of another, and must give the same bits from then on.
pub trait Train: Send {
    fn layout(&self) -> &Layout;

    /// Size of the training set; sample indices are below it.
    fn samples(&self) -> u64;

    /// Takes another length of the job than the plan's, before the first step: one that follows from [`Train::samples`]. False: it cannot, and is loaded anew.
    fn set_steps(&mut self, _steps: u64) -> Result<bool, JobError> {
        Ok(false)
    }

    /// Whether it makes local steps where the plan says so ([`Plan::diloco`]): `lane` gives what they have changed, and `apply` takes the mean of it.
    fn steps_locally(&self) -> bool {
        false
    }

    /// Whether `lane` gives values long before all of them are known, where that is wanted ([`LaneWork::early`]): the last gradients of the layout first, as backward
    /// computes them. Equal on every rank of a job.
    fn gives_early(&self) -> bool {
        false
    }

    /// Whether lanes compute in bf16 where the plan says so ([`Plan::precision`]). What they give, and the state, are f32 in any case.
    fn computes_in_bf16(&self) -> bool {
        false
    }

    /// Gradient *sum* (not mean) over the lane's samples, given to `sink` as (offset, values) pieces that together cover
    /// the flat vector exactly once. Pieces borrow the backend's own buffers: copy or send them inside the call.
    fn lane(&mut self, work: LaneWork<'_>, sink: &mut dyn FnMut(usize, &[f32])) -> Result<(), JobError>;

    /// One optimizer step from the complete sum over all lanes (`flat_len` elements): divides by the samples counted in
    /// its tail, clips by global norm, steps at the schedule's rate for `step` (0 = first).
    /// A sum that is not finite is refused with the step, and changes nothing.
    fn apply(&mut self, step: u64, sum: &[f32]) -> Result<Applied, JobError>;

    /// Counts a step whose sum was refused and left out. The state remembers how many there were.
    fn skip(&mut self);

    /// Steps that were left out.
    fn skipped(&self) -> u64;

    /// Metrics on the held-out data.
    fn evaluate(&mut self) -> Result<Metrics, JobError>;

    /// Parameters and optimizer state as they are now; later steps do not change it.
    fn snapshot(&self) -> Snapshot;

    /// The same as plain numbers.
    fn save(&self) -> Result<Vec<NamedTensor>, JobError> {
        self.snapshot().tensors()
    }

    /// Why a checkpoint of the job with this spec cannot be continued: beside the `[train]` section, which others compare.
    fn continues(&self, _config_toml: &str) -> Result<(), String> {
        Ok(())
    }

    /// Takes the state of [`Train::save`]. Every name and shape is checked before anything changes.
    fn restore(&mut self, tensors: Vec<NamedTensor>) -> Result<(), JobError>;

    /// [`weights_blake3()`] of the parameters.
    fn weights_blake3(&self) -> [u8; 32] {
        weights_blake3(&self.snapshot().weights().expect("parameters are f32"))
    }

    /// Before the lanes of a step are asked for: what can be done meanwhile elsewhere is begun.
    fn prepare(&mut self, _step: u64, _lanes: Range<u32>) -> Result<(), JobError> {
        Ok(())
    }

    /// Others who play lanes, of reinforcement learning.
    fn play_elsewhere(&mut self, _rollouts: Box<dyn rl::Rollouts>) {}

    /// Of reinforcement learning.
    fn rl(&self) -> Option<RlProgress> {
        None
    }

    /// Whether it can do with the optimizer's state of some parameters (ZeRO stage 1), by the four that follow. Elementwise rules can.
    fn shares_state(&self) -> bool {
        false
    }

    /// Keeps the optimizer's state of the parameters at these places of the layout, ascending, and of no others: from now on `apply` changes these alone, `snapshot` has
    /// only theirs beside all parameters, and `restore` passes that of others over.
    fn keep(&mut self, _places: &[usize]) {
        unreachable!("it keeps the whole state");
    }

    /// Shows the values of the parameters at these places.
    fn parameters(&self, _places: &[usize], _see: &mut dyn FnMut(usize, &[f32])) {
        unreachable!("it keeps the whole state");
    }

    /// Takes the values of parameters that others have changed, by place; None: its own are right.
    fn set_parameters<'a>(&mut self, _values: &mut dyn FnMut(usize) -> Option<&'a [f32]>) {
        unreachable!("it keeps the whole state");
    }

    /// Takes parts of the state ([`Snapshot::part`]): these parameters, and the optimizer's state of them, beside what it has. Every name and shape is checked before
    /// anything changes.
    fn take_part(&mut self, _tensors: Vec<NamedTensor>) -> Result<(), JobError> {
        unreachable!("it keeps the whole state");
    }

    /// A checksum over the bits of the parameters in layout order, cheap enough for every step: equal on replicas that are
    /// equal.
    fn fingerprint(&self) -> u64;
}

/// The same over a saved state, names left out.
pub fn fingerprint(tensors: &[NamedTensor]) -> u64 {
    let mut fingerprint = Fingerprint::new();
    tensors.iter().for_each(|tensor| fingerprint.add(&tensor.values));
    fingerprint.finish()
}

/// A trained classifier's answer for one line.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    pub label: String,
    /// Probability of each label, largest first.
    pub scores: Vec<(String, f32)>,
}

/// A trained classifier, for lines of text.
pub trait Predict: Send {
    /// An answer for each line in order, or what is wrong with the line.
    fn predict(&mut self, lines: &[&str]) -> Vec<Result<Prediction, String>>;
}

/// Names of the built-in trainers.
pub const TRAINERS: [&str; 4] = ["domains", "digits", "language", "rl"];

/// Reads the spec's `[data] [model] [optimizer] [schedule]`, or `[rl]`, loads the data and builds the model of `trainer`.
pub fn load(config_toml: &str, trainer: &str, plan: Plan) -> Result<Box<dyn Train>, JobError> {
    let spec = Spec::new(config_toml);
    match trainer {
        "domains" => domains::load(&spec, plan),
        "digits" => digits::load(&spec, plan),
        "language" => language::load(&spec, plan),
        "rl" => rl::load(config_toml, &plan),
        unknown => Err(spec.unknown_trainer(unknown, &TRAINERS)),
    }
}

/// Validates `[data] [model] [optimizer] [schedule]` without touching the data, or `[rl]` as far as that needs no Python. `lanes` is of the whole job.
pub fn check(config_toml: &str, trainer: &str, lanes: u32) -> Result<(), JobError> {
    let spec = Spec::new(config_toml);
    match trainer {
        "domains" => domains::sections(&spec).map(drop),
        "digits" => digits::sections(&spec).map(drop),
        "language" => language::sections(&spec).map(drop),
        "rl" => rl::check(config_toml, lanes),
        unknown => Err(spec.unknown_trainer(unknown, &TRAINERS)),
    }
}

/// Whether the files that `[data]` and `[model]` name are there and can be read. Looks at no row.
pub fn check_files(config_toml: &str) -> Result<(), JobError> {
    let spec = Spec::new(config_toml);
    // What is in them, a program knows that reads them by itself.
    let check = if spec.has_program() { data::check_readable } else { data::check_file };
    if spec.is_from_folder() {
        language::check_from(&spec)?;
    }
    spec.data_paths()?.iter().try_for_each(|path| check(path))
}

/// A classifier from a checkpoint's `model.*` tensors (others are passed over).
pub fn classifier(
    config_toml: &str,
    trainer: &str,
    mut tensors: Vec<NamedTensor>,
) -> Result<Box<dyn Predict>, JobError> {
    tensors.retain(|tensor| tensor.name.starts_with("model."));
    let spec = Spec::new(config_toml);
    match trainer {
        _ if spec.has_program() => Err(spec.of_program(trainer)),
        "domains" => domains::classifier(&spec, tensors),
        "digits" => digits::classifier(&spec, tensors),
        "language" => Err(spec.no_labels()),
        "rl" => Err(spec.no_classifier()),
        unknown => Err(spec.unknown_trainer(unknown, &TRAINERS)),
    }
}

/// A checkpoint's `model.*` tensors (others are passed over) under the names and in the layouts of a plain PyTorch module: the `Net` of
/// `jobs/reference/<trainer>.py`. Those of a program of the user's own stay as its model has them.
pub fn pytorch(config_toml: &str, trainer: &str, mut tensors: Vec<NamedTensor>) -> Result<Vec<NamedTensor>, JobError> {
    tensors.retain(|tensor| tensor.name.starts_with("model."));
    let spec = Spec::new(config_toml);
    match trainer {
        _ if spec.has_program() => {
            Ok(tensors.into_iter().map(|tensor| pytorch::to_pytorch(tensor, &Kind::Plain)).collect())
        }
        "domains" => domains::pytorch(&spec, tensors),
        "digits" => digits::pytorch(&spec, tensors),
        "language" => language::pytorch(&spec, tensors),
        "rl" => Err(spec.no_classifier()),
        unknown => Err(spec.unknown_trainer(unknown, &TRAINERS)),
    }
}

/// The files beside those weights that make a folder that others open: name and bytes. None: the weights alone are what is exported.
pub fn export_files(config_toml: &str, trainer: &str) -> Result<Vec<(PathBuf, Vec<u8>)>, JobError> {
    let spec = Spec::new(config_toml);
    match trainer {
        "language" if !spec.has_program() => language::folder(&spec),
        _ => Ok(Vec::new()),
    }
}

/// Answers of a model that takes batches, in the order of the lines: `forward` sees only what could be read.
fn answers<T>(
    read: Vec<Result<T, String>>,
    batch: usize,
    forward: impl FnMut(&[T]) -> Vec<Prediction>,
) -> Vec<Result<Prediction, String>> {
    let (mut good, mut problems) = (Vec::new(), Vec::new());
    for line in read {
        match line {
            Ok(line) => {
                good.push(line);
                problems.push(None);
            }
            Err(problem) => problems.push(Some(problem)),
        }
    }
    let mut predictions = good.chunks(batch).flat_map(forward);
    let answer = |problem: Option<String>| match problem {
        None => Ok(predictions.next().expect("a prediction for each line that was read")),
        Some(problem) => Err(problem),
    };
    problems.into_iter().map(answer).collect()
}

/// The labels with the softmax of a row of logits, most probable first.
fn prediction(labels: &[String], logits: &[f32]) -> Prediction {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = logits.iter().map(|logit| (logit - max).exp()).collect();
    let total: f32 = weights.iter().sum();
    let mut scores: Vec<(String, f32)> =
        labels.iter().cloned().zip(weights.into_iter().map(|weight| weight / total)).collect();
    scores.sort_by(|a, b| b.1.total_cmp(&a.1));
    Prediction { label: scores[0].0.clone(), scores }
}
