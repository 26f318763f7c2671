//! A cluster on this machine: one supervisor process, one coordinator, N agents. Wiring only.
//!
//! `stoke run` and `stoke up` start `stoke supervise` and talk to it through its standard streams: notices come out as JSON lines
//! ([`notice`]), and for `stoke run` its standard input is a lifeline: when that closes, for whatever reason, the cluster is taken down and
//! its folder removed. So nothing is left behind, even after `kill -9` of either: the supervisor's children die with it.

pub mod folder;
pub mod gateways;
pub mod handle;
mod keeper;
pub mod notice;
pub mod process;
mod restarts;
pub mod supervisor;
