//! Jobs that serve: what gateways are told, and when.

use stoke_protocol::message::serve::{Route, Routes, Traffic};

use super::*;

const SPEC: &str = "name = \"chat\"\n[serve]\nmodel = \"/m\"\nstages = 2\ntensor = 1\ncache = \"1MiB\"\n[resources]\nmemory = \"200MiB\"\n";

impl World {
    /// The newest routes that a session was told.
    fn routes(&mut self, session: SessionId) -> Option<Routes> {
        let (told, kept) = std::mem::take(&mut self.told)
            .into_iter()
            .partition(|(to, message)| *to == session && matches!(message, ToNode::Routes(_)));
        self.told = kept;
        let told: Vec<(SessionId, ToNode)> = told;
        told.into_iter()
            .rev()
            .find_map(|(_, message)| if let ToNode::Routes(routes) = message { Some(routes) } else { None })
    }

    /// Where the one job that serves has its head, by its generation; and the generation that answers.
    fn head(&mut self, session: SessionId) -> Option<Option<(u64, u64)>> {
        let routes = self.routes(session)?;
        let [Route { model, head, .. }] = &routes.routes[..] else { panic!("one job serves: {routes:?}") };
        assert_eq!(model, "chat");
        Some(head.map(|head| (head.id.generation.0, head.generation.0)))
    }

    fn joins(&mut self, session: SessionId, rank: RankId, generation: u64) {
        let joined = RankEvent::Joined { generation: Generation(generation), step: TrainStep(0) };
        self.report(session, rank, joined);
    }
}

fn serving() -> (World, JobId, [SessionId; 2]) {
    let mut world = World::new();
    let (_, first) = world.node(2);
    let (_, second) = world.node(1);
    assert!(world.routes(second).is_some_and(|routes| routes.routes.is_empty()));
    let job = world.submit("k", SPEC);
    assert_eq!([first, second].map(|session| world.head(session)), [Some(None); 2], "it is known, and not there yet");
    world.ready(first, id(job, 1, 0));
    assert_eq!(world.head(second), None, "nothing has changed");
    world.ready(second, id(job, 1, 1));
    assert_eq!([first, second].map(|session| world.head(session)), [Some(Some((1, 1))); 2]);
    (world, job, [first, second])
}

/// R1: and whoever is left keeps what it has loaded.
#[test]
fn a_gang_that_lacks_a_rank_has_no_head_until_the_rank_is_replaced() {
    let (mut world, job, [first, second]) = serving();
    world.report(second, id(job, 1, 1), exited(137));
    assert_eq!(world.state(job), JobState::Running);
    assert_eq!([first, second].map(|session| world.head(session)), [Some(None); 2]);
    let lacking = Some((2, 1, 0, None));
    assert_eq!(world.told(first).iter().filter_map(membership).next_back(), lacking);
    let started = |message: &ToNode| if let ToNode::Start(start) = message { Some(start.id) } else { None };
    world.wait(2_000, &[first, second]);
    let told = [world.told(first), world.told(second)].concat();
    let replaced = told.iter().filter_map(started).find(|id| id.generation.0 > 1).expect("a rank in its place");
    assert_eq!(replaced.rank, Rank(1));
    let its = if world.control.cluster().jobs().get(job).unwrap().is_on(replaced, NodeId(1)) { first } else { second };
    world.ready(its, replaced);
    assert_eq!(world.head(first), None, "it is not among the members yet");
    let generation = world.control.cluster().jobs().get(job).unwrap().generation.0;
    world.joins(its, replaced, generation);
    assert_eq!([first, second].map(|session| world.head(session)), [Some(Some((1, generation + 1))); 2]);
}

/// J4.
#[test]
fn a_gang_that_has_answered_comes_back_however_often_it_dies() {
    let (mut world, job, sessions) = serving();
    world.report(sessions[0], id(job, 1, 0), resumed(1, 1));
    let mut alive = vec![(sessions[0], id(job, 1, 0)), (sessions[1], id(job, 1, 1))];
    let mut died = 0;
    for _ in 0..200 {
        died += alive.len();
        alive.drain(..).for_each(|(session, rank)| world.report(session, rank, exited(137)));
        world.wait(2_000, &sessions);
        let started = |message: &ToNode| if let ToNode::Start(start) = message { Some(start.id) } else { None };
        for session in sessions {
            let ranks = world.told(session).into_iter().filter_map(|message| started(&message));
            alive.extend(ranks.filter(|rank| rank.generation.0 > 1).map(|rank| (session, rank)));
        }
        assert!(!world.state(job).is_terminal(), "after {died}");
    }
    assert!(died > 10, "{died}");
}

/// R3: also when a coordinator comes back that has forgotten whom it told what.
#[test]
fn a_gateway_that_connects_is_told_and_newer_routes_have_a_higher_index() {
    let (mut world, job, [first, second]) = serving();
    world.restart();
    let first_again = world.connect(NodeId(1), 2, 1, &[id(job, 1, 0)]);
    let told = world.routes(first_again).expect("routes at the hello");
    assert_eq!(told.routes[0].head.map(|head| head.id), Some(id(job, 1, 0)));
    world.try_ask(&user(UserRole::Operator, "o"), Request::Cancel { job });
    let _ = (first, second);
    world.report(first_again, id(job, 1, 0), exited(0));
    let newer = world.routes(first_again).expect("routes without a head");
    assert!(newer.index > told.index && newer.routes.iter().all(|route| route.head.is_none()), "{newer:?}");
}

#[test]
fn a_model_is_one_owners_and_a_split_has_its_size() {
    let (mut world, job, _) = serving();
    let eve = user(UserRole::Submitter, "eve");
    let refused = world.ask(&eve, Request::Submit { key: "k".into(), spec: SPEC.into() });
    assert!(
        matches!(refused, Reply::Refused(Refusal { ref message, .. }) if message.contains("of ada already")),
        "{refused:?}"
    );
    assert_ne!(world.submit("another replica", SPEC), job);
    let ada = user(UserRole::Submitter, "ada");
    let other = Request::Submit { key: "other".into(), spec: SPEC.replace("/m", "/n") };
    let refused = world.ask(&ada, other);
    assert!(
        matches!(refused, Reply::Refused(Refusal { ref message, .. }) if message.contains("from /m")
            && message.contains("replicas serve the same") && message.contains("share = 0.1")),
        "{refused:?}"
    );
    let scaled = world.ask(&ada, Request::Scale { job, ranks: 1 });
    assert!(matches!(scaled, Reply::Refused(Refusal { code: RefusalCode::Invalid, .. })), "{scaled:?}");
}

const SOLO: &str = "name = \"chat\"\n[serve]\nmodel = \"/m\"\nstages = 1\ntensor = 1\ncache = \"1MiB\"\n[resources]\nmemory = \"200MiB\"\n";

/// What another revision of the model is submitted with.
fn other(key: &str) -> String {
    SOLO.replace("\"/m\"\n", &format!("\"/n\"\n{key}\n"))
}

fn ada() -> Subject {
    user(UserRole::Submitter, "ada")
}

/// A node with a gateway and room for many, and so many jobs of one rank that run there.
fn regulars(count: u64) -> (World, SessionId, Vec<JobId>) {
    let mut world = World::new();
    let (node, _) = world.node(16);
    let session = world.connect_gateway(node, &[]);
    let jobs = (0..count).map(|number| world.runs(session, &format!("k{number}"), SOLO)).collect();
    (world, session, jobs)
}

impl World {
    fn connect_gateway(&mut self, node: NodeId, ranks: &[RankId]) -> SessionId {
        self.session += 1;
        let session = SessionId(self.session);
        let hello = NodeHello {
            cluster: CLUSTER,
            node,
            name: "n".into(),
            incarnation: Incarnation(1),
            session: self.session,
            epoch_seen: Epoch(0),
            index_seen: LogIndex(0),
            capacity: Capacity { cpus: 16, memory_bytes: 1 << 30, ..Capacity::default() },
            gateway: Some(stoke_protocol::message::node::GatewayAt {
                address: ([127, 0, 0, 1], 8400).into(),
                tls: false,
            }),
            ranks: ranks.iter().map(|id| RankInventory { id: *id, alive: true, step: TrainStep(0) }).collect(),
        };
        self.step(Input::Hello { session, node, address: "[::1]:1".into(), hello });
        session
    }

    fn runs(&mut self, session: SessionId, key: &str, spec: &str) -> JobId {
        let job = self.submit(key, spec);
        self.ready(session, id(job, 1, 0));
        assert_eq!(self.state(job), JobState::Running);
        job
    }

    /// Which new requests each job gets, by the routes that a session was told last.
    fn traffic(&mut self, session: SessionId) -> Vec<(JobId, Traffic)> {
        let routes = self.routes(session).expect("newer routes").routes;
        routes.iter().map(|route| (route.job, route.traffic)).collect()
    }

    /// A heartbeat of a gateway that goes by the newest routes and has so many questions at jobs that leave; and what time brings.
    fn beats(&mut self, session: SessionId, routes: LogIndex, leaving: u32) {
        self.ms += 100;
        let heartbeat = Heartbeat { routes, leaving, ..heartbeat(self.ms) };
        self.step(Input::Heartbeat { session, heartbeat });
        self.step(Input::Tick);
    }

    fn changes(&mut self, request: Request) -> (Vec<JobId>, Vec<JobId>, Vec<JobId>) {
        match self.ask(&ada(), request) {
            Reply::Serving { model, jobs, added, leaving } => {
                assert_eq!(model, "chat");
                (jobs.0, added.0, leaving.0)
            }
            other => panic!("{other:?}"),
        }
    }

    fn refused(&mut self, request: Request, code: RefusalCode, words: &str) {
        let reply = self.ask(&ada(), request);
        let is_so =
            matches!(&reply, Reply::Refused(refusal) if refusal.code == code && refusal.message.contains(words));
        assert!(is_so, "{words}: {reply:?}");
    }
}

#[test]
fn another_revision_serves_beside_with_a_share_or_as_a_shadow_only() {
    let (mut world, session, jobs) = regulars(1);
    let submit = |key: &str, spec: String| Request::Submit { key: key.into(), spec };
    world.refused(submit("a", other("")), RefusalCode::Conflict, "replicas serve the same");
    let canary = world.runs(session, "b", &other("share = 0.25"));
    let full = SOLO.replace("\"/m\"\n", "\"/m\"\nprecision = \"full\"\nshadow = true\n");
    let shadow = world.runs(session, "c", &full);
    let due = [(jobs[0], Traffic::Rest), (canary, Traffic::Share { millionths: 250_000 }), (shadow, Traffic::Shadow)];
    assert_eq!(world.traffic(session), due);
    world.tell_again(session);
    let revisions: Vec<u64> = world.routes(session).unwrap().routes.iter().map(|route| route.revision).collect();
    // Of /m, rounded, of /n, and of /m in full: the same in every release.
    assert_eq!(revisions, [3_854_766_607_902_899_342, 430_957_632_004_719_709, 15_052_976_353_254_983_506]);
    world.refused(submit("d", other("share = 0.8")), RefusalCode::Conflict, "a share of 0.25 of chat");
    world.refused(submit("e", other("share = 0.8\nshadow = true")), RefusalCode::Invalid, "use one of them");
    world.refused(submit("f", other("share = 1.5")), RefusalCode::Invalid, "above 0 and up to 1");
    world.refused(submit("g", other("task = \"embed\"\nshare = 0.1")), RefusalCode::Conflict, "another task");
    world.refused(submit("h", other("name = \"new\"\nshare = 0.1")), RefusalCode::Conflict, "no job serves new");
}

impl World {
    /// As to a gateway that connects.
    fn tell_again(&mut self, session: SessionId) {
        let mut step = Step::default();
        self.control.tell_routes_to(&mut step, session);
        self.told.extend(step.effects.into_iter().filter_map(|effect| match effect {
            Effect::Send { session, message } => Some((session, message)),
            _ => None,
        }));
    }
}

/// R4, and the same again changes nothing.
#[test]
fn a_promoted_revision_gets_everything_and_the_others_leave_when_their_answers_are_over() {
    let (mut world, session, jobs) = regulars(2);
    let canaries = ["share = 0.1", "share = 0.2", "shadow = true"].map(|part| world.runs(session, part, &other(part)));
    let queued = world.submit("never ran", &SOLO.replace("[resources]", "[resources]\ncpus = 64"));
    world.refused(Request::Promote { job: JobId(99) }, RefusalCode::NotFound, "job-99");
    let promote = Request::Promote { job: canaries[1] };
    let before = world.control.cluster().index();
    assert_eq!(world.changes(promote.clone()), (canaries.to_vec(), Vec::new(), jobs.clone()));
    assert_eq!(world.state(queued), JobState::Cancelled, "it had no answers");
    let index = world.control.cluster().index();
    assert_eq!(index.0, before.0 + 1, "one entry, so that no crash finds half of it");
    assert_eq!(world.changes(promote.clone()), (canaries.to_vec(), Vec::new(), jobs.clone()));
    assert_eq!(world.control.cluster().index(), index);
    let all = |jobs: &[JobId], traffic| jobs.iter().map(|job| (*job, traffic)).collect::<Vec<_>>();
    assert_eq!(world.traffic(session), [all(&jobs, Traffic::Leaving), all(&canaries, Traffic::Rest)].concat());
    // A gateway that goes by older routes, one with a question there, and one that has not said anything since.
    world.beats(session, LogIndex(index.0 - 1), 0);
    world.beats(session, index, 2);
    assert_eq!(jobs.iter().map(|job| world.state(*job)).collect::<Vec<_>>(), [JobState::Running; 2]);
    world.restart();
    let alive: Vec<RankId> = jobs.iter().chain(&canaries).map(|job| id(*job, 1, 0)).collect();
    world.step(Input::Tick);
    assert_eq!(world.state(jobs[0]), JobState::Running, "it has heard of nobody yet");
    let session = world.connect_gateway(NodeId(1), &alive);
    let index = world.routes(session).expect("routes at the hello").index;
    world.beats(session, index, 1);
    assert_eq!(world.state(jobs[0]), JobState::Running);
    world.beats(session, index, 0);
    assert_eq!(jobs.iter().map(|job| world.state(*job)).collect::<Vec<_>>(), [JobState::Cancelling; 2]);
    let reason = world.control.cluster().jobs().get(jobs[0]).expect("it is kept").reason.clone();
    assert!(reason.starts_with("it has left, as ada asked"), "{reason}");
    world.refused(Request::Promote { job: jobs[0] }, RefusalCode::Conflict, "job-1");
}

#[test]
fn a_revision_that_was_rolled_back_ends_its_answers_within_its_time() {
    let (mut world, session, jobs) = regulars(1);
    let rollback = Request::Rollback { model: "chat".into() };
    assert_eq!(world.changes(rollback.clone()), (jobs.clone(), Vec::new(), Vec::new()), "nothing is tried");
    let canary = world.runs(session, "b", &other("share = 0.5"));
    let shadow = world.runs(session, "c", &other("shadow = true"));
    assert_eq!(world.changes(rollback.clone()), (jobs.clone(), Vec::new(), vec![canary, shadow]));
    assert_eq!((world.state(canary), world.state(shadow)), (JobState::Running, JobState::Cancelling));
    assert_eq!(world.changes(rollback).0, jobs);
    let index = world.control.cluster().index();
    world.beats(session, index, 1);
    assert_eq!(world.state(canary), JobState::Running);
    world.ms += crate::state::revisions::LEAVE_MAX_MS;
    world.beats(session, index, 1);
    assert_eq!(world.state(canary), JobState::Cancelling, "its time is over");
    // R5.
    let reply = world.ask(&ada(), Request::Rollback { model: "nothing".into() });
    assert!(matches!(reply, Reply::Refused(Refusal { code: RefusalCode::NotFound, .. })), "{reply:?}");
    let again = world.runs(session, "d", &other("share = 0.5"));
    world.try_ask(&ada(), Request::Cancel { job: jobs[0] });
    world.refused(Request::Rollback { model: "chat".into() }, RefusalCode::Conflict, "it would be gone");
    assert_eq!(world.changes(Request::Promote { job: again }).0, [again]);
}

#[test]
fn replicas_are_copies_of_the_newest_and_the_newest_leave() {
    let (mut world, session, jobs) = regulars(1);
    let replicas = |replicas| Request::Replicas { model: "chat".into(), replicas };
    let (all, added, leaving) = world.changes(replicas(3));
    assert_eq!((all.len(), added.len(), leaving.len()), (3, 2, 0));
    assert_eq!(world.changes(replicas(3)), (all.clone(), Vec::new(), Vec::new()), "the same again changes nothing");
    let spec = |world: &World, job: JobId| world.control.cluster().jobs().get(job).unwrap().spec.clone();
    assert_eq!(spec(&world, added[1]), spec(&world, jobs[0]));
    added.iter().for_each(|job| world.ready(session, id(*job, 1, 0)));
    assert_eq!(world.changes(replicas(1)), (jobs.clone(), Vec::new(), added.clone()));
    let index = world.control.cluster().index();
    world.beats(session, index, 0);
    assert_eq!(added.iter().map(|job| world.state(*job)).collect::<Vec<_>>(), [JobState::Cancelling; 2]);
    // Of a revision that was promoted, without the share that it had; and its owner's, whoever asks.
    let canary = world.runs(session, "b", &other("share = 0.5"));
    world.changes(Request::Promote { job: canary });
    let operator = user(UserRole::Operator, "o");
    let reply = world.ask(&operator, replicas(2));
    let Reply::Serving { added, .. } = reply else { panic!("{reply:?}") };
    assert!(!spec(&world, added[0]).contains("share") && spec(&world, added[0]).contains("/n"));
    assert_eq!(world.control.cluster().jobs().get(added[0]).unwrap().owner, "ada");
    world.refused(replicas(0), RefusalCode::Invalid, "0 replicas");
    let eve = world.ask(&user(UserRole::Submitter, "eve"), replicas(1));
    assert!(matches!(eve, Reply::Refused(Refusal { code: RefusalCode::Forbidden, .. })), "{eve:?}");
}
