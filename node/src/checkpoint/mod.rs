//! Checkpoints: safetensors shards beside one `manifest.json`. Wiring only.
//!
//! Everything here blocks its thread until the disk has answered: not for actors.

#[cfg(test)]
mod damage;
mod error;
mod export;
mod folder;
mod manifest;
mod plan;
mod ranges;
mod read;
mod shard;
#[cfg(test)]
mod tests;
mod write;

pub use error::CheckpointError;
pub use export::{Exported, export};
pub use folder::Folder;
pub use manifest::{FORMAT, MANIFEST_FILE, Manifest, Shard};
pub use plan::{folder_name, own_shard, plan_shards, shard_file};
pub use read::{Verified, load, open, verify};
pub use shard::{decode, encode};
pub use write::{abandon, remove, remove_older, write_manifest, write_shard};
