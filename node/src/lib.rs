//! Wiring of `stoke-node`: the agent (one a machine) and the worker (one process a rank). Programs of users call [`rank::main`], and nothing else here.

pub mod agent;
pub mod artifact;
pub mod checkpoint;
mod config;
pub mod exchange;
mod exec;
pub mod gateway;
mod link;
mod objects;
pub mod probe;
pub mod rank;
mod rollout;
mod server;
pub mod worker;

pub use config::{Config, Gateway};
pub use server::model_folder;
