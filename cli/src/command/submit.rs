//! `stoke submit`: hand a job to the cluster.

use std::time::Instant;

use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::{JobState, Reply, Request};
use stoke_protocol::spec::JobSpec;

use super::{checkpoint, connect, stop_signal};
use crate::Global;
use crate::client::{Client, PATIENCE_WATCHING, Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::progress::Progress;
use crate::spec::{self, SpecArgs};
use crate::{artifact, output, report};

const EXAMPLES: &str = "\
Examples:
  stoke submit jobs/specs/domains.toml
  stoke submit jobs/specs/digits.toml --ranks 4 --set train.epochs=2 --wait
  stoke submit nightly.toml --key nightly-2026-11-22     the same key again gives the same job";

/// Submit a job
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    spec: SpecArgs,

    /// Idempotency key: the same key with the same spec is the same job [default: a fresh one]
    #[arg(long, value_name = "KEY")]
    key: Option<String>,

    /// Show progress until the job has ended; exit code 1 unless it succeeded
    #[arg(long)]
    wait: bool,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let began = Instant::now();
    let mut spec_args = args.spec;
    spec_args.resume = checkpoint::locate_resume(spec_args.resume, global).await?;
    let mut job_spec = spec::prepare(&spec_args)?;
    let folder = artifact::take(&mut job_spec)?;
    let mut client = connect(global).await?;
    if let Some(folder) = &folder {
        artifact::send(&mut client, folder).await?;
    }
    let key = args.key.unwrap_or_else(fresh_key);
    let (job, created) = submit(&mut client, &key, &job_spec).await?;
    if !args.wait {
        if global.json {
            output::print_json(&serde_json::json!({ "job": job.to_string(), "created": created, "key": key }))?;
        } else if created {
            output::print(&format!("{job}\n"))?;
        } else {
            output::print(&format!("{job}\n"))?;
            output::say("this key was submitted before: nothing new was started");
        }
        return Ok(Exit::Ok);
    }
    let mut client = client.with_patience(PATIENCE_WATCHING);
    let interrupted = stop_signal()?;
    let mut progress = Progress::new();
    let request = Request::Watch { job };
    let view = tokio::select! {
        view = client.watch(&request, |sight| progress.show(sight)) => view?,
        () = interrupted => {
            return Err(Failure::new(Exit::Interrupted, format!("interrupted; {job} goes on"))
                .help(format!("watch it with `stoke logs {job} -f`, end it with `stoke cancel {job}`")));
        }
    };
    drop(progress);
    if global.json {
        output::print_json(&report::document(&view, began.elapsed()))?;
    } else {
        output::print(&report::summary(&view))?;
    }
    Ok(if view.state == JobState::Succeeded { Exit::Ok } else { Exit::Negative })
}

/// Unknown outcomes are asked again with the same key (I9).
pub async fn submit(client: &mut Client, key: &str, spec: &JobSpec) -> Result<(JobId, bool), Failure> {
    let request = Request::Submit { key: key.to_owned(), spec: spec.to_toml() };
    match client.ask(&request, Repeat::Safe).await? {
        Reply::Submitted { job, created } => Ok((job, created)),
        _ => Err(unexpected()),
    }
}

pub fn fresh_key() -> String {
    format!("cli-{:032x}", rand::random::<u128>())
}
