//! The sum of all ranks' gradients, with the same bits on any number of ranks, and how ranks come together for it.

mod all_gather;
mod all_reduce;
mod bf16;
mod buffer;
mod driver;
mod early;
mod error;
mod fold;
mod form;
mod frame;
mod host;
mod lane_sum;
mod link;
mod machine;
mod memory;
mod mesh;
mod operation;
mod plan;
pub mod quorum;
mod ranges;
mod shares;
mod state_transfer;
mod sum;
mod tcp;
#[cfg(test)]
mod tests;
mod wire;

pub use all_reduce::{AbortHandle, Exchange, ExchangeStats, Place, Shape};
pub use error::ExchangeError;
pub use form::{Formed, Readers, State};
pub use lane_sum::{LaneSums, Partial};
pub use mesh::{CONNECT_MAX, Mesh, Pair};
pub use plan::{Traffic, traffic};
pub use shares::{Parcel, Shares, hand_over};
pub use state_transfer::{Received, Shard, StateOf};
pub use tcp::UseTcp;
