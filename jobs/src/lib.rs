//! Wiring of `stoke-jobs`: what a job computes (models, data, training, prediction), on Burn.
//! No network and no async runtime in it: `stoke-node` feeds it samples and moves its gradients. It starts no process but Python for an
//! environment of gymnasium's.

mod config;
mod data;
mod device;
mod error;
pub mod lm;
mod order;
pub mod rl;
mod train;
mod trainers;

pub use config::{OptimizerConfig, ScheduleConfig, Sections, Spec, absolute_paths};
pub use data::{ReadAt, Stores, read_stores_by};
pub use device::device;
pub use error::JobError;
pub use order::order;
pub use train::{
    Applied, Broadcast, Diloco, Engine, Floats, LaneWork, Layout, Loss, Metrics, NamedTensor, ParamSpec, Plan, Predict,
    Prediction, Pulse, RlProgress, STATS, Snapshot, TRAINERS, Task, Train, check, check_files, classifier,
    cross_entropy, export_files, fingerprint, layers, load, pytorch, weights_blake3,
};
pub use trainers::{Trainer, Trainers};
