//! The control plane of a Stoke cluster. Wiring only: `state/` decides and is pure; everything else does.

mod actors;
pub mod api;
mod artifacts;
mod config;
mod coordinator;
mod environment;
mod gauges;
mod http;
pub mod journal;
mod metrics;
mod recovery;
mod setup;
pub mod state;
mod traces;

pub use config::{Config, Lifetimes};
pub use coordinator::{Coordinator, Ended, Running, StartError};
pub use environment::{Environment, JournalMode};
pub use recovery::{record_bytes, snapshot_bytes};
