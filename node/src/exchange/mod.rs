//! The sum of all ranks' gradients, with the same bits on any number of ranks.

mod buffer;
mod fold;
mod frame;
mod lane_sum;
mod operation;
mod plan;
mod sum;

pub use lane_sum::{LaneSums, Partial};
