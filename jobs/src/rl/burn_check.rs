//! The hand-written gradient of PPO beside Burn's autodiff, and what each costs. The loss is written as CleanRL writes it.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};

use super::actor::{Acted, Actor, Choices, Explore, Place};
use super::config::{AlgorithmConfig, PpoConfig, RlConfig};
use super::learn::Learn;
use super::net::Mlp;
use super::policy::{LN_SQRT_TAU, Policy, PolicyKind};
use super::ppo::Ppo;
use super::rollout::{Rollout, RolloutConfig};
use super::trajectory::Trajectory;
use super::{Space, make};
use crate::train::Layout;

/// The parameters of the layout, each a tensor of its own.
fn tensors(layout: &Layout, weights: &[f32], device: &Device) -> Vec<Tensor<2>> {
    let tensor = |param: &crate::train::ParamSpec| {
        let shape = if param.shape.len() == 2 { [param.shape[0], param.shape[1]] } else { [1, param.len] };
        let values = weights[param.offset..param.offset + param.len].to_vec();
        Tensor::<2>::from_data(TensorData::new(values, shape), device).require_grad()
    };
    layout.params.iter().map(tensor).collect()
}

fn forward(mlp: &Mlp, params: &[Tensor<2>], x: Tensor<2>) -> Tensor<2> {
    let last = mlp.layers().len() - 1;
    (0..=last).fold(x, |x, layer| {
        let y = x.matmul(params[2 * layer].clone()) + params[2 * layer + 1].clone();
        if layer == last { y } else { y.tanh() }
    })
}

/// The rows of one minibatch as tensors [rows, ..].
struct Rows {
    observations: Tensor<2>,
    discrete: Option<Tensor<2, Int>>,
    continuous: Option<Tensor<2>>,
    old_log_probs: Tensor<2>,
    old_values: Tensor<2>,
    advantages: Tensor<2>,
    returns: Tensor<2>,
}

/// The summed loss of the rows.
fn loss(config: &PpoConfig, policy: &Policy, params: &[Tensor<2>], rows: &Rows) -> Tensor<1> {
    let actor = 2 * policy.actor.layers().len();
    let output = forward(&policy.actor, params, rows.observations.clone());
    let critic = &params[actor + usize::from(policy.log_std.is_some())..];
    let value = forward(policy.critic.as_ref().expect("a critic"), critic, rows.observations.clone());
    let (log_prob, entropy) = match (&rows.discrete, &rows.continuous) {
        (Some(actions), _) => {
            let log_probs = log_softmax(output, 1);
            let entropy = (log_probs.clone().exp() * log_probs.clone()).sum_dim(1).neg();
            (log_probs.gather(1, actions.clone()), entropy)
        }
        (None, Some(actions)) => {
            let log_std = params[actor].clone();
            let off = (actions.clone() - output.clone()) / log_std.clone().exp();
            let log_prob = (off.clone() * off).mul_scalar(-0.5) - log_std.clone();
            let zeros = output.mul_scalar(0.0);
            let entropy = (zeros + log_std).add_scalar(0.5 + LN_SQRT_TAU);
            (log_prob.sub_scalar(LN_SQRT_TAU).sum_dim(1), entropy.sum_dim(1))
        }
        (None, None) => unreachable!("rows have actions"),
    };
    let ratio = (log_prob - rows.old_log_probs.clone()).exp();
    let clipped = ratio.clone().clamp(1.0 - config.clip, 1.0 + config.clip);
    let advantages = rows.advantages.clone().neg();
    let policy_loss = (advantages.clone() * ratio).max_pair(advantages * clipped).sum();
    let off = value.clone() - rows.returns.clone();
    let moved = (value - rows.old_values.clone()).clamp(-config.clip, config.clip);
    let near = rows.old_values.clone() + moved - rows.returns.clone();
    let value_loss = (off.clone() * off).max_pair(near.clone() * near).sum().mul_scalar(0.5 * config.vf_coef);
    policy_loss + value_loss - entropy.sum().mul_scalar(config.ent_coef)
}

/// A trajectory of one lane under other weights than the learner's, so that ratios are not 1.
fn trajectory(policy: &Arc<Policy>, env: &str, steps: usize, weights: &[f32]) -> Trajectory {
    let mut actor = Actor::new(policy, 3);
    actor.load(0, weights).expect("weights");
    let config = RolloutConfig { seed: 3, normalise: false, gamma: 0.99 };
    let mut rollout = Rollout::new(config, make(env, 4).expect("a native environment"));
    rollout.begin(0).expect("a lane");
    rollout.play(&mut actor, Explore::Sample, steps).expect("a rollout")
}

/// Other weights, not far from these.
fn moved(mut weights: Vec<f32>) -> Vec<f32> {
    weights.iter_mut().enumerate().for_each(|(at, weight)| *weight += ((at * 7919 % 101) as f32 - 50.0) * 2e-3);
    weights
}

#[test]
fn gradient_of_ppo_is_burns() {
    for (env, steps) in [("CartPole-v1", 64), ("Pendulum-v1", 48), ("Acrobot-v1", 32)] {
        let spec =
            format!("[rl]\nalgorithm = 'ppo'\nenvironment = '{env}'\nminibatches = 2\nepochs = 1\nent_coef = 0.01");
        let environment = make(env, 1).expect("a native environment");
        let plan = RlConfig::parse(&spec).expect("a good spec").plan(&spec, environment.spec(), 1).expect("a plan");
        let AlgorithmConfig::Ppo(config) = plan.algorithm else { panic!("PPO was asked for") };
        let policy =
            Policy::new(PolicyKind::ActorCritic, environment.spec(), &[64, 64], Ppo::FIGURES).expect("a policy");
        let policy = Arc::new(policy);
        let trajectory = trajectory(&policy, env, steps, &moved(policy.first_weights(7)));
        let mut ppo = Ppo::new(config.clone(), &policy, 7);
        ppo.take(0, 0, trajectory.clone()).expect("taken");
        let mut sums = vec![0.0; ppo.sums_len()];
        ppo.sums(0, &mut sums).expect("sums");
        ppo.begin(0, &sums).expect("a round");
        let mut ours = vec![0.0; policy.layout().flat_len()];
        ppo.gradient(1, 0, &mut ours).expect("a gradient");

        let (picked, advantages, returns) = ppo.minibatch(1, 0);
        let device = Device::flex().autodiff();
        let column = |values: Vec<f32>| {
            let rows = values.len();
            Tensor::<2>::from_data(TensorData::new(values, [rows, 1]), &device)
        };
        let pick = |values: &[f32]| column(picked.iter().map(|&row| values[row as usize]).collect());
        let len = policy.observation_len();
        let observations: Vec<f32> =
            picked.iter().flat_map(|&row| trajectory.observations[row as usize * len..][..len].to_vec()).collect();
        let discrete = matches!(policy.action(), Space::Discrete { .. }).then(|| {
            let actions: Vec<i64> =
                picked.iter().map(|&row| trajectory.actions.discrete[row as usize].into()).collect();
            Tensor::<2, Int>::from_data(TensorData::new(actions, [picked.len(), 1]), &device)
        });
        let continuous = discrete.is_none().then(|| pick(&trajectory.actions.continuous));
        let rows = Rows {
            observations: Tensor::<2>::from_data(TensorData::new(observations, [picked.len(), len]), &device),
            discrete,
            continuous,
            old_log_probs: pick(&trajectory.log_probs),
            old_values: pick(&trajectory.values),
            advantages: column(advantages),
            returns: column(returns),
        };
        let weights = policy.first_weights(7);
        let burn = |weights: &[f32]| -> Vec<f32> {
            let params = tensors(policy.layout(), weights, &device);
            let gradients = loss(&config, &policy, &params, &rows).backward();
            let values = params.into_iter().flat_map(|param| {
                let gradient = param.grad(&gradients).expect("the loss reaches every parameter");
                gradient.into_data().try_into_vec::<f32>().expect("gradients are f32")
            });
            values.collect()
        };
        let theirs = burn(&weights);
        let norm = theirs.iter().map(|value| value * value).sum::<f32>().sqrt();
        let off = ours.iter().zip(&theirs).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
        // Sums of some hundred products in f32, in another order.
        assert!(off < 2e-5 * norm, "{env}: {off} of {norm}");
        if std::env::var_os("STOKE_RL_TIMES").is_some() {
            let time = |mut work: Box<dyn FnMut() + '_>| {
                let begun = Instant::now();
                (0..200).for_each(|_| work());
                begun.elapsed().as_secs_f64() / 200.0 * 1e6
            };
            let slow = time(Box::new(|| drop(burn(&weights))));
            let fast = time(Box::new(|| ppo.gradient(1, 0, &mut ours).expect("a gradient")));
            println!("{env}, {} rows: Burn {slow:.0} us, by hand {fast:.0} us", picked.len());
        }
    }
}

#[test]
fn first_ratio_is_one_to_the_last_bit() {
    for env in ["CartPole-v1", "Pendulum-v1", "Acrobot-v1"] {
        let environment = make(env, 1).expect("a native environment");
        let policy =
            Policy::new(PolicyKind::ActorCritic, environment.spec(), &[64, 64], Ppo::FIGURES).expect("a policy");
        let policy = Arc::new(policy);
        let weights = policy.first_weights(7);
        let trajectory = trajectory(&policy, env, 33, &weights);
        let mut heads = super::loss::Heads::new(&policy);
        let rows = trajectory.transitions();
        heads.forward(&weights, &trajectory, &rows);
        let mut log_probs = Vec::new();
        heads.log_probs(&trajectory, &rows, &mut log_probs);
        for (row, (log_prob, value)) in rows.iter().zip(log_probs.iter().zip(heads.values())) {
            let row = *row as usize;
            assert_eq!((*log_prob, *value), (trajectory.log_probs[row], trajectory.values[row]), "{env}, row {row}");
        }
    }
}

#[test]
fn actions_are_drawn_from_the_distribution() {
    let environment = make("CartPole-v1", 1).expect("a native environment");
    let policy = Policy::new(PolicyKind::ActorCritic, environment.spec(), &[8], Ppo::FIGURES).expect("a policy");
    let policy = Arc::new(policy);
    let mut actor = Actor::new(&policy, 1);
    let mut weights = policy.first_weights(1);
    // Logits 0 and 1, whatever the observation.
    let head = &policy.layout().params[2];
    weights[head.offset..head.offset + head.len + 2].fill(0.0);
    weights[head.offset + head.len + 1] = 1.0;
    actor.load(1, &weights).expect("weights");
    let (mut choices, mut log_probs, mut values) = (Choices::default(), Vec::new(), Vec::new());
    let mut acted = Acted { choices: &mut choices, log_probs: &mut log_probs, values: &mut values };
    let places = (0..50_000u64).map(|at| Place { env: at % 7, step: at / 7 });
    let places: Vec<Place> = places.collect();
    actor.act(&vec![0.1; 200_000], places.into_iter(), Explore::Sample, &mut acted).expect("actions");
    let share = f64::from(choices.discrete.iter().sum::<u32>()) / 50_000.0;
    let expected = 1.0 / (1.0 + (-1f64).exp());
    // Five standard errors.
    assert!((share - expected).abs() < 0.01, "{share}, expected {expected}");
    assert!(log_probs.iter().zip(&choices.discrete).all(|(log_prob, &choice)| {
        (f64::from(*log_prob) - if choice == 1 { expected } else { 1.0 - expected }.ln()).abs() < 1e-6
    }));
}
