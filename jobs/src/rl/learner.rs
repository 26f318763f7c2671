//! The state of a learner that all algorithms share: weights as one flat vector, Adam's moments, and their names in checkpoints. Owns the update;
//! knows no loss. Adam as in PyTorch (`torch.optim.Adam`; Kingma and Ba, 2015), clipping as `clip_grad_norm_`.

use std::sync::Arc;

use super::error::{RlError, check_len};
use super::policy::Policy;
use crate::JobError;
use crate::train::fingerprint::Fingerprint;
use crate::train::parameters::{by_name, check_model};
use crate::train::snapshot::SKIPPED;
use crate::train::{Layout, NamedTensor, Snapshot, weights_blake3};

const BETAS: (f32, f32) = (0.9, 0.999);
const FIELDS: [&str; 2] = ["moment_1", "moment_2"];

/// How a sum of gradients becomes a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adam {
    pub epsilon: f64,
    /// Largest norm of the mean gradient.
    pub max_grad_norm: Option<f64>,
}

/// What one update did. Figures are means over its samples, in the order of the algorithm's `FIGURES`.
#[derive(Debug, Clone, PartialEq)]
pub struct Updated {
    pub figures: Vec<f64>,
    pub samples: f64,
    /// Of the mean gradient, before clipping.
    pub grad_norm: f64,
    pub lr: f64,
}

#[derive(Debug, Clone)]
pub struct Learner {
    policy: Arc<Policy>,
    adam: Adam,
    weights: Vec<f32>,
    moments: [Vec<f32>; 2],
    /// Updates that were applied: the version of the weights.
    updates: u64,
    /// Updates that were left out.
    skipped: u64,
}

impl Learner {
    pub fn new(policy: &Arc<Policy>, adam: Adam, seed: u64) -> Self {
        let zeros = vec![0.0; policy.layout().len()];
        let weights = policy.first_weights(seed);
        Self { policy: policy.clone(), adam, weights, moments: [zeros.clone(), zeros], updates: 0, skipped: 0 }
    }

    pub fn policy(&self) -> &Arc<Policy> {
        &self.policy
    }

    pub fn layout(&self) -> &Layout {
        self.policy.layout()
    }

    /// The flat vector without figures.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// Updates that were applied: the version of the weights.
    pub fn version(&self) -> u64 {
        self.updates
    }

    /// One update from the sum over all lanes: gradients, then figures, the number of samples last. A sum that is not finite is refused and changes
    /// nothing.
    pub fn apply(&mut self, sum: &[f32], lr: f64) -> Result<Updated, RlError> {
        check_len("length of the gradient sum", sum.len(), self.layout().flat_len())?;
        let (gradient, figures) = sum.split_at(self.layout().len());
        let samples = f64::from(figures[figures.len() - 1]);
        let update = self.updates;
        if figures.iter().any(|figure| !figure.is_finite()) {
            return Err(RlError::NonFinite { update, what: "the loss" });
        }
        if samples < 1.0 {
            return Err(RlError::Contract { what: "samples of an update", got: 0, expected: 1 });
        }
        let square: f64 = gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
        let grad_norm = square.sqrt() / samples;
        if !grad_norm.is_finite() {
            return Err(RlError::NonFinite { update, what: "the gradient" });
        }
        let clip = self.adam.max_grad_norm.map_or(1.0, |max| (max / (grad_norm + 1e-6)).min(1.0));
        self.step(gradient, (clip / samples) as f32, lr);
        let figures = figures[..figures.len() - 1].iter().map(|&figure| f64::from(figure) / samples).collect();
        Ok(Updated { figures, samples, grad_norm, lr })
    }

    fn step(&mut self, gradient: &[f32], scale: f32, lr: f64) {
        self.updates += 1;
        let time = self.updates.min(1 << 24) as i32;
        let correction = |beta: f32| 1.0 - f64::from(beta).powi(time);
        let rate = (lr / correction(BETAS.0)) as f32;
        let (root, epsilon) = (1.0 / correction(BETAS.1).sqrt() as f32, self.adam.epsilon as f32);
        let [first, second] = &mut self.moments;
        for (((weight, first), second), gradient) in self.weights.iter_mut().zip(first).zip(second).zip(gradient) {
            let gradient = gradient * scale;
            *first += (gradient - *first) * (1.0 - BETAS.0);
            *second = *second * BETAS.1 + gradient * gradient * (1.0 - BETAS.1);
            *weight -= rate * (*first / (second.sqrt() * root + epsilon));
        }
    }

    /// Counts an update whose sum was refused and left out.
    pub fn skip(&mut self) {
        self.skipped += 1;
    }

    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Weights as `model.<path>`, then moments as `optimizer.<path>.<field>`, as Burn's Adam has them: what the checkpoints of other jobs look like.
    pub fn snapshot(&self) -> Snapshot {
        let layout = self.layout();
        let cut = |name: String, param: &crate::train::ParamSpec, values: &[f32]| NamedTensor {
            name,
            shape: param.shape.clone(),
            values: values[param.offset..param.offset + param.len].to_vec(),
        };
        let weights = layout.params.iter().map(|param| cut(format!("model.{}", param.path), param, &self.weights));
        let mut tensors: Vec<NamedTensor> = weights.collect();
        for param in layout.params.iter().filter(|_| self.updates > 0) {
            for (field, values) in FIELDS.iter().zip(&self.moments) {
                tensors.push(cut(format!("optimizer.{}.{field}", param.path), param, values));
            }
            let (name, values) = (format!("optimizer.{}.time", param.path), vec![self.updates as f32]);
            tensors.push(NamedTensor { name, shape: vec![1], values });
        }
        Snapshot::copied(tensors, self.skipped)
    }

    /// Takes the tensors of [`Self::snapshot`]. Every name and shape is checked before anything changes.
    pub fn restore(&mut self, mut tensors: Vec<NamedTensor>) -> Result<(), RlError> {
        let layout = self.policy.layout().clone();
        let skipped = tensors.iter().position(|tensor| tensor.name == SKIPPED).map(|at| tensors.swap_remove(at));
        let (state, weights): (Vec<_>, Vec<_>) =
            tensors.into_iter().partition(|tensor| tensor.name.starts_with("optimizer."));
        let weights = check_model(&layout, weights)?;
        let mut state = by_name(state)?;
        let (mut moments, mut updates) = ([Vec::new(), Vec::new()], 0);
        let fresh = state.is_empty();
        for param in &layout.params {
            let mut take = |field: &str, shape: &[usize]| {
                let name = format!("optimizer.{}.{field}", param.path);
                let tensor = state.remove(&name);
                let found = tensor.filter(|tensor| tensor.shape == shape).map(|tensor| tensor.values);
                let problem = "missing, or of another shape: saved by another optimizer?".to_owned();
                found.ok_or(JobError::Tensor { name, problem })
            };
            for (field, moments) in FIELDS.iter().zip(&mut moments) {
                let values = if fresh { vec![0.0; param.len] } else { take(field, &param.shape)? };
                moments.extend(values);
            }
            if !fresh {
                updates = take("time", &[1])?[0] as u64;
            }
        }
        if let Some(name) = state.into_keys().next() {
            let problem = "this policy and optimizer have no such state".to_owned();
            return Err(JobError::Tensor { name, problem }.into());
        }
        self.weights = weights.into_iter().flat_map(|tensor| tensor.values).collect();
        (self.moments, self.updates) = (moments, updates);
        self.skipped = skipped.and_then(|tensor| tensor.values.first().copied()).unwrap_or(0.0) as u64;
        Ok(())
    }

    /// [`weights_blake3`] of the weights.
    pub fn weights_blake3(&self) -> [u8; 32] {
        weights_blake3(&self.snapshot().weights().expect("the weights are plain numbers"))
    }

    /// A checksum over the bits of the weights, cheap enough for every update.
    pub fn fingerprint(&self) -> u64 {
        let mut fingerprint = Fingerprint::new();
        self.layout().params.iter().for_each(|param| {
            fingerprint.add(&self.weights[param.offset..param.offset + param.len]);
        });
        fingerprint.finish()
    }
}
