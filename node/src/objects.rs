//! Data of jobs in object stores, read at any place. Owns how much of an object is kept in memory, and what is fetched before it is asked for; where a URI leads
//! is the checkpoints' `store`.
//!
//! Y1: at most [`HELD_MAX`] blocks of an object are in memory, those that are on their way included.
//! Y2: an object that is changed while it is read is an error, never a mixture.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};

use bytes::Bytes;
use object_store::{GetOptions, GetRange, ObjectStoreExt};
use stoke_jobs::{ReadAt, Stores};

use crate::checkpoint::CheckpointError;
use crate::checkpoint::store::{Place, runtime};

/// What is fetched at a time: large enough that a store's latency is small beside it.
const BLOCK_BYTES: u64 = 8 << 20;
/// Blocks behind the one that is read which are fetched meanwhile, where reading goes on.
const AHEAD: u64 = 2;
const HELD_MAX: usize = 6;

/// By the credentials that `checkpoint::provide` was given.
pub struct Objects;

impl Stores for Objects {
    fn open(&self, uri: &str) -> io::Result<Arc<dyn ReadAt>> {
        let place = Place::of(uri).map_err(invalid)?;
        let (store, path) = (place.store.clone(), place.path.clone());
        let found = wait(async move { store.head(&path).await }).map_err(|error| failed(&place, error))?;
        let (bytes, version) = (found.size, found.e_tag);
        Ok(Arc::new(Object(Arc::new(Inner {
            place,
            bytes,
            version,
            blocks: Mutex::default(),
            arrived: Condvar::new(),
        }))))
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let place = Place::of(folder).map_err(invalid)?;
        let (store, path) = (place.store.clone(), place.path.clone());
        let listed = wait(async move { store.list_with_delimiter(Some(&path)).await });
        let listed = listed.map_err(|error| failed(&place, error))?;
        Ok(listed.objects.iter().filter_map(|object| object.location.filename().map(str::to_owned)).collect())
    }
}

struct Object(Arc<Inner>);

struct Inner {
    place: Place,
    bytes: u64,
    version: Option<String>,
    blocks: Mutex<Blocks>,
    arrived: Condvar,
}

#[derive(Default)]
struct Blocks {
    held: BTreeMap<u64, Block>,
    /// The last block that was asked for.
    last: Option<u64>,
    /// Grows with each block that is asked for.
    asked: u64,
}

struct Block {
    content: Content,
    /// When it was last asked for.
    asked: u64,
}

enum Content {
    Coming,
    Here(Bytes),
    /// Told to the next one who asks, who may ask again.
    Failed(io::Error),
}

impl ReadAt for Object {
    fn bytes(&self) -> u64 {
        self.0.bytes
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let end = at.checked_add(into.len() as u64).filter(|end| *end <= self.0.bytes);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let (mut at, mut into) = (at, into);
        while at < end {
            let (number, within) = (at / BLOCK_BYTES, (at % BLOCK_BYTES) as usize);
            let block = self.block(number)?;
            let count = (block.len() - within).min(into.len());
            let (part, rest) = into.split_at_mut(count);
            part.copy_from_slice(&block[within..within + count]);
            into = rest;
            at += count as u64;
        }
        Ok(())
    }
}

impl Object {
    fn block(&self, number: u64) -> io::Result<Bytes> {
        let mut blocks = self.0.locked();
        // From the first block on, or into the next one.
        let goes_on = blocks.last.map_or(number == 0, |last| number == last + 1);
        blocks.last = Some(number);
        blocks.asked += 1;
        let behind = (self.0.bytes.div_ceil(BLOCK_BYTES) - 1).min(number + AHEAD);
        let wanted = if goes_on { number..=behind } else { number..=number };
        wanted.for_each(|number| self.fetch(&mut blocks, number));
        loop {
            match blocks.held.get(&number).map(|block| &block.content) {
                Some(Content::Here(bytes)) => return Ok(bytes.clone()),
                Some(Content::Coming) => {}
                Some(Content::Failed(_)) => {
                    if let Some(Block { content: Content::Failed(error), .. }) = blocks.held.remove(&number) {
                        return Err(error);
                    }
                }
                // There was no room, or others who read this object have taken it.
                None => self.fetch(&mut blocks, number),
            }
            blocks = self.0.arrived.wait(blocks).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Asks for a block that is not there, if there is room for it.
    fn fetch(&self, blocks: &mut Blocks, number: u64) {
        let asked = blocks.asked;
        if let Some(block) = blocks.held.get_mut(&number) {
            block.asked = asked;
            return;
        }
        if blocks.held.len() >= HELD_MAX {
            let left = blocks.held.iter().filter(|(_, block)| !matches!(block.content, Content::Coming));
            let Some(oldest) = left.min_by_key(|(_, block)| block.asked).map(|(number, _)| *number) else { return };
            blocks.held.remove(&oldest);
        }
        blocks.held.insert(number, Block { content: Content::Coming, asked });
        let object = self.0.clone();
        runtime().spawn(async move {
            let content = object.get(number).await.map_or_else(Content::Failed, Content::Here);
            // Y1: one that is coming is not removed.
            object.locked().held.insert(number, Block { content, asked });
            object.arrived.notify_all();
        });
    }
}

impl Inner {
    async fn get(&self, number: u64) -> io::Result<Bytes> {
        let range = number * BLOCK_BYTES..self.bytes.min((number + 1) * BLOCK_BYTES);
        let wanted = (range.end - range.start) as usize;
        let options = GetOptions {
            range: Some(GetRange::Bounded(range)),
            if_match: self.version.clone(),
            ..GetOptions::default()
        };
        let got =
            self.place.store.get_opts(&self.place.path, options).await.map_err(|error| failed(&self.place, error))?;
        let bytes = got.bytes().await.map_err(|error| failed(&self.place, error))?;
        if bytes.len() != wanted {
            return Err(changed());
        }
        Ok(bytes)
    }

    fn locked(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Blocks until it is done, in a runtime or out of one.
fn wait<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    let (tell, told) = mpsc::channel();
    runtime().spawn(async move { tell.send(work.await) });
    told.recv().expect("the runtime of stores lives as long as the process")
}

fn changed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the object was changed while it was read")
}

fn invalid(error: CheckpointError) -> io::Error {
    let problem = match error {
        CheckpointError::Uri { problem, .. } => problem,
        other => other.to_string(),
    };
    io::Error::new(io::ErrorKind::InvalidInput, problem)
}

fn failed(place: &Place, error: object_store::Error) -> io::Error {
    match error {
        object_store::Error::NotFound { .. } => io::Error::new(io::ErrorKind::NotFound, "there is no such object"),
        object_store::Error::Precondition { .. } => changed(),
        other => match CheckpointError::store(place.kind, "read", &place.uri, other) {
            CheckpointError::Denied { said, mend, .. } => {
                io::Error::new(io::ErrorKind::PermissionDenied, format!("the store denies it ({said}): {mend}"))
            }
            CheckpointError::Remote { said, .. } => io::Error::other(said),
            other => io::Error::other(other.to_string()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: u64) -> (tempfile::TempDir, Vec<u8>, Arc<dyn ReadAt>) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let content: Vec<u8> = (0..bytes).map(|at| (at * 31 % 251) as u8).collect();
        std::fs::write(folder.path().join("a b"), &content).expect("written");
        let object = Objects.open(&format!("file://{}/a b", folder.path().display())).expect("an object");
        (folder, content, object)
    }

    #[test]
    fn an_object_is_read_at_any_place_and_never_held_whole() {
        let bytes = 20 * BLOCK_BYTES + 7;
        let (_folder, content, object) = file(bytes);
        assert_eq!(object.bytes(), bytes);
        let mut buffer = vec![0; 3 << 20];
        for at in (0..bytes).step_by(buffer.len()) {
            let part = &mut buffer[..(bytes - at).min(3 << 20) as usize];
            object.read_at(at, part).expect("a part");
            assert_eq!(part, &content[at as usize..at as usize + part.len()]);
        }
        for at in [17 * BLOCK_BYTES - 1, 3, bytes - 5, 9 * BLOCK_BYTES] {
            object.read_at(at, &mut buffer[..5]).expect("a part");
            assert_eq!(&buffer[..5], &content[at as usize..at as usize + 5]);
        }
        assert_eq!(
            object.read_at(bytes - 1, &mut buffer[..2]).expect_err("behind the end").kind(),
            io::ErrorKind::UnexpectedEof
        );
        object.read_at(bytes, &mut []).expect("nothing");
    }

    #[test]
    fn what_is_fetched_ahead_stays_within_its_bound() {
        let inner = Object(Arc::new(Inner {
            place: Place::of("/dev/null").expect("a place"),
            bytes: 20 * BLOCK_BYTES,
            version: None,
            blocks: Mutex::default(),
            arrived: Condvar::new(),
        }));
        for number in 0..20 {
            // It cannot be read; what counts is what is held.
            let _ = inner.block(number);
            assert!(inner.0.locked().held.len() <= HELD_MAX);
        }
    }

    #[test]
    fn many_who_read_one_object_at_once_each_get_their_bytes() {
        let (_folder, content, object) = file(16 * BLOCK_BYTES);
        std::thread::scope(|scope| {
            for reader in 0..2 * HELD_MAX as u64 {
                let (object, content) = (&object, &content);
                scope.spawn(move || {
                    for turn in 0..16 {
                        let at = (reader * 5 + turn * 7) % 16 * BLOCK_BYTES + reader;
                        let mut byte = [0];
                        object.read_at(at, &mut byte).expect("a byte");
                        assert_eq!(byte[0], content[at as usize]);
                    }
                });
            }
        });
    }

    #[test]
    fn an_object_that_changes_or_is_not_there_is_an_error() {
        let (folder, _, object) = file(20 * BLOCK_BYTES);
        object.read_at(0, &mut [0]).expect("a byte");
        // As long as it was, and far behind what was fetched ahead.
        std::fs::write(folder.path().join("a b"), vec![7; 20 * BLOCK_BYTES as usize]).expect("written");
        let error = object.read_at(15 * BLOCK_BYTES, &mut [0]).expect_err("another object");
        assert_eq!((error.kind(), error.to_string()), (changed().kind(), changed().to_string()));
        let uri = format!("file://{}/none", folder.path().display());
        let missing = Objects.open(&uri).err().expect("no such object");
        assert_eq!(
            (missing.kind(), missing.to_string().as_str()),
            (io::ErrorKind::NotFound, "there is no such object")
        );
        assert_eq!(Objects.open("ftp://a/b").err().expect("no store").kind(), io::ErrorKind::InvalidInput);
        assert_eq!(Objects.list(&format!("file://{}", folder.path().display())).expect("a list"), ["a b"]);
    }
}
