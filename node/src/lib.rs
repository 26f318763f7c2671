//! Wiring of `stoke-node`: the agent (one a machine) and the worker (one process a rank).

pub mod checkpoint;
