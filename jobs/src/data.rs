//! Reads rows of CSV and JSONL files and texts, plain or gzip, and decides which rows are held out.
//! Errors name the file and the line. It knows nothing of models: a trainer turns rows into numbers.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use serde_json::Value;

use crate::JobError;
use crate::config::Spec;

/// Longest line of a JSONL file or a text. Without it a file without newlines would be read into memory whole.
const LINE_BYTES_MAX: u64 = 16 << 20;
/// The one column of a text file.
const TEXT: &str = "text";
/// Columns of a header that an error names: a file with a column a pixel has hundreds.
const COLUMNS_NAMED_MAX: usize = 8;

/// One value of a row, as the file holds it.
#[derive(Clone, Copy)]
pub(crate) enum Field<'a> {
    Text(&'a str),
    Json(&'a Value),
}

impl Field<'_> {
    /// A number or a boolean of JSON as it is written: a CSV file does not tell them from text either.
    pub fn text(&self) -> Result<Cow<'_, str>, String> {
        match self {
            Field::Text(text) => Ok(Cow::Borrowed(text)),
            Field::Json(Value::String(text)) => Ok(Cow::Borrowed(text)),
            Field::Json(other @ (Value::Number(_) | Value::Bool(_))) => Ok(Cow::Owned(other.to_string())),
            Field::Json(other @ (Value::Null | Value::Array(_) | Value::Object(_))) => {
                Err(format!("expected a string, found {}", kind(other)))
            }
        }
    }

    /// A whole number from `0` to `max`.
    pub fn integer(&self, max: u64) -> Result<u64, String> {
        let value = match self {
            Field::Text(text) => text.trim().parse::<u64>().ok(),
            Field::Json(value) => value.as_u64(),
        };
        value.filter(|&value| value <= max).ok_or_else(|| {
            let found = match self {
                Field::Text(text) => format!("\"{}\"", text.escape_debug()),
                Field::Json(value) => value.to_string().chars().take(40).collect(),
            };
            format!("expected a whole number from 0 to {max}, found {found}")
        })
    }

    /// A list of `count` whole numbers from 0 to 255: a JSON array, also inside a CSV cell.
    pub fn bytes(&self, count: usize) -> Result<Vec<u8>, String> {
        let parsed;
        let value = match self {
            Field::Json(value) => *value,
            Field::Text(text) => {
                parsed = serde_json::from_str(text).map_err(|_| "expected a JSON array of numbers".to_owned())?;
                &parsed
            }
        };
        let items = value.as_array().ok_or_else(|| format!("expected an array, found {}", kind(value)))?;
        if items.len() != count {
            return Err(format!("expected {count} values, found {}", items.len()));
        }
        items.iter().map(|item| Field::Json(item).integer(255).map(|value| value as u8)).collect()
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Names the column of a value that is not as it should be.
pub(crate) fn in_column<T>(column: &str, value: Result<T, String>) -> Result<T, String> {
    value.map_err(|problem| format!("{column}: {problem}"))
}

/// One row's values in the order of the asked columns. An error of `each` is a problem of that row.
type Each<'a> = dyn FnMut(&[Field<'_>]) -> Result<(), String> + 'a;

/// Calls `each` with the named columns of every row of a `.csv` or `.jsonl` file, or with every text of a `.txt` file (`.gz` after each), in file order.
fn read_rows(path: &Path, columns: &[&str], each: &mut Each<'_>) -> Result<(), JobError> {
    let (kind, bytes) = open(path)?;
    match kind {
        Kind::Csv => read_csv(path, bytes, columns, each),
        Kind::Jsonl => read_jsonl(path, bytes, columns, each),
        Kind::Text => read_texts(path, bytes, columns, each),
    }
}

enum Kind {
    Csv,
    Jsonl,
    Text,
}

/// What kind of file it is by its name, and its unpacked bytes.
fn open(path: &Path) -> Result<(Kind, Box<dyn Read>), JobError> {
    let name = path.to_string_lossy().to_ascii_lowercase();
    let (stem, packed) = name.strip_suffix(".gz").map_or((name.as_str(), false), |stem| (stem, true));
    let kind = if stem.ends_with(".csv") {
        Kind::Csv
    } else if stem.ends_with(".jsonl") {
        Kind::Jsonl
    } else if stem.ends_with(".txt") {
        Kind::Text
    } else {
        let problem = "unknown kind of file: the name must end in .csv, .jsonl or .txt, or in .gz after it".to_owned();
        return Err(JobError::Data { path: path.into(), problem });
    };
    let file = File::open(path).map_err(|source| JobError::File { path: path.into(), source })?;
    Ok((kind, if packed { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) }))
}

/// Whether the file is there and can be read, whatever is in it.
pub(crate) fn check_readable(path: &Path) -> Result<(), JobError> {
    let failed = |source| JobError::File { path: path.into(), source };
    File::open(path).and_then(|mut file| file.read(&mut [0])).map(drop).map_err(failed)
}

/// Whether the file is there and can be read; looks at no row.
pub(crate) fn check_file(path: &Path) -> Result<(), JobError> {
    let (_, mut bytes) = open(path)?;
    bytes.read(&mut [0]).map(drop).map_err(|source| JobError::File { path: path.into(), source })
}

fn read_csv(path: &Path, bytes: Box<dyn Read>, columns: &[&str], each: &mut Each<'_>) -> Result<(), JobError> {
    let mut reader = csv::ReaderBuilder::new().from_reader(bytes);
    let header = reader.headers().map_err(|error| csv_error(path, error))?.clone();
    let mut wanted = Vec::new();
    for column in columns {
        let index = header
            .iter()
            .position(|name| name == *column)
            .ok_or_else(|| row(path, 1, format!("no column \"{column}\" in the header ({})", few(&header))))?;
        if header.iter().skip(index + 1).any(|name| name == *column) {
            return Err(row(path, 1, format!("two columns \"{column}\" in the header: which one is meant?")));
        }
        wanted.push(index);
    }
    let mut record = csv::StringRecord::new();
    while reader.read_record(&mut record).map_err(|error| csv_error(path, error))? {
        let fields: Vec<Field<'_>> = wanted.iter().map(|&index| Field::Text(&record[index])).collect();
        each(&fields).map_err(|problem| row(path, csv_line(path, record.position()), problem))?;
    }
    Ok(())
}

/// The first names of a header.
fn few(header: &csv::StringRecord) -> String {
    let names = header.iter().take(COLUMNS_NAMED_MAX).collect::<Vec<_>>().join(", ");
    match header.len().saturating_sub(COLUMNS_NAMED_MAX) {
        0 => names,
        more => format!("{names} and {more} more"),
    }
}

/// The line that a record starts on. The reader's own count is taken before it passes the end of the line before (the second half of CRLF,
/// empty lines), so the lines are counted again up to the record's first byte: only an error needs it.
fn csv_line(path: &Path, position: Option<&csv::Position>) -> u64 {
    let Some(position) = position else { return 1 };
    let count = || -> Option<u64> {
        let (_, bytes) = open(path).ok()?;
        let mut bytes = BufReader::with_capacity(1 << 16, bytes).bytes();
        let ended = |byte: &u8| *byte == b'\n';
        let before = bytes.by_ref().take(position.byte() as usize).map_while(Result::ok).filter(ended).count();
        let skipped =
            bytes.map_while(Result::ok).take_while(|byte| matches!(byte, b'\r' | b'\n')).filter(ended).count();
        Some(1 + (before + skipped) as u64)
    };
    count().unwrap_or(position.line())
}

fn read_jsonl(path: &Path, bytes: Box<dyn Read>, columns: &[&str], each: &mut Each<'_>) -> Result<(), JobError> {
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
fn read_texts(path: &Path, bytes: Box<dyn Read>, columns: &[&str], each: &mut Each<'_>) -> Result<(), JobError> {
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
    Ok(!text.is_empty())
}

fn row(path: &Path, line: u64, problem: String) -> JobError {
    JobError::Row { path: path.into(), line, problem }
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

/// Where the held-out rows come from.
#[derive(Debug, Clone, PartialEq, serde::Deserialize)]
#[serde(untagged, expecting = "a fraction between 0 and 1 or the path of a file")]
pub(crate) enum HeldOut {
    /// This share of the training file's groups.
    Fraction(f64),
    /// A file of its own, in the same format.
    File(PathBuf),
}

impl HeldOut {
    pub fn check(&self, spec: &Spec<'_>) -> Result<(), JobError> {
        match self {
            HeldOut::Fraction(share) if !(*share > 0.0 && *share < 1.0) => {
                let mend = "write a share between 0 and 1, or the path of a file";
                Err(spec.mistake("data", "held_out", "held_out is out of range", mend))
            }
            HeldOut::Fraction(_) | HeldOut::File(_) => Ok(()),
        }
    }

    fn holds(&self, group: Group) -> bool {
        match self {
            HeldOut::Fraction(share) => group.0 < *share,
            HeldOut::File(_) => false,
        }
    }
}

/// A group key's hash as a number in [0, 1): FNV-1a with SplitMix64's finaliser. All rows of a group are on the same side
/// of a split, on every rank, whatever else is in the file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Group(f64);

impl Group {
    pub fn of(key: &[u8]) -> Self {
        let fnv = key.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        Group((crate::order::mix(fnv) >> 11) as f64 / (1u64 << 53) as f64)
    }
}

/// A row as a sample, with its group.
type Parse<'a, S> = dyn Fn(&[Field<'_>]) -> Result<(S, Group), String> + 'a;

/// Training and held-out samples, each in file order.
pub(crate) fn read_split<S>(
    train: &Path,
    held_out: &HeldOut,
    columns: &[&str],
    parse: &Parse<'_, S>,
) -> Result<(Vec<S>, Vec<S>), JobError> {
    let (mut training, mut held) = (Vec::new(), Vec::new());
    read_rows(train, columns, &mut |fields| {
        let (sample, group) = parse(fields)?;
        if held_out.holds(group) {
            held.push(sample)
        } else {
            training.push(sample)
        }
        Ok(())
    })?;
    if let HeldOut::File(path) = held_out {
        read_rows(path, columns, &mut |fields| {
            held.push(parse(fields)?.0);
            Ok(())
        })?;
    }
    Ok((training, held))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn write(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("write the file");
        (folder, path)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(bytes).expect("pack");
        packer.finish().expect("pack")
    }

    fn labels(path: &Path) -> Result<Vec<u64>, JobError> {
        let mut out = Vec::new();
        read_rows(path, &["label"], &mut |fields| {
            out.push(fields[0].integer(9)?);
            Ok(())
        })?;
        Ok(out)
    }

    fn message(name: &str, bytes: &[u8]) -> String {
        let (_folder, path) = write(name, bytes);
        let error = labels(&path).expect_err("the file is wrong").to_string();
        error.replace(path.to_str().expect("utf-8 path"), "FILE")
    }

    #[test]
    fn both_formats_read_plain_and_packed() {
        let (csv, jsonl) = (b"name,label\na,1\nb,2\n", b"{\"label\":1}\n\n{\"label\":2,\"x\":0}\n");
        for (name, bytes) in
            [("a.csv", csv.to_vec()), ("a.csv.gz", gzip(csv)), ("a.jsonl", jsonl.to_vec()), ("a.jsonl.gz", gzip(jsonl))]
        {
            let (_folder, path) = write(name, &bytes);
            assert_eq!(labels(&path).expect("a good file"), [1, 2], "{name}");
        }
    }

    #[test]
    fn errors_name_file_and_line() {
        assert_eq!(
            message("a.csv", b"name,label\na,1\nb,x\n"),
            "FILE, line 3: expected a whole number from 0 to 9, found \"x\""
        );
        assert_eq!(
            message("a.csv", b"name,label\na,1\nb\n"),
            "FILE, line 3: expected 2 columns as in the header, found 1"
        );
        assert_eq!(
            message("a.csv", b"name,kind\na,1\n"),
            "FILE, line 1: no column \"label\" in the header (name, kind)"
        );
        assert_eq!(message("a.csv", b"name,label\n\xff,1\n"), "FILE, line 2: not UTF-8");
        assert_eq!(
            message("a.csv", b"label,name,label\n1,a,2\n"),
            "FILE, line 1: two columns \"label\" in the header: which one is meant?"
        );
        let many: String = (0..785).map(|column| format!("p{column},")).collect();
        assert!(
            message("a.csv", format!("{many}\n").as_bytes()).ends_with("(p0, p1, p2, p3, p4, p5, p6, p7 and 778 more)")
        );
        assert_eq!(
            message("a.jsonl", b"{\"label\":1}\n{\"label\":12}\n"),
            "FILE, line 2: expected a whole number from 0 to 9, found 12"
        );
        assert!(message("a.jsonl", b"{\"label\":1}\n{\"label\"\n").starts_with("FILE, line 2: not a JSON value"));
        assert_eq!(
            message("a.jsonl", b"{\"lable\":1}\n"),
            "FILE, line 1: no key \"label\": each line is a JSON object with label"
        );
        assert!(message("a.pdf", b"").contains("must end in .csv"));
        assert!(message("a.csv.gz", &gzip(b"label\n1\n2\n")[..20]).starts_with("read data file FILE: "));
    }

    #[test]
    fn csv_errors_name_the_line_whatever_ends_the_lines_before() {
        for (bytes, line) in [
            (&b"name,label\r\na,x\r\nb,2\r\n"[..], 2),
            (b"name,label\r\na,1\r\nb,x\r\n", 3),
            (b"name,label\r\na,1\r\nb\r\n", 3),
            (b"name,label\r\na,1\r\n\xff,2\r\n", 3),
            (b"name,label\na,1\n\n\nb,x\n", 5),
            (b"name,label\r\n\"a\r\nb\",1\r\nc,x\r\n", 4),
            (b"\xef\xbb\xbfname,label\r\na,1\r\nb,x\r\n", 3),
        ] {
            let plain = message("a.csv", bytes);
            assert!(plain.starts_with(&format!("FILE, line {line}: ")), "{plain} {}", bytes.escape_ascii());
            assert_eq!(message("a.csv.gz", &gzip(bytes)), plain);
        }
    }

    #[test]
    fn texts_stand_between_empty_lines() {
        let texts = |bytes: &[u8]| -> Result<Vec<String>, String> {
            let (_folder, path) = write("a.txt", bytes);
            let mut out = Vec::new();
            let read = read_rows(&path, &["text"], &mut |fields| {
                let text = fields[0].text()?;
                (text != "bad").then(|| out.push(text.into_owned())).ok_or_else(|| "bad".to_owned())
            });
            read.map(|()| out).map_err(|error| error.to_string().replace(path.to_str().expect("UTF-8"), "FILE"))
        };
        assert_eq!(texts(b"\n\na\nb\n \r\n\nc"), Ok(vec!["a\nb".to_owned(), "c".to_owned()]));
        assert_eq!(texts(b"\n \n"), Ok(Vec::new()));
        assert_eq!(texts(b"a\n\n\nbad\n\nc"), Err("FILE, line 4: bad".to_owned()));
        assert_eq!(texts(b"a\n\xff\n"), Err("FILE, line 2: not UTF-8".to_owned()));
        assert!(message("a.txt", b"a").contains("no columns but \"text\", and [data] names \"label\""));
    }

    #[test]
    fn json_scalars_are_text_as_in_csv() {
        let text = |value: Value| Field::Json(&value).text().map(Cow::into_owned);
        assert_eq!(text(Value::from(1)), Ok("1".to_owned()));
        assert_eq!(text(Value::from(true)), Ok("true".to_owned()));
        assert_eq!(in_column("kind", text(Value::Null)), Err("kind: expected a string, found null".to_owned()));
    }

    #[test]
    fn missing_file_is_named() {
        let error = labels(Path::new("/nowhere/rows.csv")).expect_err("no such file").to_string();
        assert_eq!(error, "read data file /nowhere/rows.csv: No such file or directory (os error 2)");
    }

    #[test]
    fn held_out_share_is_near_what_was_asked() {
        let held_out = HeldOut::Fraction(0.2);
        let held = (0..10_000).filter(|i| held_out.holds(Group::of(format!("host{i}.example").as_bytes()))).count();
        assert!((1850..2150).contains(&held), "{held} of 10000");
    }
}
