//! How a model that is served is cut over ranks: what nodes are asked of it, and what comes of that. A part of the conversations of `node.rs` and
//! `client.rs`.

use serde::{Deserialize, Serialize};

use crate::ids::NodeId;
use crate::list::List;
use crate::spec::Precision;

/// What is said of a node that has not answered yet.
pub const SURVEYING: &str = "is being surveyed";

/// Which model, and how a rank would compute with it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Survey {
    /// As a spec names it.
    pub model: String,
    pub precision: Precision,
    /// Compute threads a rank.
    pub threads: u32,
}

/// What a node has found: the shape of a decoder, and how fast it is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Surveyed {
    pub layers: u32,
    /// Of the largest layer's weights.
    pub layer_bytes: u64,
    pub embedding_bytes: u64,
    /// Of the output layer; 0 where it is the embedding again.
    pub output_bytes: u64,
    /// Heads of keys and values.
    pub kv_heads: u32,
    /// Into so many parts a layer may be cut at most.
    pub parts_max: u32,
    /// Keys and values of one token in one layer, of one such head.
    pub token_bytes: u32,
    /// Most tokens that the model was trained for.
    pub context: u32,
    pub vocabulary: u32,
    /// One row takes so long through one layer, nanoseconds: the least of several tries.
    pub layer_ns: u64,
}

/// A cut, and where its ranks go.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Split {
    pub stages: u32,
    pub tensor: u32,
    /// Rank by rank.
    pub ranks: List<SplitRank>,
    /// What a token of one answer is expected to take, nanoseconds: compute of all stages, the exchanges between parts and the hops between stages.
    pub token_ns: u64,
    /// The slowest stage: with many answers at once there is a token of one of them in each such time.
    pub stage_ns: u64,
    /// Why so many ranks.
    pub why: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SplitRank {
    pub stage: u32,
    pub part: u32,
    /// From the first one to the one behind the last.
    pub layers: (u32, u32),
    pub memory_bytes: u64,
    /// Where it goes if there is room when it starts.
    pub node: NodeId,
    /// As measured there: see [`Surveyed`].
    pub layer_ns: u64,
    /// As measured between the node and the coordinator, microseconds.
    pub rtt_us: u32,
}

/// What a spec would get, were it submitted now.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Planned {
    pub model: String,
    /// None: it cannot be served, `reason` says why.
    pub split: Option<Split>,
    /// With a split: why it would wait for room. Empty: it fits now.
    pub reason: String,
    /// What each node says.
    pub nodes: List<(NodeId, String)>,
}
