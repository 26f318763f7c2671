//! What policies that are not learned come to in an episode: baselines, which a learned one has to beat, and oracles, which are told what no scanner knows
//! and so say how much there is to be had. Owns the course of such an episode; `baselines` decides.

use super::super::draws::{Draws, Stream};
use super::super::env::{Actions, EnvError, StepBuffer, VecEnv};
use super::world::World;
use super::{Baseline, Policy, ScanBudget, WorldConfig};

/// What is told to a greedy policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Oracle {
    /// The chance of a service in each cell, as it is at that time. Which services there are it learns as a scanner does.
    Rates,
    /// How many services a cell has that are not known yet, so also what has just changed.
    Services,
}

/// What an episode came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Score {
    pub found: u64,
    pub probes: u64,
    /// Services that there were, each version counted.
    pub existed: u64,
}

impl Score {
    pub fn per_probe(&self) -> f64 {
        self.found as f64 / self.probes as f64
    }
}

/// One episode of a baseline in the world of this seed.
pub fn play(baseline: Baseline, config: &WorldConfig, seed: u64) -> Result<Score, EnvError> {
    let mut policy = Policy::new(baseline, config, seed);
    course(config, seed, |env| {
        if let Some(probed) = env.probed(0) {
            policy.learn(probed);
        }
        policy.choose()
    })
}

/// The same of an oracle.
pub fn consult(oracle: Oracle, config: &WorldConfig, seed: u64) -> Result<Score, EnvError> {
    course(config, seed, |env| {
        let world = env.world(0);
        let promise = |cell: &usize| promise(oracle, config, world, *cell);
        let best = (0..config.cells()).rev().max_by(|a, b| promise(a).total_cmp(&promise(b)));
        best.expect("there are cells") as u32
    })
}

/// Who found how many services per probe.
#[derive(Debug, Clone, PartialEq)]
pub struct Rival {
    pub name: &'static str,
    /// Told what no scanner knows: a bound, no baseline.
    pub oracle: bool,
    /// Of each episode.
    pub per_probe: Vec<f64>,
}

impl Rival {
    pub fn mean(&self) -> f64 {
        self.per_probe.iter().sum::<f64>() / self.per_probe.len().max(1) as f64
    }
}

/// All of them in the worlds of an evaluation with this seed, one an episode.
pub fn rivals(config: &WorldConfig, seed: u64, episodes: usize) -> Result<Vec<Rival>, EnvError> {
    let worlds: Vec<u64> =
        (0..episodes as u64).map(|env| Draws::new(seed, Stream::Evaluation, [env, 0, 0]).bits()).collect();
    let all = |name, oracle, episode: &dyn Fn(u64) -> Result<Score, EnvError>| {
        let scores = worlds.iter().map(|world| Ok(episode(*world)?.per_probe()));
        Ok(Rival { name, oracle, per_probe: scores.collect::<Result<_, EnvError>>()? })
    };
    Ok(vec![
        all("random", false, &|world| play(Baseline::Random, config, world))?,
        all("frequency", false, &|world| play(Baseline::Frequency, config, world))?,
        all("bayesian", false, &|world| play(Baseline::Bayesian, config, world))?,
        all("told rates", true, &|world| consult(Oracle::Rates, config, world))?,
        all("told services", true, &|world| consult(Oracle::Services, config, world))?,
    ])
}

/// Asks for each action, with the env as the one before left it.
fn course(config: &WorldConfig, seed: u64, mut choose: impl FnMut(&ScanBudget) -> u32) -> Result<Score, EnvError> {
    let mut env = ScanBudget::new(config.clone(), 1)?;
    let mut buffer = StepBuffer::new(&env);
    env.reset(&[seed], &mut buffer.observations)?;
    let mut score = Score { found: 0, probes: 0, existed: 0 };
    while !buffer.terminated[0] {
        let action = choose(&env);
        env.step(Actions::Discrete(&[action]), buffer.step())?;
        let probed = env.probed(0).expect("a batch was done");
        score.found += u64::from(probed.found);
        score.probes += u64::from(probed.hosts);
    }
    score.existed = env.existed(0);
    Ok(score)
}

/// New or changed services that a probe of the cell is expected to find.
fn promise(oracle: Oracle, config: &WorldConfig, world: &World, cell: usize) -> f64 {
    match oracle {
        Oracle::Rates if !world.scanned_whole(config, cell) => world.chance(config, cell),
        // What is left of a cell that was scanned is what has changed since.
        Oracle::Rates | Oracle::Services => world.unknown_share(config, cell),
    }
}
