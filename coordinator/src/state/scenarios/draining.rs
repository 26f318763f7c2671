//! Nodes that are drained: where their ranks go, what is waited for, and what becomes of the deadline.

use stoke_protocol::message::client::{NodeState, NodeView};

use super::*;
use crate::state::event::Event;

fn operator() -> Subject {
    user(UserRole::Operator, "op")
}

impl World {
    fn drain(&mut self, node: u64, deadline_ms: Option<u64>) -> NodeView {
        match self.ask(&operator(), Request::Drain { node: NodeId(node), deadline_ms }) {
            Reply::Node(view) => *view,
            other => panic!("{other:?}"),
        }
    }

    fn undrain(&mut self, node: u64) -> NodeView {
        match self.ask(&operator(), Request::Undrain { node: NodeId(node) }) {
            Reply::Node(view) => *view,
            other => panic!("{other:?}"),
        }
    }

    fn view(&mut self, node: u64) -> NodeView {
        let Reply::Nodes(nodes) = self.ask(&operator(), Request::Nodes) else { panic!("no nodes") };
        nodes.iter().find(|view| view.node == NodeId(node)).unwrap().clone()
    }

    fn joined(&mut self, session: SessionId, id: RankId, generation: u64, step: u64) {
        let event = RankEvent::Joined { generation: Generation(generation), step: TrainStep(step) };
        self.report(session, id, event);
    }

    fn beat(&mut self, sessions: &[SessionId]) {
        for session in sessions {
            self.step(Input::Heartbeat { session: *session, heartbeat: heartbeat(self.ms) });
        }
        self.step(Input::Tick);
    }

    fn job_of(&self, job: JobId) -> &crate::state::machine::Job {
        self.control.cluster().jobs().get(job).unwrap()
    }
}

/// A job on nodes 1 and 2, and a third node without ranks.
fn beside() -> (World, JobId, [SessionId; 3]) {
    let (mut world, job, [first, second]) = running();
    let (_, third) = world.node(1);
    world.told(first);
    (world, job, [first, second, third])
}

#[test]
fn a_rank_of_a_drained_node_moves_between_two_steps_and_no_generation_ends() {
    let (mut world, job, [first, second, third]) = beside();
    let view = world.drain(2, None);
    assert_eq!(view.state, NodeState::Draining);
    assert_eq!(view.reason, format!("drained by op: {job} rank-1 moves to node-3"));
    assert!(
        matches!(&world.told(third)[..], [ToNode::Welcome { .. }, ToNode::Start(start)] if start.id == id(job, 2, 1))
    );
    world.ready(third, id(job, 2, 1));
    assert_eq!(world.told(first).iter().filter_map(membership).collect::<Vec<_>>(), [(3, 2, 1, Some(1))]);
    world.joined(third, id(job, 2, 1), 3, 7);
    // In one generation the successor owns lanes and the old rank is out; it follows the one before, so no step is lost.
    assert_eq!(world.told(first).iter().filter_map(membership).collect::<Vec<_>>(), [(4, 2, 0, Some(3))]);
    let last = world.told(second).pop().unwrap();
    let ToNode::Membership { id: old, membership } = last else { panic!("{last:?}") };
    assert_eq!((old, membership.position(old), membership.position(id(job, 2, 1))), (id(job, 1, 1), None, Some(1)));
    assert_eq!(world.view(2).state, NodeState::Draining, "it still has its process");
    world.report(second, id(job, 1, 1), exited(0));
    assert_eq!(world.view(2).state, NodeState::Drained);
    let job = world.job_of(job);
    assert_eq!((job.state, job.recoveries, job.failures), (JobState::Running, 0, 0));
}

#[test]
fn without_room_elsewhere_a_drained_job_goes_on_with_fewer_ranks_and_grows_again_when_there_is_room() {
    let (mut world, job, [first, second]) = {
        let (mut world, job, sessions) = running();
        // The first node is full, so that rank-1 has nowhere to go.
        world.submit("other", &spec("ranks = 1"));
        (world, job, sessions)
    };
    world.told(first);
    world.drain(2, None);
    assert_eq!(world.told(first).iter().filter_map(membership).collect::<Vec<_>>(), [(2, 1, 0, Some(1))]);
    world.report(second, id(job, 1, 1), exited(0));
    assert_eq!(world.view(2).state, NodeState::Drained);
    assert_eq!((world.job_of(job).state, world.job_of(job).recoveries), (JobState::Running, 0));
    let (_, third) = world.node(1);
    assert!(world.told(third).iter().any(|told| matches!(told, ToNode::Start(start) if start.id == id(job, 3, 1))));
}

#[test]
fn a_drain_that_cannot_go_on_says_why_and_stops_what_is_left_at_its_deadline() {
    let mut world = World::new();
    let (_, first) = world.node(1);
    let job = world.submit("k", &spec("[restart]\nattempts = 1"));
    world.ready(first, id(job, 1, 0));
    let view = world.drain(1, Some(5_000));
    assert!(
        view.reason.contains("no room elsewhere") && view.reason.contains("no fewer than 1 rank"),
        "{}",
        view.reason
    );
    world.ms += 3_000;
    world.beat(&[first]);
    // The coordinator dies, and comes back: the deadline is what is left of it.
    world.restart();
    let first = world.connect(NodeId(1), 1, 1, &[id(job, 1, 0)]);
    world.ms += 1_900;
    world.beat(&[first]);
    assert_eq!(world.state(job), JobState::Running);
    world.ms += 200;
    world.told(first);
    world.beat(&[first]);
    assert!(matches!(&world.told(first)[..], [ToNode::Stop { .. }, ..]));
    assert_eq!(world.state(job), JobState::Recovering);
    world.report(first, id(job, 1, 0), exited(4));
    assert_eq!((world.state(job), world.job_of(job).failures), (JobState::Queued, 0), "no attempt was counted");
    let view = world.view(1);
    assert_eq!((view.state, view.drain.unwrap().overdue), (NodeState::Drained, true));
    world.undrain(1);
    assert_eq!(world.state(job), JobState::Starting);
}

#[test]
fn a_drain_that_is_taken_back_leaves_the_rank_where_it_is() {
    let (mut world, job, [first, second, third]) = beside();
    world.drain(2, None);
    world.ready(third, id(job, 2, 1));
    world.told(third);
    let view = world.undrain(2);
    assert_eq!((view.state, view.reason), (NodeState::Up, String::new()));
    assert!(
        world
            .told(third)
            .iter()
            .any(|told| matches!(told, ToNode::Stop { id: stopped, .. } if *stopped == id(job, 2, 1)))
    );
    world.report(third, id(job, 2, 1), exited(4));
    let run = world.job_of(job).run.as_ref().unwrap();
    assert_eq!(run.members, [id(job, 1, 0), id(job, 1, 1)]);
    assert!(run.joining.is_empty() && run.ranks.len() == 2);
    let _ = (first, second);
    // Asked for twice and lifted twice is the same as once.
    world.drain(2, None);
    let records = world.records.len();
    world.drain(2, None);
    assert_eq!(world.records.len(), records);
    world.undrain(2);
    assert_eq!(world.undrain(2).state, NodeState::Up);
}

#[test]
fn a_gang_that_starts_on_a_node_which_is_drained_moves_when_it_runs() {
    let mut world = World::new();
    let (_, first) = world.node(1);
    let job = world.submit("k", &spec(""));
    assert!(world.drain(1, None).reason.contains("starts, and moves then"));
    let (_, second) = world.node(1);
    world.ready(first, id(job, 1, 0));
    assert!(world.told(second).iter().any(|told| matches!(told, ToNode::Start(start) if start.id == id(job, 2, 0))));
    world.ready(second, id(job, 2, 0));
    world.joined(second, id(job, 2, 0), 3, 1);
    world.report(first, id(job, 1, 0), exited(0));
    assert_eq!(world.view(1).state, NodeState::Drained);
    assert_eq!(world.job_of(job).run.as_ref().unwrap().members, [id(job, 2, 0)]);
}

#[test]
fn a_rank_that_is_to_move_for_a_reason_stays_where_there_is_no_better_place() {
    let (mut world, job, [first, _, third]) = beside();
    let second = world.submit("other", &spec("ranks = 1"));
    let third_only = id(second, 1, 0);
    world.ready(if world.job_of(second).is_on(third_only, NodeId(3)) { third } else { first }, third_only);
    let filler = world.submit("filler", &spec("ranks = 1"));
    assert_eq!(world.state(filler), JobState::Starting);
    let mut step = Step::default();
    world.control.now = world.now();
    world.control.replace(&mut step, id(job, 1, 1), "is slower than the others".into()).unwrap();
    assert!(matches!(&step.records[0].event, Event::MoveAsked { .. }), "{step:?}");
    world.records.extend(step.records);
    world.step(Input::Tick);
    assert_eq!(world.job_of(job).run.as_ref().unwrap().members.len(), 2);
}

#[test]
fn a_node_is_removed_when_it_is_lost_or_drained_and_is_told_so_when_it_comes_back() {
    let (mut world, job, [first, second, third]) = beside();
    let remove = |node| Request::RemoveNode { node: NodeId(node) };
    let refused = world.ask(&operator(), remove(2));
    assert!(matches!(refused, Reply::Refused(Refusal { code: RefusalCode::Conflict, .. })), "{refused:?}");
    // Drained: it is up, and its session ends.
    world.drain(3, None);
    world.ticket += 1;
    let input =
        Input::Request { ticket: Ticket(world.ticket), caller: operator(), request: remove(3), secret_hash: SECRET };
    let step = world.step(input);
    assert!(
        step.effects.iter().any(|effect| matches!(effect, Effect::Revoke { session, .. } if *session == third)),
        "{step:?}"
    );
    assert_eq!(world.ask(&operator(), remove(3)), Reply::NodeRemoved { node: NodeId(3) }, "the same again");
    // Lost: its ranks are gone as far as their jobs go, and its books go with it.
    world.step(Input::Closed { session: second });
    world.pass(10_000, &[first]);
    assert_eq!(world.view(2).state, NodeState::Lost);
    assert_eq!(world.ask(&operator(), remove(2)), Reply::NodeRemoved { node: NodeId(2) });
    world.restart();
    let first = world.connect(NodeId(1), 2, 1, &[id(job, 1, 0)]);
    let hello = NodeHello {
        cluster: CLUSTER,
        node: NodeId(2),
        name: "n".into(),
        incarnation: Incarnation(9),
        session: 99,
        epoch_seen: Epoch(0),
        index_seen: LogIndex(0),
        capacity: Capacity::default(),
        gateway: None,
        ranks: Vec::new().into(),
    };
    let step = world.step(Input::Hello { session: SessionId(99), node: NodeId(2), address: String::new(), hello });
    assert!(
        matches!(&step.effects[..], [Effect::Revoke { reason, .. }] if reason.contains("--join TOKEN")),
        "{step:?}"
    );
    let renewal = world.step(Input::RenewNode { ticket: Ticket(1_000), session: SessionId(99) });
    assert!(matches!(&renewal.effects[..], [Effect::Deny { .. }]), "{renewal:?}");
    let renewal = world.step(Input::RenewNode { ticket: Ticket(1_001), session: first });
    assert!(matches!(&renewal.effects[..], [Effect::Granted { .. }]), "{renewal:?}");
    let (again, _) = world.node(1);
    assert_eq!((again, world.state(job)), (NodeId(4), JobState::Running));
}

#[test]
fn only_an_operator_drains() {
    let mut world = World::new();
    world.node(1);
    let drain = || Request::Drain { node: NodeId(1), deadline_ms: None };
    let refused = world.ask(&user(UserRole::Submitter, "ada"), drain());
    assert!(matches!(refused, Reply::Refused(Refusal { code: RefusalCode::Forbidden, .. })), "{refused:?}");
    assert_eq!(world.control.cluster().counts().refused_requests, 1);
    let unknown = world.ask(&operator(), Request::Drain { node: NodeId(9), deadline_ms: None });
    assert!(matches!(unknown, Reply::Refused(Refusal { code: RefusalCode::NotFound, .. })), "{unknown:?}");
}

/// Where each part of a job's state is at two ranks, those that are to go and have no room elsewhere go one after the other, when the others have theirs.
#[test]
fn ranks_that_keep_parts_of_the_state_leave_a_drained_node_one_after_the_other() {
    let mut world = World::new();
    let (_, first) = world.node(2);
    let (_, second) = world.node(2);
    let text = spec("ranks = 4\nranks_min = 1").replace("batch = 8", "batch = 8\nsharding = \"zero1\"");
    let job = world.submit("parts", &text);
    let session_of = |world: &World, rank: u32| {
        let node = world.job_of(job).run.as_ref().unwrap().ranks[&id(job, 1, rank)].node;
        if node == NodeId(1) { first } else { second }
    };
    for rank in 0..4 {
        let session = session_of(&world, rank);
        world.ready(session, id(job, 1, rank));
    }
    let members = |world: &World| world.job_of(job).run.as_ref().unwrap().members.len();
    world.drain(2, None);
    world.beat(&[first, second]);
    assert_eq!(members(&world), 4, "they have not told yet that they go on");
    for (left, generation) in [(3, 1), (2, 2)] {
        let head = world.job_of(job).run.as_ref().unwrap().members[0];
        let session = session_of(&world, head.rank.0);
        world.report(session, head, resumed(generation, 5 * generation));
        world.beat(&[first, second]);
        assert_eq!(members(&world), left);
        world.beat(&[first, second]);
        assert_eq!(members(&world), left, "the others hand over parts");
    }
    assert_eq!(world.state(job), JobState::Running);
    assert_eq!(world.job_of(job).failures, 0);
}
