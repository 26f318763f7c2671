//! A full disk under one folder: a small file system without a byte or an entry left, laid over it. What is in the folder stays readable; nothing
//! new comes in, so nothing is lost when it is lifted. The kernel says so (`ENOSPC`), on the path that any write takes. Needs root.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::failure::Failure;

/// The overlay's own folders, the filler and some more; all that are left are used up.
const ENTRIES: usize = 16;

/// Over when this is dropped.
pub struct FullDisk {
    /// Mounted, in the order of their mounting.
    mounts: Vec<PathBuf>,
}

/// Whether this process may mount.
pub fn check_rights() -> Result<(), Failure> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Failure::usage("fill-disk needs root: it mounts a small file system over the folder of the checkpoints")
        .help("run it as root, or take it out of the schedule"))
}

impl FullDisk {
    /// Fills `folder`; `scratch` is where the small file system itself is.
    pub fn begin(folder: &Path, scratch: &Path) -> Result<Self, String> {
        let text = |path: &Path| {
            let text = path.to_str().filter(|text| !text.contains([',', ':', '\\']));
            text.map(str::to_owned).ok_or_else(|| format!("{} cannot be written in a mount's options", path.display()))
        };
        let lower = text(folder)?;
        let mut disk = Self { mounts: Vec::new() };
        let failed = |what: &str, error: std::io::Error| format!("{what} {}: {error}", scratch.display());
        fs::create_dir_all(scratch).map_err(|error| failed("create", error))?;
        disk.mount("tmpfs", &format!("size=64k,nr_inodes={ENTRIES},mode=0700"), scratch)?;
        let (upper, work) = (scratch.join("upper"), scratch.join("work"));
        fs::create_dir(&upper)
            .and_then(|()| fs::create_dir(&work))
            .map_err(|error| failed("create folders in", error))?;
        fill(&scratch.join("filler")).map_err(|error| failed("fill", error))?;
        let options = format!("lowerdir={lower},upperdir={},workdir={}", text(&upper)?, text(&work)?);
        disk.mount("overlay", &options, folder)?;
        (0..ENTRIES).for_each(|entry| drop(File::create(scratch.join(format!("entry-{entry}")))));
        Ok(disk)
    }

    fn mount(&mut self, kind: &str, options: &str, at: &Path) -> Result<(), String> {
        let failed = |why: &str| format!("mount {kind} at {}: {}", at.display(), why.trim());
        let mounted = Command::new("mount").args(["-t", kind, "-o", options, kind]).arg(at).output();
        let mounted = mounted.map_err(|error| failed(&error.to_string()))?;
        if !mounted.status.success() {
            return Err(failed(&String::from_utf8_lossy(&mounted.stderr)));
        }
        self.mounts.push(at.to_owned());
        Ok(())
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        for at in self.mounts.iter().rev() {
            // Also from under a process that has a file open there.
            let _ = Command::new("umount").arg("-l").arg(at).status();
        }
    }
}

/// Takes every byte that is left.
fn fill(path: &Path) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    for block in [4096, 1] {
        while file.write_all(&vec![0; block]).is_ok() {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_takes_nothing_shows_what_was_there_and_loses_nothing() {
        if check_rights().is_err() {
            eprintln!("not checked: mounting needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (folder, scratch) = (dir.path().join("job-1"), dir.path().join("full-disk"));
        fs::create_dir_all(folder.join("step-1")).unwrap();
        fs::write(folder.join("step-1/shard"), "whole").unwrap();
        match FullDisk::begin(&folder, &scratch) {
            Ok(full) => {
                for error in [fs::create_dir(folder.join("step-2")), fs::write(folder.join("step-1/new"), "x")] {
                    assert_eq!(error.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
                }
                assert_eq!(fs::read_to_string(folder.join("step-1/shard")).unwrap(), "whole");
                drop(full);
            }
            Err(why) => return eprintln!("not checked: {why}"),
        }
        fs::create_dir(folder.join("step-2")).unwrap();
        let names = fs::read_dir(&folder).unwrap().count();
        assert_eq!(names, 2);
        fs::remove_dir(scratch).expect("nothing is mounted there any more");
    }
}
