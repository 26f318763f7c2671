//! `stoke nodes`: all machines, and what they have and hold.

use stoke_protocol::message::client::{NodeState, NodeView, Reply, Request};

use super::connect;
use crate::Global;
use crate::client::{Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::{json, output};

const EXAMPLES: &str = "\
Examples:
  stoke nodes
  stoke nodes --json | jq '[.nodes[] | select(.state == \"up\")] | length'";

/// List nodes: capacity, use, ranks
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {}

pub async fn run(_args: Args, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let Reply::Nodes(nodes) = client.ask(&Request::Nodes, Repeat::Safe).await? else { return Err(unexpected()) };
    if global.json {
        let nodes: Vec<_> = nodes.iter().map(json::node).collect();
        output::print_json(&serde_json::json!({ "nodes": nodes }))?;
        return Ok(Exit::Ok);
    }
    let mut table = output::Table::new(&[
        "NODE", "NAME", "STATE", "ADDRESS", "CPUS", "MEMORY", "GPUS", "LOAD", "RANKS", "GATEWAY", "LABELS",
    ]);
    for node in nodes.iter() {
        table.row(row(node));
    }
    output::print(&table.render())?;
    // Columns are for all nodes; reasons are for the few that do not serve.
    for node in nodes.iter().filter(|node| !node.reason.is_empty()) {
        output::print(&format!("{}: {}\n", node.node, node.reason))?;
    }
    Ok(Exit::Ok)
}

fn row(node: &NodeView) -> [String; 11] {
    let state = match node.state {
        state @ (NodeState::Up | NodeState::Draining | NodeState::Drained | NodeState::Quarantined) => {
            json::node_state(state).to_owned()
        }
        state @ (NodeState::Silent | NodeState::Lost) => {
            format!("{} {}", json::node_state(state), output::duration_ms(node.silent_ms))
        }
    };
    let ranks: Vec<String> = node.ranks.iter().map(|(job, rank)| format!("{job}/{}", rank.0)).collect();
    let labels: Vec<String> = node.capacity.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    [
        node.node.to_string(),
        node.name.clone(),
        state,
        node.address.clone(),
        format!("{}/{}", node.cpus_used, node.capacity.cpus),
        format!("{} of {}", output::bytes(node.memory_reserved_bytes), output::bytes(node.capacity.memory_bytes)),
        format!("{}/{}", node.gpus_used, node.capacity.gpus.len()),
        format!("{:.0}%", node.cpu_load * 100.0),
        if ranks.is_empty() { "-".into() } else { ranks.join(" ") },
        node.gateway.clone().unwrap_or_else(|| "-".into()),
        labels.join(" "),
    ]
}
