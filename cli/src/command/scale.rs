//! `stoke scale`: more or fewer ranks for a job that trains, more or fewer replicas for a model that is served, while they run.

use stoke_protocol::message::client::{Reply, Request};

use super::{connect, revision};
use crate::Global;
use crate::client::{Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::named::{self, Among};
use crate::output;

const EXAMPLES: &str = "\
Examples:
  stoke scale job-3 --ranks 4
  stoke explain job-3          # when ranks joined and left
  stoke scale smollm2-135m-instruct --replicas 3";

/// Give a job that trains more or fewer ranks, or a model that is served more or fewer replicas, while they run
///
/// Ranks: the result stays the same to the last bit. Those that are too many leave between two steps. Those that are missing are placed when there
/// is room, receive the state from the others while these train, and join between two steps.
///
/// Replicas: those that are missing are copies of the model's newest job. Of those that are too many the newest leave: they take no new requests, and
/// are cancelled when their answers are over. Jobs with a share or a shadow are not counted. A model whose spec has [serve.replicas] scales itself, and
/// is not scaled by this.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES, group = clap::ArgGroup::new("how many").required(true))]
pub struct Args {
    /// The job, e.g. job-3, or its name; with --replicas the model, as clients name it, or a job that serves it
    #[arg(value_name = "JOB|MODEL")]
    target: String,

    /// How many ranks the job is to have: at most one a lane
    #[arg(long, value_name = "N", group = "how many")]
    ranks: Option<u32>,

    /// How many jobs are to serve the model
    #[arg(long, value_name = "N", group = "how many")]
    replicas: Option<u32>,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    if let Some(replicas) = args.replicas {
        let model = named::model(&mut client, &args.target).await?;
        return revision::change(&mut client, Request::Replicas { model, replicas }, global).await;
    }
    let job = named::job(&mut client, &args.target, Among::Living).await.map_err(|failure| match failure.exit {
        Exit::Usage => {
            failure.help("`stoke scale MODEL --replicas N` is for models; --ranks is for one job that trains")
        }
        _ => failure,
    })?;
    let ranks = args.ranks.unwrap_or(1);
    let request = Request::Scale { job, ranks };
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
