//! A reinforcement-learning job as a trainer: its rounds cut into steps that lanes are summed in, so that all that holds of training (any number of ranks, their
//! deaths, checkpoints) holds of it. Owns what a round follows from, and the envs of the lanes that this rank plays.
//!
//! A round of `1 + U` steps: the first sums what lanes have to tell of their trajectories, with the state that each lane is in afterwards; each of the others is an
//! update. What a trajectory follows from (L1: the lane's state, the weights and the version of the round) is the same on every learner, so whoever owns
//! a lane at any step of the round plays the same trajectory, and nothing is lost with a rank.
//!
//! Rounds of IMPALA are played with weights that are some rounds old (`Course::later`), the same on every learner whoever plays: so a round can be played
//! while the one before it is learned from.
//!
//! Bytes of states travel three to a number: sums with zeros, and whole numbers below 2^24, are exact in f32.

use std::collections::{BTreeMap, VecDeque};

use super::actor::{Actor, Explore};
use super::config::{RlConfig, RlPlan};
use super::curve::Curve;
use super::env::{EnvError, EnvSpec};
use super::error::RlError;
use super::evaluation::{Normaliser, Returns, evaluate};
use super::learn::{Learn, Round};
use super::player::{Found, PlayOrder, Played, PlayedBytes, Player, Rollouts};
use super::policy::Policy;
use super::rollout::{Rollout, RolloutConfig};
use super::solo::learn;
use super::space::Space;
use super::trajectory::Trajectory;
use crate::JobError;
use crate::train::{Applied, LaneWork, Layout, Metrics, NamedTensor, Plan, RlProgress, Snapshot, Train};

/// Bytes of a number.
const PACKED: usize = 3;
/// Actions of an episode so far that a bridge's env has room for where nothing bounds its episodes, in bytes.
const COURSE_BYTES: usize = 1 << 14;
/// Before the lanes' states in a sum: failures and strays of environments.
const COUNTS: usize = 2;
/// Of a lane's state: its length is one number of the sum.
const LANE_BYTES_MAX: usize = (1 << 24) - 1;
/// Episodes of the evaluation at the end.
const EPISODES: usize = 10;
/// An episode of it that is longer counts with what it has until then.
pub(super) const STEPS_MAX: u32 = 100_000;

/// What the trajectories of a round follow from.
#[derive(Debug, Clone, PartialEq)]
struct Course {
    round: u64,
    version: u64,
    weights: Vec<f32>,
    /// Where rollouts are behind: what the learner had at the beginning of each round since, the oldest first; up to as many as they are behind.
    later: VecDeque<(u64, Vec<f32>)>,
    /// Of each lane; empty: it begins.
    states: Vec<Vec<u8>>,
    begun: Option<Begun>,
}

/// After the first step of a round.
#[derive(Debug, Clone, PartialEq)]
struct Begun {
    sums: Vec<f32>,
    /// Of each lane, behind its trajectory.
    after: Vec<Vec<u8>>,
    updates: u32,
}

pub(crate) struct RlTrainer {
    config: RlConfig,
    /// Of one env.
    env: EnvSpec,
    plan: RlPlan,
    seed: u64,
    learn: Box<dyn Learn>,
    /// The policy's parameters, and as many figures as the longest vector of a step has.
    layout: Layout,
    updates_max: u32,
    player: Player,
    /// Others who play lanes.
    rollouts: Option<Box<dyn Rollouts>>,
    /// Of which round they were told, and which lanes.
    told: Option<(u64, Vec<u32>)>,
    /// Rounds of lanes that were played here, and by others.
    played_here: u64,
    played_elsewhere: u64,
    /// Lanes whose trajectory of the round was taken, with the state behind it.
    played: BTreeMap<u32, Vec<u8>>,
    course: Course,
    /// Numbers of a lane's state.
    lane_numbers: usize,
    /// Failures of environments, and what they did otherwise than before, that no sum has shown yet.
    failures: u32,
    strays: u32,
    curve: Curve,
    vector: Vec<f32>,
}

/// What needs no Python: a native environment is made, and its policy laid out.
pub(crate) fn check(config_toml: &str, lanes: u32) -> Result<(), JobError> {
    let config = RlConfig::parse(config_toml)?;
    if config.environment().is_native() {
        let env = config.environment().make(1).map_err(|error| RlConfig::mistake(config_toml, "options", error))?;
        let plan = config.plan(config_toml, env.spec(), lanes)?;
        let policy = Policy::new(config.policy(), env.spec(), &plan.hidden, 0);
        policy.map_err(|error| RlConfig::mistake(config_toml, "algorithm", error))?;
    }
    Ok(())
}

pub(crate) fn load(config_toml: &str, plan: &Plan) -> Result<Box<dyn Train>, JobError> {
    let config = RlConfig::parse(config_toml)?;
    Ok(Box::new(RlTrainer::new(config_toml, config, (plan.seed, plan.lanes as u32))?))
}

impl RlTrainer {
    fn new(config_toml: &str, config: RlConfig, (seed, lanes): (u64, u32)) -> Result<Self, RlError> {
        let env = config.environment().make(config.envs())?;
        let spec = env.spec().clone();
        let plan = config.plan(config_toml, &spec, lanes)?;
        let learn = learn(&config, &plan, &spec, seed)?;
        let mut first = Rollout::new(rollout_config(&plan, seed), env);
        first.begin(0)?;
        let bytes = first.save()?.len();
        // Where a lane may have more bytes later: the actions of a bridge's episodes.
        let spare = if config.environment().is_native() { bytes / 2 } else { course_bytes(&spec) * plan.envs };
        if bytes + spare > LANE_BYTES_MAX {
            let problem = format!(
                "{} envs of a lane have up to {} bytes of state, at most {LANE_BYTES_MAX} fit: lower [rl] envs, or use more lanes",
                plan.envs,
                bytes + spare
            );
            return Err(EnvError::Options { name: spec.name, problem }.into());
        }
        let lane_numbers = 1 + (bytes + spare).div_ceil(PACKED);
        let rollouts = learn.sums_len() + COUNTS + lanes as usize * lane_numbers;
        let parameters = learn.learner().layout();
        let figures = rollouts.max(parameters.flat_len()) - parameters.len() + 1;
        let layout = Layout { params: parameters.params.clone(), figures };
        let updates_max = learn.updates_max();
        let course = Course {
            round: 0,
            version: 0,
            weights: learn.learner().weights().to_vec(),
            later: VecDeque::new(),
            states: vec![Vec::new(); lanes as usize],
            begun: None,
        };
        let curve = Curve::new(learn.figures());
        let vector = vec![0.0; layout.flat_len()];
        let actor = Actor::new(learn.policy(), seed);
        let player = Player::new((config.clone(), plan.clone()), seed, actor, learn.explore());
        Ok(Self {
            config,
            env: spec,
            plan,
            seed,
            learn,
            layout,
            updates_max,
            player,
            rollouts: None,
            told: None,
            played_here: 0,
            played_elsewhere: 0,
            played: BTreeMap::new(),
            course,
            lane_numbers,
            failures: 0,
            strays: 0,
            curve,
            vector,
        })
    }

    fn round_steps(&self) -> u64 {
        1 + u64::from(self.updates_max)
    }

    /// Where a step stands: its round, and which of the round's.
    fn place(&self, step: u64) -> (u64, u32) {
        (step / self.round_steps(), (step % self.round_steps()) as u32)
    }

    /// Goes on to a round when the one before it is done.
    fn advance(&mut self, round: u64) -> Result<(), RlError> {
        if self.course.round == round {
            return Ok(());
        }
        let begun = self.course.begun.take().filter(|_| self.course.round + 1 == round);
        let Some(begun) = begun else {
            let (got, expected) = (round, self.course.round);
            return Err(RlError::Contract { what: "round of a step", got, expected });
        };
        let learner = self.learn.learner();
        let course = &mut self.course;
        course.later.push_back((learner.version(), learner.weights().to_vec()));
        if course.later.len() > self.plan.behind() {
            (course.version, course.weights) = course.later.pop_front().expect("one was just pushed");
        }
        (course.round, course.states) = (round, begun.after);
        self.played.clear();
        Ok(())
    }

    /// Sees to it that the learner has the lane's trajectory of the round.
    fn play(&mut self, lane: u32) -> Result<(), RlError> {
        while !self.played.contains_key(&lane) {
            match self.rollouts.as_mut().map_or(Found::Nobody, |rollouts| rollouts.find(lane)) {
                // What somebody else has played is not trusted to be of this round; whatever is wrong with it, the lane can be played here.
                Found::Played(bytes) => match self.accept(lane, bytes) {
                    Some(played) => {
                        self.played_elsewhere += 1;
                        self.keep(lane, played)?;
                    }
                    None => self.play_here(lane)?,
                },
                Found::Meanwhile(other) if !self.played.contains_key(&other) => self.play_here(other)?,
                Found::Meanwhile(_) => {}
                Found::Nobody => self.play_here(lane)?,
            }
        }
        Ok(())
    }

    fn play_here(&mut self, lane: u32) -> Result<(), RlError> {
        self.player.load(self.course.version, &self.course.weights)?;
        let played = self.player.play(lane, &self.course.states[lane as usize])?;
        self.played_here += 1;
        self.keep(lane, played)
    }

    fn keep(&mut self, lane: u32, played: Played) -> Result<(), RlError> {
        let Played { trajectory, after, failures, strays } = played;
        self.failures += failures;
        self.strays += strays;
        self.learn.take(self.course.round, lane, trajectory)?;
        self.played.insert(lane, after);
        if let Some(begun) = &self.course.begun {
            self.learn.resume(self.course.round, &begun.sums)?;
        }
        Ok(())
    }

    fn accept(&self, lane: u32, bytes: PlayedBytes) -> Option<Played> {
        let trajectory = Trajectory::decode(&bytes.trajectory, self.learn.policy()).ok()?;
        let Trajectory { version, begun, steps, envs, .. } = trajectory;
        let expected =
            (self.course.version, self.course.round * self.plan.steps as u64, self.plan.steps, self.plan.envs);
        let right = trajectory.lane == lane && (version, begun, steps, envs) == expected;
        let PlayedBytes { after, failures, strays, .. } = bytes;
        right.then_some(Played { trajectory, after, failures, strays })
    }

    /// The first step of a round, of one lane: what it tells, what its environments did that they should not, and its state afterwards.
    fn tell(&mut self, lane: u32) -> Result<(), RlError> {
        self.play(lane)?;
        let sums = self.learn.sums_len();
        self.vector.fill(0.0);
        self.learn.sums(lane, &mut self.vector[..sums])?;
        let elsewhere = self.rollouts.as_mut().map_or(0, |rollouts| rollouts.take_failures());
        self.vector[sums] = (std::mem::take(&mut self.failures) + elsewhere) as f32;
        self.vector[sums + 1] = std::mem::take(&mut self.strays) as f32;
        let at = sums + COUNTS + lane as usize * self.lane_numbers;
        let (state, room) = (&self.played[&lane], &mut self.vector[at..at + self.lane_numbers]);
        if state.len() > (room.len() - 1) * PACKED {
            return Err(EnvError::Unsaved { name: self.config.environment().name }.into());
        }
        pack(state, room)
    }

    fn compute(&mut self, step: u64, lane: u32) -> Result<(), RlError> {
        let (round, part) = self.place(step);
        self.advance(round)?;
        let updates = self.course.begun.as_ref().map(|begun| begun.updates);
        match (part, updates) {
            (0, _) => self.tell(lane)?,
            (_, Some(updates)) if part <= updates => {
                self.play(lane)?;
                self.vector.fill(0.0);
                let numbers = self.learn.learner().layout().flat_len();
                self.learn.gradient(part - 1, lane, &mut self.vector[..numbers])?;
            }
            (_, Some(_)) => self.vector.fill(0.0),
            (_, None) => return Err(RlError::Contract { what: "rounds that were begun", got: 0, expected: 1 }),
        }
        *self.vector.last_mut().expect("a vector has the count of samples") = 1.0;
        Ok(())
    }

    fn take(&mut self, step: u64, sum: &[f32]) -> Result<Applied, RlError> {
        let (round, part) = self.place(step);
        self.advance(round)?;
        let samples = *sum.last().unwrap_or(&0.0) as u64;
        if part == 0 {
            self.begin(round, sum)?;
        } else if part <= self.course.begun.as_ref().map_or(0, |begun| begun.updates) {
            let sum = &sum[..self.learn.learner().layout().flat_len()];
            // A replay buffer that was lost with its rank fills again first.
            if *sum.last().unwrap_or(&0.0) > 0.0 {
                let updated = self.learn.apply(part - 1, sum)?;
                self.curve.updated(&updated);
            }
        }
        let last = self.curve.last();
        Ok(Applied { loss: last.loss, accuracy: f64::NAN, grad_norm: last.grad_norm, lr: last.lr, samples })
    }

    fn begin(&mut self, round: u64, sum: &[f32]) -> Result<(), RlError> {
        let len = self.learn.sums_len();
        let sums = sum[..len].to_vec();
        let begun = self.learn.begin(round, &sums)?;
        let lanes = sum[len + COUNTS..][..self.plan.lanes as usize * self.lane_numbers].chunks_exact(self.lane_numbers);
        let after = lanes.map(unpack).collect::<Result<Vec<_>, _>>()?;
        self.curve.began(&begun, (sum[len], sum[len + 1]));
        let Round { updates, .. } = begun;
        self.course.begun = Some(Begun { sums, after, updates });
        Ok(())
    }

    /// Of episodes with seeds that training does not use.
    fn returns(&mut self) -> Result<Returns, RlError> {
        let learner = self.learn.learner();
        self.player.load(learner.version(), learner.weights())?;
        let states = self.course.begun.as_ref().map_or(&self.course.states, |begun| &begun.after);
        let normaliser = self.player.normaliser(states)?;
        let mut env = self.config.environment().make(EPISODES)?;
        evaluate(self.player.actor(), &mut *env, normaliser.as_ref(), (self.seed, STEPS_MAX, Explore::Sample))
    }
}

fn rollout_config(plan: &RlPlan, seed: u64) -> RolloutConfig {
    RolloutConfig { seed, normalise: plan.normalise, gamma: plan.gamma }
}

/// The statistics of all lanes together. None: nothing is normalised.
pub(super) fn normaliser(player: &Rollout, states: &[Vec<u8>]) -> Result<Option<Normaliser>, RlError> {
    let mut all: Option<Normaliser> = None;
    for state in states.iter().filter(|state| !state.is_empty()) {
        match (&mut all, player.normaliser(state)?) {
            (Some(all), Some(lane)) => all.merge(&lane),
            (_, lane) => all = lane,
        }
    }
    Ok(all)
}

/// Of the actions of an episode.
fn course_bytes(spec: &EnvSpec) -> usize {
    let action = if let Space::Box { low, .. } = &spec.action { 4 * low.len() } else { 4 };
    spec.steps_max.map_or(COURSE_BYTES, |steps| steps as usize * action)
}

/// The length, then the bytes.
fn pack(bytes: &[u8], to: &mut [f32]) -> Result<(), RlError> {
    let room = (to.len() - 1) * PACKED;
    if bytes.len() > room {
        let (got, expected) = (bytes.len() as u64, room as u64);
        return Err(RlError::Contract { what: "bytes of a lane's state, at most", got, expected });
    }
    to[0] = bytes.len() as f32;
    for (number, bytes) in to[1..].iter_mut().zip(bytes.chunks(PACKED)) {
        *number = bytes.iter().rev().fold(0, |number, byte| (number << 8) | u32::from(*byte)) as f32;
    }
    Ok(())
}

fn unpack(from: &[f32]) -> Result<Vec<u8>, RlError> {
    let bad = || RlError::Bytes { what: "the states of lanes in a sum", problem: "numbers that are no bytes".into() };
    let whole =
        |number: &f32| (*number >= 0.0 && number.fract() == 0.0 && *number < 16_777_216.0).then_some(*number as u32);
    let len = from.first().and_then(whole).ok_or_else(bad)? as usize;
    let mut bytes = Vec::with_capacity(len + PACKED);
    for number in &from[1..] {
        if bytes.len() >= len {
            break;
        }
        bytes.extend(&whole(number).ok_or_else(bad)?.to_le_bytes()[..PACKED]);
    }
    if bytes.len() < len {
        return Err(bad());
    }
    bytes.truncate(len);
    Ok(bytes)
}

impl Train for RlTrainer {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    /// One a lane and step.
    fn samples(&self) -> u64 {
        self.plan.rounds * self.round_steps() * u64::from(self.plan.lanes)
    }

    fn lane(&mut self, work: LaneWork<'_>, sink: &mut dyn FnMut(usize, &[f32])) -> Result<(), JobError> {
        self.compute(work.step, work.lane)?;
        sink(0, &self.vector);
        Ok(())
    }

    fn prepare(&mut self, step: u64, lanes: std::ops::Range<u32>) -> Result<(), JobError> {
        let (round, _) = self.place(step);
        self.advance(round)?;
        let Some(rollouts) = &mut self.rollouts else { return Ok(()) };
        let played = &self.played;
        let missing: Vec<u32> = lanes.clone().filter(|lane| !played.contains_key(lane)).collect();
        let course = &self.course;
        // With all of this round's here, the next round may begin before its weights are learned.
        let ahead = course.begun.as_ref().filter(|_| missing.is_empty() && self.plan.behind() > 0);
        let own = (course.version, &course.weights);
        let ((version, weights), states, round, lanes) = match ahead {
            Some(begun) => (course.next(self.plan.behind()).unwrap_or(own), &begun.after, round + 1, lanes.collect()),
            None => (own, &course.states, round, missing),
        };
        // Those that are under way need not be told again.
        let told =
            self.told.as_ref().is_some_and(|(of, told)| *of == round && lanes.iter().all(|lane| told.contains(lane)));
        if !lanes.is_empty() && !told {
            let order = |lane: &u32| PlayOrder { lane: *lane, state: states[*lane as usize].clone() };
            rollouts.begin(version, weights, lanes.iter().map(order).collect());
            self.told = Some((round, lanes));
        }
        Ok(())
    }

    fn play_elsewhere(&mut self, rollouts: Box<dyn Rollouts>) {
        self.rollouts = Some(rollouts);
    }

    fn apply(&mut self, step: u64, sum: &[f32]) -> Result<Applied, JobError> {
        if sum.len() != self.layout.flat_len() {
            let (got, expected) = (sum.len() as u64, self.layout.flat_len() as u64);
            return Err(JobError::Contract { what: "length of the sum", got, expected });
        }
        self.take(step, sum).map_err(|error| match error {
            RlError::NonFinite { what, .. } => JobError::NonFinite { step, what },
            error => error.into(),
        })
    }

    fn skip(&mut self) {
        self.learn.learner_mut().skip();
    }

    fn skipped(&self) -> u64 {
        self.learn.learner().skipped()
    }

    fn evaluate(&mut self) -> Result<Metrics, JobError> {
        let returns = self.returns()?;
        let mut metrics = returns.metrics();
        metrics.extend(self.curve.metrics());
        Ok(metrics)
    }

    fn snapshot(&self) -> Snapshot {
        let tensors = self.course.tensors().into_iter().chain(self.curve.tensors());
        tensors.fold(self.learn.snapshot(), Snapshot::with)
    }

    fn continues(&self, config_toml: &str) -> Result<(), String> {
        let config = RlConfig::parse(config_toml).map_err(|error| error.to_string())?;
        self.config.continues(&config)?;
        let plan = config.plan(config_toml, &self.env, self.plan.lanes).map_err(|error| error.to_string())?;
        self.plan.continues(&plan)
    }

    fn restore(&mut self, tensors: Vec<NamedTensor>) -> Result<(), JobError> {
        let (own, learners): (Vec<_>, Vec<_>) = tensors.into_iter().partition(|tensor| tensor.name.starts_with("rl."));
        let course = Course::of(&own, (self.plan.lanes, self.course.weights.len()))?;
        let curve = Curve::of(&own, self.learn.figures())?;
        self.learn.restore(learners)?;
        if let Some(begun) = &course.begun {
            self.learn.resume(course.round, &begun.sums)?;
        }
        (self.course, self.curve) = (course, curve);
        self.played.clear();
        self.told = None;
        self.player.forget();
        Ok(())
    }

    fn fingerprint(&self) -> u64 {
        self.learn.learner().fingerprint()
    }

    fn rl(&self) -> Option<RlProgress> {
        let rounds = self.course.round + u64::from(self.course.begun.is_some());
        let played = (self.played_here, self.played_elsewhere);
        let broadcast = self.rollouts.as_ref().map(|rollouts| rollouts.broadcast()).unwrap_or_default();
        Some(RlProgress { broadcast, ..self.curve.progress((rounds, self.plan.rounds), played) })
    }
}

const HEAD: &str = "rl.round";
const WEIGHTS: &str = "rl.round.weights";
const LATER: &str = "rl.round.later";
const SUMS: &str = "rl.round.sums";
const STATES: &str = "rl.lanes";
const AFTER: &str = "rl.lanes.after";

impl Course {
    /// What the next round is played with, where it is behind by so many rounds. None: the same as this one.
    fn next(&self, behind: usize) -> Option<(u64, &Vec<f32>)> {
        let front = self.later.front().filter(|_| self.later.len() >= behind)?;
        Some((front.0, &front.1))
    }

    fn tensors(&self) -> Vec<NamedTensor> {
        let flat =
            |name: &str, values: Vec<f32>| NamedTensor { name: name.to_owned(), shape: vec![values.len()], values };
        let number = |value: u64| [(value & 0xff_ffff) as f32, (value >> 24) as f32];
        let updates = self.begun.as_ref().map_or(-1.0, |begun| begun.updates as f32);
        let head = [&number(self.round)[..], &number(self.version), &[updates]].concat();
        let mut tensors =
            vec![flat(HEAD, head), flat(WEIGHTS, self.weights.clone()), flat(STATES, packed(&self.states))];
        if !self.later.is_empty() {
            let each = |(version, weights): &(u64, Vec<f32>)| [&number(*version)[..], weights].concat();
            tensors.push(flat(LATER, self.later.iter().flat_map(each).collect()));
        }
        if let Some(begun) = &self.begun {
            tensors.push(flat(SUMS, begun.sums.clone()));
            tensors.push(flat(AFTER, packed(&begun.after)));
        }
        tensors
    }

    fn of(tensors: &[NamedTensor], (lanes, parameters): (u32, usize)) -> Result<Self, JobError> {
        let wrong = |name: &str, problem: &str| JobError::Tensor { name: name.to_owned(), problem: problem.to_owned() };
        let find = |name: &str| {
            let found = tensors.iter().find(|tensor| tensor.name == name).map(|tensor| &tensor.values);
            found.ok_or_else(|| wrong(name, "missing"))
        };
        let states = |name: &str| {
            let states = unpacked(find(name)?).map_err(|error| wrong(name, &error.to_string()))?;
            if states.len() == lanes as usize { Ok(states) } else { Err(wrong(name, "of another number of lanes")) }
        };
        let [low, high, version, version_high, updates] = find(HEAD)?[..] else {
            return Err(wrong(HEAD, "of another shape"));
        };
        let number = |low: f32, high: f32| low as u64 | (high as u64) << 24;
        let begun = if updates < 0.0 {
            None
        } else {
            Some(Begun { sums: find(SUMS)?.clone(), after: states(AFTER)?, updates: updates as u32 })
        };
        let weights = find(WEIGHTS)?.clone();
        if weights.len() != parameters {
            return Err(wrong(WEIGHTS, "of another policy"));
        }
        let later = find(LATER).map_or(&[][..], Vec::as_slice);
        let (each, rest) = (later.chunks_exact(2 + parameters), later.len() % (2 + parameters));
        if rest > 0 {
            return Err(wrong(LATER, "of another policy"));
        }
        let later = each.map(|each| (number(each[0], each[1]), each[2..].to_vec())).collect();
        let (round, version) = (number(low, high), number(version, version_high));
        Ok(Self { round, version, weights, later, states: states(STATES)?, begun })
    }
}

/// The lanes of a checkpoint, as they are there; empty where one has not begun.
pub(super) fn lanes_of(tensors: &[NamedTensor], lanes: u32) -> Result<Vec<Vec<u8>>, JobError> {
    let parameters = tensors.iter().find(|tensor| tensor.name == WEIGHTS).map_or(0, |tensor| tensor.values.len());
    let Course { states, begun, .. } = Course::of(tensors, (lanes, parameters))?;
    Ok(begun.map_or(states, |begun| begun.after))
}

/// Each with its length.
fn packed(states: &[Vec<u8>]) -> Vec<f32> {
    let mut numbers = Vec::new();
    for state in states {
        let from = numbers.len();
        numbers.resize(from + 1 + state.len().div_ceil(PACKED), 0.0);
        pack(state, &mut numbers[from..]).expect("there is just room for it");
    }
    numbers
}

fn unpacked(mut numbers: &[f32]) -> Result<Vec<Vec<u8>>, RlError> {
    let mut states = Vec::new();
    while let Some(len) = numbers.first() {
        let (state, rest) = numbers.split_at(numbers.len().min(1 + (*len as usize).div_ceil(PACKED)));
        states.push(unpack(state)?);
        numbers = rest;
    }
    Ok(states)
}
