//! What an environment is: gymnasium 1.4's semantics over envs (`core.py`, `vector/sync_vector_env.py`). Owns the interface, its errors and
//! the list of native environments; computes nothing.
//!
//! An env is one course of episodes. E1: it has a seed and a generator of its own, so that what it does depends on its seed and its actions alone,
//! whatever other envs there are and whichever process they run in.

use std::io;

use super::Space;
use super::cells::Cells;
use super::classic;
use super::scan_budget::{ScanBudget, WorldConfig};

/// What does not change of an environment.
#[derive(Debug, Clone, PartialEq)]
pub struct EnvSpec {
    pub name: String,
    /// Of one env. Always a box: other spaces are flattened (one-hot where they are choices).
    pub observation: Space,
    /// Of one env.
    pub action: Space,
    /// Steps after which an episode is truncated. None: the environment has no such limit, or keeps it to itself.
    pub steps_max: Option<u32>,
    /// Where the actions are the cells of a grid, and the observation is theirs.
    pub cells: Option<Cells>,
}

impl EnvSpec {
    /// Numbers of one env's observation.
    pub fn observation_len(&self) -> usize {
        self.observation.len()
    }
}

/// One action for each env.
#[derive(Debug, Clone, Copy)]
pub enum Actions<'a> {
    /// [envs], each below `n`.
    Discrete(&'a [u32]),
    /// [envs x numbers of the box], env after env. Values beyond the bounds are cut by the environment, as gymnasium's are.
    Box(&'a [f32]),
}

/// Where a step puts what came of it.
#[derive(Debug)]
pub struct Step<'a> {
    /// [envs x numbers of an observation], env after env.
    pub observations: &'a mut [f32],
    /// [envs].
    pub rewards: &'a mut [f32],
    /// [envs]: the episode ended, as the task says: nothing comes after it.
    pub terminated: &'a mut [bool],
    /// [envs]: the episode was cut off, by a limit of steps: more would have come after it.
    pub truncated: &'a mut [bool],
}

/// Memory for the steps of some envs.
#[derive(Debug, Clone, PartialEq)]
pub struct StepBuffer {
    pub observations: Vec<f32>,
    pub rewards: Vec<f32>,
    pub terminated: Vec<bool>,
    pub truncated: Vec<bool>,
}

impl StepBuffer {
    pub fn new(env: &dyn VecEnv) -> Self {
        let envs = env.num_envs();
        Self {
            observations: vec![0.0; envs * env.spec().observation_len()],
            rewards: vec![0.0; envs],
            terminated: vec![false; envs],
            truncated: vec![false; envs],
        }
    }

    pub fn step(&mut self) -> Step<'_> {
        Step {
            observations: &mut self.observations,
            rewards: &mut self.rewards,
            terminated: &mut self.terminated,
            truncated: &mut self.truncated,
        }
    }
}

/// Envs of one environment that step together.
///
/// Envs begin again by themselves in gymnasium's next-step mode: the step that ends an episode gives the episode's last observation; the step
/// after it ignores the env's action, begins an episode with the env's generator as it stands, and gives its first observation with reward 0,
/// neither terminated nor truncated. That step is no transition: whoever learns leaves it out.
pub trait VecEnv: Send {
    fn spec(&self) -> &EnvSpec;

    fn num_envs(&self) -> usize;

    /// Seeds every env and begins an episode in each; `observations` are [envs x numbers of an observation].
    fn reset(&mut self, seeds: &[u64], observations: &mut [f32]) -> Result<(), EnvError>;

    /// One step of every env. After an error nothing in `step` counts and no env has stepped, or the environment is of no use any more
    /// ([`EnvError::is_fatal`]).
    fn step(&mut self, actions: Actions<'_>, step: Step<'_>) -> Result<(), EnvError>;

    /// An env as it stands, generator included. Restored anywhere it goes on with the same bits.
    fn save(&mut self, env: usize) -> Result<Vec<u8>, EnvError>;

    /// Takes over a saved env of the same environment; `observation` is what the env saw last.
    fn restore(&mut self, env: usize, state: &[u8], observation: &mut [f32]) -> Result<(), EnvError>;
}

/// Why an environment could not be made or could not step. Never hidden in a reward.
#[derive(Debug, thiserror::Error)]
pub enum EnvError {
    #[error("there is no environment {name:?} (help: one of {}, or any of gymnasium's through its bridge)", NATIVE.join(", "))]
    Unknown { name: String },
    #[error("options of environment {name}: {problem}")]
    Options { name: String, problem: String },
    /// The caller's actions are not of the environment's action space.
    #[error("action of env {env}: {problem}")]
    Action { env: usize, problem: String },
    /// The caller broke the contract of [`VecEnv`]: a buffer of another length, an env that is not there.
    #[error("{what}: got {got}, expected {expected}")]
    Contract { what: &'static str, got: usize, expected: usize },
    #[error("environment {name} was not reset before its first step")]
    NotReset { name: String },
    /// Bytes that are no saved env of this environment.
    #[error("restore an env of {name}: {problem}")]
    State { name: String, problem: String },
    /// An env of a bridge, whose episode has more actions than are kept to play it again.
    #[error(
        "an env of {name} cannot be saved: its episode is too long to be played again (help: bound it, with max_episode_steps in [rl] options)"
    )]
    Unsaved { name: String },
    /// The process of a bridge could not be started.
    #[error("start {program} for environment {name}: {source}")]
    Start { name: String, program: String, source: io::Error },
    /// Python raised an exception; `said` is the end of its traceback.
    #[error("environment {name} raised an error: {said}")]
    Raised { name: String, said: String },
    /// The process of a bridge ended; `said` is the end of what it wrote to standard error.
    #[error("the process of environment {name} ended ({status}): {said}")]
    Ended { name: String, status: String, said: String },
    #[error("environment {name} gave no answer within {} ms: its process was killed; it had said: {said}", .deadline.as_millis())]
    Silent { name: String, deadline: std::time::Duration, said: String },
    /// The process of a bridge wrote something that is no answer.
    #[error("environment {name} gave an answer that cannot be read: {problem}")]
    Answer { name: String, problem: String },
    #[error("environment {name} gave {what} that is not a finite number in env {env}")]
    NonFinite { name: String, what: &'static str, env: usize },
    /// A call after an error that ended the environment.
    #[error("environment {name} is closed since an earlier error")]
    Closed { name: String },
}

impl EnvError {
    /// Whether another process may do better with the same actions.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Raised { .. }
            | Self::Ended { .. }
            | Self::Silent { .. }
            | Self::Answer { .. }
            | Self::Closed { .. } => true,
            Self::Unknown { .. }
            | Self::Options { .. }
            | Self::Action { .. }
            | Self::Contract { .. }
            | Self::NotReset { .. }
            | Self::State { .. }
            | Self::Unsaved { .. }
            | Self::Start { .. }
            | Self::NonFinite { .. } => false,
        }
    }

    /// Whether the environment is of no use any more: it has to be made and reset again.
    pub fn is_fatal(&self) -> bool {
        match self {
            Self::Start { .. }
            | Self::Raised { .. }
            | Self::Ended { .. }
            | Self::Silent { .. }
            | Self::Answer { .. }
            | Self::NonFinite { .. }
            | Self::Closed { .. }
            | Self::Unknown { .. }
            | Self::Options { .. } => true,
            Self::Action { .. }
            | Self::Contract { .. }
            | Self::NotReset { .. }
            | Self::State { .. }
            | Self::Unsaved { .. } => false,
        }
    }
}

/// Environments that need no Python. The first five have gymnasium's names and are gymnasium's, number for number.
pub const NATIVE: [&str; 6] =
    ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1", "scan-budget"];

/// A native environment by its name, with its default options.
pub fn make(name: &str, envs: usize) -> Result<Box<dyn VecEnv>, EnvError> {
    match name {
        "scan-budget" => Ok(Box::new(ScanBudget::new(WorldConfig::default(), envs)?)),
        _ => classic::make(name, envs).ok_or_else(|| EnvError::Unknown { name: name.to_owned() }),
    }
}

/// The checks that every environment begins with.
pub(crate) fn check_len(what: &'static str, got: usize, expected: usize) -> Result<(), EnvError> {
    if got == expected { Ok(()) } else { Err(EnvError::Contract { what, got, expected }) }
}

pub(crate) fn check_step(spec: &EnvSpec, envs: usize, step: &Step<'_>) -> Result<(), EnvError> {
    check_len("observations of a step", step.observations.len(), envs * spec.observation_len())?;
    check_len("rewards of a step", step.rewards.len(), envs)?;
    check_len("terminated of a step", step.terminated.len(), envs)?;
    check_len("truncated of a step", step.truncated.len(), envs)
}

pub(crate) fn check_actions(spec: &EnvSpec, envs: usize, actions: Actions<'_>) -> Result<(), EnvError> {
    match (actions, &spec.action) {
        (Actions::Discrete(actions), Space::Discrete { n }) => {
            check_len("actions", actions.len(), envs)?;
            match actions.iter().position(|action| action >= n) {
                None => Ok(()),
                Some(env) => {
                    let problem = format!("expected a number below {n}, got {}", actions[env]);
                    Err(EnvError::Action { env, problem })
                }
            }
        }
        (Actions::Box(values), Space::Box { low, .. }) => {
            check_len("numbers of actions", values.len(), envs * low.len())?;
            match values.iter().position(|value| !value.is_finite()) {
                None => Ok(()),
                Some(at) => {
                    let problem = format!("expected finite numbers, got {}", values[at]);
                    Err(EnvError::Action { env: at / low.len(), problem })
                }
            }
        }
        (Actions::Discrete(_), Space::Box { .. }) => {
            Err(EnvError::Action { env: 0, problem: "expected a vector of numbers, got a choice".to_owned() })
        }
        (Actions::Box(_), Space::Discrete { .. }) => {
            Err(EnvError::Action { env: 0, problem: "expected a choice, got a vector of numbers".to_owned() })
        }
    }
}
