//! GGUF files, versions 2 and 3: metadata and tensors in one mapped file. Owns the format's rules; everything in a file is taken as hostile.
//! Never copies a tensor, and never allocates by a number that the file says before the bytes are there.
//!
//! Source: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md> and ggml's reader (`ggml/src/gguf.cpp`). Invariants:
//! - W2: every value of the metadata was read whole once when the file was opened, so that reading it again succeeds while the file stands.
//! - W3: every tensor's bytes lie in the file, aligned, and share none with another's.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::kind::{Kind, Raw};
use super::value::{Cursor, Type, Value};
use super::{files, names};
use crate::lm::ModelError;

/// The largest models have some thousand tensors and some hundred keys; more is damage.
const TENSORS_MAX: u64 = 1 << 16;
const KEYS_MAX: u64 = 1 << 16;
/// ggml's bounds: `GGML_MAX_DIMS` and `GGUF_DEFAULT_ALIGNMENT`.
const DIMENSIONS_MAX: u32 = 4;
const ALIGNMENT: u32 = 32;
/// Beyond a page, alignment has no use.
const ALIGNMENT_MAX: u32 = 1 << 16;

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    /// Where the value of each key begins: its type, then the value.
    keys: BTreeMap<String, usize>,
    tensors: BTreeMap<String, Tensor>,
}

/// Where a tensor lies, and as what.
#[derive(Debug)]
struct Tensor {
    kind: Kind,
    shape: Vec<usize>,
    /// From the file's first byte.
    bytes: Range<usize>,
}

impl Gguf {
    /// Maps a file and checks its whole header. The file must not be changed while it is open: a value that changes is another value, and
    /// a file cut short kills the process when the missing page is read.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        Self::read(path, files::map(path)?)
    }

    /// The same for bytes in memory, which are copied; `path` is the name in messages. For tests and fuzzing.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self, ModelError> {
        Self::read(path, files::copy(path, bytes)?)
    }

    fn read(path: &Path, map: Mmap) -> Result<Self, ModelError> {
        let mut cursor = Cursor { path, bytes: &map, at: 0 };
        let (tensors, keys) = counts(&mut cursor)?;
        let keys = read_keys(&mut cursor, keys)?;
        let alignment = alignment(cursor, &keys)?;
        let tensors = read_tensors(&mut cursor, tensors, alignment)?;
        Ok(Self { path: path.to_owned(), keys, tensors, map })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Canonical names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// By canonical name.
    pub fn tensor(&self, name: &str) -> Option<Raw<'_>> {
        let Tensor { kind, shape, bytes } = self.tensors.get(name)?;
        Some(Raw { kind: *kind, shape: shape.clone(), bytes: &self.map[bytes.clone()] })
    }

    /// Names of all keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.keys.keys().map(String::as_str)
    }

    pub fn string(&self, key: &str) -> Result<&str, ModelError> {
        self.needed(key, self.optional_string(key)?)
    }

    pub fn optional_string(&self, key: &str) -> Result<Option<&str>, ModelError> {
        self.value(key, "a string", Value::string)
    }

    /// Of any integer type whose value fits.
    pub fn u32(&self, key: &str) -> Result<u32, ModelError> {
        self.needed(key, self.optional_u32(key)?)
    }

    pub fn optional_u32(&self, key: &str) -> Result<Option<u32>, ModelError> {
        self.value(key, "an integer from 0 to 2^32 - 1", Value::integer)
    }

    pub fn f32(&self, key: &str) -> Result<f32, ModelError> {
        self.needed(key, self.optional_f32(key)?)
    }

    pub fn optional_f32(&self, key: &str) -> Result<Option<f32>, ModelError> {
        self.value(key, "an f32", Value::f32)
    }

    pub fn bool(&self, key: &str) -> Result<bool, ModelError> {
        self.needed(key, self.optional_bool(key)?)
    }

    pub fn optional_bool(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.value(key, "a truth value", Value::bool)
    }

    pub fn strings(&self, key: &str) -> Result<Vec<&str>, ModelError> {
        self.needed(key, self.optional_strings(key)?)
    }

    pub fn optional_strings(&self, key: &str) -> Result<Option<Vec<&str>>, ModelError> {
        self.value(key, "an array of strings", |value| value.all(Value::string))
    }

    /// Of any integer type whose values fit, as `tokenizer.ggml.token_type`.
    pub fn i32s(&self, key: &str) -> Result<Vec<i32>, ModelError> {
        self.needed(key, self.optional_i32s(key)?)
    }

    pub fn optional_i32s(&self, key: &str) -> Result<Option<Vec<i32>>, ModelError> {
        self.value(key, "an array of 32 bit integers", |value| value.all(Value::integer))
    }

    /// As `tokenizer.ggml.scores`.
    pub fn f32s(&self, key: &str) -> Result<Vec<f32>, ModelError> {
        self.needed(key, self.optional_f32s(key)?)
    }

    pub fn optional_f32s(&self, key: &str) -> Result<Option<Vec<f32>>, ModelError> {
        self.value(key, "an array of f32", |value| value.all(Value::f32))
    }

    fn needed<T>(&self, key: &str, value: Option<T>) -> Result<T, ModelError> {
        value.ok_or_else(|| self.key_error(key, "is missing".to_owned()))
    }

    fn value<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        convert: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(&at) = self.keys.get(key) else { return Ok(None) };
        let value = typed(&mut Cursor { path: &self.path, bytes: &self.map, at }, key)?;
        let problem = || self.key_error(key, format!("is {}, not {wanted}", value.describe()));
        convert(value).map(Some).ok_or_else(problem)
    }

    fn key_error(&self, key: &str, problem: String) -> ModelError {
        ModelError::Key { path: self.path.clone(), key: key.to_owned(), problem }
    }
}

/// Magic and version, then how many tensors and keys there are.
fn counts(cursor: &mut Cursor<'_>) -> Result<(u64, u64), ModelError> {
    let start = *cursor;
    if cursor.take(4, "the magic number")? != b"GGUF" {
        return Err(start.damaged("it does not begin with \"GGUF\""));
    }
    let unsupported = |what: String| ModelError::Unsupported {
        path: start.path.to_owned(),
        what,
        mend: "convert it with a current llama.cpp to GGUF version 3, little-endian".to_owned(),
    };
    match cursor.u32("the version")? {
        2 | 3 => {}
        version if (1..=3).contains(&version.swap_bytes()) => return Err(unsupported("big-endian GGUF".to_owned())),
        version => return Err(unsupported(format!("GGUF version {version}"))),
    }
    Ok((cursor.count(TENSORS_MAX, "the number of tensors")?, cursor.count(KEYS_MAX, "the number of keys")?))
}

fn read_keys(cursor: &mut Cursor<'_>, count: u64) -> Result<BTreeMap<String, usize>, ModelError> {
    let mut keys = BTreeMap::new();
    for _ in 0..count {
        let start = *cursor;
        let key = cursor.name("a key")?;
        if keys.insert(key.to_owned(), cursor.at).is_some() {
            return Err(start.damaged(format!("the key {key:?} is there twice")));
        }
        typed(cursor, key)?;
    }
    Ok(keys)
}

/// A value after its type.
fn typed<'a>(cursor: &mut Cursor<'a>, key: &str) -> Result<Value<'a>, ModelError> {
    let what = format!("the value of {key:?}");
    let kind = Type::read(cursor, &what)?;
    cursor.of_type(kind, &what)
}

fn alignment(mut cursor: Cursor<'_>, keys: &BTreeMap<String, usize>) -> Result<usize, ModelError> {
    const KEY: &str = "general.alignment";
    let Some(&at) = keys.get(KEY) else { return Ok(ALIGNMENT as usize) };
    cursor.at = at;
    let start = cursor;
    let value = typed(&mut cursor, KEY)?;
    let alignment = value.integer().filter(|value: &u32| value.is_power_of_two() && *value <= ALIGNMENT_MAX);
    let problem = || format!("{KEY} is {}, not a power of two up to {ALIGNMENT_MAX}", value.describe());
    alignment.map(|value| value as usize).ok_or_else(|| start.damaged(problem()))
}

fn read_tensors(cursor: &mut Cursor<'_>, count: u64, alignment: usize) -> Result<BTreeMap<String, Tensor>, ModelError> {
    let mut infos = Vec::new();
    for _ in 0..count {
        infos.push((*cursor, TensorInfo::read(cursor)?));
    }
    // The data begin at the next aligned byte; a file without tensors may end before it.
    let data = cursor.at.next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    let mut taken: BTreeMap<usize, usize> = BTreeMap::new();
    for (start, info) in infos {
        let TensorInfo { name, kind, shape, bytes, offset } = info;
        let begin = usize::try_from(offset).ok().filter(|offset| offset.is_multiple_of(alignment));
        let begin = begin.and_then(|offset| data.checked_add(offset));
        let begin = begin.ok_or_else(|| {
            start.damaged(format!("tensor {name:?} begins at {offset}, not at a multiple of {alignment}"))
        })?;
        let end = begin.checked_add(bytes).filter(|end| *end <= cursor.bytes.len()).ok_or_else(|| {
            let size = cursor.bytes.len();
            start.damaged(format!("tensor {name:?} needs {bytes} bytes from byte {begin} on, and the file has {size}"))
        })?;
        let before = taken.range(..end).next_back();
        if before.is_some_and(|(_, &end_before)| end_before > begin) {
            return Err(start.damaged(format!("tensor {name:?} lies on another tensor")));
        }
        taken.insert(begin, end);
        if tensors.insert(names::canonical(name), Tensor { kind, shape, bytes: begin..end }).is_some() {
            return Err(start.damaged(format!("tensor {name:?} is there twice")));
        }
    }
    Ok(tensors)
}

/// What the header says of one tensor.
struct TensorInfo<'a> {
    name: &'a str,
    kind: Kind,
    shape: Vec<usize>,
    bytes: usize,
    /// From the beginning of the data.
    offset: u64,
}

impl<'a> TensorInfo<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, ModelError> {
        let start = *cursor;
        let name = cursor.name("the name of a tensor")?;
        let dimensions = cursor.u32("the number of dimensions")?;
        if !(1..=DIMENSIONS_MAX).contains(&dimensions) {
            return Err(
                start.damaged(format!("tensor {name:?} has {dimensions} dimensions, not 1 to {DIMENSIONS_MAX}"))
            );
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(cursor.u64("a dimension")?);
        }
        // GGUF lists the innermost dimension first.
        shape.reverse();
        let kind = read_kind(cursor, name)?;
        let offset = cursor.u64("the offset of a tensor")?;
        let sizes: Option<Vec<usize>> = shape.iter().map(|&size| usize::try_from(size).ok()).collect();
        let sized = sizes.and_then(|shape| kind.tensor_bytes(&shape).map(|bytes| (shape, bytes)));
        let (shape, bytes) = sized.ok_or_else(|| {
            start.damaged(format!("tensor {name:?} of type {} cannot have the shape {shape:?}", kind.name()))
        })?;
        Ok(Self { name, kind, shape, bytes, offset })
    }
}

fn read_kind(cursor: &mut Cursor<'_>, tensor: &str) -> Result<Kind, ModelError> {
    let start = *cursor;
    let number = cursor.u32("the type of a tensor")?;
    let unsupported = |name: &str| ModelError::Unsupported {
        path: start.path.to_owned(),
        what: format!("tensor {tensor:?} of type {name}"),
        mend: format!("use a file of {}", Kind::ALL.map(Kind::name).join(", ")),
    };
    match number {
        0 => Ok(Kind::F32),
        1 => Ok(Kind::F16),
        2 => Ok(Kind::Q4_0),
        3 => Ok(Kind::Q4_1),
        8 => Ok(Kind::Q8_0),
        30 => Ok(Kind::Bf16),
        6 => Err(unsupported("Q5_0")),
        7 => Err(unsupported("Q5_1")),
        10 => Err(unsupported("Q2_K")),
        11 => Err(unsupported("Q3_K")),
        12 => Err(unsupported("Q4_K")),
        13 => Err(unsupported("Q5_K")),
        14 => Err(unsupported("Q6_K")),
        other => Err(unsupported(&other.to_string())),
    }
}
