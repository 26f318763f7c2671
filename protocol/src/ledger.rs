//! Which samples are in committed steps. Owns the range and its words; what proves it is the rank's business (`worker/tail.rs` of the node).

use std::fmt;

use serde::{Deserialize, Serialize};

/// Positions of the sample order (`first..end`) that are in committed steps, each in exactly one (I20). A rank extends it by what the sum of a
/// step shows, and refuses a step that would leave a hole or take a sample twice: so there is one range. It goes with the state, into checkpoints
/// and to ranks that join. `first` is above 0 where a job goes on from a checkpoint that has no ledger.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Ledger {
    pub first: u64,
    pub end: u64,
}

impl Ledger {
    /// Nothing was recorded before `position`.
    pub fn from(position: u64) -> Self {
        Self { first: position, end: position }
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {})", self.first, self.end)
    }
}
