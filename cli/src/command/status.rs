//! `stoke status`: the cluster at a glance, or one job.

use stoke_protocol::message::client::{JobView, Reply, Request};

use super::connect;
use crate::Global;
use crate::client::{Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::{json, named, output, report, served};

const EXAMPLES: &str = "\
Examples:
  stoke status
  stoke status --json | jq .nodes_up
  stoke status job-3           # of one that serves: replicas, requests, tokens a second
  stoke status smollm2-135m-instruct     # of all jobs that serve it
  stoke status job-3 --json | jq .serves.load";

/// Show the cluster: coordinator, nodes, jobs, and who you are to it; or how one job stands
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A job, e.g. job-3; or the model that jobs serve, or a job's name
    #[arg(value_name = "JOB|MODEL")]
    job: Option<String>,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    if let Some(job) = args.job {
        let views = named::jobs(&mut client, &job).await?;
        match (global.json, &views[..]) {
            (true, [view]) => output::print_json(&json::job(view))?,
            (true, views) => {
                output::print_json(&serde_json::json!({ "jobs": views.iter().map(json::job).collect::<Vec<_>>() }))?;
            }
            (false, views) => output::print(&views.iter().map(job_lines).collect::<Vec<_>>().join("\n"))?,
        }
        return Ok(Exit::Ok);
    }
    let Reply::Cluster(view) = client.ask(&Request::Cluster, Repeat::Safe).await? else { return Err(unexpected()) };
    if global.json {
        output::print_json(&json::cluster(&view))?;
        return Ok(Exit::Ok);
    }
    let mut table = output::Table::bare();
    table.row(["cluster".into(), view.cluster.to_string()]);
    table.row(["coordinator".into(), format!("stoke {}, {}, {}", view.version, view.epoch, view.index)]);
    table.row(["nodes".into(), format!("{} up of {}", view.nodes_up, view.nodes)]);
    table.row(["jobs".into(), format!("{} running, {} queued", view.jobs_running, view.jobs_queued)]);
    if view.ranks_slow > 0 {
        let slow = output::count(view.ranks_slow, "rank");
        table.row(["slow".into(), format!("{slow}, `stoke jobs` says which")]);
    }
    table.row(["you".into(), view.you]);
    output::print(&table.render())?;
    Ok(Exit::Ok)
}

fn job_lines(view: &JobView) -> String {
    match view.serves.is_some() {
        true => {
            let reason = if view.reason.is_empty() { String::new() } else { format!(", {}", view.reason) };
            let head = format!("{} ({}): {}{reason}\n", view.job, view.name, json::job_state(view.state));
            head + &served::lines(view)
        }
        false => report::summary(view),
    }
}
