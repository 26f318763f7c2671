//! Files by path or by URI, and patterns of them. Owns what reaches object stores: whoever runs trainers gives it, for there is no network here.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use flate2::read::MultiGzDecoder;

use crate::JobError;

/// A file that can be read at any place.
pub trait ReadAt: Send + Sync {
    fn bytes(&self) -> u64;

    /// Fills `into` from byte `at` on; an error where the file ends before.
    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()>;
}

/// Object stores.
pub trait Stores: Send + Sync {
    /// An object by its URI (`s3://bucket/folder/name`).
    fn open(&self, uri: &str) -> io::Result<Arc<dyn ReadAt>>;

    /// Names of the objects directly in a folder, by its URI.
    fn list(&self, folder: &str) -> io::Result<Vec<String>>;
}

static STORES: OnceLock<Box<dyn Stores>> = OnceLock::new();

/// What this process reads object stores by, from now on. The first one counts.
pub fn read_stores_by(stores: Box<dyn Stores>) {
    let _ = STORES.set(stores);
}

fn stores() -> io::Result<&'static dyn Stores> {
    STORES.get().map(|stores| &**stores).ok_or_else(|| io::Error::other("this program reaches no object store"))
}

/// Whether it is in an object store.
pub(super) fn is_remote(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.contains("://"))
}

/// Whether its store is one that can be reached at all.
pub(super) fn check_store(path: &Path) -> Result<(), JobError> {
    let scheme = path.to_str().and_then(|path| path.split_once("://")).map_or("", |(scheme, _)| scheme);
    if ["file", "s3", "az", "gs"].contains(&scheme) {
        return Ok(());
    }
    let problem = format!("{scheme}:// is no store that is known: use file:///, s3://, az:// or gs://");
    Err(JobError::Data { path: path.into(), problem })
}

/// The files of a pattern, in the order of their names; of a path that is none, itself.
pub(super) fn expanded(path: &Path) -> Result<Vec<PathBuf>, JobError> {
    let folders = path.to_str().and_then(|path| path.rsplit_once('/')).map_or("", |(folders, _)| folders);
    if folders.contains('*') {
        let problem = "* stands for a part of a file's name, and not of a folder's".to_owned();
        return Err(JobError::Data { path: path.into(), problem });
    }
    let Some((folder, pattern)) =
        path.to_str().and_then(|path| path.rsplit_once('/')).filter(|(_, name)| name.contains('*'))
    else {
        return Ok(vec![path.to_owned()]);
    };
    let failed = |source| JobError::File { path: path.into(), source };
    let names = match is_remote(path) {
        true => stores().and_then(|stores| stores.list(folder)).map_err(failed)?,
        false => names_in(Path::new(if folder.is_empty() { "/" } else { folder })).map_err(failed)?,
    };
    let mut names: Vec<String> = names.into_iter().filter(|name| fits(name, pattern)).collect();
    if names.is_empty() {
        let problem = format!("no file fits this pattern: none of {folder}/ is named {pattern}");
        return Err(JobError::Data { path: path.into(), problem });
    }
    names.sort();
    Ok(names.into_iter().map(|name| PathBuf::from(format!("{folder}/{name}"))).collect())
}

fn names_in(folder: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        names.extend(entry?.file_name().into_string().ok());
    }
    Ok(names)
}

/// `*` stands for any characters.
fn fits(name: &str, pattern: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    // The first place of each part leaves most for those behind it.
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

pub(super) fn open(path: &Path) -> Result<Arc<dyn ReadAt>, JobError> {
    let opened = match path.to_str().filter(|_| is_remote(path)) {
        Some(uri) => stores().and_then(|stores| stores.open(uri)),
        None => Local::open(path).map(|file| Arc::new(file) as Arc<dyn ReadAt>),
    };
    opened.map_err(|source| JobError::File { path: path.into(), source })
}

/// Its unpacked bytes from the first one on.
pub(super) fn open_packed(path: &Path) -> Result<Box<dyn Read>, JobError> {
    let bytes: Box<dyn Read> = match is_remote(path) {
        true => Box::new(BufReader::with_capacity(1 << 20, Reader::new(open(path)?))),
        // As it comes: it may be a pipe.
        false => Box::new(File::open(path).map_err(|source| JobError::File { path: path.into(), source })?),
    };
    let is_packed = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gz"));
    Ok(if is_packed { Box::new(MultiGzDecoder::new(bytes)) } else { bytes })
}

/// A file of this machine.
struct Local {
    file: File,
    bytes: u64,
}

impl Local {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let found = file.metadata()?;
        if found.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        Ok(Self { bytes: found.len(), file })
    }
}

impl ReadAt for Local {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, at)
    }
}

/// From a place on to the end.
pub(super) struct Reader {
    file: Arc<dyn ReadAt>,
    at: u64,
}

impl Reader {
    pub fn new(file: Arc<dyn ReadAt>) -> Self {
        Self { file, at: 0 }
    }
}

impl Read for Reader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.file.bytes().saturating_sub(self.at).min(into.len() as u64) as usize;
        self.file.read_at(self.at, &mut into[..left])?;
        self.at += left as u64;
        Ok(left)
    }
}

impl Seek for Reader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.file.bytes().checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = to.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_stand_for_files_in_the_order_of_their_names() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for name in ["b-2.csv", "b-10.csv", "a.csv", "b-1.txt", "b-.csv"] {
            std::fs::write(folder.path().join(name), name).expect("written");
        }
        let found = |pattern: &str| -> Vec<String> {
            let found = expanded(&folder.path().join(pattern)).expect("files");
            found.iter().map(|path| path.file_name().expect("a name").to_string_lossy().into_owned()).collect()
        };
        assert_eq!(found("b-*.csv"), ["b-.csv", "b-10.csv", "b-2.csv"]);
        assert_eq!(found("*-*1*"), ["b-1.txt", "b-10.csv"]);
        assert_eq!(found("none.csv"), ["none.csv"]);
        let error = expanded(&folder.path().join("c*.csv")).expect_err("no such file").to_string();
        assert!(error.contains("no file fits this pattern") && error.ends_with("is named c*.csv"), "{error}");
    }

    #[test]
    fn stars_stand_for_any_characters_in_any_number() {
        for (pattern, name, expected) in [
            ("a*b", "ab", true),
            ("a*b", "axxb", true),
            ("a*b", "axxbc", false),
            ("*", "", true),
            ("a*a", "a", false),
            ("*ab*ab", "ab", false),
            ("*ab*ab", "xababyab", true),
            ("**.csv", "\u{e9}.csv", true),
        ] {
            assert_eq!(fits(name, pattern), expected, "{pattern} {name}");
        }
        assert!(!fits(&"a".repeat(200), &("*a".repeat(80) + "*b")));
    }

    #[test]
    fn a_reader_goes_where_it_is_sent() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a");
        std::fs::write(&path, b"0123456789").expect("written");
        let mut reader = Reader::new(open(&path).expect("a file"));
        let mut text = String::new();
        assert_eq!(reader.seek(SeekFrom::End(-3)).expect("there"), 7);
        reader.read_to_string(&mut text).expect("read");
        assert_eq!(text, "789");
        assert!(reader.seek(SeekFrom::Current(-11)).is_err());
        assert_eq!(reader.seek(SeekFrom::Start(20)).and_then(|_| reader.read(&mut [0])).expect("nothing"), 0);
        assert!(open(folder.path()).is_err());
    }
}
