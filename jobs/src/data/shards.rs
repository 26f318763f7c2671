//! Shards as WebDataset writes them: a tar whose members with one name and several endings (`0001.json`, `0001.txt`) are a row. A column is an ending, or a key
//! of the object in `.json`.

use std::cell::Cell;
use std::io::{self, Read};
use std::path::Path;
use std::rc::Rc;

use serde_json::Value;

use super::{Each, Field, few, numbered, short};
use crate::JobError;

/// Of one member.
const MEMBER_BYTES_MAX: u64 = 16 << 20;
/// Of what stands before a member: its header, and a long name and attributes in blocks of their own, which the crate reads into memory whatever length they claim.
const HEADERS_BYTES_MAX: u64 = 1 << 20;
const BLOCK_BYTES: u64 = 512;
/// Endings of one row that an error may name.
const ENDS_MAX: usize = 64;
const JSON: &str = "json";

/// Members with one name.
#[derive(Default)]
struct Row {
    name: String,
    /// Of all members, in small letters.
    ends: Vec<String>,
    /// Texts of those that are asked for.
    members: Vec<(String, String)>,
}

/// How far an archive was read. The crate takes one that ends between two members for whole.
struct Progress {
    at: Cell<u64>,
    /// Where the next member must have begun.
    most: Cell<u64>,
    /// Somebody has read at the end of the file: whole archives end before, with a block of zeros (two, by the book; GNU tar warns of one).
    is_cut: Cell<bool>,
}

impl Progress {
    /// So many bytes of a member follow, and then the headers of the next one.
    fn expect(&self, bytes: u64) {
        let headers = self.at.get().saturating_add(bytes).saturating_add(BLOCK_BYTES);
        self.most.set(headers.saturating_add(HEADERS_BYTES_MAX));
    }

    fn problem(&self) -> Option<String> {
        let at = self.at.get();
        if at >= self.most.get() {
            return Some(format!(
                "the headers of a member, before byte {at}, are longer than {HEADERS_BYTES_MAX} bytes: is it damaged?"
            ));
        }
        let cut = || {
            format!(
                "the archive is cut: it ends at byte {at}, without the zeros that end a tar; fetch or write it anew"
            )
        };
        self.is_cut.get().then(cut)
    }
}

struct Watched {
    bytes: Box<dyn Read>,
    progress: Rc<Progress>,
}

impl Read for Watched {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Progress { at, most, is_cut } = &*self.progress;
        let left = most.get().saturating_sub(at.get()).min(into.len() as u64) as usize;
        if left == 0 && !into.is_empty() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let count = self.bytes.read(&mut into[..left])?;
        at.set(at.get() + count as u64);
        is_cut.set(count == 0 && left > 0);
        Ok(count)
    }
}

pub(super) fn read(path: &Path, bytes: Box<dyn Read>, columns: &[&str], each: &mut Each<'_>) -> Result<(), JobError> {
    let progress = Rc::new(Progress { at: Cell::new(0), most: Cell::new(HEADERS_BYTES_MAX), is_cut: Cell::new(false) });
    let whole = || match progress.problem() {
        Some(problem) => Err(JobError::Data { path: path.into(), problem }),
        None => Ok(()),
    };
    let failed = |source| whole().err().unwrap_or_else(|| JobError::File { path: path.into(), source });
    let mut archive = tar::Archive::new(Watched { bytes, progress: progress.clone() });
    let (mut row, mut number) = (Row::default(), 0);
    for entry in archive.entries().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
        // A sparse file has fewer bytes here than it is long.
        let is_sparse = entry.header().entry_type().is_gnu_sparse();
        progress.expect(if is_sparse { entry.header().entry_size().map_err(failed)? } else { entry.size() });
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let member = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let refused = |problem: &str| {
            let problem = format!("member {}: {problem}", short(&member));
            JobError::Data { path: path.into(), problem }
        };
        let (folder, base) = member.rsplit_once('/').unwrap_or(("", &member));
        let Some((stem, end)) = base.split_once('.').filter(|(stem, _)| !stem.is_empty()) else { continue };
        let (name, end) = (format!("{folder}/{stem}"), end.to_ascii_lowercase());
        if number == 0 || name != row.name {
            if number > 0 {
                give(path, (&row, number), columns, each)?;
            }
            number += 1;
            row = Row { name, ..Row::default() };
        }
        if row.ends.len() < ENDS_MAX {
            row.ends.push(end.clone());
        }
        if !(columns.iter().any(|column| column.eq_ignore_ascii_case(&end)) || end == JSON) {
            continue;
        }
        if row.members.iter().any(|(other, _)| *other == end) {
            return Err(refused("there are two of this name in one row"));
        }
        if entry.size() > MEMBER_BYTES_MAX {
            return Err(refused(&format!("longer than {MEMBER_BYTES_MAX} bytes")));
        }
        let mut text = String::new();
        let read = entry.read_to_string(&mut text);
        whole()?;
        read.map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => refused("not UTF-8"),
            _ => failed(error),
        })?;
        row.members.push((end, text));
    }
    whole()?;
    if number == 0 {
        return Ok(());
    }
    give(path, (&row, number), columns, each)
}

fn give(path: &Path, (row, number): (&Row, u64), columns: &[&str], each: &mut Each<'_>) -> Result<(), JobError> {
    let name = short(row.name.trim_start_matches('/'));
    let named = |problem: String| numbered(path, number, format!("({name}) {problem}"));
    let member =
        |end: &str| row.members.iter().find(|(other, _)| other.eq_ignore_ascii_case(end)).map(|(_, text)| text);
    let object = match member(JSON) {
        Some(text) => serde_json::from_str(text).map_err(|error| named(format!("not a JSON value: {error}")))?,
        None => Value::Null,
    };
    let mut fields = Vec::new();
    for column in columns {
        let of_member = member(column).map(|text| Field::Text(text.trim_end_matches(['\n', '\r'])));
        let field = of_member.or_else(|| object.get(column).map(Field::Json)).ok_or_else(|| {
            let ends = few(row.ends.iter().map(String::as_str));
            named(format!("no \"{column}\": neither a member with that ending ({ends}) nor a key of .json"))
        })?;
        fields.push(field);
    }
    each(&fields).map_err(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(members: &[(&str, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, text) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, text.as_bytes()).expect("added");
        }
        builder.into_inner().expect("a tar")
    }

    fn rows(members: &[(&str, &str)]) -> Result<Vec<(String, u64)>, String> {
        rows_of(io::Cursor::new(shard(members)))
    }

    fn rows_of(bytes: impl Read + 'static) -> Result<Vec<(String, u64)>, String> {
        let mut out = Vec::new();
        let read = read(Path::new("FILE"), Box::new(bytes), &["txt", "label"], &mut |fields| {
            out.push((fields[0].text()?.into_owned(), fields[1].integer(9)?));
            Ok(())
        });
        read.map(|()| out).map_err(|error| error.to_string())
    }

    #[test]
    fn members_with_one_name_are_a_row() {
        let found = rows(&[
            ("a/1.txt", "one\n"),
            ("a/1.json", "{\"label\": 1}"),
            ("a/1.png", "\u{1}"),
            ("b/1.label", "2"),
            ("b/1.txt", "two"),
            ("readme", "x"),
        ]);
        assert_eq!(found, Ok(vec![("one".to_owned(), 1), ("two".to_owned(), 2)]));
        let found = rows(&[("1.TXT", "one"), ("1.Label", "1")]);
        assert_eq!(found, Ok(vec![("one".to_owned(), 1)]));
        let other = rows(&[("1.text", "one"), ("1.cls", "1")]).expect_err("no column");
        assert!(other.contains("row 1: (1) no \"txt\": neither a member with that ending (text, cls)"), "{other}");
        let twice = rows(&[("1.txt", "one"), ("1.txt", "1")]).expect_err("two of them");
        assert_eq!(twice, "data FILE: member 1.txt: there are two of this name in one row");
        let missing = rows(&[("1.txt", "one"), ("1.label", "1"), ("2.txt", "two")]);
        let said = "data FILE: row 2: (2) no \"label\": neither a member with that ending (txt) nor a key of .json";
        assert_eq!(missing, Err(said.to_owned()));
        assert_eq!(
            rows(&[("1.txt", "one"), ("1.json", "{")]).expect_err("no JSON"),
            "data FILE: row 1: (1) not a JSON value: EOF while parsing an object at line 1 column 1"
        );
        assert_eq!(rows(&[]), Ok(Vec::new()));
    }

    #[test]
    fn an_archive_that_is_cut_is_no_whole_one_wherever_it_is_cut() {
        let good = shard(&[("1.txt", "one"), ("1.label", "1"), ("2.txt", "two"), ("2.label", "2")]);
        let expected = Ok(vec![("one".to_owned(), 1), ("two".to_owned(), 2)]);
        // Four members of two blocks each, then two blocks of zeros.
        let end = 8 * 512;
        assert_eq!(good.len(), end + 1024);
        for length in (0..=end).step_by(512).chain([3, 700, end - 1]) {
            let error = rows_of(io::Cursor::new(good[..length].to_vec())).expect_err("it is cut");
            let said = "without the zeros that end a tar; fetch or write it anew";
            assert!(error.starts_with("data FILE: the archive is cut") && error.ends_with(said), "{length}: {error}");
        }
        // One block of zeros, as some writers leave it; filled up to a record, as GNU tar does; anything behind the end.
        let padded = [&good[..], &[0; 10_240]].concat();
        let followed = [&good[..], b"signature"].concat();
        for whole in [good[..end + 512].to_vec(), padded, followed] {
            assert_eq!(rows_of(io::Cursor::new(whole)), expected);
        }
    }

    #[test]
    fn headers_of_any_length_take_little_memory() {
        let folder = "long/".repeat(60);
        let members = [(format!("{folder}1.txt"), "one"), (format!("{folder}1.label"), "1")];
        let long = members.each_ref().map(|(name, text)| (name.as_str(), *text));
        assert_eq!(rows(&long), Ok(vec![("one".to_owned(), 1)]));
        for kind in [tar::EntryType::GNULongName, tar::EntryType::GNULongLink, tar::EntryType::XHeader] {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(1 << 30);
            header.set_cksum();
            let before = shard(&[("1.txt", "one")])[..1024].to_vec();
            let claims = io::Cursor::new([&before[..], header.as_bytes()].concat());
            let error = rows_of(claims.chain(io::repeat(b'a').take(1 << 30))).expect_err("too long");
            assert!(error.contains("are longer than 1048576 bytes"), "{error}");
        }
    }
}
