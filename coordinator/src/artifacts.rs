//! Artifacts of jobs that run commands, in the folder `artifacts` of the coordinator's own: packed folders by the hash of their bytes. Owns their files; they
//! are the only bytes of a job that pass through the coordinator, once when it is submitted and once a node. Decides nothing about jobs: who needs which is
//! told with every new one.
//!
//! A1: what has an artifact's name has its hash, and is durable. A2: what no job that lives needs goes when there is a new one, an hour after it was last
//! asked for: between an upload and its job there is a moment.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use stoke_protocol::ids::Digest;
use stoke_protocol::message::client::{Refusal, RefusalCode};
use stoke_protocol::spec::{ARTIFACT_BYTES_MAX, ARTIFACT_PART_BYTES, Artifact};

const DIR: &str = "artifacts";
/// Of an artifact that is on its way.
const PART: &str = "part";
/// All artifacts together: the journal shares the disk.
const BYTES_MAX: u64 = 8 << 30;
/// A2.
const UNNEEDED_MAX: Duration = Duration::from_secs(3_600);

/// The folder. Calls block on its disk.
#[derive(Clone, Debug)]
pub struct Artifacts {
    dir: PathBuf,
    /// Of all together.
    bytes_max: u64,
    /// Of whoever writes.
    writing: Arc<Mutex<()>>,
}

impl Artifacts {
    /// Of the coordinator whose folder is `dir`; made with the first artifact.
    pub fn of(dir: &Path) -> Self {
        Self { dir: dir.join(DIR), bytes_max: BYTES_MAX, writing: Arc::default() }
    }

    /// Whether it is whole here. It stays for a while then.
    pub fn holds(&self, artifact: Artifact) -> bool {
        let file = File::options().append(true).open(self.path(artifact));
        file.is_ok_and(|file| file.set_modified(SystemTime::now()).is_ok())
    }

    /// One is to be stored: how much of it is here.
    pub fn offer(&self, artifact: Artifact, bytes: u64, needed: &BTreeSet<Artifact>) -> Result<u64, Refusal> {
        if bytes > ARTIFACT_BYTES_MAX {
            let message = format!("an artifact of {bytes} bytes");
            return Err(refusal(RefusalCode::Invalid, message, &format!("use at most {ARTIFACT_BYTES_MAX}")));
        }
        if self.holds(artifact) {
            return Ok(bytes);
        }
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.sweep(needed).map_err(unavailable)?;
        let received = fs::metadata(self.part(artifact)).map_or(0, |found| found.len());
        self.check_room(bytes.saturating_sub(received))?;
        Ok(received)
    }

    /// Whether so many bytes more are within the limit of all.
    fn check_room(&self, more: u64) -> Result<(), Refusal> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            found => found.map_err(unavailable)?,
        };
        let used: u64 = entries.flatten().filter_map(|entry| Some(entry.metadata().ok()?.size())).sum();
        if used + more > self.bytes_max {
            let message = format!("artifacts that jobs need have {used} bytes, the limit is {}", self.bytes_max);
            return Err(refusal(RefusalCode::Unavailable, message, "wait until jobs have ended, or cancel some"));
        }
        Ok(())
    }

    /// The next part of one; how much of it is here then.
    pub fn take(&self, artifact: Artifact, bytes: u64, (offset, part): (u64, &[u8])) -> Result<u64, Refusal> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.holds(artifact) {
            return Ok(bytes);
        }
        let path = self.part(artifact);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(unavailable)?;
        let mut file = File::options().create(true).append(true).open(&path).map_err(unavailable)?;
        let mut received = file.metadata().map_err(unavailable)?.len();
        if received == 0 {
            // Whoever sends one that was not offered is bounded too.
            self.check_room(bytes.min(ARTIFACT_BYTES_MAX))?;
        }
        // Another try of a part that has come already changes nothing.
        if offset == received && received < bytes && bytes <= ARTIFACT_BYTES_MAX {
            let room = bytes - received;
            let part = &part[..part.len().min(usize::try_from(room).unwrap_or(usize::MAX))];
            file.write_all(part).map_err(unavailable)?;
            received += part.len() as u64;
        }
        if received >= bytes {
            self.complete(artifact, &file, &path)?;
        }
        Ok(received)
    }

    /// A1.
    fn complete(&self, artifact: Artifact, file: &File, path: &Path) -> Result<(), Refusal> {
        let mut hasher = blake3::Hasher::new();
        File::open(path).and_then(|written| hasher.update_reader(written).map(drop)).map_err(unavailable)?;
        if Digest(*hasher.finalize().as_bytes()) != artifact.0 {
            fs::remove_file(path).map_err(unavailable)?;
            let message = format!("what was sent does not have the hash {artifact}");
            return Err(refusal(RefusalCode::Invalid, message, "send it again"));
        }
        let sync = || File::open(&self.dir)?.sync_all();
        file.sync_all().and_then(|()| fs::rename(path, self.path(artifact))).and_then(|()| sync()).map_err(unavailable)
    }

    /// A part of one that is here, and the length of the whole.
    pub fn read(&self, artifact: Artifact, offset: u64) -> io::Result<(u64, Vec<u8>)> {
        let mut file = File::open(self.path(artifact))?;
        let bytes = file.metadata()?.len();
        let mut part = Vec::new();
        file.seek(SeekFrom::Start(offset))?;
        file.take(ARTIFACT_PART_BYTES as u64).read_to_end(&mut part)?;
        Ok((bytes, part))
    }

    /// A2.
    fn sweep(&self, needed: &BTreeSet<Artifact>) -> io::Result<()> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            found => found?,
        };
        let kept: BTreeSet<PathBuf> = needed.iter().map(|artifact| self.path(*artifact)).collect();
        for entry in entries {
            let entry = entry?;
            let found = entry.metadata()?;
            let age = found.modified()?.elapsed().unwrap_or_default();
            if age > UNNEEDED_MAX && !kept.contains(&entry.path()) {
                fs::remove_file(entry.path())?;
                tracing::info!(file = %entry.path().display(), "artifact that no job needs was removed");
            }
        }
        Ok(())
    }

    fn path(&self, artifact: Artifact) -> PathBuf {
        self.dir.join(artifact.0.to_string())
    }

    fn part(&self, artifact: Artifact) -> PathBuf {
        self.path(artifact).with_extension(PART)
    }
}

fn unavailable(error: io::Error) -> Refusal {
    refusal(RefusalCode::Unavailable, format!("store an artifact: {error}"), "look at the disk of the coordinator")
}

fn refusal(code: RefusalCode, message: String, mend: &str) -> Refusal {
    Refusal { code, message, mend: mend.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_artifact_comes_in_parts_is_verified_and_goes_when_nobody_needs_it() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = Artifacts::of(dir.path());
        let bytes: Vec<u8> = (0..100_000u32).map(|at| at as u8).collect();
        let (artifact, whole) = (Artifact(Digest(*blake3::hash(&bytes).as_bytes())), bytes.len() as u64);
        let nobody = BTreeSet::new();
        assert_eq!(artifacts.offer(artifact, whole, &nobody).unwrap(), 0);
        assert_eq!(artifacts.take(artifact, whole, (0, &bytes[..60_000])).unwrap(), 60_000);
        assert_eq!(artifacts.take(artifact, whole, (0, &bytes[..60_000])).unwrap(), 60_000, "the same again");
        assert_eq!(artifacts.offer(artifact, whole, &nobody).unwrap(), 60_000, "where to go on");
        assert!(!artifacts.holds(artifact));
        assert_eq!(artifacts.take(artifact, whole, (60_000, &bytes[60_000..])).unwrap(), whole);
        assert_eq!(artifacts.offer(artifact, whole, &nobody).unwrap(), whole);
        assert_eq!(artifacts.read(artifact, 99_000).unwrap(), (whole, bytes[99_000..].to_vec()));
        let other = Artifact(Digest([7; 32]));
        let refused = artifacts.take(other, 3, (0, b"abc")).unwrap_err();
        assert!(refused.message.contains("does not have the hash"), "{refused:?}");
        assert!(artifacts.offer(other, ARTIFACT_BYTES_MAX + 1, &nobody).is_err());
        let full = Artifacts { bytes_max: whole, ..artifacts.clone() };
        assert!(full.offer(other, 3, &nobody).unwrap_err().message.contains("the limit is"));
        assert!(full.take(other, 3, (0, b"abc")).unwrap_err().message.contains("the limit is"), "not offered");
        let old = SystemTime::now() - 2 * UNNEEDED_MAX;
        let age = || File::options().append(true).open(artifacts.path(artifact)).unwrap().set_modified(old).unwrap();
        age();
        artifacts.offer(other, 3, &BTreeSet::from([artifact])).unwrap();
        assert!(artifacts.path(artifact).exists());
        artifacts.offer(other, 3, &nobody).unwrap();
        assert!(!artifacts.holds(artifact));
    }
}
