//! Policies for `scan-budget` that learn nothing from other episodes: what a trained one has to beat. They see what a scanner sees: the options, and
//! what each batch found.

use super::super::pcg64::Pcg64;
use super::{Probed, WorldConfig};

/// Which policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Baseline {
    /// Any cell.
    Random,
    /// The most frequent port in every group, all hosts; then the next port.
    Frequency,
    /// The cell that is expected to give most, by a Beta posterior of each system's and each cell's ports.
    Bayesian,
}

/// A policy in one episode.
#[derive(Debug, Clone)]
pub enum Policy {
    Random { rng: Pcg64, cells: u64 },
    Frequency { next: usize, groups: usize, ports: usize, batches: usize },
    Bayesian(Box<Beliefs>),
}

impl Policy {
    pub fn new(baseline: Baseline, config: &WorldConfig, seed: u64) -> Self {
        match baseline {
            Baseline::Random => Self::Random { rng: Pcg64::new(seed), cells: config.cells() as u64 },
            Baseline::Frequency => {
                let batches = config.hosts.div_ceil(config.batch);
                Self::Frequency { next: 0, groups: config.groups, ports: config.ports, batches }
            }
            Baseline::Bayesian => Self::Bayesian(Box::new(Beliefs::new(config))),
        }
    }

    /// The next action.
    pub fn choose(&mut self) -> u32 {
        match self {
            Self::Random { rng, cells } => rng.below(*cells) as u32,
            Self::Frequency { next, groups, ports, batches } => {
                let pair = *next / *batches;
                *next += 1;
                (pair % *groups * *ports + pair / *groups % *ports) as u32
            }
            Self::Bayesian(beliefs) => beliefs.best() as u32,
        }
    }

    /// What came of it.
    pub fn learn(&mut self, probed: Probed) {
        match self {
            Self::Random { .. } | Self::Frequency { .. } => {}
            Self::Bayesian(beliefs) => beliefs.learn(probed),
        }
    }
}

// Chosen among 160 combinations for what they find in 20 default worlds: a baseline is to be hard to beat.
/// How many hosts the frequency of a port counts for, in what is believed of a system before anything was seen.
const PRIOR_HOSTS: f64 = 3.0;
/// How many times its frequency a service is believed to have there: a greedy policy has to hope, or it looks nowhere.
const PRIOR_HOPE: f64 = 3.0;
/// How many hosts a system's rate counts for, in what is believed of one of its cells.
const SYSTEM_HOSTS: f64 = 10.0;
/// How many services are expected before what a group has of them says how full it is.
const GROUP_SERVICES: f64 = 4.0;
/// What is left of a system's counts after a batch: the world drifts.
const KEPT: f64 = 0.998;
/// The share of known services that is believed to change in a batch.
const CHANGED: f64 = 0.000_4;

/// What the greedy Bayesian believes: the chance of a service is Beta distributed, for each port of a system around the port's frequency, and for each
/// cell around its system's mean times how full its group is.
#[derive(Debug, Clone)]
pub struct Beliefs {
    config: WorldConfig,
    /// [systems x ports]: probes (as many as they count for in a group so full) and services, decayed.
    systems: Vec<[f64; 2]>,
    /// [groups]: services that its systems' rates let expect, and services.
    groups: Vec<[f64; 2]>,
    /// [cells].
    cells: Vec<Seen>,
    now: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    probes: f64,
    open: f64,
    /// Of the current pass over the hosts.
    pass: usize,
    whole_passes: u32,
    /// Batches before and with the last two of this cell.
    last: u32,
    before: u32,
}

impl Beliefs {
    fn new(config: &WorldConfig) -> Self {
        let systems = vec![[0.0; 2]; config.systems * config.ports];
        let groups = vec![[0.0; 2]; config.groups];
        Self { config: config.clone(), systems, groups, cells: vec![Seen::default(); config.cells()], now: 0 }
    }

    /// The first of the cells that promise most.
    fn best(&self) -> usize {
        let promise = |cell: &usize| self.promise(*cell);
        (0..self.cells.len()).rev().max_by(|a, b| promise(a).total_cmp(&promise(b))).expect("there are cells")
    }

    /// New or changed services that a probe of the cell is expected to find.
    fn promise(&self, cell: usize) -> f64 {
        let (group, port) = (cell / self.config.ports, cell % self.config.ports);
        let seen = &self.cells[cell];
        let expected = self.rate(group, port) * self.fullness(group);
        let rate = (expected * SYSTEM_HOSTS + seen.open) / (SYSTEM_HOSTS + seen.probes);
        let fresh = if seen.whole_passes == 0 {
            1.0
        } else {
            let since = if seen.pass == 0 { seen.last } else { seen.before };
            (CHANGED * f64::from(self.now - since)).min(1.0)
        };
        rate * fresh
    }

    /// Of a port in the group's system, for a group that is as full as others.
    fn rate(&self, group: usize, port: usize) -> f64 {
        let [probes, open] = self.systems[self.config.system(group) * self.config.ports + port];
        let frequency = self.config.table.ports()[port].frequency;
        (PRIOR_HOPE * frequency * PRIOR_HOSTS + open) / (PRIOR_HOSTS + probes)
    }

    /// 1: as full as others.
    fn fullness(&self, group: usize) -> f64 {
        let [expected, open] = self.groups[group];
        (GROUP_SERVICES + open) / (GROUP_SERVICES + expected)
    }

    fn learn(&mut self, probed: Probed) {
        self.now += 1;
        let (group, port) = (probed.cell / self.config.ports, probed.cell % self.config.ports);
        let (hosts, open) = (f64::from(probed.hosts), f64::from(probed.open));
        let (rate, fullness) = (self.rate(group, port), self.fullness(group));
        self.systems.iter_mut().flatten().for_each(|count| *count *= KEPT);
        let system = &mut self.systems[self.config.system(group) * self.config.ports + port];
        *system = [system[0] + hosts * fullness, system[1] + open];
        self.groups[group] = [self.groups[group][0] + hosts * rate, self.groups[group][1] + open];
        let seen = &mut self.cells[probed.cell];
        if seen.pass == 0 {
            seen.before = seen.last;
        }
        (seen.probes, seen.open, seen.last) = (seen.probes + hosts, seen.open + open, self.now);
        seen.pass += probed.hosts as usize;
        if seen.pass >= self.config.hosts {
            seen.pass -= self.config.hosts;
            seen.whole_passes += 1;
        }
    }
}
