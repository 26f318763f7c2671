//! The journal: an append-only sequence of records that is the truth about the cluster. Owns order, checksums, the hash chain, snapshots and
//! durability; knows nothing of what a record means. Never answers "done" before the disk did.
//!
//! J1: indexes are contiguous from 1 (or from the snapshot on).
//! J2: `append` returns only when its records are durable.
//! J3: each record's chain is BLAKE3(chain before, index, payload): a record that was changed, dropped or reordered is found at the next start.
//! J4: after an error of `append` nothing may be appended any more; the process ends and recovers from disk (fsync is never retried).

#[cfg(test)]
mod damage;
mod model;
mod redb_log;
mod writer;

use std::path::PathBuf;

use stoke_protocol::ids::{Digest, LogIndex};

pub use model::ModelLog;
pub(crate) use redb_log::JOURNAL_FILE;
pub use redb_log::RedbLog;
pub use writer::{Durable, Work, Writer};

/// A record as it is read back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub index: LogIndex,
    pub payload: Vec<u8>,
}

/// What a log holds at start: the newest snapshot, if any, and every record after it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Recovered {
    pub snapshot: Option<Entry>,
    pub entries: Vec<Entry>,
}

impl Recovered {
    /// The index of the newest durable record.
    pub fn last(&self) -> LogIndex {
        let snapshot = self.snapshot.as_ref().map(|entry| entry.index).unwrap_or_default();
        self.entries.last().map_or(snapshot, |entry| entry.index)
    }
}

/// Room on the journal's disk, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Room {
    pub free: u64,
    /// Below this much, new work is refused so that what runs can end (I12, F19).
    pub needed: u64,
}

impl Room {
    /// Whether new work may be taken on.
    pub fn is_enough(self) -> bool {
        self.free >= self.needed
    }
}

/// Where records are kept. Two implementations: a redb file, and the simulator's model of a disk that loses what was not synced.
pub trait Log: Send {
    /// Everything that survived, verified (J1, J3).
    fn recover(&mut self) -> Result<Recovered, JournalError>;

    /// Appends all of `payloads` in order, durable on return (J2), and returns the index of the last.
    fn append(&mut self, payloads: &[Vec<u8>]) -> Result<LogIndex, JournalError>;

    /// Replaces every record up to `at` by one payload from which the state can be rebuilt. Durable on return.
    fn snapshot(&mut self, at: LogIndex, payload: &[u8]) -> Result<(), JournalError>;

    /// Room on the disk below.
    fn room(&self) -> Result<Room, JournalError>;
}

/// Why the journal cannot go on. None of these is retried.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("{path} is in use by another coordinator (process {owner}): stop it, or use another --dir", path = path.display())]
    Locked { path: PathBuf, owner: String },
    #[error("journal {path} is damaged at {index}: {what}; restore the folder from a backup, the coordinator never guesses", path = path.display())]
    Damaged { path: PathBuf, index: LogIndex, what: String },
    #[error("the journal's thread panicked: report this with its log")]
    Panicked,
    #[error("{action} journal {path}: {cause}", path = path.display())]
    Storage { action: &'static str, path: PathBuf, cause: String },
}

/// The chain value of the record at `index` (J3).
fn chain(before: &Digest, index: LogIndex, payload: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&before.0);
    hasher.update(&index.0.to_le_bytes());
    hasher.update(payload);
    Digest(*hasher.finalize().as_bytes())
}
