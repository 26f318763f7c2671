//! Jobs that run a command: whole gangs begin anew, and the end of each command is told.

use stoke_protocol::message::rank::Purpose;

use super::*;

fn spec(more: &str) -> String {
    format!("name = \"e\"\n[exec]\ncommand = [\"a\"]\ngrace = \"3s\"\n[resources]\nmemory = 1024\n{more}\n")
}

fn ended(generation: u64, code: i32) -> RankEvent {
    RankEvent::CommandEnded { generation: Generation(generation), exit: Exit::Code(code) }
}

fn failed(permanent: bool) -> RankEvent {
    RankEvent::Failed { error: "the command exited with code 3".into(), permanent }
}

/// Two nodes run the two ranks of a job.
fn running(more: &str) -> (World, JobId, [SessionId; 2]) {
    let mut world = World::new();
    let sessions = [world.node(2).1, world.node(1).1];
    let job = world.submit("k", &spec(&format!("ranks = 2\n{more}")));
    for (rank, session) in (0..).zip(sessions) {
        world.ready(session, id(job, 1, rank));
    }
    world.report(sessions[0], id(job, 1, 0), resumed(1, 0));
    assert_eq!(world.state(job), JobState::Running);
    (world, job, sessions)
}

fn restarts(world: &mut World, session: SessionId) -> Vec<u32> {
    let told = world.told(session).into_iter();
    told.filter_map(
        |message| if let ToNode::Membership { membership, .. } = message { Some(membership.restarts) } else { None },
    )
    .collect()
}

fn grace(world: &mut World, session: SessionId) -> Option<u64> {
    let told = world.told(session).into_iter();
    told.filter_map(|message| if let ToNode::Stop { grace_ms, .. } = message { Some(grace_ms) } else { None })
        .next_back()
}

#[test]
fn a_job_is_done_when_the_commands_of_all_ranks_have_exited_with_0() {
    let (mut world, job, [first, second]) = running("");
    world.report(first, id(job, 1, 0), ended(1, 0));
    assert_eq!(world.state(job), JobState::Running);
    // What has exited with 0 is not needed any more.
    world.report(first, id(job, 1, 0), exited(1));
    assert_eq!(world.state(job), JobState::Running);
    world.told(second);
    world.report(second, id(job, 1, 1), ended(1, 0));
    assert_eq!(world.state(job), JobState::Succeeded);
    assert!(world.told(second).iter().any(|message| matches!(message, ToNode::Release { .. })));
    let view = world.control.job_view(world.control.cluster().jobs().get(job).unwrap());
    let exec = view.exec.unwrap();
    assert_eq!((exec.restarts, exec.exits.len(), view.outcome), (0, 2, None));
}

#[test]
fn a_gang_begins_anew_when_a_command_fails_until_its_attempts_are_over() {
    let (mut world, job, [first, second]) = running("[restart]\nattempts = 2");
    assert_eq!(restarts(&mut world, first), [0]);
    world.report(first, id(job, 1, 0), ended(1, 0));
    world.report(second, id(job, 1, 1), ended(1, 3));
    world.report(second, id(job, 1, 1), failed(false));
    assert_eq!(world.state(job), JobState::Recovering, "it goes on with no fewer than all");
    assert_eq!(grace(&mut world, first), Some(8_000), "its command's grace comes on top");
    world.report(second, id(job, 1, 1), exited(1));
    world.report(first, id(job, 1, 0), exited(4));
    assert_eq!(world.state(job), JobState::Starting);
    world.ready(first, id(job, 2, 0));
    world.ready(second, id(job, 2, 1));
    assert_eq!(restarts(&mut world, first), [1]);
    world.report(first, id(job, 2, 0), resumed(2, 0));
    world.report(first, id(job, 2, 0), failed(false));
    world.report(first, id(job, 2, 0), exited(1));
    world.report(second, id(job, 2, 1), exited(4));
    assert_eq!(world.state(job), JobState::Failed);
    let ended = world.control.cluster().jobs().get(job).unwrap();
    let reason = &ended.reason;
    assert!(reason.contains("exited with code 3") && reason.contains("attempt 2 of 2"), "{reason}");
    assert_eq!((ended.failures, ended.recoveries), (2, 1), "the last failure is no recovery");
}

#[test]
fn an_exit_code_that_ends_the_job_leaves_no_attempt() {
    let (mut world, job, [first, second]) = running("ranks_min = 1");
    world.report(second, id(job, 1, 1), failed(true));
    assert_eq!(world.state(job), JobState::Recovering, "the others could go on, and do not");
    world.report(second, id(job, 1, 1), exited(1));
    world.report(first, id(job, 1, 0), exited(4));
    let ended = world.control.cluster().jobs().get(job).unwrap();
    assert_eq!((ended.state, ended.recoveries), (JobState::Failed, 0));
}

#[test]
fn an_elastic_gang_shrinks_and_grows_and_ends_of_older_generations_do_not_count() {
    let (mut world, job, [first, second]) = running("ranks_min = 1");
    world.told(first);
    world.report(first, id(job, 1, 0), ended(1, 0));
    world.report(second, id(job, 1, 1), failed(false));
    assert_eq!(world.state(job), JobState::Running);
    assert_eq!(restarts(&mut world, first), [1]);
    // It had exited before it knew.
    world.report(first, id(job, 1, 0), ended(1, 0));
    assert_eq!(world.state(job), JobState::Running);
    world.report(second, id(job, 1, 1), exited(1));
    let successor = id(job, 3, 1);
    // It may be on either node.
    let run = world.control.cluster().jobs().get(job).unwrap().run.clone().unwrap();
    let there = if run.ranks[&successor].node == NodeId(1) { first } else { second };
    world.ready(there, successor);
    let joins = world.told(there).iter().filter_map(membership).next_back();
    assert_eq!(joins, Some((4, 1, 1, Some(2))));
    world.report(there, successor, RankEvent::Joined { generation: Generation(4), step: TrainStep(0) });
    let grown = world.told(first).iter().filter_map(membership).next_back();
    assert_eq!(grown, Some((5, 2, 0, Some(4))));
    world.report(first, id(job, 1, 0), ended(5, 0));
    world.report(there, successor, ended(5, 0));
    assert_eq!(world.state(job), JobState::Succeeded);
}

#[test]
fn a_command_makes_room_for_a_more_urgent_job_without_a_checkpoint_of_ours() {
    let (mut world, job, [first, second]) = running("");
    world.told(first);
    let urgent = world.submit("k2", &spec("ranks = 2").replace("name = \"e\"", "name = \"u\"\npriority = 5"));
    let purposes: Vec<_> = world.told(first).into_iter().collect();
    let holds = |message: &ToNode| matches!(message, ToNode::Membership { membership, .. } if membership.purpose == Purpose::Checkpoint);
    assert!(purposes.iter().any(holds), "{purposes:?}");
    // Its command has ended.
    world.report(first, id(job, 1, 0), resumed(2, 0));
    assert_eq!(world.state(job), JobState::Recovering);
    world.report(first, id(job, 1, 0), exited(4));
    world.report(second, id(job, 1, 1), exited(4));
    assert_eq!((world.state(job), world.state(urgent)), (JobState::Queued, JobState::Starting));
    assert_eq!(world.control.cluster().jobs().get(job).unwrap().failures, 0);
}
