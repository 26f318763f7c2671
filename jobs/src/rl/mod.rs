//! Wiring of reinforcement learning: environments now. Pure compute, deterministic in its seeds; no network, no clock but a bridge's deadlines.

mod actor;
mod bridge;
mod bridge_process;
mod classic;
mod draws;
mod env;
mod error;
mod learner;
mod math;
mod net;
mod pcg64;
mod policy;
pub mod scan_budget;
mod space;
mod trig;

pub use bridge::{Bridge, BridgeConfig};
pub use env::{Actions, EnvError, EnvSpec, NATIVE, Step, StepBuffer, VecEnv, make};
pub use pcg64::Pcg64;
pub use space::Space;
pub use actor::{Acted, Actor, Choices, Explore, Place};
pub use error::RlError;
pub use learner::{Adam, Learner, Updated};
pub use policy::{Policy, PolicyKind};
