//! Environments whose actions are the cells of a grid, as `scan-budget`'s are: what a policy sees of one cell, so that one small network can judge them all.
//! What it learns of a cell it knows of every cell. An observation is no more than what was seen; here it becomes what that lets one believe of a cell:
//! how common its port's class is in its system, how full its group is, what is to be expected of it. Fixed arithmetic; owns no weights.

use std::sync::Arc;

/// Numbers of an observation that a cell has; the observation ends with one number for all. They are, all from 0 to 1: the share of its hosts that
/// were probed with a service when they were last; the share of its hosts that were ever probed; the time since its last batch (1: never);
/// the share of its last batch that was probed again and had changed.
pub(crate) const FEATURES: usize = 4;
const SHARE: usize = 0;
const COVERAGE: usize = 1;
const AGE: usize = 2;
const CHANGED: usize = 3;

/// Numbers that the judge of a cell sees.
pub(crate) const INPUTS: usize = 16;

/// Groups by ports; groups that follow each other belong to one system.
#[derive(Debug, Clone, PartialEq)]
pub struct Cells {
    pub groups: usize,
    pub systems: usize,
    /// Of a group.
    pub hosts: usize,
    pub ports: Arc<[CellPort]>,
}

/// What is known of a port before anything was seen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CellPort {
    /// The share of hosts that have a service.
    pub frequency: f32,
    /// Ports of a class are found together: a number below [`CLASSES_MAX`].
    pub class: usize,
}

/// Classes that there may be.
pub const CLASSES_MAX: usize = 8;

type Features = [f32; FEATURES];

/// How many services are expected before what was found says how common a class is, or how full a group is.
const SERVICES: f32 = 4.0;
/// How many hosts the rate of a port that its class lets expect counts for in its system, and that rate for one of the system's cells.
const PORT_HOSTS: f32 = 8.0;
const CELL_HOSTS: f32 = 10.0;

/// Sums over the cells of a port in a system.
#[derive(Debug, Clone, Copy, Default)]
struct Pair {
    /// Hosts that were probed, and those as many as they count for in groups so full.
    probed: f32,
    weighed: f32,
    open: f32,
    /// The most that a batch found changed, and how long ago that was.
    changed: f32,
    age: f32,
}

/// What was expected and what was found.
#[derive(Debug, Clone, Copy, Default)]
struct Lift {
    probed: f32,
    expected: f32,
    open: f32,
}

impl Lift {
    /// 1: as expected.
    fn value(self) -> f32 {
        (SERVICES + self.open) / (SERVICES + self.expected)
    }
}

/// What an observation lets one believe.
struct Beliefs {
    /// [systems, ports]
    pairs: Vec<Pair>,
    /// [systems, classes]
    classes: Vec<[Lift; CLASSES_MAX]>,
    /// [groups]
    groups: Vec<Lift>,
    /// [ports]
    ports: Vec<Lift>,
}

impl Cells {
    pub(crate) fn len(&self) -> usize {
        self.groups * self.ports.len()
    }

    /// Numbers of an observation.
    pub(crate) fn observation_len(&self) -> usize {
        self.len() * FEATURES + 1
    }

    /// Numbers that the judge of the whole sees: the means and the maxima of what the judge of a cell sees.
    pub(crate) fn whole_inputs(&self) -> usize {
        2 * INPUTS
    }

    pub(crate) fn system(&self, group: usize) -> usize {
        group * self.systems / self.groups
    }

    /// Groups of a system.
    fn members(&self, system: usize) -> usize {
        (0..self.groups).filter(|group| self.system(*group) == system).count()
    }

    /// Appends a row for each cell of each observation.
    pub(crate) fn expand(&self, observations: &[f32], out: &mut Vec<f32>) {
        out.reserve(observations.len() / self.observation_len() * self.len() * INPUTS);
        for observation in observations.chunks_exact(self.observation_len()) {
            self.each(observation, |row| out.extend_from_slice(row));
        }
    }

    /// Appends a row for each observation.
    pub(crate) fn pool(&self, observations: &[f32], out: &mut Vec<f32>) {
        for observation in observations.chunks_exact(self.observation_len()) {
            let (mut sums, mut maxima) = ([0.0; INPUTS], [f32::NEG_INFINITY; INPUTS]);
            self.each(observation, |row| {
                sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
                maxima.iter_mut().zip(row).for_each(|(max, value)| *max = max.max(*value));
            });
            out.extend(sums.map(|sum| sum / self.len() as f32));
            out.extend(maxima);
        }
    }

    /// What is seen of each cell, group after group.
    fn each(&self, observation: &[f32], mut seen: impl FnMut(&[f32; INPUTS])) {
        let (cells, rest) = observation.as_chunks::<FEATURES>();
        let beliefs = self.believe(cells);
        let (ports, hosts) = (self.ports.len(), self.hosts as f32);
        for (group, row) in cells.chunks_exact(ports).enumerate() {
            let system = self.system(group);
            let full = beliefs.groups[group];
            let members = self.members(system) as f32;
            for ((cell, port), at) in row.iter().zip(&*self.ports).zip(0..) {
                let pair = beliefs.pairs[system * ports + at];
                let class = beliefs.classes[system][port.class];
                let rate = pair_rate(port, class, pair);
                let probed = cell[COVERAGE] * hosts;
                let expected = (CELL_HOSTS * rate * full.value() + cell[SHARE] * probed) / (CELL_HOSTS + probed);
                let elsewhere = if pair.age < cell[AGE] { pair.changed } else { 0.0 };
                seen(&[
                    3.0 * cell[SHARE],
                    2.0 * cell[COVERAGE],
                    2.0 * cell[AGE],
                    4.0 * cell[CHANGED],
                    6.0 * expected,
                    4.0 * rate,
                    4.0 * (squash(class.value()) - 0.5),
                    4.0 * (squash(full.value()) - 0.5),
                    4.0 * (squash(beliefs.ports[at].value()) - 0.5),
                    4.0 * elsewhere,
                    4.0 * pair.probed / (members * hosts),
                    2.0 * class.probed / (class.probed + 32.0),
                    2.0 * full.probed / (full.probed + 32.0),
                    6.0 * port.frequency,
                    2.0 * rest[0],
                    8.0 * expected * (1.0 - cell[COVERAGE]),
                ]);
            }
        }
    }

    /// Twice around: how common a class is depends on how full the groups are that were probed for it, and the reverse.
    fn believe(&self, cells: &[Features]) -> Beliefs {
        let (ports, hosts) = (self.ports.len(), self.hosts as f32);
        let mut beliefs = Beliefs {
            pairs: Vec::new(),
            classes: Vec::new(),
            groups: vec![Lift::default(); self.groups],
            ports: vec![Lift::default(); ports],
        };
        for _ in 0..2 {
            beliefs.pairs.clear();
            beliefs.pairs.resize(self.systems * ports, Pair { age: 1.0, ..Pair::default() });
            beliefs.classes.clear();
            beliefs.classes.resize(self.systems, [Lift::default(); CLASSES_MAX]);
            for (group, row) in cells.chunks_exact(ports).enumerate() {
                let (system, full) = (self.system(group), beliefs.groups[group].value());
                for ((cell, port), at) in row.iter().zip(&*self.ports).zip(0..) {
                    let probed = cell[COVERAGE] * hosts;
                    let pair = &mut beliefs.pairs[system * ports + at];
                    pair.probed += probed;
                    pair.weighed += probed * full;
                    pair.open += cell[SHARE] * probed;
                    if cell[CHANGED] > pair.changed {
                        (pair.changed, pair.age) = (cell[CHANGED], cell[AGE]);
                    }
                    let class = &mut beliefs.classes[system][port.class];
                    class.probed += probed;
                    class.expected += probed * full * port.frequency;
                    class.open += cell[SHARE] * probed;
                }
            }
            for (group, row) in cells.chunks_exact(ports).enumerate() {
                let system = self.system(group);
                let mut full = Lift::default();
                for ((cell, port), at) in row.iter().zip(&*self.ports).zip(0..) {
                    let probed = cell[COVERAGE] * hosts;
                    let class = beliefs.classes[system][port.class];
                    full.probed += probed;
                    full.expected += probed * pair_rate(port, class, beliefs.pairs[system * ports + at]);
                    full.open += cell[SHARE] * probed;
                }
                beliefs.groups[group] = full;
            }
        }
        for row in cells.chunks_exact(ports) {
            for ((cell, port), lift) in row.iter().zip(&*self.ports).zip(&mut beliefs.ports) {
                let probed = cell[COVERAGE] * hosts;
                lift.expected += probed * port.frequency;
                lift.open += cell[SHARE] * probed;
            }
        }
        beliefs
    }
}

/// Of a port in a system, for a group that is as full as others.
fn pair_rate(port: &CellPort, class: Lift, pair: Pair) -> f32 {
    (PORT_HOSTS * port.frequency * class.value() + pair.open) / (PORT_HOSTS + pair.weighed)
}

/// From 0 to 1; a half of what is as expected.
fn squash(lift: f32) -> f32 {
    lift / (1.0 + lift)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four groups in two systems; ports 0 and 1 are of one class, port 2 of another.
    fn cells() -> Cells {
        let port = |class| CellPort { frequency: 0.1, class };
        Cells { groups: 4, systems: 2, hosts: 64, ports: [port(0), port(0), port(1)].into() }
    }

    fn rows(cells: &Cells, seen: &[(usize, Features)]) -> Vec<[f32; INPUTS]> {
        let mut observation = vec![[0.0, 0.0, 1.0, 0.0]; cells.len()];
        seen.iter().for_each(|(cell, features)| observation[*cell] = *features);
        let observation = [observation.as_flattened(), &[0.5]].concat();
        let mut out = Vec::new();
        cells.expand(&observation, &mut out);
        assert_eq!(out.len(), cells.len() * INPUTS);
        let mut whole = Vec::new();
        cells.pool(&observation, &mut whole);
        assert_eq!(whole.len(), cells.whole_inputs());
        out.as_chunks().0.to_vec()
    }

    const EXPECTED: usize = 4;
    const CLASS: usize = 6;
    const FULL: usize = 7;
    const ELSEWHERE: usize = 9;

    #[test]
    fn what_a_batch_found_raises_what_is_expected_of_its_class_system_and_group() {
        let cells = cells();
        let before = rows(&cells, &[]);
        assert!(before.iter().all(|row| (row[EXPECTED] - 0.6).abs() < 1e-6 && row[CLASS] == 0.0), "{before:?}");
        // Group 0, port 0: six of eight hosts.
        let after = rows(&cells, &[(0, [0.75, 0.125, 0.0, 0.0])]);
        let expected: Vec<f32> = after.iter().map(|row| row[EXPECTED]).collect();
        // The cell above its group's other port of the class, that above the other group of the system, that above another class there, that above another system.
        assert!(expected[0] > expected[1] && expected[1] > expected[4], "{expected:?}");
        assert!(expected[4] > expected[5] && expected[5] == expected[6] && expected[6] == expected[11], "{expected:?}");
        assert!(after[0][FULL] > 0.0 && after[3][FULL] == 0.0 && after[6][CLASS] == 0.0, "{after:?}");
        // Nothing in the same batch is a worse sign, and in more batches a worse one still.
        let [some, many] = [0.125, 0.5].map(|coverage| rows(&cells, &[(0, [0.0, coverage, 0.0, 0.0])])[0][EXPECTED]);
        assert!(many < some && some < before[0][EXPECTED], "{many} {some}");
    }

    #[test]
    fn change_in_a_cell_is_seen_from_those_of_its_port_and_system_that_were_probed_before() {
        let cells = cells();
        let seen = rows(&cells, &[(0, [0.5, 1.0, 0.1, 0.75]), (3, [0.5, 1.0, 0.4, 0.0])]);
        assert_eq!((seen[0][ELSEWHERE], seen[3][ELSEWHERE], seen[6][ELSEWHERE]), (0.0, 3.0, 0.0));
        let seen = rows(&cells, &[(0, [0.5, 1.0, 0.4, 0.75]), (3, [0.5, 1.0, 0.1, 0.0])]);
        assert_eq!(seen[3][ELSEWHERE], 0.0, "it was probed after the change");
    }

    #[test]
    fn groups_need_not_be_a_multiple_of_systems() {
        let cells = Cells { groups: 5, systems: 3, ..cells() };
        let systems: Vec<usize> = (0..5).map(|group| cells.system(group)).collect();
        assert_eq!(systems, [0, 0, 1, 1, 2]);
        rows(&cells, &[]);
    }
}
