//! Reading a checkpoint: nothing is believed before it was checked (I22, I24). Owns the checks; never repairs anything.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use blake3::hazmat::ChainingValue;
use stoke_jobs::NamedTensor;
use stoke_protocol::ids::Digest;

use super::error::CheckpointError;
use super::folder::Folder;
use super::manifest::{MANIFEST_BYTES_MAX, MANIFEST_FILE, Manifest, Shard};
use super::memory::ShardMemory;
use super::plan::parse_folder_name;
use super::ranges::{RangeHash, file_blake3, ranges, side_by_side};
use super::shard::{Damage, Header, PREFIX_BYTES, header_len};

/// Read at once for a header: most are shorter, a longer one is read again.
const HEAD_BYTES: u64 = 64 << 10;

/// What a whole verification saw.
#[derive(Clone, Debug)]
pub struct Verified {
    pub manifest: Manifest,
    pub tensors: usize,
    pub bytes: u64,
}

/// The manifest of the checkpoint at `uri` (`file:///...` or a path). Looks at no shard.
pub fn open(uri: &str) -> Result<Manifest, CheckpointError> {
    open_committed(uri, None)
}

/// The same, `committed` as for [`load`].
pub fn open_committed(uri: &str, committed: Option<Digest>) -> Result<Manifest, CheckpointError> {
    read_manifest(&Folder::at(uri)?, committed)
}

/// Reads every byte of every shard, in constant memory. `committed` as for [`load`].
pub fn verify(uri: &str, committed: Option<Digest>) -> Result<Verified, CheckpointError> {
    let folder = Folder::at(uri)?;
    let manifest = read_manifest(&folder, committed)?;
    let heads = read_heads(&folder, manifest.shards.iter().collect())?;
    let tensors = heads.iter().map(|head| head.header.names().len()).sum();
    let pieces = heads.iter().flat_map(|head| head.pieces(&mut [])).collect();
    read_pieces(&folder, &heads, pieces)?;
    Ok(Verified { tensors, bytes: manifest.bytes(), manifest })
}

/// Reads a whole checkpoint, whatever number of shards it has, straight into its tensors; every byte is verified before any of it is given.
/// `committed` is the BLAKE3 of the manifest that the catalogue knows; without it, whatever checkpoint lies there is read.
pub fn load(uri: &str, committed: Option<Digest>) -> Result<(Manifest, Vec<NamedTensor>), CheckpointError> {
    let folder = Folder::at(uri)?;
    let manifest = read_manifest(&folder, committed)?;
    let tensors = read_shards(&folder, manifest.shards.iter().collect())?.into_iter().flatten().collect();
    Ok((manifest, tensors))
}

/// The shards of a checkpoint that cost no request to an object store: in this machine's memory, or files. Page cache and disk are many times
/// faster than a peer.
pub fn near(uri: &str, manifest: &Manifest, memory: Option<&ShardMemory>) -> Vec<u32> {
    let folder = Folder::at(uri).ok().filter(Folder::is_files);
    let is_near = |shard: &&Shard| {
        let is_file = |folder: &Folder| matches!(folder.size(&shard.file), Ok(Some(bytes)) if bytes == shard.bytes);
        memory.is_some_and(|memory| memory.holds(manifest.step, shard)) || folder.as_ref().is_some_and(is_file)
    };
    manifest.shards.iter().filter(is_near).map(|shard| shard.index).collect()
}

/// Reads some shards of the checkpoint at `uri` like [`load`], each from this machine's memory if it is there and whole.
pub fn load_shards(
    uri: &str,
    manifest: &Manifest,
    wanted: &[u32],
    memory: Option<&ShardMemory>,
) -> Result<Vec<(u32, Vec<NamedTensor>)>, CheckpointError> {
    let (mut read, mut rest) = (Vec::new(), Vec::new());
    for shard in manifest.shards.iter().filter(|shard| wanted.contains(&shard.index)) {
        match memory.and_then(|memory| memory.read(manifest.step, shard)) {
            Some(tensors) => read.push((shard.index, tensors)),
            None => rest.push(shard),
        }
    }
    tracing::info!(in_memory = read.len(), in_store = rest.len(), of = manifest.shards.len(), "reading shards");
    let indices: Vec<u32> = rest.iter().map(|shard| shard.index).collect();
    read.extend(indices.into_iter().zip(read_shards(&Folder::at(uri)?, rest)?));
    Ok(read)
}

/// The tensors of each of these shards.
pub(super) fn read_shards(folder: &Folder, shards: Vec<&Shard>) -> Result<Vec<Vec<NamedTensor>>, CheckpointError> {
    let heads = read_heads(folder, shards)?;
    // Bounded by the files: their sizes were compared with the manifest's, and the headers' with them.
    let mut values: Vec<Vec<Vec<f32>>> = heads.iter().map(|head| head.header.zeros()).collect();
    let pieces = heads.iter().zip(&mut values).flat_map(|(head, values)| head.pieces(values)).collect();
    read_pieces(folder, &heads, pieces)?;
    Ok(heads.iter().zip(values).map(|(head, values)| head.header.tensors(values)).collect())
}

fn read_manifest(folder: &Folder, committed: Option<Digest>) -> Result<Manifest, CheckpointError> {
    let damaged = |problem: String| CheckpointError::Manifest { uri: folder.uri().to_owned(), problem };
    let Some(bytes) = folder.size(MANIFEST_FILE)? else {
        return Err(CheckpointError::Missing { uri: folder.uri().to_owned() });
    };
    if bytes > MANIFEST_BYTES_MAX {
        return Err(damaged(format!("it has {bytes} bytes, the limit is {MANIFEST_BYTES_MAX}")));
    }
    let mut json = Vec::new();
    folder.read(MANIFEST_FILE, None, |chunk| {
        json.extend_from_slice(chunk);
        Ok(())
    })?;
    let manifest = Manifest::from_json(&json).map_err(damaged)?;
    let found = Digest(*blake3::hash(&json).as_bytes());
    if let Some(expected) = committed.filter(|committed| *committed != found) {
        return Err(CheckpointError::Foreign { uri: folder.uri().to_owned(), found, expected });
    }
    // A whole checkpoint that lies where another one was.
    let (found, name) = ((manifest.step, manifest.generation), folder.name());
    if parse_folder_name(name).is_some_and(|named| named != found) {
        return Err(damaged(format!("it is of {} of {}, and lies in {name}", manifest.step, manifest.generation)));
    }
    Ok(manifest)
}

/// What a shard says of itself; counts only once all of its bytes were verified.
struct Head<'a> {
    shard: &'a Shard,
    /// Prefix and header, as they were read.
    bytes: Vec<u8>,
    header: Header,
}

/// A range of a shard, and where its values go; nowhere when they are only verified.
struct Piece<'a> {
    head: &'a Head<'a>,
    range: Range<u64>,
    into: VecDeque<&'a mut [f32]>,
}

fn read_heads<'a>(folder: &Folder, shards: Vec<&'a Shard>) -> Result<Vec<Head<'a>>, CheckpointError> {
    let heads = side_by_side(shards, |shard| read_head(folder, shard))?;
    let mut seen = BTreeMap::new();
    heads.iter().try_for_each(|head| no_tensor_twice(&mut seen, head.shard, &head.header))?;
    Ok(heads)
}

fn read_head<'a>(folder: &Folder, shard: &'a Shard) -> Result<Head<'a>, CheckpointError> {
    let at = |offset, problem: String| damaged(shard, Damage { offset, problem });
    let Some(bytes) = folder.size(&shard.file)? else {
        return Err(at(0, "the file is missing".into()));
    };
    if bytes != shard.bytes {
        return Err(at(
            bytes.min(shard.bytes),
            format!("the file has {bytes} bytes, the manifest says {}", shard.bytes),
        ));
    }
    let read = |end: u64| {
        let mut head = Vec::new();
        folder.read(&shard.file, Some(0..end), |chunk| {
            head.extend_from_slice(chunk);
            Ok(())
        })?;
        if head.len() as u64 == end { Ok(head) } else { Err(ended(shard, head.len() as u64)) }
    };
    if bytes < PREFIX_BYTES {
        return Err(at(0, "the file is too short for a header".into()));
    }
    let mut head = read(bytes.min(HEAD_BYTES))?;
    let prefix = *head.first_chunk().expect("the file has as many bytes");
    let end = PREFIX_BYTES + header_len(prefix, bytes).map_err(|damage| damaged(shard, damage))?;
    if end > head.len() as u64 {
        head = read(end)?;
    }
    head.truncate(end as usize);
    let header = Header::parse(&head[PREFIX_BYTES as usize..], bytes).map_err(|damage| damaged(shard, damage))?;
    Ok(Head { shard, bytes: head, header })
}

impl<'a> Head<'a> {
    /// The whole shard, range by range; `values` are its tensors, or none at all.
    fn pieces(&'a self, values: &'a mut [Vec<f32>]) -> Vec<Piece<'a>> {
        let mut rest: VecDeque<&mut [f32]> = values.iter_mut().map(Vec::as_mut_slice).collect();
        let mut cut = |range: Range<u64>| {
            let mut room =
                (range.end - range.end.min(self.header.data_start.max(range.start))) as usize / size_of::<f32>();
            let mut into = VecDeque::new();
            while room > 0
                && let Some(values) = rest.pop_front()
            {
                let (now, later) = values.split_at_mut(room.min(values.len()));
                room -= now.len();
                into.push_back(now);
                if !later.is_empty() {
                    rest.push_front(later);
                }
            }
            Piece { head: self, range, into }
        };
        ranges(self.shard.bytes).map(&mut cut).collect()
    }
}

/// Reads every piece to its place and compares the hashes of all shards. What the places hold counts only when this returns well.
fn read_pieces(folder: &Folder, heads: &[Head<'_>], pieces: Vec<Piece<'_>>) -> Result<(), CheckpointError> {
    let hashes = side_by_side(pieces, |piece| read_piece(folder, piece))?;
    let mut rest = &hashes[..];
    for Head { shard, .. } in heads {
        let own = rest.split_off(..ranges(shard.bytes).count()).expect("a hash for every piece");
        if file_blake3(own, shard.bytes) != shard.blake3.0 {
            let problem = format!("the BLAKE3 of its {} bytes is not the manifest's: a bit has changed", shard.bytes);
            return Err(damaged(shard, Damage { offset: 0, problem }));
        }
    }
    Ok(())
}

fn read_piece(folder: &Folder, piece: Piece<'_>) -> Result<ChainingValue, CheckpointError> {
    let Piece { head: Head { shard, bytes: head, .. }, range, mut into } = piece;
    let (mut hash, mut at) = (RangeHash::new(&range, shard.bytes), range.start);
    folder.read(&shard.file, Some(range.clone()), |chunk| {
        hash.update(chunk);
        // The header was read before: it is believed because these bytes, which are hashed, are the same.
        let known = head.get(at as usize..).unwrap_or_default();
        let (again, values) = chunk.split_at(known.len().min(chunk.len()));
        if again != &known[..again.len()] {
            let problem = "the header has changed while the file was read".to_owned();
            return Err(damaged(shard, Damage { offset: at, problem }));
        }
        put(values, &mut into);
        at += chunk.len() as u64;
        Ok(())
    })?;
    if at == range.end { Ok(hash.finish()) } else { Err(ended(shard, at)) }
}

/// The values of `bytes` to the places that are left.
fn put(bytes: &[u8], into: &mut VecDeque<&mut [f32]>) {
    let mut numbers = bytes.as_chunks::<4>().0;
    while !numbers.is_empty()
        && let Some(place) = into.pop_front()
    {
        let (now, later) = place.split_at_mut(numbers.len().min(place.len()));
        let (these, rest) = numbers.split_at(now.len());
        now.iter_mut().zip(these).for_each(|(value, bytes)| *value = f32::from_le_bytes(*bytes));
        numbers = rest;
        if !later.is_empty() {
            into.push_front(later);
        }
    }
}

fn damaged(shard: &Shard, Damage { offset, problem }: Damage) -> CheckpointError {
    CheckpointError::Shard { shard: shard.index, file: shard.file.clone(), offset, problem }
}

fn ended(shard: &Shard, at: u64) -> CheckpointError {
    let problem = format!("the file ended after {at} of {} bytes", shard.bytes);
    damaged(shard, Damage { offset: at, problem })
}

fn no_tensor_twice(seen: &mut BTreeMap<String, u32>, shard: &Shard, header: &Header) -> Result<(), CheckpointError> {
    for name in header.names() {
        if let Some(other) = seen.insert(name.clone(), shard.index) {
            let problem = format!("tensor {name:?} is in shard {other} too");
            return Err(damaged(shard, Damage { offset: header.data_start, problem }));
        }
    }
    Ok(())
}
