//! What tests and benches share. Wiring only.

pub mod binary;
pub mod fuzz;
pub mod sim;
