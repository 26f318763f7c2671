//! `stoke node`: the agent of a machine; and what is done to a machine as a member of the cluster.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use stoke_node::agent::{self, Agent, HomeError, JoinError, StartError};
use stoke_node::gateway::GatewayError;
use stoke_node::{Config, Gateway};
use stoke_protocol::identity::Credentials;
use stoke_protocol::ids::NodeId;
use stoke_protocol::message::client::{Reply, Request};
use stoke_protocol::spec::Bytes;

use super::{connect, drain, login, read_config, stop_signal};
use crate::Global;
use crate::client::{Repeat, transport_failure, unexpected};
use crate::failure::{Exit, Failure};
use crate::service::Service;
use crate::{json, output};

const EXAMPLES: &str = "\
Examples:
  # the first time
  stoke node --dir /var/lib/stoke-node --coordinator head.example.org:7878 --join - < token.txt
  # or apart: this joins and ends, so that the service needs no token
  stoke node --config /etc/stoke/stoke-node.toml --join - --join-only < token.txt
  # ever after
  stoke node --dir /var/lib/stoke-node --coordinator head.example.org:7878 --label zone=a";

const RELEASE_EXAMPLES: &str = "\
Examples:
  stoke nodes                           # says why it is in quarantine
  stoke node release node-2";

const REMOVE_EXAMPLES: &str = "\
Examples:
  stoke drain node-2 && stoke node remove node-2
  stoke node remove node-5              # one that died and will not be back";

/// Run the agent of this machine in the foreground: joins the cluster once, then offers the machine to it
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Node>,

    /// Identity, logs and state of this node
    #[arg(long, value_name = "DIR", required_unless_present = "config")]
    dir: Option<PathBuf>,

    /// Where the coordinator answers; repeatable
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "config")]
    coordinator: Vec<String>,

    /// Settings (TOML: dir, coordinator, name, labels, cpus, memory, ...); options given here win over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Join token of role node, for the first start; `-` reads it from standard input
    #[arg(long, value_name = "TOKEN")]
    join: Option<String>,

    /// Join, keep the identity in the folder, and end: the agent runs without a token then. Does nothing in a folder that has joined
    #[arg(long, requires = "join")]
    join_only: bool,

    /// What people call this machine [default: its host name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// For placement; repeatable
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,

    /// Address where this machine's ranks listen for their peers [default: the one that leads to the coordinator]
    #[arg(long, value_name = "IP")]
    ip: Option<IpAddr>,

    /// Where clients reach the models that are served, over HTTP: IP:PORT, or `none` [default: port 8400 of the loopback, if it is free]
    #[arg(long, value_name = "ADDR")]
    gateway: Option<Gateway>,

    /// Who may ask the gateway: a file with a line `USER TOKEN` for each [default: everybody on this machine, nobody else]
    #[arg(long, value_name = "FILE")]
    gateway_tokens: Option<PathBuf>,

    /// TLS for the gateway: PEM file of its certificate chain
    #[arg(long, value_name = "FILE")]
    gateway_certificate: Option<PathBuf>,

    /// TLS for the gateway: PEM file of its key
    #[arg(long, value_name = "FILE")]
    gateway_key: Option<PathBuf>,

    /// Processors to offer [default: all]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,

    /// Memory to offer, e.g. 16GiB [default: all]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,
}

#[derive(clap::Subcommand, Debug)]
enum Node {
    Remove(Remove),
    Release(Release),
}

/// Let a node have ranks again that was in quarantine: it is mended
#[derive(clap::Args, Debug)]
#[command(after_help = RELEASE_EXAMPLES)]
struct Release {
    /// The node: its id (node-2), or its name where no other has it
    node: String,
}

/// Let a lost or drained node go for good: its certificate opens nothing any more
///
/// The machine comes back only with a new join token, and as a new node.
#[derive(clap::Args, Debug)]
#[command(after_help = REMOVE_EXAMPLES)]
struct Remove {
    /// The node: its id (node-2), or its name where no other has it
    node: String,
}

impl Args {
    /// Whether it is the agent itself.
    pub fn is_service(&self) -> bool {
        self.command.is_none() && !self.join_only
    }

    fn config(self) -> Result<Config, Failure> {
        let mut config = match (&self.config, &self.dir) {
            (Some(file), _) => read_config(file)?,
            (None, Some(dir)) => Config { gateway: Gateway::Usual, ..Config::new(dir, Vec::new()) },
            (None, None) => return Err(Failure::usage("give --dir DIR or --config FILE")),
        };
        config.dir = self.dir.unwrap_or(config.dir);
        if !self.coordinator.is_empty() {
            config.coordinator = self.coordinator;
        }
        config.name = self.name.unwrap_or(config.name);
        config.labels.extend(self.labels);
        config.listen_ip = self.ip.or(config.listen_ip);
        config.gateway = self.gateway.unwrap_or(config.gateway);
        config.gateway_tokens = self.gateway_tokens.or(config.gateway_tokens);
        config.gateway_certificate = self.gateway_certificate.or(config.gateway_certificate);
        config.gateway_key = self.gateway_key.or(config.gateway_key);
        config.cpus = self.cpus.or(config.cpus);
        config.memory = self.memory.or(config.memory);
        Ok(config)
    }
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    match args.command {
        Some(Node::Remove(remove)) => return run_remove(remove, global).await,
        Some(Node::Release(release)) => return run_release(release, global).await,
        None => {}
    }
    let stop = stop_signal()?;
    let (token, join_only) = (args.join.clone(), args.join_only);
    let config = args.config()?;
    config.check().map_err(Failure::usage)?;
    match &token {
        Some(token) => {
            let node = join(&config, token).await?;
            if join_only {
                return joined(node, &config.dir, global);
            }
        }
        None => must_have_identity(&config)?,
    }
    let (name, identity) = (config.name.clone(), agent::identity_dir(&config.dir));
    let running = Agent::start(config).await.map_err(|error| start_failure(error, &name))?;
    let service = Service::from_environment();
    tokio::select! {
        () = stop => {}
        // Never ends. An agent without a session offers its machine to nobody.
        () = service.attend(running.accepted(), async || running.beat().await) => {}
        reason = running.wait() => {
            // An agent whose node was removed sets its identity aside.
            let exit = if identity.exists() { Exit::Negative } else { Exit::Denied };
            return reason.map_or(Ok(Exit::Ok), |reason| Err(Failure::new(exit, format!("the agent ended: {reason}"))));
        }
    }
    service.stopping();
    running.stop().await;
    Ok(Exit::Ok)
}

async fn run_release(args: Release, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let node = drain::find(&mut client, &args.node).await?;
    let view = drain::ask(&mut client, &Request::ReleaseNode { node }).await?;
    if global.json {
        output::print_json(&json::node(&view))?;
    } else {
        output::print(&format!("{node} may have ranks again\n"))?;
    }
    Ok(Exit::Ok)
}

async fn run_remove(args: Remove, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let node = drain::find(&mut client, &args.node).await?;
    let reply = client.ask(&Request::RemoveNode { node }, Repeat::Safe).await?;
    let Reply::NodeRemoved { node } = reply else { return Err(unexpected()) };
    if global.json {
        output::print_json(&serde_json::json!({ "node": node.to_string(), "removed": true }))?;
    } else {
        output::print(&format!("{node} is removed: the machine comes back only with a new token\n"))?;
    }
    Ok(Exit::Ok)
}

/// Another agent on the folder, and a port in use, are conflicts: nothing is wrong with the arguments.
fn start_failure(error: StartError, name: &str) -> Failure {
    let exit = match &error {
        StartError::Home(HomeError::InUse { .. }) => Exit::Conflict,
        StartError::Gateway(GatewayError::Bind { source, .. }) if source.kind() == ErrorKind::AddrInUse => {
            Exit::Conflict
        }
        StartError::Gateway(_) | StartError::Offer(_) | StartError::NoCoordinator => Exit::Usage,
        StartError::Home(_)
        | StartError::Identity(_)
        | StartError::Transport(_)
        | StartError::Command(_)
        | StartError::Actor(_) => Exit::Negative,
    };
    Failure::from_error(exit, error).context(format!("start the agent of {name}"))
}

fn joined(node: NodeId, dir: &Path, global: &Global) -> Result<Exit, Failure> {
    if global.json {
        output::print_json(&serde_json::json!({ "node": node.to_string(), "dir": dir }))?;
    } else {
        output::print(&format!("this machine is {node}; its identity is in {}\n", dir.display()))?;
    }
    Ok(Exit::Ok)
}

fn must_have_identity(config: &Config) -> Result<(), Failure> {
    let failure = match Credentials::load(&agent::identity_dir(&config.dir)) {
        Ok(present) if !present.has_ended() => return Ok(()),
        Ok(_) => Failure::new(Exit::Denied, "this machine was away for longer than its certificate lives".to_owned()),
        Err(error) if agent::identity_dir(&config.dir).exists() => {
            let failure = Failure::from_error(Exit::Denied, error);
            return Err(failure.help(format!(
                "mend {0}, or remove it and start this with --join TOKEN (`stoke token create --role node` where the coordinator's admin is): the machine is another node then",
                agent::identity_dir(&config.dir).display()
            )));
        }
        Err(error) => Failure::from_error(Exit::Denied, error),
    };
    Err(failure.help(
        "create a token where the coordinator's admin is (`stoke token create --role node`), then start this with --join TOKEN",
    ))
}

/// Does nothing in a folder that holds an identity of the token's cluster: a service may be started with its token again and again.
async fn join(config: &Config, text: &str) -> Result<NodeId, Failure> {
    let token = login::read_token(text)?;
    if Credentials::load(&agent::identity_dir(&config.dir)).is_ok_and(|present| !present.has_ended()) {
        tracing::info!("{} has joined before: the token is not used", config.dir.display());
    }
    let mut refused = None;
    for coordinator in &config.coordinator {
        match agent::join(&config.dir, coordinator, &token, &config.name).await {
            Ok(node) => return Ok(node),
            Err(error) => {
                let failure = join_failure(error);
                // A token that was refused is refused everywhere; silence may end at the next address.
                if failure.exit != Exit::Unavailable {
                    return Err(failure.context("join the cluster"));
                }
                refused = Some(failure);
            }
        }
    }
    Err(refused.unwrap_or_else(|| Failure::usage("no coordinator address to join")))
}

fn join_failure(error: JoinError) -> Failure {
    match error {
        JoinError::Transport(error) => transport_failure(error),
        JoinError::Address(_) => Failure::from_error(Exit::Unavailable, error)
            .help("write the coordinator as HOST:PORT, for example 10.0.0.1:7878"),
        JoinError::OtherCluster { .. } => Failure::from_error(Exit::Conflict, error),
        JoinError::NotANode { .. } | JoinError::Credentials(_) => Failure::from_error(Exit::Denied, error)
            .help("a node needs a token of role node: `stoke token create --role node`"),
    }
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        Some(_) | None => Err("write KEY=VALUE, for example zone=a".to_owned()),
    }
}
