//! Lanes: the fixed slices of the global batch, and the one binary tree in which their gradients are summed, whoever owns them.
//! Pure arithmetic; never moves a byte. Every bit of a training run after a step depends on this file: the tree is a function of the
//! number of lanes alone.
//!
//! L1: `assign` gives every lane to exactly one rank, contiguously, in rank order, sizes differing by at most one.
//! L2: the subtrees of a range are disjoint, cover it, and each is a node of the tree.
//! L3: folding the subtrees of any assignment gives the same tree, so the same bits.

use std::ops::Range;

/// More lanes than this cost more in exchange (each rank sends up to two partial sums a tree level) than they give in freedom.
pub const LANES_MAX: u32 = 1024;

/// A node of the lane tree: the lanes `start .. start + len` summed. The root is all lanes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, serde::Serialize, serde::Deserialize)]
pub struct Subtree {
    pub start: u32,
    pub len: u32,
}

impl Subtree {
    /// The whole tree.
    pub fn root(lanes: u32) -> Self {
        Self { start: 0, len: lanes }
    }

    /// The two halves, or nothing for a single lane. The left half is the largest power of two below the length (as in a BLAKE3 tree), so
    /// the shape depends on the length only.
    pub fn children(self) -> Option<(Self, Self)> {
        if self.len < 2 {
            return None;
        }
        let left = self.len.next_power_of_two() / 2;
        Some((Self { start: self.start, len: left }, Self { start: self.start + left, len: self.len - left }))
    }

    /// The lanes below this node.
    pub fn lanes(self) -> Range<u32> {
        self.start..self.start + self.len
    }
}

/// The lanes of each rank: contiguous, the first `lanes % world` ranks own one more. 8 lanes over 3 ranks are 3 + 3 + 2.
///
/// `world` is between 1 and `lanes`; a spec that asks for more ranks than lanes is refused before this is called.
pub fn assign(lanes: u32, world: u32) -> Vec<Range<u32>> {
    assert!((1..=lanes).contains(&world), "L1: {world} ranks for {lanes} lanes");
    let (each, extra) = (lanes / world, lanes % world);
    let mut start = 0;
    (0..world)
        .map(|rank| {
            let len = each + u32::from(rank < extra);
            let range = start..start + len;
            start += len;
            range
        })
        .collect()
}

/// The largest nodes of the tree that lie wholly inside `owned`, left to right: what a rank sums by itself and sends.
pub fn subtrees(owned: Range<u32>, lanes: u32) -> Vec<Subtree> {
    let mut found = Vec::new();
    collect(Subtree::root(lanes), &owned, &mut found);
    found
}

fn collect(node: Subtree, owned: &Range<u32>, found: &mut Vec<Subtree>) {
    let lanes = node.lanes();
    if lanes.end <= owned.start || owned.end <= lanes.start {
        return;
    }
    if owned.start <= lanes.start && lanes.end <= owned.end {
        found.push(node);
        return;
    }
    let (left, right) = node.children().expect("L2: a single lane is inside or outside a range");
    collect(left, owned, found);
    collect(right, owned, found);
}

/// One instruction of the fold that turns leaves, in order, into the root: `depth` is the number of values on the stack.
/// Folding is post-order, so a stack of at most `log2(lanes) + 1` values is enough.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fold {
    /// Push the next leaf.
    Push(Subtree),
    /// Add the top of the stack to the value below it and drop the top.
    Add,
}

/// The fold of `node` whose leaves are `leaves` (nodes of the tree that cover it, left to right).
pub fn fold(node: Subtree, leaves: &[Subtree]) -> Vec<Fold> {
    let mut program = Vec::with_capacity(2 * leaves.len());
    let mut rest = leaves.iter().copied().peekable();
    emit(node, &mut rest, &mut program);
    assert!(rest.next().is_none(), "L2: leaves outside the folded node");
    program
}

fn emit(node: Subtree, leaves: &mut std::iter::Peekable<impl Iterator<Item = Subtree>>, program: &mut Vec<Fold>) {
    if leaves.peek() == Some(&node) {
        leaves.next();
        program.push(Fold::Push(node));
        return;
    }
    let (left, right) = node.children().expect("L2: leaves cover the folded node");
    emit(left, leaves, program);
    emit(right, leaves, program);
    program.push(Fold::Add);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sum whose result shows its shape.
    fn run(program: &[Fold], leaf: &mut dyn FnMut(Subtree) -> String) -> String {
        let mut stack: Vec<String> = Vec::new();
        for op in program {
            match op {
                Fold::Push(node) => stack.push(leaf(*node)),
                Fold::Add => {
                    let (right, left) = (stack.pop().unwrap(), stack.pop().unwrap());
                    stack.push(format!("({left}+{right})"));
                }
            }
        }
        assert_eq!(stack.len(), 1);
        stack.pop().unwrap()
    }

    fn single_lanes(node: Subtree) -> Vec<Subtree> {
        node.lanes().map(|lane| Subtree { start: lane, len: 1 }).collect()
    }

    fn shape(node: Subtree) -> String {
        run(&fold(node, &single_lanes(node)), &mut |lane| lane.start.to_string())
    }

    #[test]
    fn eight_lanes_split_as_users_expect() {
        assert_eq!(assign(8, 1), vec![0..8; 1]);
        assert_eq!(assign(8, 2), [0..4, 4..8]);
        assert_eq!(assign(8, 3), [0..3, 3..6, 6..8]);
        assert_eq!(shape(Subtree::root(8)), "(((0+1)+(2+3))+((4+5)+(6+7)))");
    }

    #[test]
    fn every_assignment_folds_to_the_same_tree() {
        for lanes in 1..=33 {
            let whole = shape(Subtree::root(lanes));
            for world in 1..=lanes {
                let owned = assign(lanes, world);
                assert_eq!(owned.iter().map(|r| r.len() as u32).sum::<u32>(), lanes);
                let leaves: Vec<Subtree> = owned.into_iter().flat_map(|range| subtrees(range, lanes)).collect();
                let folded = run(&fold(Subtree::root(lanes), &leaves), &mut shape);
                assert_eq!(folded, whole, "{lanes} lanes over {world} ranks");
            }
        }
    }
}
