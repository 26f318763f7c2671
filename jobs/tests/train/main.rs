//! The trainers through the public interface: the contract of `Train`, and PyTorch's figures.

mod common;
mod contract;
mod golden;
mod precision;
mod sharded;
