//! One all-reduce at one rank, without sockets: what to send at the start, what to do with each received frame, when it is complete.
//! Owns the order of things (partials in, sums out, sums in) and checks every frame against the plan; never waits.
//!
//! State of a piece of the own chunk: partials missing → folded (its sum frozen and sent to all). Pieces are folded in order.
//!
//! X7: a frame that the plan does not foresee at this point of its sender's stream is refused; nothing of it is used.
//! X8: the sum is complete when all pieces of the own chunk are folded and all sums of the others are copied.

use std::collections::VecDeque;

use bytes::Bytes;
use stoke_protocol::ids::{Generation, Step};
use stoke_protocol::message::peer::{Part, TensorHeader};

use super::buffer::Buffer;
use super::fold::Folder;
use super::frame::{Frame, Rope};
use super::lane_sum::Partial;
use super::plan::Plan;

/// Values to send to one rank.
#[derive(Debug)]
pub struct Outgoing {
    pub to: u32,
    pub header: TensorHeader,
    pub values: Bytes,
}

/// Why a frame is not what the plan foresees. The sender's plan differs (another model or lane count) or it is broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unexpected {part:?} of {count} values at {offset} for {step}: do all ranks run the same model?")]
pub struct Unexpected {
    pub step: Step,
    pub part: Part,
    pub offset: u64,
    pub count: u32,
}

/// One rank's side of one sum. A received frame is dropped, and its place in the receive window with it, when its values were used.
pub struct Operation<'a> {
    plan: &'a Plan,
    folder: &'a mut Folder,
    generation: Generation,
    step: Step,
    partials: Vec<Bytes>,
    sum: &'a mut Buffer,
    peers: Vec<Received>,
    /// Pieces of the own chunk that lack partials, from `folded` on.
    open: VecDeque<OpenPiece>,
    folded: usize,
    sums_missing: usize,
}

/// How far a peer's stream was read.
#[derive(Clone, Default)]
struct Received {
    /// Partial frames of this operation.
    partials: usize,
    /// Sum frames of this operation.
    sums: usize,
}

struct OpenPiece {
    /// By position among the leaves; the own ones stay empty.
    leaves: Vec<Option<Frame>>,
    missing: usize,
}

impl<'a> Operation<'a> {
    /// Begins: freezes the own partials and lists what goes out at once.
    pub fn begin(
        (plan, folder): (&'a Plan, &'a mut Folder),
        (generation, step): (Generation, Step),
        partials: &mut [Partial],
        sum: &'a mut Buffer,
        send: &mut dyn FnMut(Outgoing),
    ) -> Self {
        let own = &plan.leaves[plan.leaves_of[plan.rank as usize].clone()];
        assert!(partials.iter().map(|partial| &partial.subtree).eq(own), "X6: partials of this rank's subtrees");
        let partials: Vec<Bytes> = partials.iter_mut().map(|partial| partial.values.freeze(0..plan.values)).collect();
        let sums_missing = plan.peers().map(|peer| plan.pieces(peer)).sum();
        let peers = vec![Received::default(); plan.world as usize];
        let mut operation = Self {
            plan,
            folder,
            generation,
            step,
            partials,
            sum,
            peers,
            open: VecDeque::new(),
            folded: 0,
            sums_missing,
        };
        operation.send_partials(send);
        operation.fold_ready(send);
        operation
    }

    /// Takes one frame of `from`, whose generation was checked. Sums that it completes go out through `send`.
    pub fn receive(&mut self, from: u32, frame: Frame, send: &mut dyn FnMut(Outgoing)) -> Result<(), Unexpected> {
        let TensorHeader { step, part, offset, count, .. } = frame.header;
        let known = step == self.step
            && match part {
                Part::Partial(_) => self.is_next_partial(from, &frame.header),
                Part::Sum => self.is_next_sum(from, &frame.header),
            };
        if !known {
            return Err(Unexpected { step, part, offset, count });
        }
        match part {
            Part::Partial(_) => self.take_partial(from, frame, send),
            Part::Sum => self.take_sum(from, &frame.values),
        }
        Ok(())
    }

    /// X8.
    pub fn is_complete(&self) -> bool {
        self.sums_missing == 0 && self.folded == self.plan.pieces(self.plan.rank)
    }

    /// Whether frames of `peer` are still missing.
    pub fn is_owed_by(&self, peer: u32) -> bool {
        let received = &self.peers[peer as usize];
        let subtrees = self.plan.leaves_of[peer as usize].len();
        received.partials < self.plan.pieces(self.plan.rank) * subtrees || received.sums < self.plan.pieces(peer)
    }

    /// Piece by piece, in the order in which the owner folds.
    fn send_partials(&self, send: &mut dyn FnMut(Outgoing)) {
        let own = self.plan.leaves_of[self.plan.rank as usize].clone();
        for peer in self.plan.peers() {
            for index in 0..self.plan.pieces(peer) {
                let piece = self.plan.piece(peer, index);
                for (partial, leaf) in self.partials.iter().zip(own.clone()) {
                    let header = self.header(Part::Partial(self.plan.leaves[leaf]), &piece);
                    send(Outgoing { to: peer, header, values: partial.slice(bytes_of(&piece)) });
                }
            }
        }
    }

    fn is_next_partial(&self, from: u32, header: &TensorHeader) -> bool {
        let leaves = &self.plan.leaves_of[from as usize];
        let (index, leaf) =
            (self.peers[from as usize].partials / leaves.len(), self.peers[from as usize].partials % leaves.len());
        index < self.plan.pieces(self.plan.rank)
            && header.part == Part::Partial(self.plan.leaves[leaves.start + leaf])
            && is_of(header, &self.plan.piece(self.plan.rank, index))
    }

    fn is_next_sum(&self, from: u32, header: &TensorHeader) -> bool {
        let index = self.peers[from as usize].sums;
        index < self.plan.pieces(from) && is_of(header, &self.plan.piece(from, index))
    }

    fn take_partial(&mut self, from: u32, frame: Frame, send: &mut dyn FnMut(Outgoing)) {
        let leaves = self.plan.leaves_of[from as usize].clone();
        let count = self.peers[from as usize].partials;
        self.peers[from as usize].partials += 1;
        // A piece is folded only when this peer's partials for it are there, so the index is not behind.
        let place = count / leaves.len() - self.folded;
        while self.open.len() <= place {
            self.open.push_back(self.open_piece());
        }
        let piece = &mut self.open[place];
        piece.leaves[leaves.start + count % leaves.len()] = Some(frame);
        piece.missing -= 1;
        self.fold_ready(send);
    }

    fn take_sum(&mut self, from: u32, values: &Rope) {
        let piece = self.plan.piece(from, self.peers[from as usize].sums);
        self.peers[from as usize].sums += 1;
        self.sums_missing -= 1;
        values.cursor().copy_to(self.sum.write(piece));
    }

    fn open_piece(&self) -> OpenPiece {
        let leaves = self.plan.leaves.len();
        let own = self.plan.leaves_of[self.plan.rank as usize].len();
        OpenPiece { leaves: (0..leaves).map(|_| None).collect(), missing: leaves - own }
    }

    /// Folds every piece that lacks nothing and sends its sum to all.
    fn fold_ready(&mut self, send: &mut dyn FnMut(Outgoing)) {
        // Alone, nothing is received: every piece is ready.
        while self.plan.world == 1 && self.open.len() + self.folded < self.plan.pieces(0) {
            self.open.push_back(self.open_piece());
        }
        while self.open.front().is_some_and(|piece| piece.missing == 0) {
            let ready = self.open.pop_front().expect("looked at before");
            self.fold_piece(&ready);
            let piece = self.plan.piece(self.plan.rank, self.folded);
            self.folded += 1;
            let (header, values) = (self.header(Part::Sum, &piece), self.sum.freeze(piece));
            for to in self.plan.peers() {
                send(Outgoing { to, header, values: values.clone() });
            }
        }
    }

    fn fold_piece(&mut self, ready: &OpenPiece) {
        let piece = self.plan.piece(self.plan.rank, self.folded);
        let own: Vec<Rope> = self.partials.iter().map(|bytes| Rope::whole(bytes.slice(bytes_of(&piece)))).collect();
        let mut own = own.iter();
        let mut leaves: Vec<_> = ready
            .leaves
            .iter()
            .map(|leaf| match leaf {
                Some(frame) => frame.values.cursor(),
                None => own.next().expect("X6: the missing leaves are this rank's own").cursor(),
            })
            .collect();
        self.folder.fold(&mut leaves, self.sum.write(piece));
    }

    fn header(&self, part: Part, piece: &std::ops::Range<usize>) -> TensorHeader {
        let (generation, step) = (self.generation, self.step);
        TensorHeader { generation, step, part, offset: piece.start as u64, count: piece.len() as u32 }
    }
}

fn is_of(header: &TensorHeader, piece: &std::ops::Range<usize>) -> bool {
    header.offset == piece.start as u64 && header.count as usize == piece.len()
}

fn bytes_of(piece: &std::ops::Range<usize>) -> std::ops::Range<usize> {
    piece.start * super::sum::VALUE_BYTES..piece.end * super::sum::VALUE_BYTES
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use stoke_protocol::lanes::{self, Subtree};

    use super::super::lane_sum::LaneSums;
    use super::super::sum;
    use super::*;

    const GENERATION: Generation = Generation(1);

    fn plain(node: Subtree, lanes: &[Vec<f32>]) -> Vec<f32> {
        let Some((left, right)) = node.children() else { return lanes[node.start as usize].clone() };
        let (mut left, right) = (plain(left, lanes), plain(right, lanes));
        sum::add(&mut left, &right);
        left
    }

    struct RankSide {
        plan: Plan,
        folder: Folder,
        sums: LaneSums,
        sum: Buffer,
    }

    impl RankSide {
        fn new(values: usize, lanes: u32, world: u32, rank: u32) -> Self {
            let plan = Plan::new(values, lanes, world, rank);
            let folder = Folder::new(plan.fold.clone());
            let sums = LaneSums::new(values, lanes, lanes::assign(lanes, world)[rank as usize].clone());
            Self { plan, folder, sums, sum: Buffer::new(values) }
        }
    }

    /// One operation of all ranks over links that deliver in order, each at its own pace.
    fn all_reduce(ranks: &mut [RankSide], gradients: &[Vec<f32>], step: Step, rng: &mut ChaCha8Rng) {
        let world = ranks.len();
        let mut links: Vec<VecDeque<Outgoing>> = (0..world * world).map(|_| VecDeque::new()).collect();
        let mut operations = Vec::new();
        for (from, side) in ranks.iter_mut().enumerate() {
            for lane in side.sums.owned() {
                side.sums.begin(lane);
                side.sums.push(0, &gradients[lane as usize]);
            }
            assert!(side.sum.thaw(), "the last operation's frames are all gone");
            let mut send = |out: Outgoing| links[from * world + out.to as usize].push_back(out);
            let (plan, folder) = (&side.plan, &mut side.folder);
            operations.push(Operation::begin(
                (plan, folder),
                (GENERATION, step),
                side.sums.finish(),
                &mut side.sum,
                &mut send,
            ));
        }
        loop {
            let busy: Vec<usize> = (0..links.len()).filter(|link| !links[*link].is_empty()).collect();
            if busy.is_empty() {
                break;
            }
            let link = busy[rng.random_range(0..busy.len())];
            let Outgoing { header, values, .. } = links[link].pop_front().unwrap();
            let (from, to) = (link / world, link % world);
            let frame = Frame { header, values: Rope::whole(values), _place: None };
            let mut send = |out: Outgoing| links[to * world + out.to as usize].push_back(out);
            operations[to].receive(from as u32, frame, &mut send).unwrap();
        }
        assert!(operations.iter().all(Operation::is_complete));
    }

    #[test]
    fn every_world_gets_the_bits_of_the_plain_fold() {
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        for round in 0..150 {
            let lanes = rng.random_range(1..=12);
            let world = rng.random_range(1..=lanes);
            // Mostly tiny vectors, some of several pieces a chunk.
            let values = if round % 10 == 0 { rng.random_range(0..300_000) } else { rng.random_range(0..200) };
            let mut ranks: Vec<RankSide> = (0..world).map(|rank| RankSide::new(values, lanes, world, rank)).collect();
            for step in 0..2 {
                let gradients: Vec<Vec<f32>> = (0..lanes)
                    .map(|_| {
                        (0..values).map(|_| (rng.random::<f32>() - 0.5) * 2f32.powi(rng.random_range(-9..9))).collect()
                    })
                    .collect();
                all_reduce(&mut ranks, &gradients, Step(step), &mut rng);
                let expected = plain(Subtree::root(lanes), &gradients);
                for side in &ranks {
                    assert!(side.sum.read() == expected, "{values} values, {lanes} lanes, {world} ranks");
                }
            }
        }
    }

    #[test]
    fn frames_that_the_plan_does_not_foresee_are_refused() {
        let mut side = RankSide::new(64, 2, 2, 0);
        side.sums.begin(0);
        side.sums.push(0, &[1.0; 64]);
        let ids = (GENERATION, Step(5));
        let ends = (&side.plan, &mut side.folder);
        let mut operation = Operation::begin(ends, ids, side.sums.finish(), &mut side.sum, &mut |_| ());
        let good = TensorHeader {
            generation: GENERATION,
            step: Step(5),
            part: Part::Partial(Subtree { start: 1, len: 1 }),
            offset: 0,
            count: 32,
        };
        let bad = [
            TensorHeader { step: Step(4), ..good },
            TensorHeader { offset: 16, ..good },
            TensorHeader { count: 33, ..good },
            TensorHeader { part: Part::Partial(Subtree { start: 0, len: 1 }), ..good },
            TensorHeader { part: Part::Sum, ..good },
        ];
        let frame = |header| Frame { header, values: Rope::whole(Bytes::from(vec![0; 128])), _place: None };
        for header in bad {
            assert!(operation.receive(1, frame(header), &mut |_| ()).is_err(), "{header:?}");
        }
        operation.receive(1, frame(good), &mut |_| ()).unwrap();
        assert!(operation.receive(1, frame(good), &mut |_| ()).is_err(), "once is enough");
        operation.receive(1, frame(TensorHeader { part: Part::Sum, offset: 32, ..good }), &mut |_| ()).unwrap();
        assert!(operation.is_complete());
    }
}
