//! numpy's random numbers, bit for bit: `SeedSequence` (numpy 2.4, `random/bit_generator.pyx`, after O'Neill, "Developing a seed_seq
//! alternative", 2015) seeds `PCG64` (`random/src/pcg64`, PCG XSL-RR 128/64, O'Neill 2014). Gymnasium draws every initial state with them,
//! so an env that has the same seed here begins where gymnasium's does. One generator an env; it is no cipher.

const MULTIPLIER: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;
/// Bytes of [`Pcg64::to_bytes`].
pub(crate) const BYTES: usize = 32;

/// A generator as of `numpy.random.Generator(numpy.random.PCG64(seed))`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pcg64 {
    state: u128,
    /// Odd: which of the sequences.
    increment: u128,
}

impl Pcg64 {
    pub fn new(seed: u64) -> Self {
        let [a, b, c, d] = seed_sequence(seed);
        let pair = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
        let mut rng = Self { state: 0, increment: pair(c, d) << 1 | 1 };
        rng.advance();
        rng.state = rng.state.wrapping_add(pair(a, b));
        rng.advance();
        rng
    }

    /// 64 random bits.
    #[inline]
    pub fn bits(&mut self) -> u64 {
        self.advance();
        let folded = (self.state >> 64) as u64 ^ self.state as u64;
        folded.rotate_right((self.state >> 122) as u32)
    }

    /// In `0..1`, a multiple of 2^-53: `Generator.random`.
    #[inline]
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * (1.0 / 9_007_199_254_740_992.0)
    }

    /// Between `low` and `high`: `Generator.uniform`.
    #[inline]
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// In `0..n`, each as likely (Lemire, "Fast Random Integer Generation in an Interval", 2019). Not numpy's stream, which draws 32 bits.
    ///
    /// # Panics
    /// When `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "no number is below 0");
        loop {
            let product = u128::from(self.bits()) * u128::from(n);
            if product as u64 >= n.wrapping_neg() % n {
                return (product >> 64) as u64;
            }
        }
    }

    pub(crate) fn to_bytes(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        bytes[..16].copy_from_slice(&self.state.to_le_bytes());
        bytes[16..].copy_from_slice(&self.increment.to_le_bytes());
        bytes
    }

    /// None: no generator is saved as these bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (state, increment) = bytes.split_at_checked(16)?;
        let increment = u128::from_le_bytes(increment.try_into().ok()?);
        (increment & 1 == 1).then_some(())?;
        Some(Self { state: u128::from_le_bytes(state.try_into().ok()?), increment })
    }

    #[inline]
    fn advance(&mut self) {
        self.state = self.state.wrapping_mul(MULTIPLIER).wrapping_add(self.increment);
    }
}

/// `SeedSequence(seed).generate_state(4, numpy.uint64)`.
fn seed_sequence(seed: u64) -> [u64; 4] {
    const WORDS: usize = 4;
    let mut hash = 0x43b0_d7e5u32;
    let mut hashed = |word: u32| {
        let word = word ^ hash;
        hash = hash.wrapping_mul(0x931e_8875);
        let word = word.wrapping_mul(hash);
        word ^ word >> 16
    };
    let mix = |x: u32, y: u32| {
        let mixed = x.wrapping_mul(0xca01_f9dd).wrapping_sub(y.wrapping_mul(0x4973_f715));
        mixed ^ mixed >> 16
    };
    let entropy = [seed as u32, (seed >> 32) as u32];
    let mut pool: [u32; WORDS] = std::array::from_fn(|i| hashed(entropy.get(i).copied().unwrap_or(0)));
    for from in 0..WORDS {
        for to in 0..WORDS {
            if from != to {
                pool[to] = mix(pool[to], hashed(pool[from]));
            }
        }
    }
    let mut hash = 0x8b51_f9ddu32;
    let mut words = pool.iter().cycle().map(|word| {
        let word = word ^ hash;
        hash = hash.wrapping_mul(0x58f3_8ded);
        let word = word.wrapping_mul(hash);
        u64::from(word ^ word >> 16)
    });
    let mut next = || words.next().expect("a cycle has no end");
    std::array::from_fn(|_| next() | next() << 32)
}

#[cfg(test)]
mod tests {
    use super::{Pcg64, seed_sequence};

    #[test]
    fn numbers_are_numpys() {
        // The first 64 bits of SeedSequence(seed).generate_state(4, uint64), and PCG64(seed).random_raw(2), by numpy 2.4.6.
        const GOLDEN: [(u64, u64, [u64; 2]); 4] = [
            (0, 15793235383387715774, [11749869230777074271, 4976686463289251617]),
            (42, 11465652750463011511, [14276969152011380360, 8095878257575067585]),
            (1 << 32 | 5, 17996766564426832300, [14281546376153053393, 8683300866460616067]),
            (u64::MAX, 12591116029944179981, [12544278110101001871, 15593249672699323225]),
        ];
        for (seed, state, bits) in GOLDEN {
            assert_eq!(seed_sequence(seed)[0], state, "SeedSequence({seed})");
            let mut rng = Pcg64::new(seed);
            assert_eq!(bits.map(|_| rng.bits()), bits, "PCG64({seed})");
            assert_eq!(Pcg64::from_bytes(&rng.to_bytes()), Some(rng));
        }
        assert_eq!(Pcg64::new(42).uniform(-0.05, 0.05), 0.027395604855596334, "Generator.uniform");
    }

    #[test]
    fn every_number_below_is_as_likely() {
        let mut rng = Pcg64::new(1);
        let mut seen = [0u32; 7];
        (0..70_000).for_each(|_| seen[rng.below(7) as usize] += 1);
        assert!(seen.iter().all(|&times| (9_500..10_500).contains(&times)), "{seen:?}");
    }
}
