//! Environments through the public interface: gymnasium's figures, and the contract of `VecEnv`.

mod bridge;
mod contract;
mod golden;
mod learning;
mod reference;
mod rollouts;
mod scan_budget;
