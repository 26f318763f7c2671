//! A real coordinator on the loopback, with users and a node that are played: the real transport, the real journal. What the control
//! machine decides is tested in `state/`; this is about what carries it.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stoke_coordinator::journal::ModelLog;
use stoke_coordinator::state::Time;
use stoke_coordinator::{Config, Coordinator, Ended, Environment, JournalMode, Running, StartError};
use stoke_protocol::identity::{Authority, Credentials, JoinToken, KeyRequest, Subject, TokenSecret, UserRole};
use stoke_protocol::ids::{ClusterId, Digest, Epoch, Generation, Incarnation, JobId, LogIndex, NodeId, Rank, Step};
use stoke_protocol::ledger::Ledger;
use stoke_protocol::message::client::{JobState, JobView, RefusalCode, Reply, Request, TokenScope};
use stoke_protocol::message::join::Wants;
use stoke_protocol::message::node::{
    Capacity, FromNode, Heartbeat, LogChunk, NodeHello, NodeReply, NodeRequest, ReadLog, Report, ToNode,
};
use stoke_protocol::message::rank::{Outcome, RankEvent, RankId};
use stoke_protocol::transport::{Connection, Endpoint, FrameReceiver, FrameSender, Io, Settings, TransportError};
use tempfile::TempDir;

const SPEC: &str = "name = \"j\"\ntrainer = \"domains\"\n[train]\nsteps = 10\nbatch = 8\n[resources]\nmemory = 1024\n";
const PATIENCE: Duration = Duration::from_secs(20);

fn any() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

fn config(dir: &Path) -> Config {
    Config { metrics: Some(any()), snapshot_entries: 4, ..Config::new(dir, any()) }
}

/// A folder's lock is free a moment after its holder was dropped.
async fn start(config: &Config) -> Running {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Coordinator::start(config.clone()).await {
            Ok(running) => return running,
            Err(error) if Instant::now() < deadline && error.is_conflict() => tokio::task::yield_now().await,
            Err(error) => panic!("{error:?}"),
        }
    }
}

async fn dial(credentials: &Credentials, address: SocketAddr) -> Connection {
    let io = Io::ambient().unwrap();
    let endpoint = Endpoint::client(&io, any(), Settings::control(), credentials.clone()).unwrap();
    endpoint.connect(address, &Subject::Coordinator).await.unwrap()
}

async fn admin(dir: &Path, address: SocketAddr) -> Connection {
    dial(&Credentials::load(&dir.join("admin")).unwrap(), address).await
}

async fn ask(user: &Connection, request: Request) -> Reply {
    user.request(&request, PATIENCE).await.unwrap()
}

async fn token(admin: &Connection, scope: TokenScope) -> JoinToken {
    match ask(admin, Request::TokenCreate { scope, ttl_seconds: 60 }).await {
        Reply::Token { text, .. } => text.parse().unwrap(),
        other => panic!("{other:?}"),
    }
}

async fn join(address: SocketAddr, token: &JoinToken, wants: Wants) -> Result<Credentials, TransportError> {
    let stranger = Endpoint::stranger(&Io::ambient().unwrap(), any()).unwrap();
    stranger.join(address, token, wants, KeyRequest::new().unwrap()).await
}

async fn submit(user: &Connection, key: &str) -> JobId {
    match ask(user, Request::Submit { key: key.into(), spec: SPEC.into() }).await {
        Reply::Submitted { job, .. } => job,
        other => panic!("{other:?}"),
    }
}

async fn job(user: &Connection, job: JobId) -> JobView {
    match ask(user, Request::Job { job }).await {
        Reply::Job(view) => *view,
        other => panic!("{other:?}"),
    }
}

/// An agent, as far as its coordinator can tell.
struct FakeNode {
    node: NodeId,
    connection: Connection,
    sender: FrameSender,
    receiver: FrameReceiver,
    sequence: u64,
}

impl FakeNode {
    async fn join(admin: &Connection, address: SocketAddr) -> Credentials {
        let token = token(admin, TokenScope::Node).await;
        join(address, &token, Wants::Node { name: "machine".into() }).await.unwrap()
    }

    async fn connect(credentials: &Credentials, address: SocketAddr) -> Self {
        let connection = dial(credentials, address).await;
        let identity = credentials.identity();
        let Subject::Node(node) = identity.subject else { panic!("{identity}") };
        let (mut sender, receiver) = connection.open_frames().await.unwrap();
        sender.send(&FromNode::Hello(hello(identity.cluster, node))).await.unwrap();
        let mut node = Self { node, connection, sender, receiver, sequence: 0 };
        assert!(matches!(node.next().await, ToNode::Welcome { .. }));
        node
    }

    /// The next frame but acknowledgements, and routes, of which there are none.
    async fn next(&mut self) -> ToNode {
        loop {
            let frame = tokio::time::timeout(PATIENCE, self.receiver.expect()).await.unwrap().unwrap();
            if !matches!(frame, ToNode::Acknowledge { .. } | ToNode::Routes(_)) {
                return frame;
            }
        }
    }

    async fn report(&mut self, id: RankId, event: RankEvent) {
        self.sequence += 1;
        let report = FromNode::Report(Report { sequence: self.sequence, id, event });
        self.sender.send(&report).await.unwrap();
    }

    async fn sign(&self, id: RankId) -> NodeReply {
        let csr = KeyRequest::new().unwrap().csr().to_vec().into();
        self.connection.request(&NodeRequest::SignRank { id, csr }, PATIENCE).await.unwrap()
    }
}

fn hello(cluster: ClusterId, node: NodeId) -> NodeHello {
    let capacity = Capacity { cpus: 4, memory_bytes: 1 << 30, ..Capacity::default() };
    NodeHello {
        cluster,
        node,
        name: "machine".into(),
        incarnation: Incarnation(1),
        session: 1,
        epoch_seen: Epoch(0),
        index_seen: LogIndex(0),
        capacity,
        gateway: None,
        ranks: Vec::new().into(),
    }
}

fn outcome() -> RankEvent {
    let outcome = Outcome {
        step: Step(10),
        loss: 0.25,
        samples: 80,
        ledger: Ledger { first: 0, end: 80 },
        skipped: 0,
        weights_blake3: Digest([7; 32]),
        metrics: [("accuracy".to_owned(), 0.5)].into(),
    };
    RankEvent::Finished { generation: Generation(1), outcome }
}

#[tokio::test]
async fn a_node_joins_gets_a_rank_and_the_job_succeeds() {
    let dir = TempDir::new().unwrap();
    let running = start(&config(dir.path())).await;
    let address = running.address();
    let user = admin(dir.path(), address).await;
    let credentials = FakeNode::join(&user, address).await;
    let mut node = FakeNode::connect(&credentials, address).await;
    let id = submit(&user, "k").await;
    let mut views = user.request_frames(&Request::Watch { job: id }).await.unwrap();

    let ToNode::Start(start) = node.next().await else { panic!("no start") };
    assert_eq!(start.id, RankId { job: id, generation: Generation(1), rank: Rank(0) });
    assert!(start.checkpoints.starts_with("file:///") && start.checkpoints.ends_with("/checkpoints/job-1"));
    assert!(matches!(node.sign(start.id).await, NodeReply::Certificate { .. }));
    let other = RankId { rank: Rank(1), ..start.id };
    assert!(matches!(node.sign(other).await, NodeReply::Refused { .. }), "I32: not placed here");
    node.report(start.id, RankEvent::Ready { address: any() }).await;
    assert!(matches!(node.next().await, ToNode::Membership { .. }));
    node.report(start.id, outcome()).await;
    assert!(matches!(node.next().await, ToNode::Release { .. }));

    let mut last = None;
    while let Some(Reply::Job(view)) = views.recv().await.unwrap() {
        last = Some(view);
    }
    let last = last.unwrap();
    assert_eq!(last.state, JobState::Succeeded);
    assert_eq!(last.outcome.unwrap().metrics["accuracy"], 0.5);
    running.stop().await;
}

#[tokio::test]
async fn a_coordinator_that_dies_comes_back_with_everything_it_acknowledged() {
    let dir = TempDir::new().unwrap();
    let running = start(&config(dir.path())).await;
    let user = admin(dir.path(), running.address()).await;
    let mut ids = Vec::new();
    for number in 0..20 {
        ids.push(submit(&user, &number.to_string()).await);
    }
    drop(running);

    let running = start(&config(dir.path())).await;
    let user = admin(dir.path(), running.address()).await;
    for (number, id) in ids.iter().enumerate() {
        let again = ask(&user, Request::Submit { key: number.to_string(), spec: SPEC.into() }).await;
        assert_eq!(again, Reply::Submitted { job: *id, created: false }, "I6, I7");
    }
    let Reply::Cluster(view) = ask(&user, Request::Cluster).await else { panic!() };
    assert_eq!((view.epoch, view.jobs_queued), (Epoch(2), 20));
    assert_eq!(view.you, "user/admin/admin");
    running.stop().await;
}

#[tokio::test]
async fn a_running_rank_outlives_its_coordinator() {
    let dir = TempDir::new().unwrap();
    let running = start(&config(dir.path())).await;
    let user = admin(dir.path(), running.address()).await;
    let credentials = FakeNode::join(&user, running.address()).await;
    let mut node = FakeNode::connect(&credentials, running.address()).await;
    let id = submit(&user, "k").await;
    let ToNode::Start(start_rank) = node.next().await else { panic!("no start") };
    node.report(start_rank.id, RankEvent::Ready { address: any() }).await;
    assert!(matches!(node.next().await, ToNode::Membership { .. }));
    drop(running);

    let running = start(&config(dir.path())).await;
    let user = admin(dir.path(), running.address()).await;
    assert_eq!(job(&user, id).await.state, JobState::Running);
    let connection = dial(&credentials, running.address()).await;
    let (mut sender, mut receiver) = connection.open_frames().await.unwrap();
    let mut hello = hello(credentials.identity().cluster, node.node);
    let rank = stoke_protocol::message::node::RankInventory { id: start_rank.id, alive: true, step: Step(3) };
    hello.ranks = vec![rank].into();
    (hello.session, hello.epoch_seen) = (2, Epoch(1));
    sender.send(&FromNode::Hello(hello)).await.unwrap();
    assert!(matches!(receiver.expect().await.unwrap(), ToNode::Welcome { epoch: Epoch(2), .. }));
    assert!(matches!(receiver.expect().await.unwrap(), ToNode::Membership { .. }));
    assert!(matches!(receiver.expect().await.unwrap(), ToNode::Routes(_)));
    // The first report of this incarnation was acknowledged by the coordinator that died; the next one ends the job.
    sender.send(&FromNode::Report(Report { sequence: 2, id: start_rank.id, event: outcome() })).await.unwrap();
    assert!(matches!(receiver.expect().await.unwrap(), ToNode::Acknowledge { sequence: 2, .. }));
    assert_eq!(job(&user, id).await.state, JobState::Succeeded);
    running.stop().await;
}

#[tokio::test]
async fn tokens_let_in_once_and_roles_are_held() {
    let dir = TempDir::new().unwrap();
    let running = start(&config(dir.path())).await;
    let address = running.address();
    let user = admin(dir.path(), address).await;
    let viewer_token = token(&user, TokenScope::Viewer).await;
    let viewer = join(address, &viewer_token, Wants::User { name: "ada".into() }).await.unwrap();
    let again = join(address, &viewer_token, Wants::User { name: "eve".into() }).await;
    assert!(
        matches!(&again, Err(TransportError::JoinRefused { reason }) if reason.contains("used already")),
        "{again:?}"
    );
    let as_node = join(address, &token(&user, TokenScope::Viewer).await, Wants::Node { name: "n".into() }).await;
    assert!(matches!(&as_node, Err(TransportError::JoinRefused { reason }) if reason.contains("for a user")));

    let viewer = dial(&viewer, address).await;
    assert!(matches!(ask(&viewer, Request::Jobs).await, Reply::Jobs(_)));
    let refused = ask(&viewer, Request::Submit { key: "k".into(), spec: SPEC.into() }).await;
    assert!(matches!(refused, Reply::Refused(refusal) if refusal.code == RefusalCode::Forbidden));
    let renewed = ask(&viewer, Request::Renew { csr: KeyRequest::new().unwrap().csr().to_vec().into() }).await;
    assert!(matches!(renewed, Reply::Certificate { .. }));
    running.stop().await;
}

#[tokio::test]
async fn logs_are_relayed_from_the_node_until_the_last_chunk() {
    let dir = TempDir::new().unwrap();
    let running = start(&config(dir.path())).await;
    let user = admin(dir.path(), running.address()).await;
    let credentials = FakeNode::join(&user, running.address()).await;
    let mut node = FakeNode::connect(&credentials, running.address()).await;
    let id = submit(&user, "k").await;
    assert!(matches!(node.next().await, ToNode::Start(_)));
    let request = Request::Logs { job: id, rank: None, tail: Some(5), follow: false };
    let mut chunks = user.request_frames(&request).await.unwrap();
    let (question, reply) = node.connection.accept_request().await.unwrap().read::<ReadLog>().await.unwrap();
    assert_eq!((question.tail, question.follow), (Some(5), false));
    let lines = vec!["one".to_owned(), "two".to_owned()].into();
    reply.send(&LogChunk { id: question.id, lines, last: true }).await.unwrap();
    let Reply::Log(first) = chunks.expect().await.unwrap() else { panic!() };
    assert_eq!((first.lines.len(), first.last), (2, false));
    let Reply::Log(last) = chunks.expect().await.unwrap() else { panic!() };
    assert!(last.last && last.lines.is_empty());
    assert_eq!(chunks.recv::<Reply>().await.unwrap(), None);
    running.stop().await;
}

#[tokio::test]
async fn a_second_coordinator_and_a_taken_port_are_told_apart() {
    let dir = TempDir::new().unwrap();
    let running = start(&config(dir.path())).await;
    let second = Coordinator::start(config(dir.path())).await.err().expect("the folder is taken");
    assert!(matches!(second, StartError::Journal(_)) && second.is_conflict());
    let elsewhere = TempDir::new().unwrap();
    let taken = Coordinator::start(Config { listen: running.address(), ..config(elsewhere.path()) }).await;
    let taken = taken.err().expect("the port is taken");
    assert!(matches!(&taken, StartError::PortInUse { address } if *address == running.address()), "{taken:?}");
    let metrics = running.metrics_address();
    let elsewhere = TempDir::new().unwrap();
    let taken = Coordinator::start(Config { metrics, ..config(elsewhere.path()) }).await;
    assert!(matches!(taken.err(), Some(StartError::MetricsPortInUse { .. })));
    running.stop().await;
}

#[tokio::test]
async fn a_silent_node_shows_as_silent_and_heartbeats_keep_it_up() {
    use stoke_protocol::message::client::NodeState;
    let dir = TempDir::new().unwrap();
    let mut config = config(dir.path());
    config.timings.lease_ms = 300;
    let running = start(&config).await;
    let user = admin(dir.path(), running.address()).await;
    let credentials = FakeNode::join(&user, running.address()).await;
    let node = FakeNode::connect(&credentials, running.address()).await;
    let deadline = Instant::now() + PATIENCE;
    let mut seen = Vec::new();
    let mut sequence = 0;
    while seen != [NodeState::Up, NodeState::Silent, NodeState::Up] {
        assert!(Instant::now() < deadline, "{seen:?}");
        let Reply::Nodes(nodes) = ask(&user, Request::Nodes).await else { panic!() };
        if seen.last() != Some(&nodes[0].state) {
            seen.push(nodes[0].state);
        }
        if seen.len() >= 2 {
            sequence += 1;
            let incarnation = Incarnation(1);
            let heartbeat = Heartbeat {
                incarnation,
                sequence,
                cpu_used: 0.5,
                memory_used_bytes: 1,
                routes: LogIndex(0),
                leaving: 0,
                heat: Default::default(),
            };
            node.connection.send_datagram(&heartbeat).unwrap();
        }
    }
    running.stop().await;
}

#[tokio::test]
async fn metrics_and_health_answer_over_http() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let dir = TempDir::new().unwrap();
    let running = start(&config(dir.path())).await;
    let address = running.metrics_address().unwrap();
    let mut answers = Vec::new();
    for path in ["/metrics", "/healthz"] {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answers.push(answer);
    }
    assert!(answers[0].contains("stoke_epoch 1"), "{}", answers[0]);
    assert!(answers[1].starts_with("HTTP/1.1 200") && answers[1].ends_with("ok\n"), "{}", answers[1]);
    running.stop().await;
}

/// A coordinator on a model disk, as a simulation starts it: no folder, no thread.
async fn start_on(log: &ModelLog, authority: &Arc<Authority>) -> Running {
    let environment = Environment {
        wall: Arc::new(|| Time(1_000_000)),
        bind: any().into(),
        io: Io::ambient().unwrap(),
        log: Box::new(log.clone()),
        journal: JournalMode::Inline,
        authority: authority.clone(),
        credentials: authority.credentials(&Subject::Coordinator, PATIENCE * 60).unwrap(),
        secret: Arc::new(|| TokenSecret::from_bytes([7; 16])),
    };
    Coordinator::start_in(Config::new("/nowhere", any()), environment).await.unwrap()
}

#[tokio::test]
async fn a_coordinator_on_a_model_disk_recovers_from_it() {
    let log = ModelLog::default();
    let authority = Arc::new(Authority::in_memory(ClusterId([3; 16])).unwrap());
    let admin = Subject::user(UserRole::Admin, "admin").unwrap();
    let credentials = authority.credentials(&admin, PATIENCE * 60).unwrap();
    let running = start_on(&log, &authority).await;
    let id = submit(&dial(&credentials, running.address()).await, "k").await;
    drop(running);
    log.crash();
    let running = start_on(&log, &authority).await;
    let user = dial(&credentials, running.address()).await;
    assert_eq!(submit(&user, "k").await, id);
    let Reply::Cluster(view) = ask(&user, Request::Cluster).await else { panic!() };
    assert_eq!(view.epoch, Epoch(2));
    running.stop().await;
}

#[tokio::test]
async fn a_disk_without_room_refuses_jobs_until_there_is_room_again() {
    let log = ModelLog::default();
    let authority = Arc::new(Authority::in_memory(ClusterId([3; 16])).unwrap());
    let admin = Subject::user(UserRole::Admin, "admin").unwrap();
    let credentials = authority.credentials(&admin, PATIENCE * 60).unwrap();
    let running = start_on(&log, &authority).await;
    let user = dial(&credentials, running.address()).await;
    log.limit(70 * 1024);
    let try_submit = |number: u32| ask(&user, Request::Submit { key: number.to_string(), spec: SPEC.into() });
    let mut number = 0;
    let refusal = loop {
        number += 1;
        match try_submit(number).await {
            Reply::Submitted { .. } => {}
            Reply::Refused(refusal) => break refusal,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refusal.code, RefusalCode::Unavailable);
    assert!(refusal.message.starts_with("journal disk is full: 0 MiB free at /nowhere"), "{}", refusal.message);
    // What runs can still be ended.
    assert_eq!(ask(&user, Request::Cancel { job: JobId(1) }).await, Reply::Cancelled { job: JobId(1) });
    log.limit(1 << 30);
    let deadline = Instant::now() + PATIENCE;
    while !matches!(try_submit(number).await, Reply::Submitted { .. }) {
        assert!(Instant::now() < deadline, "room was not noticed");
    }
    // A disk that fails ends the coordinator: nothing is answered that is not durable.
    log.limit(0);
    let lost = user.request::<_, Reply>(&Request::Submit { key: "lost".into(), spec: SPEC.into() }, PATIENCE).await;
    assert!(!matches!(lost, Ok(Reply::Submitted { .. })), "{lost:?}");
    assert!(matches!(running.wait().await, Err(Ended::Journal(_))));
}

#[tokio::test]
async fn a_node_with_labels_that_break_lists_or_terminals_is_not_let_in() {
    let dir = TempDir::new().unwrap();
    let running = start(&config(dir.path())).await;
    let address = running.address();
    let user = admin(dir.path(), address).await;
    let fresh = token(&user, TokenScope::Node).await;
    let refused = join(address, &fresh, Wants::Node { name: "\u{1b}[2J".into() }).await.unwrap_err().to_string();
    assert!(refused.contains("control characters"), "{refused}");
    let credentials = FakeNode::join(&user, address).await;
    for labels in [vec![("big".to_owned(), "x".repeat(60_000))], vec![("zone".to_owned(), "a\n\u{1b}[31m".to_owned())]]
    {
        let connection = dial(&credentials, address).await;
        let identity = credentials.identity();
        let Subject::Node(node) = identity.subject else { panic!("{identity}") };
        let mut hello = hello(identity.cluster, node);
        hello.capacity.labels = labels.into();
        let (mut sender, _receiver) = connection.open_frames().await.unwrap();
        sender.send(&FromNode::Hello(hello)).await.unwrap();
        let closed = tokio::time::timeout(PATIENCE, connection.closed()).await.unwrap().to_string();
        assert!(closed.contains("label"), "{closed}");
    }
    let Reply::Nodes(nodes) = ask(&user, Request::Nodes).await else { panic!("no list") };
    assert!(nodes.iter().all(|node| node.capacity.labels.is_empty()), "{nodes:?}");
    running.stop().await;
}

#[tokio::test]
async fn a_spec_without_ranks_gets_one_a_node_and_its_key_holds_when_nodes_come() {
    let dir = TempDir::new().unwrap();
    let running = start(&config(dir.path())).await;
    let address = running.address();
    let user = admin(dir.path(), address).await;
    let first = FakeNode::connect(&FakeNode::join(&user, address).await, address).await;
    let id = submit(&user, "nightly").await;
    let second = FakeNode::connect(&FakeNode::join(&user, address).await, address).await;
    assert_eq!(submit(&user, "nightly").await, id);
    assert_eq!(job(&user, id).await.placement.len(), 1);
    let wide = submit(&user, "wide").await;
    assert_eq!(job(&user, wide).await.placement.len(), 2);
    drop((first, second));
    running.stop().await;
}

#[tokio::test]
async fn a_folder_without_its_journal_or_its_authority_is_refused_untouched() {
    let dir = TempDir::new().unwrap();
    start(&config(dir.path())).await.stop().await;
    let refused = |path: &'static str| {
        let (config, dir) = (config(dir.path()), dir.path().to_owned());
        async move {
            std::fs::rename(dir.join(path), dir.join("aside")).unwrap();
            for _ in 0..2 {
                let error = Coordinator::start(config.clone()).await.err().expect("it must not start");
                let error = std::error::Error::source(&error).expect("a cause").to_string();
                assert!(error.contains(path) && error.contains("backup"), "{error}");
                assert!(!dir.join(path).exists(), "{path} was made anew");
            }
            std::fs::rename(dir.join("aside"), dir.join(path)).unwrap();
        }
    };
    refused("journal.redb").await;
    refused("ca/ca.key").await;
    refused("ca/ca.pem").await;
    start(&config(dir.path())).await.stop().await;
}
