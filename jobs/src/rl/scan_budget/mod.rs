//! The users' own problem: which hosts and ports to scan next. An environment over a simulated internet; owns episodes, observations and rewards.
//! `world` owns what is out there, `ports` what is common, `baselines` the policies that a learned one has to beat, `score` what they come to.
//!
//! Hosts lie in groups (networks), groups in systems (autonomous systems: groups that follow each other), and each system has a profile, so that
//! what was found in one of its groups tells of the others. Services appear, vanish and change while the scanner works. An episode is one new world
//! and a budget of batches. An action is a cell (group and port); its next `batch` hosts are probed, in an order of that cell's own that has each
//! host once a pass. The reward is new or changed services found per probe. The episode terminates when the budget is spent.

mod baselines;
mod ports;
mod score;
mod world;

pub use baselines::{Baseline, Policy};
pub use ports::{Class, Port, PortTable};
pub use score::{Oracle, Rival, Score, consult, play, rivals};
pub use world::{Probed, WorldConfig};

use self::world::World;
use super::cells::{CellPort, Cells, FEATURES};
use super::env::{Actions, EnvError, EnvSpec, Step, VecEnv, check_actions, check_len, check_step};
use super::pcg64::{self, Pcg64};
use super::space::Space;

pub(super) const NAME: &str = "scan-budget";

/// Envs of simulated internets. An observation has four numbers for each cell (group after group, port after port), all from 0 to 1: the share of
/// the hosts that were probed for it with a service when they were last; the share of its hosts that were ever probed; the time since its last batch as
/// a share of the budget (1: never); the share of its last batch that was known and had changed. One more number is the share of the budget that is left.
pub struct ScanBudget {
    config: WorldConfig,
    spec: EnvSpec,
    envs: Vec<Env>,
}

struct Env {
    rng: Pcg64,
    world: World,
    course: Course,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Course {
    Unseeded,
    Running,
    Ended,
}

impl ScanBudget {
    pub fn new(config: WorldConfig, envs: usize) -> Result<Self, EnvError> {
        config.check().map_err(|problem| EnvError::Options { name: NAME.to_owned(), problem })?;
        let len = config.cells() * FEATURES + 1;
        let spec = EnvSpec {
            name: NAME.to_owned(),
            observation: Space::Box { low: vec![0.0; len], high: vec![1.0; len] },
            action: Space::Discrete { n: config.cells() as u32 },
            steps_max: None,
            cells: Some(cells(&config)),
        };
        let empty = || Env { rng: Pcg64::new(0), world: World::empty(&config), course: Course::Unseeded };
        let envs = (0..envs).map(|_| empty()).collect();
        Ok(Self { config, spec, envs })
    }

    pub fn config(&self) -> &WorldConfig {
        &self.config
    }

    /// What the env's last batch found. None: its episode has just begun.
    pub fn probed(&self, env: usize) -> Option<Probed> {
        self.envs[env].world.probed()
    }

    fn world(&self, env: usize) -> &World {
        &self.envs[env].world
    }

    /// Services that were there at some time of the env's episode, each version counted: no scanner can find more.
    pub fn existed(&self, env: usize) -> u64 {
        self.envs[env].world.existed()
    }
}

impl VecEnv for ScanBudget {
    fn spec(&self) -> &EnvSpec {
        &self.spec
    }

    fn num_envs(&self) -> usize {
        self.envs.len()
    }

    fn reset(&mut self, seeds: &[u64], observations: &mut [f32]) -> Result<(), EnvError> {
        check_len("seeds", seeds.len(), self.envs.len())?;
        check_len("observations of a reset", observations.len(), seeds.len() * self.spec.observation_len())?;
        let rows = observations.chunks_mut(self.spec.observation_len());
        for ((env, &seed), row) in self.envs.iter_mut().zip(seeds).zip(rows) {
            env.rng = Pcg64::new(seed);
            env.world.draw(&self.config, &mut env.rng);
            env.course = Course::Running;
            observe(&self.config, &env.world, row);
        }
        Ok(())
    }

    fn step(&mut self, actions: Actions<'_>, step: Step<'_>) -> Result<(), EnvError> {
        check_step(&self.spec, self.envs.len(), &step)?;
        check_actions(&self.spec, self.envs.len(), actions)?;
        if self.envs.iter().any(|env| env.course == Course::Unseeded) {
            return Err(EnvError::NotReset { name: self.spec.name.clone() });
        }
        let Actions::Discrete(actions) = actions else { unreachable!("the actions were checked") };
        let rows = step.observations.chunks_mut(self.spec.observation_len());
        for (index, (env, row)) in self.envs.iter_mut().zip(rows).enumerate() {
            (step.rewards[index], step.terminated[index], step.truncated[index]) = (0.0, false, false);
            match env.course {
                Course::Ended => {
                    env.world.draw(&self.config, &mut env.rng);
                    env.course = Course::Running;
                }
                Course::Running => {
                    let probed = env.world.probe(&self.config, actions[index] as usize);
                    env.world.drift(&self.config, &mut env.rng);
                    step.rewards[index] = probed.found as f32 / probed.hosts as f32;
                    if env.world.batches() == self.config.budget {
                        step.terminated[index] = true;
                        env.course = Course::Ended;
                    }
                }
                Course::Unseeded => unreachable!("all envs were checked"),
            }
            observe(&self.config, &env.world, row);
        }
        Ok(())
    }

    fn save(&mut self, env: usize) -> Result<Vec<u8>, EnvError> {
        let envs = self.envs.len();
        let saved = self.envs.get(env).ok_or(EnvError::Contract { what: "env", got: env, expected: envs })?;
        let mut bytes = saved.rng.to_bytes().to_vec();
        bytes.push(match saved.course {
            Course::Unseeded => return Err(EnvError::NotReset { name: self.spec.name.clone() }),
            Course::Running => 0,
            Course::Ended => 1,
        });
        bytes.extend(self.config.fingerprint());
        saved.world.save(&mut bytes);
        Ok(bytes)
    }

    fn restore(&mut self, env: usize, state: &[u8], observation: &mut [f32]) -> Result<(), EnvError> {
        check_len("observation of a restored env", observation.len(), self.spec.observation_len())?;
        let envs = self.envs.len();
        if env >= envs {
            return Err(EnvError::Contract { what: "env", got: env, expected: envs });
        }
        let restored = read(&self.config, state).map_err(|problem| {
            let name = self.spec.name.clone();
            EnvError::State { name, problem: problem.to_owned() }
        })?;
        observe(&self.config, &restored.world, observation);
        self.envs[env] = restored;
        Ok(())
    }
}

/// The inverse of `save`.
fn read(config: &WorldConfig, bytes: &[u8]) -> Result<Env, &'static str> {
    let (rng, bytes) = bytes.split_at_checked(pcg64::BYTES).ok_or("too few bytes")?;
    let (&course, bytes) = bytes.split_first().ok_or("too few bytes")?;
    let fingerprint = config.fingerprint();
    let (options, bytes) = bytes.split_at_checked(fingerprint.len()).ok_or("too few bytes")?;
    if options != fingerprint {
        return Err("it was saved by another environment or with other options");
    }
    let course = match course {
        0 => Course::Running,
        1 => Course::Ended,
        _ => return Err("no env takes this course"),
    };
    let rng = Pcg64::from_bytes(rng).ok_or("no generator has this state")?;
    Ok(Env { rng, world: World::restore(config, bytes)?, course })
}

/// What of the options a policy knows.
fn cells(config: &WorldConfig) -> Cells {
    let ports = &config.table.ports()[..config.ports];
    let ports = ports.iter().map(|port| CellPort { frequency: port.frequency as f32, class: port.class as usize });
    Cells { groups: config.groups, systems: config.systems, hosts: config.hosts, ports: ports.collect() }
}

fn observe(config: &WorldConfig, world: &World, row: &mut [f32]) {
    let (cells, left) = row.split_at_mut(config.cells() * FEATURES);
    for (index, features) in cells.as_chunks_mut::<FEATURES>().0.iter_mut().enumerate() {
        *features = world.cell(index).features(config, world.batches());
    }
    left[0] = (config.budget - world.batches()) as f32 / config.budget as f32;
}
