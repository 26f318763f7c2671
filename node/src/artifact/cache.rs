//! Artifacts that this node has fetched from the coordinator, by hash. Owns the folder `artifacts` of the agent's own; ranks read it. Each is fetched once,
//! and what was fetched has its hash.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, utimensat};
use stoke_protocol::ids::Digest;
use stoke_protocol::message::node::{NodeReply, NodeRequest};
use stoke_protocol::spec::{ARTIFACT_BYTES_MAX, Artifact};
use stoke_protocol::transport::Connection;
use tokio::io::AsyncWriteExt;
use tokio::sync::Mutex;

use super::program::{Unfit, inspect_bytes, read as read_program};

/// The folder, as ranks that run commands are told it.
pub const ARTIFACTS: &str = "STOKE_ARTIFACTS";
const DIR: &str = "artifacts";
/// The oldest go when all together have more.
const BYTES_MAX: u64 = 4 << 30;
/// A disk that damages what it was given a moment ago is given up.
const FETCHES_MAX: u32 = 2;
/// One part.
const PART_MAX: Duration = Duration::from_secs(30);

#[derive(Clone, Debug)]
pub struct Cache {
    dir: PathBuf,
    /// Two ranks of a node want the same.
    fetching: Arc<Mutex<()>>,
}

/// What became of a fetch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fetched {
    There,
    /// The coordinator is away: again later.
    Lost,
    Refused(String),
    /// It is there, and no program that this node can run as a rank.
    Unfit(String),
}

impl Cache {
    /// Of the node whose folder is `dir`.
    pub fn of(dir: &Path) -> Self {
        Self { dir: dir.join(DIR), fetching: Arc::default() }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where it lies when it is there.
    pub fn path(dir: &Path, artifact: Artifact) -> PathBuf {
        dir.join(artifact.0.to_string())
    }

    /// A folder. Its bytes are looked at each time: what lies on a disk for long may not be what was written there.
    pub async fn fetch(&self, connection: &Connection, artifact: Artifact) -> Fetched {
        self.fetch_whole(connection, artifact, look_at_folder).await
    }

    /// The same of one that is to run as a rank.
    pub async fn fetch_program(&self, connection: &Connection, artifact: Artifact) -> Fetched {
        self.fetch_whole(connection, artifact, look_at_program).await
    }

    async fn fetch_whole(&self, connection: &Connection, artifact: Artifact, look_at: LookAt) -> Fetched {
        for _ in 0..FETCHES_MAX {
            let fetched = self.fetch_once(connection, artifact).await;
            if fetched != Fetched::There {
                return fetched;
            }
            let path = Self::path(&self.dir, artifact);
            let looked = tokio::task::spawn_blocking(move || look_at(&path, artifact)).await.map_err(io::Error::other);
            match looked.flatten() {
                Ok(Looked::Good) => return Fetched::There,
                Ok(Looked::Unfit(unfit)) => return Fetched::Unfit(unfit.to_string()),
                Ok(Looked::Damaged) => {
                    tracing::warn!(%artifact, "the artifact is not what was fetched, and is fetched anew")
                }
                Err(error) => return Fetched::Refused(format!("read the artifact {artifact}: {error}")),
            }
        }
        Fetched::Refused(format!("the artifact {artifact} does not keep its bytes on this node's disk"))
    }

    async fn fetch_once(&self, connection: &Connection, artifact: Artifact) -> Fetched {
        let _fetching = self.fetching.lock().await;
        let path = Self::path(&self.dir, artifact);
        // What was used last goes last. By its name: a program that runs cannot be opened for writing.
        if touch(&path).is_ok() {
            return Fetched::There;
        }
        match self.download(connection, artifact, &path).await {
            Ok(Some(fetched)) => fetched,
            Ok(None) => {
                self.make_room(&path);
                Fetched::There
            }
            Err(error) => Fetched::Refused(format!("keep artifact {artifact}: {error}")),
        }
    }

    /// None: it is there.
    async fn download(&self, connection: &Connection, artifact: Artifact, path: &Path) -> io::Result<Option<Fetched>> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let part_path = path.with_extension("part");
        let mut file = tokio::fs::File::create(&part_path).await?;
        let mut hasher = blake3::Hasher::new();
        let mut offset = 0;
        loop {
            let request = NodeRequest::Artifact { artifact, offset };
            match connection.request(&request, PART_MAX).await {
                Ok(NodeReply::ArtifactPart { bytes, part }) if bytes <= ARTIFACT_BYTES_MAX => {
                    if part.is_empty() && offset < bytes {
                        return Ok(Some(Fetched::Refused(format!("artifact {artifact} ends early"))));
                    }
                    hasher.update(&part.0);
                    file.write_all(&part.0).await?;
                    offset += part.len() as u64;
                    if offset >= bytes {
                        break;
                    }
                }
                Ok(NodeReply::Refused { reason }) => return Ok(Some(Fetched::Refused(reason))),
                Ok(_) => return Ok(Some(Fetched::Refused(format!("artifact {artifact}: not an answer")))),
                Err(error) => {
                    tracing::debug!(%artifact, %error, "no artifact yet");
                    return Ok(Some(Fetched::Lost));
                }
            }
        }
        file.flush().await?;
        if Digest(*hasher.finalize().as_bytes()) != artifact.0 {
            return Ok(Some(Fetched::Refused(format!(
                "what the coordinator has as {artifact} does not have its hash"
            ))));
        }
        file.sync_all().await?;
        fs::rename(&part_path, path)?;
        tracing::info!(%artifact, bytes = offset, "artifact fetched");
        Ok(None)
    }

    fn make_room(&self, newest: &Path) {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let found = entries.filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            Some((metadata.modified().ok()?, metadata.len(), entry.path()))
        });
        let mut found: Vec<_> = found.collect();
        found.sort();
        let mut used: u64 = found.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in found.iter().filter(|(_, _, path)| path != newest) {
            if used <= BYTES_MAX {
                return;
            }
            // A rank that has it open reads on.
            used -= fs::remove_file(path).map_or(0, |()| *bytes);
        }
    }
}

enum Looked {
    Good,
    Unfit(Unfit),
    /// It was removed.
    Damaged,
}

type LookAt = fn(&Path, Artifact) -> io::Result<Looked>;

fn look_at_folder(path: &Path, artifact: Artifact) -> io::Result<Looked> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    match Digest(*hasher.finalize().as_bytes()) == artifact.0 {
        true => Ok(Looked::Good),
        false => fs::remove_file(path).map(|()| Looked::Damaged),
    }
}

fn look_at_program(path: &Path, artifact: Artifact) -> io::Result<Looked> {
    let packed = read_program(path)?;
    if packed.artifact != artifact {
        fs::remove_file(path)?;
        return Ok(Looked::Damaged);
    }
    Ok(inspect_bytes(&packed.bytes).map_or_else(Looked::Unfit, |()| Looked::Good))
}

fn touch(path: &Path) -> io::Result<()> {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    Ok(utimensat(CWD, path, &Timestamps { last_access: now, last_modification: now }, AtFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_folder_is_removed_from_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let artifact = Artifact(Digest(*blake3::hash(b"packed").as_bytes()));
        let path = Cache::path(dir.path(), artifact);
        fs::write(&path, "packed").unwrap();
        assert!(matches!(look_at_folder(&path, artifact), Ok(Looked::Good)));
        fs::write(&path, "pecked").unwrap();
        assert!(matches!(look_at_folder(&path, artifact), Ok(Looked::Damaged)));
        assert!(!path.exists());
    }
}
