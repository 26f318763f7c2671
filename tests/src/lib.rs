//! What tests and benches share. Wiring only.

pub mod binary;
pub mod cost;
pub mod fleet;
pub mod fuzz;
pub mod local;
pub mod namespaces;
pub mod report;
pub mod sim;
