//! Files of lines: CSV, JSONL and texts. Errors name the file and the line.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::rc::Rc;

use serde_json::Value;

use super::files::open_packed;
use super::{Each, Field, few, row};
use crate::JobError;

/// Longest row of a CSV file, and line of a JSONL file or a text. Without it a file without newlines would be read into memory whole.
const LINE_BYTES_MAX: u64 = 16 << 20;
/// What some editors put before the first line.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// The one column of a text file.
const TEXT: &str = "text";

/// Fails when more is read than is left: a quote that is not closed would take the rest of a file for one value.
struct Bounded {
    bytes: Box<dyn Read>,
    left: Rc<Cell<u64>>,
}

impl Read for Bounded {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = self.left.get().min(into.len() as u64) as usize;
        if most == 0 && !into.is_empty() {
            let problem = format!("a row is longer than {LINE_BYTES_MAX} bytes: is a quote not closed?");
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        let read = self.bytes.read(&mut into[..most])?;
        self.left.set(self.left.get() - read as u64);
        Ok(read)
    }
}

pub(super) fn read_csv(
    path: &Path,
    bytes: Box<dyn Read>,
    columns: &[&str],
    each: &mut Each<'_>,
) -> Result<(), JobError> {
    let left = Rc::new(Cell::new(LINE_BYTES_MAX));
    let mut reader = csv::ReaderBuilder::new().from_reader(Bounded { bytes, left: left.clone() });
    let header = reader.headers().map_err(|error| csv_error(path, error))?.clone();
    let mut wanted = Vec::new();
    for column in columns {
        let index = header
            .iter()
            .position(|name| name == *column)
            .ok_or_else(|| row(path, 1, format!("no column \"{column}\" in the header ({})", few(header.iter()))))?;
        if header.iter().skip(index + 1).any(|name| name == *column) {
            return Err(row(path, 1, format!("two columns \"{column}\" in the header: which one is meant?")));
        }
        wanted.push(index);
    }
    let mut record = csv::StringRecord::new();
    left.set(LINE_BYTES_MAX);
    while reader.read_record(&mut record).map_err(|error| csv_error(path, error))? {
        left.set(LINE_BYTES_MAX);
        let fields: Vec<Field<'_>> = wanted.iter().map(|&index| Field::Text(&record[index])).collect();
        each(&fields).map_err(|problem| row(path, csv_line(path, record.position()), problem))?;
    }
    Ok(())
}

/// The line that a record starts on. The reader's own count is taken before it passes the end of the line before (the second half of CRLF,
/// empty lines), so the lines are counted again up to the record's first byte: only an error needs it.
fn csv_line(path: &Path, position: Option<&csv::Position>) -> u64 {
    let Some(position) = position else { return 1 };
    let count = || -> Option<u64> {
        let bytes = open_packed(path).ok()?;
        let mut bytes = BufReader::with_capacity(1 << 16, bytes).bytes();
        let ended = |byte: &u8| *byte == b'\n';
        let before = bytes.by_ref().take(position.byte() as usize).map_while(Result::ok).filter(ended).count();
        let skipped =
            bytes.map_while(Result::ok).take_while(|byte| matches!(byte, b'\r' | b'\n')).filter(ended).count();
        Some(1 + (before + skipped) as u64)
    };
    count().unwrap_or(position.line())
}

pub(super) fn read_jsonl(
    path: &Path,
    bytes: Box<dyn Read>,
    columns: &[&str],
    each: &mut Each<'_>,
) -> Result<(), JobError> {
    let mut reader = BufReader::with_capacity(1 << 16, bytes);
    let mut text = Vec::new();
    for line in 1.. {
        if !read_line(path, &mut reader, line, &mut text)? {
            break;
        }
        if text.trim_ascii().is_empty() {
            continue;
        }
        let value: Value =
            serde_json::from_slice(&text).map_err(|error| row(path, line, format!("not a JSON value: {error}")))?;
        let mut fields = Vec::new();
        for column in columns {
            let field = value.get(column).ok_or_else(|| {
                let expected = columns.join(", ");
                row(path, line, format!("no key \"{column}\": each line is a JSON object with {expected}"))
            })?;
            fields.push(Field::Json(field));
        }
        each(&fields).map_err(|problem| row(path, line, problem))?;
    }
    Ok(())
}

/// Texts stand between empty lines.
pub(super) fn read_texts(
    path: &Path,
    bytes: Box<dyn Read>,
    columns: &[&str],
    each: &mut Each<'_>,
) -> Result<(), JobError> {
    if let Some(other) = columns.iter().find(|column| **column != TEXT) {
        let problem = format!("a text file has no columns but \"{TEXT}\", and [data] names \"{other}\"");
        return Err(JobError::Data { path: path.into(), problem });
    }
    let mut reader = BufReader::with_capacity(1 << 16, bytes);
    let (mut text, mut begins, mut read) = (String::new(), 1, Vec::new());
    for line in 1.. {
        let more = read_line(path, &mut reader, line, &mut read)?;
        let is_between = read.trim_ascii().is_empty();
        if is_between && !text.is_empty() {
            let fields = vec![Field::Text(text.trim_end()); columns.len()];
            each(&fields).map_err(|problem| row(path, begins, problem))?;
            text.clear();
        }
        if !more {
            break;
        }
        if !is_between {
            begins = if text.is_empty() { line } else { begins };
            text.push_str(std::str::from_utf8(&read).map_err(|_| row(path, line, "not UTF-8".to_owned()))?);
            if text.len() as u64 > LINE_BYTES_MAX {
                return Err(row(path, begins, format!("a text longer than {LINE_BYTES_MAX} bytes")));
            }
        }
    }
    Ok(())
}

/// The next line, with its end; false: there is none, and the line is empty.
fn read_line(path: &Path, reader: &mut dyn BufRead, line: u64, text: &mut Vec<u8>) -> Result<bool, JobError> {
    text.clear();
    let failed = |source| JobError::File { path: path.into(), source };
    reader.take(LINE_BYTES_MAX).read_until(b'\n', text).map_err(failed)?;
    if text.len() as u64 == LINE_BYTES_MAX && text.last() != Some(&b'\n') {
        return Err(row(path, line, format!("longer than {LINE_BYTES_MAX} bytes")));
    }
    let is_there = !text.is_empty();
    if line == 1 && text.starts_with(BYTE_ORDER_MARK) {
        text.drain(..BYTE_ORDER_MARK.len());
    }
    Ok(is_there)
}

fn csv_error(path: &Path, error: csv::Error) -> JobError {
    let line = csv_line(path, error.position());
    let problem = match error.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!("expected {expected_len} columns as in the header, found {len}")
        }
        csv::ErrorKind::Utf8 { .. } => "not UTF-8".to_owned(),
        csv::ErrorKind::Io(_) => {
            let csv::ErrorKind::Io(source) = error.into_kind() else { unreachable!("matched above") };
            return JobError::File { path: path.into(), source };
        }
        _ => error.to_string(),
    };
    row(path, line, problem)
}
