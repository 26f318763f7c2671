//! `stoke logs`: what ranks print.

use stoke_protocol::ids::{JobId, Rank};
use stoke_protocol::message::client::{Reply, Request};

use super::connect;
use crate::Global;
use crate::client::{Client, Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::named::{self, Among};
use crate::{json, output};

const EXAMPLES: &str = "\
Examples:
  stoke logs job-3 --tail 50
  stoke logs job-3 -f --rank 1
  stoke logs smollm2-135m-instruct -f";

/// Show the output of a job's ranks
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The job, e.g. job-3; or the model that it serves, or its name
    #[arg(value_name = "JOB|MODEL")]
    job: String,

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

/// A job that was never placed has no ranks yet: any may come.
async fn must_be_a_rank(client: &mut Client, job: JobId, rank: Rank) -> Result<(), Failure> {
    let Reply::Job(view) = client.ask(&Request::Job { job }, Repeat::Safe).await? else { return Err(unexpected()) };
    match view.world_sizes.last() {
        Some(world) if rank.0 >= *world => {
            let ranks = output::count(*world, "rank");
            Err(Failure::new(Exit::NotFound, format!("{job} has no {rank}: it has {ranks}, counted from 0")))
        }
        Some(_) | None => Ok(()),
    }
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let Args { job, follow, rank, tail } = args;
    let job = named::job(&mut client, &job, Among::All).await?;
    if let Some(rank) = rank {
        must_be_a_rank(&mut client, job, rank).await?;
    }
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
