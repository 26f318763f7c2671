//! Losses, gradients and updates beside PyTorch's: the golden files and what stands in them are those of jobs/reference/rl/learning.py.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use stoke_jobs::NamedTensor;
use stoke_jobs::rl::{
    Choices, Dqn, DqnConfig, EnvSpec, Learn, Policy, PolicyKind, Ppo, PpoConfig, Rate, Space, Steps, Trajectory,
    Truncation, gae, vtrace,
};

struct Golden(Value);

impl Golden {
    fn read(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("reference/golden/rl/{name}.json"));
        Self(serde_json::from_slice(&std::fs::read(path).expect("a golden file")).expect("JSON"))
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        floats(&self.0[name])
    }

    fn words(&self, name: &str) -> Vec<u32> {
        self.0[name].as_array().expect("a list").iter().map(|word| word.as_u64().expect("whole") as u32).collect()
    }

    fn number(&self, name: &str) -> f64 {
        self.0[name].as_f64().expect("a number")
    }

    fn flags(&self) -> Vec<u8> {
        self.words("flags").into_iter().map(|flag| flag as u8).collect()
    }

    /// The parameters under `name`, in the order of the policy.
    fn flat(&self, value: &Value, policy: &Policy) -> Vec<f32> {
        policy.layout().params.iter().flat_map(|param| floats(&value[&param.path])).collect()
    }

    fn tensors(&self, policy: &Policy) -> Vec<NamedTensor> {
        let tensor = |param: &stoke_jobs::ParamSpec| NamedTensor {
            name: format!("model.{}", param.path),
            shape: param.shape.clone(),
            values: floats(&self.0["weights"][&param.path]),
        };
        policy.layout().params.iter().map(tensor).collect()
    }

    fn trajectory(&self, continuous: bool) -> Trajectory {
        let [steps, envs] = ["steps", "envs"].map(|name| self.number(name) as usize);
        let actions = if continuous {
            Choices { continuous: self.floats("actions"), discrete: Vec::new() }
        } else {
            Choices { discrete: self.words("actions"), continuous: Vec::new() }
        };
        let observations = self.floats("observations");
        let optional = |name: &str, len| if self.0[name].is_null() { vec![0.0; len] } else { self.floats(name) };
        Trajectory {
            steps,
            envs,
            observations,
            actions,
            log_probs: optional("log_probs", steps * envs),
            values: optional("values", (steps + 1) * envs),
            rewards: self.floats("rewards"),
            flags: self.flags(),
            ..Trajectory::default()
        }
    }

    /// The updates one after the other: figures, the first gradient, and the weights in the end.
    fn compare(&self, name: &str, learn: &mut dyn Learn, updates: u32) {
        let policy = learn.policy().clone();
        let (len, flat_len) = (policy.layout().len(), policy.layout().flat_len());
        for update in 0..updates {
            let golden = &self.0["updates"][update as usize];
            let mut sum = vec![f32::NAN; flat_len];
            learn.gradient(update, 0, &mut sum).expect("a gradient");
            if update == 0 {
                let samples = sum[flat_len - 1];
                let mean: Vec<f32> = sum[..len].iter().map(|value| value / samples).collect();
                // Sums of a few dozen products in f32, in another order.
                near(&format!("{name}: gradient"), &mean, &self.flat(&golden["gradient"], &policy), 2e-6);
            }
            let updated = learn.apply(update, &sum).expect("an update");
            let figures: Vec<f32> = updated.figures.iter().map(|&figure| figure as f32).collect();
            near(&format!("{name}: figures of update {update}"), &figures, &floats(&golden["figures"]), 5e-6);
            if let Some(norm) = golden["norm"].as_f64() {
                near(&format!("{name}: norm"), &[updated.grad_norm as f32], &[norm as f32], 5e-6);
            }
        }
        // A step of Adam is as long as the rate, whatever the gradient: a small gradient's rounding is seen in it.
        near(&format!("{name}: weights"), learn.learner().weights(), &self.flat(&self.0["after"], &policy), 2e-6);
    }
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number") as f32).collect()
}

fn near(what: &str, got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(
            (got - expected).abs() <= tolerance * expected.abs().max(1.0),
            "{what}, {at}: {got}, expected {expected}"
        );
    }
}

fn policy(kind: PolicyKind, action: Space, hidden: &[usize], figures: usize) -> Arc<Policy> {
    let observation = Space::Box { low: vec![-1.0; 4], high: vec![1.0; 4] };
    let env = EnvSpec { name: "none".to_owned(), observation, action, steps_max: None, cells: None };
    Arc::new(Policy::new(kind, &env, hidden, figures).expect("a policy"))
}

/// Only where there are transitions: what stands elsewhere is ours to say.
fn at_transitions(flags: &[u8], values: &[f32]) -> Vec<f32> {
    flags.iter().zip(values).filter(|(flag, _)| **flag & 1 == 1).map(|(_, value)| *value).collect()
}

#[test]
fn advantages_are_those_of_the_definition() {
    let golden = Golden::read("gae");
    let (rewards, values, flags) = (golden.floats("rewards"), golden.floats("values"), golden.flags());
    let (mut advantages, mut returns) = (vec![0.0; rewards.len()], vec![0.0; rewards.len()]);
    let gamma = golden.number("gamma") as f32;
    let steps = Steps { envs: 3, rewards: &rewards, flags: &flags, values: &values, gamma };
    gae(steps, golden.number("lambda") as f32, &mut advantages, &mut returns);
    // Forty steps of f32.
    near(
        "advantages",
        &at_transitions(&flags, &advantages),
        &at_transitions(&flags, &golden.floats("advantages")),
        2e-6,
    );
    near("returns", &at_transitions(&flags, &returns), &at_transitions(&flags, &golden.floats("returns")), 2e-6);
}

#[test]
fn traces_are_those_of_the_definition() {
    let golden = Golden::read("vtrace");
    let (rewards, values, flags) = (golden.floats("rewards"), golden.floats("values"), golden.flags());
    let (mut targets, mut advantages) = (vec![0.0; rewards.len()], vec![0.0; rewards.len()]);
    let gamma = golden.number("gamma") as f32;
    let steps = Steps { envs: 3, rewards: &rewards, flags: &flags, values: &values, gamma };
    let rho = golden.number("rho") as f32;
    let truncation = Truncation { rho, c: golden.number("c") as f32, policy_rho: rho };
    vtrace(steps, &golden.floats("ratios"), truncation, &mut targets, &mut advantages);
    near("targets", &targets, &golden.floats("targets"), 2e-6);
    near("advantages", &advantages, &golden.floats("advantages"), 2e-6);
}

#[test]
fn updates_of_ppo_are_pytorchs() {
    for (name, action) in
        [("ppo", Space::Discrete { n: 2 }), ("ppo_continuous", Space::Box { low: vec![-1.0; 2], high: vec![1.0; 2] })]
    {
        let golden = Golden::read(name);
        let continuous = matches!(action, Space::Box { .. });
        let policy = policy(PolicyKind::ActorCritic, action, &[8, 8], Ppo::FIGURES);
        let config = PpoConfig {
            rate: Rate { lr: 2.5e-4, anneal_rounds: None },
            max_grad_norm: Some(0.5),
            gamma: 0.99,
            gae_lambda: 0.95,
            epochs: 3,
            minibatches: 1,
            clip: 0.2,
            clip_values: true,
            normalise_advantages: true,
            ent_coef: 0.01,
            vf_coef: 0.5,
        };
        let mut ppo = Ppo::new(config, &policy, 1);
        ppo.restore(golden.tensors(&policy)).expect("weights");
        ppo.take(0, 0, golden.trajectory(continuous)).expect("a trajectory");
        let mut sums = vec![0.0; ppo.sums_len()];
        ppo.sums(0, &mut sums).expect("sums");
        ppo.begin(0, &sums).expect("a round");
        golden.compare(name, &mut ppo, 3);
    }
}

#[test]
fn updates_of_dqn_are_pytorchs() {
    let golden = Golden::read("dqn");
    let policy = policy(PolicyKind::Q, Space::Discrete { n: 3 }, &[8, 6], Dqn::FIGURES);
    let config = DqnConfig {
        rate: Rate { lr: 2.5e-4, anneal_rounds: None },
        max_grad_norm: None,
        gamma: 0.99,
        lanes: 1,
        round_steps: 40,
        replay: 100,
        batch: golden.number("batch") as usize,
        learning_starts: 10,
        train_every: 10,
        target_every: 1_000,
        double: true,
        huber: false,
        epsilon: [1.0, 0.05],
        exploration_steps: 100,
    };
    let mut dqn = Dqn::new(config, &policy, golden.number("seed") as u64);
    let values = golden.flat(&golden.0["target"], &policy);
    let (name, shape) = ("optimizer.target".to_owned(), vec![values.len()]);
    let tensors = [golden.tensors(&policy), vec![NamedTensor { name, shape, values }]].concat();
    dqn.restore(tensors).expect("weights");
    dqn.take(0, 0, golden.trajectory(false)).expect("a trajectory");
    let mut sums = vec![0.0; dqn.sums_len()];
    dqn.sums(0, &mut sums).expect("sums");
    assert_eq!(dqn.begin(0, &sums).expect("a round").updates, 3);
    golden.compare("dqn", &mut dqn, 3);
}
