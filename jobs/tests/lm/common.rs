//! What the tests share: where the real models are.

use std::path::PathBuf;

/// The folder of a model that `jobs/models/fetch.py` fetches.
pub fn model(name: &str) -> PathBuf {
    let models = std::env::var_os("STOKE_MODELS").map(PathBuf::from);
    let models = models.or_else(|| Some(std::env::home_dir()?.join(".cache/stoke/models"))).expect("a home folder");
    let folder = models.join(name);
    assert!(folder.is_dir(), "{} is not there: run `python3 jobs/models/fetch.py`, as check.sh does", folder.display());
    folder
}
