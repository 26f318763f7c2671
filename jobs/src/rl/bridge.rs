//! Any environment of gymnasium's, in a Python process of its own (`bridge.py`, which says what is on the pipes). Owns that process: it is killed when
//! the bridge is dropped, when it is silent for too long, and by the kernel when this process dies. A failed environment is a typed error.
//!
//! Never waits without end: a request fits an empty pipe, so that writing it does not block, and every answer has a deadline.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::bridge_process::{Process, SAID_BYTES_MAX};
use super::env::{Actions, EnvError, EnvSpec, Step, VecEnv, check_actions, check_len, check_step};
use super::space::Space;

/// Python's side.
pub(super) const SOURCE: &str = include_str!("bridge.py");
/// Of a request: a pipe of Linux takes 64 KiB, and it is empty when a request is written. More would block on a process that does not read.
const REQUEST_BYTES_MAX: usize = 60 << 10;

/// What a bridge runs, and how long it waits.
#[derive(Debug, Clone, PartialEq)]
pub struct BridgeConfig {
    /// An interpreter that has gymnasium: a path, or a name on the search path.
    pub python: PathBuf,
    /// As of `gymnasium.make`: `Taxi-v4`, or `module:Name-v0` to import a module first.
    pub name: String,
    /// More arguments of `gymnasium.make`.
    pub options: Map<String, Value>,
    /// Folders where Python looks for modules first.
    pub folders: Vec<PathBuf>,
    pub lanes: usize,
    /// How long Python may take to import and make the environments.
    pub start_max: Duration,
    /// How long a reset or a step of all lanes may take.
    pub step_max: Duration,
}

/// Lanes of a gymnasium environment.
#[derive(Debug)]
pub struct Bridge {
    spec: EnvSpec,
    lanes: usize,
    step_max: Duration,
    seeded: bool,
    /// None after an error.
    process: Option<Process>,
    request: Vec<u8>,
}

impl Bridge {
    /// Starts the process and waits until it has made its environments.
    pub fn start(config: &BridgeConfig) -> Result<Self, EnvError> {
        let name = &config.name;
        let options = |problem: String| EnvError::Options { name: name.clone(), problem };
        if config.lanes == 0 || config.lanes * 8 > REQUEST_BYTES_MAX {
            return Err(options(format!("{} lanes: from 1 to {} are possible", config.lanes, REQUEST_BYTES_MAX / 8)));
        }
        let arguments = json!({
            "name": name, "options": config.options, "lanes": config.lanes, "owner": std::process::id(), "bytes_max": SAID_BYTES_MAX,
        });
        let mut process = Process::start(config, &arguments.to_string())?;
        let hello = match process.answer(config.start_max) {
            Ok(hello) => hello,
            Err(answered) => return Err(answered.into_error(name, config.start_max, process)),
        };
        let Some(spec) = hello.split_first().filter(|(kind, _)| **kind == b'H').and_then(|(_, body)| read(name, body))
        else {
            return Err(EnvError::Answer { name: name.clone(), problem: "it does not say what it is".to_owned() });
        };
        let numbers = if let Space::Box { low, .. } = &spec.action { low.len() } else { 1 };
        if config.lanes * numbers * 4 > REQUEST_BYTES_MAX {
            return Err(options(format!("actions of {} lanes are more than {REQUEST_BYTES_MAX} bytes", config.lanes)));
        }
        let step_max = config.step_max;
        Ok(Self { spec, lanes: config.lanes, step_max, seeded: false, process: Some(process), request: Vec::new() })
    }

    /// Process id of the interpreter; None after an error.
    pub fn process_id(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// Sends the request and gives the body of the answer, which has to be of this kind and length. After an error there is no process.
    fn ask(&mut self, kind: u8, len: usize) -> Result<Vec<u8>, EnvError> {
        let name = || self.spec.name.clone();
        let mut process = self.process.take().ok_or_else(|| EnvError::Closed { name: name() })?;
        let mut body = match process.send(&self.request).and_then(|()| process.answer(self.step_max)) {
            Ok(body) => body,
            Err(answered) => return Err(answered.into_error(&self.spec.name, self.step_max, process)),
        };
        if body.first() != Some(&kind) || body.len() != len + 1 {
            let got = body.first().map_or("nothing".to_owned(), |kind| format!("{:?}", *kind as char));
            let problem = format!("{got} of {} bytes, expected {:?} of {len}", body.len(), kind as char);
            return Err(EnvError::Answer { name: name(), problem });
        }
        body.remove(0);
        self.process = Some(process);
        Ok(body)
    }

    fn begin_request(&mut self, kind: u8) {
        self.request.clear();
        self.request.extend([0; 4]);
        self.request.push(kind);
    }

    fn end_request(&mut self) {
        let len = self.request.len() as u32 - 4;
        self.request[..4].copy_from_slice(&len.to_le_bytes());
    }

    /// Copies numbers of `what`, `each` a lane; one that is not finite ends the process.
    fn take(&mut self, what: &'static str, bytes: &[u8], to: &mut [f32]) -> Result<(), EnvError> {
        let each = to.len() / self.lanes;
        for (index, (bytes, to)) in bytes.as_chunks::<4>().0.iter().zip(&mut *to).enumerate() {
            *to = f32::from_le_bytes(*bytes);
            if !to.is_finite() {
                self.process = None;
                return Err(EnvError::NonFinite { name: self.spec.name.clone(), what, lane: index / each });
            }
        }
        Ok(())
    }
}

impl VecEnv for Bridge {
    fn spec(&self) -> &EnvSpec {
        &self.spec
    }

    fn lanes(&self) -> usize {
        self.lanes
    }

    fn reset(&mut self, seeds: &[u64], observations: &mut [f32]) -> Result<(), EnvError> {
        check_len("seeds", seeds.len(), self.lanes)?;
        check_len("observations of a reset", observations.len(), self.lanes * self.spec.observation_len())?;
        self.begin_request(b'S');
        self.request.extend(seeds.iter().flat_map(|seed| seed.to_le_bytes()));
        self.end_request();
        let body = self.ask(b'O', observations.len() * 4)?;
        self.take("an observation", &body, observations)?;
        self.seeded = true;
        Ok(())
    }

    fn step(&mut self, actions: Actions<'_>, step: Step<'_>) -> Result<(), EnvError> {
        check_step(&self.spec, self.lanes, &step)?;
        check_actions(&self.spec, self.lanes, actions)?;
        if !self.seeded {
            return Err(EnvError::NotReset { name: self.spec.name.clone() });
        }
        self.begin_request(b'A');
        match actions {
            Actions::Discrete(actions) => self.request.extend(actions.iter().flat_map(|action| action.to_le_bytes())),
            Actions::Box(values) => self.request.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        }
        self.end_request();
        let seen = step.observations.len() * 4;
        let body = self.ask(b'T', seen + self.lanes * 6)?;
        let (observations, body) = body.split_at(seen);
        let (rewards, flags) = body.split_at(self.lanes * 4);
        self.take("an observation", observations, step.observations)?;
        self.take("a reward", rewards, step.rewards)?;
        let (terminated, truncated) = flags.split_at(self.lanes);
        step.terminated.iter_mut().zip(terminated).for_each(|(to, &flag)| *to = flag == 1);
        step.truncated.iter_mut().zip(truncated).for_each(|(to, &flag)| *to = flag == 1);
        Ok(())
    }

    /// Never possible: an environment's pickle may leave out its state without a word, as that of gymnasium's `EzPickle` does.
    fn save(&mut self, _lane: usize) -> Result<Vec<u8>, EnvError> {
        Err(EnvError::Unsaved { name: self.spec.name.clone() })
    }

    fn restore(&mut self, _lane: usize, _state: &[u8], _observation: &mut [f32]) -> Result<(), EnvError> {
        Err(EnvError::Unsaved { name: self.spec.name.clone() })
    }
}

/// The first answer's body. None: it is not whole.
fn read(name: &str, body: &[u8]) -> Option<EnvSpec> {
    let (words, floats) = body.split_at_checked(16)?;
    let word = |index: usize| u32::from_le_bytes(words[index * 4..][..4].try_into().expect("four bytes"));
    let (floats, rest) = floats.as_chunks::<4>();
    let floats: Vec<f32> = floats.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let numbers = if word(0) == 0 { 0 } else { word(1) as usize };
    let (seen, size) = (word(3) as usize, word(1));
    if !rest.is_empty() || seen == 0 || size == 0 || floats.len() != 2 * (seen + numbers) {
        return None;
    }
    let (observation, action) = floats.split_at(2 * seen);
    let bounds = |values: &[f32]| {
        let (low, high) = values.split_at(values.len() / 2);
        Space::Box { low: low.to_vec(), high: high.to_vec() }
    };
    Some(EnvSpec {
        name: name.to_owned(),
        observation: bounds(observation),
        action: if word(0) == 0 { Space::Discrete { n: size } } else { bounds(action) },
        steps_max: (word(2) > 0).then_some(word(2)),
    })
}
