//! What the coordinator decides, as pure machines: no clock, no randomness, no socket, no disk. Wiring only.
//!
//! `Cluster` is the durable fold: `apply(now, event)` for every entry of the journal gives the state. `Liveness` holds what a restart may
//! forget. `Control` joins both: the shell and the simulator feed it inputs, append its records to a log and run its effects after they are
//! durable.

pub mod authorise;
pub mod autoscale;
pub mod checkpoints;
mod checks;
pub mod cluster;
mod commands;
mod commits;
pub mod control;
mod drain;
pub mod effect;
pub mod elastic;
pub mod event;
pub mod explain;
pub mod happenings;
pub mod history;
pub mod invariants;
mod inventory;
pub mod jobs;
pub mod liveness;
pub mod load;
pub mod machine;
pub mod members;
mod moves;
mod not_finite;
mod overdue;
pub mod placement;
mod planner;
pub mod planted;
pub mod preemption;
pub mod pruning;
pub mod quarantine;
mod removal;
pub mod replicas;
mod reports;
pub mod requests;
mod revisions;
pub mod rollouts;
mod room;
pub mod run;
pub mod scaling;
#[cfg(test)]
mod scenarios;
mod serving;
mod sessions;
pub mod split;
pub mod stragglers;
pub mod survey;
pub mod suspicion;
pub mod time;
pub mod timeline;
pub mod tokens;
pub mod view;
pub mod words;
mod yielding;

pub use self::cluster::Cluster;
pub use self::control::{Control, Input, Options, SessionId, Step, Ticket};
pub use self::effect::{Effect, Order};
pub use self::event::{Event, Record};
pub use self::planted::PlantedBug;
pub use self::time::{Mono, Now, Time};
