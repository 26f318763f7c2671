//! Shards in the memory of the machine that wrote them (`/dev/shm`): a gang that begins again reads them there, and gives them to those of its
//! ranks that have other ones (`exchange/`), before anyone asks the store. Owns one job's folder of one node; a copy that is not there, or not
//! whole, is no loss, because the store has every committed shard.
//!
//! X13: what is read has the bytes and the BLAKE3 that the manifest names, or it does not count.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use stoke_jobs::NamedTensor;
use stoke_protocol::ids::{JobId, Step};

use super::folder::Folder;
use super::manifest::Shard;
use super::read::read_shards;
use super::shard::encode;
use crate::probe;

/// A shard is kept if it takes at most this share of the memory that is free: training comes first.
const SHARE: u64 = 4;
/// Steps whose shards stay: the newest may not be committed yet.
const STEPS_MAX: usize = 2;

/// One job's shards in the memory of one node.
#[derive(Clone, Debug)]
pub struct ShardMemory {
    dir: PathBuf,
}

impl ShardMemory {
    /// `root` is the node's folder.
    pub fn of(root: &Path, job: JobId) -> Self {
        Self { dir: root.join(job.to_string()) }
    }

    /// Keeps a copy of a shard that was stored, if there is room. Older ones go, and so do those of steps that come only now.
    pub fn keep(&self, step: Step, shard: &Shard, tensors: &[NamedTensor]) -> io::Result<()> {
        self.forget_others(step)?;
        if shard.bytes > probe::free_memory_bytes() / SHARE {
            return Ok(());
        }
        // Not its parent, which is the agent's to make and to guard.
        if let Err(error) = fs::create_dir(&self.dir)
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(error);
        }
        let name = self.dir.join(name_of(step, shard));
        // Two ranks of a node never write the same shard; a rank that was killed may have left half of one.
        let partial = name.with_extension("part");
        let written = fs::File::create(&partial).and_then(|mut file| {
            let runs = encode(tensors).map_err(io::Error::other)?;
            runs.into_iter().try_for_each(|run| file.write_all(&run))?;
            fs::rename(&partial, &name)
        });
        written.inspect_err(|_| drop(fs::remove_file(&partial)))
    }

    /// Whether a shard lies here. Its bytes are looked at when it is read.
    pub(super) fn holds(&self, step: Step, shard: &Shard) -> bool {
        let found = fs::metadata(self.dir.join(name_of(step, shard)));
        found.is_ok_and(|found| found.len() == shard.bytes)
    }

    /// A shard, if it is here and whole (X13).
    pub(super) fn read(&self, step: Step, shard: &Shard) -> Option<Vec<NamedTensor>> {
        if !self.holds(step, shard) {
            return None;
        }
        let here = Shard { file: name_of(step, shard), ..shard.clone() };
        let read = Folder::at(self.dir.to_str()?).and_then(|folder| read_shards(&folder, vec![&here]));
        read.inspect_err(|error| tracing::warn!(%error, "a shard in memory does not count, the store's is read"))
            .ok()?
            .pop()
    }

    /// Forgets the job: it is done.
    pub fn clear(&self) {
        let _ = fs::remove_dir_all(&self.dir);
    }

    fn forget_others(&self, newest: Step) -> io::Result<()> {
        let Ok(files) = fs::read_dir(&self.dir) else { return Ok(()) };
        let step_of = |name: &str| name.split_once('-').and_then(|(step, _)| step.parse::<u64>().ok());
        let files: Vec<(u64, PathBuf)> =
            files.flatten().filter_map(|file| Some((step_of(file.file_name().to_str()?)?, file.path()))).collect();
        let mut steps: Vec<u64> = files.iter().map(|(step, _)| *step).filter(|step| *step < newest.0).collect();
        steps.sort_unstable();
        steps.dedup();
        let oldest =
            steps.len().checked_sub(STEPS_MAX - 1).map_or(0, |index| steps.get(index).copied().unwrap_or(newest.0));
        let goes = |step: u64| step < oldest || step > newest.0;
        files.iter().filter(|(step, _)| goes(*step)).try_for_each(|(_, path)| match fs::remove_file(path) {
            // Another rank of this node was faster.
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        })
    }
}

/// `120-<BLAKE3>`.
fn name_of(step: Step, shard: &Shard) -> String {
    format!("{}-{}", step.0, shard.blake3)
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::Digest;

    use super::*;
    use crate::checkpoint::write_shard;

    fn tensors(value: f32) -> Vec<NamedTensor> {
        vec![NamedTensor { name: "model.weight".into(), shape: vec![3], values: vec![value; 3] }]
    }

    fn kept(dir: &Path, memory: &ShardMemory, step: u64) -> Shard {
        let folder = Folder::at(dir.join(format!("step-{step}")).to_str().unwrap()).unwrap();
        let shard: Shard = write_shard(&folder, 0, 1, &tensors(step as f32)).unwrap().into();
        memory.keep(Step(step), &shard, &tensors(step as f32)).unwrap();
        shard
    }

    #[test]
    fn the_newest_shards_are_read_and_damaged_or_foreign_ones_do_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let memory = ShardMemory::of(dir.path(), JobId(3));
        let shards: Vec<Shard> = [10, 20, 30].map(|step| kept(dir.path(), &memory, step)).into();
        assert!(memory.read(Step(10), &shards[0]).is_none(), "it went when the third came");
        assert_eq!(memory.read(Step(20), &shards[1]).unwrap(), tensors(20.0));
        assert_eq!(memory.read(Step(30), &shards[2]).unwrap(), tensors(30.0));
        let file = dir.path().join("job-3").join(name_of(Step(30), &shards[2]));
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        assert!(memory.read(Step(30), &shards[2]).is_none());
        let other = Shard { blake3: Digest([7; 32]), ..shards[1].clone() };
        assert!(memory.read(Step(20), &other).is_none());
        // The job went back and comes to step 20 anew: what lies after it is of a history that is over.
        kept(dir.path(), &memory, 20);
        assert!(!file.exists());
        memory.clear();
        assert!(memory.read(Step(20), &shards[1]).is_none());
    }
}
