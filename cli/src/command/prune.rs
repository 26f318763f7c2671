//! `stoke checkpoint pin`, `unpin` and `prune`: which checkpoints stay. Removes nothing itself: a node that reaches the store does.

use stoke_protocol::ids::{JobId, Step};
use stoke_protocol::message::client::{CheckpointView, Reply, Request};

use super::{checkpoint, connect};
use crate::Global;
use crate::client::{Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::{json, output};

const PIN_EXAMPLES: &str = "\
Examples:
  stoke checkpoint pin job-3 1000
  stoke checkpoint list job-3 --json | jq '.checkpoints[] | select(.pinned)'";
const UNPIN_EXAMPLES: &str = "\
Examples:
  stoke checkpoint unpin job-3 1000";
const PRUNE_EXAMPLES: &str = "\
Examples:
  stoke checkpoint prune job-3 --dry-run
  stoke checkpoint prune job-3 --keep 1
  stoke explain job-3          # which node removed the folders, or why it could not";

/// Keep a checkpoint whatever [checkpoint] keep and prunes say
#[derive(clap::Args, Debug)]
#[command(after_help = PIN_EXAMPLES)]
pub struct Pin {
    /// The job, e.g. job-3
    job: JobId,
    /// The step of a committed checkpoint, as `stoke checkpoint list` shows it
    step: u64,
}

/// Take a pin back: the next commit or prune may remove the checkpoint
#[derive(clap::Args, Debug)]
#[command(after_help = UNPIN_EXAMPLES)]
pub struct Unpin {
    /// The job, e.g. job-3
    job: JobId,
    /// The step of a pinned checkpoint
    step: u64,
}

/// Remove a job's old checkpoints, but for the newest, the pinned, and those that a job continues from
///
/// They are out of sight when this returns. A node that runs, or ran, ranks of the job then removes their folders, manifest first: it has the
/// credentials of the store. What it cannot remove is said by `stoke explain`, and tried again by the next node that connects or the next prune.
#[derive(clap::Args, Debug)]
#[command(after_help = PRUNE_EXAMPLES)]
pub struct Prune {
    /// The job, e.g. job-3
    job: JobId,
    /// How many of the newest stay [default: [checkpoint] keep of its spec]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
    /// Only tell what would go
    #[arg(long)]
    dry_run: bool,
}

pub async fn pin(args: Pin, global: &Global) -> Result<Exit, Failure> {
    ask_pin(Request::Pin { job: args.job, step: Step(args.step) }, global).await
}

pub async fn unpin(args: Unpin, global: &Global) -> Result<Exit, Failure> {
    ask_pin(Request::Unpin { job: args.job, step: Step(args.step) }, global).await
}

async fn ask_pin(request: Request, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let Reply::Pinned(view) = client.ask(&request, Repeat::Safe).await? else { return Err(unexpected()) };
    if global.json {
        output::print_json(&json::checkpoint(&view))?;
    } else {
        let (is, job, step) = (if view.pinned { "pinned" } else { "not pinned" }, view.job, view.step.0);
        output::print(&format!("checkpoint of {job} at step {step} is {is}: {}\n", view.uri))?;
    }
    Ok(Exit::Ok)
}

pub async fn prune(args: Prune, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let request = Request::Prune { job: args.job, keep: args.keep, dry_run: args.dry_run };
    let Reply::Pruned { removed, kept } = client.ask(&request, Repeat::Safe).await? else { return Err(unexpected()) };
    if global.json {
        let views = |views: &[CheckpointView]| views.iter().map(json::checkpoint).collect::<Vec<_>>();
        output::print_json(&serde_json::json!({
            "job": args.job.to_string(), "dry_run": args.dry_run, "removed": views(&removed), "kept": views(&kept),
        }))?;
        return Ok(Exit::Ok);
    }
    let bytes = output::bytes(removed.iter().map(|view| view.bytes).sum());
    let (going, staying) = (output::count(removed.len() as u64, "checkpoint"), kept.len());
    let (goes, job) = (if args.dry_run { "would be removed" } else { "removed" }, args.job);
    output::print(&checkpoint::table(removed.iter()))?;
    output::print(&format!("{going} of {job} {goes}, {bytes}; {staying} stay\n"))?;
    Ok(Exit::Ok)
}
