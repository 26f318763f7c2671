//! The simulator: a whole cluster in one thread and in virtual time, from one seed. The coordinator's `Control` on a model log and the agents'
//! `AgentState` are the real ones; processes of ranks, clients, disks and the network between them are modelled here. Wiring only.
//!
//! A run has two phases. Chaos: the faults that the seed drew happen while jobs come and go. Calm: faults are off, and everything must
//! converge (I37). After every event the invariants of `invariants.rs` are checked; a run ends at the first that does not hold.
//!
//! Deterministic by construction: one queue ordered by (time, sequence), random numbers that depend on seed, concern and time (`random.rs`), ordered
//! maps only. Two runs of a seed have equal hashes. What a run goes through is a plan (`plan.rs`); of one that fails a small one is made (`shrink.rs`)
//! and written as a file (`trace.rs`).

mod agents;
mod alone;
mod clients;
mod coordinator;
mod coverage;
mod faults;
mod gangs;
mod invariants;
mod network;
mod oracle;
mod plan;
mod planted;
mod random;
mod ranks;
mod run;
pub mod seeds;
mod shrink;
mod specs;
mod store;
mod trace;
mod world;

pub use coverage::Coverage;
pub use faults::{Fault, Rates};
pub use invariants::TABLE;
pub use plan::{Detection, Plan, TimedFault};
pub use planted::{AgentBug, Planted, RankBug};
pub use random::Source;
pub use run::{Outcome, Setting, Violation, run};
pub use shrink::{RUNS_MAX, shrink};
pub use trace::Trace;
