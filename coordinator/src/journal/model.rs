//! A log in memory with the failures of a disk: what was written and not synced is lost in a crash. Used by the simulator, whose time does
//! not pass while a disk works; never by a real coordinator.

use std::sync::{Arc, Mutex};

use stoke_protocol::ids::LogIndex;

use super::{Entry, JournalError, Log, Recovered, Room};

/// A disk that outlives the coordinator that writes to it: clone it, crash one clone, recover with the other.
#[derive(Clone, Debug, Default)]
pub struct ModelLog {
    disk: Arc<Mutex<Disk>>,
}

#[derive(Debug, Default)]
struct Disk {
    snapshot: Option<Entry>,
    durable: Vec<Entry>,
    unsynced: Vec<Entry>,
    /// Bytes that may still be written; none means no limit.
    free: Option<u64>,
    /// A planted bug for the simulator: appends are acknowledged before they are durable.
    lies_about_sync: bool,
}

impl ModelLog {
    /// Loses what was not durable, as a power cut does.
    pub fn crash(&self) {
        self.disk().unsynced.clear();
    }

    /// From now on only so many bytes can be written.
    pub fn limit(&self, free: u64) {
        self.disk().free = Some(free);
    }

    /// From now on appends return before their records are durable: the simulator must find it.
    pub fn lie_about_sync(&self) {
        self.disk().lies_about_sync = true;
    }

    /// Makes durable what a lying disk still held.
    pub fn sync(&self) {
        let mut disk = self.disk();
        let late = std::mem::take(&mut disk.unsynced);
        disk.durable.extend(late);
    }

    fn disk(&self) -> std::sync::MutexGuard<'_, Disk> {
        self.disk.lock().expect("no holder of the model disk panics")
    }
}

impl Disk {
    fn last(&self) -> LogIndex {
        let newest = self.unsynced.last().or(self.durable.last()).or(self.snapshot.as_ref());
        newest.map(|entry| entry.index).unwrap_or_default()
    }
}

impl Log for ModelLog {
    fn recover(&mut self) -> Result<Recovered, JournalError> {
        let disk = self.disk();
        Ok(Recovered { snapshot: disk.snapshot.clone(), entries: disk.durable.clone() })
    }

    fn append(&mut self, payloads: &[Vec<u8>]) -> Result<LogIndex, JournalError> {
        let mut disk = self.disk();
        let bytes: u64 = payloads.iter().map(|payload| payload.len() as u64).sum();
        if let Some(free) = disk.free {
            let rest = free.checked_sub(bytes).ok_or_else(|| JournalError::Storage {
                action: "append to",
                path: "model".into(),
                cause: "no space left on device".into(),
            })?;
            disk.free = Some(rest);
        }
        for payload in payloads {
            let entry = Entry { index: disk.last().next(), payload: payload.clone() };
            if disk.lies_about_sync {
                disk.unsynced.push(entry);
            } else {
                disk.durable.push(entry);
            }
        }
        Ok(disk.last())
    }

    fn snapshot(&mut self, at: LogIndex, payload: &[u8]) -> Result<(), JournalError> {
        let mut disk = self.disk();
        disk.durable.retain(|entry| entry.index > at);
        disk.snapshot = Some(Entry { index: at, payload: payload.to_vec() });
        Ok(())
    }

    fn room(&self) -> Result<Room, JournalError> {
        Ok(Room { free: self.disk().free.unwrap_or(u64::MAX), needed: 64 * 1024 })
    }
}
