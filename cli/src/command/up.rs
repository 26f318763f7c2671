//! `stoke up`: a local cluster that stays.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use super::stop_signal;
use crate::Global;
use crate::detection::Detection;
use crate::failure::{Exit, Failure};
use crate::local::folder::Folder;
use crate::local::gateways::GatewayFiles;
use crate::local::handle::{Life, LocalCluster, Wish};
use crate::local::notice::{Notice, WithoutRanks};
use crate::{output, place};

const EXAMPLES: &str = "\
Examples:
  stoke up --nodes 3
  stoke up --dir /tmp/trial && stoke --cluster /tmp/trial nodes
  stoke up --gateway-tokens tokens     # models ask for a token; `--gateway-tokens none` ends that";

/// Start a cluster on this machine and leave it running; later commands find it
///
/// It is up when the coordinator answers and every agent is connected to it. Nodes that were drained or in quarantine when it was stopped still are:
/// they are named, with the command that lets them serve again.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Agents to start [default: 2, or as many as this cluster had]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    nodes: Option<u32>,

    /// Folder of the cluster [default: as for --cluster]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Address of the coordinator; port 0 takes a free one, and the same one ever after
    #[arg(long, value_name = "ADDR", default_value_t = any_port())]
    listen: SocketAddr,

    /// Address of the Prometheus metrics [default: as the last time, or none]
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,

    /// URL of an OpenTelemetry collector (OTLP over HTTP, such as http://127.0.0.1:4318): a trace of each job goes there [default: as the last time, or none]
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,

    /// HTTPS address of the API, for programs with a user's certificate; port 0 takes a free one, and the same one ever after
    #[arg(long, value_name = "ADDR", default_value_t = any_port())]
    api: SocketAddr,

    /// How soon a node that says nothing is taken as lost: `default` after 4 s, `fast` after 1.1 s
    #[arg(long, value_name = "PROFILE", default_value = "default")]
    detection: Detection,

    #[command(flatten)]
    gateways: GatewayFiles,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let dir = place::cluster_dir(args.dir.as_deref().or(global.cluster.as_deref()))?;
    let folder = Folder::new(&dir);
    let interrupted = stop_signal()?;
    if let Some(pid) = folder.holder() {
        return Err(Failure::new(
            Exit::Conflict,
            format!("a local cluster already runs in {} (process {pid})", dir.display()),
        )
        .help("use it (`stoke status`), stop it (`stoke down`), or give another folder with --dir"));
    }
    let nodes = args.nodes.unwrap_or_else(|| folder.known_nodes().unwrap_or(2));
    let (listen, metrics, detection) = (args.listen, args.metrics, args.detection);
    let gateways = args.gateways.over(folder.read_state().map(|state| state.gateways).unwrap_or_default())?;
    let wish =
        Wish { nodes, listen, metrics, api: Some(args.api), otlp: args.otlp, detection, gateways, life: Life::ItsOwn };
    let mut cluster = LocalCluster::start(&folder, &wish)?;
    let ready = tokio::select! {
        () = interrupted => Err(Failure::new(Exit::Interrupted, "interrupted before the cluster was up")),
        ready = cluster.ready(&folder) => ready,
    };
    let ready = match ready {
        Ok(ready) => ready,
        Err(failure) => {
            cluster.end().await;
            return Err(failure);
        }
    };
    let Notice::Ready { address, metrics, api, nodes, without_ranks } = ready else { return Ok(Exit::Negative) };
    if global.json {
        output::print_json(&serde_json::json!({
            "dir": dir, "address": address, "metrics": metrics, "api": api, "nodes": nodes, "without_ranks": without_ranks,
            "supervisor": cluster.pid(),
        }))?;
        return Ok(Exit::Ok);
    }
    let mut table = output::Table::bare();
    table.row(["cluster".into(), format!("up, {}, in {}", output::count(nodes, "node"), dir.display())]);
    table.row(["coordinator".into(), address]);
    if let Some(metrics) = metrics {
        table.row(["metrics".into(), format!("http://{metrics}/metrics")]);
    }
    if let Some(api) = api {
        table.row(["API".into(), format!("https://{api}/v1, for programs; for people: stoke dashboard")]);
    }
    for WithoutRanks { node, reason, .. } in without_ranks {
        table.row([node, format!("gets no ranks: {reason}")]);
    }
    table.row(["next".into(), "stoke submit --wait SPEC, stoke serve SPEC, stoke nodes, stoke down".into()]);
    output::print(&table.render())?;
    Ok(Exit::Ok)
}

pub fn any_port() -> SocketAddr {
    SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0)
}
