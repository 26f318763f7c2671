//! The agent's folder: its lock, its credentials, and what must outlive it (incarnation, fence). Owns their durability.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use stoke_protocol::identity::{Credentials, CredentialsError};
use stoke_protocol::ids::{Epoch, Incarnation, LogIndex};

use super::fence::Fence;

const LOCK_FILE: &str = "lock";
/// How often a folder in use is tried, and how long after the last time.
const LOCK_TRIES: u32 = 20;
const LOCK_WAIT: Duration = Duration::from_millis(10);
const STATE_FILE: &str = "agent.json";
const IDENTITY_DIR: &str = "identity";
/// Where an identity goes that was revoked.
const REMOVED_DIR: &str = "identity.removed";
const LOGS_DIR: &str = "logs";

/// An agent's folder, locked while this lives.
#[derive(Debug)]
pub struct Home {
    dir: PathBuf,
    state: Arc<StateFile>,
    _lock: File,
}

/// The file of what must outlive this agent.
#[derive(Debug)]
pub struct StateFile {
    path: PathBuf,
    incarnation: Incarnation,
    written: Mutex<Fence>,
}

#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    #[error("{verb} {}", path.display())]
    Io {
        verb: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is used by another agent: stop it (`stoke down`, or its service), or choose another folder", dir.display())]
    InUse { dir: PathBuf },
    #[error("{} is damaged ({problem}): remove it to start as a new agent of the same node", path.display())]
    Damaged { path: PathBuf, problem: String },
    #[error(
        "{} is damaged ({problem}), so that the process of a rank cannot be found: end it if it is there (`stoke worker` in `ps`), then remove \
         the file", path.display()
    )]
    DamagedRecord { path: PathBuf, problem: String },
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

#[derive(Serialize, Deserialize, Default)]
struct Stored {
    incarnation: u64,
    epoch: u64,
    index: u64,
}

impl StateFile {
    /// Makes the fence durable, unless a higher one is.
    pub fn persist(&self, fence: Fence) -> Result<(), HomeError> {
        // Nobody panics while it is held.
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if fence > *written {
            self.write(fence)?;
            *written = fence;
        }
        Ok(())
    }

    fn write(&self, fence: Fence) -> Result<(), HomeError> {
        let stored = Stored { incarnation: self.incarnation.0, epoch: fence.epoch.0, index: fence.index.0 };
        let failed = |source| HomeError::Io { verb: "write", path: self.path.clone(), source };
        replace(&self.path, &serde_json::to_vec(&stored).expect("three numbers are JSON")).map_err(failed)
    }
}

/// Where the credentials of the agent in `dir` lie.
pub fn identity_dir(dir: &Path) -> PathBuf {
    dir.join(IDENTITY_DIR)
}

impl Home {
    /// Locks the folder and begins a new incarnation, durably: one that the folder has not seen, and at least `floor`.
    pub fn open(dir: &Path, floor: Incarnation) -> Result<(Self, Fence), HomeError> {
        fs::create_dir_all(dir).map_err(|source| HomeError::Io { verb: "create", path: dir.into(), source })?;
        let lock = lock(dir)?;
        let stored = read(&dir.join(STATE_FILE))?;
        let incarnation = Incarnation(stored.incarnation).next().max(floor);
        let fence = Fence { epoch: Epoch(stored.epoch), index: LogIndex(stored.index) };
        let state = StateFile { path: dir.join(STATE_FILE), incarnation, written: Mutex::new(fence) };
        state.write(fence)?;
        Ok((Self { dir: dir.into(), state: Arc::new(state), _lock: lock }, fence))
    }

    pub fn state(&self) -> &Arc<StateFile> {
        &self.state
    }

    pub fn incarnation(&self) -> Incarnation {
        self.state.incarnation
    }

    pub fn identity_dir(&self) -> PathBuf {
        identity_dir(&self.dir)
    }

    pub fn credentials(&self) -> Result<Credentials, HomeError> {
        Ok(Credentials::load(&self.identity_dir())?)
    }

    /// The identity is good for nothing any more: out of the way of the next join. Kept, for people who wonder.
    pub fn set_identity_aside(&self) {
        let (from, to) = (self.identity_dir(), self.dir.join(REMOVED_DIR));
        let _ = fs::remove_dir_all(&to);
        if let Err(error) = fs::rename(&from, &to) {
            tracing::error!(%error, "move {} to {}", from.display(), to.display());
        }
    }

    pub fn logs_dir(&self) -> PathBuf {
        self.dir.join(LOGS_DIR)
    }
}

/// Locks the folder while the file lives: one agent a folder, whatever dies.
pub(super) fn lock(dir: &Path) -> Result<File, HomeError> {
    let path = dir.join(LOCK_FILE);
    let lock = File::create(&path).map_err(|source| HomeError::Io { verb: "open", path, source })?;
    // A process that an agent has just forked holds its lock until it begins its own program, also after the agent's end.
    for _ in 0..LOCK_TRIES {
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(lock);
        }
        std::thread::sleep(LOCK_WAIT);
    }
    Err(HomeError::InUse { dir: dir.into() })
}

fn read(path: &Path) -> Result<Stored, HomeError> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| HomeError::Damaged { path: path.into(), problem: error.to_string() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Stored::default()),
        Err(source) => Err(HomeError::Io { verb: "read", path: path.into(), source }),
    }
}

/// Durable, in one step: after a crash there is the old file or the new one.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let staged = path.with_extension("tmp");
    let mut file = File::create(&staged)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&staged, path)?;
    File::open(path.parent().expect("a file lies in a folder"))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_start_is_a_new_incarnation_and_the_fence_stays() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Home::open(dir.path(), Incarnation(0));
        let (home, fence) = open().unwrap();
        assert_eq!((home.incarnation(), fence), (Incarnation(1), Fence::default()));
        let seen = Fence { epoch: Epoch(4), index: LogIndex(9) };
        home.state().persist(seen).unwrap();
        home.state().persist(Fence { index: LogIndex(5), ..seen }).unwrap();
        assert!(matches!(open(), Err(HomeError::InUse { .. })));
        drop(home);
        let (home, fence) = open().unwrap();
        assert_eq!((home.incarnation(), fence), (Incarnation(2), seen));
        drop(home);
        fs::write(dir.path().join(STATE_FILE), "{").unwrap();
        assert!(matches!(open(), Err(HomeError::Damaged { .. })));
        // What the error advises: the clock is past every incarnation before.
        fs::remove_file(dir.path().join(STATE_FILE)).unwrap();
        let incarnation = |floor| Home::open(dir.path(), Incarnation(floor)).unwrap().0.incarnation();
        assert_eq!(
            (incarnation(1_000), incarnation(1_001), incarnation(5)),
            (Incarnation(1_000), Incarnation(1_001), Incarnation(1_002))
        );
    }
}
