//! One checkpoint's folder, on disk or in an object store. Owns how objects are written and their durability; knows nothing of what is inside.
//!
//! I21: a write that returned is durable, and nothing is seen of one that failed. Object stores give both. `LocalFileSystem` alone does not
//! fsync; with `with_fsync(true)` each put writes a staging file, fsyncs it, publishes it by rename (or by hard link where it must not replace) and fsyncs the folder, also for folders that it makes.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use object_store::path::Path;
use object_store::{GetOptions, GetResultPayload, MultipartUpload, ObjectStoreExt, PutMode, PutPayload};

use super::error::{CheckpointError, READ};
use super::store::{Kind, Place, runtime};

/// Parts of a large write: S3's smallest is 5 MiB, and the copy of one part is all the memory that a write needs.
pub(super) const PART_BYTES: usize = 8 << 20;

/// What is read at once from a file: it stays in the processor's cache until it was hashed and taken.
const RUN_BYTES: usize = 256 << 10;

/// Of everything that this process reads of checkpoints: whoever waits for a reader sees whether it still gets anywhere.
static BYTES_READ: AtomicU64 = AtomicU64::new(0);

pub fn bytes_read() -> u64 {
    BYTES_READ.load(Ordering::Relaxed)
}

/// A folder of a store, by URI. Blocking.
pub struct Folder(Place);

impl Folder {
    /// `file:///absolute/folder`, a plain path of this machine, or a folder of an object store (`s3://bucket/folder`). It need not exist.
    pub fn at(uri: &str) -> Result<Self, CheckpointError> {
        Place::of(uri).map(Self)
    }

    /// Always with its scheme, without a slash at the end.
    pub fn uri(&self) -> &str {
        &self.0.uri
    }

    pub(super) fn is_files(&self) -> bool {
        self.0.kind == Kind::File
    }

    /// The last part of the URI.
    pub(super) fn name(&self) -> &str {
        self.0.path.filename().unwrap_or_default()
    }

    /// What a person looks for.
    pub(super) fn object(&self, file: &str) -> String {
        format!("{}/{file}", self.0.uri)
    }

    /// Writes a whole small object that must not be there yet. `false`: it is there, and was not touched.
    pub(super) fn create(&self, file: &str, bytes: Vec<u8>) -> Result<bool, CheckpointError> {
        let path = self.child(file);
        let put = self.0.store.put_opts(&path, PutPayload::from(bytes), PutMode::Create.into());
        match self.wait(put) {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
            Err(error) => Err(self.failed("write", file, error)),
        }
    }

    /// Writes an object part by part, durable and visible at once when `next` has no more parts; nothing of it is seen after an error.
    pub(super) fn write(&self, file: &str, mut next: impl FnMut() -> Option<Bytes>) -> Result<(), CheckpointError> {
        let path = self.child(file);
        let written = self.wait(async {
            let (first, second) = (next().unwrap_or_default(), next());
            if second.is_none() && self.0.kind != Kind::File {
                // One request in place of three.
                return self.0.store.put(&path, first.into()).await.map(drop);
            }
            let mut upload = self.0.store.put_multipart(&path).await?;
            let parts = [Some(first), second].into_iter().flatten().chain(std::iter::from_fn(next));
            let sent = send(&mut *upload, parts, self.0.kind.parts_in_flight_max()).await;
            if sent.is_err() {
                // The error that is returned says more than one of the clean-up would.
                let _ = upload.abort().await;
            }
            sent
        });
        written.map_err(|error| self.failed("write", file, error))
    }

    /// Size of an object, none when it is missing.
    pub(super) fn size(&self, file: &str) -> Result<Option<u64>, CheckpointError> {
        self.refuse_other_than_files(file)?;
        match self.wait(self.0.store.head(&self.child(file))) {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed(READ, file, error)),
        }
    }

    /// A pipe or a device in the place of a file would be read for ever.
    fn refuse_other_than_files(&self, file: &str) -> Result<(), CheckpointError> {
        let is_other = |found: std::fs::Metadata| !found.is_file();
        if self.0.kind != Kind::File || !std::fs::metadata(format!("/{}", self.child(file))).is_ok_and(is_other) {
            return Ok(());
        }
        let source = std::io::Error::other("it is no regular file");
        Err(CheckpointError::File { verb: READ, object: self.object(file), source })
    }

    /// Gives the bytes of an object, or of a range of it, to `sink` in order, until it answers with an error. Every run but the last has a multiple
    /// of [`RUN_BYTES`]; what lies behind the object's end is left out.
    pub(super) fn read(
        &self,
        file: &str,
        range: Option<Range<u64>>,
        mut sink: impl FnMut(&[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let failed = |error| self.failed(READ, file, error);
        let mut sink = |run: &[u8]| {
            BYTES_READ.fetch_add(run.len() as u64, Ordering::Relaxed);
            sink(run)
        };
        let options = GetOptions { range: range.map(Into::into), ..GetOptions::default() };
        let got = self.wait(self.0.store.get_opts(&self.child(file), options)).map_err(failed)?;
        let range = got.range.clone();
        let GetResultPayload::File(file, path) = got.payload else {
            return sink(&self.wait(got.bytes()).map_err(failed)?);
        };
        // The store's own stream would read 8 KiB at a time.
        let mut run = vec![0; RUN_BYTES.min((range.end - range.start) as usize)];
        let mut at = range.start;
        while at < range.end {
            let run = &mut run[..RUN_BYTES.min((range.end - at) as usize)];
            file.read_exact_at(run, at).map_err(|source| {
                let object = path.display().to_string();
                CheckpointError::File { verb: READ, object, source }
            })?;
            sink(run)?;
            at += run.len() as u64;
        }
        Ok(())
    }

    /// Removes an object; one that is not there is no error.
    pub(super) fn delete(&self, file: &str) -> Result<(), CheckpointError> {
        match self.wait(self.0.store.delete(&self.child(file))) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failed("remove", file, error)),
        }
    }

    /// Names of the objects and of the folders directly inside.
    pub(super) fn list(&self) -> Result<(Vec<String>, Vec<String>), CheckpointError> {
        let listed = self
            .wait(self.0.store.list_with_delimiter(Some(&self.0.path)))
            .map_err(|error| CheckpointError::store(self.0.kind, "list", self.uri(), error))?;
        let name = |path: &Path| path.filename().map(str::to_owned);
        let files = listed.objects.iter().filter_map(|object| name(&object.location)).collect();
        Ok((files, listed.common_prefixes.iter().filter_map(name).collect()))
    }

    /// Removes the folder itself if it is empty; object stores have none.
    pub(super) fn forget(&self) {
        if self.0.kind != Kind::File {
            return;
        }
        let folder = PathBuf::from(format!("/{}", self.0.path));
        // What a writer that was killed had begun; the store does not list it.
        let staged = |name: &str| name.rsplit_once('#').is_some_and(|(_, number)| number.parse::<u64>().is_ok());
        for file in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            if file.file_name().to_str().is_some_and(staged) {
                let _ = std::fs::remove_file(file.path());
            }
        }
        let _ = std::fs::remove_dir(folder);
    }

    fn child(&self, file: &str) -> Path {
        self.0.path.clone().join(file)
    }

    fn failed(&self, verb: &'static str, file: &str, error: object_store::Error) -> CheckpointError {
        CheckpointError::store(self.0.kind, verb, self.object(file), error)
    }

    /// Blocks until `work` is done. Requests to object stores need a reactor, and have one of their own: it goes on while this thread waits.
    fn wait<F: Future>(&self, work: F) -> F::Output {
        let _entered = (self.0.kind != Kind::File).then(|| runtime().enter());
        wait(work)
    }
}

/// Sends the parts, a few at once, and completes the upload.
async fn send(
    upload: &mut dyn MultipartUpload,
    parts: impl Iterator<Item = Bytes>,
    in_flight_max: usize,
) -> object_store::Result<()> {
    let mut in_flight = FuturesUnordered::new();
    for part in parts {
        in_flight.push(upload.put_part(PutPayload::from(part)));
        while in_flight.len() >= in_flight_max {
            in_flight.next().await.transpose()?;
        }
    }
    while in_flight.next().await.transpose()?.is_some() {}
    upload.complete().await.map(drop)
}

/// Blocks until `work` is done, in a runtime or out of one. Files need no reactor: where there is a runtime their calls run on that one's
/// blocking threads, elsewhere right here.
fn wait<F: Future>(work: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut work = pin!(work);
    loop {
        match work.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_the_path_that_it_spells() {
        let dir = tempfile::tempdir().unwrap();
        let named = dir.path().join("a%41 b/ä");
        let uri = format!("file://{}", named.display());
        let folder = Folder::at(&uri).unwrap();
        assert_eq!(folder.uri(), uri);
        assert!(folder.create("x", b"1".to_vec()).unwrap());
        assert_eq!(std::fs::read(named.join("x")).unwrap(), b"1");
        assert_eq!(Folder::at(named.to_str().unwrap()).unwrap().size("x").unwrap(), Some(1));
        assert!(Folder::at("file:///a/../b").is_err());
    }
}
