//! Group commit: a thread of its own that writes whatever has gathered while the disk was busy, then tells that it is durable. Owns the log
//! once it runs. In simulation the same hand-off happens inline, without a thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use stoke_protocol::ids::LogIndex;

use super::{JournalError, Log, Room};

/// Batches waiting for the disk. A full queue makes the cluster actor wait, which is the back-pressure that clients then feel.
const QUEUE_BATCHES_MAX: usize = 1024;
/// Records in one commit: bounds the work that is lost to a crash before anything was answered.
const COMMIT_RECORDS_MAX: usize = 4096;

/// What one commit made durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Durable {
    /// Meaningless after a mere look at the room, which has no records.
    pub last: LogIndex,
    pub records: u32,
    pub bytes: u64,
    pub took: Duration,
    /// Room on the disk after it.
    pub room: Room,
}

/// Called after each commit; or once with the error after which nothing may be appended (J4).
type OnCommit = Box<dyn FnMut(Result<Durable, JournalError>) + Send>;

/// The hand-off to the log.
pub enum Writer {
    Thread { queue: Option<SyncSender<Work>>, thread: Option<JoinHandle<()>> },
    Inline { log: Box<dyn Log>, on_commit: OnCommit },
}

/// What the writer is asked for, in order.
pub enum Work {
    Append(Vec<Vec<u8>>),
    Snapshot {
        at: LogIndex,
        payload: Vec<u8>,
    },
    /// Only tell what room there is: while nothing is appended, nothing else would.
    Look,
}

impl Writer {
    /// Starts the journal thread.
    pub fn thread(log: Box<dyn Log>, on_commit: OnCommit) -> std::io::Result<Self> {
        let (queue, work) = sync_channel(QUEUE_BATCHES_MAX);
        let thread = std::thread::Builder::new().name("journal".into()).spawn(move || run(log, &work, on_commit))?;
        Ok(Self::Thread { queue: Some(queue), thread: Some(thread) })
    }

    /// Commits in the caller, for simulation.
    pub fn inline(log: Box<dyn Log>, on_commit: OnCommit) -> Self {
        Self::Inline { log, on_commit }
    }

    /// Hands over work. Records become durable in the order of the calls.
    pub fn submit(&mut self, work: Work) {
        match self {
            // A closed queue means that the thread ended with an error, which `on_commit` has told already.
            Self::Thread { queue, .. } => drop(queue.as_ref().map(|queue| queue.send(work))),
            Self::Inline { log, on_commit } => {
                commit(log.as_mut(), vec![work], on_commit);
            }
        }
    }
}

impl Drop for Writer {
    /// Waits until everything that was handed over is durable.
    fn drop(&mut self) {
        if let Self::Thread { queue, thread } = self {
            queue.take();
            if let Some(thread) = thread.take() {
                drop(thread.join());
            }
        }
    }
}

fn run(mut log: Box<dyn Log>, work: &Receiver<Work>, mut on_commit: OnCommit) {
    let written = catch_unwind(AssertUnwindSafe(|| write(log.as_mut(), work, &mut on_commit)));
    if written.is_err() {
        // Without its journal the coordinator must not live on (J4).
        on_commit(Err(JournalError::Panicked));
    }
}

/// Until nobody hands over work any more, or an error.
fn write(log: &mut dyn Log, work: &Receiver<Work>, on_commit: &mut OnCommit) {
    while let Ok(first) = work.recv() {
        let mut gathered = vec![first];
        let mut records = size(&gathered[0]);
        while records < COMMIT_RECORDS_MAX
            && let Ok(next) = work.try_recv()
        {
            records += size(&next);
            gathered.push(next);
        }
        if !commit(log, gathered, on_commit) {
            return;
        }
    }
}

fn size(work: &Work) -> usize {
    match work {
        Work::Append(payloads) => payloads.len(),
        Work::Snapshot { .. } | Work::Look => 1,
    }
}

/// Commits appends together, up to each snapshot. False after an error.
fn commit(log: &mut dyn Log, gathered: Vec<Work>, on_commit: &mut OnCommit) -> bool {
    let mut payloads = Vec::new();
    for work in gathered {
        match work {
            Work::Append(more) => payloads.extend(more),
            Work::Snapshot { at, payload } => {
                if !append(log, &mut payloads, on_commit) {
                    return false;
                }
                if let Err(error) = log.snapshot(at, &payload) {
                    on_commit(Err(error));
                    return false;
                }
            }
            Work::Look => {
                let looked = log.room().map(|room| Durable {
                    last: LogIndex(0),
                    records: 0,
                    bytes: 0,
                    took: Duration::ZERO,
                    room,
                });
                let went_well = looked.is_ok();
                on_commit(looked);
                if !went_well {
                    return false;
                }
            }
        }
    }
    append(log, &mut payloads, on_commit)
}

fn append(log: &mut dyn Log, payloads: &mut Vec<Vec<u8>>, on_commit: &mut OnCommit) -> bool {
    if payloads.is_empty() {
        return true;
    }
    let batch = std::mem::take(payloads);
    let started = Instant::now();
    let committed = log.append(&batch).and_then(|last| {
        let bytes = batch.iter().map(|payload| payload.len() as u64).sum();
        Ok(Durable { last, records: batch.len() as u32, bytes, took: started.elapsed(), room: log.room()? })
    });
    let went_well = committed.is_ok();
    on_commit(committed);
    went_well
}

#[cfg(test)]
mod tests {
    use super::super::{Entry, Recovered};
    use super::*;

    struct Broken;

    impl Log for Broken {
        fn recover(&mut self) -> Result<Recovered, JournalError> {
            Ok(Recovered { snapshot: None, entries: Vec::<Entry>::new() })
        }

        fn append(&mut self, _payloads: &[Vec<u8>]) -> Result<LogIndex, JournalError> {
            panic!("a page of the journal is not one")
        }

        fn snapshot(&mut self, _at: LogIndex, _payload: &[u8]) -> Result<(), JournalError> {
            Ok(())
        }

        fn room(&self) -> Result<Room, JournalError> {
            Ok(Room { free: 1, needed: 0 })
        }
    }

    #[test]
    fn a_panic_of_the_journal_thread_is_told() {
        let (told, tells) = sync_channel(1);
        let tell = move |committed| drop(told.send(committed));
        let mut writer = Writer::thread(Box::new(Broken), Box::new(tell)).unwrap();
        writer.submit(Work::Append(vec![vec![1]]));
        assert!(matches!(tells.recv(), Ok(Err(JournalError::Panicked))));
    }
}
