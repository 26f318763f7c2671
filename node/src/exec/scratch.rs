//! The folders of a rank's command: the one it works in, and one for temporary files. Each start of the command finds fresh ones; the agent removes what a
//! rank leaves. Owns the folder below which they are.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;
use stoke_protocol::message::rank::{RankId, StartRank};
use stoke_protocol::spec::Artifact;

use super::user::User;
use crate::artifact::{ARTIFACTS, Cache, unpack};

/// The folder of one rank's scratch folders, as its agent tells it.
pub const SCRATCH: &str = "STOKE_SCRATCH";
const NAME: &str = "stoke-scratch-";

/// What one start of the command has.
pub struct Scratch {
    pub work: PathBuf,
    pub temporary: PathBuf,
}

/// Fresh folders; what the job has taken along is in the one to work in.
pub fn make(start: &StartRank, artifact: Option<Artifact>, user: Option<&User>) -> io::Result<Scratch> {
    let root = std::env::var_os(SCRATCH).map(PathBuf::from);
    let root = root.ok_or_else(|| io::Error::other(format!("{SCRATCH} is not set: {} has no agent", start.id)))?;
    let named = |error: io::Error| io::Error::new(error.kind(), format!("make the folder {}: {error}", root.display()));
    let (work, temporary) = (root.join("work"), root.join("tmp"));
    remove(&work).and_then(|()| remove(&temporary)).map_err(named)?;
    let mut private = DirBuilder::new();
    private.mode(0o700);
    private.create(&work).and_then(|()| private.create(&temporary)).map_err(named)?;
    if let Some(artifact) = artifact {
        let cache = std::env::var_os(ARTIFACTS).ok_or_else(|| io::Error::other(format!("{ARTIFACTS} is not set")))?;
        unpack(&Cache::path(Path::new(&cache), artifact), &work)?;
    }
    user.map_or(Ok(()), |user| user.own(&root)).map_err(named)?;
    Ok(Scratch { work, temporary })
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// The scratch folders of an agent's ranks. Not below the agent's own folder, which other users may not enter.
#[derive(Clone, Debug)]
pub struct Scratches {
    root: PathBuf,
}

impl Scratches {
    /// Those of the node whose folder is `dir`; nothing is made yet.
    pub fn of(dir: &Path) -> Self {
        let whose = blake3::hash(dir.as_os_str().as_encoded_bytes()).to_hex();
        Self { root: std::env::temp_dir().join(format!("{NAME}{}", &whose[..16])) }
    }

    /// Makes the folder of a rank, in which it makes its own.
    pub fn open(&self, id: RankId) -> io::Result<()> {
        let make = || match DirBuilder::new().mode(0o700).create(self.of_rank(id)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            Ok(()) | Err(_) => Ok(()),
        };
        // The one that holds them goes with the last of them, which may be now.
        self.open_root().and_then(|()| make()).or_else(|_| self.open_root().and_then(|()| make()))
    }

    /// Anybody may have made one of this name before.
    fn open_root(&self) -> io::Result<()> {
        match DirBuilder::new().mode(0o711).create(&self.root) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let found = fs::symlink_metadata(&self.root)?;
        if !found.is_dir() || found.uid() != geteuid().as_raw() || found.mode() & 0o022 != 0 {
            return Err(io::Error::other(format!("{} is somebody else's: remove it", self.root.display())));
        }
        Ok(())
    }

    pub fn of_rank(&self, id: RankId) -> PathBuf {
        self.root.join(format!("{}-{}-{}", id.job, id.generation, id.rank))
    }

    /// The rank is gone.
    pub fn remove(&self, id: RankId) {
        if let Err(error) = remove(&self.of_rank(id)) {
            tracing::warn!(rank = %id, %error, "scratch folders of a rank that is gone were not removed");
        }
        // Empty, where no other one is there.
        let _ = fs::remove_dir(&self.root);
    }

    /// Removes those of ranks that nobody knows.
    pub fn keep_only(&self, ids: &[RankId]) {
        let known: Vec<PathBuf> = ids.iter().map(|id| self.of_rank(*id)).collect();
        let entries = fs::read_dir(&self.root).into_iter().flatten().flatten().map(|entry| entry.path());
        for path in entries.filter(|path| !known.contains(path)) {
            let _ = remove(&path);
        }
        // Empty, where nothing runs.
        let _ = fs::remove_dir(&self.root);
    }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::{Generation, JobId, Rank};

    use super::*;

    #[test]
    fn folders_of_unknown_ranks_go_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let id = |rank| RankId { job: JobId(1), generation: Generation(1), rank: Rank(rank) };
        let scratches = Scratches { root: dir.path().join("s") };
        for rank in [0, 1] {
            scratches.open(id(rank)).unwrap();
            scratches.open(id(rank)).unwrap();
            fs::create_dir_all(scratches.of_rank(id(rank)).join("work/a")).unwrap();
        }
        scratches.keep_only(&[id(1)]);
        assert!(!scratches.of_rank(id(0)).exists() && scratches.of_rank(id(1)).exists());
        scratches.remove(id(1));
        assert!(!scratches.root.exists());
        scratches.remove(id(1));
        scratches.keep_only(&[]);
        std::os::unix::fs::symlink("/tmp", &scratches.root).unwrap();
        assert!(scratches.open(id(0)).is_err(), "a link leads elsewhere");
    }
}
