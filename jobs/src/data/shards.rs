//! Shards as WebDataset writes them: a tar whose members with one name and several endings (`0001.json`, `0001.txt`) are a row. A column is an ending, or a key
//! of the object in `.json`.

use std::io::{self, Read};
use std::path::Path;

use serde_json::Value;

use super::{Each, Field, few, numbered, short};
use crate::JobError;

/// Of one member.
const MEMBER_BYTES_MAX: u64 = 16 << 20;
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

pub(super) fn read(path: &Path, bytes: Box<dyn Read>, columns: &[&str], each: &mut Each<'_>) -> Result<(), JobError> {
    let failed = |source| JobError::File { path: path.into(), source };
    let mut archive = tar::Archive::new(bytes);
    let (mut row, mut number) = (Row::default(), 0);
    for entry in archive.entries().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
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
        entry.read_to_string(&mut text).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => refused("not UTF-8"),
            _ => failed(error),
        })?;
        row.members.push((end, text));
    }
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
        let mut out = Vec::new();
        let bytes = Box::new(io::Cursor::new(shard(members)));
        let read = read(Path::new("FILE"), bytes, &["txt", "label"], &mut |fields| {
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
}
