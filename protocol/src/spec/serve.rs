//! The section `[serve]`: a model that answers requests, and how it is cut over ranks. Owns its keys, defaults and checks.

use serde::{Deserialize, Serialize};

use super::{Bytes, RANKS_MAX, Replicas, THREADS_MAX, check_uri, is_name};
use crate::label::is_plain;

/// The model that gives back what it gets: what serving costs without a model.
pub const IDENTITY: &str = "identity";

/// As long as a path may be on Linux.
const MODEL_BYTES_MAX: usize = 4096;
/// Less has room for no request of any model.
const CACHE_BYTES_MIN: u64 = 1 << 20;
/// Requests of a gang that run or wait.
const REQUESTS_MAX: u32 = 65_536;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serve {
    /// A checkpoint's URI where the task is to infer. Otherwise a GGUF file, or a folder with one, or with config.json, safetensors files and tokenizer.json: an absolute path that is the same on every
    /// node, or the name of a folder in each node's folder of models.
    pub model: String,
    /// As clients name the model. Left out: the job's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default)]
    pub task: Task,
    /// Ranks that have the layers one after the other. Left out, of a decoder: chosen from what its nodes have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stages: Option<u32>,
    /// Ranks that share each layer. Left out: the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensor: Option<u32>,
    /// How many layers each stage has. Left out: chosen with the rest, or as equal in work as they can be cut where nothing else is left to choose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<u32>>,
    /// Compute threads a rank.
    #[serde(default = "super::one")]
    pub threads: u32,
    /// Tokens of a request and its answer at most. Left out: what the model was trained for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<u32>,
    /// Keys and values of requests that run, in each rank.
    #[serde(default = "default_cache")]
    pub cache: Bytes,
    /// Whether another rank of the gang keeps what a rank has in its cache, so that nothing of it is computed again when the rank dies. As much memory again.
    #[serde(default = "yes", skip_serializing_if = "std::clone::Clone::clone")]
    pub keep: bool,
    /// Requests that are computed at the same time.
    #[serde(default = "default_running")]
    pub running: u32,
    /// Requests that may wait; more are refused.
    #[serde(default = "default_waiting")]
    pub waiting: u32,
    #[serde(default)]
    pub precision: Precision,
    /// A canary: of the model's new requests it gets this part. Left out: those that no share takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<Share>,
    /// It gets copies of the model's new requests, and nobody gets its answers.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shadow: bool,
    /// The model has more or fewer jobs as its requests need them. Left out: those that people ask for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicas: Option<Replicas>,
}

/// A part of a whole, above 0 and up to 1; written as a number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Share {
    millionths: u32,
}

impl Share {
    pub fn millionths(self) -> u32 {
        self.millionths
    }
}

impl From<Share> for f64 {
    fn from(share: Share) -> Self {
        f64::from(share.millionths) / 1e6
    }
}

impl TryFrom<f64> for Share {
    type Error = String;

    fn try_from(part: f64) -> Result<Self, String> {
        let millionths = (part * 1e6).round();
        match (1.0..=1e6).contains(&millionths) {
            true => Ok(Self { millionths: millionths as u32 }),
            false => Err(format!("a share of {part}: use one above 0 and up to 1, for example 0.1")),
        }
    }
}

/// What the model is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// Text that follows a text or a chat: a decoder.
    #[default]
    Generate,
    /// A vector for a text: an encoder.
    Embed,
    /// Tensors for tensors: a classifier that this project has trained, by a checkpoint's URI.
    Infer,
}

/// What quantised weights are multiplied with.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Activations rounded to 8 bits: fast.
    #[default]
    Rounded,
    /// Activations as they are: several times slower.
    Full,
}

fn default_cache() -> Bytes {
    Bytes(256 << 20)
}

fn yes() -> bool {
    true
}

fn default_running() -> u32 {
    32
}

fn default_waiting() -> u32 {
    256
}

impl Serve {
    /// The ranks of a gang, as far as the spec says. Rank `stage * tensor + part` has the part of the stage.
    pub fn ranks(&self) -> u32 {
        self.stages() * self.tensor()
    }

    /// 1 where nobody has said or chosen more.
    pub fn stages(&self) -> u32 {
        self.said_stages().unwrap_or(1)
    }

    /// The same.
    pub fn tensor(&self) -> u32 {
        self.tensor.unwrap_or(1)
    }

    pub fn said_stages(&self) -> Option<u32> {
        self.stages.or_else(|| self.layers.as_ref().and_then(|layers| u32::try_from(layers.len()).ok()))
    }

    /// The key that is wrong, and what to write instead.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        let fail = |key, message| Err((key, message));
        let within = |key: &'static str, value: u32, most: u32| match (1..=most).contains(&value) {
            true => Ok(()),
            false => Err((key, format!("{key} = {value}: use 1 to {most}"))),
        };
        let model = &self.model;
        if model.is_empty() || model.len() > MODEL_BYTES_MAX || !is_plain(model) {
            return fail("model", "model: use a path or a name of up to 4096 bytes without control characters".into());
        }
        if self.task == Task::Infer {
            if model != IDENTITY
                && let Err(problem) = check_uri(model)
            {
                return fail(
                    "model",
                    format!("model = {model:?}: {problem}; or {IDENTITY:?}, which gives back what it gets"),
                );
            }
        } else if !model.starts_with('/') && !is_name(model) || model.split('/').any(|part| part == "..") {
            return fail(
                "model",
                format!("model = {model:?}: write an absolute path, or the name of a folder of the nodes' models"),
            );
        }
        if let Some(name) = &self.name
            && !is_name(name)
        {
            return fail("name", format!("name = {name:?}: use letters, digits, '-', '_' or '.'"));
        }
        if self.share.is_some() && self.shadow {
            return fail(
                "share",
                "share and shadow: use one of them, a shadow gets a copy of every new request".into(),
            );
        }
        within("stages", self.stages(), RANKS_MAX)?;
        within("tensor", self.tensor(), RANKS_MAX)?;
        if let Some(layers) = &self.layers
            && (layers.len() != self.stages() as usize || layers.contains(&0))
        {
            let stages = self.stages();
            return fail("layers", format!("layers = {layers:?}: write a number above 0 for each of {stages} stages"));
        }
        if self.ranks() > RANKS_MAX {
            let (stages, tensor) = (self.stages(), self.tensor());
            return fail(
                "stages",
                format!("stages = {stages} with tensor = {tensor}: a gang has at most {RANKS_MAX} ranks"),
            );
        }
        if self.task != Task::Generate && (self.ranks() > 1 || self.layers.is_some()) {
            return fail(
                "stages",
                "stages and tensor cut decoders only: an encoder or a classifier has one rank".into(),
            );
        }
        if self.cache.0 < CACHE_BYTES_MIN {
            let cache = self.cache.0;
            return fail(
                "cache",
                format!("cache = {cache} bytes: write at least 1MiB, with its unit, for example \"256MiB\""),
            );
        }
        within("threads", self.threads, THREADS_MAX)?;
        within("running", self.running, REQUESTS_MAX)?;
        within("waiting", self.waiting, REQUESTS_MAX)?;
        if let Some(replicas) = &self.replicas {
            replicas.check(self.running + self.waiting)?;
        }
        match self.context {
            Some(0 | 1) => fail("context", "context: a request and its answer have at least 2 tokens".into()),
            Some(_) | None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::spec::JobSpec;

    fn spec(serve: &str, resources: &str) -> Result<JobSpec, String> {
        let text = format!("name = \"m\"\n[serve]\nmodel = \"m\"\n{serve}\n[resources]\n{resources}");
        JobSpec::parse(&text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_decoder_waits_for_its_cut_and_an_encoder_has_none() {
        let awaits = |serve: &str, resources: &str| spec(serve, resources).unwrap().awaits_split();
        assert!(awaits("", "") && awaits("stages = 2\ntensor = 1", "memory = \"1GiB\""));
        assert!(!awaits("task = \"embed\"", ""));
        let written = spec("layers = [3, 4]", "").unwrap();
        assert_eq!((written.serve.as_ref().unwrap().ranks(), written.resources.memory().0), (2, 1 << 30));
        assert_eq!(JobSpec::parse(&written.to_toml()).unwrap(), written, "what is left out stays left out");
    }

    #[test]
    fn layers_are_as_many_numbers_as_there_are_stages() {
        for wrong in ["layers = []", "layers = [3, 0]", "stages = 3\nlayers = [3, 4]"] {
            let error = spec(wrong, "").unwrap_err();
            assert!(error.contains("layers") || error.contains("stages"), "{error}");
        }
    }
}
