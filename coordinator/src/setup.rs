//! The coordinator's folder: made on the first start, checked on every other. Owns its layout and permissions:
//! ```text
//! DIR/ca/            the cluster's authority: whoever reads it can be anybody
//! DIR/identity/      the coordinator's own key; stable, so that peers of a restarted coordinator are told at once
//! DIR/admin/         credentials of the first user, with cluster.toml: what the command line uses on this machine
//! DIR/checkpoints/   where jobs keep checkpoints that name no other place
//! DIR/journal.redb   the state
//! ```

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;
use stoke_protocol::identity::{Authority, AuthorityError, Credentials, CredentialsError, Subject, UserRole};

use crate::config::{Config, MEMBER_CERTIFICATE_TTL, OWN_CERTIFICATE_TTL};

/// The name of the first user.
pub const ADMIN: &str = "admin";

/// What the folder gives to a start.
pub struct Folder {
    pub authority: Authority,
    /// The coordinator's own credentials.
    pub identity: Credentials,
    /// URI of the default place of checkpoints.
    pub checkpoints: String,
}

#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error("prepare folder {path}", path = path.display())]
    Folder {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("open the cluster's authority")]
    Authority(#[from] AuthorityError),
    #[error("prepare credentials")]
    Credentials(#[from] CredentialsError),
}

/// `cluster.toml`: what a client needs beside its key.
#[derive(Serialize)]
struct ClusterFile<'a> {
    cluster: String,
    coordinator: &'a [String],
}

/// Makes or opens the folder. The caller holds the journal's lock already, so nobody else does the same.
pub fn open(config: &Config) -> Result<Folder, SetupError> {
    let ca = config.dir.join("ca");
    let authority = if ca.join("ca.key").exists() { Authority::open(&ca)? } else { Authority::create(&ca)? };
    let identity = own_identity(&authority, &config.dir.join("identity"))?;
    let checkpoints = match &config.checkpoints {
        Some(uri) => uri.trim_end_matches('/').to_owned(),
        None => {
            let folder = config.dir.join("checkpoints");
            private_dir(&folder)?;
            let folder = folder.canonicalize().map_err(|cause| SetupError::Folder { path: folder.clone(), cause })?;
            format!("file://{}", folder.display())
        }
    };
    Ok(Folder { authority, identity, checkpoints })
}

/// Puts fresh admin credentials and the address into `DIR/admin`; called when the address is known.
pub fn publish(config: &Config, authority: &Authority, address: SocketAddr) -> Result<(), SetupError> {
    let dir = config.dir.join("admin");
    let usable = Credentials::load(&dir)
        .is_ok_and(|held| held.ca_hash() == authority.ca_hash() && held.renew_at() > SystemTime::now());
    if !usable {
        let admin = Subject::user(UserRole::Admin, ADMIN).expect("the admin's name is a valid one");
        authority.credentials(&admin, MEMBER_CERTIFICATE_TTL)?.save(&dir)?;
    }
    let advertised =
        if config.advertise.is_empty() { vec![reachable(address).to_string()] } else { config.advertise.clone() };
    let file = ClusterFile { cluster: authority.cluster().to_string(), coordinator: &advertised };
    let text = toml::to_string(&file).expect("strings are TOML");
    let path = dir.join("cluster.toml");
    fs::write(&path, text).map_err(|cause| SetupError::Folder { path, cause })
}

/// Makes the folder itself, for the owner only. Before the journal is opened in it.
pub fn private_dir(path: &Path) -> Result<(), SetupError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o700)))
        .map_err(|cause| SetupError::Folder { path: path.to_owned(), cause })
}

/// The coordinator's key from an earlier start while its certificate has most of its life left, else a new one.
fn own_identity(authority: &Authority, dir: &Path) -> Result<Credentials, SetupError> {
    if let Ok(held) = Credentials::load(dir)
        && held.ca_hash() == authority.ca_hash()
        && held.renew_at() > SystemTime::now()
    {
        return Ok(held);
    }
    let fresh = authority.credentials(&Subject::Coordinator, OWN_CERTIFICATE_TTL)?;
    fresh.save(dir)?;
    Ok(fresh)
}

/// An address that a client of this machine can dial: a wildcard means loopback to it.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => SocketAddr::from(([127, 0, 0, 1], v4.port())),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, v6.port())),
        other => other,
    }
}
