//! `stoke cancel`: end jobs.

use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::{Reply, Request};

use super::connect;
use crate::Global;
use crate::client::{Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::named::{self, Among};
use crate::output;

const EXAMPLES: &str = "\
Examples:
  stoke cancel job-3
  stoke cancel smollm2-135m-instruct     # the job that serves it, if it is one
  stoke cancel job-4 job-5";

/// Cancel jobs: no rank of them starts any more, running ones are stopped; their checkpoints stay
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Jobs, e.g. job-3; or the model that one serves, or its name
    #[arg(value_name = "JOB|MODEL", required = true)]
    jobs: Vec<String>,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    // Nothing is cancelled where one of the names is wrong.
    let mut jobs: Vec<JobId> = Vec::with_capacity(args.jobs.len());
    for text in &args.jobs {
        let job = named::job(&mut client, text, Among::Living).await?;
        if !jobs.contains(&job) {
            jobs.push(job);
        }
    }
    for job in &jobs {
        let reply = client.ask(&Request::Cancel { job: *job }, Repeat::Safe).await?;
        let Reply::Cancelled { job } = reply else { return Err(unexpected()) };
        if !global.json {
            output::print(&format!("{job} is cancelled\n"))?;
        }
    }
    if global.json {
        let names: Vec<String> = jobs.iter().map(JobId::to_string).collect();
        output::print_json(&match &names[..] {
            [job] => serde_json::json!({ "job": job, "cancelled": true }),
            jobs => serde_json::json!({ "jobs": jobs, "cancelled": true }),
        })?;
    }
    Ok(Exit::Ok)
}
