//! The doing side: actors and tasks that carry inputs to the control machine and its effects to the world. Wiring only; nothing here decides.
//!
//! No actor has a name (ractor's registry is one a process, and a simulation runs several coordinators in one). Mailboxes are unbounded, so
//! everything that a peer can make us put into one holds a permit of that peer's session or connection.

pub(crate) mod cluster;
pub(crate) mod conversation;
pub(crate) mod door;
mod gateway;
pub(crate) mod handle;
mod logs;
pub(crate) mod messages;
mod outbox;
mod session;
mod uploads;
mod watchers;
