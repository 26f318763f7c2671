//! Parameters from the ranks that have stepped them to all others, at one rank and without sockets. Owns what is sent and in which order it comes; checks every
//! frame against the shares; never waits.
//!
//! X19: it is complete when every other machine's ranks have given all of their parameters, or said that they have none: then each of them has begun it, and
//! has what it is to keep.

use std::ops::Range;

use bytes::Bytes;
use stoke_protocol::ids::{Step, Term};
use stoke_protocol::message::peer::{Part, TensorHeader};

use super::buffer::Buffer;
use super::frame::Frame;
use super::operation::{Outgoing, Unexpected};
use super::plan::{PIECE_VALUES_MAX, Plan};

/// One gathering after the other.
pub struct AllGather {
    plan: Plan,
    term: Term,
    step: Step,
    /// Of each rank, in the vector.
    ranges: Vec<Range<usize>>,
    values: Option<Buffer>,
    /// Pieces that came from each.
    received: Vec<usize>,
    /// Pieces that are still to come.
    missing: usize,
}

impl AllGather {
    /// Nothing under way.
    pub fn new(plan: Plan, term: Term) -> Self {
        let world = plan.world as usize;
        Self { plan, term, step: Step(0), ranges: Vec::new(), values: None, received: vec![0; world], missing: 0 }
    }

    /// Begins it after a step. `values` has this rank's parameters, and those of all others that it shares memory with come there by themselves.
    pub fn begin(&mut self, step: Step, ranges: Vec<Range<usize>>, mut values: Buffer, send: &mut dyn FnMut(Outgoing)) {
        assert!(self.values.is_none(), "X8: one operation at a time");
        assert_eq!(ranges.len(), self.plan.world as usize, "X18: a share for each rank");
        let own = ranges[self.plan.rank as usize].clone();
        (self.step, self.ranges) = (step, ranges);
        self.received.fill(0);
        self.missing = self.plan.owners().map(|owner| pieces(&self.ranges[owner as usize])).sum();
        let others: Vec<u32> = self.plan.listeners().filter(|rank| *rank < self.plan.world).collect();
        for piece in (0..pieces(&own)).filter_map(|index| piece(&own, index)) {
            let (offset, count) = (piece.start as u64, piece.len() as u32);
            let header = TensorHeader { term: self.term, step, part: Part::Parameters, offset, count, replica: None };
            let bytes = if others.is_empty() { Bytes::new() } else { values.freeze(piece) };
            others.iter().for_each(|to| send(Outgoing { to: *to, header, values: bytes.clone() }));
        }
        self.values = Some(values);
    }

    /// Whether a peer has parameters to give, as members have.
    pub fn is_of(&self, peer: u32) -> bool {
        peer < self.plan.world
    }

    pub fn is_active(&self) -> bool {
        self.values.is_some()
    }

    /// The step that it is or was last of.
    pub fn step(&self) -> Step {
        self.step
    }

    /// Takes one frame of `from`, whose term was checked.
    pub fn receive(&mut self, from: u32, frame: &Frame) -> Result<(), Unexpected> {
        let TensorHeader { step, part, offset, count, .. } = frame.header;
        let expected = self
            .next_of(from)
            .filter(|piece| step == self.step && offset == piece.start as u64 && count as usize == piece.len());
        let (Some(piece), Some(values)) = (expected, &mut self.values) else {
            return Err(Unexpected { step, part, offset, count });
        };
        frame.values.cursor().copy_to(values.write(piece));
        self.received[from as usize] += 1;
        self.missing -= 1;
        Ok(())
    }

    /// All parameters, once they are here. Ends it.
    pub fn take_complete(&mut self) -> Option<Buffer> {
        let is_complete = self.missing == 0;
        self.values.take_if(|_| is_complete)
    }

    /// Whether frames of `peer` are still missing.
    pub fn is_owed_by(&self, peer: u32) -> bool {
        self.is_active() && self.next_of(peer).is_some()
    }

    /// The piece that comes next from a rank, if one does.
    fn next_of(&self, from: u32) -> Option<Range<usize>> {
        if from >= self.plan.world || !self.plan.is_told_by(from) {
            return None;
        }
        piece(self.ranges.get(from as usize)?, self.received[from as usize])
    }
}

/// How many a range is cut into: at least one, so that who has nothing is heard of too.
fn pieces(range: &Range<usize>) -> usize {
    range.len().div_ceil(PIECE_VALUES_MAX).max(1)
}

fn piece(range: &Range<usize>, index: usize) -> Option<Range<usize>> {
    let first = range.start + index * PIECE_VALUES_MAX;
    (index < pieces(range)).then(|| first..(first + PIECE_VALUES_MAX).min(range.end))
}

#[cfg(test)]
mod tests {
    use rand::seq::SliceRandom;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use stoke_protocol::ids::Generation;

    use super::super::frame::Rope;
    use super::super::plan::Hosts;
    use super::*;

    const TERM: Term = Term { generation: Generation(1), ballot: 0 };

    fn frame(out: Outgoing) -> Frame {
        Frame { header: out.header, values: Rope::whole(out.values), _place: None }
    }

    /// Ranks of one vector, each with a share of it; one in three has none.
    fn ranges(world: u32, rng: &mut ChaCha8Rng) -> Vec<Range<usize>> {
        let mut end = 0;
        let share = |_| {
            let start = end;
            end += if rng.random_bool(0.3) { 0 } else { rng.random_range(1..PIECE_VALUES_MAX * 2) };
            start..end
        };
        (0..world).map(share).collect()
    }

    #[test]
    fn every_rank_gets_what_every_other_has() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for _ in 0..20 {
            let world = rng.random_range(2..6);
            let ranges = ranges(world, &mut rng);
            let count = ranges.last().unwrap().end;
            let expected: Vec<f32> = (0..count).map(|_| rng.random()).collect();
            let plan = |rank| Plan::new((count, 0), 8, (world, 1), rank, &Hosts::alone(world));
            let mut ranks: Vec<AllGather> = (0..world).map(|rank| AllGather::new(plan(rank), TERM)).collect();
            for step in [Step(4), Step(5)] {
                let mut links: Vec<((u32, u32), Vec<Outgoing>)> = Vec::new();
                for (rank, side) in (0..).zip(&mut ranks) {
                    let (mut values, own) = (Buffer::new(count), ranges[rank as usize].clone());
                    values.write(own.clone()).copy_from_slice(&expected[own]);
                    let mut send = |out: Outgoing| match links.iter_mut().find(|(pair, _)| *pair == (rank, out.to)) {
                        Some((_, sent)) => sent.push(out),
                        None => links.push(((rank, out.to), vec![out])),
                    };
                    side.begin(step, ranges.clone(), values, &mut send);
                    assert!((0..world).all(|peer| peer == rank || side.is_owed_by(peer)));
                }
                links.shuffle(&mut rng);
                for ((from, to), sent) in links {
                    assert!(to < world, "observers need no parameters");
                    for out in sent {
                        ranks[to as usize].receive(from, &frame(out)).unwrap();
                    }
                    assert!(!ranks[to as usize].is_owed_by(from));
                }
                for side in &mut ranks {
                    assert!(side.take_complete().unwrap().read() == expected);
                    assert!(side.take_complete().is_none());
                }
            }
        }
    }

    #[test]
    fn frames_that_the_shares_do_not_foresee_are_refused() {
        let plan = Plan::new((64, 0), 2, (2, 0), 0, &Hosts::alone(2));
        let mut side = AllGather::new(plan, TERM);
        let good =
            TensorHeader { term: TERM, step: Step(5), part: Part::Parameters, offset: 40, count: 24, replica: None };
        let frame = |header| Frame { header, values: Rope::whole(Bytes::from(vec![0; 96])), _place: None };
        assert!(side.receive(1, &frame(good)).is_err(), "nothing is under way");
        side.begin(Step(5), vec![0..40, 40..64], Buffer::new(64), &mut |_| ());
        let step = TensorHeader { step: Step(4), ..good };
        let bad = [step, TensorHeader { offset: 39, ..good }, TensorHeader { count: 25, ..good }];
        for header in bad {
            assert!(side.receive(1, &frame(header)).is_err(), "{header:?}");
        }
        assert!(side.receive(0, &frame(good)).is_err() && side.receive(2, &frame(good)).is_err());
        assert!(side.take_complete().is_none());
        side.receive(1, &frame(good)).unwrap();
        assert!(side.receive(1, &frame(good)).is_err(), "once is enough");
        assert!(side.take_complete().is_some());
    }
}
