//! Starting and stopping a coordinator: folder, journal, state, endpoint, actors, in this order. Owns what runs; decides nothing.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use stoke_protocol::identity::{Authority, Credentials, Subject};
use stoke_protocol::transport::{Bind, CloseCode, Endpoint, Io, Settings, TransportError};
use tokio::sync::{oneshot, watch};
use tokio::task::{AbortHandle, JoinHandle};

use crate::actors::cluster::{Arguments, TICK_MS};
use crate::actors::door::Door;
use crate::actors::handle::ClusterHandle;
use crate::actors::messages::Message;
use crate::api::{self, Api};
use crate::artifacts::Artifacts;
use crate::config::Config;
use crate::environment::{Clock, Environment};
use crate::journal::{JournalError, RedbLog};
use crate::metrics::Metrics;
use crate::recovery::{self, RecoverError, Recovery, short};
use crate::setup::{self, ADMIN, Folder, SetupError};
use crate::state::{Control, Now, Options};
use crate::{http, state, traces};

/// A stop waits so long for the journal; a disk that takes longer is left to the next start.
const STOP_MAX: Duration = Duration::from_secs(10);
/// And then so long for the collector to take the last spans.
const TRACES_MAX: Duration = Duration::from_secs(2);
/// Between tries to renew the coordinator's own certificate.
const RENEW_RETRY: Duration = Duration::from_secs(60);

/// The control plane as a library.
pub struct Coordinator;

/// A coordinator that runs. Dropping it is a crash: nothing is said to anybody, and the next start recovers from the journal.
pub struct Running {
    address: SocketAddr,
    metrics_address: Option<SocketAddr>,
    api: Option<(SocketAddr, String)>,
    cluster: ClusterHandle,
    endpoint: Endpoint,
    ended: watch::Receiver<Option<Ended>>,
    tasks: Vec<AbortHandle>,
    /// Sends spans until the actor has ended and none is left.
    traces: Option<JoinHandle<()>>,
}

/// Why a coordinator does not run any more.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Ended {
    #[error("stopped")]
    Stopped,
    /// Nothing that was not durable was answered; the next start recovers from disk (I12).
    #[error("journal failed: start the coordinator again, it recovers from disk")]
    Journal(#[source] Arc<JournalError>),
    #[error("a part of the coordinator panicked: start it again, and report this with its log")]
    Panicked,
}

/// Why a coordinator does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("set up the coordinator's folder")]
    Setup(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("open the journal")]
    Journal(#[source] JournalError),
    #[error("recover from the journal")]
    Recover(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the journal in {} is cluster {journal}'s, the authority beside it is cluster {authority}'s: put the folder together again from one backup", dir.display())]
    OtherCluster { dir: PathBuf, journal: String, authority: String },
    #[error(
        "listen on {address}: the port is in use; stop what uses it (`ss -lunp`), or choose another port with --listen"
    )]
    PortInUse { address: SocketAddr },
    #[error(
        "serve metrics on {address}: the port is in use; stop what uses it (`ss -ltnp`), or choose another one with --metrics"
    )]
    MetricsPortInUse { address: SocketAddr },
    #[error("serve metrics on {address}")]
    Metrics { address: SocketAddr, source: std::io::Error },
    #[error(
        "serve the API on {address}: the port is in use; stop what uses it (`ss -ltnp`), or choose another one with --api"
    )]
    ApiPortInUse { address: SocketAddr },
    #[error("serve the API on {address}")]
    Api { address: SocketAddr, source: std::io::Error },
    #[error("send traces (otlp)")]
    Otlp(#[from] traces::OtlpError),
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("start the cluster actor")]
    Actor(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl StartError {
    /// Whether something else has what this coordinator needs: its folder or its port.
    pub fn is_conflict(&self) -> bool {
        matches!(
            self,
            Self::Journal(JournalError::Locked { .. })
                | Self::PortInUse { .. }
                | Self::MetricsPortInUse { .. }
                | Self::ApiPortInUse { .. }
        )
    }
}

impl From<SetupError> for StartError {
    fn from(error: SetupError) -> Self {
        Self::Setup(Box::new(error))
    }
}

impl From<RecoverError> for StartError {
    fn from(error: RecoverError) -> Self {
        match error {
            RecoverError::Journal(error) => Self::Journal(error),
            RecoverError::Entry { .. } | RecoverError::Invariant { .. } => Self::Recover(Box::new(error)),
        }
    }
}

impl Coordinator {
    /// Opens the folder (makes it at the first start), recovers from the journal and listens.
    pub async fn start(config: Config) -> Result<Running, StartError> {
        setup::make_dir(&config.dir)?;
        setup::check_journal(&config.dir)?;
        // The journal's lock first: it keeps a second coordinator from everything else in the folder.
        let mut log = RedbLog::open(&config.dir).map_err(StartError::Journal)?;
        let recovered = recovery::recover(&mut log)?;
        setup::check_authority(&config.dir, recovered.cluster.id())?;
        let folder = Folder::open(&config.dir, &config.lifetimes)?;
        let listener = match config.metrics {
            Some(address) => Some(http::bind(address).await.map_err(|error| metrics_error(address, error))?),
            None => None,
        };
        let api = match config.api {
            Some(address) => Some(http::bind(address).await.map_err(|error| api_error(address, error))?),
            None => None,
        };
        let io = Io::thread("stoke-net")?;
        let (authority, credentials) = (folder.authority.clone(), folder.credentials.clone());
        let bind = Bind::Address(config.listen);
        let environment = Environment::real(bind, io, Box::new(log), authority.clone(), credentials.clone());
        let checkpoints = match &config.checkpoints {
            Some(uri) => uri.clone(),
            None => folder.checkpoints()?,
        };
        let metrics = Arc::new(Metrics::new());
        let api = api.and_then(|listener| {
            let names = config.api_names(listener.local_addr().ok()?);
            Some(Api { listener, names, credentials: credentials.clone() })
        });
        let spans = metrics.trace_spans.clone();
        let traces =
            config.otlp.as_deref().map(|endpoint| traces::start(endpoint, folder.cluster(), spans)).transpose()?;
        let (queue, sending) = traces.unzip();
        let outside = Outside { checkpoints, metrics: metrics.clone(), api, traces: queue };
        let mut running = run(&config, environment, recovered, outside).await?;
        folder.write_admin(&config.lifetimes, &config.addresses(running.address), running.api_url())?;
        let ttl = Duration::from_secs(config.lifetimes.coordinator_s);
        metrics.expires("authority", authority.expires_at());
        let renewal = renew_forever(authority, credentials, (folder.identity_dir(), ttl), metrics.clone());
        running.tasks.push(tokio::spawn(renewal).abort_handle());
        running.traces = sending.map(tokio::spawn);
        if let Some(listener) = listener {
            running.metrics_address = listener.local_addr().ok();
            let ended = running.ended.clone();
            let healthy = Arc::new(move || ended.borrow().is_none());
            running.tasks.push(tokio::spawn(http::serve(listener, metrics, healthy)).abort_handle());
        }
        tracing::info!(address = %running.address, cluster = %folder.cluster(), "coordinator listens");
        Ok(running)
    }

    /// The same on somebody else's clock, network and disk: for simulations. Touches no file and starts no thread.
    pub async fn start_in(config: Config, mut environment: Environment) -> Result<Running, StartError> {
        let checkpoints = config.checkpoints.clone().unwrap_or_else(|| "file:///checkpoints".into());
        let recovered = recovery::recover(environment.log.as_mut())?;
        let outside = Outside { checkpoints, metrics: Arc::new(Metrics::new()), api: None, traces: None };
        run(&config, environment, recovered, outside).await
    }
}

/// What a coordinator has beside its environment.
struct Outside {
    checkpoints: String,
    metrics: Arc<Metrics>,
    api: Option<Api>,
    traces: Option<traces::Queue>,
}

async fn run(
    config: &Config,
    environment: Environment,
    recovered: Recovery,
    outside: Outside,
) -> Result<Running, StartError> {
    let Outside { checkpoints, metrics, api, traces } = outside;
    let Environment { wall, bind, io, log, journal, authority, credentials, secret } = environment;
    let Recovery { cluster: recovered, snapshot_at } = recovered;
    if let Some(cluster) = recovered.id().filter(|cluster| *cluster != authority.cluster()) {
        let (journal, authority) = (cluster.to_string(), authority.cluster().to_string());
        return Err(StartError::OtherCluster { dir: config.dir.clone(), journal, authority });
    }
    tracing::info!(index = recovered.index().0, state = %short(&recovered.state_hash()), "journal replayed");
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let clock = Clock::new(wall);
    let bound = api.as_ref().and_then(|api| api.listener.local_addr().ok());
    let reached = bound.map(|bound| (bound, config.api_url(bound)));
    let api_url = reached.as_ref().map(|(_, url)| url.clone());
    let (timings, placement) = (config.timings, config.placement);
    let options = Options { timings, placement, checkpoints, version: version.clone(), api: api_url };
    let now: Now = clock.now();
    let control: Control = state::Control::new(recovered, options, now);
    let endpoint = Endpoint::server(&io, bind, Settings::control(), credentials).map_err(bind_error)?;
    let address = endpoint.local_addr()?;
    let (ended, ended_seen) = watch::channel(None);
    let arguments = Arguments {
        control,
        cluster: authority.cluster(),
        admin: ADMIN.to_owned(),
        version,
        log,
        journal,
        journal_path: config.dir.display().to_string(),
        snapshot_entries: config.snapshot_entries.max(1),
        snapshot_at,
        clock,
        metrics: metrics.clone(),
        traces,
        ended: ended.clone(),
    };
    let (cluster, actor) = ClusterHandle::spawn(arguments).await.map_err(StartError::Actor)?;
    let (lifetimes, artifacts) = (config.lifetimes, Artifacts::of(&config.dir));
    let door = Door { cluster: cluster.clone(), authority, lifetimes, metrics, artifacts, secret };
    let serving = api.map(|api| tokio::spawn(api::serve(api, door.clone())).abort_handle());
    let tasks = [
        tokio::spawn(door.run(endpoint.clone())).abort_handle(),
        tokio::spawn(tick(cluster.clone())).abort_handle(),
        tokio::spawn(async move {
            // An actor that ends without having said why has panicked.
            actor.await;
            ended.send_if_modified(|ended| ended.is_none() && ended.replace(Ended::Panicked).is_none());
        })
        .abort_handle(),
    ];
    let tasks = tasks.into_iter().chain(serving).collect();
    Ok(Running {
        address,
        metrics_address: None,
        api: reached,
        cluster,
        endpoint,
        ended: ended_seen,
        tasks,
        traces: None,
    })
}

impl Running {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// Where the API is bound.
    pub fn api_address(&self) -> Option<SocketAddr> {
        self.api.as_ref().map(|(address, _)| *address)
    }

    /// How clients reach it.
    pub fn api_url(&self) -> Option<&str> {
        self.api.as_ref().map(|(_, url)| url.as_str())
    }

    /// True once the cluster's actor has taken everything that came before; false when it has ended. An actor that is stuck does not answer.
    pub async fn beat(&self) -> bool {
        let (done, taken) = oneshot::channel();
        self.cluster.send(Message::Beat { done }) && taken.await.is_ok()
    }

    /// Ends in order: everything taken in is durable, nodes and users are told. Ranks go on without a coordinator.
    pub async fn stop(mut self) {
        let (done, stopped) = oneshot::channel();
        if self.cluster.send(Message::Stop { done }) {
            // Late or panicked: the journal is as good as after a crash.
            let _late = tokio::time::timeout(STOP_MAX, stopped).await;
        }
        if let Some(traces) = self.traces.take() {
            // A collector that is away loses them.
            let _late = tokio::time::timeout(TRACES_MAX, traces).await;
        }
        self.endpoint.close(CloseCode::ShuttingDown, "the coordinator was stopped").await;
    }

    /// Until it ends by itself, which is an error, or is stopped.
    pub async fn wait(&self) -> Result<(), Ended> {
        let mut ended = self.ended.clone();
        let ended = ended.wait_for(Option::is_some).await.map(|ended| ended.clone());
        match ended {
            Ok(Some(Ended::Stopped)) => Ok(()),
            Ok(Some(other)) => Err(other),
            Ok(None) | Err(_) => Err(Ended::Panicked),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
        self.traces.iter().for_each(JoinHandle::abort);
        self.cluster.kill();
    }
}

async fn tick(cluster: ClusterHandle) {
    let mut ticks = tokio::time::interval(Duration::from_millis(TICK_MS));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        if !cluster.send(Message::Tick) {
            return;
        }
    }
}

/// The coordinator's own certificate, at two thirds of its life.
async fn renew_forever(
    authority: Arc<Authority>,
    credentials: Credentials,
    (dir, ttl): (PathBuf, Duration),
    metrics: Arc<Metrics>,
) {
    loop {
        metrics.expires("coordinator", credentials.expires_at());
        let wait = credentials.renew_at().duration_since(SystemTime::now()).unwrap_or_default();
        tokio::time::sleep(wait).await;
        let renewed = setup::renew(&authority, &credentials, &Subject::Coordinator, ttl)
            .and_then(|()| Ok(credentials.save(&dir)?));
        if let Err(error) = renewed {
            tracing::error!(%error, "renew the coordinator's certificate");
            tokio::time::sleep(RENEW_RETRY).await;
        }
    }
}

fn bind_error(error: TransportError) -> StartError {
    match error {
        TransportError::Bind { address, source } if source.kind() == std::io::ErrorKind::AddrInUse => {
            StartError::PortInUse { address }
        }
        other => other.into(),
    }
}

fn api_error(address: SocketAddr, error: std::io::Error) -> StartError {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => StartError::ApiPortInUse { address },
        _ => StartError::Api { address, source: error },
    }
}

fn metrics_error(address: SocketAddr, error: std::io::Error) -> StartError {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => StartError::MetricsPortInUse { address },
        _ => StartError::Metrics { address, source: error },
    }
}
