//! The coordinator's folder: made at the first start, opened at every other. Owns the layout; the journal's file is its own.
//!
//! ```text
//! ca/           the cluster's authority (0700): who has its key can be anyone in the cluster
//! identity/     the coordinator's own credentials
//! admin/        credentials of the user "admin" with cluster.toml: what the command line uses on this machine
//! checkpoints/  where jobs keep theirs unless they say otherwise
//! journal.redb, lock, ballast
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use stoke_protocol::identity::{
    Authority, AuthorityError, Credentials, CredentialsError, KeyRequest, Subject, UserRole,
};
use stoke_protocol::ids::ClusterId;

use crate::config::Lifetimes;

const AUTHORITY_DIR: &str = "ca";
const IDENTITY_DIR: &str = "identity";
const ADMIN_DIR: &str = "admin";
const CHECKPOINTS_DIR: &str = "checkpoints";
const CLUSTER_FILE: &str = "cluster.toml";
/// The user that the first start makes.
pub(crate) const ADMIN: &str = "admin";

/// `cluster.toml`: what a client needs beside its key.
#[derive(serde::Serialize)]
struct ClusterFile<'a> {
    cluster: String,
    coordinator: &'a [String],
}

/// What a folder holds besides the journal.
pub(crate) struct Folder {
    dir: PathBuf,
    pub authority: Arc<Authority>,
    pub credentials: Credentials,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum SetupError {
    #[error("{action} {}", path.display())]
    File { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

/// Makes the folder itself, for its owner only.
pub(crate) fn make_dir(dir: &Path) -> Result<(), SetupError> {
    let failed = |action| move |source| SetupError::File { action, path: dir.to_owned(), source };
    if dir.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(dir).map_err(failed("create"))?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(failed("set permissions of"))
}

impl Folder {
    /// Opens what is there and makes what is not. The journal's lock is held by now, so that no two processes make an authority.
    pub fn open(dir: &Path, lifetimes: &Lifetimes) -> Result<Self, SetupError> {
        let authority = dir.join(AUTHORITY_DIR);
        let authority = if authority.join("ca.key").exists() {
            Authority::open(&authority)?
        } else {
            Authority::create(&authority)?
        };
        let ttl = Duration::from_secs(lifetimes.coordinator_s);
        let credentials = current(&authority, &dir.join(IDENTITY_DIR), &Subject::Coordinator, ttl)?;
        let checkpoints = dir.join(CHECKPOINTS_DIR);
        let failed = |source| SetupError::File { action: "create", path: checkpoints.clone(), source };
        fs::create_dir_all(&checkpoints).map_err(failed)?;
        Ok(Self { dir: dir.to_owned(), authority: Arc::new(authority), credentials })
    }

    /// Where jobs keep their checkpoints unless told otherwise.
    pub fn checkpoints(&self) -> Result<String, SetupError> {
        let path = self.dir.join(CHECKPOINTS_DIR);
        let failed = |source| SetupError::File { action: "find", path: path.clone(), source };
        Ok(format!("file://{}", path.canonicalize().map_err(failed)?.display()))
    }

    /// Credentials of the admin, fresh if they are about to end, with the addresses that answer now.
    pub fn write_admin(&self, lifetimes: &Lifetimes, addresses: &[String]) -> Result<(), SetupError> {
        let dir = self.dir.join(ADMIN_DIR);
        let subject = Subject::user(UserRole::Admin, ADMIN).expect("the name is one");
        current(&self.authority, &dir, &subject, Duration::from_secs(lifetimes.user_s))?;
        let file = ClusterFile { cluster: self.authority.cluster().to_string(), coordinator: addresses };
        let text = toml::to_string(&file).expect("strings are TOML");
        let (path, new) = (dir.join(CLUSTER_FILE), dir.join(format!("{CLUSTER_FILE}.new")));
        let failed = |source| SetupError::File { action: "write", path: path.clone(), source };
        fs::write(&new, text).and_then(|()| fs::rename(&new, &path)).map_err(failed)
    }

    pub fn identity_dir(&self) -> PathBuf {
        self.dir.join(IDENTITY_DIR)
    }

    pub fn cluster(&self) -> ClusterId {
        self.authority.cluster()
    }
}

/// Loads credentials, makes them if there are none, and renews them when it is time. Renewing keeps the reset key: peers of a process that
/// died learn at once that it has a successor.
fn current(authority: &Authority, dir: &Path, subject: &Subject, ttl: Duration) -> Result<Credentials, SetupError> {
    let held = match Credentials::load(dir) {
        Ok(held) if held.ca_hash() == authority.ca_hash() => Some(held),
        // Of an authority that was replaced.
        Ok(_) | Err(CredentialsError::Absent { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let Some(credentials) = held else {
        let credentials = authority.credentials(subject, ttl)?;
        credentials.save(dir)?;
        return Ok(credentials);
    };
    if SystemTime::now() >= credentials.renew_at() {
        renew(authority, &credentials, subject, ttl)?;
        credentials.save(dir)?;
    }
    Ok(credentials)
}

/// A fresh key and certificate for the same subject.
pub(crate) fn renew(
    authority: &Authority,
    credentials: &Credentials,
    subject: &Subject,
    ttl: Duration,
) -> Result<(), SetupError> {
    let request = KeyRequest::new()?;
    let issued = authority.issue(request.csr(), subject, ttl)?;
    Ok(credentials.renew(request, &issued.certificate)?)
}
