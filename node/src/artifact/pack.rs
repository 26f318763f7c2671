//! Packs a folder. Owns the order and the metadata, so that the same files give the same bytes whoever packs them, when and where: names sorted, no times,
//! no owners, of the mode only whether a file is executed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use flate2::{Compression, GzBuilder};
use stoke_protocol::ids::Digest;
use stoke_protocol::spec::{ARTIFACT_BYTES_MAX, Artifact};
use tar::{Builder, EntryType, Header};

use super::ignore::Ignore;
use super::leads_inside;

const IGNORE: &str = ".stokeignore";
/// Each is a file on every node.
pub(super) const FILES_MAX: usize = 50_000;
/// Names on the way to a file. Every start walks each way: far deeper ones take minutes, and paths become too long.
pub(super) const LEVELS_MAX: usize = 128;

/// A folder that was packed, or a program.
#[derive(Debug)]
pub struct Packed {
    /// For people.
    pub what: &'static str,
    pub artifact: Artifact,
    pub bytes: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum PackError {
    #[error("{verb} {}", path.display())]
    Io {
        verb: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{}: {problem}", path.display())]
    Unfit { path: PathBuf, problem: String },
}

/// What is in a folder, and how it is written.
enum Found {
    Folder,
    File { executable: bool, bytes: u64 },
    Link(PathBuf),
}

/// Packs what is in `folder`, but for what `.stokeignore` names and for `.git`.
pub fn pack(folder: &Path) -> Result<Packed, PackError> {
    let ignore = ignore_of(folder)?;
    let (mut entries, mut bytes) = (Vec::new(), 0);
    list(folder, "", &ignore, (&mut entries, &mut bytes))?;
    // No name and no time of its own.
    let mut tar = Builder::new(GzBuilder::new().write(Vec::new(), Compression::default()));
    for (name, found) in &entries {
        let path = folder.join(name);
        append(&mut tar, name, found, &path).map_err(|source| PackError::Io { verb: "pack", path, source })?;
    }
    let packed = tar.into_inner().and_then(|mut gzip| gzip.flush().and_then(|()| gzip.finish()));
    let bytes = packed.map_err(|source| PackError::Io { verb: "pack", path: folder.into(), source })?;
    Ok(Packed { what: "folder", artifact: Artifact(Digest(*blake3::hash(&bytes).as_bytes())), bytes })
}

fn ignore_of(folder: &Path) -> Result<Ignore, PackError> {
    let path = folder.join(IGNORE);
    match fs::read_to_string(&path) {
        Ok(text) => Ignore::parse(&text).map_err(|problem| PackError::Unfit { path, problem }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Ignore::default()),
        Err(source) => Err(PackError::Io { verb: "read", path, source }),
    }
}

/// Everything below `folder`/`at` in the order of names, folders before what is in them.
fn list(
    folder: &Path,
    at: &str,
    ignore: &Ignore,
    (entries, bytes): (&mut Vec<(String, Found)>, &mut u64),
) -> Result<(), PackError> {
    let here = folder.join(at);
    let failed = |source| PackError::Io { verb: "read folder", path: here.clone(), source };
    let mut names = fs::read_dir(&here)
        .map_err(failed)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    names.sort();
    for name in names {
        let path = here.join(&name);
        let unfit = |problem: String| PackError::Unfit { path: path.clone(), problem };
        let name = name.to_str().ok_or_else(|| unfit("its name is not UTF-8: rename it".into()))?;
        let relative = if at.is_empty() { name.to_owned() } else { format!("{at}/{name}") };
        let metadata = fs::symlink_metadata(&path).map_err(|source| PackError::Io {
            verb: "look at",
            path: path.clone(),
            source,
        })?;
        if ignore.covers(&relative, metadata.is_dir()) {
            continue;
        }
        if relative.split('/').count() > LEVELS_MAX {
            return Err(unfit(format!("deeper than {LEVELS_MAX} folders: name one of them in {IGNORE}")));
        }
        let found = if metadata.is_dir() {
            Found::Folder
        } else if metadata.is_file() {
            Found::File { executable: metadata.permissions().mode() & 0o111 != 0, bytes: metadata.len() }
        } else if metadata.is_symlink() {
            let target = fs::read_link(&path).map_err(|source| PackError::Io {
                verb: "read link",
                path: path.clone(),
                source,
            })?;
            if !leads_inside(Path::new(&relative), &target) {
                let problem =
                    format!("a link out of the folder, to {}: no node has that, name it in {IGNORE}", target.display());
                return Err(unfit(problem));
            }
            Found::Link(target)
        } else {
            return Err(unfit(format!("neither a file, a folder nor a link: name it in {IGNORE}")));
        };
        let is_folder = matches!(found, Found::Folder);
        *bytes += if let Found::File { bytes, .. } = &found { *bytes } else { 0 };
        entries.push((relative.clone(), found));
        if *bytes > ARTIFACT_BYTES_MAX || entries.len() > FILES_MAX {
            let mebibytes = ARTIFACT_BYTES_MAX >> 20;
            let problem = format!(
                "the folder has more than {mebibytes} MiB or {FILES_MAX} files: name data in {IGNORE}, and let commands read it where it lies"
            );
            return Err(PackError::Unfit { path: folder.into(), problem });
        }
        if is_folder {
            list(folder, &relative, ignore, (entries, bytes))?;
        }
    }
    Ok(())
}

fn append(tar: &mut Builder<impl Write>, name: &str, found: &Found, path: &Path) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    match found {
        Found::Folder => {
            header.set_entry_type(EntryType::Directory);
            header.set_mode(0o755);
            header.set_size(0);
            tar.append_data(&mut header, name, io::empty())
        }
        Found::File { executable, bytes } => {
            header.set_entry_type(EntryType::Regular);
            header.set_mode(if *executable { 0o755 } else { 0o644 });
            header.set_size(*bytes);
            let file = io::Read::take(File::open(path)?, *bytes);
            tar.append_data(&mut header, name, Exact { file, left: *bytes })
        }
        Found::Link(target) => {
            header.set_entry_type(EntryType::Symlink);
            header.set_mode(0o777);
            header.set_size(0);
            tar.append_link(&mut header, name, target)
        }
    }
}

/// A file that has become shorter since it was looked at is an error: the header is written already.
struct Exact<R> {
    file: R,
    left: u64,
}

impl<R: io::Read> io::Read for Exact<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(into)?;
        self.left -= read as u64;
        if read == 0 && self.left > 0 && !into.is_empty() {
            return Err(io::Error::other("it has changed while it was packed"));
        }
        Ok(read)
    }
}
