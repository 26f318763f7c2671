//! The agent: one a machine. It holds a session with the coordinator, starts ranks as processes, watches them and reports. Wiring, and the
//! start and the end of an agent.
//!
//! `state` and `outbox` decide and know no I/O; `actor` and `session` carry out; `process`, `adopt`, `watch`, `inventory` and `log` are the
//! machine.

mod actor;
mod adopt;
mod backoff;
mod belongings;
mod claim;
mod conversation;
mod disk;
pub mod fence;
mod inventory;
mod join;
mod log;
mod memory;
mod outbox;
mod process;
mod program;
mod session;
mod shards;
mod spawn;
pub mod state;
#[cfg(test)]
mod state_tests;
pub mod surveys;
mod sweeps;
#[cfg(test)]
mod tests;
mod watch;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use ractor::{Actor, ActorRef};
use stoke_protocol::identity::Credentials;
use stoke_protocol::ids::{Incarnation, NodeId};
use stoke_protocol::message::node::{Capacity, GatewayAt};
use stoke_protocol::transport::{Bind, Endpoint, Io, Settings, TransportError};
use tokio::sync::{oneshot, watch as channel};

use crate::artifact::Cache;
use crate::config::{Config, Gateway as At};
use crate::gateway::{self, Gateway, GatewayError, Tls, Who};
use crate::probe;
use crate::worker::text_of;

pub(crate) use adopt::by_descriptor;
pub use claim::Claim;
pub use disk::{Home, HomeError, identity_dir};
pub(crate) use inventory::write_last_words;
pub use inventory::{Inventory, Kept, end_orphans};
pub use join::{JoinError, join};
pub use log::{LogBook, PARTS_MAX as LOG_PARTS_MAX, part_path as log_part};
pub(crate) use outbox::is_droppable;
pub use process::{KEEPER, LINK_FD, PEER_IP, Processes, SHARDS};
pub use shards::ShardFolder;
pub use spawn::{RankEvents, RankProcess, Spawner};
pub use sweeps::Sweep;

/// An agent. See [`Agent::start`].
pub struct Agent;

/// The world of an agent, where it is not the real one.
pub struct Environment {
    pub io: Io,
    /// The socket that the session dials from.
    pub bind: Bind,
    pub spawner: Arc<dyn Spawner>,
    pub capacity: Capacity,
    /// Where ranks keep shards in memory.
    pub shards: Option<ShardFolder>,
    /// Whether heartbeats carry the load of this machine.
    pub measure: bool,
    /// Whether work on files has threads of its own. Not where time is simulated: theirs would be the real one.
    pub has_threads: bool,
    /// Where clients reach what is served.
    pub gateway: Option<Gateway>,
}

/// An agent that runs. Dropping it leaves the agent running; [`Running::stop`] ends it.
pub struct Running {
    node: NodeId,
    actor: ActorRef<actor::Message>,
    accepted: channel::Receiver<bool>,
    ended: channel::Receiver<Option<Option<String>>>,
}

/// Why an agent could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Home(#[from] HomeError),
    #[error("{0}")]
    Offer(String),
    #[error("no coordinator to connect to: name at least one host:port")]
    NoCoordinator,
    #[error(transparent)]
    Identity(#[from] JoinError),
    #[error("open the session's endpoint")]
    Transport(#[from] TransportError),
    #[error("find the program of ranks")]
    Command(#[source] std::io::Error),
    #[error(transparent)]
    Gateway(#[from] GatewayError),
    #[error("start the agent's actor: {0}")]
    Actor(String),
}

impl Agent {
    /// Starts an agent on this machine; `join` must have been called on its folder. Returns before the coordinator is reached: an agent
    /// waits for its coordinator for as long as it takes. Needs a tokio runtime with time and I/O.
    pub async fn start(config: Config) -> Result<Running, StartError> {
        config.check().map_err(StartError::Offer)?;
        // An agent whose folder has lost its count, or comes from a backup, is still newer than every one before.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let clock = Incarnation(u64::try_from(since.as_millis()).unwrap_or(0));
        let (home, fence) = Home::open(&config.dir, clock)?;
        let logs = LogBook::new(home.logs_dir(), config.log_bytes);
        let first = config.coordinator.first().ok_or(StartError::NoCoordinator)?;
        let peer = session::resolve(first).await.ok().and_then(|addresses| addresses.first().map(|a| a.ip()));
        let capacity = probe::capacity(&config);
        let gpus = u32::try_from(capacity.gpus.len()).unwrap_or(u32::MAX);
        let credentials = home.credentials()?;
        let shards = ShardFolder::open(credentials.identity().cluster, join::node_of(&credentials)?);
        let shards = shards.filter(|_| config.shards_in_memory);
        let root = shards.as_ref().map(|shards| shards.root().to_owned());
        let inventory = Inventory::open(&config.dir)?;
        let kept = inventory.take_over()?;
        let spawner = Processes::new(&config, inventory, logs.clone(), gpus, root);
        let bind = session::any_port_towards(peer, config.listen_ip);
        let environment = Environment {
            gateway: start_gateway(&config, bind, &credentials).await?,
            io: Io::thread("stoke-agent-net")?,
            bind: bind.into(),
            spawner: Arc::new(spawner.map_err(StartError::Command)?),
            capacity,
            shards,
            measure: true,
            has_threads: true,
        };
        Self::begin(config, environment, (home, fence), (logs, kept)).await
    }

    /// Starts an agent in another world: a simulator's.
    pub async fn start_in(config: Config, environment: Environment) -> Result<Running, StartError> {
        let (home, fence) = Home::open(&config.dir, Incarnation(0))?;
        let logs = LogBook::new(home.logs_dir(), config.log_bytes);
        Self::begin(config, environment, (home, fence), (logs, Vec::new())).await
    }

    async fn begin(
        config: Config,
        environment: Environment,
        (home, fence): (Home, fence::Fence),
        (logs, kept): (LogBook, Vec<Kept>),
    ) -> Result<Running, StartError> {
        let credentials = home.credentials()?;
        let node = join::node_of(&credentials)?;
        let incarnation = home.incarnation();
        let own = state::Own {
            cluster: credentials.identity().cluster,
            node,
            name: config.name.clone(),
            incarnation,
            capacity: environment.capacity,
            gateway: environment
                .gateway
                .as_ref()
                .map(|gateway| GatewayAt { address: gateway.address(), tls: config.gateway_key.is_some() }),
        };
        let Environment { io, bind, spawner, shards, measure, has_threads, gateway, .. } = environment;
        let endpoint = Endpoint::client(&io, bind, Settings::control(), credentials.clone())?;
        let session = session::SessionArguments {
            endpoint,
            credentials,
            identity_dir: home.identity_dir(),
            coordinator: config.coordinator.clone(),
            incarnation,
            logs,
            artifacts: Cache::of(&config.dir),
            gateway: gateway.as_ref().map(Gateway::watch),
            measure,
            seed: node.0 << 32 | incarnation.0,
        };
        let (ended, end) = oneshot::channel();
        let (accept, accepted) = channel::channel(false);
        let state = state::AgentState::new(own, fence);
        let arguments = actor::Arguments {
            config,
            home,
            state,
            spawner,
            kept,
            shards,
            has_threads,
            session,
            gateway,
            accepted: accept,
            ended,
        };
        let (actor, task) = actor::AgentActor::spawn(None, actor::AgentActor, arguments)
            .await
            .map_err(|error| StartError::Actor(error.to_string()))?;
        let (publish, ended) = channel::channel(None);
        tokio::spawn(async move {
            let reason = end.await.unwrap_or_else(|_| Some("the agent's actor failed, see its log".to_owned()));
            let _ = task.await;
            publish.send_replace(Some(reason));
        });
        Ok(Running { node, actor, accepted, ended })
    }
}

/// Its own network thread: what it carries must not delay a heartbeat.
async fn start_gateway(
    config: &Config,
    bind: SocketAddr,
    credentials: &Credentials,
) -> Result<Option<Gateway>, StartError> {
    let settings = [&config.gateway_tokens, &config.gateway_certificate, &config.gateway_key];
    let Some(listen) = config.gateway.address() else {
        return match settings.iter().any(|setting| setting.is_some()) {
            true => {
                Err(StartError::Offer("tokens or TLS for a gateway, and gateway = \"none\": drop one of them".into()))
            }
            false => Ok(None),
        };
    };
    let endpoint = Endpoint::client(&Io::thread("stoke-gateway")?, bind, Settings::bulk(), credentials.clone())?;
    let tls = match (&config.gateway_certificate, &config.gateway_key) {
        (Some(certificate), Some(key)) => Some(Tls { certificate: certificate.clone(), key: key.clone() }),
        (None, None) => None,
        (Some(_), None) | (None, Some(_)) => {
            return Err(StartError::Offer("TLS of the gateway needs both files: its certificate and its key".into()));
        }
    };
    let who = config.gateway_tokens.clone().map_or(Who::Machine, Who::File);
    match Gateway::start(gateway::Options { who, tls, ..gateway::Options::new(listen) }, endpoint).await {
        Ok(gateway) => {
            tracing::info!(address = %gateway.address(), "gateway listens");
            Ok(Some(gateway))
        }
        // Another agent of this machine has the usual port.
        Err(error) if config.gateway == At::Usual => {
            tracing::warn!(error = text_of(&error), "this node has no gateway");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

impl Running {
    /// Which node this agent is.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Waits for a session with a coordinator; for ever, if the agent ends before.
    pub async fn accepted(&self) {
        if self.accepted.clone().wait_for(|accepted| *accepted).await.is_err() {
            std::future::pending().await
        }
    }

    /// True once the agent's actor has taken everything that came before; false when it has ended. An actor that is stuck does not answer.
    pub async fn beat(&self) -> bool {
        ractor::call!(self.actor, actor::Message::Beat).is_ok()
    }

    /// Stops every rank (politely, then by SIGKILL after the grace), tells the coordinator, and ends. No process is left when it returns.
    pub async fn stop(&self) {
        let _ = self.actor.cast(actor::Message::ShutDown);
        self.wait().await;
    }

    /// Waits for the end. A reason means that nobody asked for it.
    pub async fn wait(&self) -> Option<String> {
        let mut ended = self.ended.clone();
        let end = ended.wait_for(Option::is_some).await;
        end.ok().and_then(|end| end.clone()).flatten()
    }
}
