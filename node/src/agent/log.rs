//! What ranks print: numbered files a rank, the last two kept, read back whole or followed while they grow. Owns the files and their bounds;
//! never looks at what is inside beyond where lines end. A file keeps its name for as long as it is there, so that a reader that asks for a
//! number gets that part of the log or none.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use stoke_protocol::message::node::{LogChunk, ReadLog};
use stoke_protocol::message::rank::RankId;
use tokio::sync::{mpsc, watch};

/// Ranks whose logs are kept; those of the oldest go first.
const LOGS_MAX: usize = 512;
/// Files of a rank that are kept.
const PARTS_MAX: u64 = 2;
/// A longer line is cut into several, or one rank could make a chunk of any size.
const LINE_BYTES_MAX: usize = 8 * 1024;
/// A chunk is far below the cap of a request frame (1 MiB), with room for the lengths of its lines.
const CHUNK_BYTES: usize = 128 * 1024;
const READ_BYTES: usize = 64 * 1024;
/// Chunks that wait for a slow reader; then the file waits.
const CHUNKS_MAX: usize = 4;

/// All logs of one agent. Clones share it.
#[derive(Clone, Debug)]
pub struct LogBook {
    dir: PathBuf,
    bytes_max: u64,
    live: Arc<Mutex<BTreeMap<RankId, watch::Receiver<Written>>>>,
}

/// How far a log has grown. Published after the bytes are in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Written {
    /// Number of the file that is being written.
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

    fn path(&self, id: RankId, part: u64) -> PathBuf {
        self.folder(id).join(format!("{}.{part}.log", id.rank))
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

    /// Writes what comes out of `pipe` until its last writer is gone, on a thread of its own: a slow disk holds up the rank and nobody else.
    pub fn record(&self, id: RankId, pipe: OwnedFd) -> io::Result<()> {
        fs::create_dir_all(self.folder(id))?;
        self.tidy();
        let part = self.newest(id).map_or(0, |newest| newest + 1);
        let file = File::create(self.path(id, part))?;
        let (publish, written) = watch::channel(Written { part, bytes: 0 });
        self.lock().insert(id, written);
        let writer = Writer { book: self.clone(), id, file, written: Written { part, bytes: 0 }, publish };
        std::thread::Builder::new().name(format!("log-{}", id.rank)).spawn(move || writer.run(File::from(pipe)))?;
        Ok(())
    }

    /// Answers a request in chunks, the last one marked. Must be called inside a tokio runtime.
    pub fn read(&self, request: ReadLog) -> mpsc::Receiver<LogChunk> {
        let (send, receive) = mpsc::channel(CHUNKS_MAX);
        let (book, runtime) = (self.clone(), tokio::runtime::Handle::current());
        tokio::task::spawn_blocking(move || {
            let live = book.lock().get(&request.id).cloned();
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

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<RankId, watch::Receiver<Written>>> {
        self.live.lock().expect("no holder of this lock panics")
    }
}

struct Writer {
    book: LogBook,
    id: RankId,
    file: File,
    written: Written,
    publish: watch::Sender<Written>,
}

impl Writer {
    fn run(mut self, mut pipe: File) {
        let mut buffer = vec![0; READ_BYTES];
        loop {
            match pipe.read(&mut buffer) {
                Ok(0) => break,
                // A full disk loses lines; the rank must not stop for them.
                Ok(read) => drop(self.append(&buffer[..read])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        self.book.lock().remove(&self.id);
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.written.bytes >= self.book.bytes_max {
            let part = self.written.part + 1;
            self.file = File::create(self.book.path(self.id, part))?;
            self.written = Written { part, bytes: 0 };
            if let Some(old) = part.checked_sub(PARTS_MAX) {
                let _ = fs::remove_file(self.book.path(self.id, old));
            }
        }
        self.file.write_all(bytes)?;
        self.written.bytes += bytes.len() as u64;
        self.publish.send_replace(self.written);
        Ok(())
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
        if self.bytes >= CHUNK_BYTES { self.flush() } else { Ok(()) }
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
    use stoke_protocol::ids::{Generation, JobId, Rank};

    use super::*;

    const ID: RankId = RankId { job: JobId(1), generation: Generation(1), rank: Rank(0) };

    fn book(bytes_max: u64) -> (tempfile::TempDir, LogBook) {
        let dir = tempfile::tempdir().unwrap();
        let book = LogBook::new(dir.path().to_owned(), bytes_max);
        (dir, book)
    }

    fn pipe(book: &LogBook) -> File {
        let (read, write) = rustix::pipe::pipe().unwrap();
        book.record(ID, read).unwrap();
        File::from(write)
    }

    async fn lines(mut chunks: mpsc::Receiver<LogChunk>) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(chunk) = chunks.recv().await {
            lines.extend(chunk.lines.0);
        }
        lines
    }

    async fn closed(book: &LogBook) {
        while book.lock().contains_key(&ID) {
            tokio::task::yield_now().await;
        }
    }

    fn ask(tail: Option<u32>, follow: bool) -> ReadLog {
        ReadLog { id: ID, tail, follow }
    }

    #[tokio::test]
    async fn a_log_is_read_back_whole_or_by_its_last_lines() {
        let (_dir, book) = book(1 << 20);
        let mut rank = pipe(&book);
        rank.write_all(b"one\ntwo\n\xff\nfour").unwrap();
        drop(rank);
        closed(&book).await;
        assert_eq!(lines(book.read(ask(None, false))).await, ["one", "two", "\u{fffd}", "four"]);
        assert_eq!(lines(book.read(ask(Some(1), true))).await, ["\u{fffd}", "four"]);
        let unknown = ReadLog { id: RankId { rank: Rank(9), ..ID }, tail: None, follow: true };
        assert!(lines(book.read(unknown)).await.is_empty());
    }

    #[tokio::test]
    async fn a_followed_log_gives_every_line_across_cuts_and_ends_with_the_rank() {
        let (_dir, book) = book(4000);
        let mut rank = pipe(&book);
        let followed = tokio::spawn(lines(book.read(ask(None, true))));
        let write = move || {
            for line in 0..3000 {
                writeln!(rank, "line {line}").unwrap();
                if line % 50 == 0 {
                    std::thread::yield_now();
                }
            }
        };
        tokio::task::spawn_blocking(write).await.unwrap();
        let seen = followed.await.unwrap();
        assert_eq!(seen.last().map(String::as_str), Some("line 2999"));
        let lost = seen.iter().any(|line| line.contains("lines were lost"));
        assert!(lost || seen.len() == 3000, "{} lines", seen.len());
        let numbers: Vec<u32> = seen.iter().filter_map(|line| line.strip_prefix("line ")?.parse().ok()).collect();
        assert!(numbers.is_sorted_by(|a, b| a < b), "a line came twice or too late");
    }

    #[tokio::test]
    async fn a_log_never_grows_beyond_its_bound_and_a_long_line_is_cut() {
        let (dir, book) = book(10_000);
        let mut rank = pipe(&book);
        rank.write_all(&vec![b'x'; 300_000]).unwrap();
        drop(rank);
        closed(&book).await;
        let folder = dir.path().join("job-1/g1");
        let bytes: u64 = fs::read_dir(folder).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
        assert!(bytes <= 2 * (10_000 + READ_BYTES as u64), "{bytes}");
        let seen = lines(book.read(ask(None, false))).await;
        assert!(seen.iter().all(|line| line.len() <= LINE_BYTES_MAX) && !seen.is_empty());
    }
}
