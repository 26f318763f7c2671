//! `stoke explain`: why a job waits, and what has happened to it; of a model that is to be served, how it would be cut over the nodes.

use std::path::{Path, PathBuf};

use stoke_protocol::ids::{JobId, NodeId};
use stoke_protocol::message::client::{Explanation, Reply, Request};
use stoke_protocol::message::split::{Planned, Split};
use stoke_protocol::spec::Bytes;

use super::connect;
use crate::Global;
use crate::client::{Client, PATIENCE_WATCHING, Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::named::{self, Among};
use crate::spec::{self, SpecArgs};
use crate::{json, output, served};

const EXAMPLES: &str = "\
Examples:
  stoke explain job-3
  stoke explain job-3 --json | jq '.nodes[].reason'
  stoke explain smollm2-135m-instruct             the job that serves it
  stoke explain jobs/specs/serve-smollm2.toml     how its model would be cut; nothing is started
  stoke explain SPEC --set serve.tensor=2         the same with one more thing said

Ends with 1 where no node has the model, or it fits nowhere even if nothing else ran.";

/// Tell why a job waits or ended, node by node, with its timeline; or how a model would be cut over nodes
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The job, e.g. job-3, or the model that it serves; or the spec (TOML) of a model that is to be served
    #[arg(value_name = "JOB|MODEL|SPEC")]
    what: String,

    /// Change a key of the spec, e.g. `--set serve.stages=2`; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    match args.what.parse::<JobId>() {
        Ok(_) if !args.sets.is_empty() => Err(Failure::usage("--set is for a SPEC: a job's does not change")),
        Ok(job) => explain_job(&mut connect(global).await?, job, global).await,
        Err(_) if args.sets.is_empty() && !is_path(&args.what) => {
            let mut client = connect(global).await?;
            let job = named::job(&mut client, &args.what, Among::All).await?;
            explain_job(&mut client, job, global).await
        }
        Err(_) => plan(args, global).await,
    }
}

/// Whether it names a file, rather than a model or a job.
fn is_path(what: &str) -> bool {
    what == "-" || what.contains('/') || what.ends_with(".toml") || Path::new(what).exists()
}

async fn explain_job(client: &mut Client, job: JobId, global: &Global) -> Result<Exit, Failure> {
    let reply = client.ask(&Request::Explain { job }, Repeat::Safe).await?;
    let Reply::Explained(explanation) = reply else { return Err(unexpected()) };
    if global.json {
        output::print_json(&json::explanation(&explanation))?;
    } else {
        output::print(&render(&explanation))?;
    }
    Ok(Exit::Ok)
}

async fn plan(Args { what, sets }: Args, global: &Global) -> Result<Exit, Failure> {
    let prepared = spec::prepare(&SpecArgs { spec: PathBuf::from(&what), ranks: None, sets, resume: None });
    let spec = prepared.map_err(|failure| match what == "-" || Path::new(&what).exists() {
        true => failure,
        false => failure.help("name a job or a model (`stoke jobs` lists them), or the file of a spec"),
    })?;
    let mut client = connect(global).await?.with_patience(PATIENCE_WATCHING);
    let reply = client.ask(&Request::Plan { spec: spec.to_toml() }, Repeat::Safe).await?;
    let Reply::Planned(planned) = reply else { return Err(unexpected()) };
    if global.json {
        output::print_json(&json::planned(&planned))?;
    } else {
        output::print(&render_plan(&planned))?;
    }
    Ok(if planned.split.is_some() { Exit::Ok } else { Exit::Negative })
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
    if let Some(split) = &explanation.split {
        let on = |rank: usize| job.placement.iter().find(|(id, _)| id.0 as usize == rank).map(|(_, node)| *node);
        text.push('\n');
        text.push_str(&render_split(split, on));
    }
    text.push_str(&render_nodes(&explanation.nodes));
    text.push_str("\ntimeline\n");
    let mut table = output::Table::bare();
    for event in explanation.events.iter() {
        table.row([format!("  {}", output::moment(event.at_ms)), event.index.to_string(), event.text.clone()]);
    }
    text.push_str(&table.render());
    text
}

fn render_plan(planned: &Planned) -> String {
    let mut text = match &planned.split {
        Some(split) => {
            let waits = match planned.reason.as_str() {
                "" => String::new(),
                reason => format!("it would wait for room: {reason}\n"),
            };
            format!("{}: {}{waits}", planned.model, render_split(split, |_| None))
        }
        None => format!("{}: cannot be served now: {}\n", planned.model, planned.reason),
    };
    text.push_str(&render_nodes(&planned.nodes));
    text
}

fn render_nodes(nodes: &[(NodeId, String)]) -> String {
    if nodes.is_empty() {
        return String::new();
    }
    let mut table = output::Table::bare();
    for (node, reason) in nodes {
        table.row([format!("  {node}"), reason.clone()]);
    }
    format!("\nnodes\n{}", table.render())
}

/// `on`: where a rank is, if it has been placed.
fn render_split(split: &Split, on: impl Fn(usize) -> Option<NodeId>) -> String {
    let Split { stages, tensor, why, token_ns, stage_ns, ranks } = split;
    let (token, stage) = (milliseconds(*token_ns), milliseconds(*stage_ns));
    let mut text = format!(
        "{stages} x {tensor} ranks (stages x parts): {why}\na token of one answer takes about {token}, the slowest stage {stage}\n\n"
    );
    let mut table =
        output::Table::new(&["rank", "stage", "part", "layers", "memory", "node", "a layer there", "round trip"]);
    for (rank, place) in ranks.iter().enumerate() {
        let (from, to) = place.layers;
        let node = on(rank).unwrap_or(place.node);
        // Of the node that it was meant for.
        let measured = |words: String| if node == place.node { words } else { "-".to_owned() };
        table.row([
            rank.to_string(),
            place.stage.to_string(),
            place.part.to_string(),
            format!("{from}-{}", to.saturating_sub(1)),
            Bytes(place.memory_bytes).to_string(),
            node.to_string(),
            measured(milliseconds(place.layer_ns)),
            measured(format!("{:.2} ms", f64::from(place.rtt_us) / 1e3)),
        ]);
    }
    text.push_str(&table.render());
    text
}

fn milliseconds(ns: u64) -> String {
    format!("{:.3} ms", ns as f64 / 1e6)
}
