//! Golden scenarios: the control machine from the outside, a few nodes, and what must come of it. Tests only.

mod blame;
mod commands;
mod cutting;
mod draining;
mod playing;
mod pruning;
mod scaling;
mod serving;
mod training;
mod urgent;
mod wrong_numbers;

use std::net::SocketAddr;

use stoke_protocol::identity::{Subject, UserRole};
use stoke_protocol::ids::{
    ClusterId, Digest, Epoch, Fingerprint, Generation, Incarnation, JobId, LogIndex, NodeId, Rank, Step as TrainStep,
    TokenId,
};
use stoke_protocol::ledger::Ledger;
use stoke_protocol::message::client::{JobState, Refusal, RefusalCode, Reply, Request, TokenScope};
use stoke_protocol::message::join::Wants;
use stoke_protocol::message::node::{Capacity, Heartbeat, NodeHello, RankInventory, Report, ToNode};
use stoke_protocol::message::rank::{Exit, Membership, Origin, Outcome, RankEvent, RankId, ShardRecord, StartFrom};
use stoke_protocol::message::split::Surveyed;

use super::cluster::Cluster;
use super::control::{Control, Input, Options, SessionId, Step, Ticket};
use super::effect::{Effect, Member};
use super::event::Record;
use super::liveness::Timings;
use super::time::{Mono, Now, Time};

const CLUSTER: ClusterId = ClusterId([1; 16]);
const SECRET: Digest = Digest([9; 32]);

/// What every node says at once of a model that is named by a path.
const SMALL: Surveyed = Surveyed {
    layers: 2,
    layer_bytes: 1 << 20,
    embedding_bytes: 1 << 10,
    output_bytes: 0,
    kv_heads: 1,
    parts_max: 1,
    token_bytes: 64,
    context: 2048,
    vocabulary: 1024,
    layer_ns: 1_000_000,
};

struct World {
    control: Control,
    ms: u64,
    ticket: u64,
    session: u64,
    records: Vec<Record>,
    /// What each node was told, in order.
    told: Vec<(SessionId, ToNode)>,
    sequence: u64,
}

fn options() -> Options {
    let timings = Timings { failover_grace_ms: 1_000, ..Timings::default() };
    Options { timings, checkpoints: "file:///c".into(), version: "test".into(), ..Options::default() }
}

fn user(role: UserRole, name: &str) -> Subject {
    Subject::user(role, name).unwrap()
}

fn spec(more: &str) -> String {
    format!("name = \"j\"\ntrainer = \"domains\"\n[train]\nsteps = 10\nbatch = 8\n[resources]\nmemory = 1024\n{more}")
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            control: Control::new(Cluster::default(), options(), Now::default()),
            ms: 0,
            ticket: 0,
            session: 0,
            records: Vec::new(),
            told: Vec::new(),
            sequence: 0,
        };
        world.step(Input::Found { cluster: CLUSTER, admin: "admin".into() });
        world.step(Input::Start { version: "test".into() });
        world
    }

    fn now(&self) -> Now {
        Now { wall: Time(1_000_000 + self.ms), mono: Mono(self.ms) }
    }

    /// Time passes until `ms`, and only these are heard.
    fn pass(&mut self, ms: u64, heard: &[SessionId]) {
        while self.ms < ms {
            self.ms += 500;
            for session in heard {
                self.step(Input::Heartbeat { session: *session, heartbeat: heartbeat(self.ms) });
            }
            self.step(Input::Tick);
        }
    }

    fn wait(&mut self, ms: u64, heard: &[SessionId]) {
        self.pass(self.ms + ms, heard);
    }

    fn step(&mut self, input: Input) -> Step {
        let step = self.control.step(self.now(), input);
        self.records.extend(step.records.iter().cloned());
        let mut asked = Vec::new();
        for effect in &step.effects {
            match effect {
                Effect::Send { session, message: ToNode::Survey(survey) } if survey.model.starts_with('/') => {
                    asked.push((*session, survey.clone()));
                }
                Effect::Send { session, message } => self.told.push((*session, message.clone())),
                _ => {}
            }
        }
        self.control.cluster().check_invariants().unwrap();
        for (session, survey) in asked {
            self.step(Input::Surveyed { session, rtt_us: 400, survey, found: Ok(SMALL) });
        }
        step
    }

    /// The coordinator dies and comes back on its journal.
    fn restart(&mut self) {
        let mut cluster = Cluster::default();
        for record in &self.records {
            cluster.apply(record);
        }
        assert_eq!(cluster.state_hash(), self.control.cluster().state_hash(), "I8");
        self.control = Control::new(cluster, options(), self.now());
        self.step(Input::Start { version: "test".into() });
    }

    fn ask(&mut self, caller: &Subject, request: Request) -> Reply {
        match self.try_ask(caller, request) {
            Some(reply) => reply,
            None => panic!("no reply"),
        }
    }

    fn try_ask(&mut self, caller: &Subject, request: Request) -> Option<Reply> {
        self.ticket += 1;
        let ticket = Ticket(self.ticket);
        let step = self.step(Input::Request { ticket, caller: caller.clone(), request, secret_hash: SECRET });
        step.effects.into_iter().find_map(|effect| match effect {
            Effect::Reply { ticket: answered, reply } if answered == ticket => Some(*reply),
            _ => None,
        })
    }

    fn submit(&mut self, key: &str, spec: &str) -> JobId {
        let request = Request::Submit { key: key.into(), spec: spec.into() };
        match self.ask(&user(UserRole::Submitter, "ada"), request) {
            Reply::Submitted { job, created: true } => job,
            other => panic!("{other:?}"),
        }
    }

    fn token(&mut self, scope: TokenScope) -> TokenId {
        let admin = user(UserRole::Admin, "admin");
        self.ticket += 1;
        let request = Request::TokenCreate { scope, ttl_seconds: 60 };
        let input = Input::Request { ticket: Ticket(self.ticket), caller: admin, request, secret_hash: SECRET };
        match self.step(input).effects[..] {
            [Effect::TokenMade { token, .. }] => token,
            ref other => panic!("{other:?}"),
        }
    }

    fn join(&mut self, token: TokenId, wants: Wants) -> Result<Member, String> {
        self.ticket += 1;
        let step = self.step(Input::Join { ticket: Ticket(self.ticket), token, secret_hash: SECRET, wants });
        match step.effects.into_iter().next() {
            Some(Effect::Admit { member, .. }) => Ok(member),
            Some(Effect::Deny { reason, .. }) => Err(reason),
            other => panic!("{other:?}"),
        }
    }

    /// A machine joins and connects.
    fn node(&mut self, cpus: u32) -> (NodeId, SessionId) {
        let token = self.token(TokenScope::Node);
        let Ok(Member::Node { node }) = self.join(token, Wants::Node { name: "n".into() }) else {
            panic!("not joined")
        };
        (node, self.connect(node, cpus, 1, &[]))
    }

    fn connect(&mut self, node: NodeId, cpus: u32, incarnation: u64, ranks: &[RankId]) -> SessionId {
        self.session += 1;
        let session = SessionId(self.session);
        let ranks = ranks.iter().map(|id| RankInventory { id: *id, alive: true, step: TrainStep(0) }).collect();
        let hello = NodeHello {
            cluster: CLUSTER,
            node,
            name: "n".into(),
            incarnation: Incarnation(incarnation),
            session: self.session,
            epoch_seen: Epoch(0),
            index_seen: LogIndex(0),
            capacity: Capacity { cpus, memory_bytes: 1 << 30, ..Capacity::default() },
            gateway: None,
            ranks,
        };
        self.step(Input::Hello { session, node, address: "[::1]:1".into(), hello });
        session
    }

    fn report(&mut self, session: SessionId, id: RankId, event: RankEvent) {
        let Some((node, _)) = self.control.liveness().node(session) else { panic!("the session is over") };
        self.sequence = self.control.cluster().members().node(node).unwrap().reported + 1;
        self.step(Input::Report { session, report: Report { sequence: self.sequence, id, event } });
    }

    fn ready(&mut self, session: SessionId, id: RankId) {
        let address: SocketAddr = "127.0.0.1:9".parse().unwrap();
        self.report(session, id, RankEvent::Ready { address });
    }

    fn state(&self, job: JobId) -> JobState {
        self.control.cluster().jobs().get(job).unwrap().state
    }

    fn generation(&self, job: JobId) -> Generation {
        self.control.cluster().jobs().get(job).unwrap().run.as_ref().unwrap().generation
    }

    /// What a session was told since the last time of asking.
    fn told(&mut self, session: SessionId) -> Vec<ToNode> {
        let (told, kept) = std::mem::take(&mut self.told).into_iter().partition(|(to, _)| *to == session);
        self.told = kept;
        let told = told.into_iter().map(|(_, message)| message);
        told.filter(|message| !matches!(message, ToNode::Acknowledge { .. } | ToNode::Routes(_))).collect()
    }
}

fn id(job: JobId, generation: u64, rank: u32) -> RankId {
    RankId { job, generation: Generation(generation), rank: Rank(rank) }
}

fn finished(generation: u64, weights: u8) -> RankEvent {
    let outcome = Outcome {
        step: TrainStep(10),
        loss: 0.5,
        samples: 80,
        ledger: Ledger { first: 0, end: 80 },
        skipped: 0,
        weights_blake3: Digest([weights; 32]),
        metrics: std::collections::BTreeMap::new(),
    };
    RankEvent::Finished { generation: Generation(generation), outcome }
}

fn outcome(weights: u8) -> RankEvent {
    finished(1, weights)
}

fn shard(step: u64, index: u32) -> RankEvent {
    shard_of(1, step, index)
}

fn shard_of(generation: u64, step: u64, index: u32) -> RankEvent {
    let shard = ShardRecord { index, file: format!("shard-{index}"), bytes: 8, blake3: Digest([0; 32]) };
    RankEvent::ShardStored { generation: Generation(generation), step: TrainStep(step), shard, state: Fingerprint(0) }
}

fn manifest(job: JobId, step: u64, generation: u64) -> RankEvent {
    let uri = format!("file:///c/{job}/step-{step}-g{generation}");
    RankEvent::ManifestStored {
        generation: Generation(generation),
        step: TrainStep(step),
        uri,
        manifest_blake3: Digest([0; 32]),
    }
}

/// What a rank is told that begins with a checkpoint of [`manifest`].
fn committed_at(uri: &str) -> Origin {
    Origin { uri: uri.to_owned(), manifest_blake3: Some(Digest([0; 32])) }
}

fn resumed(generation: u64, step: u64) -> RankEvent {
    RankEvent::Resumed { generation: Generation(generation), step: TrainStep(step) }
}

fn heartbeat(sequence: u64) -> Heartbeat {
    Heartbeat {
        incarnation: Incarnation(1),
        sequence,
        cpu_used: 0.0,
        memory_used_bytes: 0,
        routes: LogIndex(0),
        leaving: 0,
        heat: Default::default(),
    }
}

fn exited(code: i32) -> RankEvent {
    RankEvent::Exited { exit: Exit::Code(code) }
}

fn membership(message: &ToNode) -> Option<(u64, usize, usize, Option<u64>)> {
    let ToNode::Membership { membership, .. } = message else { return None };
    let Membership { generation, members, joining, after, ballot: 0, .. } = membership else { return None };
    Some((generation.0, members.len(), joining.len(), after.map(|after| after.0)))
}

/// Two nodes run the two ranks of a job.
fn running() -> (World, JobId, [SessionId; 2]) {
    let mut world = World::new();
    let (_, first) = world.node(2);
    let (_, second) = world.node(1);
    let job = world.submit("k", &spec("ranks = 2"));
    assert_eq!(world.state(job), JobState::Starting);
    world.ready(first, id(job, 1, 0));
    assert_eq!(world.state(job), JobState::Starting);
    world.ready(second, id(job, 1, 1));
    assert_eq!(world.state(job), JobState::Running);
    (world, job, [first, second])
}

/// Found by killing a coordinator for longer than eight checkpoints: the manifest of one that it had forgotten ended the generation.
#[test]
fn a_cancel_is_answered_when_no_rank_can_start() {
    let mut world = World::new();
    let (_, session) = world.node(2);
    let job = world.submit("k", &spec(""));
    let ada = user(UserRole::Submitter, "ada");
    assert_eq!(world.try_ask(&ada, Request::Cancel { job }), None, "the rank may still start");
    assert!(world.control.cluster().check_sign(NodeId(1), Incarnation(1), id(job, 1, 0)).is_err());
    assert_eq!(world.state(job), JobState::Cancelling);
    world.report(session, id(job, 1, 0), exited(0));
    assert_eq!(world.state(job), JobState::Cancelled);
    assert_eq!(world.ask(&ada, Request::Cancel { job }), Reply::Cancelled { job });
    let queued = world.submit("k2", &spec("cpus = 64"));
    assert_eq!(world.ask(&ada, Request::Cancel { job: queued }), Reply::Cancelled { job: queued });
}

#[test]
fn only_the_owner_or_an_operator_cancels() {
    let mut world = World::new();
    let job = world.submit("k", &spec(""));
    let refused = world.ask(&user(UserRole::Submitter, "eve"), Request::Cancel { job });
    assert!(matches!(refused, Reply::Refused(Refusal { code: RefusalCode::Forbidden, .. })), "{refused:?}");
    assert_eq!(world.control.cluster().counts().refused_requests, 1);
    assert_eq!(world.ask(&user(UserRole::Operator, "op"), Request::Cancel { job }), Reply::Cancelled { job });
}

#[test]
fn the_same_key_gives_the_same_job_also_after_a_restart() {
    let mut world = World::new();
    let job = world.submit("k", &spec(""));
    world.restart();
    let ada = user(UserRole::Submitter, "ada");
    let again = world.ask(&ada, Request::Submit { key: "k".into(), spec: spec("") });
    assert_eq!(again, Reply::Submitted { job, created: false });
    let other = world.ask(&ada, Request::Submit { key: "k".into(), spec: spec("ranks = 2") });
    assert!(matches!(other, Reply::Refused(Refusal { code: RefusalCode::Conflict, .. })));
}

#[test]
fn a_silent_node_is_lost_and_its_job_goes_elsewhere_while_its_slot_stays_held() {
    let mut world = World::new();
    let (node, lost) = world.node(2);
    let job = world.submit("k", &spec(""));
    world.ready(lost, id(job, 1, 0));
    let (_, _) = world.node(1);
    world.step(Input::Closed { session: lost });
    world.pass(10_000, &[]);
    world.connect(NodeId(2), 1, 1, &[]);
    world.step(Input::Tick);
    assert_eq!(world.state(job), JobState::Starting);
    let run = world.control.cluster().jobs().get(job).unwrap().run.as_ref().unwrap();
    assert_eq!(run.ranks[&id(job, 2, 0)].node, NodeId(2));
    assert_eq!(world.control.cluster().members().node(node).unwrap().used.cpus, 1, "I15");
    // It comes back with the old rank alive: the rank is stopped, and its room is free when it is gone.
    let back = world.connect(node, 2, 1, &[id(job, 1, 0)]);
    assert!(matches!(world.told(back)[..], [ToNode::Welcome { .. }, ToNode::Stop { .. }]));
    world.report(back, id(job, 1, 0), exited(0));
    assert_eq!(world.control.cluster().members().node(node).unwrap().used.cpus, 0);
}

#[test]
fn a_restarted_coordinator_adopts_running_ranks_and_repeats_what_they_may_have_missed() {
    let (mut world, job, _) = running();
    world.restart();
    assert_eq!(world.control.cluster().epoch(), Epoch(2));
    let first = world.connect(NodeId(1), 2, 1, &[id(job, 1, 0)]);
    assert_eq!(world.state(job), JobState::Running);
    assert!(matches!(world.told(first)[..], [ToNode::Welcome { epoch: Epoch(2), .. }, ToNode::Membership { .. }]));
    // The agent of the second node was restarted: its rank went with it.
    world.connect(NodeId(2), 1, 2, &[]);
    assert_eq!(world.state(job), JobState::Running);
    assert_eq!(world.told(first).iter().filter_map(membership).collect::<Vec<_>>(), [(2, 1, 0, None)]);
}

#[test]
fn a_start_that_was_lost_with_its_session_is_sent_again() {
    let mut world = World::new();
    let (node, session) = world.node(2);
    let job = world.submit("k", &spec(""));
    world.step(Input::Closed { session });
    let again = world.connect(node, 2, 1, &[]);
    assert!(
        matches!(&world.told(again)[..], [ToNode::Welcome { .. }, ToNode::Start(start)] if start.id == id(job, 1, 0))
    );
}

#[test]
fn a_generation_that_does_not_come_up_is_tried_again() {
    let mut world = World::new();
    let (_, session) = world.node(1);
    let job = world.submit("k", &spec(""));
    for _ in 0..60 {
        world.ms += 2_000;
        world.step(Input::Heartbeat { session, heartbeat: heartbeat(world.ms) });
        world.step(Input::Tick);
    }
    assert_eq!(world.state(job), JobState::Recovering);
    world.report(session, id(job, 1, 0), exited(1));
    assert_eq!(world.state(job), JobState::Starting);
    let lines = world.control.cluster().jobs().get(job).unwrap().timeline.lines();
    assert!(lines.iter().any(|line| line.text.contains("rank-0 on node-1 was not ready within 120 s")), "{lines:?}");
}

#[test]
fn a_node_that_starts_nothing_is_quarantined_until_its_agent_is_restarted() {
    let mut world = World::new();
    let (node, session) = world.node(4);
    let not_started = || RankEvent::Exited { exit: Exit::NotStarted("no such file".into()) };
    for number in 0..3 {
        let job = world.submit(&number.to_string(), &spec("[restart]\nattempts = 1"));
        world.report(session, id(job, 1, 0), not_started());
        assert_eq!(world.state(job), JobState::Failed);
    }
    let job = world.submit("next", &spec(""));
    assert_eq!(world.state(job), JobState::Queued);
    let viewer = user(UserRole::Viewer, "v");
    let Reply::Explained(explanation) = world.ask(&viewer, Request::Explain { job }) else { panic!() };
    assert!(explanation.nodes[0].1.contains("quarantined: it could not start ranks of job-1"), "{explanation:?}");
    world.connect(node, 4, 2, &[]);
    assert_eq!(world.state(job), JobState::Starting);
}

#[test]
fn a_rank_that_outlives_its_job_is_told_to_stop_again() {
    let mut world = World::new();
    let (_, session) = world.node(1);
    let job = world.submit("k", &spec(""));
    world.ready(session, id(job, 1, 0));
    world.report(session, id(job, 1, 0), outcome(1));
    world.told(session);
    for _ in 0..40 {
        world.ms += 2_000;
        world.step(Input::Heartbeat { session, heartbeat: heartbeat(world.ms) });
        world.step(Input::Tick);
    }
    assert!(matches!(world.told(session)[..], [ToNode::Stop { .. }, ..]));
    assert_eq!(world.state(job), JobState::Succeeded);
}

/// Found by seed 867 of the simulator: the rank lived for ever, and held its room.
#[test]
fn a_finished_rank_that_comes_back_on_a_lost_node_is_stopped() {
    let (mut world, job, [first, second]) = running();
    world.report(second, id(job, 1, 1), outcome(1));
    world.pass(10_000, &[first]);
    assert!(world.control.cluster().jobs().get(job).unwrap().run.as_ref().unwrap().ranks[&id(job, 1, 1)].gone);
    let back = world.connect(NodeId(2), 1, 1, &[id(job, 1, 1)]);
    assert!(matches!(world.told(back)[..], [ToNode::Welcome { .. }, ToNode::Stop { .. }]));
    // What it has said counts still, and the other one goes on alone.
    world.report(first, id(job, 1, 0), finished(2, 1));
    assert_eq!(world.state(job), JobState::Succeeded);
}

/// Found by the simulator: nobody was left, and the job ran on.
#[test]
fn a_finished_rank_that_is_lost_together_with_a_newcomer_leaves_a_job_that_begins_again() {
    let mut world = World::new();
    let (_, first) = world.node(2);
    let (_, second) = world.node(1);
    let job = world.submit("k", &spec("ranks = 3"));
    for (session, rank) in [(first, 0), (first, 1), (second, 2)] {
        world.ready(session, id(job, 1, rank));
    }
    assert_eq!(world.state(job), JobState::Running);
    // A successor is placed beside the first rank, and is not ready yet when that one has finished.
    world.report(first, id(job, 1, 1), exited(1));
    world.step(Input::Tick);
    let run = world.control.cluster().jobs().get(job).unwrap().run.as_ref().unwrap();
    assert_eq!(run.ranks.values().filter(|rank| rank.node == NodeId(1) && !rank.gone).count(), 2);
    world.report(first, id(job, 1, 0), finished(2, 1));
    world.pass(5_000, &[first]);
    assert_eq!(world.state(job), JobState::Running, "the first is to evaluate alone");
    world.pass(20_000, &[]);
    assert_eq!(world.state(job), JobState::Queued);
    world.control.cluster().check_invariants().unwrap();
}

/// Found by seed 784 of the simulator: its inventory did not know the rank yet, so the rank was taken as gone and its room given away.
#[test]
fn a_hello_that_a_newer_one_has_overtaken_is_refused() {
    let mut world = World::new();
    let (node, _) = world.node(2);
    world.session += 1;
    let late = world.session;
    let current = world.connect(node, 2, 1, &[]);
    let job = world.submit("k", &spec(""));
    world.ready(current, id(job, 1, 0));
    world.session = late - 1;
    world.connect(node, 2, 1, &[]);
    assert_eq!(world.state(job), JobState::Running);
    assert_eq!(world.control.liveness().session(node), Some(current));
    assert_eq!(world.control.cluster().members().node(node).unwrap().used.cpus, 1, "I15");
}

#[test]
fn a_coordinator_behind_its_nodes_is_refused() {
    let mut world = World::new();
    let (node, _) = world.node(1);
    let hello = NodeHello {
        cluster: CLUSTER,
        node,
        name: "n".into(),
        incarnation: Incarnation(1),
        session: 9,
        epoch_seen: Epoch(7),
        index_seen: LogIndex(0),
        capacity: Capacity::default(),
        gateway: None,
        ranks: Vec::new().into(),
    };
    let step = world.step(Input::Hello { session: SessionId(99), node, address: String::new(), hello });
    assert!(matches!(&step.effects[..], [Effect::Close { reason, .. }] if reason.contains("behind")), "{step:?}");
}

#[test]
fn a_token_lets_in_once_and_a_refusal_is_audited() {
    let mut world = World::new();
    let token = world.token(TokenScope::Node);
    assert!(world.join(token, Wants::Node { name: "a".into() }).is_ok());
    assert!(world.join(token, Wants::Node { name: "b".into() }).unwrap_err().contains("used already"));
    assert_eq!(world.control.cluster().counts().refused_requests, 1);
    let token = world.token(TokenScope::Submitter);
    let Ok(Member::User { name, role }) = world.join(token, Wants::User { name: "ada".into() }) else { panic!() };
    assert_eq!((name.as_str(), role), ("ada", TokenScope::Submitter));
}

#[test]
fn a_full_disk_refuses_submits_and_lets_running_jobs_end() {
    let (mut world, job, [first, second]) = running();
    world.step(Input::Storage { low: Some("journal disk is full".into()) });
    let refused = world.ask(&user(UserRole::Admin, "admin"), Request::Submit { key: "x".into(), spec: spec("") });
    assert!(matches!(refused, Reply::Refused(Refusal { code: RefusalCode::Unavailable, .. })));
    world.report(first, id(job, 1, 0), outcome(1));
    world.report(second, id(job, 1, 1), outcome(1));
    assert_eq!(world.state(job), JobState::Succeeded);
    world.step(Input::Storage { low: None });
    world.submit("x", &spec(""));
}

#[test]
fn explain_says_what_is_missing_on_each_node() {
    let mut world = World::new();
    world.node(2);
    let job = world.submit("k", &spec("cpus = 64"));
    let Reply::Explained(explanation) = world.ask(&user(UserRole::Viewer, "v"), Request::Explain { job }) else {
        panic!()
    };
    assert!(explanation.job.reason.contains("have room for 0"), "{}", explanation.job.reason);
    assert_eq!(explanation.nodes[0].1, "2 of 2 cpus free, 64 needed");
    assert_eq!(explanation.events[0].text, "submitted by ada");
}

#[test]
fn a_report_that_comes_again_is_acknowledged_and_changes_nothing() {
    let (mut world, job, [first, _]) = running();
    let report = |sequence| Report { sequence, id: id(job, 1, 0), event: outcome(1) };
    let again = world.step(Input::Report { session: first, report: report(1) });
    assert!(again.records.is_empty());
    assert!(matches!(again.effects[..], [Effect::Send { message: ToNode::Acknowledge { sequence: 1, .. }, .. }]));
}
