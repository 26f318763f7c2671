//! What is said on the wire and how it is carried. Wiring only.

mod borrowed;
pub mod codec;
pub mod exposition;
pub mod identity;
pub mod ids;
pub mod label;
pub mod lanes;
pub mod ledger;
pub mod list;
pub mod message;
pub mod spec;
pub mod transport;
