//! The folders of a rank's command: the one it works in, and one for temporary files. Each start of the command finds fresh ones; the agent removes what a
//! rank leaves. Owns the folder below which they are.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;
use stoke_protocol::message::rank::{RankId, StartRank};
use stoke_protocol::spec::Artifact;

use super::removal::remove;
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

/// Fresh folders; what the job has taken along is in the one to work in. The folder that holds them stays the agent's: whoever owned it could put a link in
/// the place of one, and the next start would write where that leads.
pub fn make(start: &StartRank, artifact: Option<Artifact>, user: Option<&User>) -> io::Result<Scratch> {
    let root = std::env::var_os(SCRATCH).map(PathBuf::from);
    let root = root.ok_or_else(|| io::Error::other(format!("{SCRATCH} is not set: {} has no agent", start.id)))?;
    let packed = artifact.map(packed).transpose()?;
    make_in(&root, packed.as_deref(), user)
}

fn packed(artifact: Artifact) -> io::Result<PathBuf> {
    let cache = std::env::var_os(ARTIFACTS).ok_or_else(|| io::Error::other(format!("{ARTIFACTS} is not set")))?;
    Ok(Cache::path(Path::new(&cache), artifact))
}

fn make_in(root: &Path, packed: Option<&Path>, user: Option<&User>) -> io::Result<Scratch> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("make the folder {}: {error}", root.display()));
    is_ours(root).map_err(named)?;
    let scratch = Scratch { work: root.join("work"), temporary: root.join("tmp") };
    // Nobody else can enter this one: what is in it is given to the user, and then moved to where the user finds it.
    let new = root.join("new");
    for path in [&scratch.work, &scratch.temporary, &new] {
        remove(path).map_err(named)?;
    }
    let (work, temporary) = (new.join("work"), new.join("tmp"));
    for path in [&new, &work, &temporary] {
        DirBuilder::new().mode(0o700).create(path).map_err(named)?;
    }
    if let Some(packed) = packed {
        unpack(packed, &work)?;
    }
    if let Some(user) = user {
        user.own(&work).and_then(|()| user.own(&temporary)).map_err(named)?;
        fs::set_permissions(root, Permissions::from_mode(0o711)).map_err(named)?;
    }
    fs::rename(&work, &scratch.work).and_then(|()| fs::rename(&temporary, &scratch.temporary)).map_err(named)?;
    fs::remove_dir(&new).map_err(named)?;
    Ok(scratch)
}

/// Whether nobody else can change what is in it.
fn is_ours(folder: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(folder)?;
    if !found.is_dir() || found.uid() != geteuid().as_raw() || found.mode() & 0o022 != 0 {
        return Err(io::Error::other(format!("{} is somebody else's: remove it", folder.display())));
    }
    Ok(())
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
        is_ours(&self.root)
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
            if let Err(error) = remove(&path) {
                tracing::warn!(path = %path.display(), %error, "scratch folders that nobody knows were not removed");
            }
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

    #[test]
    fn a_user_has_fresh_folders_and_cannot_replace_them() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        make_in(dir.path(), None, None).unwrap();
        if !geteuid().is_root() {
            return;
        }
        let nobody = User::find("nobody").unwrap();
        for _ in 0..2 {
            let scratch = make_in(dir.path(), None, Some(&nobody)).unwrap();
            let whose = |path: &Path| fs::symlink_metadata(path).unwrap().uid();
            assert_eq!((whose(dir.path()), mode(dir.path())), (0, 0o711));
            assert_eq!((whose(&scratch.work), mode(&scratch.work)), (65_534, 0o700));
            assert_eq!(whose(&scratch.temporary), 65_534);
            assert_eq!(fs::read_dir(&scratch.work).unwrap().count(), 0);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
            fs::write(scratch.work.join("left"), "").unwrap();
        }
        std::os::unix::fs::lchown(dir.path(), Some(65_534), None).unwrap();
        assert!(make_in(dir.path(), None, Some(&nobody)).is_err(), "whoever owns the folder can replace what is in it");
    }
}
