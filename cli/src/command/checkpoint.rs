//! `stoke checkpoint`: which there are, and whether their bytes are still what was written.

use clap::Subcommand;
use stoke_node::checkpoint;
use stoke_protocol::ids::{Digest, JobId};
use stoke_protocol::list::List as Frames;
use stoke_protocol::message::client::{CheckpointView, Reply, Request};

use super::connect;
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

#[derive(Subcommand, Debug)]
pub enum Checkpoint {
    List(List),
    Verify(Verify),
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
    /// A checkpoint's folder or file:// URI, or a job (its newest checkpoint)
    #[arg(value_name = "CHECKPOINT|JOB")]
    what: String,
}

pub async fn run(command: Checkpoint, global: &Global) -> Result<Exit, Failure> {
    match command {
        Checkpoint::List(args) => list(args, global).await,
        Checkpoint::Verify(args) => verify(args, global).await,
    }
}

async fn list(args: List, global: &Global) -> Result<Exit, Failure> {
    let checkpoints = committed(args.job, global).await?;
    if global.json {
        let checkpoints: Vec<_> = checkpoints.iter().map(json::checkpoint).collect();
        output::print_json(&serde_json::json!({ "checkpoints": checkpoints }))?;
        return Ok(Exit::Ok);
    }
    let mut table = output::Table::new(&["JOB", "STEP", "GENERATION", "SHARDS", "SIZE", "AGE", "URI"]);
    for checkpoint in checkpoints.iter() {
        table.row([
            checkpoint.job.to_string(),
            checkpoint.step.0.to_string(),
            checkpoint.generation.0.to_string(),
            checkpoint.shards.to_string(),
            output::bytes(checkpoint.bytes),
            output::age(checkpoint.committed_ms),
            checkpoint.uri.clone(),
        ]);
    }
    output::print(&table.render())?;
    Ok(Exit::Ok)
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

/// Where a checkpoint is, and which one it must be where the catalogue knows.
pub struct Located {
    pub uri: String,
    pub manifest_blake3: Option<Digest>,
}

/// A checkpoint from what a person typed: a job stands for its newest one.
pub async fn locate(what: &str, global: &Global) -> Result<Located, Failure> {
    let job: Option<JobId> = what.parse().ok().filter(|_| !std::path::Path::new(what).exists());
    let Some(job) = job else { return Ok(Located { uri: checkpoint_uri(what)?, manifest_blake3: None }) };
    let checkpoints = committed(Some(job), global).await?;
    let newest = checkpoints.iter().max_by_key(|checkpoint| (checkpoint.step, checkpoint.generation));
    let found = |checkpoint: &CheckpointView| Located {
        uri: checkpoint.uri.clone(),
        manifest_blake3: Some(checkpoint.manifest_blake3),
    };
    newest.map(found).ok_or_else(|| {
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
