//! One all-reduce after the other at one rank, without sockets: what to send at the start, what to do with each received frame, when it is
//! complete. Owns the order of things (partials in, sums out, sums in) and checks every frame against the plan; never waits.
//!
//! State of an own piece: partials missing → folded (its sum frozen and sent to who listens). Pieces are folded in order.
//!
//! X7: a frame that the plan does not foresee at this point of its sender's stream is refused; nothing of it is used.
//! X8: the sum is complete when all own pieces are folded and all sums of the others are copied.
//! X12 (I19): partial sums that were computed from different parameters are never in a complete sum. Every owner of values gets partials of all hosts, so
//! where replicas differ no value's sum is complete, at any rank. Whoever finds it tells all others what it has itself, and they do: whoever leaves
//! first for it knows everybody's. Where values are given before all that is computed from the parameters is, each rank tells all others its replica when it
//! is: nobody's sum is complete before all have told the same.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::Bytes;
use stoke_protocol::ids::{Fingerprint, Step, Term};
use stoke_protocol::message::peer::{Part, TensorHeader};

use super::bf16::{LeftOver, Rounded};
use super::buffer::Buffer;
use super::fold::Folder;
use super::frame::{Frame, Rope};
use super::plan::Plan;
use super::sum::VALUE_BYTES;

/// What a rank gives to a step.
#[derive(Debug, Default)]
pub struct Contribution {
    /// The sums of the lanes of its host's ranks, whole vectors left to right.
    pub partials: Vec<Bytes>,
    /// The parameters that they come from, if these are to be compared.
    pub replica: Option<Fingerprint>,
    /// Those of the host's ranks are not the same.
    pub differs: bool,
}

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

/// One rank's side of the sum of one step, then of the next. A received frame is dropped, and its place in the receive window with it, when
/// its values were used.
pub struct Operation {
    plan: Plan,
    folder: Folder,
    /// Of the sums that this rank makes, where values are rounded on the wire.
    left_over: Option<LeftOver>,
    term: Term,
    step: Step,
    replica: Option<Fingerprint>,
    /// Some member's parameters are not another's.
    differs: bool,
    /// If what this rank gives comes piece by piece, and its replica behind it.
    behind: Option<Behind>,
    /// Otherwise: the sums of lanes of this rank's host, whole vectors.
    partials: Vec<Bytes>,
    sum: Option<Buffer>,
    peers: Vec<Received>,
    /// Own pieces that lack partials, from `folded` on.
    open: VecDeque<OpenPiece>,
    folded: usize,
    sums_missing: usize,
}

/// How far a peer's stream was read.
#[derive(Clone, Copy, Default)]
struct Received {
    /// Partial frames of this operation.
    partials: usize,
    /// Sum frames of this operation.
    sums: usize,
    /// What it says of its parameters.
    replica: Option<Fingerprint>,
    /// By a frame of its own.
    is_told: bool,
}

/// Replicas are told when all values are given.
#[derive(Clone, Copy)]
struct Behind {
    /// Whether they are to be compared.
    compared: bool,
    /// This rank has given everything.
    is_sealed: bool,
}

struct OpenPiece {
    /// By position among the leaves; those of the own host stay empty if their vectors are there.
    leaves: Vec<Option<Frame>>,
    missing: usize,
}

impl Operation {
    /// Nothing under way.
    pub fn new(plan: Plan, term: Term, rounded: Rounded) -> Self {
        Self {
            left_over: (rounded.0 > 0).then(|| LeftOver::new(rounded, plan.values, 1)),
            folder: Folder::new(plan.fold.clone()),
            term,
            step: Step(0),
            replica: None,
            differs: false,
            behind: None,
            partials: Vec::new(),
            sum: None,
            peers: vec![Received::default(); plan.world as usize],
            open: VecDeque::new(),
            folded: 0,
            sums_missing: 0,
            plan,
        }
    }

    /// Begins the sum of a step; `sum` takes the result. Sends what can go out at once: all that a rank by itself gives as it is. What ranks that share memory
    /// give goes out as it is folded, and what is rounded as it is, by [`Operation::give`].
    pub fn begin(&mut self, step: Step, given: Contribution, sum: Buffer, send: &mut dyn FnMut(Outgoing)) {
        let Contribution { partials, replica, differs } = given;
        assert_eq!(partials.len(), self.plan.own_leaves().count(), "X6: a partial sum for each subtree of the host");
        self.start(step, sum);
        (self.replica, self.partials) = (replica, partials);
        if differs {
            self.differ(send);
        } else if self.plan.host().len() == 1 && self.left_over.is_none() {
            self.send_partials(send);
        }
        self.fold_ready(send);
    }

    /// Begins the sum of a step whose values come by [`Operation::give`], those of the own pieces too, until it is sealed.
    pub fn open(&mut self, step: Step, compared: bool, sum: Buffer) {
        self.start(step, sum);
        self.behind = Some(Behind { compared, is_sealed: false });
    }

    /// All values of a step that was opened are given; they were computed from these parameters, if those are compared.
    pub fn seal(&mut self, replica: Option<Fingerprint>, send: &mut dyn FnMut(Outgoing)) {
        let behind = self.behind.as_mut().expect("X12: the step was opened");
        behind.is_sealed = true;
        self.replica = replica;
        if replica.is_some() {
            let header = self.header(Part::Replica, &(0..0));
            self.plan.all_others().for_each(|to| send(Outgoing { to, header, values: Bytes::new() }));
        }
        self.compare();
    }

    /// Sends the host's sums of one of an owner's pieces: one for each of the plan's `host_sums`. Pieces go in order. Those of an own piece are added to it.
    pub fn give(&mut self, to: u32, index: usize, sums: Vec<Bytes>, send: &mut dyn FnMut(Outgoing)) {
        let piece = self.plan.piece(to, index);
        if to == self.plan.rank {
            return self.take_own(index, sums, send);
        }
        for ((subtree, _), values) in self.plan.host_sums.iter().zip(sums) {
            send(Outgoing { to, header: self.header(Part::Partial(*subtree), &piece), values });
        }
    }

    /// The sum of the last step was not applied: what its rounding has left over counts for nothing.
    pub fn forget(&mut self) {
        self.left_over.iter_mut().for_each(LeftOver::forget);
    }

    /// Whether a sum is under way, complete or not.
    pub fn is_active(&self) -> bool {
        self.sum.is_some()
    }

    /// The step that is or was summed last.
    pub fn step(&self) -> Step {
        self.step
    }

    /// Takes one frame of `from`, whose term was checked. Sums that it completes go out through `send`.
    pub fn receive(&mut self, from: u32, frame: Frame, send: &mut dyn FnMut(Outgoing)) -> Result<(), Unexpected> {
        let TensorHeader { step, part, offset, count, .. } = frame.header;
        let known = self.is_active()
            && step == self.step
            && match part {
                Part::Partial(_) => self.is_next_partial(from, &frame.header),
                Part::Sum => self.is_next_sum(from, &frame.header),
                Part::Replica => self.is_new_replica(from, &frame.header),
                Part::CatchUp | Part::Parameters => false,
            };
        if !known {
            return Err(Unexpected { step, part, offset, count });
        }
        match part {
            Part::Partial(_) => self.take_partial(from, frame, send),
            Part::Sum => self.take_sum(from, &frame.values),
            Part::Replica => {
                let told = &mut self.peers[from as usize];
                (told.replica, told.is_told) = (frame.header.replica, true);
                match self.behind {
                    None => self.differ(send),
                    Some(_) => self.compare(),
                }
            }
            Part::CatchUp | Part::Parameters => unreachable!("X7: refused above"),
        }
        Ok(())
    }

    /// The sum, once it is complete (X8). Ends the operation.
    pub fn take_complete(&mut self) -> Option<Buffer> {
        let is_summed = self.sums_missing == 0 && self.folded == self.plan.pieces(self.plan.rank);
        if self.differs || !is_summed || !self.is_compared() {
            return None;
        }
        self.partials.clear();
        self.sum.take()
    }

    /// Whether some member's parameters are not another's (X12), as far as is known.
    pub fn differs(&self) -> bool {
        self.differs
    }

    /// The first to say so though it had nothing to add.
    pub fn told_by(&self) -> Option<u32> {
        (0..).zip(&self.peers).find_map(|(place, peer)| peer.is_told.then_some(place))
    }

    /// The members' parameters by place, if they are not the same (X12) and all have told of theirs.
    pub fn differing(&self) -> Option<Vec<Fingerprint>> {
        if !self.differs {
            return None;
        }
        let all = (0..).zip(&self.peers).map(|(place, peer)| match peer.replica {
            _ if place == self.plan.rank => self.replica,
            theirs => theirs,
        });
        all.collect()
    }

    /// Whether frames of `peer` are still missing.
    pub fn is_owed_by(&self, peer: u32) -> bool {
        let Some(received) = self.peers.get(peer as usize) else { return false };
        let partials = self.plan.pieces(self.plan.rank) * self.plan.heard_from(peer).len();
        let sums = if self.plan.is_told_by(peer) { self.plan.pieces(peer) } else { 0 };
        let tells = self.differs || self.behind.is_some_and(|behind| behind.compared);
        received.partials < partials || received.sums < sums || tells && received.replica.is_none()
    }

    fn start(&mut self, step: Step, sum: Buffer) {
        assert!(self.sum.is_none() && self.open.is_empty(), "X8: one operation at a time");
        (self.step, self.replica, self.differs, self.behind) = (step, None, false, None);
        (self.partials, self.sum, self.folded) = (Vec::new(), Some(sum), 0);
        self.peers.fill(Received::default());
        self.sums_missing = self.plan.owners().map(|owner| self.plan.pieces(owner)).sum();
    }

    /// Whether all have said what their values were computed from, where they say it behind them.
    fn is_compared(&self) -> bool {
        let told = || self.plan.others().all(|peer| self.peers[peer as usize].is_told);
        self.behind.is_none_or(|behind| behind.is_sealed && (!behind.compared || told()))
    }

    /// Finds whether members have told of different parameters, when this one has told of its own.
    fn compare(&mut self) {
        let told = self.peers.iter().filter(|peer| peer.is_told).map(|peer| peer.replica);
        let mut all = told.chain(self.replica.map(Some));
        let first = all.next();
        let is_sealed = self.behind.is_some_and(|behind| behind.is_sealed);
        self.differs |= is_sealed && all.any(|replica| Some(replica) != first);
    }

    /// Piece by piece, in the order in which the owners fold.
    fn send_partials(&mut self, send: &mut dyn FnMut(Outgoing)) {
        let given: Vec<(u32, usize)> = self.plan.given().collect();
        for (owner, index) in given {
            let piece = bytes_of(&self.plan.piece(owner, index));
            self.give(owner, index, self.partials.iter().map(|partial| partial.slice(piece.clone())).collect(), send);
        }
    }

    /// What this rank adds to an own piece.
    fn take_own(&mut self, index: usize, sums: Vec<Bytes>, send: &mut dyn FnMut(Outgoing)) {
        let range = self.plan.piece(self.plan.rank, index);
        let frames: Vec<(usize, Frame)> = (self.plan.own_positions().iter().zip(sums))
            .map(|(&leaf, sum)| {
                let header = self.header(Part::Partial(self.plan.leaves[leaf]), &range);
                (leaf, Frame { header, values: Rope::whole(sum), _place: None })
            })
            .collect();
        let piece = self.open_at(index);
        for (leaf, frame) in frames {
            piece.leaves[leaf] = Some(frame);
            piece.missing -= 1;
        }
        self.fold_ready(send);
    }

    /// An own piece that is not folded yet.
    fn open_at(&mut self, index: usize) -> &mut OpenPiece {
        let place = index - self.folded;
        while self.open.len() <= place {
            self.open.push_back(self.open_piece());
        }
        &mut self.open[place]
    }

    /// Not all members have the same parameters: tells the others what this one has, once.
    fn differ(&mut self, send: &mut dyn FnMut(Outgoing)) {
        if !std::mem::replace(&mut self.differs, true) {
            let header = self.header(Part::Replica, &(0..0));
            self.plan.others().for_each(|to| send(Outgoing { to, header, values: Bytes::new() }));
        }
    }

    fn is_next_partial(&self, from: u32, header: &TensorHeader) -> bool {
        let leaves = self.plan.heard_from(from);
        if leaves.is_empty() {
            return false;
        }
        let received = self.peers[from as usize].partials;
        let (index, leaf) = (received / leaves.len(), received % leaves.len());
        index < self.plan.pieces(self.plan.rank)
            && header.part == Part::Partial(self.plan.leaves[leaves[leaf]])
            && (self.behind.is_none() || header.replica.is_none())
            && is_of(header, &self.plan.piece(self.plan.rank, index))
    }

    fn is_next_sum(&self, from: u32, header: &TensorHeader) -> bool {
        let Some(index) = self.peers.get(from as usize).map(|received| received.sums) else { return false };
        self.plan.is_told_by(from) && index < self.plan.pieces(from) && is_of(header, &self.plan.piece(from, index))
    }

    fn is_new_replica(&self, from: u32, header: &TensorHeader) -> bool {
        let is_new = self.peers.get(from as usize).is_some_and(|peer| !peer.is_told);
        let compared = self.behind.map_or(self.replica.is_some(), |behind| behind.compared);
        is_new && header.replica.is_some() && compared && is_of(header, &(0..0))
    }

    fn take_partial(&mut self, from: u32, frame: Frame, send: &mut dyn FnMut(Outgoing)) {
        let received = &mut self.peers[from as usize];
        let count = received.partials;
        received.partials += 1;
        if self.behind.is_none() {
            received.replica = frame.header.replica;
            if frame.header.replica != self.replica {
                self.differ(send);
            }
        }
        let leaves = self.plan.heard_from(from);
        // A piece is folded only when this peer's partials for it are there, so the index is not behind.
        let (index, position) = (count / leaves.len(), leaves[count % leaves.len()]);
        let piece = self.open_at(index);
        piece.leaves[position] = Some(frame);
        piece.missing -= 1;
        self.fold_ready(send);
    }

    fn take_sum(&mut self, from: u32, values: &Rope) {
        let piece = self.plan.piece(from, self.peers[from as usize].sums);
        self.peers[from as usize].sums += 1;
        self.sums_missing -= 1;
        let sum = self.sum.as_mut().expect("X8: an operation is active");
        values.cursor().copy_to(sum.write(piece));
    }

    fn open_piece(&self) -> OpenPiece {
        let leaves = self.plan.leaves.len();
        OpenPiece { leaves: (0..leaves).map(|_| None).collect(), missing: leaves - self.partials.len() }
    }

    /// Folds every piece that lacks nothing and sends its sum to who listens.
    fn fold_ready(&mut self, send: &mut dyn FnMut(Outgoing)) {
        // Nobody else gives partials to the only host that has lanes.
        while !self.plan.is_spread() && self.folded + self.open.len() < self.plan.pieces(self.plan.rank) {
            self.open.push_back(self.open_piece());
        }
        if self.differs {
            return;
        }
        while let Some(ready) = self.open.pop_front_if(|piece| piece.missing == 0) {
            let piece = self.plan.piece(self.plan.rank, self.folded);
            self.folded += 1;
            let header = self.header(Part::Sum, &piece);
            let values = self.fold_piece(&ready, piece);
            for to in self.plan.listeners() {
                send(Outgoing { to, header, values: values.clone() });
            }
        }
    }

    fn fold_piece(&mut self, ready: &OpenPiece, piece: Range<usize>) -> Bytes {
        let own: Vec<Rope> = self.partials.iter().map(|bytes| Rope::whole(bytes.slice(bytes_of(&piece)))).collect();
        let mut own = own.iter();
        let mut leaves: Vec<_> = ready
            .leaves
            .iter()
            .map(|leaf| match leaf {
                Some(frame) => frame.values.cursor(),
                None => own.next().expect("X6: the missing leaves are this host's own").cursor(),
            })
            .collect();
        let sum = self.sum.as_mut().expect("X8: an operation is active");
        let values = sum.write(piece.clone());
        self.folder.fold(&mut leaves, values);
        match &mut self.left_over {
            Some(left_over) => left_over.round(&piece, values),
            None => sum.freeze(piece),
        }
    }

    fn header(&self, part: Part, piece: &Range<usize>) -> TensorHeader {
        let (term, step) = (self.term, self.step);
        let replica = self.replica.filter(|_| self.behind.is_none() || part == Part::Replica);
        TensorHeader { term, step, part, offset: piece.start as u64, count: piece.len() as u32, replica }
    }
}

fn is_of(header: &TensorHeader, piece: &Range<usize>) -> bool {
    header.offset == piece.start as u64 && header.count as usize == piece.len()
}

pub(super) fn bytes_of(piece: &Range<usize>) -> Range<usize> {
    piece.start * VALUE_BYTES..piece.end * VALUE_BYTES
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use stoke_protocol::ids::Generation;
    use stoke_protocol::lanes::{self, Subtree};

    use super::super::early::Early;
    use super::super::lane_sum::LaneSums;
    use super::super::plan::Hosts;
    use super::super::sum;
    use super::*;

    const TERM: Term = Term { generation: Generation(1), ballot: 0 };

    fn plain(node: Subtree, lanes: &[Vec<f32>]) -> Vec<f32> {
        let Some((left, right)) = node.children() else { return lanes[node.start as usize].clone() };
        let (mut left, right) = (plain(left, lanes), plain(right, lanes));
        sum::add(&mut left, &right);
        left
    }

    struct RankSide {
        operation: Operation,
        /// None for an observer.
        sums: Option<LaneSums>,
        sum: Option<Buffer>,
    }

    impl RankSide {
        fn new((values, tail): (usize, usize), lanes: u32, (world, observers): (u32, u32), rank: u32) -> Self {
            let plan = Plan::new((values, tail), lanes, (world, observers), rank, &Hosts::alone(world));
            let operation = Operation::new(plan, TERM, Rounded(0));
            let owned = lanes::assign(lanes, world).get(rank as usize).cloned();
            let sums = owned.map(|owned| LaneSums::new(values, lanes, owned));
            Self { operation, sums, sum: Some(Buffer::new(values)) }
        }
    }

    /// One operation of all ranks over links that deliver in order, each at its own pace. Where values go early each rank seals at some time, too.
    fn all_reduce(ranks: &mut [RankSide], gradients: &[Vec<f32>], (step, early): (Step, bool), rng: &mut ChaCha8Rng) {
        let world = ranks.len();
        let mut links: Vec<VecDeque<Outgoing>> = (0..world * world).map(|_| VecDeque::new()).collect();
        for (from, side) in ranks.iter_mut().enumerate() {
            let mut sum = side.sum.take().expect("the last operation is complete");
            assert!(sum.thaw(), "the last operation's frames are all gone");
            let mut send = |out: Outgoing| links[from * world + out.to as usize].push_back(out);
            let mut sums = side.sums.as_mut();
            if let Some(sums) = &mut sums {
                for lane in sums.owned() {
                    sums.begin(lane);
                    sums.push(0, &gradients[lane as usize]);
                }
                sums.finish();
            }
            if !early {
                let partials = sums.map_or_else(Vec::new, |sums| sums.freeze());
                side.operation.begin(step, Contribution { partials, ..Contribution::default() }, sum, &mut send);
                continue;
            }
            side.operation.open(step, true, sum);
            let Some(sums) = sums else { continue };
            let mut given = Early::new(side.operation.plan.clone());
            given.open(step);
            while let Some((to, index, sums)) = given.next(sums) {
                side.operation.give(to, index, sums, &mut send);
            }
        }
        let mut open: Vec<usize> = (0..world).filter(|_| early).collect();
        loop {
            let busy: Vec<usize> = (0..links.len()).filter(|link| !links[*link].is_empty()).collect();
            if !open.is_empty() && (busy.is_empty() || rng.random_bool(0.02)) {
                if open.iter().any(|rank| ranks[*rank].sums.is_some()) {
                    assert!(
                        ranks.iter_mut().all(|side| side.operation.take_complete().is_none()),
                        "one has not sealed"
                    );
                }
                let from = open.swap_remove(rng.random_range(0..open.len()));
                let mut send = |out: Outgoing| links[from * world + out.to as usize].push_back(out);
                let replica = ranks[from].sums.is_some().then_some(Fingerprint(3));
                ranks[from].operation.seal(replica, &mut send);
                continue;
            }
            if busy.is_empty() {
                break;
            }
            let link = busy[rng.random_range(0..busy.len())];
            let Outgoing { header, values, .. } = links[link].pop_front().unwrap();
            let (from, to) = (link / world, link % world);
            let frame = Frame { header, values: Rope::whole(values), _place: None };
            let mut send = |out: Outgoing| links[to * world + out.to as usize].push_back(out);
            ranks[to].operation.receive(from as u32, frame, &mut send).unwrap();
        }
        ranks.iter_mut().for_each(|side| side.sum = side.operation.take_complete());
    }

    #[test]
    fn every_world_gets_the_bits_of_the_plain_fold() {
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        for round in 0..100 {
            let lanes = rng.random_range(2..=12);
            let world = rng.random_range(1..=lanes);
            let observers = rng.random_range(0..3);
            // Mostly tiny vectors, some of several pieces a rank.
            let values = if round % 10 == 0 { rng.random_range(0..150_000) } else { rng.random_range(0..200) };
            let side = |rank| RankSide::new((values, values / 9), lanes, (world, observers), rank);
            let mut ranks: Vec<RankSide> = (0..world + observers).map(side).collect();
            for step in 0..2 {
                let gradients: Vec<Vec<f32>> = (0..lanes)
                    .map(|_| {
                        (0..values).map(|_| (rng.random::<f32>() - 0.5) * 2f32.powi(rng.random_range(-9..9))).collect()
                    })
                    .collect();
                let early = world > 1 && rng.random_bool(0.5);
                all_reduce(&mut ranks, &gradients, (Step(step), early), &mut rng);
                let expected = plain(Subtree::root(lanes), &gradients);
                for side in &ranks {
                    assert!(
                        side.sum.as_ref().unwrap().read() == expected,
                        "{values} values, {lanes} lanes, {world} ranks"
                    );
                }
            }
        }
    }

    #[test]
    fn lanes_of_different_parameters_are_never_added() {
        let rank = |rank| RankSide::new((64, 0), 3, (3, 0), rank);
        let mut sides = [rank(0), rank(1), rank(2)];
        let replicas = [7, 7, 8].map(Fingerprint);
        let mut frames: Vec<(u32, Outgoing)> = Vec::new();
        for (place, side) in (0..).zip(&mut sides) {
            let sums = side.sums.as_mut().unwrap();
            sums.begin(place);
            sums.push(0, &[1.0; 64]);
            let (partials, sum) = (side.sums.as_mut().unwrap().freeze(), side.sum.take().unwrap());
            let mut send = |out| frames.push((place, out));
            let given = Contribution { partials, replica: Some(replicas[place as usize]), differs: false };
            side.operation.begin(Step(5), given, sum, &mut send);
        }
        for (from, Outgoing { to, header, values }) in frames {
            let frame = Frame { header, values: Rope::whole(values), _place: None };
            let mut send = |out: Outgoing| assert_eq!(out.header.part, Part::Replica, "a sum was made");
            sides[to as usize].operation.receive(from, frame, &mut send).unwrap();
        }
        assert!(sides.iter_mut().all(|side| side.operation.take_complete().is_none()));
        assert!(sides.iter().all(|side| side.operation.differing().as_deref() == Some(&replicas)));
    }

    #[test]
    fn frames_that_the_plan_does_not_foresee_are_refused() {
        let RankSide { mut operation, sums, sum } = RankSide::new((64, 0), 2, (2, 1), 0);
        let mut sums = sums.unwrap();
        sums.begin(0);
        sums.push(0, &[1.0; 64]);
        let given = Contribution { partials: sums.freeze(), ..Contribution::default() };
        operation.begin(Step(5), given, sum.unwrap(), &mut |_| ());
        let good = TensorHeader {
            term: TERM,
            step: Step(5),
            part: Part::Partial(Subtree { start: 1, len: 1 }),
            offset: 32,
            count: 32,
            replica: None,
        };
        let bad = [
            TensorHeader { step: Step(4), ..good },
            TensorHeader { offset: 16, ..good },
            TensorHeader { count: 33, ..good },
            TensorHeader { part: Part::Partial(Subtree { start: 0, len: 1 }), ..good },
            TensorHeader { part: Part::Sum, ..good },
            TensorHeader { part: Part::Replica, offset: 0, count: 0, replica: Some(Fingerprint(1)), ..good },
        ];
        let frame = |header| Frame { header, values: Rope::whole(Bytes::from(vec![0; 128])), _place: None };
        for header in bad {
            assert!(operation.receive(1, frame(header), &mut |_| ()).is_err(), "{header:?}");
        }
        for header in [good, TensorHeader { part: Part::Sum, count: 0, ..good }] {
            assert!(operation.receive(2, frame(header), &mut |_| ()).is_err(), "an observer gives nothing");
        }
        operation.receive(1, frame(good), &mut |_| ()).unwrap();
        assert!(operation.receive(1, frame(good), &mut |_| ()).is_err(), "once is enough");
        operation.receive(1, frame(TensorHeader { part: Part::Sum, offset: 0, ..good }), &mut |_| ()).unwrap();
        assert!(operation.take_complete().is_some());
        assert!(operation.receive(1, frame(good), &mut |_| ()).is_err(), "nothing is under way");
    }
}
