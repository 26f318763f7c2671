//! From log to state and back: records and snapshots as bytes. Owns the journal's format number; never touches a disk itself.
//!
//! R1 (I8): a snapshot carries the hash of its state; one that does not match is damage, as is a record that does not decode.

use stoke_protocol::codec::{decode_record, encode_record};
use stoke_protocol::ids::{Digest, LogIndex};

use crate::journal::{JournalError, Log, Recovered};
use crate::state::{Cluster, Record};

/// Grows when an event or the state changes in a way that older releases would misread.
const FORMAT: u8 = 5;

/// The payload of one journal record.
pub fn record_bytes(record: &Record) -> Vec<u8> {
    let mut bytes = vec![FORMAT];
    bytes.extend(encode_record(record).expect("a record has only types that encode"));
    bytes
}

/// The payload of a snapshot: format, state hash, state.
pub fn snapshot_bytes(cluster: &Cluster) -> Vec<u8> {
    let state = cluster.to_bytes();
    [&[FORMAT][..], blake3::hash(&state).as_bytes(), &state].concat()
}

/// What a log gives.
pub(crate) struct Recovery {
    /// The state at its end.
    pub cluster: Cluster,
    /// Its newest snapshot's last entry; 0 without one. The next one is due from here, not from the start: else a coordinator that is started
    /// often never takes one, and each start replays more.
    pub snapshot_at: LogIndex,
}

/// The state at the end of the log. Every entry is verified; what cannot be read is never skipped (F42).
pub(crate) fn recover(log: &mut dyn Log) -> Result<Recovery, RecoverError> {
    let Recovered { snapshot, entries } = log.recover()?;
    let snapshot_at = snapshot.as_ref().map(|entry| entry.index).unwrap_or_default();
    let mut cluster = match snapshot {
        Some(entry) => read_snapshot(entry.index, &entry.payload)?,
        None => Cluster::default(),
    };
    for entry in entries {
        let index = entry.index;
        let record: Record =
            read(index, &entry.payload, |body| decode_record(body).map_err(|error| error.to_string()))?;
        cluster.apply(&record);
        if cluster.index() != index {
            return Err(RecoverError::Entry { index, what: format!("the state counts it as {}", cluster.index()) });
        }
    }
    cluster.check_invariants().map_err(|violation| RecoverError::Invariant { violation })?;
    Ok(Recovery { cluster, snapshot_at })
}

fn read_snapshot(index: LogIndex, payload: &[u8]) -> Result<Cluster, RecoverError> {
    read(index, payload, |body| {
        let (hash, state) = body.split_at_checked(32).ok_or("the snapshot is cut short")?;
        let cluster = Cluster::from_bytes(state).map_err(|error| error.to_string())?;
        let matches = blake3::hash(state) == *hash && cluster.state_hash().0 == *hash;
        if matches {
            Ok(cluster)
        } else {
            Err("the snapshot does not have the state hash that was written with it".into())
        }
    })
}

fn read<T>(index: LogIndex, payload: &[u8], read: impl FnOnce(&[u8]) -> Result<T, String>) -> Result<T, RecoverError> {
    let entry = |what: String| RecoverError::Entry { index, what };
    match payload.split_first() {
        Some((&FORMAT, body)) => read(body).map_err(entry),
        Some((&format, _)) => Err(entry(format!("it has format {format}, this release reads {FORMAT}"))),
        None => Err(entry("it is empty".into())),
    }
}

/// Why a log does not give a state.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecoverError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(
        "journal entry {index} cannot be read: {what}; start the release that wrote it, or restore the folder from a backup"
    )]
    Entry { index: LogIndex, what: String },
    #[error(
        "the journal replays to a state that cannot be: {violation}; restore the folder from a backup and report this"
    )]
    Invariant { violation: String },
}

/// For logs of a start.
pub(crate) fn short(digest: &Digest) -> String {
    digest.to_string().chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::ModelLog;
    use crate::state::{Event, Time};
    use stoke_protocol::ids::ClusterId;

    fn found() -> Record {
        Record { at: Time(5), event: Event::Founded { cluster: ClusterId([1; 16]), admin: "admin".into() } }
    }

    #[test]
    fn a_log_with_a_snapshot_gives_the_same_state_as_one_without() {
        let mut plain = ModelLog::default();
        let mut snapshot = ModelLog::default();
        let mut cluster = Cluster::default();
        for number in 0..10 {
            let event = if number == 0 { found().event } else { Event::EpochRaised { version: number.to_string() } };
            let record = Record { at: Time(number), event };
            cluster.apply(&record);
            plain.append(&[record_bytes(&record)]).unwrap();
            snapshot.append(&[record_bytes(&record)]).unwrap();
            if number == 6 {
                snapshot.snapshot(cluster.index(), &snapshot_bytes(&cluster)).unwrap();
            }
        }
        let (plain, snapshot) = (recover(&mut plain).unwrap(), recover(&mut snapshot).unwrap());
        assert_eq!(plain.cluster.state_hash(), cluster.state_hash());
        assert_eq!(snapshot.cluster.state_hash(), cluster.state_hash());
        assert_eq!((plain.snapshot_at, snapshot.snapshot_at), (LogIndex(0), LogIndex(7)));
    }

    #[test]
    fn what_cannot_be_read_is_named_and_never_skipped() {
        let mut log = ModelLog::default();
        log.append(&[record_bytes(&found()), vec![FORMAT + 1, 0], vec![FORMAT, 200]]).unwrap();
        let error = recover(&mut log).err().expect("damage").to_string();
        let words = format!("format {}", FORMAT + 1);
        assert!(error.contains("log-2") && error.contains(&words), "{error}");
        let mut log = ModelLog::default();
        let mut bytes = snapshot_bytes(&Cluster::default());
        *bytes.last_mut().unwrap() ^= 1;
        log.append(&[record_bytes(&found())]).unwrap();
        log.snapshot(LogIndex(1), &bytes).unwrap();
        assert!(recover(&mut log).is_err());
    }
}
