//! Checkpoints: safetensors shards beside one `manifest.json`. Wiring only.
//!
//! Everything here blocks its thread until the disk has answered: not for actors.

mod answer;
#[cfg(test)]
mod damage;
mod error;
mod export;
mod folder;
mod manifest;
mod memory;
mod patience;
mod plan;
mod ranges;
mod read;
mod shard;
pub(crate) mod store;
#[cfg(test)]
mod tests;
mod write;

pub use error::CheckpointError;
pub use export::{Exported, export, export_folder};
pub use folder::{Folder, bytes_read};
pub use manifest::{FORMAT, MANIFEST_FILE, Manifest, Shard};
pub use memory::ShardMemory;
pub use patience::patiently;
pub use plan::{folder_name, own_shard, plan_shards, shard_file};
pub use read::{Verified, load, load_shards, near, open, open_committed, verify};
pub use shard::{decode, encode};
pub use store::{Settings, provide, settings};
pub use write::{abandon, remove, remove_older, remove_unfinished, sweep, write_manifest, write_shard};
