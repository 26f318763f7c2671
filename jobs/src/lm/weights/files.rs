//! A model's weights, whichever way they lie on disk. Owns the choice between the two formats and the mapping of files into memory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapMut};

use super::gguf::Gguf;
use super::kind::Raw;
use super::safetensors::{CONFIG, Folder};
use crate::lm::{DecoderConfig, EncoderConfig, ModelError};

/// The weights of one model, mapped: memory holds only what is read.
#[derive(Debug)]
pub struct Weights(Format);

#[derive(Debug)]
enum Format {
    Gguf(Gguf),
    Folder(Folder),
}

impl Weights {
    /// Opens a GGUF file, a folder that holds one and no `config.json`, or a folder with `config.json` and safetensors files as Hugging Face
    /// publishes them. All headers are checked. The files must not be changed while they are open (see [`Gguf::open`]).
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            return Err(ModelError::Unsupported {
                path: path.to_owned(),
                what: "a safetensors file by itself".to_owned(),
                mend: "name its folder, which must hold its config.json too".to_owned(),
            });
        }
        let found = fs::metadata(path).map_err(|source| file_error(path, source))?;
        let format = if !found.is_dir() {
            Format::Gguf(Gguf::open(path)?)
        } else if let Some(file) = only_gguf(path)? {
            Format::Gguf(Gguf::open(&file)?)
        } else {
            Format::Folder(Folder::open(path)?)
        };
        Ok(Self(format))
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        match &self.0 {
            Format::Gguf(gguf) => gguf.path(),
            Format::Folder(folder) => folder.path(),
        }
    }

    /// Hugging Face's names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let (gguf, folder) = match &self.0 {
            Format::Gguf(gguf) => (Some(gguf.names()), None),
            Format::Folder(folder) => (None, Some(folder.names())),
        };
        gguf.into_iter().flatten().chain(folder.into_iter().flatten())
    }

    pub fn contains(&self, name: &str) -> bool {
        match &self.0 {
            Format::Gguf(gguf) => gguf.tensor(name).is_some(),
            Format::Folder(folder) => folder.contains(name),
        }
    }

    /// A tensor by Hugging Face's name.
    pub fn tensor(&self, name: &str) -> Result<Raw<'_>, ModelError> {
        let found = match &self.0 {
            Format::Gguf(gguf) => gguf.tensor(name),
            Format::Folder(folder) => folder.tensor(name)?,
        };
        found.ok_or_else(|| self.tensor_error(name, "is missing".to_owned()))
    }

    /// A tensor that must have this shape, row-major.
    pub fn shaped(&self, name: &str, shape: &[usize]) -> Result<Raw<'_>, ModelError> {
        let tensor = self.tensor(name)?;
        if tensor.shape != shape {
            let problem = format!("has the shape {:?}, and the configuration asks for {shape:?}", tensor.shape);
            return Err(self.tensor_error(name, problem));
        }
        Ok(tensor)
    }

    /// What the files say of the model's shape; a model that would be computed wrongly is refused.
    pub fn config(&self) -> Result<DecoderConfig, ModelError> {
        match &self.0 {
            Format::Gguf(gguf) => DecoderConfig::from_gguf(gguf),
            Format::Folder(folder) => DecoderConfig::from_json(&folder.config_path(), folder.config()),
        }
    }

    /// The same of a model that makes embeddings, with how it pools them.
    pub fn encoder_config(&self) -> Result<EncoderConfig, ModelError> {
        match &self.0 {
            Format::Gguf(gguf) => Err(ModelError::Unsupported {
                path: gguf.path().to_owned(),
                what: "an embedding model in a GGUF file".to_owned(),
                mend: "name a folder with config.json, model.safetensors and tokenizer.json".to_owned(),
            }),
            Format::Folder(folder) => EncoderConfig::open(&folder.config_path(), folder.config()),
        }
    }

    /// The metadata of a GGUF file; none of a folder.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.0 {
            Format::Gguf(gguf) => Some(gguf),
            Format::Folder(_) => None,
        }
    }

    fn tensor_error(&self, name: &str, problem: String) -> ModelError {
        ModelError::Tensor { path: self.path().to_owned(), tensor: name.to_owned(), problem }
    }
}

/// The GGUF file of a folder without `config.json`, if it is the only one.
fn only_gguf(folder: &Path) -> Result<Option<PathBuf>, ModelError> {
    if folder.join(CONFIG).exists() {
        return Ok(None);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(|source| file_error(folder, source))? {
        let file = entry.map_err(|source| file_error(folder, source))?.path();
        if file.extension().is_some_and(|extension| extension == "gguf") {
            files.push(file);
        }
    }
    match files.len() {
        0 => Ok(None),
        1 => Ok(files.pop()),
        count => Err(ModelError::Unsupported {
            path: folder.to_owned(),
            what: format!("a folder with {count} .gguf files"),
            mend: "name one of them".to_owned(),
        }),
    }
}

/// A regular file, read-only and shared with every process that maps it.
pub(super) fn map(path: &Path) -> Result<Mmap, ModelError> {
    let open = || {
        let file = regular(path)?;
        // SAFETY: the bytes are only read, and no reference to them outlives the map. Another process that writes to the file meanwhile
        // is excluded by the contract of `Weights::open`, as for every program that maps weights.
        unsafe { Mmap::map(&file) }
    };
    open().map_err(|source| file_error(path, source))
}

/// Opens what has an end: a pipe would wait for its writer.
pub(super) fn regular(path: &Path) -> std::io::Result<File> {
    if !fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("it is not a regular file"));
    }
    File::open(path)
}

/// The same for bytes in memory.
pub(super) fn copy(path: &Path, bytes: &[u8]) -> Result<Mmap, ModelError> {
    let copy = || {
        let mut map = MmapMut::map_anon(bytes.len())?;
        map.copy_from_slice(bytes);
        map.make_read_only()
    };
    copy().map_err(|source| file_error(path, source))
}

pub(super) fn file_error(path: &Path, source: std::io::Error) -> ModelError {
    let mend = match source.kind() {
        std::io::ErrorKind::NotFound => "check the path; jobs/models/fetch.py fetches the models of its table",
        std::io::ErrorKind::PermissionDenied => "give this user the right to read it",
        _ => "name a .gguf file, or a folder with config.json and model.safetensors",
    };
    ModelError::File { path: path.to_owned(), source, mend }
}
