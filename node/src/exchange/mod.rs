//! The sum of all ranks' gradients, with the same bits on any number of ranks.

mod all_reduce;
mod buffer;
mod driver;
mod error;
mod fold;
mod frame;
mod lane_sum;
mod link;
mod mesh;
mod operation;
mod plan;
mod sum;
#[cfg(test)]
mod tests;

pub use all_reduce::{AbortHandle, Exchange, ExchangeStats, Shape};
pub use error::ExchangeError;
pub use lane_sum::{LaneSums, Partial};
pub use mesh::{CONNECT_MAX, PeerEndpoint};
