//! How deep the schema of a Parquet file is, read from its footer before the crate reads it: that one calls itself once a level, and a file with thousands would overflow the
//! stack of its thread. Owns the few forms of Thrift's compact protocol that stand before and in a schema; knows no column.
//!
//! Source: parquet-format's `parquet.thrift` and Thrift's `thrift-compact-protocol.md`.

use std::io::{BufReader, Read, Take};

use ::parquet::errors::{ParquetError, Result};
use ::parquet::file::FOOTER_SIZE;
use ::parquet::file::metadata::FooterTail;
use ::parquet::file::reader::ChunkReader;

use super::{Chunks, ReadAt, Reader};

/// More levels are refused. People's files have ten at most, where a list counts as two; some thousands overflow a thread's stack.
pub(super) const LEVELS_MAX: usize = 64;
/// Structs and lists within a field that is passed over: a logical type has three.
const NESTED_MAX: usize = 16;

/// Kinds of values, as a field's first byte names them.
mod kind {
    pub const STOP: u8 = 0;
    pub const TRUE: u8 = 1;
    pub const FALSE: u8 = 2;
    pub const BYTE: u8 = 3;
    pub const I16: u8 = 4;
    pub const I32: u8 = 5;
    pub const I64: u8 = 6;
    pub const DOUBLE: u8 = 7;
    pub const BINARY: u8 = 8;
    pub const LIST: u8 = 9;
    pub const SET: u8 = 10;
    pub const STRUCT: u8 = 12;
}

/// `FileMetaData.schema`, and `SchemaElement.num_children`.
const SCHEMA: i64 = 2;
const CHILDREN: i64 = 5;

/// Levels of the schema, its root included; counted up to one more than [`LEVELS_MAX`].
pub(super) fn levels(chunks: &Chunks) -> Result<usize> {
    let has = chunks.bytes();
    let Some(end) = has.checked_sub(FOOTER_SIZE as u64) else { return Err(cut()) };
    let mut tail = [0; FOOTER_SIZE];
    chunks.read_at(end, &mut tail)?;
    let tail = FooterTail::try_new(&tail)?;
    if tail.is_encrypted_footer() {
        // The crate refuses it.
        return Ok(0);
    }
    let bytes = tail.metadata_length() as u64;
    let start = end.checked_sub(bytes).ok_or_else(cut)?;
    let mut footer = Footer(chunks.get_read(start)?.take(bytes));
    let mut id = 0;
    loop {
        let (kind, next) = footer.field(id)?.ok_or_else(|| damaged("no schema"))?;
        match (kind, next) {
            (kind::LIST, SCHEMA) => return footer.schema(),
            (_, SCHEMA) => return Err(damaged("a schema that is no list")),
            (kind, _) => footer.skip(kind, NESTED_MAX)?,
        }
        id = next;
    }
}

fn cut() -> ParquetError {
    ParquetError::EOF("the file is shorter than its footer".to_owned())
}

fn damaged(what: &str) -> ParquetError {
    ParquetError::General(format!("{what} in the footer"))
}

struct Footer(Take<BufReader<Reader>>);

impl Footer {
    /// Elements stand depth first, each with the number of its children.
    fn schema(&mut self) -> Result<usize> {
        let (kind, elements) = self.list()?;
        if kind != kind::STRUCT {
            return Err(damaged("a schema of no elements"));
        }
        // Of the groups around the next element: how many children are still to come.
        let mut open: Vec<u64> = Vec::new();
        let mut most = 0;
        for _ in 0..elements {
            let children = self.element()?;
            if children > elements {
                return Err(damaged("a group with more children than the schema has elements"));
            }
            while open.pop_if(|left| *left == 0).is_some() {}
            if let Some(left) = open.last_mut() {
                *left -= 1;
            }
            most = most.max(open.len() + 1);
            if most > LEVELS_MAX {
                break;
            }
            if children > 0 {
                open.push(children);
            }
        }
        Ok(most)
    }

    /// Its number of children.
    fn element(&mut self) -> Result<u64> {
        let (mut id, mut children) = (0, 0);
        while let Some((kind, next)) = self.field(id)? {
            match (kind, next) {
                (kind::I32, CHILDREN) => {
                    let number = self.number()?;
                    if number % 2 == 1 {
                        return Err(damaged("a negative number of children"));
                    }
                    children = number / 2;
                }
                (_, CHILDREN) => return Err(damaged("a number of children that is none")),
                (kind, _) => self.skip(kind, NESTED_MAX)?,
            }
            id = next;
        }
        Ok(children)
    }

    /// The kind and the number of the next field, if there is one. All writers write them in order.
    fn field(&mut self, before: i64) -> Result<Option<(u8, i64)>> {
        let first = self.byte()?;
        if first & 0x0f == kind::STOP {
            return Ok(None);
        }
        let id = match first >> 4 {
            0 => {
                let number = self.number()?;
                (number >> 1) as i64 ^ -((number & 1) as i64)
            }
            more => before + i64::from(more),
        };
        if id <= before || id > i64::from(i16::MAX) {
            return Err(damaged("fields that are not in order"));
        }
        Ok(Some((first & 0x0f, id)))
    }

    fn list(&mut self) -> Result<(u8, u64)> {
        let first = self.byte()?;
        let count = if first >> 4 == 15 { self.number()? } else { u64::from(first >> 4) };
        Ok((first & 0x0f, count))
    }

    fn skip(&mut self, kind: u8, nested: usize) -> Result<()> {
        let Some(nested) = nested.checked_sub(1) else { return Err(damaged("a value that is nested too deeply")) };
        match kind {
            kind::TRUE | kind::FALSE => {}
            kind::BYTE => drop(self.byte()?),
            kind::I16 | kind::I32 | kind::I64 => drop(self.number()?),
            kind::DOUBLE => self.pass(8)?,
            kind::BINARY => {
                let bytes = self.number()?;
                self.pass(bytes)?;
            }
            kind::LIST | kind::SET => {
                let (of, count) = self.list()?;
                for _ in 0..count {
                    // Beside a field's own byte a boolean needs none; in a list it has one.
                    let of = if matches!(of, kind::TRUE | kind::FALSE) { kind::BYTE } else { of };
                    self.skip(of, nested)?;
                }
            }
            kind::STRUCT => {
                let mut id = 0;
                while let Some((kind, next)) = self.field(id)? {
                    self.skip(kind, nested)?;
                    id = next;
                }
            }
            _ => return Err(damaged("a value of an unknown kind")),
        }
        Ok(())
    }

    fn pass(&mut self, bytes: u64) -> Result<()> {
        let passed = std::io::copy(&mut (&mut self.0).take(bytes), &mut std::io::sink())?;
        if passed == bytes { Ok(()) } else { Err(cut()) }
    }

    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        self.0.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    fn number(&mut self) -> Result<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(damaged("a number of more than ten bytes"))
    }
}
