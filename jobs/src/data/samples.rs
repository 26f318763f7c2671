//! Samples of a data set as bytes, one behind the other: in memory as long as they are few, else in a file of this process that has no name, of which the
//! kernel keeps in memory what is asked for and there is room for. Knows nothing of what the bytes mean.

use std::fs::File;
use std::io::{self, Write};

use memmap2::{Advice, Mmap};

/// Bytes of a set that are kept in memory; what is beyond goes to a file. The variable says another number: tests do.
const HELD_MAX: usize = 256 << 20;
const HELD_VARIABLE: &str = "STOKE_SAMPLES_HELD_BYTES";

/// Written to the file at a time, once there is one.
const WRITE_BYTES: usize = 8 << 20;

/// See the module.
pub(crate) struct Samples {
    /// Where each ends.
    ends: Vec<u64>,
    bytes: Bytes,
}

enum Bytes {
    Held(Vec<u8>),
    Filed(Mmap),
}

/// On a disk, where `/tmp` may be memory; where that cannot be written, as in containers, in `/tmp`.
fn unnamed_file() -> io::Result<File> {
    let large = if std::env::var_os("TMPDIR").is_none() { tempfile::tempfile_in("/var/tmp").ok() } else { None };
    large.map_or_else(tempfile::tempfile, Ok)
}

/// Samples on their way into a set.
pub(super) struct Packer {
    ends: Vec<u64>,
    /// What is not in the file.
    held: Vec<u8>,
    held_max: usize,
    file: Option<File>,
    filed: u64,
}

impl Samples {
    #[cfg(test)]
    pub fn of<const N: usize>(samples: [Vec<u8>; N]) -> Self {
        let mut packer = Packer::new();
        samples.iter().for_each(|sample| packer.push(sample).expect("pushed"));
        packer.finish().expect("finished")
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// # Panics
    /// When there is no such sample.
    pub fn get(&self, at: usize) -> &[u8] {
        let start = at.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes()[start as usize..self.ends[at] as usize]
    }

    /// Of samples that begin with a label: it, and the rest.
    pub fn labelled(&self, at: usize) -> (u8, &[u8]) {
        let (label, rest) = self.get(at).split_first().expect("a sample that begins with its label");
        (*label, rest)
    }

    /// Labels and the rests of all, `size` at a time.
    pub fn batches(&self, size: usize) -> impl Iterator<Item = (Vec<u8>, Vec<&[u8]>)> {
        let starts = (0..self.len()).step_by(size);
        starts.map(move |start| (start..(start + size).min(self.len())).map(|at| self.labelled(at)).unzip())
    }

    /// All samples as they lie.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Held(bytes) => bytes,
            Bytes::Filed(bytes) => bytes,
        }
    }
}

impl Packer {
    pub fn new() -> Self {
        let set = std::env::var(HELD_VARIABLE).ok().and_then(|bytes| bytes.parse().ok());
        Self { ends: Vec::new(), held: Vec::new(), held_max: set.unwrap_or(HELD_MAX), file: None, filed: 0 }
    }

    pub fn push(&mut self, sample: &[u8]) -> io::Result<()> {
        if self.held.len() + sample.len() > self.held_max {
            self.write()?;
        }
        self.held.extend_from_slice(sample);
        self.ends.push(self.filed + self.held.len() as u64);
        Ok(())
    }

    /// An error is of the folder for temporary files.
    pub fn finish(mut self) -> io::Result<Samples> {
        self.ends.shrink_to_fit();
        if self.file.is_none() {
            self.held.shrink_to_fit();
            return Ok(Samples { ends: self.ends, bytes: Bytes::Held(self.held) });
        }
        self.write()?;
        let file = self.file.take().expect("looked at above");
        // SAFETY: the file has no name, so that nobody else opens, writes or cuts it, and this process does so no more.
        let map = unsafe { Mmap::map(&file)? };
        // Samples are asked for in no order: what lies beside them is not read for nothing.
        map.advise(Advice::Random)?;
        Ok(Samples { ends: self.ends, bytes: Bytes::Filed(map) })
    }

    fn write(&mut self) -> io::Result<()> {
        if self.file.is_none() {
            self.file = Some(unnamed_file()?);
            self.held_max = self.held_max.min(WRITE_BYTES);
        }
        let file = self.file.as_mut().expect("made above");
        file.write_all(&self.held)?;
        self.filed += self.held.len() as u64;
        self.held.clear();
        self.held.shrink_to(WRITE_BYTES);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_what_was_pushed_wherever_they_are_kept() {
        let samples: Vec<Vec<u8>> = (0..200u8).map(|at| vec![at; usize::from(at) % 17]).collect();
        for held_max in [0, 1, 16, 100, 1 << 20] {
            let mut packer = Packer { held_max, ..Packer::new() };
            samples.iter().for_each(|sample| packer.push(sample).expect("pushed"));
            let set = packer.finish().expect("finished");
            assert_eq!(matches!(set.bytes, Bytes::Filed(_)), held_max < 1 << 20);
            assert_eq!(set.len(), samples.len());
            assert!(samples.iter().enumerate().all(|(at, sample)| set.get(at) == sample));
            assert_eq!(set.labelled(18), (18, &[][..]));
            assert_eq!(set.bytes(), samples.concat());
        }
        assert_eq!(Packer::new().finish().expect("finished").len(), 0);
    }
}
