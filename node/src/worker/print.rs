//! What this process prints, cut into files that its agent reads. Owns the change from a full file to the next one; looks at nothing inside.
//! The process does it itself, because it may be without an agent: nothing between it and its files can fail, or make it wait.

use std::fs::{self, File};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;

use crate::agent::{LOG_PARTS_MAX, log_part};

/// Which file is the newest, and how large it may be. What is written between two looks comes on top.
pub struct Print {
    base: PathBuf,
    part: u64,
    bytes_max: u64,
}

impl Print {
    /// Files as of [`log_part`], of which `part` is being written.
    pub fn new(base: PathBuf, part: u64, bytes_max: u64) -> Self {
        Self { base, part, bytes_max }
    }

    /// Looks at standard output, and gives it and standard error the next file if theirs is full.
    pub fn look(&mut self) -> io::Result<()> {
        // SAFETY: this process has its standard streams from its start to its end, and these two are not closed here.
        let [mut output, mut error] = [1, 2].map(|fd| ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(fd) }));
        if let Some(next) = self.next(&*output)? {
            rustix::io::dup2(&next, &mut output)?;
            rustix::io::dup2(&next, &mut error)?;
        }
        Ok(())
    }

    /// The file after `current` if that is full. The oldest one goes.
    pub fn next(&mut self, current: impl std::os::fd::AsFd) -> io::Result<Option<File>> {
        let bytes = rustix::fs::fstat(current)?.st_size;
        if u64::try_from(bytes).unwrap_or(0) < self.bytes_max {
            return Ok(None);
        }
        let next = File::options().create(true).append(true).open(log_part(&self.base, self.part + 1))?;
        self.part += 1;
        if let Some(old) = self.part.checked_sub(LOG_PARTS_MAX) {
            let _ = fs::remove_file(log_part(&self.base, old));
        }
        Ok(Some(next))
    }
}
