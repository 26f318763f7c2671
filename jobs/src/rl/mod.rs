//! Wiring of reinforcement learning: environments, policies that act, rollouts, learners. Pure compute, deterministic in its seeds; no network, no clock
//! but a bridge's deadlines.

mod actor;
mod bridge;
mod bridge_process;
#[cfg(test)]
mod burn_check;
mod cells;
mod classic;
mod config;
mod dqn;
mod draws;
mod env;
mod environment;
mod error;
mod evaluation;
mod impala;
mod learn;
mod learner;
mod loss;
mod math;
mod net;
mod pcg64;
mod policy;
mod ppo;
mod returns;
mod rollout;
mod running;
pub mod scan_budget;
mod solo;
mod space;
mod trajectory;
mod trig;

pub use actor::{Acted, Actor, Choices, Explore, Place};
pub use bridge::{Bridge, BridgeConfig};
pub use cells::Cells;
pub use config::{Algorithm, AlgorithmConfig, DqnConfig, ImpalaConfig, PpoConfig, Rate, RlConfig, RlPlan};
pub use dqn::Dqn;
pub use env::{Actions, EnvError, EnvSpec, NATIVE, Step, StepBuffer, VecEnv, make};
pub use environment::EnvConfig;
pub use error::RlError;
pub use evaluation::{Normaliser, evaluate};
pub use impala::Impala;
pub use learn::{Learn, Round, tree_sum};
pub use learner::{Adam, Learner, Updated};
pub use pcg64::Pcg64;
pub use policy::{Policy, PolicyKind};
pub use ppo::Ppo;
pub use returns::{Steps, Truncation, gae, vtrace};
pub use rollout::{Rollout, RolloutConfig};
pub use solo::{Report, Solo, learn};
pub use space::Space;
pub use trajectory::{ENDED, Episode, TERMINATED, TRANSITION, TRUNCATED, Trajectory};
