//! The supervisor of a local cluster: brings up a coordinator and N agents, keeps them running, and takes them down. Owns their order (the
//! coordinator first up and last down) and the notices; never touches a job.

use std::future::Future;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use stoke_node::agent;
use stoke_protocol::identity::{Credentials, JoinToken};
use stoke_protocol::message::client::{NodeState, NodeView, Reply, Request, TokenScope};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use super::folder::{Folder, Process, State, node_ip, node_name};
use super::gateways::GatewayFiles;
use super::keeper::{Happening, Keeper, Phase};
use super::notice::{Listening, Notice, WithoutRanks};
use super::process::Launch;
use crate::client::{Client, Repeat, unexpected};
use crate::detection::Detection;
use crate::failure::{Exit, Failure, OrFail};
use crate::json;

/// Everything is on this machine: a start that takes longer hangs.
const START_MAX: Duration = Duration::from_secs(60);
/// How often a cluster that comes up is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(25);
/// A node's token is used at once.
const TOKEN_TTL_SECONDS: u64 = 600;
const LOG_LINES: usize = 20;
const COORDINATOR: usize = 0;

#[derive(Clone, Debug)]
pub struct Options {
    pub dir: PathBuf,
    pub nodes: u32,
    pub listen: SocketAddr,
    pub metrics: Option<SocketAddr>,
    pub api: Option<SocketAddr>,
    pub otlp: Option<String>,
    pub detection: Detection,
    pub gateways: GatewayFiles,
}

struct Supervisor {
    folder: Folder,
    options: Options,
    state: State,
    /// The coordinator has said where it listens.
    listening: bool,
    /// The process that cannot be kept running.
    culprit: Option<String>,
    slots: Vec<watch::Sender<Launch>>,
    coordinator: watch::Sender<Phase>,
    agents: watch::Sender<Phase>,
    keepers: Vec<JoinHandle<()>>,
    to_happenings: mpsc::Sender<Happening>,
    happenings: mpsc::Receiver<Happening>,
}

/// Runs a local cluster until `stop` resolves or it cannot go on. The folder stays; its lock is held throughout.
pub async fn run(options: Options, stop: impl Future<Output = ()>) -> Result<Exit, Failure> {
    let folder = Folder::new(&options.dir);
    folder.create()?;
    let lock = folder.lock()?;
    folder.clear_pardons();
    let mut supervisor = Supervisor::new(folder, options);
    let mut stop = std::pin::pin!(stop);
    let ended = supervisor.live(stop.as_mut()).await;
    supervisor.take_down().await;
    drop(lock);
    ended
}

impl Supervisor {
    fn new(folder: Folder, options: Options) -> Self {
        let (to_happenings, happenings) = mpsc::channel(64);
        let before = folder.read_state().unwrap_or_default();
        Self {
            // The address of an earlier life is kept: users and nodes know it.
            state: State {
                supervisor: std::process::id(),
                processes: Vec::new(),
                gateways: options.gateways.clone(),
                otlp: options.otlp.clone().or(before.otlp),
                ..before
            },
            listening: false,
            culprit: None,
            folder,
            options,
            slots: Vec::new(),
            coordinator: watch::Sender::new(Phase::Starting),
            agents: watch::Sender::new(Phase::Starting),
            keepers: Vec::new(),
            to_happenings,
            happenings,
        }
    }

    async fn live(&mut self, mut stop: Pin<&mut impl Future<Output = ()>>) -> Result<Exit, Failure> {
        let started = tokio::select! {
            () = stop.as_mut() => return Ok(Exit::Ok),
            started = self.bring_up() => started,
        };
        if let Err(failure) = started {
            notify(&failed(&failure, self.failed_log()));
            return Err(failure);
        }
        loop {
            tokio::select! {
                () = stop.as_mut() => return Ok(Exit::Ok),
                Some(happening) = self.happenings.recv() => self.note(happening)?,
            }
        }
    }

    async fn bring_up(&mut self) -> Result<(), Failure> {
        let deadline = Instant::now() + START_MAX;
        let launch = self.coordinator_launch();
        self.keep(launch, COORDINATOR);
        while !self.listening {
            self.next_happening(deadline).await?;
        }
        let admin = self.folder.coordinator().join("admin");
        let mut client = Client::open_patiently(&admin, START_MAX).await?;
        for index in 1..=self.options.nodes {
            // One after the other, so that the agent called node-1 becomes the node with that id.
            self.join(&mut client, index).await?;
        }
        for index in 1..=self.options.nodes {
            let launch = self.node_launch(index);
            self.keep(launch, index as usize);
        }
        let without_ranks = self.all_up(&mut client, deadline).await?;
        self.coordinator.send_replace(Phase::Up);
        self.agents.send_replace(Phase::Up);
        notify(&Notice::Ready {
            address: self.state.address.clone(),
            metrics: self.state.metrics.clone(),
            api: self.state.api.clone(),
            nodes: self.options.nodes,
            without_ranks,
        });
        Ok(())
    }

    /// Gives an agent its identity, once.
    async fn join(&self, client: &mut Client, index: u32) -> Result<(), Failure> {
        let (dir, name) = (self.folder.node(index), node_name(index));
        if Credentials::load(&agent::identity_dir(&dir)).is_ok() {
            return Ok(());
        }
        let token: JoinToken = node_token(client).await?.parse().or_fail(Exit::Negative, "read a join token")?;
        let joined = agent::join(&dir, &self.reachable(), &token, &name).await;
        joined.map(drop).map_err(|error| {
            let causes = anyhow::Error::from(error);
            Failure::new(Exit::Negative, format!("{name} cannot join: {causes:#}"))
        })
    }

    /// Until all agents are connected. Gives those of their nodes that get no ranks all the same.
    async fn all_up(&mut self, client: &mut Client, deadline: Instant) -> Result<Vec<WithoutRanks>, Failure> {
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(deadline) => return Err(late("the nodes are not up")),
                Some(happening) = self.happenings.recv() => self.note(happening)?,
                _ = looks.tick() => {
                    let Reply::Nodes(nodes) = client.ask(&Request::Nodes, Repeat::Safe).await? else {
                        return Err(unexpected());
                    };
                    let ours = |name: &str| (1..=self.options.nodes).any(|index| node_name(index) == name);
                    let here: Vec<&NodeView> =
                        nodes.iter().filter(|node| is_connected(node.state) && ours(&node.name)).collect();
                    if here.len() >= self.options.nodes as usize {
                        return Ok(here.into_iter().filter_map(without_ranks).collect());
                    }
                }
            }
        }
    }

    fn keep(&mut self, launch: Launch, slot: usize) {
        let (phase, name) = if slot == COORDINATOR {
            (&self.coordinator, "coordinator".to_owned())
        } else {
            (&self.agents, launch.name.clone())
        };
        assert_eq!(slot, self.slots.len(), "slots are filled in order");
        self.state.processes.push(Process { name, pid: 0, restarts: 0 });
        let launch = watch::Sender::new(launch);
        let keeper = Keeper {
            slot,
            folder: self.folder.clone(),
            launch: launch.subscribe(),
            phase: phase.subscribe(),
            happenings: self.to_happenings.clone(),
        };
        self.slots.push(launch);
        self.keepers.push(tokio::task::spawn(keeper.run()));
    }

    async fn next_happening(&mut self, deadline: Instant) -> Result<(), Failure> {
        match timeout_at(deadline, self.happenings.recv()).await {
            Ok(Some(happening)) => self.note(happening),
            Ok(None) | Err(_) => Err(late("the coordinator does not answer")),
        }
    }

    /// Keeps the books; an error means that the cluster cannot go on.
    fn note(&mut self, happening: Happening) -> Result<(), Failure> {
        match happening {
            Happening::Started { slot, pid } => {
                self.state.processes[slot].pid = pid;
                if self.state.processes[slot].restarts > 0 {
                    notify(&Notice::Restarted { process: self.state.processes[slot].name.clone(), pid });
                }
            }
            Happening::Said { slot: COORDINATOR, line } => self.listening(&line),
            Happening::Said { .. } => return Ok(()),
            Happening::Died { slot, reason } => {
                let process = &mut self.state.processes[slot];
                process.restarts += 1;
                process.pid = 0;
                let (process, restarts) = (process.name.clone(), process.restarts);
                notify(&Notice::Restarting { process, reason, restarts });
            }
            Happening::Dismissed { slot } => {
                let process = &mut self.state.processes[slot];
                process.pid = 0;
                tracing::warn!(
                    process = process.name,
                    "its node was removed from the cluster: it is not started again"
                );
            }
            Happening::GaveUp { slot, reason, exit } => {
                let name = self.state.processes[slot].name.clone();
                let failure = Failure::new(exit, format!("the {name} {reason}"))
                    .help(format!("its log is {}", self.folder.log(&name).display()));
                // Bringing up reports its own failures.
                if *self.agents.borrow() == Phase::Up {
                    let log = self.folder.log_tail(&name, LOG_LINES);
                    notify(&failed(&failure, log));
                }
                self.culprit = Some(name);
                return Err(failure);
            }
        }
        self.folder.write_state(&self.state)
    }

    fn listening(&mut self, line: &str) {
        let Ok(listening) = serde_json::from_str::<Listening>(line) else { return };
        self.state.address = listening.address;
        self.state.metrics = listening.metrics;
        self.state.api = listening.api;
        self.listening = true;
        // A restart comes back where everyone expects it.
        let launch = self.coordinator_launch();
        self.slots[COORDINATOR].send_replace(launch);
    }

    /// A port that was asked for is used; else that of an earlier life; else any.
    fn coordinator_launch(&self) -> Launch {
        let known = Some(&self.state.address).filter(|address| !address.is_empty() && self.options.listen.port() == 0);
        let listen = known.cloned().unwrap_or_else(|| self.options.listen.to_string());
        let metrics = self.state.metrics.clone().or(self.options.metrics.map(|address| address.to_string()));
        let dir = self.folder.coordinator().display().to_string();
        let detection = self.options.detection.name();
        let mut arguments =
            strings(&["coordinator", "--dir", &dir, "--listen", &listen, "--detection", detection, "--json"]);
        if let Some(metrics) = metrics {
            arguments.extend(strings(&["--metrics", &metrics]));
        }
        // A port that was asked for is used; else that of an earlier life.
        let api = self.options.api.map(|asked| match &self.state.api {
            Some(known) if asked.port() == 0 => known.clone(),
            _ => asked.to_string(),
        });
        if let Some(api) = api {
            arguments.extend(strings(&["--api", &api]));
        }
        if let Some(otlp) = &self.state.otlp {
            arguments.extend(strings(&["--otlp", otlp]));
        }
        Launch {
            name: "coordinator".into(),
            arguments,
            log: self.folder.log("coordinator"),
            weather: self.folder.weather(),
        }
    }

    /// Where our own nodes find the coordinator: one that listens on every address is no address to go to.
    fn reachable(&self) -> String {
        match self.state.address.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_unspecified() => {
                let loopback: IpAddr =
                    if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
                SocketAddr::new(loopback, address.port()).to_string()
            }
            Ok(_) | Err(_) => self.state.address.clone(),
        }
    }

    fn node_launch(&self, index: u32) -> Launch {
        let (name, dir) = (node_name(index), self.folder.node(index).display().to_string());
        let (ip, coordinator) = (node_ip(index).to_string(), self.reachable());
        // The coordinator's port, which stays over lives, of the node's own address.
        let port = coordinator.rsplit_once(':').map_or("0", |(_, port)| port);
        let gateway = format!("{ip}:{port}");
        let arguments = strings(&["node", "--dir", &dir, "--coordinator", &coordinator, "--name", &name, "--ip", &ip]);
        let arguments = [arguments, strings(&["--gateway", &gateway]), self.options.gateways.arguments()].concat();
        Launch { log: self.folder.log(&name), name, arguments, weather: self.folder.weather() }
    }

    /// The log of the process that made the start fail.
    fn failed_log(&self) -> Vec<String> {
        self.folder.log_tail(self.culprit.as_deref().unwrap_or("coordinator"), LOG_LINES)
    }

    /// Agents first, so that they can still tell the coordinator of their ranks; then the coordinator.
    async fn take_down(&mut self) {
        let mut agents = std::mem::take(&mut self.keepers);
        let coordinator: Vec<JoinHandle<()>> = agents.drain(..agents.len().min(1)).collect();
        for (phase, keepers) in [(&self.agents, agents), (&self.coordinator, coordinator)] {
            phase.send_replace(Phase::Stopping);
            for mut keeper in keepers {
                loop {
                    tokio::select! {
                        _ = &mut keeper => break,
                        // Keepers must not wait for room in the channel.
                        _ = self.happenings.recv() => {}
                    }
                }
            }
            end_orphans(&self.folder, self.options.nodes);
        }
        let _ = self.folder.write_state(&State { processes: Vec::new(), ..self.state.clone() });
    }
}

/// Ranks that an agent has left which was not there to stop them, and what they kept in memory.
pub fn end_orphans(folder: &Folder, nodes: u32) {
    for index in 1..=nodes {
        match agent::end_orphans(&folder.node(index)) {
            Ok(0) => {}
            Ok(ended) => tracing::info!(node = node_name(index), ended, "ranks without an agent were killed"),
            Err(error) => tracing::warn!(node = node_name(index), %error, "ranks without an agent may be left"),
        }
    }
}

/// Whether an agent speaks for the node, and is heard. What a person or its failures have made of the node is another matter.
fn is_connected(state: NodeState) -> bool {
    match state {
        NodeState::Up | NodeState::Draining | NodeState::Drained | NodeState::Quarantined => true,
        NodeState::Silent | NodeState::Lost => false,
    }
}

/// Why a node gets no ranks though it is there, and what lifts that; if it gets none.
fn without_ranks(view: &NodeView) -> Option<WithoutRanks> {
    let node = view.node.to_string();
    let reason = match view.state {
        NodeState::Up | NodeState::Silent | NodeState::Lost => return None,
        NodeState::Draining | NodeState::Drained => {
            format!("{}; it serves again after `stoke drain {node} --undo`", view.reason)
        }
        // It says so itself.
        NodeState::Quarantined => view.reason.clone(),
    };
    Some(WithoutRanks { node, state: json::node_state(view.state).to_owned(), reason })
}

async fn node_token(client: &mut Client) -> Result<String, Failure> {
    let request = Request::TokenCreate { scope: TokenScope::Node, ttl_seconds: TOKEN_TTL_SECONDS };
    // An unused token that nobody has seen is harmless: asking again is safe here.
    match client.ask(&request, Repeat::Safe).await? {
        Reply::Token { text, .. } => Ok(text),
        _ => Err(unexpected()),
    }
}

fn failed(failure: &Failure, log: Vec<String>) -> Notice {
    // What a start lacks is told; that somebody waited too long for it is no more than that it failed.
    let exit = match failure.exit {
        Exit::Conflict | Exit::Usage => failure.exit,
        _ => Exit::Negative,
    };
    Notice::Failed { reason: failure.message(), help: failure.help_text(), log, exit: exit.code() }
}

/// To whoever started us, if it still listens, and to the log.
fn notify(notice: &Notice) {
    match notice {
        Notice::Ready { .. } | Notice::Restarted { .. } => tracing::info!(?notice, "notice"),
        Notice::Restarting { .. } => tracing::warn!(?notice, "notice"),
        Notice::Failed { .. } => tracing::error!(?notice, "notice"),
    }
    if let Ok(line) = serde_json::to_string(notice).or_fail(Exit::Negative, "encode notice") {
        let _ = writeln!(std::io::stdout().lock(), "{line}");
    }
}

fn late(what: &str) -> Failure {
    Failure::new(Exit::Unavailable, format!("{what} after {} s", START_MAX.as_secs())).help("look into the logs below")
}

fn strings(parts: &[&str]) -> Vec<String> {
    parts.iter().map(|part| (*part).to_owned()).collect()
}
