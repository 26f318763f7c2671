//! `stoke explain`: why a job waits, and what has happened to it.

use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::{Explanation, Reply, Request};

use super::connect;
use crate::Global;
use crate::client::{Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::{json, output, served};

const EXAMPLES: &str = "\
Examples:
  stoke explain job-3
  stoke explain job-3 --json | jq '.nodes[].reason'";

/// Tell why a job waits or ended, node by node, with its timeline
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The job, e.g. job-3
    job: JobId,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let reply = client.ask(&Request::Explain { job: args.job }, Repeat::Safe).await?;
    let Reply::Explained(explanation) = reply else { return Err(unexpected()) };
    if global.json {
        output::print_json(&json::explanation(&explanation))?;
    } else {
        output::print(&render(&explanation))?;
    }
    Ok(Exit::Ok)
}

pub fn render(explanation: &Explanation) -> String {
    let job = &explanation.job;
    let mut text = format!("{} ({}): {}", job.job, job.name, json::job_state(job.state));
    if job.reason.is_empty() {
        text.push('\n');
    } else {
        text.push_str(&format!(", {}\n", job.reason));
    }
    text.push_str(&served::lines(job));
    if !explanation.nodes.is_empty() {
        text.push_str("\nnodes\n");
        let mut table = output::Table::bare();
        for (node, reason) in explanation.nodes.iter() {
            table.row([format!("  {node}"), reason.clone()]);
        }
        text.push_str(&table.render());
    }
    text.push_str("\ntimeline\n");
    let mut table = output::Table::bare();
    for event in explanation.events.iter() {
        table.row([format!("  {}", output::moment(event.at_ms)), event.index.to_string(), event.text.clone()]);
    }
    text.push_str(&table.render());
    text
}
