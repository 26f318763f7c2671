//! A rollout as a function: (state of a lane, policy, steps) to (trajectory, state of the lane). Owns the envs of one lane at a time, and all that
//! must go with them to another machine. Deterministic: the same call gives the same bits in any process.
//!
//! E2: what `play` does follows from the lane's bytes and the actor alone, whether the envs are still there from the last call or were restored. An environment that
//! is not a function of its seed and actions breaks that: what it gave when it was restored is what counts then, and it is counted.

use super::actor::{Acted, Actor, Choices, Explore, Place};
use super::draws::{Draws, Stream};
use super::env::{Actions, Step, VecEnv};
use super::error::{RlError, check_len};
use super::evaluation::Normaliser;
use super::running::Running;
use super::space::Space;
use super::trajectory::{ENDED, Episode, Reader, TERMINATED, TRANSITION, TRUNCATED, Trajectory};

const MAGIC: [u8; 4] = *b"STl1";
/// Of one env's bytes. The largest world of `scan-budget` takes less.
const ENV_BYTES_MAX: usize = 64 << 20;

/// What does not change of a job's rollouts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RolloutConfig {
    /// Of the job.
    pub seed: u64,
    /// Whether observations and rewards are divided by their running deviations.
    pub normalise: bool,
    /// Of the returns that rewards are divided by the deviation of.
    pub gamma: f64,
}

/// All that an env is, beside what the environment itself saves.
#[derive(Debug, Clone)]
struct Course {
    /// The last step ended the episode.
    ended: bool,
    /// Of the episode so far.
    length: u32,
    sum: f64,
    running: Option<Running>,
}

/// A lane whose envs are here.
#[derive(Debug)]
struct Live {
    lane: u32,
    /// Steps that each env has done.
    steps: u64,
    /// [envs, numbers], as the policy sees them.
    observations: Vec<f32>,
    courses: Vec<Course>,
}

/// Plays the lanes of one job, one at a time.
pub struct Rollout {
    config: RolloutConfig,
    env: Box<dyn VecEnv>,
    /// None before the first lane, and after an error.
    live: Option<Live>,
    /// The bytes of what is here, where they are known.
    saved: Vec<u8>,
    /// Of an action; None: actions are choices.
    bounds: Option<(Vec<f32>, Vec<f32>)>,
    terminated: Vec<bool>,
    truncated: Vec<bool>,
    cut: Vec<f32>,
    /// Envs that were restored to something else than what was saved.
    strays: u32,
}

impl Rollout {
    /// `env` has as many envs as a lane of the job.
    pub fn new(config: RolloutConfig, env: Box<dyn VecEnv>) -> Self {
        let flags = vec![false; env.num_envs()];
        let bounds = match &env.spec().action {
            Space::Discrete { .. } => None,
            Space::Box { low, high } => Some((low.clone(), high.clone())),
        };
        let (terminated, truncated) = (flags.clone(), flags);
        Self { config, env, live: None, saved: Vec::new(), bounds, terminated, truncated, cut: Vec::new(), strays: 0 }
    }

    pub fn num_envs(&self) -> usize {
        self.env.num_envs()
    }

    /// Takes up a lane where the job begins.
    pub fn begin(&mut self, lane: u32) -> Result<(), RlError> {
        self.live = None;
        self.saved.clear();
        let (envs, len) = (self.env.num_envs(), self.env.spec().observation_len());
        let seeds: Vec<u64> = places(lane, envs, 0)
            .map(|place| Draws::new(self.config.seed, Stream::EnvSeeds, [place.env, 0, 0]).bits())
            .collect();
        let mut observations = vec![0.0; envs * len];
        self.env.reset(&seeds, &mut observations)?;
        let running = self.config.normalise.then(|| Running::new(len));
        let mut courses = vec![Course { ended: false, length: 0, sum: 0.0, running }; envs];
        for (course, row) in courses.iter_mut().zip(observations.chunks_mut(len)) {
            if let Some(running) = &mut course.running {
                running.observe(row);
            }
        }
        self.live = Some(Live { lane, steps: 0, observations, courses });
        Ok(())
    }

    /// Envs that were restored to something else than what was saved, since the last call.
    pub fn take_strays(&mut self) -> u32 {
        std::mem::take(&mut self.strays)
    }

    /// The lane that is here, and the steps that its envs have done.
    pub fn at(&self) -> Option<(u32, u64)> {
        self.live.as_ref().map(|live| (live.lane, live.steps))
    }

    /// The whole function. Envs that are here in this state already are not restored.
    pub fn run(
        &mut self,
        state: &[u8],
        actor: &mut Actor,
        (explore, steps): (Explore, usize),
    ) -> Result<(Trajectory, Vec<u8>), RlError> {
        self.load(state)?;
        let trajectory = self.play(actor, explore, steps)?;
        Ok((trajectory, self.save()?))
    }

    /// Steps of the lane that is here. After an error there is none.
    pub fn play(&mut self, actor: &mut Actor, explore: Explore, steps: usize) -> Result<Trajectory, RlError> {
        self.saved.clear();
        let Some(mut live) = self.live.take() else {
            return Err(RlError::Contract { what: "lanes that are here", got: 0, expected: 1 });
        };
        let (envs, len) = (self.env.num_envs(), self.env.spec().observation_len());
        check_len("numbers of the policy's observation", actor.policy().observation_len(), len)?;
        let rows = steps * envs;
        let mut trajectory = Trajectory {
            lane: live.lane,
            begun: live.steps,
            version: actor.version(),
            steps,
            envs,
            observations: vec![0.0; (rows + envs) * len],
            rewards: vec![0.0; rows],
            flags: vec![0; rows],
            ..Trajectory::default()
        };
        trajectory.log_probs.reserve_exact(rows);
        trajectory.values.reserve_exact(rows + envs);
        trajectory.observations[..envs * len].copy_from_slice(&live.observations);
        let mut choices = Choices::default();
        for step in 0..steps {
            choices.clear();
            let (before, after) = trajectory.observations.split_at_mut((step + 1) * envs * len);
            let mut acted =
                Acted { choices: &mut choices, log_probs: &mut trajectory.log_probs, values: &mut trajectory.values };
            let places = places(live.lane, envs, live.steps);
            actor.act(&before[step * envs * len..], places, explore, &mut acted)?;
            self.step(&choices, &mut after[..envs * len], &mut trajectory.rewards[step * envs..][..envs])?;
            trajectory.actions.discrete.extend(&choices.discrete);
            trajectory.actions.continuous.extend(&choices.continuous);
            let here = step * envs..(step + 1) * envs;
            let (flags, rewards) = (&mut trajectory.flags[here.clone()], &mut trajectory.rewards[here]);
            self.settle(&mut live.courses, (&mut after[..envs * len], rewards, flags), |env, length, sum| {
                trajectory.episodes.push(Episode { env, step: step as u32, length, sum });
            });
            live.steps += 1;
        }
        let last = &trajectory.observations[rows * len..];
        actor.value(last, &mut trajectory.values);
        live.observations.copy_from_slice(last);
        self.live = Some(live);
        Ok(trajectory)
    }

    /// One step of the environment, with actions inside of their bounds.
    fn step(&mut self, choices: &Choices, observations: &mut [f32], rewards: &mut [f32]) -> Result<(), RlError> {
        let step = Step { observations, rewards, terminated: &mut self.terminated, truncated: &mut self.truncated };
        let Some((low, high)) = &self.bounds else {
            return Ok(self.env.step(Actions::Discrete(&choices.discrete), step)?);
        };
        self.cut.clear();
        for row in choices.continuous.chunks(low.len()) {
            let bounds = low.iter().zip(high);
            self.cut.extend(row.iter().zip(bounds).map(|(value, (low, high))| value.max(*low).min(*high)));
        }
        Ok(self.env.step(Actions::Box(&self.cut), step)?)
    }

    /// Counts what a step did, and writes what policy and learner see of it.
    fn settle(
        &self,
        courses: &mut [Course],
        (observations, rewards, flags): (&mut [f32], &mut [f32], &mut [u8]),
        mut ended: impl FnMut(u32, u32, f64),
    ) {
        let rows = observations.chunks_mut(self.env.spec().observation_len());
        for (env, ((course, row), (reward, flag))) in
            courses.iter_mut().zip(rows).zip(rewards.iter_mut().zip(flags)).enumerate()
        {
            let (terminated, truncated) = (self.terminated[env], self.truncated[env]);
            if let Some(running) = &mut course.running {
                running.observe(row);
            }
            if course.ended {
                (course.ended, course.length, course.sum) = (false, 0, 0.0);
                continue;
            }
            *flag = TRANSITION | (u8::from(terminated) * TERMINATED) | (u8::from(truncated) * TRUNCATED);
            course.length = course.length.saturating_add(1);
            course.sum += f64::from(*reward);
            if let Some(running) = &mut course.running {
                *reward = running.reward(*reward, terminated, self.config.gamma);
            }
            if *flag & ENDED != 0 {
                course.ended = true;
                ended(env as u32, course.length, course.sum);
            }
        }
    }

    /// The lane that is here, as bytes.
    pub fn save(&mut self) -> Result<Vec<u8>, RlError> {
        let Some(live) = &self.live else {
            return Err(RlError::Contract { what: "lanes that are here", got: 0, expected: 1 });
        };
        let len = self.env.spec().observation_len();
        let mut bytes = MAGIC.to_vec();
        bytes.extend(live.lane.to_le_bytes());
        bytes.extend(live.steps.to_le_bytes());
        bytes.extend((live.courses.len() as u32).to_le_bytes());
        bytes.push(u8::from(self.config.normalise));
        for (env, (course, row)) in live.courses.iter().zip(live.observations.chunks(len)).enumerate() {
            bytes.push(u8::from(course.ended));
            bytes.extend(course.length.to_le_bytes());
            bytes.extend(course.sum.to_le_bytes());
            bytes.extend(row.iter().flat_map(|value| value.to_le_bytes()));
            if let Some(running) = &course.running {
                running.encode(&mut bytes);
            }
            let saved = self.env.save(env)?;
            bytes.extend((saved.len() as u32).to_le_bytes());
            bytes.extend(saved);
        }
        self.saved.clone_from(&bytes);
        Ok(bytes)
    }

    /// What an evaluation is to see observations through: the statistics of the envs of a saved lane together. None: nothing is normalised.
    pub fn normaliser(&self, state: &[u8]) -> Result<Option<Normaliser>, RlError> {
        let bad = |problem: &str| RlError::Bytes { what: "a lane", problem: problem.to_owned() };
        let (live, _) = self.read(state).map_err(bad)?;
        let envs = live.courses.into_iter().filter_map(|course| course.running.map(Normaliser));
        Ok(envs.reduce(|mut all, env| {
            all.merge(&env);
            all
        }))
    }

    /// Takes up the lane of [`Self::save`]. Nothing is restored where that is what is here. After an error there is no lane.
    pub fn load(&mut self, state: &[u8]) -> Result<(), RlError> {
        if self.live.is_some() && self.saved == state {
            return Ok(());
        }
        self.live = None;
        let bad = |problem: &str| RlError::Bytes { what: "a lane", problem: problem.to_owned() };
        let (mut live, saved) = self.read(state).map_err(bad)?;
        let len = self.env.spec().observation_len();
        let mut seen = vec![0.0; len];
        let rows = live.observations.chunks_mut(len).zip(&live.courses);
        for (env, (saved, (row, course))) in saved.into_iter().zip(rows).enumerate() {
            self.env.restore(env, saved, &mut seen)?;
            if let Some(running) = &course.running {
                running.normalise(&mut seen);
            }
            let same = seen.iter().zip(&*row).all(|(seen, row)| seen.to_bits() == row.to_bits());
            if !same {
                row.copy_from_slice(&seen);
                self.strays += 1;
            }
        }
        self.live = Some(live);
        self.saved = state.to_vec();
        Ok(())
    }

    /// The inverse of `save`, but for the environments' own bytes.
    fn read<'a>(&self, state: &'a [u8]) -> Result<(Live, Vec<&'a [u8]>), &'static str> {
        let mut reader = Reader(state);
        if reader.take::<4>()? != MAGIC {
            return Err("it begins with other bytes");
        }
        let (lane, steps, envs) = (reader.word()?, reader.long()?, reader.word()? as usize);
        if envs != self.env.num_envs() || reader.take::<1>()? != [u8::from(self.config.normalise)] {
            return Err("it is of another job: envs or normalisation differ");
        }
        let len = self.env.spec().observation_len();
        let (mut observations, mut courses, mut saved) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..envs {
            let ended = match reader.take::<1>()? {
                [0] => false,
                [1] => true,
                _ => return Err("an episode neither runs nor has ended"),
            };
            let (length, sum) = (reader.word()?, reader.double()?);
            observations.extend(reader.floats(len)?);
            let running = self.config.normalise.then(|| Running::decode(len, &mut reader)).transpose()?;
            courses.push(Course { ended, length, sum, running });
            let bytes = reader.word()? as usize;
            if bytes > ENV_BYTES_MAX {
                return Err("an env is too large");
            }
            saved.push(reader.bytes(bytes)?);
        }
        if !reader.0.is_empty() {
            return Err("bytes follow its last env");
        }
        Ok((Live { lane, steps, observations, courses }, saved))
    }
}

/// Where the draws of a lane's envs stand.
fn places(lane: u32, envs: usize, step: u64) -> impl ExactSizeIterator<Item = Place> {
    (0..envs).map(move |env| Place { env: u64::from(lane) * envs as u64 + env as u64, step })
}
