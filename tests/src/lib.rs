//! What tests and benches share. Wiring only.

pub mod binary;
pub mod fuzz;
pub mod local;
pub mod sim;
