//! The model that a rank serves, from its files. Owns where a name leads and the checks that need no other rank; computes nothing.

use std::path::{Path, PathBuf};

use stoke_jobs::lm::{ChatTemplate, DecoderConfig, Encoder, ModelError, Precision, Tokenizer, Weights};
use stoke_protocol::ids::Fingerprint;
use stoke_protocol::spec::{self, Serve};

use super::split;
use crate::worker::text_of;

/// How much of a tensor is looked at when ranks compare their files.
const SAMPLE_EVERY: usize = 256 << 10;
const SAMPLE_BYTES: usize = 4 << 10;
/// The folder of this machine's models, where it is not `~/.cache/stoke/models`.
const MODELS: &str = "STOKE_MODELS";

/// What a rank needs of a model before it is a part of a gang. Files are mapped: nothing of a layer is read before it is used.
pub struct Model {
    pub weights: Weights,
    pub config: DecoderConfig,
    /// Tokens of a request and its answer at most.
    pub context: usize,
    /// Of the cache of every rank.
    pub pages: u32,
    pub precision: Precision,
    /// Of samples of its files.
    pub files: Fingerprint,
}

/// What turns text into tokens and back.
#[derive(Clone)]
pub struct Words {
    pub tokenizer: Tokenizer,
    /// None: the model has none, and answers no chats.
    pub template: Option<std::sync::Arc<ChatTemplate>>,
}

impl Model {
    /// The error is for people: what is wrong, and what to do.
    pub fn open(serve: &Serve) -> Result<Self, String> {
        let (weights, config) = decoder(&serve.model)?;
        let context = match serve.context {
            Some(context) if context as usize > config.context => {
                let trained = config.context;
                return Err(format!(
                    "context = {context}: the model was trained for {trained} tokens, use at most that"
                ));
            }
            Some(context) => context as usize,
            None => config.context.min(split::room(&config, serve)?).max(2),
        };
        let pages = split::pages(&config, serve, context)?;
        let files = fingerprint(&weights);
        Ok(Self { weights, config, context, pages, precision: precision(serve.precision), files })
    }

    /// For the head.
    pub fn words(&self) -> Result<Words, String> {
        let tokenizer = Tokenizer::open(&self.weights).map_err(|error| text_of(&error))?;
        let (ids, rows) = (tokenizer.vocabulary(), self.config.vocab);
        if ids > rows {
            let path = self.weights.path().display();
            return Err(format!(
                "the tokenizer of {path} has {ids} tokens, its weights know {rows}: take both of the same model"
            ));
        }
        let template = ChatTemplate::open(&self.weights);
        let template = template.inspect_err(|error| tracing::warn!(error = text_of(error), "no chats are answered"));
        Ok(Words { tokenizer, template: template.ok().map(std::sync::Arc::new) })
    }
}

/// Of the names and shapes of all tensors, and of a page of each so many bytes of them: another model, or another version of it, shows, and little is read.
fn fingerprint(weights: &Weights) -> Fingerprint {
    let mut hasher = blake3::Hasher::new();
    let mut names: Vec<&str> = weights.names().collect();
    names.sort_unstable();
    for name in names {
        let Ok(tensor) = weights.tensor(name) else { continue };
        hasher.update(format!("{name} {:?} {:?}", tensor.kind, tensor.shape).as_bytes());
        for sample in tensor.bytes.chunks(SAMPLE_EVERY) {
            hasher.update(&sample[..sample.len().min(SAMPLE_BYTES)]);
        }
    }
    let mut first = [0; 8];
    hasher.finalize_xof().fill(&mut first);
    Fingerprint(u64::from_le_bytes(first))
}

/// What a spec names, and the shape of it.
pub fn decoder(model: &str) -> Result<(Weights, DecoderConfig), String> {
    let words = |error: ModelError| text_of(&error);
    let weights = Weights::open(&folder(model)?).map_err(words)?;
    let config = weights.config().map_err(|error| match Encoder::open(&weights) {
        Ok(_) => format!("{}: it is an embedding model: serve it with task = \"embed\"", weights.path().display()),
        Err(_) => words(error),
    })?;
    Ok((weights, config))
}

pub fn precision(said: spec::Precision) -> Precision {
    match said {
        spec::Precision::Rounded => Precision::Rounded,
        spec::Precision::Full => Precision::Full,
    }
}

/// An absolute path, or a folder of this machine's models.
pub fn folder(model: &str) -> Result<PathBuf, String> {
    if Path::new(model).is_absolute() {
        return Ok(model.into());
    }
    let own = std::env::var_os(MODELS).filter(|set| !set.is_empty()).map(PathBuf::from);
    let cache = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/stoke/models"));
    let models = own.or_else(cache).ok_or_else(|| format!("neither {MODELS} nor HOME is set, to find {model} in"))?;
    let folder = models.join(model);
    match folder.is_dir() {
        true => Ok(folder),
        false => Err(format!(
            "model = {model:?}: there is no folder {} on this machine; fetch it there, or write an absolute path",
            folder.display()
        )),
    }
}
