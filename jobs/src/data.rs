//! Reads rows of files of several kinds, on this machine or in an object store, and decides which rows are held out.
//! Errors name the file and the place in it. It knows nothing of models: a trainer turns rows into numbers.

mod files;
mod lines;
mod parquet;
mod samples;
mod shards;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde_json::Value;

pub use self::files::{ReadAt, Stores, read_stores_by};
use self::files::{check_store, expanded, is_remote, open, open_packed};
use self::samples::Packer;
pub(crate) use self::samples::Samples;
use crate::JobError;
use crate::config::Spec;

/// Columns of a header that an error names, and characters of each: a file with a column a pixel has hundreds, and a file of one line a single long one.
const COLUMNS_NAMED_MAX: usize = 8;
const NAME_CHARS_MAX: usize = 60;

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

/// Calls `each` with the named columns of every row of a file, or of all files of a pattern (`*` in the last part of the path) in the order of their
/// names; rows in file order.
fn read_rows(path: &Path, columns: &[&str], each: &mut Each<'_>) -> Result<(), JobError> {
    for path in expanded(path)? {
        let path = &path;
        match Kind::of(path)? {
            Kind::Csv => lines::read_csv(path, open_packed(path)?, columns, each)?,
            Kind::Jsonl => lines::read_jsonl(path, open_packed(path)?, columns, each)?,
            Kind::Text => lines::read_texts(path, open_packed(path)?, columns, each)?,
            Kind::Parquet => parquet::read(path, open(path)?, columns, each)?,
            Kind::Shard => shards::read(path, open_packed(path)?, columns, each)?,
        }
    }
    Ok(())
}

enum Kind {
    Csv,
    Jsonl,
    Text,
    Parquet,
    /// A tar whose members with one name and several endings are a row.
    Shard,
}

impl Kind {
    /// By its name.
    fn of(path: &Path) -> Result<Self, JobError> {
        let name = path.to_string_lossy().to_ascii_lowercase();
        let packed = name.strip_suffix(".gz");
        let stem = packed.unwrap_or(&name);
        Ok(match stem.rsplit_once('.').map(|(_, end)| end) {
            Some("csv") => Self::Csv,
            Some("jsonl") => Self::Jsonl,
            Some("txt") => Self::Text,
            Some("tar") => Self::Shard,
            // It is packed by itself.
            Some("parquet") if packed.is_none() => Self::Parquet,
            _ => {
                let problem = "unknown kind of file: the name must end in .csv, .jsonl, .txt or .tar (or in .gz after it), or in .parquet";
                return Err(JobError::Data { path: path.into(), problem: problem.to_owned() });
            }
        })
    }
}

/// Whether the files are there and can be read, whatever is in them. Those of object stores are looked for by the ranks, which have the credentials.
pub(crate) fn check_readable(path: &Path) -> Result<(), JobError> {
    if is_remote(path) {
        return check_store(path);
    }
    expanded(path)?.iter().try_for_each(|path| {
        let failed = |source| JobError::File { path: path.into(), source };
        open(path)?.read_at(0, &mut []).map_err(failed)
    })
}

/// Whether files with these names can be read at all; looks at none of them.
pub(crate) fn check_names(train: &Path, held_out: &HeldOut) -> Result<(), JobError> {
    let held_out = match held_out {
        HeldOut::File(path) => Some(path.as_path()),
        HeldOut::Fraction(_) => None,
    };
    [train].into_iter().chain(held_out).try_for_each(|path| {
        if is_remote(path) {
            check_store(path)?;
        }
        Kind::of(path).map(drop)
    })
}

/// The same of files whose kind is known; looks at no row.
pub(crate) fn check_file(path: &Path) -> Result<(), JobError> {
    Kind::of(path)?;
    check_readable(path)
}

/// The first of some names.
fn few<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let all: Vec<&str> = names.collect();
    let first = all.iter().take(COLUMNS_NAMED_MAX).map(|name| short(name)).collect::<Vec<_>>().join(", ");
    match all.len().saturating_sub(COLUMNS_NAMED_MAX) {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}

/// A name out of a file, as an error can show it.
fn short(name: &str) -> String {
    let shown: String = name.chars().take(NAME_CHARS_MAX).flat_map(char::escape_debug).collect();
    if name.chars().nth(NAME_CHARS_MAX).is_some() { shown + "..." } else { shown }
}

fn row(path: &Path, line: u64, problem: String) -> JobError {
    JobError::Row { path: path.into(), line, problem }
}

/// Of a file that has no lines; the first row is 1.
fn numbered(path: &Path, row: u64, problem: impl std::fmt::Display) -> JobError {
    JobError::Data { path: path.into(), problem: format!("row {row}: {problem}") }
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

/// Appends a row's sample, as bytes, to the empty buffer. Its group.
type Parse<'a> = dyn Fn(&[Field<'_>], &mut Vec<u8>) -> Result<Group, String> + 'a;

/// Training and held-out samples, each in file order.
pub(crate) fn read_split(
    train: &Path,
    held_out: &HeldOut,
    columns: &[&str],
    parse: &Parse<'_>,
) -> Result<[Samples; 2], JobError> {
    let (mut training, mut held, mut sample) = (Packer::new(), Packer::new(), Vec::new());
    let mut read = |path: &Path, holds: &dyn Fn(Group) -> bool| {
        let mut not_kept = None;
        let read = read_rows(path, columns, &mut |fields| {
            sample.clear();
            let group = parse(fields, &mut sample)?;
            let set = if holds(group) { &mut held } else { &mut training };
            set.push(&sample).map_err(|error| not_kept.insert(error).to_string())
        });
        // It is no fault of the row.
        not_kept.map_or(read, |source| Err(kept(source)))
    };
    read(train, &|group| held_out.holds(group))?;
    if let HeldOut::File(path) = held_out {
        read(path, &|_| true)?;
    }
    Ok([training.finish().map_err(kept)?, held.finish().map_err(kept)?])
}

fn kept(source: std::io::Error) -> JobError {
    JobError::Kept { dir: std::env::temp_dir(), source }
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
        let open_quote = [&b"name,label\na,1\n\"b"[..], &b"b\n".repeat(9 << 20)].concat();
        assert!(message("a.csv", &open_quote).contains("a row is longer than 16777216 bytes: is a quote not closed?"));
        let long = [&b"x".repeat(1 << 20)[..], b"\n1\n"].concat();
        assert!(message("a.csv", &long).len() < 200);
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
        assert_eq!(texts(b"\xef\xbb\xbfa\n\nb"), Ok(vec!["a".to_owned(), "b".to_owned()]));
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
