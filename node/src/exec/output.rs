//! What a command prints, line by line into the log of its rank, and the last lines of its standard error, for whoever asks why it failed. Owns the pipes:
//! the log changes its file now and then, which a command that wrote there itself would not see.

use std::collections::VecDeque;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

/// A longer line is written in pieces.
const LINE_BYTES_MAX: usize = 64 * 1024;
/// Last lines, and of each so much: they stand in the job's reason.
const LAST_LINES: usize = 5;
const LAST_CHARS_MAX: usize = 300;
/// Nothing of the command is left, so its pipes are at their end, unless somebody else was given them.
const CLOSE_MAX: Duration = Duration::from_secs(1);

/// The read ends.
pub struct Output {
    last: Arc<Mutex<VecDeque<String>>>,
    ended: [Option<oneshot::Receiver<()>>; 2],
}

/// The write ends.
pub struct Pipes {
    pub stdout: PipeWriter,
    pub stderr: PipeWriter,
}

impl Output {
    /// Passes on what comes from now on.
    pub fn open() -> io::Result<(Self, Pipes)> {
        let last = Arc::new(Mutex::new(VecDeque::new()));
        let (from_stdout, stdout) = io::pipe()?;
        let (from_stderr, stderr) = io::pipe()?;
        let ended = [pass_on("stdout", from_stdout, None)?, pass_on("stderr", from_stderr, Some(last.clone()))?];
        Ok((Self { last, ended: ended.map(Some) }, Pipes { stdout, stderr }))
    }

    /// Waits until all was passed on; the last lines of standard error.
    pub async fn close(&mut self) -> Vec<String> {
        for ended in self.ended.iter_mut().filter_map(Option::take) {
            let _ = tokio::time::timeout(CLOSE_MAX, ended).await;
        }
        self.last.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

fn pass_on(
    name: &str,
    mut from: PipeReader,
    last: Option<Arc<Mutex<VecDeque<String>>>>,
) -> io::Result<oneshot::Receiver<()>> {
    let (end, ended) = oneshot::channel();
    let pass = move || {
        let _end = end;
        let mut lines = Lines::default();
        let mut bytes = [0; 16 * 1024];
        while let Ok(count) = from.read(&mut bytes) {
            if count == 0 {
                break;
            }
            lines.take(&bytes[..count], &mut |line| write(line, last.as_deref()));
        }
        lines.finish(&mut |line| write(line, last.as_deref()));
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(pass)?;
    Ok(ended)
}

/// One call a line, so that the two streams and the rank's own words do not mix within one.
fn write(line: &[u8], last: Option<&Mutex<VecDeque<String>>>) {
    // A log that cannot be written must not keep the command from going on.
    let mut stdout = io::stdout().lock();
    let _ = stdout.write_all(line).and_then(|()| stdout.flush());
    drop(stdout);
    let Some(last) = last else { return };
    // It goes to the terminals of others: nothing that moves a cursor or sets a title.
    let text = String::from_utf8_lossy(line);
    let text: String = text.trim_end().chars().filter(|char| !char.is_control()).take(LAST_CHARS_MAX).collect();
    if text.is_empty() {
        return;
    }
    let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
    last.push_back(text);
    if last.len() > LAST_LINES {
        last.pop_front();
    }
}

/// Cuts bytes into lines.
#[derive(Default)]
struct Lines {
    begun: Vec<u8>,
}

impl Lines {
    fn take(&mut self, bytes: &[u8], line: &mut dyn FnMut(&[u8])) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.begun.extend_from_slice(part);
            if part.ends_with(b"\n") || self.begun.len() >= LINE_BYTES_MAX {
                line(&self.begun);
                self.begun.clear();
            }
        }
    }

    /// A last line without an end gets one.
    fn finish(&mut self, line: &mut dyn FnMut(&[u8])) {
        if !self.begun.is_empty() {
            self.begun.push(b'\n');
            line(&self.begun);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_however_they_are_read() {
        let mut found: Vec<Vec<u8>> = Vec::new();
        let mut lines = Lines::default();
        for part in [&b"a"[..], b"b\nc\n\nd", b"", b"e"] {
            lines.take(part, &mut |line| found.push(line.to_vec()));
        }
        lines.finish(&mut |line| found.push(line.to_vec()));
        assert_eq!(found, [&b"ab\n"[..], b"c\n", b"\n", b"de\n"]);
    }
}
