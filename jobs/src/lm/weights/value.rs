//! Values in the header of a GGUF file, read one after the other. Owns the bounds of each number before it is used; never allocates.

use std::fmt::Display;
use std::path::Path;

use crate::lm::ModelError;

/// Longest name of a key or tensor; ggml's own bound for tensors is 64.
const NAME_BYTES_MAX: u64 = 512;
/// Longest string, a chat template being the longest known (tens of kilobytes): more is damage.
const STRING_BYTES_MAX: u64 = 4 << 20;
/// Most values of an array; the largest vocabularies have some 300,000 tokens and a million merges.
const ARRAY_VALUES_MAX: u64 = 1 << 24;

/// What stands where, in a file that may say anything.
#[derive(Clone, Copy)]
pub(super) struct Cursor<'a> {
    pub path: &'a Path,
    pub bytes: &'a [u8],
    /// Where the next value begins, at most `bytes.len()`.
    pub at: usize,
}

impl<'a> Cursor<'a> {
    /// An error about what begins at the cursor.
    pub fn damaged(&self, problem: impl Display) -> ModelError {
        ModelError::Damaged { path: self.path.to_owned(), problem: format!("{problem}, at byte {}", self.at) }
    }

    pub fn take(&mut self, count: u64, what: &str) -> Result<&'a [u8], ModelError> {
        let left = &self.bytes[self.at..];
        let taken = usize::try_from(count)
            .ok()
            .and_then(|count| left.get(..count))
            .ok_or_else(|| self.damaged(format!("the file ends after {} bytes, within {what}", self.bytes.len())))?;
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ModelError> {
        Ok(self.take(N as u64, what)?.try_into().expect("as many bytes as were taken"))
    }

    pub fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A number of things, at most `max`.
    pub fn count(&mut self, max: u64, what: impl Display) -> Result<u64, ModelError> {
        let start = *self;
        let count = self.u64("a number")?;
        if count > max { Err(start.damaged(format!("{what} is {count}, more than {max}"))) } else { Ok(count) }
    }

    /// A key, or the name of a tensor.
    pub fn name(&mut self, what: &str) -> Result<&'a str, ModelError> {
        self.string(NAME_BYTES_MAX, what)
    }

    fn string(&mut self, bytes_max: u64, what: &str) -> Result<&'a str, ModelError> {
        let bytes = self.count(bytes_max, format_args!("the length of {what}"))?;
        let start = *self;
        let bytes = self.take(bytes, what)?;
        std::str::from_utf8(bytes).map_err(|_| start.damaged(format!("{what} is not UTF-8")))
    }

    pub fn of_type(&mut self, kind: Type, what: &str) -> Result<Value<'a>, ModelError> {
        Ok(match kind {
            Type::U8 => Value::Integer(u8::from_le_bytes(self.array(what)?).into()),
            Type::I8 => Value::Integer(i8::from_le_bytes(self.array(what)?).into()),
            Type::U16 => Value::Integer(u16::from_le_bytes(self.array(what)?).into()),
            Type::I16 => Value::Integer(i16::from_le_bytes(self.array(what)?).into()),
            Type::U32 => Value::Integer(u32::from_le_bytes(self.array(what)?).into()),
            Type::I32 => Value::Integer(i32::from_le_bytes(self.array(what)?).into()),
            Type::U64 => Value::Integer(u64::from_le_bytes(self.array(what)?).into()),
            Type::I64 => Value::Integer(i64::from_le_bytes(self.array(what)?).into()),
            Type::F32 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            Type::F64 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            Type::Bool => {
                let start = *self;
                match self.array::<1>(what)? {
                    [0] => Value::Bool(false),
                    [1] => Value::Bool(true),
                    [other] => return Err(start.damaged(format!("{what} is a truth value of {other}"))),
                }
            }
            Type::String => Value::String(self.string(STRING_BYTES_MAX, what)?),
            Type::Array => Value::Array(self.list(what)?),
        })
    }

    /// An array, with every value looked at once.
    fn list(&mut self, what: &str) -> Result<List<'a>, ModelError> {
        let start = *self;
        let kind = Type::read(self, what)?;
        if kind == Type::Array {
            return Err(start.damaged(format!("{what} is an array of arrays, which no known model has")));
        }
        let count = self.count(ARRAY_VALUES_MAX, format_args!("the number of values of {what}"))?;
        let values = *self;
        for _ in 0..count {
            self.of_type(kind, what)?;
        }
        Ok(List { kind, count: count as usize, values })
    }
}

/// Types of metadata values by GGUF's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Type {
    /// By number, as the specification lists them.
    const ALL: [Type; 13] = [
        Type::U8,
        Type::I8,
        Type::U16,
        Type::I16,
        Type::U32,
        Type::I32,
        Type::F32,
        Type::Bool,
        Type::String,
        Type::Array,
        Type::U64,
        Type::I64,
        Type::F64,
    ];

    pub fn read(cursor: &mut Cursor<'_>, what: &str) -> Result<Type, ModelError> {
        let start = *cursor;
        let number = cursor.u32(what)?;
        let kind = Type::ALL.get(number as usize).copied();
        kind.ok_or_else(|| start.damaged(format!("{what} is of type {number}, which GGUF does not know")))
    }
}

/// One value of the metadata. Strings and arrays lie in the file.
#[derive(Clone, Copy)]
pub(super) enum Value<'a> {
    Integer(i128),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(&'a str),
    Array(List<'a>),
}

impl<'a> Value<'a> {
    /// What a message says of it.
    pub fn describe(&self) -> String {
        match self {
            Value::Integer(value) => format!("the integer {value}"),
            Value::F32(value) => format!("the f32 {value}"),
            Value::F64(value) => format!("the f64 {value}"),
            Value::Bool(value) => format!("the truth value {value}"),
            Value::String(value) => format!("a string of {} bytes", value.len()),
            Value::Array(list) => format!("an array of {} values of type {:?}", list.count, list.kind),
        }
    }

    pub fn integer<T: TryFrom<i128>>(self) -> Option<T> {
        let Value::Integer(value) = self else { return None };
        T::try_from(value).ok()
    }

    pub fn f32(self) -> Option<f32> {
        let Value::F32(value) = self else { return None };
        Some(value)
    }

    pub fn bool(self) -> Option<bool> {
        let Value::Bool(value) = self else { return None };
        Some(value)
    }

    pub fn string(self) -> Option<&'a str> {
        let Value::String(value) = self else { return None };
        Some(value)
    }

    /// Every value of an array, if each is of the asked type.
    pub fn all<T>(self, each: impl Fn(Value<'a>) -> Option<T>) -> Option<Vec<T>> {
        let Value::Array(List { kind, count, mut values }) = self else { return None };
        (0..count).map(|_| values.of_type(kind, "").ok().and_then(&each)).collect()
    }
}

/// An array whose values lie in the file from `values` on.
#[derive(Clone, Copy)]
pub(super) struct List<'a> {
    kind: Type,
    count: usize,
    values: Cursor<'a>,
}
