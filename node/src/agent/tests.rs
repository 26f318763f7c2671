//! A real agent with real processes, and a coordinator that the test plays over the loopback.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use stoke_protocol::identity::{Authority, Credentials, JoinToken, Subject, TokenSecret};
use stoke_protocol::ids::{ClusterId, Epoch, Generation, JobId, LogIndex, NodeId, Rank, Step, TokenId};
use stoke_protocol::message::join::JoinReply;
use stoke_protocol::message::node::{
    FromNode, Heartbeat, LogChunk, NodeHello, NodeReply, NodeRequest, ReadLog, Report, ToNode,
};
use stoke_protocol::message::rank::{Exit, Member, Membership, Purpose, RankEvent, RankId, StartFrom, StartRank};
use stoke_protocol::spec::JobSpec;
use stoke_protocol::transport::{Accepted, CloseCode, Connection, Endpoint, FrameReceiver, FrameSender, Io, Settings};
use tokio::time::timeout;

use super::{Agent, Running, join};
use crate::config::Config;

const HOUR: Duration = Duration::from_secs(3600);
const PATIENCE: Duration = Duration::from_secs(60);
const NODE: NodeId = NodeId(7);
const RANK: RankId = RankId { job: JobId(1), generation: Generation(1), rank: Rank(0) };

/// What this test binary does when an agent starts it as a rank; as a test it does nothing.
#[test]
fn rank_process() {
    if std::env::var_os(super::LINK_FD).is_some() {
        let script = std::env::var("STOKE_TEST_RANK").unwrap_or_default();
        println!("rank process with script {script:?}");
        if script.starts_with("deaf") {
            // Neither reads its link nor ends.
            loop {
                std::thread::park();
            }
        }
        let code = crate::worker::main(stoke_jobs::Trainers::BuiltIn);
        std::process::exit(i32::from(code != std::process::ExitCode::SUCCESS));
    }
}

/// The coordinator's side.
struct Coordinator {
    authority: Authority,
    credentials: Credentials,
    /// None between two lives.
    server: Option<Endpoint>,
    address: SocketAddr,
}

struct Session {
    connection: Connection,
    sender: FrameSender,
    receiver: FrameReceiver,
    hello: NodeHello,
}

impl Coordinator {
    fn start() -> Self {
        let authority = Authority::in_memory(ClusterId([1; 16])).unwrap();
        let credentials = authority.credentials(&Subject::Coordinator, HOUR).unwrap();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let server = serve(any, &credentials);
        let address = server.local_addr().unwrap();
        Self { authority, credentials, server: Some(server), address }
    }

    /// Lets the next joiner in as the node.
    async fn admit(&self, ttl: Duration) {
        let accept = timeout(PATIENCE, self.server.as_ref().unwrap().accept());
        let Ok(Some(Accepted::Join(attempt))) = accept.await else { panic!("expected a join") };
        let issued = self.authority.issue(&attempt.request().csr, &Subject::Node(NODE), ttl).unwrap();
        attempt.reply(&JoinReply::Accepted { certificate: issued.certificate.into() }).await.unwrap();
    }

    async fn session(&self, epoch: u64, index: u64) -> Session {
        let accept = async {
            let Some(Accepted::Session(connection)) = self.server.as_ref().unwrap().accept().await else {
                panic!("expected a session")
            };
            let (mut sender, mut receiver) = connection.accept_frames().await.unwrap();
            let FromNode::Hello(hello) = receiver.expect().await.unwrap() else { panic!("expected a hello") };
            let (epoch, index) = (Epoch(epoch), LogIndex(index));
            sender.send(&ToNode::Welcome { epoch, index, heartbeat_ms: 20, lease_ms: 3000 }).await.unwrap();
            Session { connection, sender, receiver, hello }
        };
        timeout(PATIENCE, accept).await.expect("no session")
    }
}

fn serve(address: SocketAddr, credentials: &Credentials) -> Endpoint {
    let io = Io::thread("stoke-test-net").unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Endpoint::server(&io, address, Settings::control(), credentials.clone()) {
            Ok(server) => return server,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::yield_now();
    }
}

impl Session {
    async fn tell(&mut self, frame: ToNode) {
        self.sender.send(&frame).await.unwrap();
    }

    /// The next report, acknowledged.
    async fn report(&mut self) -> Report {
        let report = self.unacknowledged().await;
        let index = LogIndex(100 + report.sequence);
        self.tell(ToNode::Acknowledge { sequence: report.sequence, index }).await;
        report
    }

    async fn unacknowledged(&mut self) -> Report {
        loop {
            match timeout(PATIENCE, self.receiver.expect()).await.expect("the agent is silent").unwrap() {
                FromNode::Report(report) => return report,
                FromNode::Progress { .. } | FromNode::Load { .. } | FromNode::Demand(_) | FromNode::Timed { .. } => {}
                FromNode::Hello(hello) => panic!("a second {hello:?}"),
                FromNode::Swept { job, .. } => panic!("nobody asked for a sweep of {job}"),
                FromNode::Surveyed { survey, .. } => panic!("nobody asked for {survey:?}"),
            }
        }
    }

    async fn exit(&mut self) -> Exit {
        loop {
            if let RankEvent::Exited { exit } = self.report().await.event {
                return exit;
            }
        }
    }

    /// Answers the rank's signing request and waits until it listens.
    async fn ready(&mut self, authority: &Authority) -> SocketAddr {
        let request = timeout(PATIENCE, self.connection.accept_request()).await.expect("no signing request").unwrap();
        let (request, reply) = request.read::<NodeRequest>().await.unwrap();
        let NodeRequest::SignRank { id, csr } = request else { panic!("expected a signing request") };
        let subject = Subject::Rank { job: id.job, generation: id.generation, rank: id.rank };
        let issued = authority.issue(&csr, &subject, HOUR).unwrap();
        reply.send(&NodeReply::Certificate { certificate: issued.certificate.into() }).await.unwrap();
        match self.report().await.event {
            RankEvent::Ready { address } => address,
            other => panic!("expected ready, got {other:?}"),
        }
    }
}

/// An agent that has joined, with a data set for its ranks.
struct Node {
    dir: tempfile::TempDir,
    config: Config,
}

impl Node {
    async fn join(coordinator: &Coordinator) -> Self {
        Self::join_for(coordinator, HOUR).await
    }

    async fn join_for(coordinator: &Coordinator, ttl: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut csv = std::fs::File::create(dir.path().join("domains.csv")).unwrap();
        writeln!(csv, "domain,label,registered").unwrap();
        for i in 0..60 {
            writeln!(csv, "garden{i}.example{i}.com,benign,example{i}.com\nlogin-{i}.bank{i}.top,phishing,bank{i}.top")
                .unwrap();
        }
        let mut config = Config::new(dir.path().join("node"), vec![coordinator.address.to_string()]);
        let own = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
        config.worker_command =
            [&own, "--exact", "agent::tests::rank_process", "--nocapture"].map(ToOwned::to_owned).to_vec();
        config.stop_grace_ms = 300;
        let token = JoinToken {
            ca_hash: coordinator.authority.ca_hash(),
            id: TokenId(1),
            secret: TokenSecret::from_bytes([3; 16]),
        };
        let address = coordinator.address.to_string();
        let (joined, ()) = tokio::join!(join(&config.dir, &address, &token, "n7"), coordinator.admit(ttl));
        assert_eq!(joined.unwrap(), NODE);
        // Again with the same token: it is in already, nobody is asked.
        assert_eq!(join(&config.dir, &address, &token, "n7").await.unwrap(), NODE);
        let other = JoinToken { ca_hash: stoke_protocol::ids::Digest([9; 32]), ..token };
        assert!(join(&config.dir, &address, &other, "n7").await.unwrap_err().to_string().contains("another cluster"));
        Self { dir, config }
    }

    async fn start(&self) -> Running {
        Agent::start(self.config.clone()).await.unwrap()
    }

    fn rank(&self, id: RankId, steps: u64) -> ToNode {
        let data = self.dir.path().join("domains.csv");
        let text = format!(
            "name = \"t\"\ntrainer = \"domains\"\n[train]\nsteps = {steps}\nbatch = 16\n[resources]\nmemory = \"64MiB\"\n\
             [data]\ntrain = {data:?}\nregistered = \"registered\"\n[model]\nlength = 24\nembedding = 4\nwidths = [3]\nchannels = 8\nhidden = 8\n"
        );
        let spec = JobSpec::parse(&text).unwrap().to_toml();
        let checkpoints = format!("file://{}/checkpoints", self.dir.path().display());
        ToNode::Start(StartRank { id, spec, checkpoints, from: StartFrom::Seed, memory_bytes: 1 << 20 })
    }
}

/// A generation of the one rank.
fn alone(address: std::net::SocketAddr) -> ToNode {
    let (members, joining) = (vec![Member { id: RANK, address }].into(), vec![].into());
    let membership = Membership {
        generation: RANK.generation,
        members,
        joining,
        after: None,
        ballot: 0,
        purpose: Purpose::Train,
        restarts: 0,
    };
    ToNode::Membership { id: RANK, membership }
}

/// Of this run of the tests: the ranks of another are not to be found.
fn deaf_marker() -> String {
    format!("STOKE_TEST_RANK=deaf-{}", std::process::id())
}

/// The process that the agent under test started for a deaf rank. Other tests have ranks too.
fn deaf_rank() -> Option<rustix::process::Pid> {
    let marker = deaf_marker();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes.map(|process| process.path()).find_map(|process| {
        let environment = std::fs::read(process.join("environ")).ok()?;
        let deaf = environment.split(|byte| *byte == 0).any(|variable| variable == marker.as_bytes());
        let score = std::fs::read_to_string(process.join("oom_score_adj")).ok()?;
        let pid = process.file_name()?.to_str()?.parse().ok()?;
        (deaf && score.trim() == "500").then(|| rustix::process::Pid::from_raw(pid)).flatten()
    })
}

async fn log_of(session: &Session, follow: bool) -> Vec<String> {
    let request = ReadLog { id: RANK, tail: None, follow };
    let mut chunks = session.connection.request_frames(&request).await.unwrap();
    let mut lines = Vec::new();
    loop {
        let chunk: LogChunk = timeout(PATIENCE, chunks.expect()).await.expect("the log does not end").unwrap();
        lines.extend(chunk.lines.0);
        if chunk.last {
            return lines;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_is_started_trains_is_logged_and_released() {
    let coordinator = Coordinator::start();
    let node = Node::join(&coordinator).await;
    let agent = node.start().await;
    let mut session = coordinator.session(1, 1).await;
    assert_eq!((session.hello.node, session.hello.ranks.len()), (NODE, 0));
    let incarnation = session.hello.incarnation;
    assert!(session.hello.capacity.cpus > 0);
    session.tell(node.rank(RANK, 4)).await;
    let address = session.ready(&coordinator.authority).await;
    session.tell(alone(address)).await;
    assert!(matches!(session.report().await.event, RankEvent::Resumed { step: Step(0), .. }));
    let RankEvent::ShardStored { generation, step: Step(4), shard, .. } = session.report().await.event else {
        panic!("a shard")
    };
    session.tell(ToNode::Commit { id: RANK, generation, step: Step(4), shards: vec![shard].into() }).await;
    let RankEvent::ManifestStored { uri, .. } = session.report().await.event else { panic!("a manifest") };
    assert_eq!(crate::checkpoint::verify(&uri, None).unwrap().manifest.step, Step(4));
    session.tell(ToNode::Committed { id: RANK, step: Step(4), keep: vec![].into() }).await;
    assert!(matches!(session.report().await.event, RankEvent::Finished { .. }));
    session.tell(ToNode::Release { id: RANK }).await;
    assert_eq!(session.exit().await, Exit::Code(0));
    let lines = log_of(&session, true).await;
    assert!(lines.iter().any(|line| line.contains("rank process")), "{lines:?}");
    let heartbeat: Heartbeat = session.connection.recv_datagram().await.unwrap();
    assert_eq!(heartbeat.incarnation, incarnation);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_rank_is_reported_within_a_moment_and_a_deaf_one_is_killed_after_its_grace() {
    let coordinator = Coordinator::start();
    let mut node = Node::join(&coordinator).await;
    node.config.worker_command.insert(0, "env".into());
    node.config.worker_command.insert(1, deaf_marker());
    let agent = node.start().await;
    let mut session = coordinator.session(1, 1).await;
    session.tell(node.rank(RANK, 4)).await;
    let deadline = Instant::now() + PATIENCE;
    let pid = loop {
        assert!(Instant::now() < deadline, "no process");
        if let Some(pid) = deaf_rank() {
            break pid;
        }
        tokio::task::yield_now().await;
    };
    let begun = Instant::now();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(session.exit().await, Exit::Signal(9));
    println!("killed rank reported after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(10));

    let second = RankId { generation: Generation(2), ..RANK };
    session.tell(node.rank(second, 4)).await;
    let begun = Instant::now();
    session.tell(ToNode::Stop { id: second, reason: "test".into(), grace_ms: 100 }).await;
    assert_eq!(session.exit().await, Exit::Signal(9));
    assert!(begun.elapsed() >= Duration::from_millis(100));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_outlive_their_coordinator_and_an_agent_leaves_none_behind() {
    let mut coordinator = Coordinator::start();
    let node = Node::join(&coordinator).await;
    let agent = node.start().await;
    let mut session = coordinator.session(4, 10).await;
    session.tell(node.rank(RANK, 1_000_000)).await;
    let address = session.ready(&coordinator.authority).await;
    session.tell(alone(address)).await;
    // The coordinator is gone, without a word to the rank, and comes back with a higher epoch on the same address.
    coordinator.server.take().unwrap().close(CloseCode::ShuttingDown, "test").await;
    drop(session);
    coordinator.server = Some(serve(coordinator.address, &coordinator.credentials));
    let session = coordinator.session(5, 200).await;
    assert_eq!(session.hello.epoch_seen, Epoch(4));
    assert!(session.hello.ranks[0].alive && session.hello.ranks[0].id == RANK, "{:?}", session.hello.ranks);
    let incarnation = session.hello.incarnation;
    // Its welcome has arrived when heartbeats come. An older one is not obeyed.
    let _: Heartbeat = session.connection.recv_datagram().await.unwrap();
    session.connection.close(CloseCode::ShuttingDown, "test");
    let old = coordinator.session(4, 300).await;
    let closed = timeout(PATIENCE, old.connection.closed()).await.unwrap();
    assert!(closed.to_string().contains("old coordinator"), "{closed}");
    let mut session = coordinator.session(5, 300).await;
    assert_eq!(session.hello.epoch_seen, Epoch(5));
    let _: Heartbeat = session.connection.recv_datagram().await.unwrap();
    let stopped = tokio::spawn(async move {
        let exit = session.exit().await;
        (exit, session)
    });
    let begun = Instant::now();
    agent.stop().await;
    println!("agent stopped after {:?}", begun.elapsed());
    let (exit, _session) = timeout(PATIENCE, stopped).await.unwrap().unwrap();
    assert_eq!(exit, Exit::AgentStopped);
    // A new life of the same node, on the same folder.
    let agent = node.start().await;
    let session = coordinator.session(5, 300).await;
    assert!(session.hello.incarnation > incarnation && session.hello.ranks.is_empty());
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_certificate_is_renewed_while_the_session_lives_and_kept() {
    let coordinator = Coordinator::start();
    // Certificates begin in the past, by the clocks' tolerance: two thirds of a life of a minute are over at once.
    let node = Node::join_for(&coordinator, Duration::from_secs(60)).await;
    let identity = super::identity_dir(&node.config.dir);
    let before = Credentials::load(&identity).unwrap().expires_at();
    let agent = node.start().await;
    let session = coordinator.session(1, 1).await;
    let request = timeout(PATIENCE, session.connection.accept_request()).await.expect("no renewal").unwrap();
    let (request, reply) = request.read::<NodeRequest>().await.unwrap();
    let NodeRequest::Renew { csr } = request else { panic!("expected a renewal, got {request:?}") };
    let issued = coordinator.authority.issue(&csr, &Subject::Node(NODE), HOUR).unwrap();
    reply.send(&NodeReply::Certificate { certificate: issued.certificate.into() }).await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    while Credentials::load(&identity).unwrap().expires_at() <= before {
        assert!(Instant::now() < deadline, "the new certificate was not kept");
        tokio::task::yield_now().await;
    }
    // The session is the same one.
    let _: Heartbeat = session.connection.recv_datagram().await.unwrap();
    agent.stop().await;
}
