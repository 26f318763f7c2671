//! Jobs that serve: what gateways are told, and when.

use stoke_protocol::message::serve::{Route, Routes};

use super::*;

const SPEC: &str = "name = \"chat\"\n[serve]\nmodel = \"/m\"\ncache = 512\nstages = 2\n[resources]\nmemory = 1024\n";

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
    let replaced = told.iter().filter_map(started).next_back().expect("a rank in its place");
    assert_eq!(replaced.rank, Rank(1));
    let its = if world.control.cluster().jobs().get(job).unwrap().is_on(replaced, NodeId(1)) { first } else { second };
    world.ready(its, replaced);
    assert_eq!(world.head(first), None, "it is not among the members yet");
    let generation = world.control.cluster().jobs().get(job).unwrap().generation.0;
    world.joins(its, replaced, generation);
    assert_eq!([first, second].map(|session| world.head(session)), [Some(Some((1, generation + 1))); 2]);
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
        matches!(refused, Reply::Refused(Refusal { ref message, .. }) if message.contains("from /m") && message.contains("replicas serve the same")),
        "{refused:?}"
    );
    let scaled = world.ask(&ada, Request::Scale { job, ranks: 1 });
    assert!(matches!(scaled, Reply::Refused(Refusal { code: RefusalCode::Invalid, .. })), "{scaled:?}");
}
