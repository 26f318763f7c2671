//! The name of an artifact: a packed folder, by the hash of its bytes. Owns how it is written.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ids::Digest;

/// A packed folder is code, not data: data lies where each node finds it.
pub const ARTIFACT_BYTES_MAX: u64 = 256 << 20;
/// Bytes of an artifact in one request or answer: half a frame.
pub const ARTIFACT_PART_BYTES: usize = 512 * 1024;
const SCHEME: &str = "blake3:";

/// Written as `"blake3:..."`, with 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Artifact(pub Digest);

impl fmt::Display for Artifact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.0)
    }
}

impl FromStr for Artifact {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no artifact: write \"blake3:\" and 64 hexadecimal digits");
        text.strip_prefix(SCHEME).and_then(|digits| digits.parse().ok()).map(Self).ok_or_else(wrong)
    }
}

impl Serialize for Artifact {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Artifact {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
