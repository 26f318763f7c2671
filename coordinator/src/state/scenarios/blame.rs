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

    /// All ranks that are placed come up and train with the others; sessions are those of node 1 and on.
    fn bring_up(&mut self, job: JobId, sessions: &[SessionId]) {
        let session = |node: NodeId| sessions[node.0 as usize - 1];
        let run = |world: &Self| world.control.cluster().jobs().get(job).unwrap().run.clone().unwrap();
        for (id, rank) in run(self).ranks.iter().filter(|(_, rank)| rank.is_wanted() && rank.address.is_none()) {
            self.ready(session(rank.node), *id);
        }
        while let Some(id) = run(self).joining.first() {
            let (node, generation) = (run(self).ranks[id].node, run(self).generation);
            self.report(session(node), *id, RankEvent::Joined { generation, step: TrainStep(0) });
        }
        assert_eq!(self.state(job), JobState::Running);
    }

    /// Every few seconds the newest rank of one of these jobs on a node dies, and another one takes its place.
    fn fail_in_turn(&mut self, jobs: &[JobId], node: u64, sessions: &[SessionId]) {
        for job in jobs {
            let rank = self.newest_on(*job, node);
            self.report(sessions[node as usize - 1], rank, exited(1));
            self.wait(5_000, sessions);
            self.bring_up(*job, sessions);
        }
    }

    /// The coordinator dies; these nodes come back with all that they hold.
    fn restart_with<const NODES: usize>(&mut self, cpus: [u32; NODES]) -> Vec<SessionId> {
        self.restart();
        let connect = |(node, cpus)| {
            let node = self.control.cluster().members().node(NodeId(node)).unwrap();
            let (id, held) = (node.id, node.held.keys().copied().collect::<Vec<RankId>>());
            self.connect(id, cpus, 1, &held)
        };
        (1..).zip(cpus).map(connect).collect()
    }
}

/// Two jobs, each with a rank on each of some nodes.
fn two_jobs_on<const NODES: usize>(cpus: u32, more: &str) -> (World, [JobId; 2], [SessionId; NODES]) {
    let mut world = World::new();
    let sessions = [(); NODES].map(|()| world.node(cpus).1);
    let jobs = ["a", "b"].map(|key| {
        let job = world.submit(key, &spec(&format!("ranks = {NODES}\n{more}\n[restart]\nattempts = 99")));
        for (node, session) in (1..).zip(sessions) {
            let rank = world.newest_on(job, node);
            world.ready(session, rank);
        }
        assert_eq!(world.state(job), JobState::Running);
        job
    });
    (world, jobs, sessions)
}

fn two_jobs() -> (World, [JobId; 2], [SessionId; 2]) {
    two_jobs_on(4, "")
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

/// F33: found by killing ranks of two jobs on one node after the other. Each was put in quarantine, because of failures "not elsewhere".
#[test]
fn two_jobs_that_fail_everywhere_take_one_node_away_and_no_other() {
    let (mut world, [a, b], sessions) = two_jobs_on::<3>(2, "");
    let quarantined = |world: &mut World| [1, 2, 3].map(|node| world.node_state(node).0 == NodeState::Quarantined);
    world.fail_in_turn(&[a, a, b], 1, &sessions);
    assert_eq!(quarantined(&mut world), [true, false, false]);
    // All nodes are full: who dies comes back where it was, but for the rank that the first node may not have.
    let sessions = [&sessions[..], &[world.node(1).1]].concat();
    world.wait(5_000, &sessions);
    world.bring_up(b, &sessions);
    for node in [2, 3, 2, 3] {
        world.fail_in_turn(&[a, b], node, &sessions);
    }
    assert_eq!(quarantined(&mut world), [true, false, false]);
    // Nor later, while the first is on probation, and over a restart.
    world.wait(601_000, &sessions);
    assert!(world.node_state(1).1.contains("it is on probation"), "{:?}", world.node_state(1));
    let sessions = world.restart_with([2, 2, 2, 1]);
    world.fail_in_turn(&[a, b, a, b], 2, &sessions);
    assert_eq!(quarantined(&mut world), [false; 3]);
    // Nor when a person lifts it; a third job takes the room that there is then.
    let Reply::Node(_) = world.ask(&user(UserRole::Operator, "op"), Request::ReleaseNode { node: NodeId(1) }) else {
        panic!("not lifted")
    };
    world.submit("c", &spec(""));
    world.fail_in_turn(&[a, b, a, b], 3, &sessions);
    assert_eq!(quarantined(&mut world), [false; 3]);
}

/// F33: a job that fails as a whole is told of by one rank first, and is being stopped when the others tell.
#[test]
fn a_job_whose_ranks_fail_together_speaks_against_no_node() {
    let (mut world, [a, b], [first, second]) = two_jobs_on::<2>(4, "ranks_min = 2");
    let both = [(2, second), (1, first)];
    let mut fall = |job: JobId, codes: [i32; 2]| {
        let ranks = both.map(|(node, _)| world.newest_on(job, node));
        for ((rank, (_, session)), code) in ranks.into_iter().zip(both).zip(codes) {
            world.report(session, rank, exited(code));
        }
        let states = [1, 2].map(|node| world.node_state(node).0);
        world.wait(66_000, &[first, second]);
        for (node, session) in both.into_iter().filter(|_| states == [NodeState::Up; 2]) {
            let rank = world.newest_on(job, node);
            world.ready(session, rank);
        }
        states
    };
    for job in [a, b, a, b] {
        assert_eq!(fall(job, [1, 1]), [NodeState::Up; 2]);
    }
    // Where the other rank only does what it is told, the node is to blame.
    let found = (0..24).any(|at| fall([a, b][at % 2], [1, 4]) == [NodeState::Up, NodeState::Quarantined]);
    assert!(found, "the others failed long ago");
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
