//! The journal on disk: one redb file, one transaction a batch, durable on commit. Owns the folder's lock and the ballast file that keeps
//! room for the last records when the disk is full. Never repairs what it cannot verify.
//!
//! J5: a journal that ends before a record that was durable is damage. redb would serve the commit before the last one, or an empty file as a
//! new journal, without a word; the tail, a file of its own, knows better. It is written after each commit and not synced: a crash of the
//! machine may leave it behind the journal, never before it.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use rustix::fs::{FallocateFlags, FlockOperation};
use stoke_protocol::ids::{Digest, LogIndex};

use super::{Entry, JournalError, Log, Recovered, Room, chain};

/// Index to checksum (4 bytes), chain (32 bytes), payload.
const ENTRIES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("entries");
/// Index to seal (32 bytes), chain (32 bytes), payload; at most one.
const SNAPSHOTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("snapshots");

pub(crate) const JOURNAL_FILE: &str = "journal.redb";
const LOCK_FILE: &str = "lock";
/// The index and the chain of a record that was durable, with a checksum: what ends before it has lost its end (J5).
pub(super) const TAIL_FILE: &str = "tail";
const TAIL_BYTES: usize = 44;
pub(super) const BALLAST_FILE: &str = "ballast";
/// Given back to the disk when it runs low, so that what was taken in and the ends of running jobs can still be recorded (F19).
const BALLAST_BYTES: u64 = 4 << 20;
/// New work is refused when less than this is free: a few thousand records, and redb's own growth.
const NEEDED_BYTES: u64 = 4 << 20;
/// redb's page cache: the journal is read once, at start.
const CACHE_BYTES: usize = 16 << 20;

/// Index and bytes as they lie in a table.
type Row = (u64, Vec<u8>);

/// See the module.
pub struct RedbLog {
    folder: PathBuf,
    /// Shared with nobody: a clone is leaked when redb has panicked, so that nothing of it is run or written any more.
    database: Arc<Database>,
    last: LogIndex,
    chain: Digest,
    /// Held for the life of the log; the kernel drops it with the process.
    _lock: File,
}

impl RedbLog {
    /// Opens or makes the journal in `folder`, which must exist. One process at a time.
    pub fn open(folder: &Path) -> Result<Self, JournalError> {
        let lock = lock(folder)?;
        let path = folder.join(JOURNAL_FILE);
        let last = LogIndex::default();
        let create = || {
            make(folder, &path)?;
            let mut builder = Database::builder();
            // Every page that is in use, before one is trusted: redb aborts when it closes a file whose pages contradict each other.
            builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
            Ok(Arc::new(builder.open(&path)?))
        };
        let database = sound(create).map_err(|error| journal_error("open", &path, last, error))?;
        trim_ballast(folder);
        Ok(Self { folder: folder.to_owned(), database, last, chain: Digest([0; 32]), _lock: lock })
    }

    fn path(&self) -> PathBuf {
        self.folder.join(JOURNAL_FILE)
    }

    fn storage(&self, action: &'static str) -> impl Fn(redb::Error) -> JournalError + '_ {
        move |error| journal_error(action, &self.path(), self.last, error)
    }

    /// Work on the database; after a panic of it there is no other.
    fn work<T>(&self, work: impl FnOnce(&Self) -> Result<T, redb::Error>) -> Result<T, redb::Error> {
        let worked = sound(|| work(self));
        if let Err(redb::Error::Corrupted(_)) = worked {
            std::mem::forget(self.database.clone());
        }
        worked
    }

    fn damaged(&self, index: u64, what: &str) -> JournalError {
        JournalError::Damaged { path: self.path(), index: LogIndex(index), what: what.to_owned() }
    }

    fn write(&self, records: &[(u64, Vec<u8>)]) -> Result<(), redb::Error> {
        let mut transaction = self.database.begin_write()?;
        transaction.set_durability(Durability::Immediate)?;
        // Makes the start after a crash independent of the file's size.
        transaction.set_quick_repair(true);
        {
            let mut table = transaction.open_table(ENTRIES)?;
            for (index, record) in records {
                table.insert(index, record.as_slice())?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    fn write_snapshot(&self, at: u64, record: &[u8]) -> Result<(), redb::Error> {
        let mut transaction = self.database.begin_write()?;
        transaction.set_durability(Durability::Immediate)?;
        transaction.set_quick_repair(true);
        {
            let mut snapshots = transaction.open_table(SNAPSHOTS)?;
            snapshots.retain(|_, _| false)?;
            snapshots.insert(at, record)?;
            let mut entries = transaction.open_table(ENTRIES)?;
            entries.retain_in(..=at, |_, _| false)?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// Remembers what is durable (J5). A failure costs only the check.
    fn write_tail(&self) {
        let mut tail = self.last.0.to_le_bytes().to_vec();
        tail.extend_from_slice(&self.chain.0);
        tail.extend_from_slice(&crc32fast::hash(&tail).to_le_bytes());
        // In place: on a full disk the room that it has is enough.
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).open(self.folder.join(TAIL_FILE));
        if let Err(error) = file.and_then(|mut file| file.write_all(&tail)) {
            tracing::warn!(%error, "the journal's tail was not written");
        }
    }

    /// What is known to have been durable; nothing when the tail was never written or is damaged itself.
    fn read_tail(&self) -> Option<(LogIndex, Digest)> {
        let bytes = fs::read(self.folder.join(TAIL_FILE)).ok()?;
        let tail: [u8; TAIL_BYTES] = bytes.try_into().ok()?;
        let (body, checksum) = tail.split_at(TAIL_BYTES - 4);
        let (index, chain) = body.split_first_chunk::<8>()?;
        let tail = (LogIndex(u64::from_le_bytes(*index)), Digest(chain.try_into().ok()?));
        (checksum == crc32fast::hash(body).to_le_bytes()).then_some(tail)
    }

    /// The raw snapshot and records, in order.
    fn read(&self) -> Result<(Option<Row>, Vec<Row>), redb::Error> {
        let transaction = self.database.begin_read()?;
        let snapshot = match transaction.open_table(SNAPSHOTS) {
            Ok(table) => table.last()?.map(|(at, record)| (at.value(), record.value().to_vec())),
            Err(redb::TableError::TableDoesNotExist(_)) => None,
            Err(other) => return Err(other.into()),
        };
        let mut records = Vec::new();
        match transaction.open_table(ENTRIES) {
            Ok(table) => {
                for row in table.iter()? {
                    let (index, record) = row?;
                    records.push((index.value(), record.value().to_vec()));
                }
            }
            Err(redb::TableError::TableDoesNotExist(_)) => {}
            Err(other) => return Err(other.into()),
        }
        Ok((snapshot, records))
    }
}

impl Log for RedbLog {
    fn recover(&mut self) -> Result<Recovered, JournalError> {
        let (snapshot, records) = self.work(Self::read).map_err(self.storage("read"))?;
        let mut recovered = Recovered::default();
        let tail = self.read_tail();
        let is_other = |last, chain| tail.is_some_and(|tail| tail.0 == last && tail.1 != chain);
        if let Some((at, record)) = snapshot {
            let (before, payload) = open_snapshot(at, &record).map_err(|what| self.damaged(at, what))?;
            self.last = LogIndex(at);
            self.chain = before;
            recovered.snapshot = Some(Entry { index: self.last, payload: payload.to_vec() });
            if is_other(self.last, self.chain) {
                return Err(self.damaged(at, "another snapshot was durable"));
            }
        }
        for (index, record) in records {
            if LogIndex(index) != self.last.next() {
                return Err(self.damaged(index, "the record before it is missing"));
            }
            let (checksum, rest) = record.split_at_checked(4).ok_or_else(|| self.damaged(index, "it is cut short"))?;
            if checksum != crc32fast::hash(rest).to_le_bytes() {
                return Err(self.damaged(index, "its checksum does not match"));
            }
            let (linked, payload) = rest.split_at_checked(32).ok_or_else(|| self.damaged(index, "it is cut short"))?;
            let expected = chain(&self.chain, LogIndex(index), payload);
            if linked != expected.0 {
                return Err(self.damaged(index, "it does not follow the record before it"));
            }
            self.last = LogIndex(index);
            self.chain = expected;
            recovered.entries.push(Entry { index: self.last, payload: payload.to_vec() });
            if is_other(self.last, self.chain) {
                return Err(self.damaged(index, "another record was durable"));
            }
        }
        match tail {
            Some((index, _)) if index > self.last => Err(self.damaged(index.0, "it was durable and is missing")),
            Some(_) | None => Ok(recovered),
        }
    }

    fn append(&mut self, payloads: &[Vec<u8>]) -> Result<LogIndex, JournalError> {
        trim_ballast(&self.folder);
        let (mut last, mut link) = (self.last, self.chain);
        let mut records = Vec::with_capacity(payloads.len());
        for payload in payloads {
            last = last.next();
            link = chain(&link, last, payload);
            let mut record = Vec::with_capacity(36 + payload.len());
            record.extend_from_slice(&[0; 4]);
            record.extend_from_slice(&link.0);
            record.extend_from_slice(payload);
            let checksum = crc32fast::hash(&record[4..]);
            record[..4].copy_from_slice(&checksum.to_le_bytes());
            records.push((last.0, record));
        }
        if let Err(error) = self.work(|log| log.write(&records)) {
            // Whatever the error is, the next start needs room to recover in.
            drop(fs::remove_file(self.folder.join(BALLAST_FILE)));
            return Err(self.storage("append to")(error));
        }
        (self.last, self.chain) = (last, link);
        self.write_tail();
        Ok(last)
    }

    fn snapshot(&mut self, at: LogIndex, payload: &[u8]) -> Result<(), JournalError> {
        assert_eq!(at, self.last, "J1: a snapshot is taken at the newest durable record");
        let seal = seal(at.0, &self.chain, payload);
        let record = [&seal.0[..], &self.chain.0[..], payload].concat();
        self.work(|log| log.write_snapshot(at.0, &record)).map_err(self.storage("write snapshot to"))
    }

    fn room(&self) -> Result<Room, JournalError> {
        let disk = rustix::fs::statvfs(&self.folder).map_err(|error| JournalError::Storage {
            action: "look for room beside",
            path: self.path(),
            cause: error.to_string(),
        })?;
        let free = disk.f_bavail * disk.f_frsize;
        // Without its ballast the disk has to give that back first: what the ballast freed is not for new work.
        let owed = if self.folder.join(BALLAST_FILE).exists() { 0 } else { BALLAST_BYTES };
        Ok(Room { free: free.saturating_sub(owed), needed: NEEDED_BYTES })
    }
}

/// Makes the file where there is none, whole or not at all: redb refuses what a crash leaves of a file that it was making.
fn make(folder: &Path, path: &Path) -> Result<(), redb::Error> {
    if path.exists() {
        return Ok(());
    }
    let new = folder.join(format!("{JOURNAL_FILE}.new"));
    if new.exists() {
        fs::remove_file(&new)?;
    }
    drop(Database::create(&new)?);
    File::open(&new)?.sync_all()?;
    fs::rename(&new, path)?;
    // Its name in the folder too: the authority is made after the journal, and must not outlive it in a crash.
    Ok(File::open(folder)?.sync_all()?)
}

/// What a snapshot is checked by: nothing that follows depends on its payload, so that the chain alone would not find a change in it.
fn seal(at: u64, chain: &Digest, payload: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&at.to_le_bytes());
    hasher.update(&chain.0);
    hasher.update(payload);
    Digest(*hasher.finalize().as_bytes())
}

/// The chain and the payload of a snapshot, once its seal is checked.
fn open_snapshot(at: u64, record: &[u8]) -> Result<(Digest, &[u8]), &'static str> {
    let cut = "the snapshot is cut short";
    let (sealed, rest) = record.split_first_chunk::<32>().ok_or(cut)?;
    let (chain, payload) = rest.split_first_chunk::<32>().ok_or(cut)?;
    let chain = Digest(*chain);
    if seal(at, &chain, payload).0 == *sealed {
        Ok((chain, payload))
    } else {
        Err("the snapshot does not match its seal")
    }
}

/// redb trusts its pages and panics where one of them is not what it should be: that is damage like any other.
fn sound<T>(work: impl FnOnce() -> Result<T, redb::Error>) -> Result<T, redb::Error> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(redb::Error::Corrupted("its pages contradict each other".to_owned())))
}

fn journal_error(action: &'static str, path: &Path, index: LogIndex, error: redb::Error) -> JournalError {
    match error {
        redb::Error::Corrupted(what) => JournalError::Damaged { path: path.to_owned(), index, what },
        // There is one release of the journal: another version is a changed bit.
        redb::Error::UpgradeRequired(version) => JournalError::Damaged {
            path: path.to_owned(),
            index,
            what: format!("it claims to be of version {version}"),
        },
        // A file that is cut short, or is no journal at all.
        redb::Error::Io(error) if matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof) => {
            JournalError::Damaged { path: path.to_owned(), index, what: error.to_string() }
        }
        other => JournalError::Storage { action, path: path.to_owned(), cause: other.to_string() },
    }
}

/// Takes the folder for this process, or says who has it.
fn lock(folder: &Path) -> Result<File, JournalError> {
    let path = folder.join(LOCK_FILE);
    let storage = |cause: std::io::Error| JournalError::Storage {
        action: "lock the folder of",
        path: path.clone(),
        cause: cause.to_string(),
    };
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(storage)?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut owner = String::new();
        drop(file.read_to_string(&mut owner));
        return Err(JournalError::Locked { path: folder.to_owned(), owner: owner.trim().to_owned() });
    }
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(storage)?;
    Ok(file)
}

/// Lays the ballast down where there is room for it and for work, and takes it up when the disk runs low: before a commit meets the full
/// disk, because redb cannot go on after a failed write.
fn trim_ballast(folder: &Path) {
    let path = folder.join(BALLAST_FILE);
    let Ok(disk) = rustix::fs::statvfs(folder) else { return };
    let (free, laid) = (disk.f_bavail * disk.f_frsize, path.exists());
    if laid && free < NEEDED_BYTES {
        drop(fs::remove_file(&path));
    }
    if laid || free <= BALLAST_BYTES + NEEDED_BYTES {
        return;
    }
    if let Ok(file) = File::create(&path)
        && rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, BALLAST_BYTES).is_err()
    {
        drop(fs::remove_file(&path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("stoke-journal-{name}-{}", std::process::id()));
        drop(fs::remove_dir_all(&folder));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn payloads(range: std::ops::Range<u8>) -> Vec<Vec<u8>> {
        range.map(|byte| vec![byte; 100]).collect()
    }

    #[test]
    fn records_survive_and_continue_after_a_snapshot() {
        let folder = folder("survive");
        let mut log = RedbLog::open(&folder).unwrap();
        assert_eq!(log.recover().unwrap(), Recovered::default());
        assert_eq!(log.append(&payloads(0..3)).unwrap(), LogIndex(3));
        log.snapshot(LogIndex(3), b"state").unwrap();
        log.append(&payloads(3..5)).unwrap();
        drop(log);
        let mut log = RedbLog::open(&folder).unwrap();
        let recovered = log.recover().unwrap();
        assert_eq!(recovered.snapshot, Some(Entry { index: LogIndex(3), payload: b"state".to_vec() }));
        assert_eq!(recovered.entries.iter().map(|entry| entry.payload[0]).collect::<Vec<_>>(), [3, 4]);
        assert_eq!(recovered.last(), LogIndex(5));
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_second_coordinator_on_the_folder_is_told_who_has_it() {
        let folder = folder("second");
        let _first = RedbLog::open(&folder).unwrap();
        let error = RedbLog::open(&folder).err().expect("the folder is taken").to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_changed_record_is_named() {
        let folder = folder("changed");
        let mut log = RedbLog::open(&folder).unwrap();
        log.recover().unwrap();
        log.append(&payloads(0..3)).unwrap();
        let mut forged = log.read().unwrap().1[1].1.clone();
        forged[50] ^= 1;
        log.write(&[(2, forged)]).unwrap();
        log.last = LogIndex::default();
        log.chain = Digest([0; 32]);
        let error = log.recover().unwrap_err().to_string();
        assert!(error.contains("log-2") && error.contains("checksum"), "{error}");
        fs::remove_dir_all(&folder).unwrap();
    }

    /// Whatever is wrong with the file, it is said as damage, or the records are all there: nothing panics out of the log.
    #[test]
    fn a_damaged_file_is_told_and_never_panics() {
        let folder = folder("damaged");
        let path = folder.join(JOURNAL_FILE);
        let mut log = RedbLog::open(&folder).unwrap();
        log.recover().unwrap();
        for number in 0..40 {
            log.append(&payloads(number..number + 1)).unwrap();
        }
        drop(log);
        let good = fs::read(&path).unwrap();
        let attempt = |bytes: &[u8]| -> Result<(), JournalError> {
            fs::write(&path, bytes).unwrap();
            let mut log = RedbLog::open(&folder)?;
            log.recover()?;
            (0..40).try_for_each(|number| log.append(&payloads(number..number + 1)).map(drop))
        };
        for length in [1, 100, 4096, good.len() / 2] {
            let error = attempt(&good[..length]).unwrap_err();
            assert!(matches!(error, JournalError::Damaged { .. }), "cut to {length}: {error}");
            assert!(error.to_string().contains("restore the folder from a backup"), "{error}");
        }
        let mut told = 0;
        for page in 0..good.len() / 4096 {
            let mut bytes = good.clone();
            bytes[page * 4096..][..4096].iter_mut().enumerate().for_each(|(at, byte)| *byte ^= (at * 31 + 7) as u8);
            told += u32::from(attempt(&bytes).is_err());
        }
        assert!(told > 0, "no page of the file matters");
        fs::remove_dir_all(&folder).unwrap();
    }
}
