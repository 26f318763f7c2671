//! Forward and backward passes of an actor and a critic over rows of a trajectory: gathers the rows, gives each row's log-probability, entropy and value
//! to the algorithm, and carries the slopes that it answers with back to the weights. Knows distributions, no algorithm.

use std::sync::Arc;

use super::math::exp;
use super::net::Activations;
use super::policy::{Policy, log_softmax, normal_log_prob};
use super::trajectory::Trajectory;
use crate::lm::kernels::Isa;

/// What the weights say of one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    pub log_prob: f32,
    pub entropy: f32,
    pub value: f32,
}

/// Memory of the passes.
pub(crate) struct Heads {
    policy: Arc<Policy>,
    isa: Isa,
    observations: Vec<f32>,
    /// What the networks see of them, where that differs.
    rooms: [Vec<f32>; 2],
    actor: Activations,
    critic: Activations,
    /// Gradients of the outputs.
    output: Vec<f32>,
    value: Vec<f32>,
    log_std: Vec<f32>,
    log_std_gradient: Vec<f32>,
    log_probs: Vec<f32>,
}

impl Heads {
    pub fn new(policy: &Arc<Policy>) -> Self {
        let width = policy.width();
        let continuous = if policy.log_std.is_some() { width } else { 0 };
        Self {
            policy: policy.clone(),
            isa: Isa::best(),
            observations: Vec::new(),
            rooms: Default::default(),
            actor: Activations::default(),
            critic: Activations::default(),
            output: Vec::new(),
            value: Vec::new(),
            log_std: vec![0.0; continuous],
            log_std_gradient: vec![0.0; continuous],
            log_probs: vec![0.0; width],
        }
    }

    pub fn forward(&mut self, weights: &[f32], trajectory: &Trajectory, rows: &[u32]) {
        let len = self.policy.observation_len();
        self.observations.clear();
        for &row in rows {
            self.observations.extend_from_slice(&trajectory.observations[row as usize * len..][..len]);
        }
        if let Some(at) = self.policy.log_std {
            self.log_std.copy_from_slice(&weights[at..at + self.policy.width()]);
        }
        let [actor_room, critic_room] = &mut self.rooms;
        let input = self.policy.actor_input(&self.observations, actor_room);
        self.policy.actor.forward(self.isa, weights, input, &mut self.actor);
        let critic = self.policy.critic.as_ref().expect("PPO and IMPALA have a critic");
        let input = self.policy.critic_input(&self.observations, critic_room);
        critic.forward(self.isa, weights, input, &mut self.critic);
    }

    /// Values of the rows.
    pub fn values(&self) -> &[f32] {
        self.critic.output()
    }

    /// Log-probabilities of the actions of the rows.
    pub fn log_probs(&mut self, trajectory: &Trajectory, rows: &[u32], out: &mut Vec<f32>) {
        let width = self.policy.width();
        for (output, &row) in self.actor.output().chunks_exact(width).zip(rows) {
            let row = row as usize;
            out.push(if self.policy.log_std.is_some() {
                normal_log_prob(output, &self.log_std, &trajectory.actions.continuous[row * width..][..width])
            } else {
                log_softmax(output, &mut self.log_probs);
                self.log_probs[trajectory.actions.discrete[row] as usize]
            });
        }
    }

    /// Asks for the slopes of the loss by log-probability, entropy and value of each row.
    pub fn differentiate(
        &mut self,
        trajectory: &Trajectory,
        rows: &[u32],
        mut slopes: impl FnMut(usize, Row) -> (f32, f32, f32),
    ) {
        let width = self.policy.width();
        self.output.clear();
        self.output.resize(rows.len() * width, 0.0);
        self.value.clear();
        let outputs = self.actor.output().chunks_exact(width).zip(self.output.chunks_exact_mut(width));
        for (((output, gradient), &value), &row) in outputs.zip(self.critic.output()).zip(rows) {
            let row = row as usize;
            if self.policy.log_std.is_some() {
                let actions = &trajectory.actions.continuous[row * width..][..width];
                let log_prob = normal_log_prob(output, &self.log_std, actions);
                let entropy = self.log_std.iter().map(|log_std| 0.5 + super::policy::LN_SQRT_TAU + log_std).sum();
                let (by_log_prob, by_entropy, by_value) = slopes(row, Row { log_prob, entropy, value });
                for at in 0..width {
                    let inverse = exp(-self.log_std[at]);
                    let off = (actions[at] - output[at]) * inverse;
                    gradient[at] = by_log_prob * off * inverse;
                    self.log_std_gradient[at] += by_log_prob * (off * off - 1.0) + by_entropy;
                }
                self.value.push(by_value);
            } else {
                let action = trajectory.actions.discrete[row] as usize;
                let entropy = log_softmax(output, &mut self.log_probs);
                let log_prob = self.log_probs[action];
                let (by_log_prob, by_entropy, by_value) = slopes(row, Row { log_prob, entropy, value });
                for (gradient, &log_prob) in gradient.iter_mut().zip(&self.log_probs) {
                    *gradient = -exp(log_prob) * (by_log_prob + by_entropy * (log_prob + entropy));
                }
                gradient[action] += by_log_prob;
                self.value.push(by_value);
            }
        }
    }

    /// Adds the gradient of the weights.
    pub fn backward(&mut self, weights: &[f32], gradient: &mut [f32]) {
        let policy = self.policy.clone();
        let isa = self.isa;
        // As the forward pass left them.
        let [actor_room, critic_room] = &self.rooms;
        let (actor_input, critic_input) = match policy.cells() {
            Some(_) => (actor_room, critic_room),
            None => (&self.observations, &self.observations),
        };
        policy.actor.backward(isa, weights, (actor_input, &self.output), &mut self.actor, gradient);
        let critic = policy.critic.as_ref().expect("PPO and IMPALA have a critic");
        critic.backward(isa, weights, (critic_input, &self.value), &mut self.critic, gradient);
        if let Some(at) = policy.log_std {
            let sums = gradient[at..].iter_mut().zip(&mut self.log_std_gradient);
            sums.for_each(|(sum, part)| *sum += std::mem::take(part));
        }
    }
}
