//! The shell in a simulation: the real coordinator and real agents, actors, sessions and QUIC included, on turmoil's network and clock. Nodes
//! join by token, a job runs to its end, while packets are lost and doubled, the coordinator crashes and a node is cut off. Every packet and
//! event of a seed is the same in every run.

mod rank;
mod socket;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use stoke_coordinator::journal::ModelLog;
use stoke_coordinator::state::Time;
use stoke_coordinator::{Config, Coordinator, Environment, JournalMode};
use stoke_node::agent::{self, Agent, identity_dir};
use stoke_protocol::identity::{Authority, Credentials, JoinToken, KeyRequest, Subject, TokenSecret, UserRole};
use stoke_protocol::ids::{ClusterId, Digest};
use stoke_protocol::message::client::{JobState, JobView, Reply, Request, TokenScope};
use stoke_protocol::message::join::Wants;
use stoke_protocol::message::node::Capacity;
use stoke_protocol::transport::{Bind, Connection, Endpoint, Io, Settings, TransportError};
use tokio::sync::watch;

use rank::SimulatedRanks;
use socket::{SimulatedSocket, Trace};

const PORT: u16 = 7500;
const HOUR: Duration = Duration::from_secs(3_600);
const NODES: u64 = 3;
/// Simulated time that a run may take.
const RUN_MAX: Duration = Duration::from_secs(180);
const ASK_MAX: Duration = Duration::from_secs(3);
const SPEC: &str = "name = \"shell\"\ntrainer = \"digits\"\n[train]\nsteps = 60\nbatch = 8\n[resources]\nranks = 3\ncpus = 2\n\
memory = \"1GiB\"\n[checkpoint]\nevery = 10\nkeep = 2\n[restart]\nattempts = 5\n";

/// What happens to the cluster while the job runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Trouble {
    /// Packets are lost and doubled, nothing else.
    Loss,
    /// The coordinator's process dies and is back soon.
    Crash,
    /// A node is cut off for less than lease and grace.
    ShortCut,
    /// A node is cut off until it is taken as lost.
    LongCut,
}

/// What is shared by the hosts of a run.
#[derive(Clone)]
struct Stage {
    run: u64,
    loss: f64,
    trace: Trace,
    authority: Arc<Authority>,
    log: ModelLog,
    dir: PathBuf,
    tokens: Arc<Mutex<Vec<Option<JoinToken>>>>,
    sockets: Arc<AtomicU64>,
}

impl Stage {
    /// A socket of this host, whose losses and choices are the run's.
    async fn bind(&self, port: u16) -> Bind {
        let number = self.sockets.fetch_add(1, Ordering::SeqCst);
        let seed = rank::seed(self.run, number);
        let socket = SimulatedSocket::bind(port, &self.trace, (seed, self.loss)).await;
        Bind::Socket { socket, seed }
    }
}

async fn coordinate(stage: Stage) -> turmoil::Result {
    stage.log.crash();
    let secrets = AtomicU64::new(0);
    let run = stage.run;
    let secret = move || {
        let number = secrets.fetch_add(1, Ordering::SeqCst);
        let bytes = rank::seed(run, 1_000_000 + number);
        TokenSecret::from_bytes(bytes[..16].try_into().expect("16 of 32 bytes"))
    };
    let wall = || Time(1_700_000_000_000 + turmoil::sim_elapsed().unwrap_or_default().as_millis() as u64);
    let environment = Environment {
        wall: Arc::new(wall),
        bind: stage.bind(PORT).await,
        io: Io::ambient()?,
        log: Box::new(stage.log.clone()),
        journal: JournalMode::Inline,
        authority: stage.authority.clone(),
        credentials: stage.authority.credentials(&Subject::Coordinator, HOUR)?,
        secret: Arc::new(secret),
    };
    let mut config = Config::new("/simulated", SocketAddr::from(([0, 0, 0, 0], PORT)));
    config.timings.failover_grace_ms = 10_000;
    let running = Coordinator::start_in(config, environment).await?;
    stage.trace.note("coordinator runs".into());
    running.wait().await?;
    Ok(())
}

async fn follow(number: u64, stage: Stage) -> turmoil::Result {
    let address = SocketAddr::new(turmoil::lookup("coordinator"), PORT);
    let dir = stage.dir.join(format!("node{number}"));
    let credentials = identity_dir(&dir);
    while Credentials::load(&credentials).is_err() {
        let token = stage.tokens.lock().expect("nobody panics with it")[number as usize].clone();
        if let Some(token) = token {
            let stranger = Endpoint::stranger(&Io::ambient()?, stage.bind(0).await)?;
            let wants = Wants::Node { name: format!("node{number}") };
            match stranger.join(address, &token, wants, KeyRequest::new()?).await {
                Ok(joined) => joined.save(&credentials)?,
                Err(error) => stage.trace.note(format!("node{number} has not joined: {error}")),
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let environment = agent::Environment {
        io: Io::ambient()?,
        bind: stage.bind(0).await,
        spawner: Arc::new(SimulatedRanks::new(stage.trace.clone())),
        capacity: Capacity { cpus: 2, memory_bytes: 4 << 30, ..Capacity::default() },
        shards: None,
        measure: false,
        has_threads: false,
        gateway: None,
    };
    let mut config = stoke_node::Config::new(&dir, vec![address.to_string()]);
    config.name = format!("node{number}");
    config.listen_ip = Some(turmoil::lookup(format!("node{number}")));
    let running = Agent::start_in(config, environment).await?;
    stage.trace.note(format!("agent of {} runs", running.node()));
    let ended = running.wait().await;
    Err(format!("the agent of node{number} has ended: {ended:?}").into())
}

/// A user's connection, made again whenever it breaks.
struct User {
    endpoint: Endpoint,
    address: SocketAddr,
    connection: Option<Connection>,
}

impl User {
    async fn new(stage: &Stage) -> Result<Self, Box<dyn std::error::Error>> {
        let subject = Subject::user(UserRole::Admin, "admin")?;
        let credentials = stage.authority.credentials(&subject, HOUR)?;
        let endpoint = Endpoint::client(&Io::ambient()?, stage.bind(0).await, Settings::control(), credentials)?;
        let address = SocketAddr::new(turmoil::lookup("coordinator"), PORT);
        Ok(Self { endpoint, address, connection: None })
    }

    /// Until it is answered: an answer that does not come is unknown, so what is asked must bear to be asked twice (I9).
    async fn ask(&mut self, request: Request) -> Reply {
        loop {
            match self.try_ask(&request).await {
                Ok(reply) => return reply,
                Err(_) => self.connection = None,
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn try_ask(&mut self, request: &Request) -> Result<Reply, TransportError> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.endpoint.connect(self.address, &Subject::Coordinator).await?,
        };
        self.connection.insert(connection).request(request, ASK_MAX).await
    }
}

async fn use_cluster(stage: Stage, seen: watch::Sender<Option<JobView>>) -> turmoil::Result {
    let mut user = User::new(&stage).await?;
    for number in 1..=NODES {
        let request = Request::TokenCreate { scope: TokenScope::Node, ttl_seconds: 600 };
        let Reply::Token { text, .. } = user.ask(request).await else { return Err("no token".into()) };
        stage.tokens.lock().expect("nobody panics with it")[number as usize] = Some(text.parse()?);
    }
    let request = Request::Submit { key: "once".into(), spec: SPEC.into() };
    let Reply::Submitted { job, .. } = user.ask(request).await else { return Err("not submitted".into()) };
    stage.trace.note(format!("{job} submitted"));
    loop {
        let Reply::Job(view) = user.ask(Request::Job { job }).await else {
            return Err("an acknowledged job is gone".into());
        };
        let ended = view.state.is_terminal();
        stage.trace.note(format!("{job} is {:?} in {}", view.state, view.generation));
        seen.send_replace(Some(*view));
        if ended {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// One run: its trace, and how the job ended.
fn simulate(run: u64, trouble: Trouble) -> (Vec<String>, JobView) {
    let dir = tempfile::tempdir().expect("a folder for the nodes");
    let stage = Stage {
        run,
        loss: 0.02,
        trace: Trace::default(),
        authority: Arc::new(Authority::in_memory(ClusterId([3; 16])).expect("an authority")),
        log: ModelLog::default(),
        dir: dir.path().to_owned(),
        tokens: Arc::new(Mutex::new(vec![None; NODES as usize + 1])),
        sockets: Arc::default(),
    };
    let mut sim = turmoil::Builder::new()
        .rng_seed(run)
        .simulation_duration(RUN_MAX)
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(20))
        .udp_capacity(4096)
        .build();
    let own = stage.clone();
    sim.host("coordinator", move || coordinate(own.clone()));
    for number in 1..=NODES {
        let own = stage.clone();
        sim.host(format!("node{number}"), move || follow(number, own.clone()));
    }
    let (seen, mut view) = watch::channel(None);
    sim.client("user", use_cluster(stage.clone(), seen));
    let running = |view: &Option<JobView>| view.as_ref().is_some_and(|view| view.state == JobState::Running);
    let (mut since, mut step) = (None, 0u64);
    loop {
        step += 1;
        if since.is_none() && running(&view.borrow_and_update()) {
            since = Some(step);
        }
        // A step is a millisecond of simulated time.
        match (trouble, since.map(|since| step - since)) {
            (Trouble::Crash, Some(300)) => sim.crash("coordinator"),
            (Trouble::Crash, Some(1_500)) => sim.bounce("coordinator"),
            (Trouble::ShortCut | Trouble::LongCut, Some(300)) => sim.partition("node1", "coordinator"),
            (Trouble::ShortCut, Some(2_300)) | (Trouble::LongCut, Some(15_000)) => sim.repair("node1", "coordinator"),
            _ => {}
        }
        if sim.step().expect("no host fails") {
            break;
        }
    }
    drop(sim);
    let ended = view.borrow_and_update().clone().expect("the job was seen");
    (stage.trace.take(), ended)
}

fn holds(run: u64, trouble: Trouble) -> JobView {
    let (first, ended) = simulate(run, trouble);
    let (second, _) = simulate(run, trouble);
    if let Some(at) = (0..first.len().max(second.len())).find(|at| first.get(*at) != second.get(*at)) {
        let around = &first[at.saturating_sub(5)..at.min(first.len())];
        panic!("{trouble:?} {run}: line {at} differs: {:?} / {:?}, after {around:#?}", first.get(at), second.get(at));
    }
    println!("{trouble:?} {run}: {} lines, {:?} in {}", first.len(), ended.state, ended.generation);
    assert_eq!(ended.state, JobState::Succeeded, "{}", ended.reason);
    let outcome = ended.outcome.as_ref().expect("a job that succeeded has an outcome");
    assert_eq!(outcome.weights_blake3, Digest([1; 32]));
    ended
}

#[test]
fn a_job_runs_to_its_end_over_a_network_that_loses_and_doubles_packets() {
    for run in 0..3 {
        assert_eq!(holds(run, Trouble::Loss).generation.0, 1);
    }
}

#[test]
fn ranks_go_on_while_the_coordinator_is_dead_and_are_adopted_when_it_is_back() {
    for run in 0..3 {
        assert_eq!(holds(run, Trouble::Crash).generation.0, 1, "no rank was started again");
    }
}

#[test]
fn a_short_partition_costs_no_generation() {
    assert_eq!(holds(0, Trouble::ShortCut).generation.0, 1);
}

#[test]
fn a_node_that_is_cut_off_for_too_long_costs_one_generation_and_no_result() {
    let ended = holds(0, Trouble::LongCut);
    assert!(ended.generation.0 >= 2, "{:?}", ended.generation);
}
