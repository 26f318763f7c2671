//! What ranks of one generation say to each other on their own connections (ALPN `stoke/peer/1`). Headers only: the numbers follow a header
//! as raw little-endian f32 bytes and never pass through a codec.

use serde::{Deserialize, Serialize};

use super::rank::{Member, RankId};
use crate::ids::{Digest, Fingerprint, Step, Term};
use crate::lanes::Subtree;
use crate::ledger::Ledger;
use crate::list::List;
use crate::spec::RANKS_MAX;

/// The first header of a bulk stream: what it carries.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Opening {
    /// `TensorHeader`s of one generation, until the sender leaves it.
    Exchange(Standing),
    /// One shard of the sender's state after `step` steps, to a rank that joins, or of the checkpoint that both begin with: `StateHeader`s, each
    /// with its bytes. Together they are what the shard's file would be.
    /// Where ranks keep parts of the optimizer's state: what the sender has of what the receiver is to keep from now on, and
    /// lacks. Shards are numbered by the places of the senders then, and no hash is given.
    State { term: Term, step: Step, shard: u32, shards: u32, loss: f32, ledger: Ledger, weights_blake3: Digest },
    /// Nothing follows. Not answered: who agrees enters the term, and the sender meets it there.
    Proposal(Proposal),
}

impl Opening {
    pub fn term(&self) -> Term {
        match self {
            Self::Exchange(standing) => standing.term,
            Self::State { term, .. } => *term,
            Self::Proposal(proposal) => proposal.term,
        }
    }
}

/// To every rank that it names, by the first of them, while the coordinator is away: go on without the others. Ballots of two members are never
/// equal: `ballot % members of the generation` is the sender's place among them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Proposal {
    pub term: Term,
    /// In the order of lanes.
    pub members: List<RankId>,
}

/// Where a rank stands when it enters a generation. They differ by at most one step: a sum is complete on one rank only when every rank has
/// given its part, so that every rank has done the step before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Standing {
    pub term: Term,
    /// Steps that it has done; none for one that has no state yet.
    pub step: Option<Step>,
    /// Whether it still has the sum of the last of them, for those that lack it.
    pub has_sum: bool,
    /// The checkpoint that it begins with and has not read yet.
    pub restores: Option<Restores>,
    /// Of a rank that serves: of the model's files.
    pub files: Option<Fingerprint>,
    /// Where it is, if it would exchange through memory with ranks that are there too.
    pub machine: Option<Machine>,
    /// Where those of its machine get the memory, if it is the first of them.
    pub door: Option<Door>,
    /// Where it takes connections by TCP, at the same address.
    pub tcp: Option<u16>,
    /// Of a job whose ranks keep parts of the optimizer's state: what this one has of it after `step` steps.
    pub keeps: Keeps,
}

/// The part of the optimizer's state that is dealt to this place in a world of so many ranks. In a world of one: all of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Kept {
    pub world: u32,
    pub position: u32,
}

impl Kept {
    pub const ALL: Self = Self { world: 1, position: 0 };
}

/// Parts that a rank has, the oldest first: more than one while it is not known that all others have theirs.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Keeps([Option<Kept>; Keeps::MAX]);

impl Keeps {
    pub const MAX: usize = 4;

    pub fn iter(&self) -> impl Iterator<Item = Kept> {
        self.0.iter().flatten().copied()
    }

    pub fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }

    /// Adds a part; where there are too many, the second oldest is not told of any more.
    pub fn push(&mut self, kept: Kept) {
        let mut parts: Vec<Kept> = self.iter().filter(|part| *part != kept).chain([kept]).collect();
        if parts.len() > Self::MAX {
            parts.remove(1);
        }
        *self = parts.into_iter().collect();
    }
}

/// Of the first few.
impl FromIterator<Kept> for Keeps {
    fn from_iter<I: IntoIterator<Item = Kept>>(parts: I) -> Self {
        let mut keeps = Self::default();
        keeps.0.iter_mut().zip(parts).for_each(|(place, part)| *place = Some(part));
        keeps
    }
}

/// After the standings, to all members of a generation in which some are on one machine: whether the sender shares memory with those of its machine, if
/// there are any. One of a machine where all do speaks for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Sharing {
    pub term: Term,
    pub shares: bool,
}

/// After that, where both take connections by TCP and have values for each other: from the one that dials, whether it has connected; then from the other,
/// whether it has the connection. If so, the values of the generation go by it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Way {
    pub term: Term,
    pub tcp: bool,
}

/// The first header of a connection by TCP, from who dialled: the generation that it is for. The other says the same when it has taken it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ByTcp {
    pub term: Term,
}

/// Equal for two ranks that can hand each other memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Machine(pub [u8; 16]);

/// An abstract socket of Unix, and what opens it.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Door {
    pub name: [u8; 16],
    pub cookie: [u8; 16],
}

/// The cookie is no one's business (I35).
impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a door")
    }
}

/// What a rank that begins with a checkpoint knows of it before any shard is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Restores {
    pub step: Step,
    /// Shards that it reads itself: in its machine's memory, or as files.
    pub near: ShardSet,
}

/// Some of the shards of a checkpoint.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct ShardSet([u64; SHARD_WORDS]);

const SHARD_WORDS: usize = (RANKS_MAX / u64::BITS) as usize;

impl ShardSet {
    /// Shards from [`RANKS_MAX`] on are in no set: there are none.
    pub fn insert(&mut self, shard: u32) {
        if let Some(word) = self.0.get_mut((shard / u64::BITS) as usize) {
            *word |= 1 << (shard % u64::BITS);
        }
    }

    pub fn contains(&self, shard: u32) -> bool {
        self.0.get((shard / u64::BITS) as usize).is_some_and(|word| word >> (shard % u64::BITS) & 1 == 1)
    }
}

impl FromIterator<u32> for ShardSet {
    fn from_iter<I: IntoIterator<Item = u32>>(shards: I) -> Self {
        let mut set = Self::default();
        shards.into_iter().for_each(|shard| set.insert(shard));
        set
    }
}

/// A run of bytes of a state, on its own stream. `count` bytes follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StateHeader {
    pub count: u32,
    pub blake3: Digest,
}

/// Which weights of a policy: how many updates had been applied to them, and the first eight bytes of their BLAKE3, little-endian. Whoever passes them on may be
/// wrong or late.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WeightsId {
    pub version: u64,
    pub digest: u64,
}

/// To a rank that plays environments, on one stream: by a learner what is to be played, by another that plays weights only.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ToPlayer {
    /// `count` f32 follow, little-endian.
    Weights { id: WeightsId, count: u32 },
    /// A round of a lane, from the state of which `bytes` follow; none: the lane begins. Answered by `Played`, `Failed` or `Wanting`. The weights
    /// come on any stream, before or after.
    Play { order: u64, lane: u32, weights: WeightsId, bytes: u32 },
    /// To whom weights are to be passed on, from wherever they come; it replaces what this learner has said before.
    PassOn { players: List<Member> },
}

/// To a learner, on one stream.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FromPlayer {
    /// The trajectory and the lane's state afterwards follow. `failures`: environments that failed and were made anew.
    Played { order: u64, trajectory: u32, state: u32, failures: u32, strays: u32 },
    /// It could not be played; the text is for people.
    Failed { order: u64, error: String },
    /// Its weights have not come, and none are on their way: the learner is to send them itself, and the order again.
    Wanting { order: u64 },
    /// All weights are here.
    Loaded { id: WeightsId },
}

/// The header of a run of f32 values of the flat gradient vector, on a bulk stream. `count` values follow as raw bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TensorHeader {
    /// A receiver in another term drops the stream and counts it.
    pub term: Term,
    pub step: Step,
    pub part: Part,
    /// First value, counted in f32 from the start of the flat vector.
    pub offset: u64,
    pub count: u32,
    /// Of a partial sum, or of `Replica`: the parameters from which the sender's lanes were computed, as they were afterwards (I19). None where replicas are
    /// not compared at this step, and of partial sums where values leave before the lanes have ended.
    pub replica: Option<Fingerprint>,
}

/// What the values are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Part {
    /// To the owner of the piece: the sum of the lanes of one node of the lane tree, from who has them on its machine.
    Partial(Subtree),
    /// From the owner of the piece, to one of each machine: the complete sum.
    Sum,
    /// From a rank that has done `step` already to one that has not: the complete sum of it, before anything else of the generation.
    CatchUp,
    /// Without values: the sender's parameters are those of the header's `replica`. To all members, when some are found not to be the same; where values leave
    /// before the lanes have ended, to all members and observers at each step that compares, behind its values.
    Replica,
    /// To one of each machine, where ranks keep parts of the optimizer's state: parameters after the step, from the rank that has stepped them. Counted from
    /// the start of all parameters in the order in which they are dealt to ranks.
    Parameters,
}
