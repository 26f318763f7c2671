//! `manifest.json`: what makes shards a checkpoint. Owns its fields and what is checked before anyone believes them (I24).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::{ClusterId, Digest, Generation, JobId, Step};
use stoke_protocol::ledger::Ledger;
use stoke_protocol::message::rank::ShardRecord;

/// Grows when a reader of the old form would misread the new one.
pub const FORMAT: &str = "stoke-checkpoint-2";
pub const MANIFEST_FILE: &str = "manifest.json";

/// A larger manifest is not ours: the spec has at most 32 KiB, a shard's entry 200 bytes.
pub(super) const MANIFEST_BYTES_MAX: u64 = 16 << 20;
/// More shards than this are more ranks than a job can have; the bound keeps a forged manifest from costing memory.
const SHARDS_MAX: usize = 4096;
/// The last key of the file: the BLAKE3 of every byte before it, in 64 hexadecimal digits.
const SEAL: &str = ",\n  \"seal\": \"";
const SEAL_END: &str = "\"\n}\n";

/// Everything that is needed to continue, and where it came from. Holds no clock and no address: the same state gives the same bytes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: String,
    /// 32 hexadecimal digits.
    #[serde(with = "text")]
    pub cluster: ClusterId,
    pub job: JobId,
    pub name: String,
    pub trainer: String,
    pub generation: Generation,
    /// Steps that were applied.
    pub step: Step,
    /// Samples that were consumed: positions `0..cursor` of the order are done (I20). The RNG of every later step follows from `seed`,
    /// the step and the lane, so that there is no other random state.
    pub cursor: u64,
    /// The same as the sums of the steps have shown it; an early build wrote none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ledger: Option<Ledger>,
    /// Ranks that wrote it. Any number may read it.
    pub world: u32,
    pub lanes: u32,
    pub seed: u64,
    /// The canonical job spec (TOML).
    pub spec: String,
    pub shards: Vec<Shard>,
    /// Mean loss of the last step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f32>,
    /// `Train::weights_blake3` of the model inside; checked again after it was restored.
    #[serde(with = "text")]
    pub weights_blake3: Digest,
    /// Held-out metrics; in the checkpoint of the last step.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
}

/// One safetensors file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Shard {
    pub index: u32,
    pub file: String,
    pub bytes: u64,
    /// 64 hexadecimal digits.
    #[serde(with = "text")]
    pub blake3: Digest,
}

impl From<ShardRecord> for Shard {
    fn from(record: ShardRecord) -> Self {
        Self { index: record.index, file: record.file, bytes: record.bytes, blake3: record.blake3 }
    }
}

impl Manifest {
    /// Bytes of all shards.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes).sum()
    }

    /// Indented JSON with a newline at its end: people open it. Sealed: a manifest that was changed is not read.
    pub fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_string_pretty(self).expect("a manifest has only types that JSON can write");
        json.truncate(json.len() - "\n}".len());
        seal(json).into_bytes()
    }

    /// Parses and checks; an error is the problem in words.
    pub(super) fn from_json(json: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Tag {
            format: String,
        }
        let tag: Tag = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        if tag.format != FORMAT {
            return Err(format!(
                "format {:?} is not {FORMAT:?}: read it with the stoke release that wrote it",
                tag.format
            ));
        }
        let manifest: Self = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        if !is_sealed(json) {
            return Err("its bytes do not hash to its seal: it was changed".to_owned());
        }
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        if self.shards.is_empty() || self.shards.len() > SHARDS_MAX || self.shards.len() != self.world as usize {
            return Err(format!("{} shards for {} ranks", self.shards.len(), self.world));
        }
        let mut files = BTreeSet::new();
        for (position, shard) in self.shards.iter().enumerate() {
            if shard.index as usize != position {
                return Err(format!("shard {} stands at position {position}", shard.index));
            }
            if !is_plain_name(&shard.file) {
                return Err(format!("shard {position} has the file name {:?}, which is not a plain name", shard.file));
            }
            if !files.insert(&shard.file) {
                return Err(format!("two shards have the file name {:?}", shard.file));
            }
        }
        Ok(())
    }
}

/// Ends a JSON object, that lacks only its end, with the hash of what it says.
pub(super) fn seal(body: String) -> String {
    let hash = blake3::hash(body.as_bytes()).to_hex();
    format!("{body}{SEAL}{hash}{SEAL_END}")
}

/// Whether a manifest is what was written, to the bit.
fn is_sealed(json: &[u8]) -> bool {
    let sealed = || {
        let (body, digits) = json.strip_suffix(SEAL_END.as_bytes())?.split_last_chunk::<64>()?;
        let body = body.strip_suffix(SEAL.as_bytes())?;
        Some(blake3::hash(body).to_hex().as_bytes() == digits)
    };
    sealed().unwrap_or(false)
}

/// A file directly in the folder, and nothing else: a manifest cannot point anywhere.
fn is_plain_name(file: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=255).contains(&file.len()) && !file.starts_with('.') && file.chars().all(allowed)
}

/// Ids as the text that people see elsewhere, and not as lists of numbers.
mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<T: Display, S: Serializer>(id: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
