//! What is out there and what the scanner knows of it: services in cells (group and port), their generation from a generator, and their drift.
//! Uses nothing of f64 but the four operations and comparisons, so that a world has the same bits everywhere.

use super::super::cells::FEATURES;
use super::super::pcg64::Pcg64;
use super::ports::{Class, PortTable};
use crate::order::order;

/// The size and the pace of a world. The default trains in a minute on two cores.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorldConfig {
    /// Networks of neighbours.
    pub groups: usize,
    /// Autonomous systems: each has `groups / systems` groups that follow each other.
    pub systems: usize,
    /// Addresses of a group.
    pub hosts: usize,
    /// The so many most frequent ports of `table` are scanned.
    pub ports: usize,
    pub table: PortTable,
    /// Hosts of a batch.
    pub batch: usize,
    /// Batches of an episode.
    pub budget: u32,
    /// Hosts of a thousand that have other services after a batch: addresses that were given to somebody else.
    pub renumbered: f64,
    /// Chance that after a batch most services of one port in one system change: an update that is rolled out.
    pub updates: f64,
    /// Chance that after a batch one port opens on many hosts of one system: a new product, or a misconfiguration.
    pub outbreaks: f64,
}

impl Default for WorldConfig {
    fn default() -> Self {
        Self {
            groups: 32,
            systems: 8,
            hosts: 64,
            ports: 16,
            table: PortTable::built_in(),
            batch: 8,
            budget: 256,
            renumbered: 1.0,
            updates: 0.10,
            outbreaks: 0.02,
        }
    }
}

/// Services in all of an env, at a byte each, twice: what is there and what is known.
const SERVICES_MAX: usize = 1 << 26;

impl WorldConfig {
    pub fn cells(&self) -> usize {
        self.groups * self.ports
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let counts = [self.groups, self.systems, self.hosts, self.ports, self.batch, self.budget as usize];
        let services = self.groups.checked_mul(self.ports).and_then(|cells| cells.checked_mul(self.hosts));
        if counts.contains(&0) {
            Err("groups, systems, hosts, ports, batch and budget are at least 1".to_owned())
        } else if services.is_none_or(|services| services > SERVICES_MAX) {
            Err(format!("groups x ports x hosts is {SERVICES_MAX} at most"))
        } else if (self.budget as usize).checked_mul(self.batch).is_none_or(|probes| probes > u32::MAX as usize) {
            Err(format!("budget x batch is {} probes at most", u32::MAX))
        } else if self.systems > self.groups {
            Err(format!("{} systems have more than {} groups to share", self.systems, self.groups))
        } else if self.batch > self.hosts {
            Err(format!("a batch of {} is more than the {} hosts of a group", self.batch, self.hosts))
        } else if self.ports > self.table.ports().len() {
            Err(format!("the table has {} ports, {} are asked for", self.table.ports().len(), self.ports))
        } else if !self.table.ports().iter().all(|port| (0.0..=1.0).contains(&port.frequency)) {
            Err("the frequency of a port is from 0 to 1".to_owned())
        } else if ![self.renumbered / 1_000.0, self.updates, self.outbreaks].iter().all(|x| (0.0..=1.0).contains(x)) {
            Err("renumbered is from 0 to 1000, updates and outbreaks are from 0 to 1".to_owned())
        } else {
            Ok(())
        }
    }

    /// Which system a group belongs to.
    pub fn system(&self, group: usize) -> usize {
        group * self.systems / self.groups
    }

    /// Of all options.
    pub(super) fn fingerprint(&self) -> [u8; 32] {
        let text = serde_json::to_vec(self).expect("options are JSON");
        *blake3::hash(&text).as_bytes()
    }
}

/// What a batch found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probed {
    /// Group and port: `group * ports + port`.
    pub cell: usize,
    /// Hosts that were probed.
    pub hosts: u32,
    /// Of these, with a service.
    pub open: u32,
    /// Of these, with a service that was not known, or not in this version.
    pub found: u32,
}

/// The scanner's memory of a cell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Cell {
    /// Probes since the beginning.
    probes: u32,
    /// Hosts with a service when they were last probed.
    open: u32,
    /// Of its last batch, hosts that were probed before and had changed.
    changed: u32,
    /// Batches of the episode before and with the cell's last; 0: none.
    last: u32,
}

impl Cell {
    /// See [`super::ScanBudget`].
    pub fn features(&self, config: &WorldConfig, now: u32) -> [f32; FEATURES] {
        let hosts = config.hosts as u32;
        let probed = self.probes.min(hosts);
        let age = if self.last == 0 { 1.0 } else { (now - self.last) as f32 / config.budget as f32 };
        let share = self.open as f32 / probed.max(1) as f32;
        [share, probed as f32 / hosts as f32, age, self.changed as f32 / config.batch as f32]
    }
}

/// Whether a service is there; the other bits are its version, which is kept while it is not, so that another one differs from it.
const OPEN: u8 = 0x80;

pub(super) struct World {
    /// [cells x hosts]: the version of the service, with [`OPEN`] while it is there.
    services: Vec<u8>,
    /// [cells x hosts]: what the scanner saw last.
    known: Vec<u8>,
    /// [cells]: the chance that a host that is there has a service.
    rates: Vec<f64>,
    /// [groups]: the chance that an address has a host.
    densities: Vec<f64>,
    /// [cells].
    cells: Vec<Cell>,
    /// Of the orders in which hosts are probed.
    key: u64,
    batches: u32,
    existed: u64,
    probed: Option<Probed>,
}

/// How many times as frequent services of a class are, in the order of [`Class`]: hosting, subscribers of a provider, devices, mail,
/// databases that should not be open, offices.
const PROFILES: [[f64; 7]; 6] = [
    [2.2, 2.0, 0.8, 1.5, 0.6, 0.1, 1.5],
    [0.3, 0.2, 0.1, 0.1, 0.8, 5.0, 0.1],
    [0.8, 1.2, 0.0, 0.1, 0.3, 7.0, 0.8],
    [1.0, 0.8, 9.0, 0.4, 1.5, 0.0, 0.6],
    [0.6, 1.6, 0.2, 14.0, 0.4, 0.1, 1.0],
    [0.7, 0.8, 1.5, 0.5, 2.5, 1.2, 2.5],
];
/// Nothing is certain.
const RATE_MAX: f64 = 0.95;
/// Of an outbreak.
const OUTBREAK_RATE: f64 = 0.6;
const UPDATED: f64 = 0.7;

impl World {
    pub fn empty(config: &WorldConfig) -> Self {
        let cells = config.cells();
        Self {
            services: vec![0; cells * config.hosts],
            known: vec![0; cells * config.hosts],
            rates: vec![0.0; cells],
            densities: vec![0.0; config.groups],
            cells: vec![Cell::default(); cells],
            key: 0,
            batches: 0,
            existed: 0,
            probed: None,
        }
    }

    pub fn batches(&self) -> u32 {
        self.batches
    }

    pub fn existed(&self) -> u64 {
        self.existed
    }

    pub fn probed(&self) -> Option<Probed> {
        self.probed
    }

    pub fn cell(&self, index: usize) -> &Cell {
        &self.cells[index]
    }

    /// The chance that a host of the cell has a service; an outbreak's are not among it. For oracles.
    pub fn chance(&self, config: &WorldConfig, cell: usize) -> f64 {
        self.rates[cell] * self.densities[cell / config.ports]
    }

    pub fn scanned_whole(&self, config: &WorldConfig, cell: usize) -> bool {
        self.cells[cell].probes as usize >= config.hosts
    }

    /// Of the hosts that are left of a pass over the cell, the share with a service that is not known, or not in this version. For oracles.
    pub fn unknown_share(&self, config: &WorldConfig, cell: usize) -> f64 {
        let (hosts, probes) = (config.hosts as u64, u64::from(self.cells[cell].probes));
        let done = probes % hosts;
        let key = self.key.wrapping_add(cell as u64);
        let from = cell * config.hosts;
        let unknown = |at: &usize| self.services[*at] & OPEN > 0 && self.services[*at] != self.known[*at];
        // The whole cell, less what this pass has had: most cells are at the beginning of one, and need no order.
        let all = (from..from + config.hosts).filter(unknown).count();
        let had = (probes - done..probes).map(|probe| from + order(key, hosts, probe) as usize).filter(unknown).count();
        (all - had) as f64 / (hosts - done) as f64
    }

    /// Another world, of which the scanner knows nothing.
    pub fn draw(&mut self, config: &WorldConfig, rng: &mut Pcg64) {
        let profiles: Vec<usize> = (0..config.systems).map(|_| rng.below(PROFILES.len() as u64) as usize).collect();
        for group in 0..config.groups {
            let profile = &PROFILES[profiles[config.system(group)]];
            // Most networks are sparse, a few are full.
            let fullness = rng.unit();
            self.densities[group] = 0.1 + 0.85 * fullness * fullness;
            for (port, entry) in config.table.ports()[..config.ports].iter().enumerate() {
                let rate = entry.frequency * profile[place(entry.class)] * rng.uniform(0.5, 1.5);
                self.rates[group * config.ports + port] = rate.min(RATE_MAX);
            }
        }
        self.services.fill(0);
        self.known.fill(0);
        self.cells.fill(Cell::default());
        (self.key, self.batches, self.existed, self.probed) = (rng.bits(), 0, 0, None);
        for group in 0..config.groups {
            (0..config.hosts).for_each(|host| self.settle(config, (group, host), rng));
        }
    }

    /// Probes the next hosts of a cell.
    pub fn probe(&mut self, config: &WorldConfig, cell: usize) -> Probed {
        let hosts = config.hosts as u64;
        let mut probed = Probed { cell, hosts: config.batch as u32, open: 0, found: 0 };
        let state = &mut self.cells[cell];
        state.changed = 0;
        for _ in 0..config.batch {
            let key = self.key.wrapping_add(cell as u64);
            let at = cell * config.hosts + order(key, hosts, state.probes.into()) as usize;
            let (service, known) = (self.services[at], &mut self.known[at]);
            let open = service & OPEN > 0;
            let found = open && service != *known;
            state.open = state.open + u32::from(open) - u32::from(*known & OPEN > 0);
            state.changed += u32::from(found && u64::from(state.probes) >= hosts);
            probed.open += u32::from(open);
            probed.found += u32::from(found);
            *known = service;
            state.probes += 1;
        }
        self.batches += 1;
        state.last = self.batches;
        self.probed = Some(probed);
        probed
    }

    /// What happens during a batch.
    pub fn drift(&mut self, config: &WorldConfig, rng: &mut Pcg64) {
        let expected = config.renumbered / 1_000.0 * (config.groups * config.hosts) as f64;
        let whole = expected as u64;
        let renumbered = whole + u64::from(rng.unit() < expected - whole as f64);
        for _ in 0..renumbered {
            let group = rng.below(config.groups as u64) as usize;
            let host = rng.below(config.hosts as u64) as usize;
            self.settle(config, (group, host), rng);
        }
        if rng.unit() < config.updates {
            self.each_service(config, rng, |service, _, rng| {
                (*service & OPEN > 0 && rng.unit() < UPDATED).then(|| next(*service))
            });
        }
        if rng.unit() < config.outbreaks {
            self.each_service(config, rng, |service, rate, rng| {
                *rate = rate.max(OUTBREAK_RATE);
                (*service & OPEN == 0 && rng.unit() < OUTBREAK_RATE).then(|| next(*service))
            });
        }
    }

    /// Somebody moves in at an address, or nobody.
    fn settle(&mut self, config: &WorldConfig, (group, host): (usize, usize), rng: &mut Pcg64) {
        let there = rng.unit() < self.densities[group];
        for port in 0..config.ports {
            let cell = group * config.ports + port;
            let service = &mut self.services[cell * config.hosts + host];
            let open = there && rng.unit() < self.rates[cell];
            *service = if open { next(*service) } else { *service & !OPEN };
            self.existed += u64::from(open);
        }
    }

    /// Calls `change` for one port of one system, both drawn, host after host; what it gives is a new version.
    fn each_service(
        &mut self,
        config: &WorldConfig,
        rng: &mut Pcg64,
        change: impl Fn(&u8, &mut f64, &mut Pcg64) -> Option<u8>,
    ) {
        let system = rng.below(config.systems as u64) as usize;
        let port = rng.below(config.ports as u64) as usize;
        for group in (0..config.groups).filter(|&group| config.system(group) == system) {
            let cell = group * config.ports + port;
            for service in &mut self.services[cell * config.hosts..][..config.hosts] {
                if let Some(version) = change(service, &mut self.rates[cell], rng) {
                    *service = version;
                    self.existed += 1;
                }
            }
        }
    }

    pub fn save(&self, bytes: &mut Vec<u8>) {
        bytes.extend(&self.services);
        bytes.extend(&self.known);
        self.rates.iter().chain(&self.densities).for_each(|number| bytes.extend(number.to_le_bytes()));
        for cell in &self.cells {
            for word in [cell.probes, cell.open, cell.changed, cell.last] {
                bytes.extend(word.to_le_bytes());
            }
        }
        bytes.extend(self.key.to_le_bytes());
        bytes.extend(self.existed.to_le_bytes());
        bytes.extend(self.batches.to_le_bytes());
        let probed =
            self.probed.map_or([u32::MAX; 4], |probed| [probed.cell as u32, probed.hosts, probed.open, probed.found]);
        probed.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
    }

    /// The inverse of `save`.
    pub fn restore(config: &WorldConfig, bytes: &[u8]) -> Result<Self, &'static str> {
        let mut world = Self::empty(config);
        let services = world.services.len();
        let numbers = world.rates.len() + world.densities.len();
        if bytes.len() != 2 * services + 8 * numbers + 16 * world.cells.len() + 36 {
            return Err("it has not as many bytes as a world of this size");
        }
        let (there, bytes) = bytes.split_at(services);
        let (known, bytes) = bytes.split_at(services);
        world.services.copy_from_slice(there);
        world.known.copy_from_slice(known);
        let (chances, bytes) = bytes.split_at(8 * numbers);
        for (to, bytes) in world.rates.iter_mut().chain(&mut world.densities).zip(chances.as_chunks::<8>().0) {
            *to = f64::from_le_bytes(*bytes);
            if !(0.0..=1.0).contains(to) {
                return Err("a chance is not from 0 to 1");
            }
        }
        let (key, bytes) = bytes.split_at(16 * world.cells.len());
        let words: Vec<u32> = key.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        for (cell, words) in world.cells.iter_mut().zip(words.as_chunks::<4>().0) {
            let [probes, open, changed, last] = *words;
            *cell = Cell { probes, open, changed, last };
        }
        let (longs, words) = bytes.split_at(16);
        let long = |index: usize| u64::from_le_bytes(longs[index * 8..][..8].try_into().expect("eight bytes"));
        (world.key, world.existed) = (long(0), long(1));
        let word = |index: usize| u32::from_le_bytes(words[index * 4..][..4].try_into().expect("four bytes"));
        world.batches = word(0);
        let probes_max = u64::from(config.budget) * config.batch as u64;
        let possible = |cell: &Cell| cell.last <= world.batches && u64::from(cell.probes) <= probes_max;
        if world.batches > config.budget || !world.cells.iter().all(possible) {
            return Err("more batches were done than the budget has");
        }
        let cell = word(1) as usize;
        world.probed = (word(1) != u32::MAX).then(|| Probed { cell, hosts: word(2), open: word(3), found: word(4) });
        Ok(world)
    }
}

/// A service of another version. After 127 of them the first comes again: none is missed in fewer batches than that.
fn next(service: u8) -> u8 {
    service.wrapping_add(1) | OPEN
}

fn place(class: Class) -> usize {
    match class {
        Class::Web => 0,
        Class::Remote => 1,
        Class::Mail => 2,
        Class::Database => 3,
        Class::Infrastructure => 4,
        Class::Device => 5,
        Class::File => 6,
    }
}
