//! A rank's own part of the lane tree: sums lane gradients into the rank's canonical subtrees while they are computed.
//! Owns the partial sums and their memory; never talks to anyone.
//!
//! X3: the additions are those of `lanes::fold` over single lanes, in its order.
//! X4: a lane gives each value of the flat vector exactly once (the count is checked).

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use stoke_protocol::lanes::{self, Fold, Subtree};

use super::buffer::{Buffer, Pool};
use super::memory::Memory;
use super::ranges::Ranges;
use super::sum::add;

/// Values that are summed through the tree at a time: 16 KiB stay in the first-level cache while up to `log2(lanes)` buffers are added.
const BLOCK_VALUES: usize = 4096;

/// The sum of the lanes of one subtree.
pub struct Partial {
    pub subtree: Subtree,
    pub values: Buffer,
}

/// Sums lane gradients of one rank. Lanes come in order; the buffers are used again in the next step.
pub struct LaneSums {
    values: usize,
    owned: Range<u32>,
    /// For each owned lane: how many sums it completes, i.e. the `Add`s that follow its `Push`; and the subtree, if it completes one.
    script: Vec<Completes>,
    pool: Pool,
    /// Where the sums of the subtrees are made, from this leaf on, if others read them there.
    shared: Option<(Arc<Memory>, usize)>,
    /// Sums that wait for their right neighbours, outermost first.
    open: Vec<Buffer>,
    partials: Vec<Partial>,
    lane: Lane,
    /// What the last lane has given, if somebody wants to know it before it is complete.
    early: Option<Ranges>,
    scratch: Box<[f32]>,
}

#[derive(Clone, Copy)]
struct Completes {
    sums: usize,
    subtree: Option<Subtree>,
}

/// Where the accumulation stands.
#[derive(Clone, Copy)]
enum Lane {
    /// The sums of a step are complete (or none began).
    Idle,
    /// This lane was begun and has so many values yet to come.
    Begun { lane: u32, missing: usize },
}

impl LaneSums {
    /// Sums of vectors of `values` f32, for the `owned` lanes out of `lanes`.
    pub fn new(values: usize, lanes: u32, owned: Range<u32>) -> Self {
        assert!(owned.start < owned.end && owned.end <= lanes, "X3: {owned:?} of {lanes} lanes");
        let script: Vec<Completes> = lanes::subtrees(owned.clone(), lanes).into_iter().flat_map(completions).collect();
        let partials = script.iter().filter(|step| step.subtree.is_some()).count();
        let depth = open_max(&script);
        Self {
            values,
            owned,
            script,
            pool: Pool::new(values, 2 * (partials + depth)),
            shared: None,
            open: Vec::with_capacity(depth),
            partials: Vec::with_capacity(partials),
            lane: Lane::Idle,
            early: None,
            scratch: vec![0.0; BLOCK_VALUES].into(),
        }
    }

    /// The same, with the sums of the subtrees made where others read them, from this leaf on: they have read them before the next step begins (X14).
    pub(super) fn within(memory: Arc<Memory>, first: usize, lanes: u32, owned: Range<u32>) -> Self {
        let sums = Self::new(memory.values(), lanes, owned);
        Self { shared: Some((memory, first)), ..sums }
    }

    /// The same, whose values are taken where they are complete, while others of the last lane are still computed.
    pub(super) fn taken_early(self) -> Self {
        Self { early: Some(Ranges::default()), ..self }
    }

    /// Whether it matters that values of this lane come as early as they can.
    pub fn is_taken_early(&self, lane: u32) -> bool {
        self.early.is_some() && lane + 1 == self.owned.end
    }

    /// Values of the summed vector.
    pub fn values(&self) -> usize {
        self.values
    }

    /// The lanes to be summed, in order.
    pub fn owned(&self) -> Range<u32> {
        self.owned.clone()
    }

    /// Starts a lane. The first owned lane starts a new step and drops the sums of the last one.
    pub fn begin(&mut self, lane: u32) {
        if lane == self.owned.start {
            // Also after a step that was given up halfway.
            self.take_back();
        } else {
            let Lane::Begun { lane: last, missing } = self.lane else {
                panic!("X3: lane {lane} before lane {}", self.owned.start)
            };
            assert_eq!(lane, last + 1, "X3: lanes come in order");
            assert_eq!(missing, 0, "X4: lane {last} lacks values");
            self.complete(last);
        }
        assert!(self.owned.contains(&lane), "X3: lane {lane} is not of {:?}", self.owned);
        self.lane = Lane::Begun { lane, missing: self.values };
        self.early.iter_mut().for_each(Ranges::clear);
        if self.completes(lane).sums == 0 {
            // The outermost sum of a subtree is the subtree's.
            let place = self.shared.as_ref().filter(|_| self.open.is_empty());
            let place = place.map(|(memory, first)| Buffer::partial(memory, first + self.partials.len()));
            let fresh = place.unwrap_or_else(|| self.pool.take());
            self.open.push(fresh);
        }
    }

    /// The buffers of the last step, and of one that was given up halfway.
    fn take_back(&mut self) {
        let spent = self.partials.drain(..).map(|partial| partial.values).chain(self.open.drain(..));
        spent.filter(|buffer| !buffer.is_shared()).for_each(|buffer| self.pool.put(buffer));
    }

    /// Gives values of the current lane, starting at `offset`. Pieces may come in any order; together they cover the vector once.
    pub fn push(&mut self, offset: usize, piece: &[f32]) {
        let Lane::Begun { lane, missing } = &mut self.lane else { panic!("X4: values without a lane") };
        *missing = missing.checked_sub(piece.len()).expect("X4: more values than the vector has");
        if let Some(given) = self.early.as_mut().filter(|_| *lane + 1 == self.owned.end) {
            given.insert(offset..offset + piece.len());
        }
        match self.script[(*lane - self.owned.start) as usize].sums {
            0 => {
                let fresh = self.open.last_mut().expect("X3: begin pushed a buffer");
                fresh.write(offset..offset + piece.len()).copy_from_slice(piece);
            }
            // The common case needs no scratch: left += lane.
            1 => add(self.open.last_mut().expect("X3: a left neighbour").write(offset..offset + piece.len()), piece),
            sums => {
                for (index, block) in piece.chunks(BLOCK_VALUES).enumerate() {
                    self.add_chain(offset + index * BLOCK_VALUES, block, sums);
                }
            }
        }
    }

    /// Ends the step: all owned lanes were given. The partial sums, left to right.
    pub fn finish(&mut self) -> &mut [Partial] {
        if let Lane::Begun { lane, missing } = self.lane {
            assert_eq!(missing, 0, "X4: lane {lane} lacks values");
            assert_eq!(lane + 1, self.owned.end, "X3: lanes after {lane} are missing");
            self.complete(lane);
            self.lane = Lane::Idle;
        }
        assert!(!self.partials.is_empty(), "X3: no lane was summed");
        &mut self.partials
    }

    /// Whether the sums of a range are those of all owned lanes: nothing more is added to them.
    pub(super) fn are_complete(&self, range: &Range<usize>) -> bool {
        match self.lane {
            Lane::Idle => !self.partials.is_empty(),
            Lane::Begun { .. } => self.early.as_ref().is_some_and(|given| given.contain(range)),
        }
    }

    /// The partial sums of a range that are complete, left to right, as bytes to send.
    pub(super) fn freeze_complete(&mut self, range: &Range<usize>) -> Vec<Bytes> {
        assert!(self.are_complete(range), "X4: {range:?} lacks values");
        // The outermost open sum is the last subtree's.
        let open = self.open.first_mut().into_iter();
        let sums = self.partials.iter_mut().map(|partial| &mut partial.values).chain(open);
        sums.map(|sum| sum.freeze(range.clone())).collect()
    }

    /// [`LaneSums::finish`], as bytes to send: they stay readable when the next step begins.
    pub(super) fn freeze(&mut self) -> Vec<Bytes> {
        let values = self.values;
        self.finish().iter_mut().map(|partial| partial.values.freeze(0..values)).collect()
    }

    /// A block of the lane that completes several sums: innermost first, each one is left + (what is to its right). Only the outermost is
    /// stored, the others live in the scratch block.
    fn add_chain(&mut self, offset: usize, block: &[f32], sums: usize) {
        let range = offset..offset + block.len();
        let first = self.open.len() - sums;
        let (outer, inner) = self.open[first..].split_first_mut().expect("X3: at least two open sums");
        let sum = &mut self.scratch[..block.len()];
        let (innermost, rest) = inner.split_last().expect("X3: at least two open sums");
        sum.copy_from_slice(&innermost.read()[range.clone()]);
        add(sum, block);
        for left in rest.iter().rev() {
            add(sum, &left.read()[range.clone()]);
        }
        add(outer.write(range), sum);
    }

    /// Closes the sums that `lane` completed: all but the outermost are spent.
    fn complete(&mut self, lane: u32) {
        let Completes { sums, subtree } = self.completes(lane);
        for _ in 1..sums {
            let spent = self.open.pop().expect("X3: as many open sums as the script closes");
            self.pool.put(spent);
        }
        if let Some(subtree) = subtree {
            let values = self.open.pop().expect("X3: a subtree is the outermost sum");
            assert!(self.open.is_empty(), "X3: sums left open below a subtree");
            self.partials.push(Partial { subtree, values });
        }
    }

    fn completes(&self, lane: u32) -> Completes {
        self.script[(lane - self.owned.start) as usize]
    }
}

/// What each lane of a subtree completes.
fn completions(subtree: Subtree) -> Vec<Completes> {
    let single: Vec<Subtree> = subtree.lanes().map(|lane| Subtree { start: lane, len: 1 }).collect();
    let mut script: Vec<Completes> = Vec::with_capacity(single.len());
    for op in lanes::fold(subtree, &single) {
        match op {
            Fold::Push(_) => script.push(Completes { sums: 0, subtree: None }),
            Fold::Add => script.last_mut().expect("X3: a fold begins with a leaf").sums += 1,
        }
    }
    script.last_mut().expect("X3: a subtree has lanes").subtree = Some(subtree);
    script
}

/// The most sums that are open at a time.
fn open_max(script: &[Completes]) -> usize {
    let (mut open, mut most) = (0usize, 0);
    for step in script {
        open += usize::from(step.sums == 0);
        most = most.max(open);
        open -= step.sums.saturating_sub(1) + usize::from(step.subtree.is_some());
    }
    most
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, seq::SliceRandom};
    use rand_chacha::ChaCha8Rng;

    use super::super::sum;
    use super::*;

    /// The fold of whole vectors, one at a time: what every other way to sum must equal bit for bit.
    fn plain(node: Subtree, lanes: &[Vec<f32>]) -> Vec<f32> {
        let Some((left, right)) = node.children() else { return lanes[node.start as usize].clone() };
        let (mut left, right) = (plain(left, lanes), plain(right, lanes));
        sum::add(&mut left, &right);
        left
    }

    fn gradients(rng: &mut ChaCha8Rng, lanes: u32, values: usize) -> Vec<Vec<f32>> {
        let value = |rng: &mut ChaCha8Rng| (rng.random::<f32>() - 0.5) * 2f32.powi(rng.random_range(-20..20));
        (0..lanes).map(|_| (0..values).map(|_| value(rng)).collect()).collect()
    }

    /// Gives one lane in random pieces in random order.
    fn give(sums: &mut LaneSums, lane: u32, gradient: &[f32], rng: &mut ChaCha8Rng) {
        sums.begin(lane);
        let mut cuts: Vec<usize> = (0..rng.random_range(0..4)).map(|_| rng.random_range(0..=gradient.len())).collect();
        cuts.extend([0, gradient.len()]);
        cuts.sort_unstable();
        let mut pieces: Vec<Range<usize>> = cuts.windows(2).map(|cut| cut[0]..cut[1]).collect();
        pieces.shuffle(rng);
        for piece in pieces {
            sums.push(piece.start, &gradient[piece]);
        }
    }

    #[test]
    fn partial_sums_have_the_bits_of_the_plain_fold() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for _ in 0..200 {
            let lanes = rng.random_range(1..=17);
            let world = rng.random_range(1..=lanes);
            let values = if rng.random_bool(0.1) { rng.random_range(8000..10_000) } else { rng.random_range(0..40) };
            for owned in lanes::assign(lanes, world) {
                let mut sums = LaneSums::new(values, lanes, owned.clone());
                for _step in 0..3 {
                    let gradients = gradients(&mut rng, lanes, values);
                    for lane in owned.clone() {
                        give(&mut sums, lane, &gradients[lane as usize], &mut rng);
                    }
                    let partials = sums.finish();
                    let subtrees: Vec<Subtree> = partials.iter().map(|partial| partial.subtree).collect();
                    assert_eq!(subtrees, lanes::subtrees(owned.clone(), lanes));
                    for partial in partials {
                        assert_eq!(partial.values.read(), plain(partial.subtree, &gradients));
                    }
                }
            }
        }
    }

    #[test]
    fn a_step_given_up_halfway_leaves_nothing_behind() {
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        let gradients = gradients(&mut rng, 8, 100);
        let mut sums = LaneSums::new(100, 8, 0..8);
        for lane in 0..7 {
            give(&mut sums, lane, &gradients[lane as usize], &mut rng);
        }
        for lane in 0..8 {
            give(&mut sums, lane, &gradients[lane as usize], &mut rng);
        }
        assert_eq!(sums.finish()[0].values.read(), plain(Subtree::root(8), &gradients));
        assert_eq!(sums.finish().len(), 1, "finishing twice is asking twice");
    }

    #[test]
    #[should_panic(expected = "X4: lane 0 lacks values")]
    fn a_lane_with_a_gap_is_a_bug() {
        let mut sums = LaneSums::new(10, 2, 0..2);
        sums.begin(0);
        sums.push(0, &[1.0; 9]);
        sums.begin(1);
    }
}
