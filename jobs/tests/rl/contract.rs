//! The contract of `VecEnv` (E1: an env depends on its seed and actions alone), on every native environment.

use stoke_jobs::rl::{Actions, EnvError, NATIVE, Pcg64, Space, StepBuffer, VecEnv, make};

/// Actions of some envs for one step, drawn from a generator an env.
struct Actors(Vec<Pcg64>);

impl Actors {
    fn new(seeds: &[u64]) -> Self {
        Self(seeds.iter().map(|seed| Pcg64::new(seed + 1_000)).collect())
    }

    fn step(&mut self, env: &mut dyn VecEnv, buffer: &mut StepBuffer) {
        match env.spec().action.clone() {
            Space::Discrete { n } => {
                let actions: Vec<u32> = self.0.iter_mut().map(|rng| rng.below(n.into()) as u32).collect();
                env.step(Actions::Discrete(&actions), buffer.step()).expect("a step");
            }
            Space::Box { low, high } => {
                let bounds = || low.iter().zip(&high);
                let draw = |rng: &mut Pcg64| {
                    bounds().map(|(&low, &high)| rng.uniform(low.into(), high.into()) as f32).collect::<Vec<_>>()
                };
                let actions: Vec<f32> = self.0.iter_mut().flat_map(draw).collect();
                env.step(Actions::Box(&actions), buffer.step()).expect("a step");
            }
        }
    }
}

/// What the index of a buffer holds, as bits.
fn row(buffer: &StepBuffer, index: usize) -> (Vec<u32>, u32, bool, bool) {
    let len = buffer.observations.len() / buffer.rewards.len();
    let seen = buffer.observations[index * len..][..len].iter().map(|value| value.to_bits()).collect();
    (seen, buffer.rewards[index].to_bits(), buffer.terminated[index], buffer.truncated[index])
}

#[test]
fn env_takes_the_same_course_in_any_company() {
    for name in NATIVE {
        let seeds: Vec<u64> = (0..70).collect();
        let mut many = make(name, seeds.len()).expect("a native environment");
        let mut among = StepBuffer::new(&*many);
        many.reset(&seeds, &mut among.observations).expect("a reset");
        let chosen = [3, 31, 32, 69];
        let mut alone: Vec<_> = chosen
            .iter()
            .map(|&seed| {
                let mut env = make(name, 1).expect("a native environment");
                let mut buffer = StepBuffer::new(&*env);
                env.reset(&[seed as u64], &mut buffer.observations).expect("a reset");
                (env, buffer, Actors::new(&[seed as u64]))
            })
            .collect();
        let mut actors = Actors::new(&seeds);
        for step in 0..1_200 {
            actors.step(&mut *many, &mut among);
            for ((env, buffer, actor), &index) in alone.iter_mut().zip(&chosen) {
                actor.step(&mut **env, buffer);
                assert_eq!(row(&among, index), row(buffer, 0), "{name}, env {index}, step {step}");
            }
        }
    }
}

#[test]
fn saved_env_goes_on_elsewhere_with_the_same_bits() {
    for name in NATIVE {
        let seeds = [5, 6, 7];
        let mut env = make(name, 3).expect("a native environment");
        let mut buffer = StepBuffer::new(&*env);
        env.reset(&seeds, &mut buffer.observations).expect("a reset");
        let mut actors = Actors::new(&seeds);
        for round in 0..40 {
            (0..7 + round % 5).for_each(|_| actors.step(&mut *env, &mut buffer));
            let saved = env.save(2).expect("a saved index");
            let mut other = make(name, 1).expect("a native environment");
            let mut there = StepBuffer::new(&*other);
            other.restore(0, &saved, &mut there.observations).expect("a restored index");
            assert_eq!(row(&there, 0).0, row(&buffer, 2).0, "{name}: the observation is there again");
            assert_eq!(other.save(0).expect("a saved index"), saved);
            let mut actor = Actors(vec![actors.0[2].clone()]);
            for _ in 0..60 {
                actors.step(&mut *env, &mut buffer);
                actor.step(&mut *other, &mut there);
                assert_eq!(row(&there, 0), row(&buffer, 2), "{name}");
            }
        }
    }
}

#[test]
fn step_after_an_end_begins_an_episode_and_nothing_else() {
    for name in NATIVE {
        let mut env = make(name, 8).expect("a native environment");
        let mut buffer = StepBuffer::new(&*env);
        let seeds: Vec<u64> = (0..8).collect();
        env.reset(&seeds, &mut buffer.observations).expect("a reset");
        let mut actors = Actors::new(&seeds);
        let (mut ends, mut ended) = (0, [false; 8]);
        for _ in 0..2_100 {
            actors.step(&mut *env, &mut buffer);
            for (index, ended) in ended.iter_mut().enumerate() {
                let end = buffer.terminated[index] || buffer.truncated[index];
                assert!(!*ended || (!end && buffer.rewards[index] == 0.0), "{name}");
                ends += u32::from(end);
                *ended = end;
            }
        }
        assert!(ends > 0, "{name}: episodes end");
    }
}

#[test]
fn wrong_calls_are_errors_and_change_nothing() {
    for name in NATIVE {
        let mut env = make(name, 2).expect("a native environment");
        let mut buffer = StepBuffer::new(&*env);
        let good = match &env.spec().action {
            Space::Discrete { .. } => Actions::Discrete(&[0, 1]),
            Space::Box { .. } => Actions::Box(&[0.5, 0.25]),
        };
        assert!(matches!(env.step(good, buffer.step()), Err(EnvError::NotReset { .. })), "{name}");
        assert!(matches!(env.reset(&[1], &mut buffer.observations), Err(EnvError::Contract { .. })), "{name}");
        env.reset(&[1, 2], &mut buffer.observations).expect("a reset");
        let before = env.save(1).expect("a saved index");
        let wrong = match &env.spec().action {
            Space::Discrete { n } => [Actions::Discrete(&[0, *n][..]), Actions::Box(&[0.0, 0.0])].map(owned),
            Space::Box { .. } => [Actions::Box(&[0.0, f32::NAN]), Actions::Discrete(&[0, 0])].map(owned),
        };
        for (choices, values) in wrong {
            let actions = if values.is_empty() { Actions::Discrete(&choices) } else { Actions::Box(&values) };
            let error = env.step(actions, buffer.step()).expect_err("a wrong action");
            assert!(matches!(error, EnvError::Action { .. }) && !error.is_fatal(), "{name}: {error}");
        }
        for damaged in [&before[..before.len() - 1], &before[1..], b"", &[before.as_slice(), b"x"].concat()] {
            let len = env.spec().observation_len();
            let error = env.restore(0, damaged, &mut buffer.observations[..len]).expect_err("damaged bytes");
            assert!(matches!(error, EnvError::State { .. }), "{name}: {error}");
        }
        assert_eq!(env.save(1).expect("a saved index"), before, "{name}");
    }
    let Err(error) = make("CartPole-v7", 1) else { panic!("there is no such environment") };
    assert!(error.to_string().contains("CartPole-v1"), "{error}");
}

fn owned(actions: Actions<'_>) -> (Vec<u32>, Vec<f32>) {
    match actions {
        Actions::Discrete(actions) => (actions.to_vec(), Vec::new()),
        Actions::Box(actions) => (Vec::new(), actions.to_vec()),
    }
}
