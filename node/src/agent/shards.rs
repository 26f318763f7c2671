//! The node's folder of shards in memory (`checkpoint/memory.rs`). Owns its place and its end: jobs that have long had no rank here, everything when
//! the agent ends in order, and folders of agents that were killed and did not come back. What is inside is the ranks' business.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, DirEntry, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::FlockOperation;
use stoke_protocol::identity::Credentials;
use stoke_protocol::ids::{ClusterId, JobId, NodeId};

use super::disk::identity_dir;
use super::join::node_of;

/// Memory that is a file system.
const MEMORY: &str = "/dev/shm";
const PREFIX: &str = "stoke-";
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// A job without a rank here may come back within this, from its queue or after a failure.
const IDLE_MAX: Duration = Duration::from_secs(600);

/// While an agent holds it locked, its folder is in use.
const LOCK_FILE: &str = "lock";

#[derive(Debug)]
pub struct ShardFolder {
    root: PathBuf,
    looked: Instant,
    _lock: File,
}

impl ShardFolder {
    /// Makes the node's folder; none where the machine has no memory to offer as files, or not to this user.
    pub fn open(cluster: ClusterId, node: NodeId) -> Option<Self> {
        remove_abandoned();
        let root = root_of(cluster, node);
        let made = DirBuilder::new().mode(0o700).create(&root);
        let lock = is_ours(&root).then(|| lock(&root)).flatten();
        if lock.is_none() {
            tracing::info!(root = %root.display(), ?made, "no shards are kept in memory");
        }
        Some(Self { root, looked: Instant::now(), _lock: lock? })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Removes what jobs have left that are not `live` here and have written nothing for long.
    pub fn look(&mut self, live: impl Iterator<Item = JobId>) {
        if self.looked.elapsed() < LOOK_EVERY {
            return;
        }
        self.looked = Instant::now();
        let live: BTreeSet<String> = live.map(|job| job.to_string()).collect();
        let Ok(jobs) = fs::read_dir(&self.root) else { return };
        let is_live = |job: &DirEntry| job.file_name().to_str().is_some_and(|name| live.contains(name));
        for job in jobs.flatten().filter(|job| job.path().is_dir() && !is_live(job) && is_idle(&job.path())) {
            let _ = fs::remove_dir_all(job.path());
        }
    }

    /// No rank is left.
    pub fn remove(&self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// What a node keeps in memory whose agent has this folder, and is not coming back.
pub fn remove_of(dir: &Path) {
    let Ok(credentials) = Credentials::load(&identity_dir(dir)) else { return };
    let Ok(node) = node_of(&credentials) else { return };
    let root = root_of(credentials.identity().cluster, node);
    if is_ours(&root) && lock(&root).is_some() {
        let _ = fs::remove_dir_all(root);
    }
}

fn root_of(cluster: ClusterId, node: NodeId) -> PathBuf {
    Path::new(MEMORY).join(format!("{PREFIX}{cluster}-{node}"))
}

/// Folders of this user's agents that nobody has locked for long.
fn remove_abandoned() {
    for folder in fs::read_dir(MEMORY).into_iter().flatten().flatten() {
        let (path, name) = (folder.path(), folder.file_name());
        let named = name.to_str().is_some_and(|name| name.starts_with(PREFIX));
        if named && is_ours(&path) && is_idle(&path) && lock(&path).is_some() {
            let _ = fs::remove_dir_all(path);
        }
    }
}

/// Anybody may make folders there: one of another user, or a link, is not this node's.
fn is_ours(folder: &Path) -> bool {
    let own = rustix::process::geteuid().as_raw();
    fs::symlink_metadata(folder).is_ok_and(|it| it.is_dir() && it.uid() == own && it.mode() & 0o077 == 0)
}

fn lock(folder: &Path) -> Option<File> {
    let lock = File::options().create(true).append(true).open(folder.join(LOCK_FILE)).ok()?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).ok()?;
    Some(lock)
}

/// Nothing was written for long, in the folder or in those directly inside.
fn is_idle(folder: &Path) -> bool {
    let written = |path: &Path| fs::metadata(path).and_then(|it| it.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    let inside = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| written(&entry.path()));
    let last = inside.chain([written(folder)]).max();
    last.is_some_and(|last| last.elapsed().is_ok_and(|idle| idle > IDLE_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn age(path: &Path, by: Duration) {
        File::open(path).unwrap().set_modified(SystemTime::now() - by).unwrap();
    }

    #[test]
    fn what_a_killed_agent_left_goes_after_a_while_and_what_lives_stays() {
        let hour = Duration::from_secs(3600);
        let cluster = ClusterId([0x5e; 16]);
        let Some(mut own) = ShardFolder::open(cluster, NodeId(1)) else { return };
        assert!(ShardFolder::open(cluster, NodeId(1)).is_none(), "it is locked");
        let killed = ShardFolder::open(cluster, NodeId(2)).unwrap();
        let left = killed.root().to_owned();
        drop(killed);
        for job in ["job-1", "job-2"] {
            fs::create_dir(own.root().join(job)).unwrap();
            age(&own.root().join(job), hour);
        }
        own.looked -= hour;
        own.look([JobId(2)].into_iter());
        assert!(!own.root().join("job-1").exists() && own.root().join("job-2").exists());
        for folder in [own.root(), &left] {
            age(&folder.join(LOCK_FILE), hour);
            age(folder, hour);
        }
        remove_abandoned();
        assert!(own.root().exists() && !left.exists());
        own.remove();
        assert!(!own.root().exists());
    }
}
