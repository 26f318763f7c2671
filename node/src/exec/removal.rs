//! Removes a folder that anybody may have filled: however deep, whatever its folders forbid. Folders of folders are moved up first, so that each is removed
//! two levels below the top: no recursion, and a few descriptors. Follows no link.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, chmodat, fstat, openat, renameat, unlinkat};
use rustix::io::{Errno, Result};
use rustix::path::Arg;

/// Reading a folder again finds what its file system has skipped while entries went. More often than this, somebody is still writing there.
const PASSES_MAX: u32 = 100;

/// `path` and all that is in it; nothing there is fine. What can be removed is, also where something else cannot.
pub fn remove(path: &Path) -> io::Result<()> {
    match unlinkat(CWD, path, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let mut removal = Removal { top: open(CWD, path)?, moved: 0, problem: None };
    removal.empty_top();
    let gone = unlinkat(CWD, path, AtFlags::REMOVEDIR);
    Ok(gone.map_err(|error| removal.problem.unwrap_or(error))?)
}

struct Removal {
    top: OwnedFd,
    /// Folders that were moved up have the numbers below this as names.
    moved: u64,
    /// The first.
    problem: Option<Errno>,
}

impl Removal {
    fn empty_top(&mut self) {
        for _ in 0..PASSES_MAX {
            let mut next = self.moved;
            let mut gone = 0;
            let listed = Dir::read_from(&self.top);
            for entry in self.note(listed).into_iter().flatten() {
                let Some(entry) = self.note(entry).filter(|entry| !is_dots(entry.file_name())) else { continue };
                gone += u32::from(self.remove_from_top(entry.file_name()));
            }
            while next < self.moved {
                gone += u32::from(self.remove_from_top(next.to_string().as_str()));
                next += 1;
            }
            if gone == 0 {
                return;
            }
        }
    }

    /// Whether it is gone.
    fn remove_from_top(&mut self, name: impl Arg + Copy) -> bool {
        match unlinkat(&self.top, name, AtFlags::empty()) {
            Err(Errno::ISDIR) => {}
            other => return self.note(other).is_some(),
        }
        let opened = open(self.top.as_fd(), name);
        if let Some(folder) = self.note(opened) {
            self.empty(&folder);
        }
        let removed = unlinkat(&self.top, name, AtFlags::REMOVEDIR);
        self.note(removed).is_some()
    }

    /// Files go, folders are moved to the top.
    fn empty(&mut self, folder: &OwnedFd) {
        for _ in 0..PASSES_MAX {
            let mut gone = 0;
            let listed = Dir::read_from(folder);
            for entry in self.note(listed).into_iter().flatten() {
                let Some(entry) = self.note(entry).filter(|entry| !is_dots(entry.file_name())) else { continue };
                let done = match unlinkat(folder, entry.file_name(), AtFlags::empty()) {
                    Err(Errno::ISDIR) => self.move_up(folder.as_fd(), entry.file_name()),
                    other => other,
                };
                gone += u32::from(self.note(done).is_some());
            }
            if gone == 0 {
                return;
            }
        }
    }

    fn move_up(&mut self, folder: BorrowedFd<'_>, name: impl Arg + Copy) -> Result<()> {
        // Its entry `..` changes: that is a write to it.
        drop(open(folder, name)?);
        loop {
            let number = self.moved.to_string();
            self.moved += 1;
            match renameat(folder, name, &self.top, &number) {
                // The name is taken.
                Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
                other => return other,
            }
        }
    }

    fn note<T>(&mut self, done: Result<T>) -> Option<T> {
        // What was moved up may have been read there as well.
        done.map_err(|error| (error != Errno::NOENT).then(|| *self.problem.get_or_insert(error))).ok()
    }
}

/// A folder, which its owner may change from now on.
fn open(parent: BorrowedFd<'_>, name: impl Arg) -> Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = openat(parent, name, flags | OFlags::PATH, Mode::empty())?;
    let mode = Mode::from_raw_mode(fstat(&found)?.st_mode);
    if !mode.contains(Mode::RWXU) {
        // By its descriptor: a name may be a link by now.
        chmodat(CWD, format!("/proc/self/fd/{}", found.as_raw_fd()), mode | Mode::RWXU, AtFlags::empty())?;
    }
    openat(&found, c".", flags | OFlags::RDONLY, Mode::empty())
}

fn is_dots(name: &CStr) -> bool {
    name == c"." || name == c".."
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use rustix::fs::mkdirat;

    use super::*;

    #[test]
    fn a_folder_deeper_than_a_stack_and_a_path_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        fs::create_dir(&top).unwrap();
        let mut at = open(CWD, &top).unwrap();
        for level in 0..30_000 {
            if level % 1_000 == 0 {
                // A name that folders are given which are moved up.
                openat(&at, "0", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
            }
            mkdirat(&at, "deeper", Mode::RWXU).unwrap();
            at = open(at.as_fd(), "deeper").unwrap();
        }
        std::thread::spawn(move || remove(&top)).join().unwrap().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn folders_that_forbid_it_are_removed_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (top, outside) = (dir.path().join("top"), dir.path().join("outside"));
        for folder in [top.join("a/b/c"), top.join("a/d"), top.join("0/1"), outside.clone()] {
            fs::create_dir_all(folder).unwrap();
        }
        for file in [top.join("a/b/c/file"), top.join("1"), outside.join("file")] {
            fs::write(file, "x").unwrap();
        }
        for link in [top.join("link"), top.join("a/link"), top.join("a/b/link"), dir.path().join("link")] {
            symlink(&outside, link).unwrap();
        }
        for (folder, mode) in [("a/b/c", 0o555), ("a/b", 0o000), ("a/d", 0o555), ("a", 0o311), ("", 0o555)] {
            fs::set_permissions(top.join(folder), fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::set_permissions(&outside, fs::Permissions::from_mode(0o555)).unwrap();
        remove(&top).unwrap();
        remove(&top).unwrap();
        remove(&dir.path().join("link")).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "x");
        assert_eq!(fs::metadata(&outside).unwrap().permissions().mode() & 0o777, 0o555);
        fs::set_permissions(&outside, fs::Permissions::from_mode(0o755)).unwrap();
    }
}
