//! `stoke scale`: more or fewer ranks for a job, while it runs.

use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::{Reply, Request};

use super::connect;
use crate::Global;
use crate::client::{Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::output;

const EXAMPLES: &str = "\
Examples:
  stoke scale job-3 --ranks 4
  stoke explain job-3          # when ranks joined and left";

/// Give a job more or fewer ranks while it runs; the result stays the same to the last bit
///
/// Ranks that are too many leave between two steps. Those that are missing are placed when there is room, receive the state from the others
/// while these train, and join between two steps.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The job, e.g. job-3
    job: JobId,
    /// How many ranks it is to have: at most one a lane
    #[arg(long)]
    ranks: u32,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let request = Request::Scale { job: args.job, ranks: args.ranks };
    let Reply::Scaled { job, ranks } = client.ask(&request, Repeat::Safe).await? else { return Err(unexpected()) };
    if global.json {
        output::print_json(&serde_json::json!({ "job": job.to_string(), "ranks": ranks }))?;
    } else {
        output::print(&format!(
            "{job} is to have {}; `stoke explain {job}` tells when\n",
            output::count(ranks, "rank")
        ))?;
    }
    Ok(Exit::Ok)
}
