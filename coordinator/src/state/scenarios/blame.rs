//! Nodes on which ranks fail: when one is left alone, and how it comes back.

use stoke_protocol::message::client::NodeState;

use super::*;

impl World {
    /// The rank of a job that was placed last on a node.
    fn newest_on(&self, job: JobId, node: u64) -> RankId {
        let run = self.control.cluster().jobs().get(job).unwrap().run.as_ref().unwrap();
        let here = run.ranks.iter().filter(|(_, rank)| rank.node == NodeId(node) && rank.is_wanted());
        *here.map(|(id, _)| id).next_back().unwrap_or_else(|| panic!("{job} has no rank on {node}: {run:?}"))
    }

    fn node_state(&mut self, node: u64) -> (NodeState, String) {
        let viewer = user(UserRole::Viewer, "v");
        let Reply::Nodes(nodes) = self.ask(&viewer, Request::Nodes) else { panic!("no nodes") };
        let view = nodes.iter().find(|view| view.node == NodeId(node)).unwrap().clone();
        (view.state, view.reason)
    }
}

/// Two jobs, each with a rank on both of two nodes.
fn two_jobs() -> (World, [JobId; 2], [SessionId; 2]) {
    let mut world = World::new();
    let (_, first) = world.node(4);
    let (_, second) = world.node(4);
    let jobs = ["a", "b"].map(|key| {
        let job = world.submit(key, &spec("ranks = 2\n[restart]\nattempts = 9"));
        for (node, session) in [(1, first), (2, second)] {
            let rank = world.newest_on(job, node);
            world.ready(session, rank);
        }
        assert_eq!(world.state(job), JobState::Running);
        job
    });
    (world, jobs, [first, second])
}

#[test]
fn a_node_on_which_ranks_of_two_jobs_fail_is_left_alone_and_tried_again_with_one_rank() {
    let (mut world, [a, b], [first, second]) = two_jobs();
    for job in [a, b, a] {
        assert_eq!(world.node_state(2).0, NodeState::Up);
        world.wait(5_000, &[first, second]);
        let rank = world.newest_on(job, 2);
        world.report(second, rank, exited(1));
    }
    let (state, reason) = world.node_state(2);
    assert_eq!(state, NodeState::Quarantined);
    assert!(reason.starts_with("3 ranks of job-1, job-2 failed here and not elsewhere"), "{reason}");
    // A rank that is there may stay; what is lacking goes elsewhere, though the other node is fuller. A restart forgets nothing.
    let stays = world.newest_on(b, 2);
    world.wait(5_000, &[first, second]);
    world.report(second, stays, exited(1));
    world.wait(5_000, &[first, second]);
    for job in [a, b] {
        let rank = world.newest_on(job, 1);
        world.ready(first, rank);
    }
    world.restart();
    let held: Vec<RankId> = world.control.cluster().members().node(NodeId(1)).unwrap().held.keys().copied().collect();
    assert_eq!(held.len(), 4);
    let first = world.connect(NodeId(1), 4, 1, &held);
    let second = world.connect(NodeId(2), 4, 1, &[]);
    assert_eq!(world.node_state(2).0, NodeState::Quarantined);
    world.wait(600_000, &[first, second]);
    assert!(world.node_state(2).1.contains("it is on probation"), "{:?}", world.node_state(2));
    // One rank tries it, and not two.
    let both = world.submit("both", &spec("ranks = 2\ncpus = 2"));
    assert_eq!(world.state(both), JobState::Queued, "two ranks of two processors have no room but there");
    let one = world.submit("one", &spec("ranks = 1\ncpus = 4"));
    let tries = world.newest_on(one, 2);
    world.ready(second, tries);
    world.report(second, tries, shard(4, 0));
    assert_eq!(world.node_state(2), (NodeState::Up, String::new()));
}

#[test]
fn a_node_that_fails_its_trial_stays_in_quarantine_until_somebody_lifts_it() {
    let mut world = World::new();
    let (_, session) = world.node(1);
    let now = world.now();
    world.control.now = now;
    let mut step = Step::default();
    world.control.quarantine(&mut step, NodeId(1), "its memory has errors".into()).unwrap();
    world.records.extend(step.records);
    let job = world.submit("k", &spec("[restart]\nattempts = 9"));
    assert_eq!(world.state(job), JobState::Queued);
    world.wait(601_000, &[session]);
    assert_eq!(world.state(job), JobState::Starting, "it tries the node");
    world.report(session, id(job, 1, 0), exited(1));
    let (state, reason) = world.node_state(1);
    assert_eq!((state, world.state(job)), (NodeState::Quarantined, JobState::Queued));
    assert!(reason.contains("before that: its memory has errors"), "{reason}");
    let release = Request::ReleaseNode { node: NodeId(1) };
    let Reply::Node(view) = world.ask(&user(UserRole::Operator, "op"), release) else { panic!("not lifted") };
    assert_eq!(view.state, NodeState::Up);
    assert_eq!(world.state(job), JobState::Starting);
}

#[test]
fn a_poison_job_puts_no_node_in_quarantine() {
    let (mut world, [a, _], [first, second]) = two_jobs();
    for _ in 0..6 {
        world.wait(60_000, &[first, second]);
        if world.state(a) == JobState::Running {
            let rank = world.newest_on(a, 2);
            world.report(second, rank, exited(1));
        }
    }
    assert_eq!((world.node_state(1).0, world.node_state(2).0), (NodeState::Up, NodeState::Up));
}
