//! What ranks print: numbered files a rank, the last two kept, read back whole or followed while they grow. Owns their names and the first of
//! them; a rank writes its files itself and cuts them (`worker/print.rs`), so that nothing is lost and nobody waits while there is no agent.
//! Never looks at what is inside beyond where lines end. A file keeps its name for as long as it is there, so that a reader that asks for a
//! number gets that part of the log or none. A log is looked at whenever its rank says something, twice a second.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use stoke_protocol::message::node::{LogChunk, ReadLog};
use stoke_protocol::message::rank::RankId;
use tokio::sync::{mpsc, watch};

/// Ranks whose logs are kept; those of the oldest go first.
const LOGS_MAX: usize = 512;
/// Files of a rank that are kept.
pub const PARTS_MAX: u64 = 2;
/// A longer line is cut into several, or one rank could make a chunk of any size.
const LINE_BYTES_MAX: usize = 8 * 1024;
/// A chunk is far below the cap of a request frame (1 MiB), with room for the lengths of its lines.
const CHUNK_BYTES: usize = 128 * 1024;
/// Empty lines take a byte of a frame each, and many times that of whoever reads it.
const CHUNK_LINES: usize = 1_024;
/// Of the end of a log, for an error.
const LAST_BYTES_MAX: u64 = 2 * 1024;
const LAST_LINES: usize = 4;
const READ_BYTES: usize = 64 * 1024;
/// Chunks that wait for a slow reader; then the file waits.
const CHUNKS_MAX: usize = 4;

/// All logs of one agent. Clones share it.
#[derive(Clone, Debug)]
pub struct LogBook {
    dir: PathBuf,
    bytes_max: u64,
    live: Arc<Mutex<BTreeMap<RankId, watch::Sender<Written>>>>,
}

/// A log at its beginning.
pub struct Opened {
    pub file: File,
    /// For [`part_path`].
    pub base: String,
    pub part: u64,
}

/// One file of a log, from what all of them begin with.
pub fn part_path(base: &Path, part: u64) -> PathBuf {
    let mut path = base.as_os_str().to_owned();
    path.push(format!(".{part}.log"));
    path.into()
}

/// How far a log has grown, as it was last seen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Written {
    /// Number of the newest file.
    part: u64,
    bytes: u64,
}

impl LogBook {
    /// Logs below `dir`, each of at most twice `bytes_max`.
    pub fn new(dir: PathBuf, bytes_max: u64) -> Self {
        Self { dir, bytes_max, live: Arc::default() }
    }

    fn folder(&self, id: RankId) -> PathBuf {
        self.dir.join(id.job.to_string()).join(id.generation.to_string())
    }

    fn base(&self, id: RankId) -> PathBuf {
        self.folder(id).join(id.rank.to_string())
    }

    fn path(&self, id: RankId, part: u64) -> PathBuf {
        part_path(&self.base(id), part)
    }

    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// The highest number among the files of a rank.
    fn newest(&self, id: RankId) -> Option<u64> {
        let prefix = format!("{}.", id.rank);
        let files = fs::read_dir(self.folder(id)).into_iter().flatten().flatten();
        let part = |file: fs::DirEntry| {
            file.file_name().to_str()?.strip_prefix(&prefix)?.strip_suffix(".log")?.parse::<u64>().ok()
        };
        files.filter_map(part).max()
    }

    /// The file that a rank begins with. To be followed until [`Self::ended`].
    pub fn open(&self, id: RankId) -> io::Result<Opened> {
        fs::create_dir_all(self.folder(id))?;
        self.tidy();
        let part = self.newest(id).map_or(0, |newest| newest + 1);
        let base = self.base(id).into_os_string().into_string();
        let base = base.map_err(|_| io::Error::other("the path of the agent's folder is not UTF-8"))?;
        // Standard output and error share it: each write goes to the end.
        let file = File::options().create(true).append(true).open(self.path(id, part))?;
        self.resume(id);
        Ok(Opened { file, base, part })
    }

    /// The rank of an agent before this one writes on.
    pub fn resume(&self, id: RankId) {
        self.lock().insert(id, watch::Sender::new(self.look(id)));
    }

    /// The rank may have printed something.
    pub fn grew(&self, id: RankId) {
        let written = self.look(id);
        if let Some(live) = self.lock().get(&id) {
            live.send_if_modified(|known| std::mem::replace(known, written) != written);
        }
    }

    /// The rank is gone.
    pub fn ended(&self, id: RankId) {
        self.grew(id);
        self.lock().remove(&id);
    }

    /// What a rank that is gone printed last: a few lines, without what is blank.
    pub fn last_lines(&self, id: RankId) -> Vec<String> {
        let path = self.path(id, self.newest(id).unwrap_or(0));
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|mut file| {
            let end = file.seek(SeekFrom::End(0))?;
            file.seek(SeekFrom::Start(end.saturating_sub(LAST_BYTES_MAX)))?;
            file.read_to_end(&mut bytes)
        });
        if read.is_err() {
            return Vec::new();
        }
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].iter().map(|line| (*line).to_owned()).collect()
    }

    fn look(&self, id: RankId) -> Written {
        let part = self.newest(id).unwrap_or(0);
        Written { part, bytes: self.path(id, part).metadata().map_or(0, |file| file.len()) }
    }

    /// Answers a request in chunks, the last one marked. Must be called inside a tokio runtime.
    pub fn read(&self, request: ReadLog) -> mpsc::Receiver<LogChunk> {
        let (send, receive) = mpsc::channel(CHUNKS_MAX);
        let (book, runtime) = (self.clone(), tokio::runtime::Handle::current());
        tokio::task::spawn_blocking(move || {
            let live = book.lock().get(&request.id).map(watch::Sender::subscribe);
            let reader = Reader { book, id: request.id, carry: Vec::new(), chunk: Vec::new(), bytes: 0, send, runtime };
            // An error here is a log that went away, or a client that did: both end the answer.
            let _ = reader.run(request, live);
        });
        receive
    }

    /// Removes the oldest logs until at most [`LOGS_MAX`] are left.
    fn tidy(&self) {
        let folders = |dir: &PathBuf| {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).collect::<Vec<_>>()
        };
        let files = folders(&self.dir).iter().flat_map(folders).collect::<Vec<_>>();
        let mut logs: Vec<_> = files
            .iter()
            .flat_map(folders)
            .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
            .collect();
        logs.sort();
        let surplus = logs.len().saturating_sub(LOGS_MAX);
        for (_, path) in &logs[..surplus] {
            let _ = fs::remove_file(path);
            // These succeed only when empty.
            let _ = path.parent().map(fs::remove_dir);
            let _ = path.parent().and_then(|dir| dir.parent()).map(fs::remove_dir);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<RankId, watch::Sender<Written>>> {
        self.live.lock().expect("no holder of this lock panics")
    }
}

/// One answer under way. Runs on a thread that may block.
struct Reader {
    book: LogBook,
    id: RankId,
    /// The beginning of a line whose end is not there yet.
    carry: Vec<u8>,
    chunk: Vec<String>,
    bytes: usize,
    send: mpsc::Sender<LogChunk>,
    runtime: tokio::runtime::Handle,
}

/// The client is gone.
struct Gone;

impl Reader {
    fn run(mut self, request: ReadLog, live: Option<watch::Receiver<Written>>) -> Result<(), Gone> {
        let newest = live.as_ref().map(|live| live.borrow().part).or_else(|| self.book.newest(self.id));
        let Some(mut part) = newest else { return self.end() };
        let older = part.checked_sub(1).and_then(|older| File::open(self.book.path(self.id, older)).ok());
        let mut file = File::open(self.book.path(self.id, part)).ok();
        match request.tail {
            None => self.whole(older, file.as_mut())?,
            Some(lines) => self.tail(lines as usize, older, file.as_mut())?,
        }
        self.flush()?;
        if let (true, Some(mut live)) = (request.follow, live) {
            // The last growth is seen before the end is.
            while self.grown(&mut live)? {
                let now = live.borrow_and_update().part;
                self.copy(file.as_mut())?;
                while part < now {
                    part += 1;
                    file = File::open(self.book.path(self.id, part)).ok();
                    if file.is_none() {
                        self.line("[stoke: lines were lost here, the log grew faster than it was read]".into())?;
                    }
                    self.copy(file.as_mut())?;
                }
                self.flush()?;
            }
        }
        self.end()
    }

    fn whole(&mut self, mut older: Option<File>, newest: Option<&mut File>) -> Result<(), Gone> {
        self.copy(older.as_mut())?;
        self.copy(newest)
    }

    /// The last so many lines of both files.
    fn tail(&mut self, lines: usize, mut older: Option<File>, newest: Option<&mut File>) -> Result<(), Gone> {
        let mut last = VecDeque::new();
        let mut rest = Vec::new();
        for file in older.as_mut().into_iter().chain(newest) {
            let _ = file.read_to_end(&mut rest);
            let whole = rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            for line in rest[..whole].split_inclusive(|byte| *byte == b'\n') {
                last.push_back(line.to_vec());
                if last.len() > lines {
                    last.pop_front();
                }
            }
            rest.drain(..whole);
        }
        for line in last {
            self.take(&line)?;
        }
        self.take(&rest)
    }

    /// Waits for more. False once the rank's last writer is gone.
    fn grown(&self, live: &mut watch::Receiver<Written>) -> Result<bool, Gone> {
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                () = self.send.closed() => Err(Gone),
                changed = live.changed() => Ok(changed.is_ok()),
            }
        })
    }

    fn copy(&mut self, file: Option<&mut File>) -> Result<(), Gone> {
        let Some(file) = file else { return Ok(()) };
        let mut buffer = vec![0; READ_BYTES];
        while let Ok(read @ 1..) = file.read(&mut buffer) {
            self.take(&buffer[..read])?;
        }
        Ok(())
    }

    /// Cuts bytes into lines; the last one waits for its end.
    fn take(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ended) = match piece.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (piece, false),
            };
            self.carry.extend_from_slice(text);
            while self.carry.len() > LINE_BYTES_MAX {
                let rest = self.carry.split_off(LINE_BYTES_MAX);
                let line = std::mem::replace(&mut self.carry, rest);
                self.line(String::from_utf8_lossy(&line).into_owned())?;
            }
            if ended {
                let line = std::mem::take(&mut self.carry);
                self.line(String::from_utf8_lossy(&line).into_owned())?;
            }
        }
        Ok(())
    }

    fn line(&mut self, line: String) -> Result<(), Gone> {
        self.bytes += line.len() + size_of::<String>();
        self.chunk.push(line);
        if self.bytes >= CHUNK_BYTES || self.chunk.len() >= CHUNK_LINES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Gone> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        self.bytes = 0;
        let lines = std::mem::take(&mut self.chunk).into();
        let chunk = LogChunk { id: self.id, lines, last: false };
        self.send.blocking_send(chunk).map_err(|_| Gone)
    }

    fn end(mut self) -> Result<(), Gone> {
        if !self.carry.is_empty() {
            let line = std::mem::take(&mut self.carry);
            self.line(String::from_utf8_lossy(&line).into_owned())?;
        }
        self.flush()?;
        let chunk = LogChunk { id: self.id, lines: Vec::new().into(), last: true };
        self.send.blocking_send(chunk).map_err(|_| Gone)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use stoke_protocol::ids::{Generation, JobId, Rank};

    use super::*;
    use crate::worker::Print;

    const ID: RankId = RankId { job: JobId(1), generation: Generation(1), rank: Rank(0) };

    fn book(bytes_max: u64) -> (tempfile::TempDir, LogBook) {
        let dir = tempfile::tempdir().unwrap();
        let book = LogBook::new(dir.path().to_owned(), bytes_max);
        (dir, book)
    }

    async fn lines(mut chunks: mpsc::Receiver<LogChunk>) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(chunk) = chunks.recv().await {
            lines.extend(chunk.lines.0);
        }
        lines
    }

    fn ask(tail: Option<u32>, follow: bool) -> ReadLog {
        ReadLog { id: ID, tail, follow }
    }

    #[tokio::test]
    async fn a_log_is_read_back_whole_or_by_its_last_lines() {
        let (_dir, book) = book(1 << 20);
        let mut rank = book.open(ID).unwrap().file;
        rank.write_all(b"one\ntwo\n\xff\nfour").unwrap();
        drop(rank);
        book.ended(ID);
        assert_eq!(lines(book.read(ask(None, false))).await, ["one", "two", "\u{fffd}", "four"]);
        assert_eq!(lines(book.read(ask(Some(1), true))).await, ["\u{fffd}", "four"]);
        let unknown = ReadLog { id: RankId { rank: Rank(9), ..ID }, tail: None, follow: true };
        assert!(lines(book.read(unknown)).await.is_empty());
    }

    #[tokio::test]
    async fn a_followed_log_gives_every_line_across_cuts_and_ends_with_the_rank() {
        let (_dir, book) = book(4000);
        let Opened { mut file, base, part } = book.open(ID).unwrap();
        let followed = tokio::spawn(lines(book.read(ask(None, true))));
        let (writes, mut print) = (book.clone(), Print::new(base.into(), part, 4000));
        let write = move || {
            for line in 0..3000 {
                writeln!(file, "line {line}").unwrap();
                if line % 50 == 0 {
                    file = print.next(&file).unwrap().unwrap_or(file);
                    writes.grew(ID);
                    std::thread::yield_now();
                }
            }
            writes.ended(ID);
        };
        tokio::task::spawn_blocking(write).await.unwrap();
        let seen = followed.await.unwrap();
        assert_eq!(seen.last().map(String::as_str), Some("line 2999"));
        let lost = seen.iter().any(|line| line.contains("lines were lost"));
        assert!(lost || seen.len() == 3000, "{} lines", seen.len());
        let numbers: Vec<u32> = seen.iter().filter_map(|line| line.strip_prefix("line ")?.parse().ok()).collect();
        assert!(numbers.is_sorted_by(|a, b| a < b), "a line came twice or too late");
    }

    /// The agent that follows it is another one than that which has opened it.
    #[tokio::test]
    async fn a_log_goes_on_under_the_next_agent() {
        let (dir, book) = book(1 << 20);
        let mut rank = book.open(ID).unwrap().file;
        writeln!(rank, "before").unwrap();
        drop(book);
        writeln!(rank, "alone").unwrap();
        let next = LogBook::new(dir.path().to_owned(), 1 << 20);
        next.resume(ID);
        let followed = tokio::spawn(lines(next.read(ask(None, true))));
        writeln!(rank, "after").unwrap();
        next.ended(ID);
        assert_eq!(followed.await.unwrap(), ["before", "alone", "after"]);
    }

    #[tokio::test]
    async fn only_the_last_files_of_a_log_are_kept_and_a_long_line_is_cut() {
        let (dir, book) = book(10_000);
        let Opened { mut file, base, part } = book.open(ID).unwrap();
        let mut print = Print::new(base.into(), part, 10_000);
        for _ in 0..30 {
            file.write_all(&[b'x'; 10_000]).unwrap();
            file = print.next(&file).unwrap().expect("it is full");
        }
        book.ended(ID);
        let bytes: u64 = fs::read_dir(dir.path().join("job-1/g1"))
            .unwrap()
            .map(|file| file.unwrap().metadata().unwrap().len())
            .sum();
        assert!(bytes <= 2 * 10_000, "{bytes}");
        let seen = lines(book.read(ask(None, false))).await;
        assert!(seen.iter().all(|line| line.len() <= LINE_BYTES_MAX) && !seen.is_empty());
    }
}
