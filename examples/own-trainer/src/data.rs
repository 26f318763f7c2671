//! Reads a novel: chapters of plain text, each under a line `CHAPTER ...`. Owns which chapters are held out, how the text is cut into samples, and what
//! simple models make of it, for comparison.

use std::io::Write;
use std::path::PathBuf;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde::Deserialize;
use stoke_jobs::{JobError, Spec};

/// `[data]`. `train` is a key whose path `stoke` makes absolute.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    train: PathBuf,
    #[serde(default = "held_out_every")]
    held_out_every: usize,
}

fn held_out_every() -> usize {
    10
}

impl Data {
    pub fn check(&self, spec: &Spec<'_>) -> Result<(), JobError> {
        match self.held_out_every {
            0 | 1 => {
                Err(spec.mistake("data", "held_out_every", "held_out_every is below 2", "write a number such as 10"))
            }
            _ => Ok(()),
        }
    }
}

/// A text cut into windows of `context` bytes and the one that follows, one behind the other.
pub struct Windows {
    text: Vec<u8>,
    context: usize,
}

impl Windows {
    pub fn count(&self) -> u64 {
        (self.text.len().saturating_sub(1) / self.context) as u64
    }

    /// `context + 1` bytes: each but the last is followed by what is to be predicted.
    pub fn window(&self, index: u64) -> &[u8] {
        let start = index as usize * self.context;
        &self.text[start..=start + self.context]
    }
}

pub struct Prose {
    pub train: Windows,
    pub held: Windows,
}

impl Prose {
    pub fn read(data: &Data, context: usize) -> Result<Self, JobError> {
        let path = &data.train;
        let text = std::fs::read(path).map_err(|source| JobError::File { path: path.clone(), source })?;
        let (mut train, mut held) = (Vec::new(), Vec::new());
        for (number, chapter) in (1..).zip(chapters(&text)) {
            if number % data.held_out_every == 0 { &mut held } else { &mut train }.extend_from_slice(chapter);
        }
        let prose = Self { train: Windows { text: train, context }, held: Windows { text: held, context } };
        for (windows, which) in [(&prose.train, "train on"), (&prose.held, "hold out")] {
            if windows.count() == 0 {
                let problem = format!("too few chapters (lines that begin with CHAPTER) to {which}");
                return Err(JobError::Data { path: path.clone(), problem });
            }
        }
        Ok(prose)
    }

    /// Bits a byte of a model that knows the byte before, counted in the training text; what was never seen counts as seen once.
    pub fn bigram_bits(&self) -> f64 {
        let mut counts = vec![[1u32; 256]; 256];
        for pair in self.train.text.windows(2) {
            counts[usize::from(pair[0])][usize::from(pair[1])] += 1;
        }
        let totals: Vec<u32> = counts.iter().map(|row| row.iter().sum()).collect();
        let bits = self.held.text.windows(2).map(|pair| {
            let before = usize::from(pair[0]);
            -(f64::from(counts[before][usize::from(pair[1])]) / f64::from(totals[before])).log2()
        });
        bits.sum::<f64>() / (self.held.text.len() - 1) as f64
    }

    /// Bits a byte of the held-out text as gzip packs it.
    pub fn gzip_bits(&self) -> f64 {
        let mut packed = GzEncoder::new(Vec::new(), Compression::best());
        packed.write_all(&self.held.text).expect("memory takes every byte");
        let packed = packed.finish().expect("memory takes every byte");
        8.0 * packed.len() as f64 / self.held.text.len() as f64
    }
}

/// The text from each heading to the next.
fn chapters(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let heading = b"CHAPTER ";
    let is_heading = |at: &usize| text[*at..].starts_with(heading) && (*at == 0 || text[at - 1] == b'\n');
    let starts: Vec<usize> = (0..text.len()).filter(is_heading).collect();
    let ends: Vec<usize> = starts.iter().skip(1).copied().chain([text.len()]).collect();
    starts.into_iter().zip(ends).map(move |(start, end)| &text[start..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chapters_begin_at_their_headings() {
        let text = b"preface\nCHAPTER 1. a\nno CHAPTER here\nCHAPTER 2. b\n";
        let found: Vec<&[u8]> = chapters(text).collect();
        assert_eq!(found, [&b"CHAPTER 1. a\nno CHAPTER here\n"[..], b"CHAPTER 2. b\n"]);
    }

    #[test]
    fn windows_follow_each_other_and_share_the_byte_between() {
        let windows = Windows { text: b"abcdefgh".to_vec(), context: 3 };
        assert_eq!(windows.count(), 2);
        assert_eq!((windows.window(0), windows.window(1)), (&b"abcd"[..], &b"defg"[..]));
    }
}
