//! `stoke status`: the cluster at a glance.

use stoke_protocol::message::client::{Reply, Request};

use super::connect;
use crate::Global;
use crate::client::{Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::{json, output};

const EXAMPLES: &str = "\
Examples:
  stoke status
  stoke status --json | jq .nodes_up";

/// Show the cluster: coordinator, nodes, jobs, and who you are to it
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {}

pub async fn run(_args: Args, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
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
