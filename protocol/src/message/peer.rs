//! What ranks of one generation say to each other on their own connections (ALPN `stoke/peer/1`). Headers only: the numbers follow a header
//! as raw little-endian f32 bytes and never pass through a codec.

use serde::{Deserialize, Serialize};

use crate::ids::{Generation, Step};
use crate::lanes::Subtree;

/// The header of a run of f32 values of the flat gradient vector, on a bulk stream. `count` values follow as raw bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TensorHeader {
    /// A receiver of another generation drops the stream and counts it.
    pub generation: Generation,
    pub step: Step,
    pub part: Part,
    /// First value, counted in f32 from the start of the flat vector.
    pub offset: u64,
    pub count: u32,
}

/// What the values are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Part {
    /// To the owner of the range: the sender's sum of the lanes of one node of the lane tree.
    Partial(Subtree),
    /// From the owner of the range to all: the complete sum.
    Sum,
}
