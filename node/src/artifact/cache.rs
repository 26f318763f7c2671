//! Artifacts that this node has fetched from the coordinator, by hash. Owns the folder `artifacts` of the agent's own; ranks read it. Each is fetched once,
//! and what was fetched has its hash.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use stoke_protocol::ids::Digest;
use stoke_protocol::message::node::{NodeReply, NodeRequest};
use stoke_protocol::spec::{ARTIFACT_BYTES_MAX, Artifact};
use stoke_protocol::transport::Connection;
use tokio::io::AsyncWriteExt;
use tokio::sync::Mutex;

/// The folder, as ranks that run commands are told it.
pub const ARTIFACTS: &str = "STOKE_ARTIFACTS";
const DIR: &str = "artifacts";
/// The oldest go when all together have more.
const BYTES_MAX: u64 = 4 << 30;
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

    pub async fn fetch(&self, connection: &Connection, artifact: Artifact) -> Fetched {
        let _fetching = self.fetching.lock().await;
        let path = Self::path(&self.dir, artifact);
        // What was used last goes last.
        let file = fs::File::options().append(true).open(&path);
        if file.is_ok_and(|file| file.set_modified(SystemTime::now()).is_ok()) {
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
