//! The simulator: a whole cluster in one thread and in virtual time, from one seed. The coordinator's `Control` on a model log and the agents'
//! `AgentState` are the real ones; processes of ranks, clients, disks and the network between them are modelled here. Wiring only.
//!
//! A run has two phases. Chaos: the faults that the seed drew happen while jobs come and go. Calm: faults are off, and everything must
//! converge (I37). After every event the invariants of `invariants.rs` are checked; a run ends at the first that does not hold.
//!
//! Deterministic by construction: one queue ordered by (time, sequence), one stream of random numbers a concern (`random.rs`), ordered maps
//! only. Two runs of a seed have equal hashes.

mod agents;
mod clients;
mod coordinator;
mod faults;
mod invariants;
mod network;
mod oracle;
mod planted;
mod random;
mod ranks;
mod run;
mod specs;
mod store;
mod world;

pub use faults::Faults;
pub use invariants::TABLE;
pub use planted::{AgentBug, Planted};
pub use run::{Outcome, Setting, Violation, run};
