//! Running means and variances of one env's observations and returns, and what a policy sees instead of them: gymnasium 1.4's `NormalizeObservation` and
//! `NormalizeReward`, cut to +-10, as CleanRL's `ppo_continuous_action.py` has them for each env by itself. In f64, and part of the lane's state.

use super::trajectory::Reader;

/// Beyond it a number is cut.
const BOUND: f64 = 10.0;
const EPSILON: f64 = 1e-8;

/// Welford's moments of some numbers, begun as gymnasium begins: mean 0 and variance 1 from 1e-4 of a sample.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Moments {
    mean: Vec<f64>,
    variance: Vec<f64>,
    count: f64,
}

impl Moments {
    fn new(len: usize) -> Self {
        Self { mean: vec![0.0; len], variance: vec![1.0; len], count: 1e-4 }
    }

    fn update(&mut self, values: impl Iterator<Item = f64>) {
        let total = self.count + 1.0;
        for ((mean, variance), value) in self.mean.iter_mut().zip(&mut self.variance).zip(values) {
            let delta = value - *mean;
            *mean += delta / total;
            *variance = (*variance * self.count + delta * delta * self.count / total) / total;
        }
        self.count = total;
    }

    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.count.to_le_bytes());
        bytes.extend(self.mean.iter().chain(&self.variance).flat_map(|value| value.to_le_bytes()));
    }

    fn decode(len: usize, reader: &mut Reader<'_>) -> Result<Self, &'static str> {
        let count = reader.double()?;
        let mean = (0..len).map(|_| reader.double()).collect::<Result<_, _>>()?;
        let variance = (0..len).map(|_| reader.double()).collect::<Result<Vec<_>, _>>()?;
        if count <= 0.0 || variance.iter().any(|&value| value < 0.0) {
            return Err("a variance or a count is negative");
        }
        Ok(Self { mean, variance, count })
    }
}

/// The statistics of one env.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Running {
    observations: Moments,
    returns: Moments,
    /// Of the rewards so far.
    discounted: f64,
}

impl Running {
    pub fn new(observation_len: usize) -> Self {
        Self { observations: Moments::new(observation_len), returns: Moments::new(1), discounted: 0.0 }
    }

    /// Counts an observation, and writes what the policy sees in its place.
    pub fn observe(&mut self, observation: &mut [f32]) {
        self.observations.update(observation.iter().map(|&value| f64::from(value)));
        self.normalise(observation);
    }

    /// What the policy sees in the observation's place.
    pub fn normalise(&self, observation: &mut [f32]) {
        let moments = self.observations.mean.iter().zip(&self.observations.variance);
        for (value, (mean, variance)) in observation.iter_mut().zip(moments) {
            *value = ((f64::from(*value) - mean) / (variance + EPSILON).sqrt()).clamp(-BOUND, BOUND) as f32;
        }
    }

    /// Counts a reward, and gives what the learner sees in its place.
    pub fn reward(&mut self, reward: f32, terminated: bool, gamma: f64) -> f32 {
        let carried = if terminated { 0.0 } else { self.discounted * gamma };
        self.discounted = carried + f64::from(reward);
        self.returns.update(std::iter::once(self.discounted));
        (f64::from(reward) / (self.returns.variance[0] + EPSILON).sqrt()).clamp(-BOUND, BOUND) as f32
    }

    /// The statistics of two sets of steps together (Chan et al., 1979), for an evaluation that has no env of its own history.
    pub fn merge(&mut self, other: &Self) {
        merge(&mut self.observations, &other.observations);
        merge(&mut self.returns, &other.returns);
    }

    pub fn encode(&self, bytes: &mut Vec<u8>) {
        self.observations.encode(bytes);
        self.returns.encode(bytes);
        bytes.extend(self.discounted.to_le_bytes());
    }

    pub fn decode(observation_len: usize, reader: &mut Reader<'_>) -> Result<Self, &'static str> {
        let observations = Moments::decode(observation_len, reader)?;
        let returns = Moments::decode(1, reader)?;
        Ok(Self { observations, returns, discounted: reader.double()? })
    }
}

fn merge(into: &mut Moments, other: &Moments) {
    let total = into.count + other.count;
    for at in 0..into.mean.len() {
        let delta = other.mean[at] - into.mean[at];
        let squares = into.variance[at] * into.count
            + other.variance[at] * other.count
            + delta * delta * into.count * other.count / total;
        into.mean[at] += delta * other.count / total;
        into.variance[at] = squares / total;
    }
    into.count = total;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_samples_in_one_set_or_two() {
        let values: Vec<f64> = (0..1_000).map(|step| f64::from(step * 37 % 101) * 0.1 - 3.0).collect();
        let (mut whole, mut first, mut second) = (Moments::new(1), Moments::new(1), Moments::new(1));
        for (step, &value) in values.iter().enumerate() {
            whole.update(std::iter::once(value));
            if step < 300 { &mut first } else { &mut second }.update(std::iter::once(value));
        }
        merge(&mut first, &second);
        let mean = values.iter().sum::<f64>() / 1_000.0;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 1_000.0;
        for moments in [whole, first] {
            // The first 1e-4 of a sample is not theirs.
            assert!((moments.mean[0] - mean).abs() < 1e-5 && (moments.variance[0] - variance).abs() < 1e-4);
        }
    }
}
