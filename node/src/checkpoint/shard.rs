//! The bytes of one shard: a safetensors file of f32 tensors. Owns its encoding and its decoding; never opens a file.
//!
//! I24: a header has at most 16 MiB, its tensors lie one after the other without overlap or gap, and fill the file.

use std::collections::BTreeMap;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Serialize;
use stoke_jobs::NamedTensor;

use super::folder::PART_BYTES;

/// A larger header is not ours, and would be memory that a forged file chooses.
pub(super) const HEADER_BYTES_MAX: u64 = 16 << 20;
/// The header's length stands before it.
pub(super) const PREFIX_BYTES: u64 = 8;

/// Where in the file something is wrong, and what.
#[derive(Debug)]
pub(super) struct Damage {
    pub offset: u64,
    pub problem: String,
}

fn damage(offset: u64, problem: impl Into<String>) -> Damage {
    Damage { offset, problem: problem.into() }
}

/// The header with its length: the first part of the file. Tensors keep their order, which is that of their data.
/// `notes` is what the file says of itself.
pub(super) fn encode_header(tensors: &[&NamedTensor], notes: &BTreeMap<String, String>) -> Result<Vec<u8>, String> {
    let mut end = 0;
    let infos = tensors.iter().map(|tensor| {
        let start = end;
        end += tensor.values.len() * size_of::<f32>();
        (tensor.name.clone(), TensorInfo { dtype: Dtype::F32, shape: tensor.shape.clone(), data_offsets: (start, end) })
    });
    let metadata = Metadata::new(None, infos.collect()).map_err(|error| error.to_string())?;
    let mut header: BTreeMap<&str, Entry<'_>> = BTreeMap::from([("__metadata__", Entry::Notes(notes))]);
    let tensors = metadata.offset_keys();
    header.extend(tensors.iter().filter_map(|name| Some((name.as_str(), Entry::Tensor(metadata.info(name)?)))));
    let mut json = serde_json::to_vec(&header).map_err(|error| error.to_string())?;
    json.resize(json.len().next_multiple_of(8), b' ');
    if json.len() as u64 > HEADER_BYTES_MAX {
        return Err(format!("header has {} bytes, the limit is {HEADER_BYTES_MAX}", json.len()));
    }
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

/// Sorted by name: the same tensors and notes are the same bytes.
#[derive(Serialize)]
#[serde(untagged)]
enum Entry<'a> {
    Notes(&'a BTreeMap<String, String>),
    Tensor(&'a TensorInfo),
}

/// What every file says: PyTorch's readers look for this key.
pub(super) fn notes() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_owned(), "pt".to_owned())])
}

/// The file in parts of about [`PART_BYTES`]: the header, then the values.
pub(super) struct Parts<'a> {
    header: Option<Vec<u8>>,
    /// What is left of each tensor, in order.
    rest: std::collections::VecDeque<&'a [f32]>,
}

impl<'a> Parts<'a> {
    pub(super) fn new(tensors: &[&'a NamedTensor], notes: &BTreeMap<String, String>) -> Result<Self, String> {
        let header = encode_header(tensors, notes)?;
        Ok(Self { header: Some(header), rest: tensors.iter().map(|tensor| tensor.values.as_slice()).collect() })
    }
}

impl Iterator for Parts<'_> {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let mut part = self.header.take().unwrap_or_default();
        while part.len() < PART_BYTES {
            let Some(values) = self.rest.pop_front() else { break };
            let room = (PART_BYTES - part.len()).div_ceil(size_of::<f32>());
            let (now, later) = values.split_at(room.min(values.len()));
            if !later.is_empty() {
                self.rest.push_front(later);
            }
            append_le(&mut part, now);
        }
        (!part.is_empty()).then_some(part)
    }
}

/// A shard's bytes, run by run.
pub fn encode(tensors: &[NamedTensor]) -> Result<impl Iterator<Item = Vec<u8>>, String> {
    Parts::new(&tensors.iter().collect::<Vec<_>>(), &notes())
}

/// The tensors of a whole shard.
pub fn decode(bytes: &[u8]) -> Result<Vec<NamedTensor>, String> {
    let words = |Damage { offset, problem }| format!("at byte {offset}: {problem}");
    let Some((prefix, rest)) = bytes.split_first_chunk::<{ PREFIX_BYTES as usize }>() else {
        return Err(format!("{} bytes are too few for a header", bytes.len()));
    };
    let len = header_len(*prefix, bytes.len() as u64).map_err(words)? as usize;
    let (json, data) = rest.split_at(len);
    let header = Header::parse(json, bytes.len() as u64).map_err(words)?;
    let (mut values, mut numbers) = (header.zeros(), data.as_chunks::<4>().0.iter());
    let places = values.iter_mut().flatten();
    places.zip(&mut numbers).for_each(|(value, bytes)| *value = f32::from_le_bytes(*bytes));
    Ok(header.tensors(values))
}

fn append_le(bytes: &mut Vec<u8>, values: &[f32]) {
    let start = bytes.len();
    bytes.resize(start + size_of_val(values), 0);
    for (into, value) in bytes[start..].as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *into = value.to_le_bytes();
    }
}

/// What the first bytes of a file say.
pub(super) struct Header {
    metadata: Metadata,
    /// Of the prefix and the header: where the values begin.
    pub data_start: u64,
}

/// The length of the header, from the first 8 bytes of a file that has `file_bytes` in all.
pub(super) fn header_len(prefix: [u8; 8], file_bytes: u64) -> Result<u64, Damage> {
    let len = u64::from_le_bytes(prefix);
    if len > HEADER_BYTES_MAX {
        return Err(damage(0, format!("header claims {len} bytes, the limit is {HEADER_BYTES_MAX}")));
    }
    if !len.is_multiple_of(PREFIX_BYTES) {
        return Err(damage(
            0,
            format!("header claims {len} bytes, which is no multiple of 8: values would not be aligned"),
        ));
    }
    if PREFIX_BYTES + len > file_bytes {
        return Err(damage(0, format!("header claims {len} bytes in a file of {file_bytes}")));
    }
    Ok(len)
}

impl Header {
    /// Checks a header (without its prefix) against the size of its file.
    pub(super) fn parse(json: &[u8], file_bytes: u64) -> Result<Self, Damage> {
        let metadata: Metadata = serde_json::from_slice(json)
            .map_err(|error| damage(PREFIX_BYTES + error.column() as u64, format!("header: {error}")))?;
        let data_start = PREFIX_BYTES + json.len() as u64;
        let end = data_start + metadata.data_len() as u64;
        if end != file_bytes {
            return Err(damage(end.min(file_bytes), format!("tensors end at byte {end}, the file has {file_bytes}")));
        }
        for (name, info) in metadata.tensors() {
            if info.dtype != Dtype::F32 {
                let offset = data_start + info.data_offsets.0 as u64;
                return Err(damage(offset, format!("tensor {name:?} is {}, checkpoints hold F32", info.dtype)));
            }
        }
        Ok(Self { metadata, data_start })
    }

    /// Tensor names, in the order of their data.
    pub(super) fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// Places for the values, tensor by tensor in the order of their data.
    pub(super) fn zeros(&self) -> Vec<Vec<f32>> {
        let len = |name: &String| self.metadata.info(name).map_or(0, |info| info.data_offsets.1 - info.data_offsets.0);
        self.names().iter().map(|name| vec![0.0; len(name) / size_of::<f32>()]).collect()
    }

    /// The tensors, from their values in the order of their data.
    pub(super) fn tensors(&self, values: Vec<Vec<f32>>) -> Vec<NamedTensor> {
        let named = |(name, values): (String, Vec<f32>)| {
            let info = self.metadata.info(&name).expect("the name is one of the metadata's");
            NamedTensor { shape: info.shape.clone(), values, name }
        };
        self.names().into_iter().zip(values).map(named).collect()
    }
}
