//! What tests and benches share. Wiring only.

pub mod fuzz;
pub mod sim;
