//! The owner's fold: the partial sums of all ranks for one piece, added in the one tree order. Pure; owns only its scratch blocks.
//!
//! X6: the additions are those of `lanes::fold` over the leaves of all ranks, in its order, so the bits do not depend on the world.

use stoke_protocol::lanes::Fold;

use super::frame::Cursor;

/// Values folded at a time: 16 KiB a block, so that the output and the few open blocks stay in the first-level cache.
const BLOCK_VALUES: usize = 4096;

/// Executes one fold program over pieces.
pub struct Folder {
    program: Vec<Fold>,
    /// Blocks for the open right-hand sums; the outermost sum is built in the output itself.
    scratch: Vec<Box<[f32]>>,
}

impl Folder {
    pub fn new(program: Vec<Fold>) -> Self {
        let (mut open, mut most) = (0usize, 0);
        for op in &program {
            match op {
                Fold::Push(_) => open += 1,
                Fold::Add => open -= 1,
            }
            most = most.max(open);
        }
        let scratch = (1..most).map(|_| vec![0.0; BLOCK_VALUES].into()).collect();
        Self { program, scratch }
    }

    /// `out` = the root; `leaves` are the leaves' values in tree order.
    pub fn fold(&mut self, leaves: &mut [Cursor<'_>], out: &mut [f32]) {
        for block in out.chunks_mut(BLOCK_VALUES) {
            self.fold_block(leaves, block);
        }
    }

    fn fold_block(&mut self, leaves: &mut [Cursor<'_>], out: &mut [f32]) {
        let Self { program, scratch } = self;
        let (count, mut leaves) = (out.len(), leaves.iter_mut());
        let mut open = 0;
        let mut program = program.iter().peekable();
        while let Some(op) = program.next() {
            match op {
                Fold::Push(_) => {
                    let leaf = leaves.next().expect("X6: a cursor for each leaf");
                    // A leaf that is added at once needs no block of its own.
                    if open > 0 && program.next_if(|next| **next == Fold::Add).is_some() {
                        leaf.add_to(innermost(open, scratch, out));
                    } else {
                        open += 1;
                        leaf.copy_to(innermost(open, scratch, out));
                    }
                }
                Fold::Add => {
                    let (left, right) = scratch.split_at_mut(open - 2);
                    let right = &right[0][..count];
                    match left.last_mut() {
                        Some(left) => super::sum::add(&mut left[..count], right),
                        None => super::sum::add(out, right),
                    }
                    open -= 1;
                }
            }
        }
        assert_eq!(open, 1, "X6: a fold ends with the root");
    }
}

/// The innermost of `open` open sums; the outermost is the output itself.
fn innermost<'a>(open: usize, scratch: &'a mut [Box<[f32]>], out: &'a mut [f32]) -> &'a mut [f32] {
    if open == 1 { out } else { &mut scratch[open - 2][..out.len()] }
}
