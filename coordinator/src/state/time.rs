//! The two clocks that the state is told of. It never reads one, and never compares readings of two machines (I36).

use serde::{Deserialize, Serialize};

/// Milliseconds since the Unix epoch by the coordinator's clock. For people and for the life of tokens; never goes back in the journal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Time(pub u64);

/// Milliseconds by a clock of the coordinator's that only moves forward, from any start. For leases; never journalled.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Mono(pub u64);

/// Both clocks, read together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Now {
    pub wall: Time,
    pub mono: Mono,
}

impl Time {
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

impl Mono {
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    /// Milliseconds from `earlier` to here; 0 when it is later.
    pub fn since_ms(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}
