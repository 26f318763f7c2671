//! This rank's side of the memory that the ranks of its machine share: gives its partial sums there, and adds from everybody's what it is to add, for its
//! own pieces or, where there are other hosts, for those of theirs with whom it speaks. Owns the folds and the buffers for it; who waits for what is
//! `all_reduce.rs`'s.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use stoke_protocol::ids::{Fingerprint, Step};
use stoke_protocol::lanes;
use stoke_protocol::message::rank::RankId;

use super::buffer::{Buffer, Pool};
use super::fold::Folder;
use super::frame::Cursor;
use super::lane_sum::LaneSums;
use super::memory::{Line, Memory, SUMS};
use super::plan::Plan;
use super::sum::as_bytes;

/// See the module.
pub struct Host {
    pub memory: Arc<Memory>,
    pub plan: Plan,
    /// All of the generation.
    ranks: Vec<RankId>,
    /// Operations that all of the host have ended.
    pub operations: u64,
    /// The one of the last sum, as long as it is there.
    pub summed: Option<u64>,
    /// Of this rank's pieces, where there is no other host.
    own: Folder,
    /// Of what the host gives to others.
    for_others: Vec<Folder>,
    /// For those sums.
    spare: Pool,
    /// The sums in memory, in which this rank writes what it adds and what it is told; none that an operation has.
    sums: [Option<Buffer>; SUMS],
}

impl Host {
    pub fn new(memory: Arc<Memory>, plan: Plan, ranks: Vec<RankId>) -> Self {
        let leaves: Vec<_> = plan.own_leaves().collect();
        let folder = |subtree, leaves: &[_]| Folder::new(lanes::fold(subtree, leaves));
        let for_others =
            plan.host_sums.iter().map(|(subtree, range)| folder(*subtree, &leaves[range.clone()])).collect();
        let spoken: usize = plan.owners().map(|owner| plan.owned(owner)).sum();
        Self {
            ranks,
            operations: 0,
            summed: None,
            own: Folder::new(plan.fold.clone()),
            for_others,
            // One is made while the last may wait for acknowledgements.
            spare: Pool::new(spoken * plan.host_sums.len(), 2),
            sums: std::array::from_fn(|index| Some(Buffer::sum(&memory, index as u64))),
            memory,
            plan,
        }
    }

    /// Sums for this rank's lanes, made where the host reads them.
    pub fn lane_sums(&self) -> LaneSums {
        let Plan { lanes, world, rank, .. } = self.plan;
        let owned = lanes::assign(lanes, world)[rank as usize].clone();
        LaneSums::within(self.memory.clone(), self.plan.first_leaf_of(rank), lanes, owned)
    }

    /// Each rank of the host with what it has told, and its place in the generation.
    pub fn lines(&self) -> impl Iterator<Item = (u32, &Line)> {
        (0..).zip(self.plan.host()).map(|(index, position)| (*position, self.memory.line(index)))
    }

    fn line(&self) -> &Line {
        self.lines().find(|(position, _)| *position == self.plan.rank).expect("X16: a rank is of its host").1
    }

    /// Gives this rank's partial sums of a step. The number of the operation.
    pub fn give(&mut self, step: Step, sums: &mut LaneSums, replica: Option<Fingerprint>) -> u64 {
        let operation = self.next();
        let memory = &self.memory;
        for (partial, leaf) in sums.finish().iter().zip(self.plan.first_leaf_of(self.plan.rank)..) {
            if !partial.values.is_shared() {
                Buffer::partial(memory, leaf).write(0..memory.values()).copy_from_slice(partial.values.read());
            }
        }
        let line = self.line();
        line.describe(step, replica);
        line.given.store(operation, Ordering::Release);
        memory.ring();
        operation
    }

    /// The number of the next operation, which writes where the one before the last did.
    pub fn next(&mut self) -> u64 {
        let next = self.operations + 1;
        self.summed = self.summed.filter(|summed| summed % SUMS as u64 != next % SUMS as u64);
        next
    }

    /// What this rank is to write of an operation's sum is there.
    pub fn added(&self, operation: u64) {
        self.line().added.store(operation, Ordering::Release);
        self.memory.ring();
    }

    /// What the ranks of the host have said of the step that they give to.
    pub fn described(&self) -> Vec<(RankId, (Step, Option<Fingerprint>))> {
        self.lines().map(|(position, line)| (self.ranks[position as usize], line.described())).collect()
    }

    /// This rank's pieces of the sum, from the partials of all, who are of this host. All have given, and nobody else writes there.
    pub fn add(&mut self, operation: u64) {
        let Self { memory, plan, own: folder, .. } = self;
        for piece in (0..plan.pieces(plan.rank)).map(|index| plan.piece(plan.rank, index)) {
            let partial = |leaf| Cursor::of(as_bytes(&memory.partial(leaf)[piece.clone()]));
            let mut partials: Vec<Cursor<'_>> = (0..plan.leaves.len()).map(partial).collect();
            // SAFETY: pieces are disjoint (X5), and this one is this rank's.
            folder.fold(&mut partials, unsafe { memory.sum_mut(operation, piece) });
        }
    }

    /// Where the sum of an operation is made with other hosts. None: it was given up, while what was sent of an earlier one was still unacknowledged.
    pub fn take_sum(&mut self, operation: u64, gives_up: impl Fn() -> bool) -> Option<Buffer> {
        let sum = &mut self.sums[operation as usize % SUMS];
        sum.as_mut().expect("X8: one operation at a time").thaw_unless(gives_up).then(|| sum.take()).flatten()
    }

    pub fn put_sum(&mut self, operation: u64, sum: Buffer) {
        self.sums[operation as usize % SUMS] = Some(sum);
    }

    /// The partial sums of all ranks of the host, left to right. All have given; they are written again after all have added (X14).
    pub fn partials(&self) -> Vec<Bytes> {
        (0..self.plan.own_leaves().count()).map(|leaf| Buffer::partial(&self.memory, leaf).share()).collect()
    }

    /// Adds the host's sums of the values of each owner with whom this rank speaks, piece by piece, and gives each away as it is there: the owner's
    /// place, the number of the piece, and the sums of the plan's `host_sums`. False: it was given up, or nobody took one.
    pub fn fold_for_others(
        &mut self,
        gives_up: impl Fn() -> bool,
        mut give: impl FnMut(u32, usize, Vec<Bytes>) -> bool,
    ) -> bool {
        let Self { memory, plan, for_others: folders, spare, .. } = self;
        let Some(mut out) = spare.take_unless(&gives_up) else { return false };
        let mut next = 0;
        for (owner, index) in plan.given() {
            let piece = plan.piece(owner, index);
            let mut sums = Vec::with_capacity(folders.len());
            for (folder, (_, leaves)) in folders.iter_mut().zip(&plan.host_sums) {
                let partial = |leaf| Cursor::of(as_bytes(&memory.partial(leaf)[piece.clone()]));
                let mut partials: Vec<Cursor<'_>> = leaves.clone().map(partial).collect();
                let range = next..next + piece.len();
                next = range.end;
                folder.fold(&mut partials, out.write(range.clone()));
                sums.push(out.freeze(range));
            }
            if gives_up() || !give(owner, index, sums) {
                return false;
            }
        }
        spare.put(out);
        true
    }
}
