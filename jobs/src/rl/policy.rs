//! What a policy is: its networks in one flat vector of weights, their first values, and the distribution of actions that an output stands for.
//! Shapes as in CleanRL (Huang et al., 2022: `ppo.py`, `ppo_continuous_action.py`, `dqn.py`): actor and critic are networks of their own, the standard
//! deviation of a continuous action does not depend on the state.

use std::sync::Arc;

use super::cells::{Cells, INPUTS};
use super::draws::{Draws, Stream};
use super::error::RlError;
use super::math::{exp, ln};
use super::net::{Activation, BLOCK, Mlp};
use super::{EnvError, EnvSpec, Space};
use crate::train::{Layout, ParamSpec};

/// Which networks there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyKind {
    /// An actor (logits or means) and a critic (value of the state), tanh between layers.
    ActorCritic,
    /// The value of each action, relu between layers. Choices only.
    Q,
}

/// A policy without its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    kind: PolicyKind,
    env: String,
    observation: usize,
    action: Space,
    /// The actor judges each cell by itself, the critic their means.
    cells: Option<Cells>,
    pub(crate) actor: Mlp,
    /// None: the actor's outputs are values.
    pub(crate) critic: Option<Mlp>,
    /// Where the logarithms of the standard deviations stand; of boxes only.
    pub(crate) log_std: Option<usize>,
    layout: Arc<Layout>,
}

impl Policy {
    /// Actor, standard deviations, critic follow each other in the flat vector; `figures` are those of the algorithm.
    pub fn new(kind: PolicyKind, env: &EnvSpec, hidden: &[usize], figures: usize) -> Result<Self, RlError> {
        let discrete = matches!(env.action, Space::Discrete { .. });
        if kind == PolicyKind::Q && !discrete {
            let problem = "DQN needs an environment whose actions are choices".to_owned();
            return Err(EnvError::Options { name: env.name.clone(), problem }.into());
        }
        let cells = env.cells.clone().filter(|_| kind == PolicyKind::ActorCritic);
        let sizes = |inputs: usize, outputs: usize| [&[inputs], hidden, &[outputs]].concat();
        let len = env.observation_len();
        let (actor_sizes, critic_sizes) = match &cells {
            Some(cells) => (sizes(INPUTS, 1), sizes(cells.whole_inputs(), 1)),
            None => (sizes(len, env.action.len()), sizes(len, 1)),
        };
        let activation = if kind == PolicyKind::Q { Activation::Relu } else { Activation::Tanh };
        let mut params: Vec<ParamSpec> = Vec::new();
        let actor = Mlp::new(&actor_sizes, activation, 0);
        push_layers(&mut params, &actor, if kind == PolicyKind::Q { "q" } else { "actor" });
        let mut end = actor.len();
        let log_std = (!discrete).then_some(end);
        if let Some(offset) = log_std {
            let len = env.action.len();
            params.push(ParamSpec { path: "log_std".to_owned(), shape: vec![len], offset, len, learns: true });
            end += len;
        }
        let critic = (kind == PolicyKind::ActorCritic).then(|| Mlp::new(&critic_sizes, activation, end));
        if let Some(critic) = &critic {
            push_layers(&mut params, critic, "critic");
        }
        let (observation, action) = (env.observation_len(), env.action.clone());
        let layout = Arc::new(Layout { params, figures });
        Ok(Self { kind, env: env.name.clone(), observation, action, cells, actor, critic, log_std, layout })
    }

    pub fn kind(&self) -> PolicyKind {
        self.kind
    }

    /// Names and places of the weights in the flat vector.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Numbers of an observation.
    pub fn observation_len(&self) -> usize {
        self.observation
    }

    /// Outputs of the actor for an observation.
    pub(crate) fn width(&self) -> usize {
        self.action.len()
    }

    /// What the actor sees of observations: they themselves, or what is written to `room`.
    pub(crate) fn actor_input<'a>(&self, observations: &'a [f32], room: &'a mut Vec<f32>) -> &'a [f32] {
        let Some(cells) = &self.cells else { return observations };
        room.clear();
        cells.expand(observations, room);
        room
    }

    /// The same of the critic.
    pub(crate) fn critic_input<'a>(&self, observations: &'a [f32], room: &'a mut Vec<f32>) -> &'a [f32] {
        let Some(cells) = &self.cells else { return observations };
        room.clear();
        cells.pool(observations, room);
        room
    }

    pub(crate) fn cells(&self) -> Option<&Cells> {
        self.cells.as_ref()
    }

    /// Rows that are computed at once.
    pub(crate) fn block(&self) -> usize {
        self.cells.as_ref().map_or(BLOCK, |cells| (8 * BLOCK / cells.len()).max(1))
    }

    pub fn action(&self) -> &Space {
        &self.action
    }

    /// The environment that it is for.
    pub fn env(&self) -> &str {
        &self.env
    }

    /// The weights before the first update. Of actor and critic orthogonal, times sqrt 2 in hidden layers, 0.01 at the actor's and 1 at the critic's end,
    /// biases 0 (CleanRL's `layer_init`); of values uniform as PyTorch's `nn.Linear`. Each parameter has draws of its own.
    pub fn first_weights(&self, seed: u64) -> Vec<f32> {
        let mut weights = vec![0.0; self.layout.len()];
        let nets = [Some((&self.actor, 0.01, 0)), self.critic.as_ref().map(|critic| (critic, 1.0, 1))];
        for (mlp, gain, net) in nets.into_iter().flatten() {
            let layers = mlp.layers();
            for (index, &(at, inputs, outputs)) in layers.iter().enumerate() {
                let mut draws = Draws::new(seed, Stream::FirstWeights, [net, index as u64, 0]);
                let here = &mut weights[at..at + inputs * outputs + outputs];
                if self.kind == PolicyKind::Q {
                    let bound = 1.0 / (inputs as f64).sqrt();
                    here.iter_mut().for_each(|weight| *weight = ((2.0 * draws.unit() - 1.0) * bound) as f32);
                } else {
                    let gain = if index + 1 == layers.len() { gain } else { std::f64::consts::SQRT_2 };
                    orthogonal(&mut draws, (inputs, outputs), gain, here);
                }
            }
        }
        weights
    }
}

fn push_layers(params: &mut Vec<ParamSpec>, mlp: &Mlp, name: &str) {
    for (index, &(offset, inputs, outputs)) in mlp.layers().iter().enumerate() {
        let path = |kind: &str| format!("{name}.{index}.{kind}");
        let (shape, len) = (vec![inputs, outputs], inputs * outputs);
        params.push(ParamSpec { path: path("weight"), shape, offset, len, learns: true });
        let offset = offset + len;
        params.push(ParamSpec { path: path("bias"), shape: vec![outputs], offset, len: outputs, learns: true });
    }
}

/// Rows, or columns where there are fewer of them, that are orthonormal, times `gain`: Gram and Schmidt's of normal draws, twice over each vector, in f64
/// (Saxe et al., 2014; the distribution of `torch.nn.init.orthogonal_`).
fn orthogonal(draws: &mut Draws, (inputs, outputs): (usize, usize), gain: f64, out: &mut [f32]) {
    let (count, len) = (inputs.min(outputs), inputs.max(outputs));
    let mut vectors: Vec<Vec<f64>> = Vec::with_capacity(count);
    for _ in 0..count {
        let mut vector: Vec<f64> = (0..len).map(|_| draws.normal()).collect();
        for _ in 0..2 {
            for other in &vectors {
                let along: f64 = vector.iter().zip(other).map(|(a, b)| a * b).sum();
                vector.iter_mut().zip(other).for_each(|(value, other)| *value -= along * other);
            }
        }
        let norm = vector.iter().map(|value| value * value).sum::<f64>().sqrt();
        vector.iter_mut().for_each(|value| *value /= norm);
        vectors.push(vector);
    }
    for input in 0..inputs {
        for output in 0..outputs {
            let value = if inputs <= outputs { vectors[input][output] } else { vectors[output][input] };
            out[input * outputs + output] = (gain * value) as f32;
        }
    }
}

/// The logarithm of the softmax of a row, and the distribution's entropy.
#[inline(always)]
pub(crate) fn log_softmax(logits: &[f32], log_probs: &mut [f32]) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for (out, logit) in log_probs.iter_mut().zip(logits) {
        *out = logit - max;
        sum += exp(*out);
    }
    let log_sum = ln(f64::from(sum)) as f32;
    let mut entropy = 0.0;
    for out in log_probs {
        *out -= log_sum;
        entropy -= exp(*out) * *out;
    }
    entropy
}

/// ln sqrt(2 pi).
pub(crate) const LN_SQRT_TAU: f32 = 0.918_938_5;

/// The logarithm of the density of `actions` under independent normal distributions.
#[inline(always)]
pub(crate) fn normal_log_prob(means: &[f32], log_std: &[f32], actions: &[f32]) -> f32 {
    let mut sum = 0.0;
    for ((mean, log_std), action) in means.iter().zip(log_std).zip(actions) {
        let off = (action - mean) * exp(-log_std);
        sum += -0.5 * off * off - log_std - LN_SQRT_TAU;
    }
    sum
}

/// The first largest.
pub(crate) fn argmax(values: &[f32]) -> u32 {
    (1..values.len()).fold(0, |best, at| if values[at] > values[best] { at } else { best }) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_weights_are_orthogonal() {
        for shape in [(4, 64), (64, 64), (64, 2)] {
            let (inputs, outputs) = shape;
            let mut weights = vec![0.0; inputs * outputs];
            orthogonal(&mut Draws::new(1, Stream::FirstWeights, [0; 3]), shape, 2.0, &mut weights);
            let row = |row: usize| (0..outputs).map(move |column| row * outputs + column).collect::<Vec<_>>();
            let column = |column: usize| (0..inputs).map(move |row| row * outputs + column).collect::<Vec<_>>();
            let count = inputs.min(outputs);
            for one in 0..count {
                for other in 0..count {
                    let (a, b) = if inputs <= outputs { (row(one), row(other)) } else { (column(one), column(other)) };
                    let dot: f32 = a.iter().zip(&b).map(|(&a, &b)| weights[a] * weights[b]).sum();
                    let expected = if one == other { 4.0 } else { 0.0 };
                    assert!((dot - expected).abs() < 1e-5, "{shape:?}: {one} {other} {dot}");
                }
            }
        }
    }

    #[test]
    fn distributions_are_those_of_their_definitions() {
        let mut log_probs = [0.0; 3];
        let entropy = log_softmax(&[1.0, -2.0, 0.5], &mut log_probs);
        let weights = [1f64.exp(), (-2f64).exp(), 0.5f64.exp()];
        let total: f64 = weights.iter().sum();
        let expected = weights.map(|weight| (weight / total).ln());
        assert!(log_probs.iter().zip(expected).all(|(got, expected)| (f64::from(*got) - expected).abs() < 1e-6));
        let expected: f64 = expected.iter().map(|value| -value * value.exp()).sum();
        assert!((f64::from(entropy) - expected).abs() < 1e-6);
        let density = |x: f64, mean: f64, std: f64| {
            (-0.5 * ((x - mean) / std).powi(2)).exp() / (std * std::f64::consts::TAU.sqrt())
        };
        let got = normal_log_prob(&[0.5, -1.0], &[0.2, -0.7], &[1.0, -1.2]);
        let expected = (density(1.0, 0.5, 0.2f64.exp()) * density(-1.2, -1.0, (-0.7f64).exp())).ln();
        assert!((f64::from(got) - expected).abs() < 1e-6);
    }
}
