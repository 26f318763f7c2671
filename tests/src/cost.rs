//! What an exchange between machines costs, as a model: so much for each byte, frame and operation of a rank. Fitted to measurements of a few ranks, to say what
//! more of them would cost. Owns the fit; measures nothing.

use stoke_node::exchange::Traffic;

/// What a rank sent for one operation, and the CPU that it took, seconds.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub sent: Traffic,
    pub cpu: f64,
}

/// Seconds of CPU for a byte, a frame and an operation, sent and received.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost(pub [f64; 3]);

impl Cost {
    /// The least relative errors, none of the three below 0.
    pub fn fit(samples: &[Sample]) -> Self {
        let error = |cost: &Self| {
            let off = |sample: &Sample| (cost.cpu(sample.sent) / sample.cpu - 1.0).powi(2);
            samples.iter().map(off).sum::<f64>()
        };
        let fits = (1..8).map(|kinds: u32| Self::fit_of(samples, [0, 1, 2].map(|kind| kinds >> kind & 1 == 1)));
        let sound = fits.filter(|cost| cost.0.iter().all(|part| part.is_finite() && *part >= 0.0));
        sound.min_by(|one, other| error(one).total_cmp(&error(other))).unwrap_or(Self([f64::NAN; 3]))
    }

    /// CPU seconds of a rank that sends so much.
    pub fn cpu(&self, sent: Traffic) -> f64 {
        terms(sent).iter().zip(self.0).map(|(term, cost)| term * cost).sum()
    }

    /// The normal equations of those terms alone; the others cost nothing.
    fn fit_of(samples: &[Sample], kinds: [bool; 3]) -> Self {
        let mut equations = [[0.0; 4]; 3];
        for (row, equation) in equations.iter_mut().enumerate() {
            if !kinds[row] {
                equation[row] = 1.0;
                continue;
            }
            for sample in samples {
                // Of the cost over what was measured: large samples count no more than small ones.
                let terms = terms(sample.sent).map(|term| term / sample.cpu);
                (0..3)
                    .filter(|column| kinds[*column])
                    .for_each(|column| equation[column] += terms[row] * terms[column]);
                equation[3] += terms[row];
            }
        }
        for pivot in 0..3 {
            let largest = (pivot..3).max_by(|a, b| equations[*a][pivot].abs().total_cmp(&equations[*b][pivot].abs()));
            equations.swap(pivot, largest.expect("a row"));
            let top = equations[pivot].map(|value| value / equations[pivot][pivot]);
            equations[pivot] = top;
            for row in (0..3).filter(|row| *row != pivot) {
                let factor = equations[row][pivot];
                equations[row].iter_mut().zip(top).for_each(|(value, top)| *value -= factor * top);
            }
        }
        Self(equations.map(|equation| equation[3]))
    }
}

fn terms(sent: Traffic) -> [f64; 3] {
    [sent.bytes as f64, sent.frames as f64, 1.0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_is_found_again_and_never_below_nothing() {
        let traffic = [(1 << 20, 16), (1 << 24, 128), (1 << 24, 400), (1 << 27, 1024), (4096, 2)];
        let traffic = traffic.map(|(bytes, frames)| Traffic { bytes, frames });
        let of = |cost: Cost| traffic.map(|sent| Sample { sent, cpu: cost.cpu(sent) });
        for cost in [Cost([2e-9, 8e-6, 1e-4]), Cost([2e-9, 0.0, 1e-4]), Cost([0.0, 8e-6, 0.0])] {
            let found = Cost::fit(&of(cost));
            let close = |(found, cost): (&f64, f64)| (found - cost).abs() <= 1e-6 * cost.max(1e-9);
            assert!(found.0.iter().zip(cost.0).all(close), "{found:?}, {cost:?}");
        }
        // Fewer frames cost more: no cost of a frame explains that.
        let odd = [(1000, 9, 1.0), (1000, 1, 2.0), (2000, 5, 3.0)];
        let odd = odd.map(|(bytes, frames, cpu)| Sample { sent: Traffic { bytes, frames }, cpu });
        assert!(Cost::fit(&odd).0.iter().all(|part| *part >= 0.0));
    }
}
