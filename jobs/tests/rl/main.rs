//! Environments through the public interface: gymnasium's figures, and the contract of `VecEnv`.

mod contract;
mod golden;
