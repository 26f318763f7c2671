//! Where a cluster is found on this machine: the folder of `--cluster`, `STOKE_CLUSTER`, or the default one, and the credentials in it.
//! Owns folder names; never reads a key.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::failure::{Exit, Failure};

/// Names the cluster folder for every command.
pub const CLUSTER_ENV: &str = "STOKE_CLUSTER";

/// The file that makes a folder one of credentials: which cluster, and where it answers.
pub const CLUSTER_FILE: &str = "cluster.toml";

/// The folder that the commands work with, whether or not a cluster is in it.
pub fn cluster_dir(named: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(dir) = named {
        return absolute(dir);
    }
    if let Some(dir) = std::env::var_os(CLUSTER_ENV).filter(|dir| !dir.is_empty()) {
        return absolute(Path::new(&dir));
    }
    let data = std::env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .filter(|dir| dir.is_absolute())
        .or_else(|| std::env::home_dir().map(|home| home.join(".local/share")))
        .ok_or_else(|| {
            Failure::usage("no home folder to keep a cluster in")
                .help(format!("set {CLUSTER_ENV}, or give --cluster DIR"))
        })?;
    Ok(data.join("stoke/local"))
}

/// The folder with `cluster.toml`: the named one itself (`stoke login`), a coordinator's (`DIR/admin`), or a local cluster's.
pub fn credentials_dir(cluster_dir: &Path) -> Result<PathBuf, Failure> {
    for dir in [cluster_dir.to_path_buf(), cluster_dir.join("admin"), cluster_dir.join("coordinator/admin")] {
        match std::fs::metadata(dir.join(CLUSTER_FILE)) {
            Ok(file) if file.is_file() => return Ok(dir),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                return Err(Failure::from_error(Exit::Denied, error)
                    .context(format!("read the credentials in {}", dir.display()))
                    .help("run this as the user who owns the folder, or log in to a folder of your own with --cluster DIR"));
            }
            Ok(_) | Err(_) => {}
        }
    }
    Err(Failure::new(Exit::NotFound, format!("no cluster in {}", cluster_dir.display())).help(format!(
        "start one on this machine with `stoke up`, log in to one with `stoke login --join TOKEN --coordinator HOST:PORT`, \
         or name its folder with --cluster DIR or {CLUSTER_ENV}"
    )))
}

fn absolute(dir: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(dir)
        .map_err(|error| Failure::from_error(Exit::Usage, error).context(format!("resolve folder {}", dir.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_found_in_any_kind_of_folder() {
        let dir = tempfile::tempdir().unwrap();
        let missing = credentials_dir(dir.path()).unwrap_err();
        assert_eq!(missing.exit, Exit::NotFound);
        let local = dir.path().join("coordinator/admin");
        std::fs::create_dir_all(&local).unwrap();
        std::fs::write(local.join(CLUSTER_FILE), "").unwrap();
        assert_eq!(credentials_dir(dir.path()).unwrap(), local);
        std::fs::write(dir.path().join(CLUSTER_FILE), "").unwrap();
        assert_eq!(credentials_dir(dir.path()).unwrap(), dir.path());
    }
}
