//! The control plane of a Stoke cluster. Wiring only: `state/` decides and is pure; everything else does.

pub mod journal;
pub mod state;
