//! Errors of reinforcement learning: what went wrong with which lane's environments, bytes or numbers.

use super::EnvError;
use crate::JobError;

#[derive(Debug, thiserror::Error)]
pub enum RlError {
    #[error(transparent)]
    Env(#[from] EnvError),
    #[error(transparent)]
    Job(#[from] JobError),
    /// Bytes that are no trajectory, lane or replay buffer of this job.
    #[error("read {what}: {problem}")]
    Bytes { what: &'static str, problem: String },
    /// The caller broke a contract: a vector of another length, a lane without a trajectory.
    #[error("{what}: got {got}, expected {expected}")]
    Contract { what: &'static str, got: u64, expected: u64 },
    /// Learning left the finite numbers.
    #[error("{what} is not finite at update {update}: lower [rl] lr, or max_grad_norm")]
    NonFinite { update: u64, what: &'static str },
}

impl From<RlError> for JobError {
    fn from(error: RlError) -> Self {
        match error {
            RlError::Job(error) => error,
            error => Self::Rl(Box::new(error)),
        }
    }
}

/// The check that most calls begin with.
pub(crate) fn check_len(what: &'static str, got: usize, expected: usize) -> Result<(), RlError> {
    if got == expected { Ok(()) } else { Err(RlError::Contract { what, got: got as u64, expected: expected as u64 }) }
}
