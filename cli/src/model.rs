//! Where the model of `stoke infer` and `stoke embed` lies: a path, or the name of a folder of this machine's models. Owns the words for one that is not
//! there, or is for another command; reads no weights.

use std::path::{Path, PathBuf};

use stoke_jobs::lm::{ChatTemplate, DecoderConfig, Encoder, Weights};
use stoke_node::model_folder;
use stoke_protocol::ids::JobId;

use crate::failure::{Exit, Failure, OrFail};
use crate::output::quoted;

/// Opens what `--model` says.
pub fn open(named: &Path) -> Result<Weights, Failure> {
    Weights::open(&locate(named)?).or_fail(Exit::Usage, "open the model")
}

/// The shape of a model that makes text.
pub fn decoder(weights: &Weights, named: &Path) -> Result<DecoderConfig, Failure> {
    weights.config().map_err(|error| match Encoder::open(weights) {
        Ok(_) => other(named, "makes vectors of texts, and no text", "embed"),
        Err(_) => Failure::from_error(Exit::Usage, error).context("open the model"),
    })
}

/// A model that makes vectors.
pub fn encoder<'w>(weights: &'w Weights, named: &Path) -> Result<Encoder<'w>, Failure> {
    Encoder::open(weights).map_err(|error| match weights.config() {
        Ok(_) => other(named, "makes text, and no vectors", "infer"),
        Err(_) => Failure::from_error(Exit::Usage, error).context("open the model"),
    })
}

/// Whether it is here, and takes chats.
pub fn chats(named: &Path) -> bool {
    let weights = locate(named).ok().and_then(|path| Weights::open(&path).ok());
    weights.is_some_and(|weights| ChatTemplate::open(&weights).is_ok())
}

fn other(named: &Path, what: &str, command: &str) -> Failure {
    let model = quoted(&named.to_string_lossy());
    Failure::usage(format!("{} {what}", named.display())).help(format!("use `stoke {command} --model {model}`"))
}

/// What is there as it was typed goes first, then the folder of models, as for `model` of a spec.
fn locate(named: &Path) -> Result<PathBuf, Failure> {
    let name = named.to_string_lossy();
    if named.exists() || name.is_empty() || name.contains('/') {
        return Ok(named.to_owned());
    }
    if let Ok(folder) = model_folder(&name) {
        return Ok(folder);
    }
    if name.starts_with("job-") && name.parse::<JobId>().is_ok() {
        return Err(Failure::usage(format!("{name} is a job of the cluster, and this computes on this machine alone"))
            .help("ask a job through a gateway (`stoke nodes --json` has their addresses), or give --model the files that it serves"));
    }
    let models = model_folder(".").map(|folder| folder.components().collect::<PathBuf>());
    let failure = Failure::new(
        Exit::NotFound,
        match &models {
            Ok(models) => {
                format!("there is no file or folder {name} here, and no model {name} in {}", models.display())
            }
            Err(_) => format!("there is no file or folder {name} here, and no folder of models"),
        },
    );
    let there = models.map(|models| names(&models)).unwrap_or_default();
    Err(match there.is_empty() {
        true => failure.help("`python3 jobs/models/fetch.py` fetches two models; or give the path of one"),
        false => failure.help(format!("there is {}; or give the path of one", there.join(", "))),
    })
}

fn names(models: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(models).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
