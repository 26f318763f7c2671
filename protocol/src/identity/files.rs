//! Private files: written whole or not at all, readable by their owner only. Owns the permissions; knows nothing of what is inside.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Keys and chains are a few KiB; a larger file is not one of ours.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// A file that could not be used, by name.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("{verb} {}", path.display())]
    Io {
        verb: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} can be read by other users (mode {mode:03o}): run chmod 600 on it, and renew it if others may have copied it", path.display())]
    TooOpen { path: PathBuf, mode: u32 },
    #[error("{} is over {FILE_BYTES_MAX} bytes: not a key or certificate of stoke", path.display())]
    TooLarge { path: PathBuf },
    #[error("{} holds no {label} in PEM form: the file is damaged or of another program", path.display())]
    Missing { path: PathBuf, label: &'static str },
}

fn io_error(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError::Io { verb, path, source }
}

/// Makes the folder, if it is not there, for its owner only.
pub(super) fn create_dir(dir: &Path) -> Result<(), FileError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error("create folder", dir))?;
    fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(io_error("restrict folder", dir))
}

/// Replaces the file in one step (write beside, sync, rename, sync the folder): a crash leaves the old file or the new one.
pub(super) fn replace(path: &Path, contents: &[u8]) -> Result<(), FileError> {
    let temporary = path.with_extension(format!("new-{}", std::process::id()));
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(io_error("create", &temporary))?;
    file.write_all(contents).and_then(|()| file.sync_all()).map_err(io_error("write", &temporary))?;
    fs::rename(&temporary, path).map_err(io_error("replace", path))?;
    sync_folder(path)
}

/// Writes a file that must not exist yet.
pub(super) fn create(path: &Path, contents: &[u8]) -> Result<(), FileError> {
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io_error("create", path))?;
    file.write_all(contents).and_then(|()| file.sync_all()).map_err(io_error("write", path))?;
    sync_folder(path)
}

/// Reads a file that holds a private key: one that others can read is refused.
pub(super) fn read_private(path: &Path) -> Result<String, FileError> {
    let file = File::open(path).map_err(io_error("open", path))?;
    let mode = file.metadata().map_err(io_error("inspect", path))?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(FileError::TooOpen { path: path.to_owned(), mode });
    }
    read_all(file, path)
}

/// Reads a file that anyone may see.
pub(super) fn read(path: &Path) -> Result<String, FileError> {
    read_all(File::open(path).map_err(io_error("open", path))?, path)
}

fn read_all(file: File, path: &Path) -> Result<String, FileError> {
    let mut text = String::new();
    let read = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(io_error("read", path))?;
    if read as u64 > FILE_BYTES_MAX {
        return Err(FileError::TooLarge { path: path.to_owned() });
    }
    Ok(text)
}

fn sync_folder(path: &Path) -> Result<(), FileError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error("sync folder", folder))
}

/// The contents of each PEM block with this label, in order; at least one.
pub(super) fn pem_blocks(text: &str, label: &'static str, path: &Path) -> Result<Vec<Vec<u8>>, FileError> {
    let missing = || FileError::Missing { path: path.to_owned(), label };
    let blocks: Vec<Vec<u8>> = pem::parse_many(text)
        .map_err(|_| missing())?
        .into_iter()
        .filter(|block| block.tag() == label)
        .map(pem::Pem::into_contents)
        .collect();
    if blocks.is_empty() { Err(missing()) } else { Ok(blocks) }
}

/// One PEM block.
pub(super) fn to_pem(label: &str, contents: &[u8]) -> String {
    let lines = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new(label, contents), lines)
}
