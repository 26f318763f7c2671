//! The coordinator's folder: made at the first start, opened at every other. Owns the layout; the journal's file is its own.
//!
//! ```text
//! ca/           the cluster's authority (0700): who has its key can be anyone in the cluster
//! identity/     the coordinator's own credentials
//! admin/        credentials of the user "admin" with cluster.toml: what the command line uses on this machine
//! checkpoints/  where jobs keep theirs unless they say otherwise
//! journal.redb, tail, lock, ballast
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
use crate::journal::JOURNAL_FILE;

const AUTHORITY_DIR: &str = "ca";
/// The two files of the authority.
const AUTHORITY_FILES: [&str; 2] = ["ca.key", "ca.pem"];
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
    #[serde(skip_serializing_if = "Option::is_none")]
    api: Option<&'a str>,
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
    /// Starting without it would be another cluster under the old one's name, or with its certificates (I5, I6).
    #[error("{} is missing, and the cluster in {} was founded with it: restore the folder from a backup; for a new cluster use an empty folder", path.display(), dir.display())]
    Lost { dir: PathBuf, path: PathBuf },
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

/// The journal is made before the authority, so that an authority without a journal is a folder that has lost one. Looks at the authority
/// first: another process may be making both.
pub(crate) fn check_journal(dir: &Path) -> Result<(), SetupError> {
    let authority = dir.join(AUTHORITY_DIR);
    if !AUTHORITY_FILES.iter().any(|file| authority.join(file).exists()) {
        return Ok(());
    }
    let path = dir.join(JOURNAL_FILE);
    match fs::metadata(&path) {
        Ok(found) if found.len() > 0 => Ok(()),
        Ok(_) | Err(_) => Err(SetupError::Lost { dir: dir.to_owned(), path }),
    }
}

/// A journal that names its cluster was written under an authority: one is never made beside it.
pub(crate) fn check_authority(dir: &Path, founded: Option<ClusterId>) -> Result<(), SetupError> {
    let files = AUTHORITY_FILES.map(|file| dir.join(AUTHORITY_DIR).join(file));
    match files.into_iter().find(|path| !path.exists()) {
        Some(path) if founded.is_some() => Err(SetupError::Lost { dir: dir.to_owned(), path }),
        Some(_) | None => Ok(()),
    }
}

impl Folder {
    /// Opens what is there and makes what is not. The journal's lock is held by now, so that no two processes make an authority.
    pub fn open(dir: &Path, lifetimes: &Lifetimes) -> Result<Self, SetupError> {
        let authority = dir.join(AUTHORITY_DIR);
        let authority = if authority.join(AUTHORITY_FILES[0]).exists() {
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
    pub fn write_admin(
        &self,
        lifetimes: &Lifetimes,
        addresses: &[String],
        api: Option<&str>,
    ) -> Result<(), SetupError> {
        let dir = self.dir.join(ADMIN_DIR);
        let subject = Subject::user(UserRole::Admin, ADMIN).expect("the name is one");
        current(&self.authority, &dir, &subject, Duration::from_secs(lifetimes.user_s))?;
        let file = ClusterFile { cluster: self.authority.cluster().to_string(), coordinator: addresses, api };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_lost_a_part_is_refused_and_keeps_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, ca) = (dir.path().join(JOURNAL_FILE), dir.path().join(AUTHORITY_DIR));
        check_journal(dir.path()).unwrap();
        let authority = Authority::create(&ca).unwrap();
        let lost = |result: Result<(), SetupError>| match result.unwrap_err() {
            SetupError::Lost { path, .. } => path,
            other => panic!("{other}"),
        };
        assert_eq!(lost(check_journal(dir.path())), journal);
        fs::write(&journal, "").unwrap();
        assert_eq!(lost(check_journal(dir.path())), journal);
        fs::write(&journal, "records").unwrap();
        check_journal(dir.path()).unwrap();
        let founded = Some(authority.cluster());
        check_authority(dir.path(), founded).unwrap();
        for file in AUTHORITY_FILES {
            let (path, aside) = (ca.join(file), dir.path().join("aside"));
            fs::rename(&path, &aside).unwrap();
            assert_eq!(lost(check_authority(dir.path(), founded)), path);
            // A first start that was cut short founded nothing.
            check_authority(dir.path(), None).unwrap();
            fs::rename(&aside, &path).unwrap();
        }
    }
}
