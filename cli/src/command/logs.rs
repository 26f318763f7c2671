//! `stoke logs`: what ranks print.

use stoke_protocol::ids::{JobId, Rank};
use stoke_protocol::message::client::{Reply, Request};

use super::connect;
use crate::Global;
use crate::client::unexpected;
use crate::failure::{Exit, Failure};
use crate::{json, output};

const EXAMPLES: &str = "\
Examples:
  stoke logs job-3 --tail 50
  stoke logs job-3 -f --rank 1";

/// Show the output of a job's ranks
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The job, e.g. job-3
    job: JobId,

    /// Keep printing what is written later, until the job has ended
    #[arg(short, long)]
    follow: bool,

    /// Only this rank
    #[arg(long, value_name = "R")]
    rank: Option<Rank>,

    /// Only the last lines of what is there
    #[arg(long, value_name = "N")]
    tail: Option<u32>,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let Args { job, follow, rank, tail } = args;
    let mut answers = client.stream(&Request::Logs { job, rank, tail, follow }).await?;
    while let Some(reply) = answers.next().await? {
        let chunk = match reply {
            Reply::Log(chunk) => chunk,
            Reply::Refused(refusal) => return Err(refusal.into()),
            _ => return Err(unexpected()),
        };
        if global.json {
            json::log_lines(&chunk).try_for_each(|line| output::print_json_line(&line))?;
        } else {
            let text: String = chunk.lines.iter().map(|line| format!("[{}] {line}\n", chunk.id.rank)).collect();
            output::print(&text)?;
        }
        if chunk.last {
            break;
        }
    }
    Ok(Exit::Ok)
}
