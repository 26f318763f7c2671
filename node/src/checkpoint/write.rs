//! Writing a checkpoint and removing one. Owns the order of things: shards before the manifest, and the manifest first when removing (I21,
//! I23); never decides when a checkpoint is visible (the coordinator does).

use std::sync::mpsc::sync_channel;
use std::thread;

use bytes::Bytes;
use stoke_jobs::NamedTensor;
use stoke_protocol::ids::{Digest, Generation, Step};
use stoke_protocol::message::rank::ShardRecord;

use super::error::CheckpointError;
use super::folder::Folder;
use super::manifest::{MANIFEST_FILE, Manifest};
use super::plan::{parse_folder_name, shard_file};
use super::shard::{Parts, notes};

/// Writes one shard; when it returns, the shard is durable. Nothing is left of it after an error.
pub fn write_shard(
    folder: &Folder,
    index: u32,
    world: u32,
    tensors: &[NamedTensor],
) -> Result<ShardRecord, CheckpointError> {
    let file = shard_file(index, world);
    let tensors: Vec<&NamedTensor> = tensors.iter().collect();
    let damaged = |problem| CheckpointError::Shard { shard: index, file: file.clone(), offset: 0, problem };
    let parts = Parts::new(&tensors, &notes()).map_err(damaged)?;
    // A part is made and hashed while the one before it is written.
    let (give, take) = sync_channel::<Bytes>(1);
    thread::scope(|scope| {
        let making = scope.spawn(move || {
            let (mut hasher, mut bytes) = (blake3::Hasher::new(), 0);
            for part in parts {
                hasher.update(&part);
                bytes += part.len() as u64;
                if give.send(part.into()).is_err() {
                    break;
                }
            }
            (bytes, Digest(*hasher.finalize().as_bytes()))
        });
        let written = folder.write(&file, || take.recv().ok());
        // One that is not written any more need not be made.
        drop(take);
        let (bytes, blake3) = making.join().expect("making parts does not panic");
        written.map(|()| ShardRecord { index, file: file.clone(), bytes, blake3 })
    })
}

/// Writes the manifest, once: the same manifest again is no error, another one is (I2). Returns the digest of its bytes.
pub fn write_manifest(folder: &Folder, manifest: &Manifest) -> Result<Digest, CheckpointError> {
    let json = manifest.to_json();
    let digest = Digest(*blake3::hash(&json).as_bytes());
    if folder.create(MANIFEST_FILE, json.clone())? {
        return Ok(digest);
    }
    let mut present = Vec::new();
    folder.read(MANIFEST_FILE, None, |chunk| {
        present.extend_from_slice(chunk);
        Ok(())
    })?;
    if present == json { Ok(digest) } else { Err(CheckpointError::Conflict { uri: folder.uri().to_owned() }) }
}

/// Removes a whole checkpoint, manifest first: a crash in between leaves shards that mean nothing, never a manifest without its shards.
pub fn remove(uri: &str) -> Result<(), CheckpointError> {
    let folder = Folder::at(uri)?;
    folder.delete(MANIFEST_FILE)?;
    let (files, _) = folder.list()?;
    files.iter().filter(|file| is_ours(file)).try_for_each(|file| folder.delete(file))?;
    folder.forget();
    Ok(())
}

/// Removes what one rank wrote of a checkpoint that will not be.
pub fn abandon(folder: &Folder, index: u32, world: u32) -> Result<(), CheckpointError> {
    folder.delete(&shard_file(index, world))?;
    folder.forget();
    Ok(())
}

/// Removes the folders of a job's checkpoints that are older than (`step`, `generation`), whole or never finished, but those that `keep`
/// names. Safe once that one is committed: every rank wrote its shards in order, so that no earlier one is still being written.
pub fn remove_older(
    job_uri: &str,
    newest: (Step, Generation),
    keep: &[String],
) -> Result<Vec<String>, CheckpointError> {
    remove_those(job_uri, keep, |begun| begun < newest)
}

/// The same for a prune, which may come late: when `newest` was found damaged meanwhile, a newer generation writes older steps again. What that
/// one wrote stays.
pub fn sweep(job_uri: &str, newest: (Step, Generation), keep: &[String]) -> Result<Vec<String>, CheckpointError> {
    remove_those(job_uri, keep, |begun| begun < newest && begun.1 <= newest.1)
}

/// Removes what older generations began and never finished: whatever they store now counts for nothing. A folder with a manifest stays.
pub fn remove_unfinished(job_uri: &str, generation: Generation) -> Result<Vec<String>, CheckpointError> {
    let (_, folders) = Folder::at(job_uri)?.list()?;
    let mut removed = Vec::new();
    for name in folders {
        let uri = format!("{job_uri}/{name}");
        let is_older = parse_folder_name(&name).is_some_and(|(_, begun)| begun < generation);
        if is_older && Folder::at(&uri)?.size(MANIFEST_FILE)?.is_none() {
            remove(&uri)?;
            removed.push(name);
        }
    }
    Ok(removed)
}

fn remove_those(
    job_uri: &str,
    keep: &[String],
    goes: impl Fn((Step, Generation)) -> bool,
) -> Result<Vec<String>, CheckpointError> {
    let (_, folders) = Folder::at(job_uri)?.list()?;
    let mut removed = Vec::new();
    for name in folders {
        if parse_folder_name(&name).is_some_and(&goes) && !keep.contains(&name) {
            remove(&format!("{job_uri}/{name}"))?;
            removed.push(name);
        }
    }
    Ok(removed)
}

/// A stranger's file in the folder is left alone.
fn is_ours(file: &str) -> bool {
    file.starts_with("shard-") && file.contains(".safetensors")
}
