//! Any environment of gymnasium's, in a Python process of its own (`bridge.py`, which says what is on the pipes). Owns that process: it is killed when
//! the bridge is dropped, when it is silent for too long, and by the kernel when this process dies. A failed environment is a typed error.
//!
//! Gymnasium cannot save an environment: pickles may leave out the state without a word, as those of its `EzPickle` do. So each episode begins with a
//! seed of its own (a function of the env's seed and the episode's number), and a saved env is its seed, that number and the episode's actions so far:
//! a restore plays them again. That is exact where the environment is deterministic in its seed, which gymnasium's checker demands.
//!
//! Never waits without end: a request fits an empty pipe, so that writing it does not block, and every answer has a deadline.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::bridge_process::{Process, SAID_BYTES_MAX};
use super::draws;
use super::env::{Actions, EnvError, EnvSpec, Step, VecEnv, check_actions, check_len, check_step};
use super::space::Space;

/// Python's side.
pub(super) const SOURCE: &str = include_str!("bridge.py");
/// Of a request: a pipe of Linux takes 64 KiB, and it is empty when a request is written. More would block on a process that does not read.
const REQUEST_BYTES_MAX: usize = 60 << 10;

/// Of the actions of one env's episode, which are kept to play them again. An env whose episode is longer cannot be saved until the next one.
const COURSE_BYTES_MAX: usize = 4 << 20;
/// Actions that are played again between two answers, so that the deadline of a step is fair.
const REPLAY_STEPS: usize = 256;

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
    pub num_envs: usize,
    /// How long Python may take to import and make the environments.
    pub start_max: Duration,
    /// How long a reset or a step of all envs may take.
    pub step_max: Duration,
}

/// Envs of a gymnasium environment.
#[derive(Debug)]
pub struct Bridge {
    spec: EnvSpec,
    envs: usize,
    step_max: Duration,
    /// None before the first reset or restore.
    courses: Vec<Option<Course>>,
    /// None after an error.
    process: Option<Process>,
    request: Vec<u8>,
}

/// All that an env's state follows from.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Course {
    seed: u64,
    /// Episodes that ended before this one.
    episode: u64,
    /// The last step ended the episode.
    ended: bool,
    /// Of this episode, as they are sent. None: there were too many.
    actions: Option<Vec<u8>>,
}

impl Course {
    fn new(seed: u64) -> Self {
        Self { seed, episode: 0, ended: false, actions: Some(Vec::new()) }
    }

    /// What an episode begins with. The first one's is the env's own, so that it is gymnasium's of this seed.
    fn seed_of(&self, episode: u64) -> u64 {
        if episode == 0 { self.seed } else { draws::mix(draws::mix(self.seed) ^ episode) }
    }

    fn step(&mut self, action: &[u8], ended: bool) {
        if self.ended {
            self.episode += 1;
            self.actions = Some(Vec::new());
        } else if let Some(actions) = &mut self.actions {
            actions.extend(action);
            if actions.len() > COURSE_BYTES_MAX {
                self.actions = None;
            }
        }
        self.ended = ended;
    }
}

impl Bridge {
    /// Starts the process and waits until it has made its environments.
    pub fn start(config: &BridgeConfig) -> Result<Self, EnvError> {
        let name = &config.name;
        let options = |problem: String| EnvError::Options { name: name.clone(), problem };
        if config.num_envs == 0 || config.num_envs * 12 > REQUEST_BYTES_MAX {
            return Err(options(format!(
                "{} envs: from 1 to {} are possible",
                config.num_envs,
                REQUEST_BYTES_MAX / 12
            )));
        }
        let arguments = json!({
            "name": name, "options": config.options, "envs": config.num_envs, "owner": std::process::id(), "bytes_max": SAID_BYTES_MAX,
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
        if config.num_envs * (8 + numbers * 4) > REQUEST_BYTES_MAX {
            return Err(options(format!(
                "actions of {} envs are more than {REQUEST_BYTES_MAX} bytes",
                config.num_envs
            )));
        }
        let step_max = config.step_max;
        let courses = vec![None; config.num_envs];
        Ok(Self { spec, envs: config.num_envs, step_max, courses, process: Some(process), request: Vec::new() })
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

    /// Copies numbers of `what`, `each` an env; one that is not finite ends the process.
    fn take(&mut self, what: &'static str, bytes: &[u8], each: usize, to: &mut [f32]) -> Result<(), EnvError> {
        for (index, (bytes, to)) in bytes.as_chunks::<4>().0.iter().zip(&mut *to).enumerate() {
            *to = f32::from_le_bytes(*bytes);
            if !to.is_finite() {
                self.process = None;
                return Err(EnvError::NonFinite { name: self.spec.name.clone(), what, env: index / each });
            }
        }
        Ok(())
    }
}

impl VecEnv for Bridge {
    fn spec(&self) -> &EnvSpec {
        &self.spec
    }

    fn num_envs(&self) -> usize {
        self.envs
    }

    fn reset(&mut self, seeds: &[u64], observations: &mut [f32]) -> Result<(), EnvError> {
        check_len("seeds", seeds.len(), self.envs)?;
        check_len("observations of a reset", observations.len(), self.envs * self.spec.observation_len())?;
        self.begin_request(b'S');
        self.request.extend(seeds.iter().flat_map(|seed| seed.to_le_bytes()));
        self.end_request();
        let body = self.ask(b'O', observations.len() * 4)?;
        self.take("an observation", &body, self.spec.observation_len(), observations)?;
        self.courses = seeds.iter().map(|&seed| Some(Course::new(seed))).collect();
        Ok(())
    }

    fn step(&mut self, actions: Actions<'_>, step: Step<'_>) -> Result<(), EnvError> {
        check_step(&self.spec, self.envs, &step)?;
        check_actions(&self.spec, self.envs, actions)?;
        if self.courses.contains(&None) {
            return Err(EnvError::NotReset { name: self.spec.name.clone() });
        }
        self.begin_request(b'A');
        let next = self.courses.iter().flatten().map(|course| course.seed_of(course.episode + 1));
        self.request.extend(next.flat_map(u64::to_le_bytes));
        match actions {
            Actions::Discrete(actions) => self.request.extend(actions.iter().flat_map(|action| action.to_le_bytes())),
            Actions::Box(values) => self.request.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        }
        self.end_request();
        let seen = step.observations.len() * 4;
        let body = self.ask(b'T', seen + self.envs * 6)?;
        let (observations, body) = body.split_at(seen);
        let (rewards, flags) = body.split_at(self.envs * 4);
        self.take("an observation", observations, self.spec.observation_len(), step.observations)?;
        self.take("a reward", rewards, 1, step.rewards)?;
        let (terminated, truncated) = flags.split_at(self.envs);
        step.terminated.iter_mut().zip(terminated).for_each(|(to, &flag)| *to = flag == 1);
        step.truncated.iter_mut().zip(truncated).for_each(|(to, &flag)| *to = flag == 1);
        let sent = self.request.split_off(5 + 8 * self.envs);
        let (actions, ends) = (sent.chunks(self.action_bytes()), terminated.iter().zip(truncated));
        for ((course, action), (&end, &cut)) in self.courses.iter_mut().flatten().zip(actions).zip(ends) {
            course.step(action, end == 1 || cut == 1);
        }
        Ok(())
    }

    fn save(&mut self, env: usize) -> Result<Vec<u8>, EnvError> {
        let name = || self.spec.name.clone();
        let course = match self.courses.get(env) {
            None => return Err(EnvError::Contract { what: "env", got: env, expected: self.envs }),
            Some(None) => return Err(EnvError::NotReset { name: name() }),
            Some(Some(course)) => course,
        };
        let Some(actions) = &course.actions else { return Err(EnvError::Unsaved { name: name() }) };
        let mut bytes = Vec::with_capacity(17 + actions.len());
        bytes.extend(course.seed.to_le_bytes());
        bytes.extend(course.episode.to_le_bytes());
        bytes.push(u8::from(course.ended));
        bytes.extend(actions);
        Ok(bytes)
    }

    fn restore(&mut self, env: usize, state: &[u8], observation: &mut [f32]) -> Result<(), EnvError> {
        check_len("observation of a restored env", observation.len(), self.spec.observation_len())?;
        if env >= self.envs {
            return Err(EnvError::Contract { what: "env", got: env, expected: self.envs });
        }
        let course = self.read_course(state).map_err(|problem| {
            let name = self.spec.name.clone();
            EnvError::State { name, problem: problem.to_owned() }
        })?;
        let seed = course.seed_of(course.episode);
        let actions = course.actions.as_ref().expect("read_course gives actions");
        // The first piece begins the episode, and may be empty.
        let pieces = actions.chunks(REPLAY_STEPS * self.action_bytes());
        let first: &[u8] = &[];
        for (index, piece) in std::iter::once(first).chain(pieces).enumerate() {
            self.begin_request(b'R');
            self.request.extend((env as u32).to_le_bytes());
            self.request.extend(seed.to_le_bytes());
            self.request.push(u8::from(index == 0));
            self.request.extend(piece);
            self.end_request();
            let body = self.ask(b'P', observation.len() * 4)?;
            self.take("an observation", &body, observation.len(), observation)?;
        }
        self.courses[env] = Some(course);
        Ok(())
    }
}

impl Bridge {
    /// Bytes of one env's action.
    fn action_bytes(&self) -> usize {
        if let Space::Box { low, .. } = &self.spec.action { low.len() * 4 } else { 4 }
    }

    /// The inverse of `save`.
    fn read_course(&self, state: &[u8]) -> Result<Course, &'static str> {
        let (head, actions) = state.split_at_checked(17).ok_or("too few bytes")?;
        let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
        let ended = match head[16] {
            0 => false,
            1 => true,
            _ => return Err("its episode neither runs nor has ended"),
        };
        if actions.len() > COURSE_BYTES_MAX || !actions.len().is_multiple_of(self.action_bytes()) {
            return Err("its actions are too many or not whole");
        }
        let words = actions.as_chunks::<4>().0.iter();
        let good = match &self.spec.action {
            Space::Discrete { n } => words.copied().all(|word| u32::from_le_bytes(word) < *n),
            Space::Box { .. } => words.copied().all(|word| f32::from_le_bytes(word).is_finite()),
        };
        if !good {
            return Err("an action is none of this environment");
        }
        Ok(Course { seed: word(0), episode: word(8), ended, actions: Some(actions.to_vec()) })
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
        cells: None,
    })
}
