//! Random numbers that have an address: a function of (seed, stream, env, step), so that any step of any env can be played again anywhere without
//! the ones before it. Counters are mixed by the finaliser of SplitMix64 (Steele, Lea and Flood, 2014; Stafford's variant 13), once a word of the
//! address. No cipher; owns no state.

/// What numbers are for: streams of one seed have nothing to do with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Stream {
    Actions = 1,
    EnvSeeds,
    Minibatches,
    Replay,
    FirstWeights,
    Evaluation,
}

/// A bijection of 64 bits that leaves no trace of their order.
pub(crate) fn mix(word: u64) -> u64 {
    let mut z = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// The numbers at one address, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Draws {
    key: u64,
    next: u64,
}

impl Draws {
    pub fn new(seed: u64, stream: Stream, address: [u64; 3]) -> Self {
        let key = address.iter().fold(mix(mix(seed) ^ stream as u64), |key, word| mix(key ^ word));
        Self { key, next: 0 }
    }

    pub fn bits(&mut self) -> u64 {
        self.next = self.next.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.key ^ self.next)
    }

    /// Above 0 and below 1: the middles of 2^52 cells.
    pub fn unit(&mut self) -> f64 {
        ((self.bits() >> 12) as f64 + 0.5) * (1.0 / 4_503_599_627_370_496.0)
    }

    /// In `0..n`, each as likely to within 2^-32 of its share for any `n` of a `u32`.
    pub fn below(&mut self, n: u32) -> u32 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u32
    }

    /// Standard normal (Box and Muller, 1958).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * super::math::ln(self.unit())).sqrt();
        radius * super::trig::cos(std::f64::consts::TAU * self.unit())
    }

    /// Puts values into an order, each of them as likely (Fisher and Yates).
    pub fn shuffle(&mut self, values: &mut [u32]) {
        for last in (1..values.len()).rev() {
            values.swap(last, self.below(last as u32 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_even_and_those_of_neighbours_differ() {
        let (mut sum, mut square, mut product) = (0.0, 0.0, 0.0);
        let count = 200_000;
        for step in 0..count {
            let unit = Draws::new(7, Stream::Actions, [0, step / 64, step % 64]).unit() - 0.5;
            let other = Draws::new(7, Stream::Actions, [0, step / 64, step % 64 + 1]).unit() - 0.5;
            sum += unit;
            square += unit * unit;
            product += unit * other;
        }
        let count = count as f64;
        // Five standard errors.
        assert!((sum / count).abs() < 5.0 * (1.0f64 / 12.0 / count).sqrt(), "{sum}");
        assert!((square / count - 1.0 / 12.0).abs() < 5.0 * (1.0f64 / 180.0 / count).sqrt(), "{square}");
        assert!((product / count).abs() < 5.0 / 12.0 / count.sqrt(), "{product}");
    }

    #[test]
    fn normal_numbers_have_the_moments_of_the_normal_distribution() {
        let mut draws = Draws::new(1, Stream::FirstWeights, [0; 3]);
        let values: Vec<f64> = (0..200_000).map(|_| draws.normal()).collect();
        let moment = |power| values.iter().map(|value| value.powi(power)).sum::<f64>() / 200_000.0;
        assert!(moment(1).abs() < 0.012 && (moment(2) - 1.0).abs() < 0.016 && (moment(4) - 3.0).abs() < 0.11);
    }

    #[test]
    fn shuffled_values_are_all_there_and_each_place_is_as_likely() {
        let mut places = [0u32; 5];
        for step in 0..10_000 {
            let mut values = [0, 1, 2, 3, 4];
            Draws::new(3, Stream::Minibatches, [0, 0, step]).shuffle(&mut values);
            places[values.iter().position(|&value| value == 0).expect("0 is there")] += 1;
            values.sort_unstable();
            assert_eq!(values, [0, 1, 2, 3, 4]);
        }
        assert!(places.iter().all(|&times| (1_800..2_200).contains(&times)), "{places:?}");
    }
}
