//! A job from its gang to its end: ranks that are lost, added and resized, and checkpoints on the way.

use super::*;

#[test]
fn a_job_runs_commits_a_checkpoint_and_succeeds() {
    let (mut world, job, [first, second]) = running();
    assert!(matches!(world.told(second)[..], [ToNode::Welcome { .. }, ToNode::Start(_), ToNode::Membership { .. }]));
    world.report(first, id(job, 1, 0), shard(10, 0));
    world.told(first);
    world.report(second, id(job, 1, 1), shard(10, 1));
    assert!(matches!(&world.told(first)[..], [ToNode::Commit { shards, .. }] if shards.len() == 2));
    world.report(first, id(job, 1, 0), manifest(job, 10, 1));
    assert!(matches!(world.told(second)[..], [ToNode::Committed { .. }]));
    world.report(first, id(job, 1, 0), outcome(1));
    world.report(second, id(job, 1, 1), outcome(1));
    assert_eq!(world.state(job), JobState::Succeeded);
    assert!(matches!(world.told(second)[..], [ToNode::Release { .. }]));
    world.report(first, id(job, 1, 0), exited(0));
    world.report(second, id(job, 1, 1), exited(0));
    let used: u32 = world.control.cluster().members().nodes().map(|node| node.used.cpus).sum();
    assert_eq!(used, 0);
    world.restart();
    assert_eq!(world.state(job), JobState::Succeeded);
}

#[test]
fn replicas_that_differ_fail_the_job_and_are_named() {
    let (mut world, job, [first, second]) = running();
    world.report(first, id(job, 1, 0), outcome(1));
    world.report(second, id(job, 1, 1), outcome(2));
    assert_eq!(world.state(job), JobState::Recovering);
    world.report(first, id(job, 1, 0), exited(0));
    world.report(second, id(job, 1, 1), exited(0));
    assert_eq!(world.state(job), JobState::Failed);
    let reason = &world.control.cluster().jobs().get(job).unwrap().reason;
    assert!(reason.contains("replicas differ: rank-"), "{reason}");
}

/// J7 (I20): a rank that says it has done ten steps and has seen the samples of nine.
#[test]
fn a_ledger_that_lacks_samples_fails_the_job_and_names_the_rank() {
    let (mut world, job, [first, second]) = running();
    let RankEvent::Finished { generation, mut outcome } = finished(1, 1) else { unreachable!("it finishes") };
    world.report(first, id(job, 1, 0), finished(1, 1));
    outcome.ledger.end = 72;
    world.report(second, id(job, 1, 1), RankEvent::Finished { generation, outcome });
    world.report(first, id(job, 1, 0), exited(0));
    world.report(second, id(job, 1, 1), exited(0));
    assert_eq!(world.state(job), JobState::Failed);
    let reason = &world.control.cluster().jobs().get(job).unwrap().reason;
    assert!(reason.contains("rank-1 has the ledger [0, 72) after 80 samples"), "{reason}");
}

#[test]
fn the_others_go_on_without_a_rank_that_dies_and_its_successor_joins_between_two_steps() {
    let (mut world, job, [first, second]) = running();
    world.report(first, id(job, 1, 0), resumed(1, 0));
    world.told(first);
    world.report(second, id(job, 1, 1), RankEvent::Exited { exit: Exit::Signal(9) });
    assert_eq!(world.state(job), JobState::Running);
    assert_eq!(world.told(first).iter().filter_map(membership).collect::<Vec<_>>(), [(2, 1, 0, None)]);
    // Its slot is free again, so another process takes it.
    let told = world.told(second);
    assert!(
        matches!(&told[..], [.., ToNode::Start(start)] if start.id == id(job, 3, 1) && start.from == StartFrom::Peers),
        "{told:?}"
    );
    world.ready(second, id(job, 3, 1));
    assert_eq!(world.told(first).iter().filter_map(membership).collect::<Vec<_>>(), [(4, 1, 1, Some(2))]);
    // What it says of another generation does not count.
    world.report(second, id(job, 3, 1), RankEvent::Joined { generation: Generation(3), step: TrainStep(5) });
    assert!(world.told(first).is_empty());
    world.report(second, id(job, 3, 1), RankEvent::Joined { generation: Generation(4), step: TrainStep(5) });
    assert_eq!(world.told(first).iter().filter_map(membership).collect::<Vec<_>>(), [(5, 2, 0, Some(4))]);
    // A late shard of the dead rank changes nothing (I2).
    world.report(second, id(job, 1, 1), shard(7, 1));
    assert_eq!(world.control.cluster().counts().foreign_reports, 1);
    world.restart();
    let back = world.connect(NodeId(1), 2, 1, &[id(job, 1, 0)]);
    assert_eq!(world.told(back).iter().filter_map(membership).collect::<Vec<_>>(), [(5, 2, 0, None)]);
}

#[test]
fn a_checkpoint_that_a_generation_did_not_finish_is_stored_again_by_the_next() {
    let (mut world, job, [first, second]) = running();
    world.report(first, id(job, 1, 0), shard(10, 0));
    world.report(second, id(job, 1, 1), shard(10, 1));
    world.report(second, id(job, 1, 1), exited(1));
    world.told(first);
    // The manifest was on its way: too late, and its folder is to be removed.
    world.report(first, id(job, 1, 0), manifest(job, 10, 1));
    assert!(world.control.cluster().catalogue().last(job).is_none());
    world.report(first, id(job, 1, 0), shard_of(2, 10, 0));
    assert!(matches!(&world.told(first)[..], [ToNode::Commit { shards, .. }] if shards.len() == 1));
    world.report(first, id(job, 1, 0), manifest(job, 10, 2));
    assert_eq!(world.control.cluster().catalogue().last(job).unwrap().generation, Generation(2));
    let told = world.told(first);
    assert!(matches!(&told[..], [ToNode::Committed { keep, .. }] if keep.0 == ["step-10-g2"]), "{told:?}");
    world.report(first, id(job, 1, 0), finished(2, 1));
    assert_eq!(world.state(job), JobState::Succeeded);
}

#[test]
fn checkpoints_that_come_faster_than_they_are_committed_are_passed_over() {
    let (mut world, job, [first, second]) = running();
    for (session, rank) in [(first, 0), (second, 1)] {
        for step in 1..=20 {
            world.report(session, id(job, 1, rank), shard(step, rank));
        }
    }
    let commits = |told: Vec<ToNode>| -> Vec<u64> {
        let step = |message| if let ToNode::Commit { step, .. } = message { Some(step.0) } else { None };
        told.into_iter().filter_map(step).collect()
    };
    assert_eq!(commits(world.told(first)), [13]);
    world.report(first, id(job, 1, 0), manifest(job, 9, 1));
    world.report(first, id(job, 1, 0), manifest(job, 13, 1));
    assert_eq!(commits(world.told(first)), [20]);
    world.report(first, id(job, 1, 0), manifest(job, 20, 1));
    assert_eq!(world.state(job), JobState::Running);
    let steps: Vec<u64> = world.control.cluster().catalogue().of(job).map(|checkpoint| checkpoint.step.0).collect();
    assert_eq!(steps, [13, 20]);
}

#[test]
fn a_damaged_checkpoint_gives_way_to_the_one_before_it() {
    let mut world = World::new();
    let (_, session) = world.node(1);
    let job = world.submit("k", &spec(""));
    world.ready(session, id(job, 1, 0));
    for step in [4, 8] {
        world.report(session, id(job, 1, 0), shard(step, 0));
        world.report(session, id(job, 1, 0), manifest(job, step, 1));
    }
    world.report(session, id(job, 1, 0), exited(1));
    let starts = |told: Vec<ToNode>| -> Vec<StartFrom> {
        let from = |message| if let ToNode::Start(start) = message { Some(start.from) } else { None };
        told.into_iter().filter_map(from).collect()
    };
    assert_eq!(
        starts(world.told(session)).last(),
        Some(&StartFrom::Checkpoint(committed_at("file:///c/job-1/step-8-g1")))
    );
    let (uri, error) = ("file:///c/job-1/step-8-g1".to_owned(), "a bit has changed".to_owned());
    world.report(session, id(job, 2, 0), RankEvent::Damaged { uri, error });
    world.report(session, id(job, 2, 0), exited(1));
    assert_eq!(starts(world.told(session)), [StartFrom::Checkpoint(committed_at("file:///c/job-1/step-4-g1"))]);
}

#[test]
fn too_few_ranks_end_the_run_and_the_next_continues_from_the_checkpoint() {
    let mut world = World::new();
    let (_, first) = world.node(2);
    let (_, second) = world.node(1);
    let job = world.submit("k", &spec("ranks = 2\nranks_min = 2"));
    world.ready(first, id(job, 1, 0));
    world.ready(second, id(job, 1, 1));
    world.report(first, id(job, 1, 0), shard(5, 0));
    world.report(second, id(job, 1, 1), shard(5, 1));
    world.report(first, id(job, 1, 0), manifest(job, 5, 1));
    world.told(first);
    world.report(second, id(job, 1, 1), RankEvent::Exited { exit: Exit::Signal(9) });
    assert_eq!(world.state(job), JobState::Recovering);
    assert!(matches!(world.told(first)[..], [ToNode::Stop { .. }]));
    world.report(first, id(job, 1, 0), exited(4));
    // Both slots are free again, so the next gang starts at once.
    assert_eq!(world.state(job), JobState::Starting);
    let told = world.told(first);
    let start = told.iter().find_map(|message| match message {
        ToNode::Start(start) => Some(start),
        _ => None,
    });
    assert_eq!(start.unwrap().from, StartFrom::Checkpoint(committed_at("file:///c/job-1/step-5-g1")));
}

#[test]
fn failures_without_getting_further_are_bounded() {
    let (mut world, job, [first, second]) = running();
    world.report(first, id(job, 1, 0), resumed(1, 3));
    world.report(second, id(job, 1, 1), exited(1));
    world.report(first, id(job, 1, 0), resumed(2, 9));
    world.report(second, id(job, 3, 1), exited(1));
    let failed = |world: &World| {
        let job = world.control.cluster().jobs().get(job).unwrap();
        (job.failures, job.turned_away)
    };
    assert_eq!(failed(&world), (0, 1), "what was never a member does not end a job that runs");
    world.report(first, id(job, 1, 0), exited(1));
    world.report(second, id(job, 4, 1), exited(4));
    assert_eq!((world.state(job), failed(&world).0), (JobState::Queued, 1), "the second failure in a row: not at once");
    for (generation, wait_ms) in [(5, 1_000), (6, 2_000)] {
        world.wait(wait_ms / 2, &[first, second]);
        assert_eq!(world.state(job), JobState::Queued);
        world.wait(wait_ms, &[first, second]);
        assert_eq!(world.state(job), JobState::Starting);
        world.report(first, id(job, generation, 0), RankEvent::Failed { error: "no data".into(), permanent: false });
        world.report(first, id(job, generation, 0), exited(1));
        world.report(second, id(job, generation, 1), exited(4));
    }
    assert_eq!(world.state(job), JobState::Failed);
    let reason = &world.control.cluster().jobs().get(job).unwrap().reason;
    assert!(reason.contains("no data") && reason.contains("attempt 3 of 3"), "{reason}");
}

#[test]
fn ranks_that_die_together_are_one_failure() {
    let (mut world, job, [first, second]) = running();
    world.report(first, id(job, 1, 0), resumed(1, 3));
    world.report(second, id(job, 1, 1), exited(1));
    world.report(first, id(job, 1, 0), exited(1));
    assert_eq!(world.control.cluster().jobs().get(job).unwrap().failures, 1);
}

#[test]
fn a_job_whose_evaluating_rank_is_gone_waits_for_the_metrics_of_the_next_one() {
    let (mut world, job, [first, second]) = running();
    world.report(second, id(job, 1, 1), outcome(1));
    world.report(first, id(job, 1, 0), exited(1));
    assert_eq!(world.state(job), JobState::Running);
    world.report(second, id(job, 1, 1), finished(2, 1));
    assert_eq!(world.state(job), JobState::Succeeded);
}

#[test]
fn a_gang_that_cannot_start_for_good_is_not_tried_again() {
    let mut world = World::new();
    let (_, session) = world.node(1);
    let job = world.submit("k", &spec(""));
    let error = "domains.csv is missing".to_owned();
    world.report(session, id(job, 1, 0), RankEvent::Failed { error, permanent: true });
    world.report(session, id(job, 1, 0), exited(1));
    assert_eq!(world.state(job), JobState::Failed);
}

#[test]
fn a_node_that_is_stopped_in_order_costs_its_jobs_no_attempt() {
    let mut world = World::new();
    let (node, mut session) = world.node(1);
    let job = world.submit("k", &spec(""));
    for number in 1..=5 {
        world.ready(session, id(job, number, 0));
        world.report(session, id(job, number, 0), RankEvent::Exited { exit: Exit::AgentStopped });
        world.step(Input::Closed { session });
        session = world.connect(node, 1, number + 1, &[id(job, number + 1, 0)]);
    }
    assert_ne!(world.state(job), JobState::Failed);
}

#[test]
fn a_job_is_resized_while_it_runs() {
    let (mut world, job, [first, second]) = running();
    let ada = user(UserRole::Submitter, "ada");
    let scale = |ranks| Request::Scale { job, ranks };
    assert!(matches!(world.ask(&ada, scale(9)), Reply::Refused(Refusal { code: RefusalCode::Invalid, .. })));
    let eve = user(UserRole::Submitter, "eve");
    assert!(matches!(world.ask(&eve, scale(1)), Reply::Refused(Refusal { code: RefusalCode::Forbidden, .. })));
    world.told(first);
    world.told(second);
    assert_eq!(world.ask(&ada, scale(1)), Reply::Scaled { job, ranks: 1 });
    // The one that leaves hears of it as the others do, and ends by itself.
    for session in [first, second] {
        assert_eq!(world.told(session).iter().filter_map(membership).collect::<Vec<_>>(), [(2, 1, 0, Some(1))]);
    }
    world.report(second, id(job, 1, 1), exited(0));
    let job_of = |world: &World| world.control.cluster().jobs().get(job).unwrap().clone();
    assert_eq!((job_of(&world).state, job_of(&world).failures), (JobState::Running, 0));
    assert_eq!(world.ask(&ada, scale(3)), Reply::Scaled { job, ranks: 3 });
    let placed: Vec<u32> = job_of(&world).run.unwrap().ranks.keys().map(|id| id.rank.0).collect();
    assert_eq!(placed, [0, 1, 2]);
    world.restart();
    assert_eq!(job_of(&world).ask.ranks, 3);
}

/// Where each part of the state is at two ranks, the others must have all of it.
#[test]
fn at_most_half_of_the_ranks_that_keep_parts_of_the_state_leave_at_once() {
    let mut world = World::new();
    let (_, session) = world.node(4);
    let sharded = spec("ranks = 4").replace("batch = 8", "batch = 8\nsharding = \"zero1\"");
    let job = world.submit("parts", &sharded);
    for rank in 0..4 {
        world.ready(session, id(job, 1, rank));
    }
    let operator = user(UserRole::Operator, "o");
    let refused = |world: &mut World, ranks| match world.ask(&operator, Request::Scale { job, ranks }) {
        Reply::Refused(refusal) => refusal.message,
        other => panic!("{other:?}"),
    };
    let words = refused(&mut world, 2);
    assert!(words.contains("try again in a moment"), "{words}");
    world.report(session, id(job, 1, 0), resumed(1, 0));
    let words = refused(&mut world, 1);
    assert!(
        words.contains("of the 4 ranks of job-1, which keep parts") && words.contains("scale it to 2 first"),
        "{words}"
    );
    assert_eq!(world.ask(&operator, Request::Scale { job, ranks: 2 }), Reply::Scaled { job, ranks: 2 });
    let words = refused(&mut world, 1);
    assert!(words.contains("try again in a moment"), "{words}");
    world.report(session, id(job, 1, 0), resumed(2, 5));
    assert_eq!(world.ask(&operator, Request::Scale { job, ranks: 1 }), Reply::Scaled { job, ranks: 1 });
}

/// J9: of the ranks that stay one is missing, and those that are left would be too few.
#[test]
fn a_job_is_not_resized_to_its_least_while_one_of_those_that_stay_is_being_replaced() {
    let mut world = World::new();
    let (_, session) = world.node(4);
    let job = world.submit("narrow", &spec("ranks = 4\nranks_min = 3"));
    for rank in 0..4 {
        world.ready(session, id(job, 1, rank));
    }
    world.report(session, id(job, 1, 1), RankEvent::Exited { exit: Exit::Signal(9) });
    let (operator, scale) = (user(UserRole::Operator, "o"), Request::Scale { job, ranks: 3 });
    let Reply::Refused(refusal) = world.ask(&operator, scale.clone()) else {
        panic!("two would go on, the least is three")
    };
    assert!(refusal.message.contains("only 2 are there"), "{refusal:?}");
    let generation = world.control.cluster().jobs().get(job).unwrap().generation.0;
    world.ready(session, id(job, generation, 1));
    let joined = RankEvent::Joined { generation: Generation(generation + 1), step: TrainStep(5) };
    world.report(session, id(job, generation, 1), joined);
    assert_eq!(world.ask(&operator, scale), Reply::Scaled { job, ranks: 3 });
}

#[test]
fn what_members_stored_of_a_checkpoint_that_will_not_be_is_abandoned() {
    let (mut world, job, [first, second]) = running();
    let at = (Generation(1), TrainStep(4));
    world.told(first);
    world.told(second);
    let full = RankEvent::NotStored { generation: at.0, step: at.1, error: "the disk is full".into() };
    world.report(second, id(job, 1, 1), full.clone());
    for (session, rank) in [(first, 0), (second, 1)] {
        let abandon = ToNode::Abandon { id: id(job, 1, rank), generation: at.0, step: at.1 };
        assert!(world.told(session).contains(&abandon), "rank {rank}");
    }
    // Nobody reads a line for each of them.
    let next = RankEvent::NotStored { generation: at.0, step: TrainStep(8), error: "the disk is full".into() };
    world.report(second, id(job, 1, 1), next);
    let lines = world.control.cluster().jobs().get(job).unwrap().timeline.lines();
    assert!(lines.last().unwrap().text.ends_with("the disk is full (2 in a row)"), "{lines:?}");
    // What a rank says of a generation that is over changes nothing.
    world.report(second, id(job, 1, 1), RankEvent::Exited { exit: Exit::Signal(9) });
    world.told(first);
    world.report(first, id(job, 1, 0), full);
    assert!(!world.told(first).iter().any(|message| matches!(message, ToNode::Abandon { .. })));
}

#[test]
fn of_two_ranks_that_lost_each_other_one_is_given_up() {
    let (mut world, job, [first, second]) = running();
    let lost = |peer| RankEvent::PeerLost { generation: Generation(1), peer, error: "silent".into() };
    world.report(first, id(job, 1, 0), lost(id(job, 1, 1)));
    world.report(second, id(job, 1, 1), lost(id(job, 1, 0)));
    world.step(Input::Tick);
    assert_eq!(world.control.cluster().jobs().get(job).unwrap().run.as_ref().unwrap().members.len(), 2);
    world.told(second);
    world.ms += 600;
    for session in [first, second] {
        world.step(Input::Heartbeat { session, heartbeat: heartbeat(5) });
    }
    world.step(Input::Tick);
    let run = world.control.cluster().jobs().get(job).unwrap().run.clone().unwrap();
    assert_eq!(run.members, [id(job, 1, 0)]);
    assert!(world.told(second).iter().any(|message| matches!(message, ToNode::Stop { .. })));
}

/// Of two ranks the first went on while the coordinator was away; it is the other one that is given up, though both say that they lost somebody.
#[test]
fn those_who_went_on_alone_are_the_next_generation() {
    let (mut world, job, [first, second]) = running();
    let lost = |peer| RankEvent::PeerLost { generation: Generation(1), peer, error: "silent".into() };
    world.report(second, id(job, 1, 1), lost(id(job, 1, 0)));
    let members = vec![id(job, 1, 0)].into();
    world.report(
        first,
        id(job, 1, 0),
        RankEvent::WentOn { generation: Generation(1), step: stoke_protocol::ids::Step(7), members },
    );
    world.pass(1_000, &[first, second]);
    let found = world.control.cluster().jobs().get(job).unwrap();
    assert_eq!(found.run.as_ref().unwrap().members, [id(job, 1, 0)]);
    let lines = found.timeline.lines();
    assert!(lines.iter().any(|line| line.text.contains("g1 went on at step-7 with 1 rank ")), "{lines:?}");
}
