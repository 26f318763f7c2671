//! The section `[train]`: how long, in what portions, and what follows from numbers that are not to be trusted. Owns its keys, defaults and checks.

use serde::{Deserialize, Serialize};

use super::THREADS_MAX;
use crate::lanes::LANES_MAX;

/// The schedule is made of every local step of a step at a time.
const LOCAL_STEPS_MAX: u32 = 10_000;

/// Samples of a step are counted in f32, where one more is one more up to here.
const SAMPLES_MAX: u64 = 1 << 24;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// Optimizer steps; or `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Passes over the training set, rounded up to whole steps; or `steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u64>,
    /// Samples in a step, over all ranks; with `diloco` in a local step. 0: left out, which jobs with `[rl]` do.
    #[serde(default)]
    pub batch: u32,
    /// Fixed slices of the batch; a rank owns whole lanes. The result depends on it, and not on the number of ranks.
    #[serde(default = "default_lanes")]
    pub lanes: u32,
    #[serde(default)]
    pub seed: u64,
    /// Each lane is computed in so many passes, to save memory.
    #[serde(default = "super::one")]
    pub accumulate: u32,
    /// Gradients are scaled down to this global norm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f32>,
    /// Compute threads a rank.
    #[serde(default = "super::one")]
    pub threads: u32,
    /// Steps between comparisons of the ranks' parameters; 0: only checkpoints and results are compared.
    #[serde(default = "every_step")]
    pub digest_every: u64,
    /// What becomes of a step whose loss or gradient is not finite.
    #[serde(default)]
    pub on_nan: OnNan,
    /// What becomes of a rank that computes more slowly than the others.
    #[serde(default)]
    pub straggler: Straggler,
    /// What lanes compute in.
    #[serde(default, skip_serializing_if = "is_default")]
    pub precision: Floats,
    /// How gradients travel between machines.
    #[serde(default, skip_serializing_if = "is_default")]
    pub wire: Wire,
    /// What each rank keeps a part of.
    #[serde(default, skip_serializing_if = "is_default")]
    pub sharding: Sharding,
    /// Several local steps in each step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diloco: Option<Diloco>,
}

/// A step of several local steps of each lane by itself (Douillard et al., "DiLoCo", 2023): the lanes' changes are summed where gradients are otherwise.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Diloco {
    pub local_steps: u32,
    /// What the lanes' mean change is multiplied by.
    #[serde(default = "default_outer_lr")]
    pub outer_lr: f64,
    /// Nesterov's.
    #[serde(default = "default_outer_momentum")]
    pub outer_momentum: f64,
}

/// What lanes compute in. Parameters, sums over lanes, the optimizer and checkpoints are f32 in any case.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Floats {
    #[default]
    F32,
    /// Forward and backward on a copy of the parameters that is rounded to it.
    Bf16,
}

/// How gradients travel between machines.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    /// As they were computed.
    #[default]
    F32,
    /// Rounded, in half the bytes; what the rounding leaves over is added to the next ones.
    Bf16,
}

/// What each rank keeps a part of, where all keep everything otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharding {
    #[default]
    None,
    /// The optimizer's state, with a copy at one other rank (ZeRO stage 1, Rajbhandari et al., 2020).
    Zero1,
}

/// What follows when a rank computes clearly more slowly than its peers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Straggler {
    /// It is told of.
    #[default]
    Report,
    /// Besides, a successor on another node takes its place, where there is room.
    Replace,
}

/// What follows a loss or gradient that is not finite (NaN or infinite).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnNan {
    /// The job fails, and says where it comes from.
    #[default]
    Fail,
    /// The step counts and changes neither parameters nor the optimizer's state.
    Skip,
    /// The job goes back to its last checkpoint, once a step.
    Rollback,
}

fn default_lanes() -> u32 {
    8
}

/// The paper's, as the next.
fn default_outer_lr() -> f64 {
    0.7
}

fn default_outer_momentum() -> f64 {
    0.9
}

/// What a spec need not say stays unsaid: older releases know no key for it.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// So no wrong parameters are ever in a sum that is applied.
fn every_step() -> u64 {
    1
}

impl Default for Train {
    fn default() -> Self {
        Self {
            steps: None,
            epochs: None,
            batch: 0,
            lanes: default_lanes(),
            seed: 0,
            accumulate: super::one(),
            clip_norm: None,
            threads: super::one(),
            digest_every: every_step(),
            on_nan: OnNan::default(),
            straggler: Straggler::default(),
            precision: Floats::default(),
            wire: Wire::default(),
            sharding: Sharding::default(),
            diloco: None,
        }
    }
}

impl Train {
    /// How many samples a step takes, over all ranks.
    pub fn samples_a_step(&self) -> u64 {
        u64::from(self.batch) * self.diloco.map_or(1, |diloco| u64::from(diloco.local_steps))
    }

    /// The key that is wrong, and what to write instead.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        let fail = |key, message| Err((key, message));
        match (self.steps, self.epochs) {
            (None, None) => {
                return fail("train", "[train] needs `steps` or `epochs`: add for example `epochs = 3`".into());
            }
            (Some(_), Some(_)) => return fail("epochs", "[train] has both `steps` and `epochs`: keep one".into()),
            (Some(0), None) => return fail("steps", "steps = 0: use at least 1".into()),
            (None, Some(0)) => return fail("epochs", "epochs = 0: use at least 1".into()),
            (Some(_), None) | (None, Some(_)) => {}
        }
        let (batch, lanes) = (self.batch, self.lanes);
        if !(1..=LANES_MAX).contains(&lanes) {
            return fail("lanes", format!("lanes = {lanes}: use 1 to {LANES_MAX}"));
        }
        if batch == 0 || !batch.is_multiple_of(lanes) {
            return fail(
                "batch",
                format!("batch = {batch} does not divide into {lanes} lanes: use a multiple of {lanes}"),
            );
        }
        let (slice, accumulate) = (batch / lanes, self.accumulate);
        if accumulate == 0 || !slice.is_multiple_of(accumulate) {
            return fail(
                "accumulate",
                format!("accumulate = {accumulate} does not divide a lane's {slice} samples: use a divisor of {slice}"),
            );
        }
        if !(1..=THREADS_MAX).contains(&self.threads) {
            return fail("threads", format!("threads = {}: use 1 to {THREADS_MAX}", self.threads));
        }
        if let Some(norm) = self.clip_norm.filter(|norm| !(norm.is_finite() && *norm > 0.0)) {
            return fail("clip_norm", format!("clip_norm = {norm}: use a positive number, or leave it out"));
        }
        let samples = self.samples_a_step();
        if samples > SAMPLES_MAX {
            let (key, what) =
                if self.diloco.is_some() { ("local_steps", "batch x local_steps") } else { ("batch", "batch") };
            return fail(key, format!("{what} = {samples}: a step has at most {SAMPLES_MAX} samples, use fewer"));
        }
        let Some(Diloco { local_steps, outer_lr, outer_momentum }) = self.diloco else { return Ok(()) };
        if !(1..=LOCAL_STEPS_MAX).contains(&local_steps) {
            return fail("local_steps", format!("local_steps = {local_steps}: use 1 to {LOCAL_STEPS_MAX}"));
        }
        if !(outer_lr.is_finite() && outer_lr > 0.0) {
            return fail("outer_lr", format!("outer_lr = {outer_lr}: use a positive number, the paper's is 0.7"));
        }
        // It is computed with as f32.
        if !(0.0..1.0).contains(&(outer_momentum as f32)) {
            let message = format!("outer_momentum = {outer_momentum}: use 0 to below 1, the paper's is 0.9");
            return fail("outer_momentum", message);
        }
        Ok(())
    }
}
