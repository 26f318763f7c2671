//! What a rank takes of its machine. Owns the sum; what a machine has is the agent's to compare with.

use serde::{Deserialize, Serialize};
use stoke_protocol::message::rank::StartRank;
use stoke_protocol::spec::JobSpec;

/// Of one rank, or of several together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Claim {
    pub cpus: u64,
    pub memory_bytes: u64,
    pub gpus: u64,
}

impl Claim {
    /// Of one rank of a job.
    pub fn of(spec: &JobSpec, start: &StartRank) -> Self {
        let ask = &spec.resources;
        Self { cpus: ask.cpus.into(), memory_bytes: start.memory_bytes, gpus: ask.gpus.into() }
    }

    pub fn plus(self, other: Self) -> Self {
        Self {
            cpus: self.cpus.saturating_add(other.cpus),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            gpus: self.gpus.saturating_add(other.gpus),
        }
    }
}
