//! Why a checkpoint could not be written or read. Each error names the object, and for damage the shard, the byte and the mend.

use stoke_protocol::ids::Digest;

use super::answer::{Answer, answer};
use super::store::Kind;

/// What was being done when a checkpoint could not be read.
pub(super) const READ: &str = "read";

/// What a person does about a damaged checkpoint.
const MEND: &str = "restore the file from a copy, or continue from an earlier checkpoint (`stoke checkpoint list`)";

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{uri:?} is not a place for checkpoints: {problem}")]
    Uri { uri: String, problem: String },
    #[error("{verb} {object}: the disk is full: free space there, or write checkpoints elsewhere with [checkpoint] to")]
    Full { verb: &'static str, object: String },
    #[error("{verb} {object}")]
    Store {
        verb: &'static str,
        object: String,
        #[source]
        source: object_store::Error,
    },
    #[error("{verb} {object}")]
    File {
        verb: &'static str,
        object: String,
        #[source]
        source: std::io::Error,
    },
    /// An object store does not let this process do it.
    #[error("{verb} {object}: the store denies it ({said}): {mend}")]
    Denied { verb: &'static str, object: String, said: String, mend: String },
    /// An object store is away, or failed for as long as it was asked again.
    #[error("{verb} {object}: {said}")]
    Remote { verb: &'static str, object: String, said: String },
    /// A checkpoint without a manifest was never committed: its shards mean nothing.
    #[error(
        "no checkpoint at {uri}: manifest.json is missing (see `stoke checkpoint list` for those that are committed)"
    )]
    Missing { uri: String },
    /// The trainer's own state is not what a checkpoint can hold.
    #[error("take the state of the trainer")]
    State(#[source] stoke_jobs::JobError),
    #[error("manifest of {uri}: {problem}: {MEND}")]
    Manifest { uri: String, problem: String },
    /// A whole checkpoint, and not the one that was committed.
    #[error(
        "manifest of {uri}: its BLAKE3 is {found}, and {expected} was committed: another checkpoint lies in the place of this one: {MEND}"
    )]
    Foreign { uri: String, found: Digest, expected: Digest },
    #[error("shard {shard} ({file}), byte {offset}: {problem}: {MEND}")]
    Shard { shard: u32, file: String, offset: u64, problem: String },
    /// Another writer was there first: two generations never share a folder.
    #[error("write manifest of {uri}: another manifest is there already, and a checkpoint is never replaced")]
    Conflict { uri: String },
}

impl CheckpointError {
    /// Whether the checkpoint itself is at fault: another one may be whole. A file that cannot be read is no better than one that is not there.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Missing { .. } | Self::Manifest { .. } | Self::Foreign { .. } | Self::Shard { .. } => true,
            Self::Store { verb, .. } | Self::File { verb, .. } => *verb == READ,
            Self::Uri { .. } | Self::Full { .. } | Self::State(_) | Self::Conflict { .. } => false,
            Self::Denied { .. } | Self::Remote { .. } => false,
        }
    }

    /// Whether the same may succeed later: without anybody's doing, when room was made, or when credentials were renewed. A file that cannot be
    /// read does not: an earlier checkpoint is sooner there.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Denied { .. } | Self::Remote { .. } | Self::Full { .. } => true,
            Self::Store { verb, .. } | Self::File { verb, .. } => *verb != READ,
            Self::Uri { .. } | Self::State(_) | Self::Conflict { .. } => false,
            Self::Missing { .. } | Self::Manifest { .. } | Self::Foreign { .. } | Self::Shard { .. } => false,
        }
    }

    /// Names what was being done; tells a full disk, and credentials that do not do, from other failures.
    pub(crate) fn store(kind: Kind, verb: &'static str, object: impl ToString, source: object_store::Error) -> Self {
        let object = object.to_string();
        if kind == Kind::File {
            return if is_full(&source) { Self::Full { verb, object } } else { Self::Store { verb, object, source } };
        }
        match answer(kind, &source) {
            Answer::Denied { said, mend } => Self::Denied { verb, object, said, mend },
            Answer::NoBucket { said } => {
                let said = format!("the bucket or container is not there ({said}): make it, or correct its name");
                Self::Remote { verb, object, said }
            }
            Answer::Other { said } => Self::Remote { verb, object, said },
        }
    }
}

/// What a client could not be made of. Values are not in it, but for names of options.
pub(super) fn plain_text(error: &object_store::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

fn is_full(error: &object_store::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            let full = matches!(io.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded);
            // An io::Error hides the one that it wraps from `source`.
            if full || io.get_ref().is_some_and(|inner| inner.to_string().contains("No space left")) {
                return true;
            }
        }
        cause = error.source();
    }
    false
}
