//! Values that leave while others are still computed: what a rank by itself gives of a step whose last lane is under way. Owns the order in which it gives; what
//! is complete of a lane is `lane_sum.rs`'s, and the sum the driver's.

use bytes::Bytes;
use stoke_protocol::ids::Step;

use super::lane_sum::LaneSums;
use super::plan::Plan;

/// See the module.
pub struct Early {
    /// Owner and index of all pieces, the own ones too, from the end of the vector.
    pieces: Vec<(u32, usize)>,
    plan: Plan,
    /// The step that was opened, and how many of the pieces were given to it.
    open: Option<(Step, usize)>,
}

impl Early {
    pub fn new(plan: Plan) -> Self {
        let own = (0..plan.pieces(plan.rank)).map(|index| (plan.rank, index));
        let mut pieces: Vec<_> = plan.given().chain(own).collect();
        // As they become complete: a piece that waits for another one's place waits for layers whose turn in backward is later.
        pieces.sort_by_key(|(owner, index)| index * plan.world as usize + *owner as usize);
        Self { pieces, plan, open: None }
    }

    /// Whether the step that was opened is this one.
    pub fn is_open(&self, step: Step) -> bool {
        self.open.is_some_and(|(open, _)| open == step)
    }

    pub fn open(&mut self, step: Step) {
        self.open = Some((step, 0));
    }

    /// The next piece, if it is complete: whose, which, and its sums.
    pub fn next(&mut self, sums: &mut LaneSums) -> Option<(u32, usize, Vec<Bytes>)> {
        let (_, given) = self.open.as_mut().expect("X8: a step is open");
        let (to, index) = *self.pieces.get(*given)?;
        let piece = self.plan.piece(to, index);
        if !sums.are_complete(&piece) {
            return None;
        }
        *given += 1;
        Some((to, index, sums.freeze_complete(&piece)))
    }
}
