//! Environments whose actions are the cells of a grid, as `scan-budget`'s are: what a policy sees of one cell, so that one small network can judge them all.
//! What it learns of a cell it knows of every cell. Fixed arithmetic; owns no weights.

/// Numbers of an observation that a cell has; the observation ends with one number for all.
pub(crate) const FEATURES: usize = 3;

/// Groups by ports; groups that follow each other belong to one system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cells {
    pub groups: usize,
    pub ports: usize,
    pub systems: usize,
}

type Features = [f32; FEATURES];

impl Cells {
    pub(crate) fn len(self) -> usize {
        self.groups * self.ports
    }

    /// Numbers that the judge of a cell sees: its own, the means over its group, its port, its port in its system and all, what is for all, and which port it is.
    pub(crate) fn inputs(self) -> usize {
        5 * FEATURES + 1 + self.ports
    }

    /// Numbers that the judge of the whole sees: the means over all and over each port, and what is for all.
    pub(crate) fn whole_inputs(self) -> usize {
        FEATURES * (1 + self.ports) + 1
    }

    /// Appends a row for each cell of each observation.
    pub(crate) fn expand(self, observations: &[f32], out: &mut Vec<f32>) {
        let per_system = self.groups / self.systems;
        for observation in observations.chunks_exact(self.len() * FEATURES + 1) {
            let (cells, rest) = observation.as_chunks::<FEATURES>();
            let ports: Vec<Features> =
                (0..self.ports).map(|port| mean(cells[port..].iter().step_by(self.ports))).collect();
            let all = mean(ports.iter());
            for (group, row) in cells.chunks_exact(self.ports).enumerate() {
                let own = mean(row.iter());
                let system = group / per_system * per_system * self.ports;
                let system = &cells[system..system + per_system * self.ports];
                for (port, cell) in row.iter().enumerate() {
                    let same = mean(system[port..].iter().step_by(self.ports));
                    [*cell, own, ports[port], same, all].iter().for_each(|features| out.extend(features));
                    out.push(rest[0]);
                    out.extend((0..self.ports).map(|other| if other == port { 1.0 } else { 0.0 }));
                }
            }
        }
    }

    /// Appends a row for each observation.
    pub(crate) fn pool(self, observations: &[f32], out: &mut Vec<f32>) {
        for observation in observations.chunks_exact(self.len() * FEATURES + 1) {
            let (cells, rest) = observation.as_chunks::<FEATURES>();
            let ports: Vec<Features> =
                (0..self.ports).map(|port| mean(cells[port..].iter().step_by(self.ports))).collect();
            out.extend(mean(ports.iter()));
            ports.iter().for_each(|features| out.extend(features));
            out.push(rest[0]);
        }
    }
}

fn mean<'a>(features: impl Iterator<Item = &'a Features>) -> Features {
    let (mut sums, mut count) = ([0.0; FEATURES], 0);
    for features in features {
        sums.iter_mut().zip(features).for_each(|(sum, value)| *sum += value);
        count += 1;
    }
    sums.map(|sum| sum / count as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cell_is_seen_with_the_means_around_it() {
        let cells = Cells { groups: 4, ports: 2, systems: 2 };
        // The first number of a cell is its index.
        let mut observation: Vec<f32> = (0..8).flat_map(|cell| [cell as f32, 0.5, 0.0]).collect();
        observation.push(0.25);
        let mut rows = Vec::new();
        cells.expand(&observation, &mut rows);
        assert_eq!(rows.len(), 8 * cells.inputs());
        // Group 2, port 1: its group has cells 4 and 5, its port 1, 3, 5 and 7, its port in its system 5 and 7.
        let row = &rows[5 * cells.inputs()..6 * cells.inputs()];
        let firsts: Vec<f32> = row[..15].iter().step_by(FEATURES).copied().collect();
        assert_eq!(firsts, [5.0, 4.5, 4.0, 6.0, 3.5]);
        assert_eq!(row[15..], [0.25, 0.0, 1.0]);
        let mut whole = Vec::new();
        cells.pool(&observation, &mut whole);
        assert_eq!(whole, [3.5, 0.5, 0.0, 3.0, 0.5, 0.0, 4.0, 0.5, 0.0, 0.25]);
        assert_eq!(whole.len(), cells.whole_inputs());
    }
}
