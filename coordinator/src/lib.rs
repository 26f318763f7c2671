//! The control plane. Wiring only.

pub mod journal;
