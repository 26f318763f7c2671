//! What a rank has of its machine besides memory and processors: accelerators by number, scratch folders, processes of its command. Owns who has which
//! accelerator, and that nothing is left when a rank's end is told: its place may be somebody else's then (I3).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use stoke_protocol::message::rank::RankId;

use super::inventory::Kept;
use crate::exec::{Mark, Scratches, end_marked};

#[derive(Clone)]
pub struct Belongings {
    pub scratches: Scratches,
    gpus: u32,
    taken: Arc<Mutex<BTreeMap<RankId, Vec<u32>>>>,
}

impl Belongings {
    /// Of the ranks that an agent before this one has left; what belongs to nobody goes.
    pub fn new(scratches: Scratches, gpus: u32, kept: &[Kept]) -> Self {
        let ids: Vec<RankId> = kept.iter().map(|kept| kept.id).collect();
        scratches.keep_only(&ids);
        let taken = kept.iter().map(|kept| (kept.id, kept.gpus.clone())).collect();
        Self { scratches, gpus, taken: Arc::new(Mutex::new(taken)) }
    }

    /// Numbers of accelerators that nobody has. Placement counts them, so there are enough.
    pub fn take_gpus(&self, id: RankId, wanted: u32) -> Vec<u32> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let used: BTreeSet<u32> = taken.values().flatten().copied().collect();
        let free: Vec<u32> = (0..self.gpus).filter(|gpu| !used.contains(gpu)).take(wanted as usize).collect();
        taken.insert(id, free.clone());
        free
    }

    /// The rank has them no more.
    pub fn return_gpus(&self, id: RankId) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// The rank is gone. `mark` is of its command, where it had one.
    pub async fn clear(&self, id: RankId, mark: Option<Mark>) {
        self.return_gpus(id);
        let Some(mark) = mark else { return };
        let scratches = self.scratches.clone();
        let end = move || {
            let left = end_marked(&mark);
            if left > 0 {
                tracing::warn!(rank = %id, left, "processes of its command were left, and killed");
            }
            scratches.remove(id);
        };
        let _ = tokio::task::spawn_blocking(end).await;
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use stoke_protocol::ids::{Generation, JobId, Rank};

    use super::*;

    #[tokio::test]
    async fn no_two_ranks_have_one_accelerator() {
        let id = |rank| RankId { job: JobId(1), generation: Generation(1), rank: Rank(rank) };
        let belongings = Belongings::new(Scratches::of(Path::new("/no/such/agent")), 4, &[]);
        assert_eq!(belongings.take_gpus(id(0), 1), [0]);
        assert_eq!(belongings.take_gpus(id(1), 2), [1, 2]);
        belongings.clear(id(0), None).await;
        assert_eq!(belongings.take_gpus(id(2), 2), [0, 3]);
        assert_eq!(belongings.take_gpus(id(3), 0), [0; 0]);
    }
}
