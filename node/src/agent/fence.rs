//! Which coordinator an agent obeys: none that is behind one that was obeyed before (I1, F32). Owns what was seen and what of it is on disk;
//! writes nothing by itself. Part of `state.rs`.

use stoke_protocol::ids::{Epoch, LogIndex};

/// Entries of the journal that an agent may have seen acknowledged and forget when it crashes, besides those of one write to its disk.
pub const UNNOTED_MAX: u64 = 16;

/// The highest coordinator epoch and journal index that were seen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Fence {
    pub epoch: Epoch,
    pub index: LogIndex,
}

#[derive(Debug)]
pub(super) struct Fences {
    seen: Fence,
    /// What of it is on disk.
    durable: Fence,
    /// More of it is being written.
    noting: bool,
}

impl Fences {
    /// As they were on disk.
    pub fn new(fence: Fence) -> Self {
        Self { seen: fence, durable: fence, noting: false }
    }

    pub fn seen(&self) -> Fence {
        self.seen
    }

    /// A coordinator says where it stands. Gives what must be durable before it is obeyed, or why it is not.
    pub fn meet(&mut self, theirs: Fence) -> Result<Option<Fence>, String> {
        if theirs.epoch < self.seen.epoch {
            return Err(format!("its epoch is {}, and {} was seen: an old coordinator", theirs.epoch, self.seen.epoch));
        }
        if theirs.index < self.seen.index {
            return Err(format!(
                "its journal ends at {}, and {} was seen: its folder was restored from an old copy",
                theirs.index, self.seen.index
            ));
        }
        self.seen = theirs;
        Ok(Some(theirs).filter(|theirs| *theirs != self.durable))
    }

    /// Gives what is to become durable soon. Without that a session of days would leave an index behind that a backup of yesterday is not behind of.
    pub fn acknowledged(&mut self, index: LogIndex) -> Option<Fence> {
        self.seen.index = self.seen.index.max(index);
        self.note()
    }

    /// What [`Self::meet`] gave is durable.
    pub fn persisted(&mut self, fence: Fence) {
        self.durable = fence.max(self.durable);
    }

    /// What [`Self::acknowledged`] gave is durable, or could not be written: then the next acknowledgement tries again.
    pub fn noted(&mut self, fence: Option<Fence>) -> Option<Fence> {
        self.noting = false;
        self.persisted(fence?);
        self.note()
    }

    fn note(&mut self) -> Option<Fence> {
        if self.noting || self.seen.index.0 < self.durable.index.0 + UNNOTED_MAX {
            return None;
        }
        self.noting = true;
        Some(self.seen)
    }
}
