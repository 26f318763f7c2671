//! Folders of `config.json` and safetensors files, one or many, as Hugging Face publishes models. Owns the folder's rules; the crate
//! `safetensors` owns those of a file. Everything in a file is taken as hostile; no tensor is copied.
//!
//! Source: <https://huggingface.co/docs/safetensors> (format, `model.safetensors.index.json`).

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata};
use safetensors::{SafeTensorError, SafeTensors};

use super::files;
use super::kind::{Kind, Raw};
use crate::lm::ModelError;

pub(super) const CONFIG: &str = "config.json";
const ALONE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Longest header of a shard and longest JSON file: some hundred bytes a tensor, for a hundred thousand tensors.
const JSON_BYTES_MAX: u64 = 16 << 20;
/// Most shards of one model; the largest published have some hundred. Each takes a mapping.
const SHARDS_MAX: usize = 1024;

/// An open folder.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    /// Text of `config.json`.
    config: String,
    shards: Vec<Shard>,
    /// Which shard holds a tensor.
    tensors: BTreeMap<String, usize>,
}

impl Folder {
    /// Maps all shards and checks their headers.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let config = read(&path.join(CONFIG))?;
        let index = path.join(INDEX);
        let (shards, tensors) = if index.exists() { listed(path, &index)? } else { alone(path)? };
        Ok(Self { path: path.to_owned(), config, shards, tensors })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn config(&self) -> &str {
        &self.config
    }

    pub fn config_path(&self) -> PathBuf {
        self.path.join(CONFIG)
    }

    /// Sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// None if there is no such tensor; an error if its type is one that cannot be computed with.
    pub fn tensor(&self, name: &str) -> Result<Option<Raw<'_>>, ModelError> {
        self.tensors.get(name).map_or(Ok(None), |&shard| self.shards[shard].tensor(name))
    }
}

/// One safetensors file.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    map: Mmap,
    header: Metadata,
    /// Where the tensors begin.
    data: usize,
}

impl Shard {
    /// Maps a file and checks its header (see [`super::Gguf::open`] for what must not happen to an open file).
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        Self::read(path, files::map(path)?)
    }

    /// The same for bytes in memory, which are copied; `path` is the name in messages. For tests and fuzzing.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self, ModelError> {
        Self::read(path, files::copy(path, bytes)?)
    }

    fn read(path: &Path, map: Mmap) -> Result<Self, ModelError> {
        let damaged = |problem| ModelError::Damaged { path: path.to_owned(), problem };
        // The crate's own bound of the header is 100 MB.
        if let Some(length) = map.first_chunk().map(|length| u64::from_le_bytes(*length))
            && length > JSON_BYTES_MAX
        {
            return Err(damaged(format!("the length of its header is {length}, more than {JSON_BYTES_MAX}")));
        }
        let (length, header) = SafeTensors::read_metadata(&map).map_err(|error| damaged(problem(&error)))?;
        Ok(Self { path: path.to_owned(), map, header, data: 8 + length })
    }

    pub fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// See [`Folder::tensor`].
    pub fn tensor(&self, name: &str) -> Result<Option<Raw<'_>>, ModelError> {
        let Some(info) = self.header.info(name) else { return Ok(None) };
        let kind = match info.dtype {
            Dtype::F32 => Kind::F32,
            Dtype::F16 => Kind::F16,
            Dtype::BF16 => Kind::Bf16,
            other => return Err(self.unsupported(format!("tensor {name:?} of type {other:?}"))),
        };
        let (begin, end) = info.data_offsets;
        let bytes = &self.map[self.data + begin..self.data + end];
        // A dimension of 0 is sound in this format, and nothing can be computed with it.
        if kind.tensor_bytes(&info.shape) != Some(bytes.len()) {
            return Err(self.unsupported(format!("tensor {name:?} of the shape {:?}", info.shape)));
        }
        Ok(Some(Raw { kind, shape: info.shape.clone(), bytes }))
    }

    fn unsupported(&self, what: String) -> ModelError {
        ModelError::Unsupported {
            path: self.path.clone(),
            what,
            mend: "use weights of F32, F16 or BF16, or a GGUF file".to_owned(),
        }
    }
}

type Shards = (Vec<Shard>, BTreeMap<String, usize>);

/// A model in one file.
fn alone(folder: &Path) -> Result<Shards, ModelError> {
    let shard = Shard::open(&folder.join(ALONE))?;
    let tensors = shard.names().into_iter().map(|name| (name, 0)).collect();
    Ok((vec![shard], tensors))
}

/// The rest of the index does not matter to us.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// A model in the files that its index names, each tensor in the one that the index says.
fn listed(folder: &Path, index: &Path) -> Result<Shards, ModelError> {
    let damaged = |problem| ModelError::Damaged { path: index.to_owned(), problem };
    let parsed: Index =
        serde_json::from_str(&read(index)?).map_err(|source| ModelError::Json { path: index.to_owned(), source })?;
    let mut shards = Vec::new();
    let mut numbers: BTreeMap<String, usize> = BTreeMap::new();
    let mut tensors = BTreeMap::new();
    for (tensor, file) in parsed.weight_map {
        // The index may come from anybody: it names files of its own folder, and no other.
        if !file.ends_with(".safetensors") || file.contains(['/', '\\']) {
            return Err(damaged(format!("it names {file:?}, which is no safetensors file of this folder")));
        }
        let number = match numbers.get(&file) {
            Some(&number) => number,
            None if shards.len() == SHARDS_MAX => {
                return Err(damaged(format!("it names more than {SHARDS_MAX} files")));
            }
            None => {
                shards.push(Shard::open(&folder.join(&file))?);
                numbers.insert(file, shards.len() - 1);
                shards.len() - 1
            }
        };
        if shards[number].header.info(&tensor).is_none() {
            return Err(damaged(format!("tensor {tensor:?} is not in {}", shards[number].path.display())));
        }
        tensors.insert(tensor, number);
    }
    Ok((shards, tensors))
}

/// A JSON file's text.
fn read(path: &Path) -> Result<String, ModelError> {
    let open = || {
        let mut text = String::new();
        files::regular(path)?.take(JSON_BYTES_MAX + 1).read_to_string(&mut text)?;
        Ok(text)
    };
    let text = open().map_err(|source| files::file_error(path, source))?;
    if text.len() as u64 > JSON_BYTES_MAX {
        let problem = format!("it is longer than {JSON_BYTES_MAX} bytes");
        return Err(ModelError::Damaged { path: path.to_owned(), problem });
    }
    Ok(text)
}

/// The crate's words, in ours where they need to be known.
fn problem(error: &SafeTensorError) -> String {
    match error {
        SafeTensorError::InvalidHeaderLength | SafeTensorError::HeaderTooSmall => {
            "the file ends within its header".to_owned()
        }
        SafeTensorError::MetadataIncompleteBuffer => "the file is not as long as its header says".to_owned(),
        other => other.to_string(),
    }
}
