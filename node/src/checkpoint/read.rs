//! Reading a checkpoint: nothing is believed before it was checked (I22, I24). Owns the checks; never repairs anything.

use std::collections::BTreeMap;

use stoke_jobs::NamedTensor;

use super::error::CheckpointError;
use super::folder::Folder;
use super::manifest::{MANIFEST_BYTES_MAX, MANIFEST_FILE, Manifest, Shard};
use super::plan::parse_folder_name;
use super::shard::{Damage, Header, PREFIX_BYTES, header_len};

/// What a whole verification saw.
#[derive(Clone, Debug)]
pub struct Verified {
    pub manifest: Manifest,
    pub tensors: usize,
    pub bytes: u64,
}

/// The manifest of the checkpoint at `uri` (`file:///...` or a path). Looks at no shard.
pub fn open(uri: &str) -> Result<Manifest, CheckpointError> {
    read_manifest(&Folder::at(uri)?)
}

/// Reads every byte of every shard, in constant memory.
pub fn verify(uri: &str) -> Result<Verified, CheckpointError> {
    let folder = Folder::at(uri)?;
    let manifest = read_manifest(&folder)?;
    let mut seen = BTreeMap::new();
    for shard in &manifest.shards {
        let header = scan(&folder, shard, |_| ())?;
        no_tensor_twice(&mut seen, shard, &header)?;
    }
    Ok(Verified { tensors: seen.len(), bytes: manifest.bytes(), manifest })
}

/// Reads a whole checkpoint, whatever number of shards it has; every shard is verified before one of its tensors is used.
pub fn load(uri: &str) -> Result<(Manifest, Vec<NamedTensor>), CheckpointError> {
    let folder = Folder::at(uri)?;
    let manifest = read_manifest(&folder)?;
    let (mut seen, mut tensors) = (BTreeMap::new(), Vec::new());
    for shard in &manifest.shards {
        // Bounded by the file: `scan` compares the sizes first, and a forged size asks for no memory.
        let held = folder.size(&shard.file)?.filter(|bytes| *bytes == shard.bytes).unwrap_or_default();
        let mut data = Vec::with_capacity(held as usize);
        let header = scan(&folder, shard, |chunk| data.extend_from_slice(chunk))?;
        no_tensor_twice(&mut seen, shard, &header)?;
        tensors.extend(header.tensors(&data));
    }
    Ok((manifest, tensors))
}

fn read_manifest(folder: &Folder) -> Result<Manifest, CheckpointError> {
    let damaged = |problem: String| CheckpointError::Manifest { uri: folder.uri().to_owned(), problem };
    let Some(bytes) = folder.size(MANIFEST_FILE)? else {
        return Err(CheckpointError::Missing { uri: folder.uri().to_owned() });
    };
    if bytes > MANIFEST_BYTES_MAX {
        return Err(damaged(format!("it has {bytes} bytes, the limit is {MANIFEST_BYTES_MAX}")));
    }
    let mut json = Vec::new();
    folder.read(MANIFEST_FILE, |chunk| {
        json.extend_from_slice(chunk);
        Ok(())
    })?;
    let manifest = Manifest::from_json(&json).map_err(damaged)?;
    // A whole checkpoint that lies where another one was.
    let (found, name) = ((manifest.step, manifest.generation), folder.name());
    if parse_folder_name(name).is_some_and(|named| named != found) {
        return Err(damaged(format!("it is of {} of {}, and lies in {name}", manifest.step, manifest.generation)));
    }
    Ok(manifest)
}

/// Streams a shard: size, header and hash are checked, the values go to `sink`. What `sink` got counts only when this returns well.
fn scan(folder: &Folder, shard: &Shard, mut sink: impl FnMut(&[u8])) -> Result<Header, CheckpointError> {
    let damaged = |Damage { offset, problem }| CheckpointError::Shard {
        shard: shard.index,
        file: shard.file.clone(),
        offset,
        problem,
    };
    let at = |offset, problem: String| damaged(Damage { offset, problem });
    let Some(bytes) = folder.size(&shard.file)? else {
        return Err(at(0, "the file is missing".into()));
    };
    if bytes != shard.bytes {
        return Err(at(
            bytes.min(shard.bytes),
            format!("the file has {bytes} bytes, the manifest says {}", shard.bytes),
        ));
    }
    let mut hasher = blake3::Hasher::new();
    let mut head = Head { begun: Vec::new(), header: None };
    let mut read = 0;
    folder.read(&shard.file, |chunk| {
        hasher.update(chunk);
        read += chunk.len() as u64;
        if let Some(values) = head.take(chunk, bytes).map_err(damaged)? {
            sink(&values);
        }
        Ok(())
    })?;
    if read != bytes {
        return Err(at(read, format!("the file ended after {read} of {bytes} bytes")));
    }
    if *hasher.finalize().as_bytes() != shard.blake3.0 {
        return Err(at(0, format!("the BLAKE3 of its {bytes} bytes is not the manifest's: a bit has changed")));
    }
    head.header.ok_or_else(|| at(0, "the file is too short for a header".into()))
}

/// The beginning of a file, until its header is complete.
struct Head {
    begun: Vec<u8>,
    header: Option<Header>,
}

impl Head {
    /// The part of `chunk` that is values.
    fn take<'a>(&mut self, chunk: &'a [u8], file_bytes: u64) -> Result<Option<std::borrow::Cow<'a, [u8]>>, Damage> {
        if self.header.is_some() {
            return Ok(Some(chunk.into()));
        }
        self.begun.extend_from_slice(chunk);
        let Some((prefix, rest)) = self.begun.split_first_chunk::<{ PREFIX_BYTES as usize }>() else { return Ok(None) };
        let len = header_len(*prefix, file_bytes)? as usize;
        let Some((json, values)) = rest.split_at_checked(len) else { return Ok(None) };
        self.header = Some(Header::parse(json, file_bytes)?);
        let values = values.to_vec();
        self.begun = Vec::new();
        Ok(Some(values.into()))
    }
}

fn no_tensor_twice(seen: &mut BTreeMap<String, u32>, shard: &Shard, header: &Header) -> Result<(), CheckpointError> {
    for name in header.names() {
        if let Some(other) = seen.insert(name.clone(), shard.index) {
            let problem = format!("tensor {name:?} is in shard {other} too");
            let offset = header.data_start;
            return Err(CheckpointError::Shard { shard: shard.index, file: shard.file.clone(), offset, problem });
        }
    }
    Ok(())
}
