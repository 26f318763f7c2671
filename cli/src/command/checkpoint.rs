//! `stoke checkpoint`: which there are, and whether their bytes are still what was written. What stays and what goes is asked in `prune.rs`.

use std::path::PathBuf;

use clap::Subcommand;
use stoke_node::checkpoint;
use stoke_protocol::ids::{Digest, JobId, Step};
use stoke_protocol::list::List as Frames;
use stoke_protocol::message::client::{CheckpointView, Reply, Request};

use super::{connect, prune};
use crate::Global;
use crate::client::{Repeat, unexpected};
use crate::failure::{Exit, Failure, OrFail};
use crate::spec::checkpoint_uri;
use crate::{json, output};

const LIST_EXAMPLES: &str = "\
Examples:
  stoke checkpoint list
  stoke checkpoint list job-3 --json | jq -r '.checkpoints[-1].uri'";
const VERIFY_EXAMPLES: &str = "\
Examples:
  stoke checkpoint verify job-3
  stoke checkpoint verify stoke-runs/domains/20261122-170405/JOB/step-00000120-g1";

const EXPORT_EXAMPLES: &str = "\
Examples:
  stoke checkpoint export job-3 --out model.safetensors
  stoke checkpoint export job-3 400 --out model.safetensors --json
  python3 -c 'from safetensors.torch import load_file; print(load_file(\"model.safetensors\"))'";

#[derive(Subcommand, Debug)]
pub enum Checkpoint {
    List(List),
    Verify(Verify),
    Export(Export),
    Pin(prune::Pin),
    Unpin(prune::Unpin),
    Prune(prune::Prune),
}

/// List committed checkpoints, oldest first
#[derive(clap::Args, Debug)]
#[command(after_help = LIST_EXAMPLES)]
pub struct List {
    /// Only this job's
    job: Option<JobId>,
}

/// Read every byte of a checkpoint and compare it with its manifest; names the damaged shard, exit code 1
#[derive(clap::Args, Debug)]
#[command(after_help = VERIFY_EXAMPLES)]
pub struct Verify {
    /// A checkpoint's folder or URI (file://, s3://, az://), or a job (its newest checkpoint)
    #[arg(value_name = "CHECKPOINT|JOB")]
    what: String,
}

/// Write the model's weights as one safetensors file for PyTorch, or as a Hugging Face folder; every byte of the checkpoint is verified first
///
/// Names and layouts are those of a plain nn.Module (docs/checkpoints.md). A language model is written as a folder, with its config.json and tokenizer: `stoke
/// serve` and transformers open it. The optimizer's state is left out. What exists is not replaced.
#[derive(clap::Args, Debug)]
#[command(after_help = EXPORT_EXAMPLES)]
pub struct Export {
    /// A job, or a checkpoint's folder or file:// URI
    #[arg(value_name = "JOB|CHECKPOINT")]
    what: String,
    /// The step of one of the job's checkpoints [default: the newest]
    step: Option<u64>,
    /// The file to write, or the folder of a language model
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
}

pub async fn run(command: Checkpoint, global: &Global) -> Result<Exit, Failure> {
    match command {
        Checkpoint::List(args) => list(args, global).await,
        Checkpoint::Verify(args) => verify(args, global).await,
        Checkpoint::Export(args) => export(args, global).await,
        Checkpoint::Pin(args) => prune::pin(args, global).await,
        Checkpoint::Unpin(args) => prune::unpin(args, global).await,
        Checkpoint::Prune(args) => prune::prune(args, global).await,
    }
}

async fn list(args: List, global: &Global) -> Result<Exit, Failure> {
    let checkpoints = committed(args.job, global).await?;
    if global.json {
        let checkpoints: Vec<_> = checkpoints.iter().map(json::checkpoint).collect();
        output::print_json(&serde_json::json!({ "checkpoints": checkpoints }))?;
        return Ok(Exit::Ok);
    }
    output::print(&table(checkpoints.iter()))?;
    Ok(Exit::Ok)
}

pub fn table<'a>(checkpoints: impl Iterator<Item = &'a CheckpointView>) -> String {
    let mut table = output::Table::new(&["JOB", "STEP", "GENERATION", "SHARDS", "SIZE", "AGE", "PINNED", "URI"]);
    for checkpoint in checkpoints {
        table.row([
            checkpoint.job.to_string(),
            checkpoint.step.0.to_string(),
            checkpoint.generation.0.to_string(),
            checkpoint.shards.to_string(),
            output::bytes(checkpoint.bytes),
            output::age(checkpoint.committed_ms),
            if checkpoint.pinned { "yes" } else { "no" }.to_owned(),
            checkpoint.uri.clone(),
        ]);
    }
    table.render()
}

async fn verify(args: Verify, global: &Global) -> Result<Exit, Failure> {
    let Located { uri, manifest_blake3 } = locate(&args.what, global).await?;
    let checked = uri.clone();
    let verified = tokio::task::spawn_blocking(move || checkpoint::verify(&checked, manifest_blake3));
    let verified = verified.await.or_fail(Exit::Negative, "verify")?.map_err(|error| failure(error, &uri))?;
    let manifest = &verified.manifest;
    if global.json {
        output::print_json(&serde_json::json!({
            "uri": uri, "ok": true, "job": manifest.job.to_string(), "name": manifest.name, "step": manifest.step.0,
            "generation": manifest.generation.0, "shards": manifest.shards.len(), "tensors": verified.tensors,
            "bytes": verified.bytes, "weights_blake3": manifest.weights_blake3.to_string(),
        }))?;
    } else {
        let count = |number: usize, noun: &str| output::count(number as u64, noun);
        let (shards, tensors) = (count(manifest.shards.len(), "shard"), count(verified.tensors, "tensor"));
        let (name, step, size) = (&manifest.name, manifest.step.0, output::bytes(verified.bytes));
        output::print(&format!("{uri} is whole: {name} at step {step}, {shards}, {tensors}, {size}\n"))?;
    }
    Ok(Exit::Ok)
}

async fn export(args: Export, global: &Global) -> Result<Exit, Failure> {
    let Export { what, step, out } = args;
    let found = match step {
        None => locate(&what, global).await?,
        Some(step) => locate_step(&what, Step(step), global).await?,
    };
    let uri = found.uri.clone();
    let work = move || {
        let (manifest, tensors) =
            checkpoint::load(&found.uri, found.manifest_blake3).map_err(|error| failure(error, &found.uri))?;
        let weights = stoke_jobs::pytorch(&manifest.spec, &manifest.trainer, tensors)
            .or_fail(Exit::Negative, format!("lay out the {} model of {}", manifest.trainer, found.uri))?;
        let files = stoke_jobs::export_files(&manifest.spec, &manifest.trainer)
            .or_fail(Exit::Negative, format!("collect the files of the model of {}", found.uri))?;
        let exported = match files.is_empty() {
            true => checkpoint::export(&manifest, &weights, &out),
            false => checkpoint::export_folder(&manifest, &weights, &files, &out),
        };
        let exported = exported.map_err(|error| {
            let (exit, help) = match out.symlink_metadata().is_ok() {
                true => (Exit::Conflict, "it exists: remove it, or write another one with --out"),
                false => (Exit::Negative, "see that the folder of --out exists and can be written"),
            };
            Failure::from_error(exit, error).help(help)
        })?;
        Ok::<_, Failure>((manifest, weights, exported, out))
    };
    let (manifest, weights, exported, out) =
        tokio::task::spawn_blocking(work).await.or_fail(Exit::Negative, "export")??;
    if global.json {
        output::print_json(&serde_json::json!({
            "uri": uri, "out": out.to_string_lossy(), "job": manifest.job.to_string(), "step": manifest.step.0, "trainer": manifest.trainer,
            "bytes": exported.bytes, "blake3": exported.blake3.to_string(),
            "weights_blake3": manifest.weights_blake3.to_string(),
            "tensors": weights.iter().map(|tensor| serde_json::json!({ "name": tensor.name, "shape": tensor.shape })).collect::<Vec<_>>(),
        }))?;
    } else {
        let (step, size) = (manifest.step.0, output::bytes(exported.bytes));
        let tensors = output::count(weights.len() as u64, "tensor");
        output::print(&format!("{} holds {} at step {step}: {tensors}, {size}\n", out.display(), manifest.name))?;
    }
    Ok(Exit::Ok)
}

/// A job's checkpoint of one step.
async fn locate_step(what: &str, step: Step, global: &Global) -> Result<Located, Failure> {
    let job: JobId = what
        .parse()
        .map_err(|_| Failure::usage(format!("a step is of a job, and {what:?} is not the name of one (job-3)")))?;
    let checkpoints = committed(Some(job), global).await?;
    checkpoints.iter().find(|checkpoint| checkpoint.step == step).map(Located::of).ok_or_else(|| {
        let steps: Vec<String> = checkpoints.iter().map(|checkpoint| checkpoint.step.0.to_string()).collect();
        let has = if steps.is_empty() { "no checkpoint".to_owned() } else { format!("those of {}", steps.join(", ")) };
        Failure::new(Exit::NotFound, format!("{job} has no checkpoint of step {}", step.0))
            .help(format!("it has {has} (`stoke checkpoint list {job}`)"))
    })
}

/// Where a checkpoint is, and which one it must be where the catalogue knows.
pub struct Located {
    pub uri: String,
    pub manifest_blake3: Option<Digest>,
}

impl Located {
    fn of(checkpoint: &CheckpointView) -> Self {
        Self { uri: checkpoint.uri.clone(), manifest_blake3: Some(checkpoint.manifest_blake3) }
    }
}

/// A checkpoint from what a person typed: a job stands for its newest one.
pub async fn locate(what: &str, global: &Global) -> Result<Located, Failure> {
    let job: Option<JobId> = what.parse().ok().filter(|_| !std::path::Path::new(what).exists());
    let Some(job) = job else { return Ok(Located { uri: checkpoint_uri(what)?, manifest_blake3: None }) };
    let checkpoints = committed(Some(job), global).await?;
    let newest = checkpoints.iter().max_by_key(|checkpoint| (checkpoint.step, checkpoint.generation));
    newest.map(Located::of).ok_or_else(|| {
        Failure::new(Exit::NotFound, format!("{job} has no committed checkpoint"))
            .help(format!("see how far it came with `stoke explain {job}`"))
    })
}

/// The same for `--resume`, where there is one.
pub async fn locate_resume(resume: Option<String>, global: &Global) -> Result<Option<String>, Failure> {
    match resume {
        Some(what) => locate(&what, global).await.map(|found| Some(found.uri)),
        None => Ok(None),
    }
}

/// A missing checkpoint is not found, a damaged one is a negative answer.
pub fn failure(error: checkpoint::CheckpointError, uri: &str) -> Failure {
    let exit = match &error {
        checkpoint::CheckpointError::Missing { .. } => Exit::NotFound,
        checkpoint::CheckpointError::Uri { .. } => Exit::Usage,
        _ => Exit::Negative,
    };
    Failure::from_error(exit, error).context(format!("read checkpoint {uri}"))
}

async fn committed(job: Option<JobId>, global: &Global) -> Result<Frames<CheckpointView>, Failure> {
    let mut client = connect(global).await?;
    match client.ask(&Request::Checkpoints { job }, Repeat::Safe).await? {
        Reply::Checkpoints(checkpoints) => Ok(checkpoints),
        _ => Err(unexpected()),
    }
}
