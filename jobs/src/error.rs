//! Errors of this crate. Each says what was being done to what, and for a spec or a data file, where.

use std::io;
use std::path::PathBuf;

/// Why a job could not be read, prepared or computed.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The spec says something that cannot be run. `mend` tells what to write instead.
    #[error("line {line}: {problem} ({mend})")]
    Config { line: usize, problem: String, mend: String },
    /// A data file that could not be opened or read at all.
    #[error("read data file {}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    /// Samples that are too many for memory could not be kept in a file.
    #[error("keep samples in a file in {}: {source}; TMPDIR names another folder", dir.display())]
    Kept { dir: PathBuf, source: std::io::Error },
    /// A row of a data file that is not what the trainer needs.
    #[error("{}, line {line}: {problem}", path.display())]
    Row { path: PathBuf, line: u64, problem: String },
    /// The data as a whole cannot be trained on (empty, one class only, ...).
    #[error("data {}: {problem}", path.display())]
    Data { path: PathBuf, problem: String },
    /// Training left the finite numbers. Every rank sees the same sum, so every rank raises it at the same step.
    #[error("{what} is not finite at step {step}: lower [schedule] lr, or set [train] clip_norm")]
    NonFinite { step: u64, what: &'static str },
    /// Saved tensors do not fit this model or optimizer.
    #[error("restore tensor {name}: {problem}")]
    Tensor { name: String, problem: String },
    /// The caller broke the contract of [`crate::Train`] (a sample index out of range, a sum of another length).
    #[error("{what}: got {got}, expected {expected}")]
    Contract { what: &'static str, got: u64, expected: u64 },
    /// Somebody has asked to stop between two parts of a lane's work ([`crate::LaneWork::pulse`]).
    #[error("the work was given up")]
    GivenUp,
    /// The pool of compute threads could not be started.
    #[error("start {threads} compute threads: {problem}")]
    Threads { threads: usize, problem: String },
    /// Files of a language model.
    #[error(transparent)]
    Model(crate::lm::ModelError),
    /// An environment that fails, or what rollouts and learners say of each other.
    #[error(transparent)]
    Rl(Box<crate::rl::RlError>),
}

impl JobError {
    /// Whether another try may end otherwise: the machine, or a process that an environment runs in, was at fault.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Threads { .. } | Self::Kept { .. } | Self::GivenUp => true,
            // A store that is away; one that denies or has no such object will do so again.
            Self::File { path, source } => {
                use io::ErrorKind::{InvalidData, InvalidInput, NotFound, PermissionDenied, UnexpectedEof};
                let stays = [NotFound, PermissionDenied, InvalidInput, InvalidData, UnexpectedEof];
                path.to_string_lossy().contains("://") && !stays.contains(&source.kind())
            }
            Self::Rl(error) => matches!(&**error, crate::rl::RlError::Env(error) if error.is_passing()),
            Self::Config { .. }
            | Self::Row { .. }
            | Self::Data { .. }
            | Self::NonFinite { .. }
            | Self::Tensor { .. }
            | Self::Contract { .. }
            | Self::Model(_) => false,
        }
    }
}
