//! `stoke cancel`: end a job.

use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::{Reply, Request};

use super::connect;
use crate::Global;
use crate::client::{Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::output;

const EXAMPLES: &str = "\
Example:
  stoke cancel job-3";

/// Cancel a job: no rank of it starts any more, running ones are stopped; its checkpoints stay
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The job, e.g. job-3
    job: JobId,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let reply = client.ask(&Request::Cancel { job: args.job }, Repeat::Safe).await?;
    let Reply::Cancelled { job } = reply else { return Err(unexpected()) };
    if global.json {
        output::print_json(&serde_json::json!({ "job": job.to_string(), "cancelled": true }))?;
    } else {
        output::print(&format!("{job} is cancelled\n"))?;
    }
    Ok(Exit::Ok)
}
