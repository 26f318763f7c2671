//! `stoke drain`: a machine is emptied without its jobs noticing, so that it can be stopped, and serves again.

use std::time::Duration;

use stoke_protocol::ids::NodeId;
use stoke_protocol::message::client::{NodeState, NodeView, Reply, Request};

use super::{connect, stop_signal, token};
use crate::Global;
use crate::client::{Client, Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::{json, output};

/// How often the node is looked at while its ranks move.
const LOOK_EVERY: Duration = Duration::from_millis(200);

const EXAMPLES: &str = "\
Examples:
  stoke drain node-2                    # until it is empty; then its agent can be stopped
  stoke drain node-2 --deadline 5m      # what is left then is stopped; jobs go on as after a loss
  stoke drain node-2 --undo             # it serves again";

/// Empty a node: it gets no new ranks, and those that it has move to other nodes
///
/// A rank's successor is placed elsewhere. Of a job that trains it receives the state while the others step, and takes over between two steps: no step is
/// lost or done again. Of a model that is served it loads its layers, and answers go on with the same tokens after a pause. Where there is no room
/// elsewhere a job that trains goes on with fewer ranks, down to its ranks_min; then, and for a model, the drain waits and says for what.
/// Ends with 0 when the node is empty, with 1 when the deadline came first. Interrupted, the drain itself goes on.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The node: its id (node-2), or its name where no other has it
    node: String,

    /// Stop what is left after so long: 30s, 15m, 1h, 2d
    #[arg(long, value_parser = token::seconds, value_name = "TIME")]
    deadline: Option<u64>,

    /// Let the node serve again
    #[arg(long, conflicts_with = "deadline")]
    undo: bool,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let node = find(&mut client, &args.node).await?;
    if args.undo {
        let view = ask(&mut client, &Request::Undrain { node }).await?;
        return undone(&view, global);
    }
    let stop = stop_signal()?;
    let deadline_ms = args.deadline.map(|seconds| seconds * 1_000);
    let request = Request::Drain { node, deadline_ms };
    tokio::select! {
        drained = wait(&mut client, request) => report(&drained?, global),
        () = stop => Err(Failure::new(Exit::Interrupted, format!("{node} may not be empty yet; the drain goes on"))
            .help(format!("`stoke nodes` shows how far it is, `stoke drain {node} --undo` takes it back"))),
    }
}

/// The node that people mean: by its id, or by its name.
pub async fn find(client: &mut Client, text: &str) -> Result<NodeId, Failure> {
    if let Ok(node) = text.parse() {
        return Ok(node);
    }
    let Reply::Nodes(nodes) = client.ask(&Request::Nodes, Repeat::Safe).await? else { return Err(unexpected()) };
    let named: Vec<NodeId> = nodes.iter().filter(|node| node.name == text).map(|node| node.node).collect();
    match named[..] {
        [node] => Ok(node),
        [] => {
            Err(Failure::new(Exit::NotFound, format!("there is no node {text:?}"))
                .help("`stoke nodes` lists the nodes"))
        }
        _ => {
            let ids: Vec<String> = named.iter().map(NodeId::to_string).collect();
            Err(Failure::usage(format!("{} are all named {text:?}: give the id", ids.join(", "))))
        }
    }
}

pub async fn ask(client: &mut Client, request: &Request) -> Result<NodeView, Failure> {
    match client.ask(request, Repeat::Safe).await? {
        Reply::Node(view) => Ok(*view),
        _ => Err(unexpected()),
    }
}

/// Until the node is empty. What it waits for is said when it changes.
async fn wait(client: &mut Client, request: Request) -> Result<NodeView, Failure> {
    let mut view = ask(client, &request).await?;
    let (node, mut said) = (view.node, String::new());
    loop {
        let drained = view.state == NodeState::Drained || view.state == NodeState::Lost;
        if drained || view.drain.is_none() {
            return Ok(view);
        }
        if view.reason != said {
            output::say(format!("{node}: {}", view.reason));
            said.clone_from(&view.reason);
        }
        tokio::time::sleep(LOOK_EVERY).await;
        let Reply::Nodes(nodes) = client.ask(&Request::Nodes, Repeat::Safe).await? else { return Err(unexpected()) };
        let found = nodes.iter().find(|view| view.node == node).cloned();
        view = found.ok_or_else(|| Failure::new(Exit::NotFound, format!("{node} was removed meanwhile")))?;
    }
}

fn report(view: &NodeView, global: &Global) -> Result<Exit, Failure> {
    let node = view.node;
    let Some(drain) = &view.drain else {
        return Err(Failure::new(Exit::Conflict, format!("somebody has lifted the drain of {node} meanwhile")));
    };
    if global.json {
        output::print_json(&json::node(view))?;
    } else if drain.overdue {
        output::print(&format!("{node} is empty; the deadline came first, and ranks were stopped\n"))?;
    } else {
        output::print(&format!("{node} is drained: its agent can be stopped\n"))?;
    }
    Ok(if drain.overdue { Exit::Negative } else { Exit::Ok })
}

fn undone(view: &NodeView, global: &Global) -> Result<Exit, Failure> {
    if global.json {
        output::print_json(&json::node(view))?;
    } else {
        output::print(&format!("{} serves again\n", view.node))?;
    }
    Ok(Exit::Ok)
}
