//! The checkpoint store, as it truly is: which shards and manifests are durable, whatever anybody reports. Decides nothing.

use std::collections::{BTreeMap, BTreeSet};

use stoke_protocol::ids::{Digest, Generation, JobId, Step};

#[derive(Clone, Debug, Default)]
pub struct Store {
    folders: BTreeMap<String, Folder>,
}

#[derive(Clone, Debug)]
pub struct Folder {
    pub job: JobId,
    pub generation: Generation,
    pub step: Step,
    pub world: u32,
    pub shards: BTreeSet<u32>,
    pub manifest: bool,
    /// The checkpoint, or the seed, that the state goes back to.
    pub parent: Step,
}

/// The folder of one checkpoint below a job's folder.
pub fn uri(checkpoints: &str, generation: Generation, step: Step) -> String {
    format!("{checkpoints}/step-{:08}-{generation}", step.0)
}

/// The content of a shard or a manifest is its name: equal names have equal bytes.
pub fn digest(words: &str) -> Digest {
    let mut bytes = [0u8; 32];
    for (at, byte) in words.bytes().enumerate() {
        bytes[at % 32] = bytes[at % 32].wrapping_mul(31).wrapping_add(byte);
    }
    Digest(bytes)
}

impl Store {
    pub fn put_shard(
        &mut self,
        uri: &str,
        (job, generation): (JobId, Generation),
        (index, world): (u32, u32),
        (parent, step): (Step, Step),
    ) {
        let empty = || Folder { job, generation, step, world, shards: BTreeSet::new(), manifest: false, parent };
        self.folders.entry(uri.to_owned()).or_insert_with(empty).shards.insert(index);
    }

    pub fn put_manifest(&mut self, uri: &str) {
        if let Some(folder) = self.folders.get_mut(uri) {
            folder.manifest = true;
        }
    }

    /// As a member does with its part of a checkpoint that will not be.
    pub fn remove_shard(&mut self, uri: &str, index: u32) {
        if let Some(folder) = self.folders.get_mut(uri) {
            folder.shards.remove(&index);
        }
    }

    /// As a first member does: all older folders of the job go, but those that are named.
    pub fn remove_older(&mut self, job: JobId, newest: (Step, Generation), keep: &[String]) {
        self.remove(job, keep, |begun| begun < newest);
    }

    /// As an agent does after a prune: those of newer generations stay.
    pub fn sweep(&mut self, job: JobId, newest: (Step, Generation), keep: &[String]) {
        self.remove(job, keep, |begun| begun < newest && begun.1 <= newest.1);
    }

    fn remove(&mut self, job: JobId, keep: &[String], goes: impl Fn((Step, Generation)) -> bool) {
        let kept = |uri: &str| uri.rsplit('/').next().is_some_and(|name| keep.iter().any(|kept| kept == name));
        self.folders.retain(|uri, folder| folder.job != job || !goes((folder.step, folder.generation)) || kept(uri));
    }

    /// The newest step of a job's checkpoints with a manifest, whoever wrote them, below a step.
    pub fn before(&self, job: JobId, step: Step) -> Option<Step> {
        let older = self.folders.values().filter(|folder| folder.job == job && folder.manifest && folder.step < step);
        older.map(|folder| folder.step).max()
    }

    pub fn folder(&self, uri: &str) -> Option<&Folder> {
        self.folders.get(uri)
    }
}

impl Folder {
    /// Every shard of its world and the manifest are durable (I21).
    pub fn is_complete(&self) -> bool {
        self.manifest && self.shards.len() == self.world as usize
    }
}
