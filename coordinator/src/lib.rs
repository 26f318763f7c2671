//! The control plane of a Stoke cluster. Wiring only: `state/` decides and is pure; everything else does.

pub mod config;
mod http;
pub mod journal;
pub mod metrics;
pub mod setup;
pub mod state;
