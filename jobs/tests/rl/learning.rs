//! Learning from end to end: tasks are solved within CleanRL's budgets, and the weights have the same bits however many learners and actors there are.

use std::collections::VecDeque;
use std::ops::Range;

use stoke_jobs::rl::{
    Actor, Learn, Pcg64, RlConfig, RlError, RlPlan, Rollout, RolloutConfig, Solo, Trajectory, learn, make, tree_sum,
};

/// Trains until the mean of the last 100 episodes' returns is above `goal`; the env steps that it took. None: the budget was spent.
fn solve(mut solo: Solo, goal: f64) -> Option<u64> {
    let round_steps = solo.plan.steps as u64 * solo.plan.envs as u64 * u64::from(solo.plan.lanes);
    let mut last: VecDeque<f64> = VecDeque::new();
    for round in 1..=solo.plan.rounds {
        let report = solo.round().expect("a round");
        // A round's episodes stand for their mean each.
        let Some(mean) = report.round.episode_return else { continue };
        (0..report.round.episodes).for_each(|_| last.push_back(mean));
        while last.len() > 100 {
            last.pop_front();
        }
        if last.len() == 100 && last.iter().sum::<f64>() / 100.0 > goal {
            return Some(round * round_steps);
        }
    }
    None
}

fn solo(spec: &str, lanes: u32) -> Solo {
    Solo::new(spec, lanes, 1).expect("a good spec")
}

const CART_POLE: &str = "[rl]\nalgorithm = 'ppo'\nenvironment = 'CartPole-v1'\n";

#[test]
fn ppo_solves_cart_pole_within_cleanrls_budget() {
    let steps = solve(solo(CART_POLE, 4), 475.0).expect("solved within 500,000 steps");
    println!("solved after {steps} steps");
}

#[test]
fn policy_that_was_trained_on_normalised_observations_is_evaluated_on_them() {
    let mut solo = Solo::new("[rl]\nalgorithm = 'ppo'\nenvironment = 'Pendulum-v1'\n", 1, 1).expect("a good spec");
    let mut env = make("Pendulum-v1", 20).expect("a native environment");
    let mut mean = |solo: &mut Solo| solo.evaluate(&mut *env, 5, 200).expect("episodes").iter().sum::<f64>() / 20.0;
    let before = mean(&mut solo);
    (0..100).for_each(|_| drop(solo.round().expect("a round")));
    let after = mean(&mut solo);
    println!("from {before} to {after}");
    // A pendulum that hangs gets -1,200; one that is swung up and held -200 or better.
    assert!(before < -700.0 && after > -400.0, "{before}, {after}");
    assert_eq!(mean(&mut solo), after, "an evaluation changes nothing");
}

#[test]
fn impala_solves_cart_pole_with_a_policy_that_is_behind() {
    let spec = "[rl]\nalgorithm = 'impala'\nenvironment = 'CartPole-v1'\n";
    let steps = solve(solo(spec, 4).behind(4), 475.0).expect("solved within 500,000 steps");
    println!("solved after {steps} steps");
}

#[test]
fn dqn_learns_cart_pole() {
    let spec = "[rl]\nalgorithm = 'dqn'\nenvironment = 'CartPole-v1'\n";
    let steps = solve(solo(spec, 1), 400.0).expect("solved within 500,000 steps");
    println!("solved after {steps} steps");
}

type NewLearner = Box<dyn Fn() -> Box<dyn Learn>>;

/// A job in pieces: learners that own lanes, and actors that get a lane's state as bytes and give its trajectory as bytes.
struct Cluster {
    plan: RlPlan,
    learners: Vec<(Range<u32>, Box<dyn Learn>)>,
    actors: Vec<(Actor, Rollout)>,
    lanes: Vec<Vec<u8>>,
    /// Of the round, by lane.
    trajectories: Vec<Vec<u8>>,
    /// The update at which the last learner dies and another one takes over its lanes, and how to make it.
    death: Option<(u32, NewLearner)>,
}

impl Cluster {
    fn new(spec: &str, (seed, count): (u64, u32), learners: u32, actors: usize) -> Self {
        let config = RlConfig::parse(spec).expect("a good spec");
        let new_env = || config.environment().make(config.envs()).expect("a native environment");
        let env = new_env().spec().clone();
        let plan = config.plan(spec, &env, count).expect("a plan");
        let new_learner = || learn(&config, &plan, &env, seed).expect("a learner");
        let rollout = RolloutConfig { seed, normalise: plan.normalise, gamma: plan.gamma };
        let policy = new_learner().policy().clone();
        let mut first = Rollout::new(rollout, new_env());
        let lanes = (0..count).map(|lane| {
            first.begin(lane).expect("a lane");
            first.save().expect("its bytes")
        });
        Self {
            learners: (0..learners)
                .map(|at| (at * count / learners..(at + 1) * count / learners, new_learner()))
                .collect(),
            actors: (0..actors).map(|_| (Actor::new(&policy, seed), Rollout::new(rollout, new_env()))).collect(),
            lanes: lanes.collect(),
            trajectories: vec![Vec::new(); count as usize],
            death: None,
            plan,
        }
    }

    /// Lanes go to actors in any order, some of them twice, as when an answer was lost.
    fn round(&mut self, round: u64, order: &mut Pcg64) {
        let learner = self.learners[0].1.learner();
        let (version, weights) = (learner.version(), learner.weights().to_vec());
        self.actors.iter_mut().for_each(|(actor, _)| actor.load(version, &weights).expect("weights"));
        let mut orders: Vec<u32> = (0..self.lanes.len() as u32).chain([0]).collect();
        (1..orders.len()).rev().for_each(|last| orders.swap(last, order.below(last as u64 + 1) as usize));
        let explore = self.learners[0].1.explore();
        let mut after = vec![Vec::new(); self.lanes.len()];
        for lane in orders {
            let at = order.below(self.actors.len() as u64) as usize;
            let (actor, rollout) = &mut self.actors[at];
            let state = &self.lanes[lane as usize];
            let (trajectory, state) = rollout.run(state, actor, (explore, self.plan.steps)).expect("a rollout");
            after[lane as usize] = state;
            let bytes = trajectory.encode();
            let (_, learner) = self.learners.iter_mut().find(|(lanes, _)| lanes.contains(&lane)).expect("an owner");
            let trajectory = Trajectory::decode(&bytes, learner.policy()).expect("a trajectory");
            learner.take(round, lane, trajectory).expect("taken");
            self.trajectories[lane as usize] = bytes;
        }
        self.lanes = after;
        let sums_len = self.learners[0].1.sums_len();
        let sums = self.sum(sums_len, |learner, lane, part| learner.sums(lane, part).expect("sums"));
        let updates =
            self.learners.iter_mut().map(|(_, learner)| learner.begin(round, &sums).expect("a round").updates);
        let updates = updates.collect::<Vec<_>>()[0];
        for update in 0..updates {
            if self.death.as_ref().is_some_and(|(at, _)| *at == update) {
                self.replace(round, &sums);
            }
            let flat = self.learners[0].1.learner().layout().flat_len();
            let sum = self.sum(flat, |learner, lane, part| learner.gradient(update, lane, part).expect("a gradient"));
            self.learners.iter_mut().for_each(|(_, learner)| {
                learner.apply(update, &sum).expect("an update");
            });
        }
    }

    /// Another learner has the state of a living one, and gets the trajectories and the sums of the round again.
    fn replace(&mut self, round: u64, sums: &[f32]) {
        let state = self.learners[0].1.snapshot().tensors().expect("tensors");
        let (lanes, _) = self.learners.pop().expect("one that dies");
        let (_, new_learner) = self.death.as_ref().expect("a death");
        let mut learner = new_learner();
        learner.restore(state).expect("a state");
        for lane in lanes.clone() {
            let bytes = &self.trajectories[lane as usize];
            let trajectory = Trajectory::decode(bytes, learner.policy()).expect("a trajectory");
            learner.take(round, lane, trajectory).expect("taken");
        }
        learner.begin(round, sums).expect("a round");
        self.learners.push((lanes, learner));
    }

    fn sum(&mut self, len: usize, each: impl Fn(&mut dyn Learn, u32, &mut [f32])) -> Vec<f32> {
        let mut parts = vec![vec![f32::NAN; len]; self.lanes.len()];
        for (lanes, learner) in &mut self.learners {
            lanes.clone().for_each(|lane| each(&mut **learner, lane, &mut parts[lane as usize]));
        }
        tree_sum(&mut parts).to_vec()
    }
}

#[test]
fn weights_do_not_depend_on_the_number_of_learners_and_actors() {
    let continuous = "[rl]\nalgorithm = 'ppo'\nenvironment = 'Pendulum-v1'\nsteps = 90\nminibatches = 4\nenvs = 2\n";
    let dqn = "[rl]\nalgorithm = 'dqn'\nenvironment = 'Acrobot-v1'\nlearning_starts = 100\nenvs = 3\nreplay = 400\n";
    let impala = "[rl]\nalgorithm = 'impala'\nenvironment = 'CartPole-v1'\nenvs = 3\n";
    for spec in [CART_POLE, continuous, dqn, impala] {
        let mut solo = Solo::new(spec, 4, 3).expect("a good spec");
        (0..12).for_each(|_| drop(solo.round().expect("a round")));
        let expected = solo.learner().learner().weights_blake3();
        for (learners, actors) in [(1, 1), (2, 3), (4, 2)] {
            let mut cluster = Cluster::new(spec, (3, 4), learners, actors);
            let mut order = Pcg64::new(actors as u64);
            (0..12).for_each(|round| cluster.round(round, &mut order));
            for (lanes, learner) in &cluster.learners {
                assert_eq!(learner.learner().weights_blake3(), expected, "{spec}: {learners}, {lanes:?}, {actors}");
            }
        }
    }
}

#[test]
fn learner_that_takes_over_in_the_middle_of_a_round_changes_no_bit() {
    let hash = |death: Option<u32>| {
        let mut cluster = Cluster::new(CART_POLE, (3, 4), 2, 2);
        let mut order = Pcg64::new(1);
        for round in 0..4 {
            let new_learner = || -> Box<dyn Learn> {
                let config = RlConfig::parse(CART_POLE).expect("a good spec");
                let env = config.environment().make(1).expect("an environment").spec().clone();
                learn(&config, &config.plan(CART_POLE, &env, 4).expect("a plan"), &env, 3).expect("a learner")
            };
            cluster.death = death.map(|at| ((at + round as u32 * 5) % 16, Box::new(new_learner) as _));
            cluster.round(round, &mut order);
        }
        cluster.learners.iter().map(|(_, learner)| learner.learner().weights_blake3()).collect::<Vec<_>>()
    };
    let calm = hash(None);
    assert_eq!(calm[0], calm[1]);
    for death in [0, 1, 7, 15] {
        assert_eq!(hash(Some(death)), calm, "a death at update {death}");
    }
}

#[test]
fn learner_that_is_restored_goes_on_with_the_same_bits() {
    let dqn = "[rl]\nalgorithm = 'dqn'\nenvironment = 'CartPole-v1'\nlearning_starts = 40\ntarget_every = 70\n";
    for spec in [CART_POLE, dqn] {
        let mut cluster = Cluster::new(spec, (3, 4), 1, 1);
        let mut order = Pcg64::new(1);
        (0..6).for_each(|round| cluster.round(round, &mut order));
        let saved = cluster.learners[0].1.snapshot().tensors().expect("tensors");
        let config = RlConfig::parse(spec).expect("a good spec");
        let env = config.environment().make(1).expect("an environment").spec().clone();
        // Another seed: nothing of its own may be left.
        let mut other = learn(&config, &cluster.plan, &env, 99).expect("a learner");
        other.restore(saved.clone()).expect("a state");
        assert_eq!(other.learner().weights_blake3(), cluster.learners[0].1.learner().weights_blake3());
        assert_eq!(other.learner().fingerprint(), cluster.learners[0].1.learner().fingerprint());
        assert_eq!(other.learner().version(), cluster.learners[0].1.learner().version());
        assert_eq!(other.snapshot().tensors().expect("tensors"), saved);
        for damaged in 0..saved.len() {
            let mut tensors = saved.clone();
            tensors.remove(damaged);
            assert!(other.restore(tensors).is_err(), "without {}", saved[damaged].name);
        }
        assert_eq!(other.snapshot().tensors().expect("tensors"), saved, "nothing changes before everything is checked");
    }
    // All of PPO's state is there: the next rounds are the same.
    let mut whole = Cluster::new(CART_POLE, (3, 4), 1, 1);
    let mut order = Pcg64::new(1);
    (0..3).for_each(|round| whole.round(round, &mut order));
    let mut resumed = Cluster::new(CART_POLE, (3, 4), 2, 1);
    resumed.lanes.clone_from(&whole.lanes);
    for (_, learner) in &mut resumed.learners {
        learner.restore(whole.learners[0].1.snapshot().tensors().expect("tensors")).expect("a state");
    }
    for round in 3..6 {
        whole.round(round, &mut order);
        resumed.round(round, &mut order);
    }
    let hash = |cluster: &Cluster| cluster.learners[0].1.learner().weights_blake3();
    assert_eq!(hash(&resumed), hash(&whole));
}

#[test]
fn trajectories_of_another_round_or_lane_or_too_old_a_policy_are_refused() {
    let impala = "[rl]\nalgorithm = 'impala'\nenvironment = 'CartPole-v1'\nstaleness = 2\n";
    for (spec, rounds) in [(CART_POLE, 1), (impala, 3)] {
        let mut cluster = Cluster::new(spec, (3, 4), 1, 1);
        let (explore, steps) = (cluster.learners[0].1.explore(), cluster.plan.steps);
        let state = cluster.lanes[0].clone();
        let (actor, rollout) = &mut cluster.actors[0];
        actor.load(0, cluster.learners[0].1.learner().weights()).expect("weights");
        let (old, _) = rollout.run(&state, actor, (explore, steps)).expect("a rollout");
        let mut order = Pcg64::new(1);
        (0..rounds).for_each(|round| cluster.round(round, &mut order));
        let learner = &mut cluster.learners[0].1;
        let refused = |result: Result<(), RlError>| matches!(result, Err(RlError::Contract { .. }));
        assert!(refused(learner.take(rounds, 0, old.clone())), "{spec}: too old");
        assert!(refused(learner.take(rounds, 1, Trajectory { version: learner.learner().version(), ..old.clone() })));
        assert!(refused(learner.take(rounds, 0, Trajectory { version: u64::MAX, ..old })), "{spec}: of the future");
    }
}

#[test]
fn weights_have_these_bits_on_every_machine() {
    let continuous = "[rl]\nalgorithm = 'ppo'\nenvironment = 'Pendulum-v1'\nsteps = 256\n";
    let dqn = "[rl]\nalgorithm = 'dqn'\nenvironment = 'CartPole-v1'\nlearning_starts = 100\n";
    let impala = "[rl]\nalgorithm = 'impala'\nenvironment = 'Acrobot-v1'\n";
    let hashes = [CART_POLE, continuous, dqn, impala].map(|spec| {
        let mut solo = Solo::new(spec, 4, 3).expect("a good spec");
        (0..8).for_each(|_| drop(solo.round().expect("a round")));
        solo.learner().learner().weights_blake3()[..4].iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    });
    // They change only with the arithmetic: then every job's bits do, and the change log says so.
    assert_eq!(hashes, ["92e78704", "41d9934b", "d1c6b47c", "f336bdb9"]);
}

#[test]
fn lane_that_comes_back_after_a_round_elsewhere_brings_its_own_trajectory() {
    for spec in [CART_POLE, "[rl]\nalgorithm = 'impala'\nenvironment = 'CartPole-v1'\n"] {
        let mut cluster = Cluster::new(spec, (3, 1), 1, 1);
        cluster.round(0, &mut Pcg64::new(1));
        let (_, learner) = &mut cluster.learners[0];
        let mut sums = vec![0.0; learner.sums_len()];
        learner.sums(0, &mut sums).expect("sums");
        // The round begins while the lane is with another learner.
        learner.begin(1, &sums).expect("a round");
        let (actor, rollout) = &mut cluster.actors[0];
        actor.load(learner.learner().version(), learner.learner().weights()).expect("weights");
        let steps = (learner.explore(), cluster.plan.steps);
        let (trajectory, _) = rollout.run(&cluster.lanes[0], actor, steps).expect("a rollout");
        learner.take(1, 0, trajectory).expect("taken");
        let mut later = sums.clone();
        learner.sums(0, &mut later).expect("sums");
        assert_ne!(later, sums, "{spec}");
    }
}
