//! Serving: where the heads of serving gangs are, and what a gateway asks of one. A gateway dials a head as the node that it runs on (ALPN
//! `stoke/peer/1`); each question has a stream of its own, its answer is as many frames as it takes, and whoever drops the stream takes the
//! question back.
//!
//! I27: the tokens of an answer are a function of its question, whoever computes them, and each frame says which token of the answer it begins
//! with. So an answer that was cut off is asked for again with the tokens that are there, and goes on behind them.

use std::net::SocketAddr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::rank::RankId;
use crate::ids::{Generation, JobId, LogIndex, Term};
use crate::list::List;
use crate::spec::Task;

/// Every job that serves. To every node whenever they change; the newest counts, also while the coordinator is away.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Routes {
    /// Of the journal: an older one never replaces a newer.
    pub index: LogIndex,
    pub routes: List<Route>,
}

/// A job that serves. Jobs of one model are its replicas.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Route {
    /// As clients name it.
    pub model: String,
    pub job: JobId,
    pub task: Task,
    /// When the job was submitted, in milliseconds since 1970.
    pub created_ms: u64,
    /// None while its ranks come up, or one is being replaced.
    pub head: Option<Head>,
    /// Of the weights and how they are computed with. An answer that has begun goes on only where it is the same (I27).
    pub revision: u64,
    pub traffic: Traffic,
}

/// Which of a model's new questions a job gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Traffic {
    /// Those that no share takes, with all others that get them.
    #[default]
    Rest,
    /// So many of a million, drawn by the gateway.
    Share { millionths: u32 },
    /// None of them, but copies, whose answers nobody gets.
    Shadow,
    /// None any more: what it has begun it ends.
    Leaving,
}

/// The first rank of a gang: it takes the questions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Head {
    pub id: RankId,
    pub address: SocketAddr,
    /// The gang that answers.
    pub generation: Generation,
}

/// Tokens, or pages of a cache. As bytes on the wire, four each: a list of small numbers is decoded into far more memory than it has bytes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tokens(pub Vec<u32>);

impl Serialize for Tokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = self.0.iter().flat_map(|token| token.to_le_bytes()).collect();
        List(bytes).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = List::<u8>::deserialize(deserializer)?;
        let (tokens, rest) = bytes.as_chunks::<4>();
        match rest.is_empty() {
            true => Ok(Self(tokens.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect())),
            false => Err(serde::de::Error::custom("tokens end in the middle of one")),
        }
    }
}

impl std::ops::Deref for Tokens {
    type Target = Vec<u32>;
    fn deref(&self) -> &Vec<u32> {
        &self.0
    }
}

impl From<Vec<u32>> for Tokens {
    fn from(tokens: Vec<u32>) -> Self {
        Self(tokens)
    }
}

/// Gateway → head, request stream.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Question {
    /// As the routes had it; for logs. A head that is one answers in whatever generation it is.
    pub generation: Generation,
    /// From its arrival on; what is late is given up with `Refusal::Late`. 0: as long as it takes.
    pub deadline_ms: u32,
    pub ask: Ask,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Ask {
    /// Answered by `Answer::Begun`, `Answer::Tokens` as they are made, and `Answer::Ended`.
    Generate(Generate),
    /// Answered by one `Answer::Vector` for each text, in their order, and `Answer::Ended`.
    Embed { texts: List<String> },
    /// Answered by `Answer::Tensors` and `Answer::Ended`.
    Infer { inputs: List<Tensor> },
    /// Answered by `Answer::Described` and `Answer::Ended`.
    Describe,
    /// A token that goes through every rank of the gang. Answered by `Answer::Ended`.
    Probe,
}

/// Values of one name, as the Open Inference Protocol has them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Tensor {
    pub name: String,
    pub datatype: Datatype,
    pub shape: List<u64>,
    /// Row-major, little-endian. `Bytes`: each value is preceded by its length (u32).
    pub values: List<u8>,
}

/// A tensor that a model takes or gives.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TensorKind {
    pub name: String,
    pub datatype: Datatype,
    /// None: any length.
    pub shape: List<Option<u64>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Datatype {
    Bool,
    U8,
    I32,
    I64,
    F32,
    F64,
    Bytes,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Generate {
    pub prompt: Prompt,
    pub sampling: Sampling,
    /// Tokens of the answer at most; none: what the context has room for.
    pub tokens_max: Option<u32>,
    /// Texts that end the answer, and are no part of it.
    pub stop: List<String>,
    /// Tokens of the answer that were delivered already; the answer goes on after them.
    pub answered: Tokens,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Prompt {
    /// Written out by the model's chat template, in order.
    Chat(List<Message>),
    /// As it stands.
    Text(String),
    Tokens(Tokens),
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or whatever the template knows.
    pub role: String,
    pub content: String,
}

/// How each token is chosen. The meaning is that of `stoke_jobs::lm::Sampling`.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Sampling {
    pub temperature: f32,
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub seed: u64,
}

/// Head → gateway.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// The question is taken; its prompt has so many tokens.
    Begun {
        prompt_tokens: u32,
    },
    /// Tokens of the answer from the one at `index` on, and the text that is certain with them: a character is not cut, and what may become a stop
    /// text is kept back.
    Tokens {
        index: u32,
        tokens: Tokens,
        text: String,
    },
    /// One text's, of length 1; and how many tokens the text has.
    Vector {
        index: u32,
        tokens: u32,
        values: List<f32>,
    },
    Tensors {
        outputs: List<Tensor>,
    },
    Described {
        inputs: List<TensorKind>,
        outputs: List<TensorKind>,
    },
    /// The last frame. `text`: what was kept back and is part of the answer.
    Ended {
        why: Finish,
        text: String,
    },
    /// The last frame: there is no answer, or no more of it.
    Refused(Refusal),
}

/// Why an answer is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Finish {
    /// The model has ended it, or a stop text has come.
    Stop,
    /// It is as long as it may be.
    Length,
}

/// Why there is no answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Refusal {
    /// The same question is refused everywhere; the text is for people: what is wrong, and what to write instead.
    Invalid { problem: String },
    /// Prompt and answer are longer than the context.
    TooLong { tokens: u32, context: u32 },
    /// As much waits as may wait.
    Busy { retry_after_ms: u32 },
    /// The deadline is over.
    Late,
    /// The gang is in another generation, or is being re-formed: ask the head that the newest routes name.
    Moved,
    /// It was tried, and cannot be done here or elsewhere; the text is for people.
    Failed { problem: String },
}

/// Rank → rank of a serving gang, on their stream of a generation: so many bytes follow. Batches are numbered by the head, and come in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StageHeader {
    /// A receiver in another term drops the stream.
    pub term: Term,
    pub batch: u64,
    pub part: StagePart,
    pub bytes: u32,
}

/// What the bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum StagePart {
    /// To the same part of the next stage, and from the head to the other parts of its own: a `Batch`, as a frame's payload (`FrameCap::Batch`).
    Batch,
    /// To the same part of the next stage, after the batch: a row of f32 values for each row of it.
    Hidden,
    /// To every other part of the same stage: sums over the sender's columns, f32, one for each subtree that covers them. `half`: which sum of
    /// the stage it is, from 0 in each batch.
    Sums { half: u32 },
    /// From the last stage to the head: a token (u32) for each that was asked for.
    Chosen,
    /// To the next rank (after the last one comes the first), which keeps it: a page of the sender's cache that has a name, as a `PageName` in 36 bytes
    /// and the values, f32. `batch`: the last one that the sender has computed.
    Copied,
    /// To the head at the beginning of a generation, before any batch: a `Held`, as a frame's payload (`FrameCap::Batch`).
    Held,
    /// From the head, when it has heard all: a `Resume`, likewise.
    Resume,
    /// To the rank before: a page that was kept for it, as in `Copied`.
    Restored,
}

/// A page of the cache of which all tokens are known. The name is a hash of them and of all tokens before.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct PageName {
    pub page: u32,
    pub name: [u8; 32],
}

/// What a rank has of earlier generations.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Held {
    /// Pages of its own cache.
    pub own: List<PageName>,
    /// Pages of the cache of the rank before it.
    pub kept: List<PageName>,
}

/// What a rank begins the generation with.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Resume {
    /// Pages that are to be in every rank's cache: nothing else has a name.
    pub pages: List<PageName>,
    /// Those that it lacks: the next rank sends them.
    pub lacking: Tokens,
    /// Those that the rank before it lacks.
    pub give: Tokens,
    /// Those that the next rank does not keep yet.
    pub copy: Tokens,
}

/// Rows that are computed together, as every rank needs them.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Batch {
    /// Pages of the cache, of each sequence that has rows here.
    pub tables: List<Tokens>,
    pub rows: List<BatchRow>,
    pub asks: List<BatchAsk>,
    /// Pages that are whole after it.
    pub filled: List<PageName>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BatchRow {
    /// Which of the tables.
    pub table: u32,
    pub token: u32,
    pub position: u32,
}

/// The token that follows a row is wanted.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct BatchAsk {
    pub row: u32,
    /// Of the answer, from 0.
    pub index: u64,
    pub sampling: Sampling,
    /// Tokens of prompt and answer so far, where a repetition penalty needs them.
    pub before: Tokens,
}
