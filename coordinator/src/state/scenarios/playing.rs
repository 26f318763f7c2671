//! Jobs that learn with ranks that play environments: these come and go, and the gang goes on.

use stoke_protocol::ids::ROLLOUT_SLOTS;

use super::*;

const SPEC: &str = "name = \"rl\"\n[rl]\nalgorithm = \"ppo\"\n[resources]\nranks = 1\nrollouts = 2\nmemory = 1024\n";

fn player(job: JobId, generation: u64, number: u32) -> RankId {
    id(job, generation, ROLLOUT_SLOTS + number)
}

/// The newest list of those who play that a session was told.
fn players(world: &mut World, session: SessionId) -> Option<Vec<RankId>> {
    let rollouts = |message| if let ToNode::Rollouts { rollouts, .. } = message { Some(rollouts) } else { None };
    let newest = world.told(session).into_iter().filter_map(rollouts).next_back()?;
    Some(newest.iter().map(|member| member.id).collect())
}

/// One learner and two that play, on a node each, in this order.
fn learning() -> (World, JobId, [SessionId; 3]) {
    let mut world = World::new();
    let sessions = [1, 1, 1].map(|cpus| world.node(cpus).1);
    let job = world.submit("k", SPEC);
    let node_of = |world: &World, id: RankId| {
        let run = world.control.cluster().jobs().get(job).unwrap().run.clone().unwrap();
        sessions[run.ranks[&id].node.0 as usize - 1]
    };
    let learner = node_of(&world, id(job, 1, 0));
    world.ready(learner, id(job, 1, 0));
    assert_eq!(world.state(job), JobState::Running, "nobody waits for those who play");
    let [first, second] = [0, 1].map(|number| node_of(&world, player(job, 2, number)));
    world.ready(first, player(job, 2, 0));
    assert_eq!(players(&mut world, learner), Some(vec![player(job, 2, 0)]));
    world.ready(second, player(job, 2, 1));
    assert_eq!(players(&mut world, learner), Some(vec![player(job, 2, 0), player(job, 2, 1)]));
    (world, job, [learner, first, second])
}

fn node(world: &World, session: SessionId) -> NodeId {
    world.control.liveness().node(session).unwrap().0
}

#[test]
fn a_rank_that_plays_is_replaced_without_a_generation_or_a_failure() {
    let (mut world, job, sessions) = learning();
    let before = world.control.cluster().jobs().get(job).unwrap().clone();
    world.report(sessions[1], player(job, 2, 0), exited(137));
    let after = world.control.cluster().jobs().get(job).unwrap().clone();
    assert_eq!((after.failures, after.recoveries, after.state), (0, 0, JobState::Running));
    assert_eq!(after.run.as_ref().unwrap().generation, before.run.unwrap().generation);
    assert_eq!(players(&mut world, sessions[0]), Some(vec![player(job, 2, 1)]));
    world.ready(sessions[1], player(job, 3, 0));
    assert_eq!(players(&mut world, sessions[0]), Some(vec![player(job, 2, 1), player(job, 3, 0)]));
}

#[test]
fn a_learner_that_comes_back_is_told_who_plays_and_one_that_dies_takes_nobody_along() {
    let (mut world, job, sessions) = learning();
    let own = node(&world, sessions[0]);
    let learner = world.connect(own, 1, 2, &[id(job, 1, 0)]);
    assert_eq!(players(&mut world, learner).map(|players| players.len()), Some(2));
    world.report(learner, id(job, 1, 0), exited(137));
    // The only learner: its gang begins again, with those who play.
    assert_eq!(world.state(job), JobState::Recovering);
    world.report(sessions[1], player(job, 2, 0), exited(4));
    world.report(sessions[2], player(job, 2, 1), exited(4));
    assert_eq!(world.state(job), JobState::Starting);
}

#[test]
fn those_who_play_are_released_when_the_job_has_learned() {
    let (mut world, job, sessions) = learning();
    world.told(sessions[1]);
    world.report(sessions[0], id(job, 1, 0), shard(10, 0));
    world.report(sessions[0], id(job, 1, 0), manifest(job, 10, 1));
    world.report(sessions[0], id(job, 1, 0), finished(1, 1));
    assert_eq!(world.state(job), JobState::Succeeded);
    assert!(world.told(sessions[1]).iter().any(|message| matches!(message, ToNode::Release { .. })));
    world.report(sessions[0], id(job, 1, 0), exited(0));
    world.report(sessions[1], player(job, 2, 0), exited(0));
    world.report(sessions[2], player(job, 2, 1), exited(0));
    let used: u32 = world.control.cluster().members().nodes().map(|node| node.used.cpus).sum();
    assert_eq!(used, 0);
}

#[test]
fn a_node_that_is_drained_loses_who_plays_there_at_once() {
    let (mut world, job, sessions) = learning();
    let drain = Request::Drain { node: node(&world, sessions[1]), deadline_ms: None };
    world.ask(&user(UserRole::Admin, "admin"), drain);
    assert_eq!(players(&mut world, sessions[0]), Some(vec![player(job, 2, 1)]));
    let stopped = |message: &ToNode| matches!(message, ToNode::Stop { id, .. } if *id == player(job, 2, 0));
    assert!(world.told(sessions[1]).iter().any(stopped));
}
