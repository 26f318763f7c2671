//! Rollouts as functions (E2), and their bytes from strangers.

use std::sync::Arc;

use serde_json::Map;
use stoke_jobs::rl::{
    Actor, EnvConfig, EnvError, Explore, NATIVE, Pcg64, Policy, PolicyKind, RlError, Rollout, RolloutConfig,
    TRANSITION, Trajectory, make,
};

fn policy(env: &str) -> Arc<Policy> {
    let env = make(env, 1).expect("a native environment");
    Arc::new(Policy::new(PolicyKind::ActorCritic, env.spec(), &[16], 6).expect("a policy"))
}

fn actor(policy: &Arc<Policy>) -> Actor {
    let mut actor = Actor::new(policy, 4);
    actor.load(9, &policy.first_weights(4)).expect("weights");
    actor
}

fn rollout(env: &str, envs: usize, normalise: bool) -> Rollout {
    let config = RolloutConfig { seed: 4, normalise, gamma: 0.99 };
    Rollout::new(config, make(env, envs).expect("a native environment"))
}

#[test]
fn rollout_is_a_function_of_state_and_weights() {
    for (env, normalise) in NATIVE.into_iter().flat_map(|env| [(env, false), (env, true)]) {
        let policy = policy(env);
        let mut actor = actor(&policy);
        let (mut one, mut other) = (rollout(env, 3, normalise), rollout(env, 3, normalise));
        one.begin(2).expect("a lane");
        let mut state = one.save().expect("its bytes");
        let mut whole = Vec::new();
        for steps in [1, 40, 7, 300] {
            let here = one.run(&state, &mut actor, (Explore::Sample, steps)).expect("a rollout");
            // Restored elsewhere, after another lane was there.
            other.begin(5).expect("another lane");
            other.play(&mut actor, Explore::Sample, 11).expect("a rollout");
            let there = other.run(&state, &mut actor, (Explore::Sample, steps)).expect("a rollout");
            assert!(here == there, "{env}, {normalise}");
            whole.push(here.0);
            state = here.1;
        }
        // In one piece.
        one.begin(2).expect("a lane");
        let piece = one.play(&mut actor, Explore::Sample, 348).expect("a rollout");
        let rewards: Vec<f32> = whole.iter().flat_map(|part| part.rewards.clone()).collect();
        assert!(piece.rewards == rewards && one.save().expect("its bytes") == state, "{env}, {normalise}");
        assert_eq!((piece.lane, piece.begun, piece.version), (2, 0, 9));
        assert!(piece.flags.iter().any(|flag| flag & TRANSITION != 0));
    }
}

#[test]
fn rollout_of_gymnasiums_environment_goes_on_in_another_process() {
    let Some(python) = crate::bridge::python() else { return };
    for name in ["Taxi-v4", "FrozenLake-v1"] {
        let python = Some(python.to_owned());
        let env = EnvConfig { name: name.to_owned(), options: Map::new(), python, folders: Vec::new() };
        let begin = || {
            let config = RolloutConfig { seed: 4, normalise: false, gamma: 0.99 };
            Rollout::new(config, env.make(2).expect("gymnasium starts"))
        };
        let spec = env.make(1).expect("gymnasium starts").spec().clone();
        let policy = Policy::new(PolicyKind::ActorCritic, &spec, &[16], 6).expect("a policy");
        let mut actor = actor(&Arc::new(policy));
        let (mut one, mut other) = (begin(), begin());
        one.begin(0).expect("a lane");
        let mut state = one.save().expect("its bytes");
        for steps in [30, 170, 90] {
            let here = one.run(&state, &mut actor, (Explore::Sample, steps)).expect("a rollout");
            let there = other.run(&state, &mut actor, (Explore::Sample, steps)).expect("a rollout");
            assert!(here == there, "{name}");
            // The next piece is played where the envs have to be restored.
            other.begin(1).expect("another lane");
            state = here.1;
        }
    }
}

#[test]
fn state_of_the_same_step_under_other_weights_is_restored() {
    let policy = policy("CartPole-v1");
    let mut actor = actor(&policy);
    let mut one = rollout("CartPole-v1", 2, false);
    one.begin(0).expect("a lane");
    let first = one.save().expect("its bytes");
    one.play(&mut actor, Explore::Sample, 5).expect("a rollout");
    let sampled = one.save().expect("its bytes");
    one.load(&first).expect("a lane");
    one.play(&mut actor, Explore::Greedy, 5).expect("a rollout");
    assert_ne!(one.save().expect("its bytes"), sampled);
    one.load(&sampled).expect("a lane");
    one.load(&first).expect("a lane");
    one.load(&sampled).expect("a lane");
    assert_eq!(one.save().expect("its bytes"), sampled);
}

#[test]
fn episodes_have_the_environments_own_rewards() {
    let policy = policy("CartPole-v1");
    for normalise in [false, true] {
        let mut one = rollout("CartPole-v1", 4, normalise);
        one.begin(0).expect("a lane");
        let trajectory = one.play(&mut actor(&policy), Explore::Sample, 400).expect("a rollout");
        assert!(trajectory.episodes.len() > 20);
        assert!(trajectory.episodes.iter().all(|episode| episode.sum == f64::from(episode.length)));
        let lengths: u32 = trajectory.episodes.iter().map(|episode| episode.length).sum();
        assert!(lengths as usize <= trajectory.transitions().len());
    }
}

#[test]
fn bytes_of_a_trajectory_are_read_whole_or_refused() {
    for env in ["CartPole-v1", "Pendulum-v1"] {
        let policy = policy(env);
        let mut one = rollout(env, 2, false);
        one.begin(1).expect("a lane");
        let trajectory = one.play(&mut actor(&policy), Explore::Sample, 60).expect("a rollout");
        let bytes = trajectory.encode();
        assert_eq!(Trajectory::decode(&bytes, &policy).expect("a trajectory"), trajectory);
        let refused = |bytes: &[u8]| matches!(Trajectory::decode(bytes, &policy), Err(RlError::Bytes { .. }));
        assert!((0..bytes.len()).all(|len| refused(&bytes[..len])));
        assert!(refused(&[bytes.as_slice(), &[0]].concat()));
        let mut rng = Pcg64::new(2);
        for _ in 0..20_000 {
            let mut damaged = bytes.clone();
            for _ in 0..=rng.below(3) {
                // Headers more often than numbers.
                let reach = if rng.below(2) == 0 { 48 } else { damaged.len() as u64 };
                let at = rng.below(reach) as usize;
                damaged[at] = rng.bits() as u8;
            }
            if let Ok(read) = Trajectory::decode(&damaged, &policy) {
                assert_eq!(read.encode(), damaged);
            }
        }
        let other = self::policy(if env == "CartPole-v1" { "Acrobot-v1" } else { "CartPole-v1" });
        assert!(matches!(Trajectory::decode(&bytes, &other), Err(RlError::Bytes { .. })));
    }
}

#[test]
fn bytes_of_a_lane_are_read_whole_or_refused() {
    let policy = policy("CartPole-v1");
    for normalise in [false, true] {
        let mut one = rollout("CartPole-v1", 2, normalise);
        one.begin(1).expect("a lane");
        one.play(&mut actor(&policy), Explore::Sample, 30).expect("a rollout");
        let bytes = one.save().expect("its bytes");
        let mut other = rollout("CartPole-v1", 2, normalise);
        assert!((0..bytes.len()).all(|len| other.load(&bytes[..len]).is_err()));
        assert!(matches!(rollout("CartPole-v1", 3, normalise).load(&bytes), Err(RlError::Bytes { .. })));
        assert!(matches!(rollout("CartPole-v1", 2, !normalise).load(&bytes), Err(RlError::Bytes { .. })));
        assert!(rollout("Acrobot-v1", 2, normalise).load(&bytes).is_err());
        let mut rng = Pcg64::new(2);
        for _ in 0..20_000 {
            let mut damaged = bytes.clone();
            let at = rng.below(damaged.len() as u64) as usize;
            damaged[at] = rng.bits() as u8;
            match other.load(&damaged) {
                // What the environment sees counts, if the bytes say something else of it.
                Ok(()) if other.take_strays() > 0 => assert_eq!(other.save().expect("its bytes").len(), damaged.len()),
                Ok(()) => assert_eq!(other.save().expect("its bytes"), damaged),
                Err(RlError::Bytes { .. } | RlError::Env(EnvError::State { .. })) => assert_eq!(other.at(), None),
                Err(error) => panic!("{error}"),
            }
        }
        // Nothing is here after an error.
        assert!(other.load(&bytes[..9]).is_err() || other.at().is_none());
        other.load(&bytes).expect("a lane");
    }
}
