//! `stoke node`: the agent of a machine.

use std::net::IpAddr;
use std::path::PathBuf;

use stoke_node::agent::{self, Agent};
use stoke_node::config::Config;
use stoke_protocol::identity::Credentials;
use stoke_protocol::spec::Bytes;

use super::{login, stop_signal};
use crate::Global;
use crate::client::{resolve, transport_failure};
use crate::failure::{Exit, Failure, OrFail};
use crate::output;

const EXAMPLES: &str = "\
Examples:
  stoke node --dir /var/lib/stoke-node --coordinator head.example.org:7878 --join - < token.txt     the first time
  stoke node --dir /var/lib/stoke-node --coordinator head.example.org:7878 --label zone=a           ever after";

/// Run the agent of this machine in the foreground: joins the cluster once, then offers the machine to it
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Identity, logs and state of this node
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,

    /// Where the coordinator answers; repeatable
    #[arg(long, value_name = "HOST:PORT", required = true)]
    coordinator: Vec<String>,

    /// Join token of role node, for the first start; `-` reads it from standard input
    #[arg(long, value_name = "TOKEN")]
    join: Option<String>,

    /// What people call this machine [default: its host name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// For placement; repeatable
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,

    /// Address where this machine's ranks listen for their peers [default: the one that leads to the coordinator]
    #[arg(long, value_name = "IP")]
    ip: Option<IpAddr>,

    /// Processors to offer [default: all]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,

    /// Memory to offer, e.g. 16GiB [default: all]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,
}

pub async fn run(args: Args, _global: &Global) -> Result<Exit, Failure> {
    let stop = stop_signal()?;
    let mut config = Config::new(args.dir, args.coordinator);
    config.name = args.name.unwrap_or(config.name);
    config.labels = args.labels.into_iter().collect();
    (config.listen_ip, config.cpus, config.memory) = (args.ip, args.cpus, args.memory);
    if Credentials::load(&agent::identity_dir(&config.dir)).is_err() {
        join(&config, args.join.as_deref()).await?;
    }
    let name = config.name.clone();
    let running = Agent::start(config).await.or_fail(Exit::Negative, format!("start the agent of node {name}"))?;
    tokio::select! {
        () = stop => {}
        ended = running.wait() => return ended.map(|()| Exit::Ok).or_fail(Exit::Negative, "run the agent"),
    }
    running.stop().await;
    Ok(Exit::Ok)
}

async fn join(config: &Config, token: Option<&str>) -> Result<(), Failure> {
    let text = token.ok_or_else(|| {
        Failure::new(Exit::Denied, format!("{} holds no identity of a node", config.dir.display()))
            .help("join with a token: `stoke token create --role node` where the coordinator's admin is, then --join TOKEN here")
    })?;
    let token = login::read_token(text)?;
    let mut last = None;
    for coordinator in &config.coordinator {
        for address in resolve(coordinator).await? {
            match agent::join(&config.dir, address, &token, &config.name).await {
                Ok(()) => {
                    output::print(&format!("joined the cluster at {address} as {}\n", config.name))?;
                    return Ok(());
                }
                Err(error) => {
                    let failure = transport_failure(error);
                    if failure.exit == Exit::Denied {
                        return Err(failure);
                    }
                    last = Some(failure);
                }
            }
        }
    }
    Err(last.unwrap_or_else(|| Failure::usage("no coordinator address to join")))
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        Some(_) | None => Err("write KEY=VALUE, for example zone=a".to_owned()),
    }
}
