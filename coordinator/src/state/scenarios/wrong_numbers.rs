//! Ranks that live and are wrong: replicas that differ, and sums that are not finite.

use stoke_protocol::ids::Fingerprint;
use stoke_protocol::message::rank::Given;

use super::*;

/// Three nodes run the three ranks of a job.
fn running_three(more: &str) -> (World, JobId, Vec<SessionId>) {
    let mut world = World::new();
    // Of equal nodes the newest gets the first rank.
    let mut sessions: Vec<SessionId> = (0..3).map(|_| world.node(1).1).collect();
    sessions.reverse();
    let text = spec("ranks = 3").replace("batch = 8", &format!("batch = 8\n{more}"));
    let job = world.submit("k", &text);
    for (rank, session) in (0..).zip(&sessions) {
        world.ready(*session, id(job, 1, rank));
    }
    assert_eq!(world.state(job), JobState::Running);
    world.report(sessions[0], id(job, 1, 0), resumed(1, 0));
    sessions.iter().for_each(|session| drop(world.told(*session)));
    (world, job, sessions)
}

fn differ(generation: u64, job: JobId, has: &[u64]) -> RankEvent {
    let replicas = (0..).zip(has).map(|(rank, has)| (id(job, 1, rank), Fingerprint(*has))).collect();
    RankEvent::Differ { generation: Generation(generation), step: TrainStep(7), replicas }
}

fn events(world: &World, job: JobId) -> String {
    let job = world.control.cluster().jobs().get(job).unwrap();
    job.timeline.lines().iter().map(|line| format!("{}\n", line.text)).collect()
}

#[test]
fn a_rank_with_other_parameters_than_most_is_named_ended_and_replaced() {
    let (mut world, job, sessions) = running_three("");
    for rank in [1, 0, 2] {
        world.report(sessions[rank as usize], id(job, 1, rank), differ(1, job, &[5, 6, 5]));
    }
    assert!(matches!(&world.told(sessions[1])[..], [ToNode::Stop { id, .. }, ..] if id.rank == Rank(1)));
    assert_eq!(world.told(sessions[2]).iter().filter_map(membership).collect::<Vec<_>>(), [(2, 2, 0, None)]);
    assert!(events(&world, job).contains("after step-7 rank-1 on node-2 has 0000000000000006 as its parameters"));
    assert_eq!((world.state(job), world.control.cluster().jobs().get(job).unwrap().failures), (JobState::Running, 1));
    // Another process takes its place, on a node that has a mark; three of them and it gets no more ranks.
    world.report(sessions[1], id(job, 1, 1), exited(4));
    assert!(
        world.told(sessions[1]).iter().any(|told| matches!(told, ToNode::Start(start) if start.id.rank == Rank(1)))
    );
    assert_eq!(world.control.cluster().miscomputed()[&NodeId(2)], 1);
    world.restart();
}

#[test]
fn a_job_without_a_majority_and_one_that_compares_seldom_go_back_to_the_last_checkpoint() {
    let cases =
        [("", [5, 6, 7], "none have a majority", 0), ("digest_every = 10", [5, 5, 6], "wrong numbers may be", 1)];
    for (train, has, words, marks) in cases {
        let (mut world, job, sessions) = running_three(train);
        for rank in 0..3 {
            world.report(sessions[rank as usize], id(job, 1, rank), shard(4, rank));
        }
        world.report(sessions[0], id(job, 1, 0), manifest(job, 4, 1));
        world.report(sessions[2], id(job, 1, 2), differ(1, job, &has));
        assert_eq!(world.state(job), JobState::Recovering);
        let told = events(&world, job);
        assert!(told.contains(words) && told.contains("goes back to its checkpoint at step-4"), "{told}");
        assert!(told.contains("rank-2 on node-1"), "{told}");
        assert_eq!(world.control.cluster().miscomputed().values().sum::<u32>(), marks);
        for rank in 0..3 {
            world.report(sessions[rank as usize], id(job, 1, rank), exited(4));
        }
        assert_eq!(world.state(job), JobState::Starting);
        let from = StartFrom::Checkpoint(committed_at(&format!("file:///c/{job}/step-4-g1")));
        let starts = world.told(sessions[0]);
        assert!(starts.iter().any(|told| matches!(told, ToNode::Start(start) if start.from == from)), "{starts:?}");
    }
}

#[test]
fn a_job_that_has_lost_a_part_of_its_state_goes_back_to_the_last_checkpoint_once() {
    let (mut world, job, sessions) = running_three("sharding = \"zero1\"");
    for rank in 0..3 {
        world.report(sessions[rank as usize], id(job, 1, rank), shard(4, rank));
    }
    world.report(sessions[0], id(job, 1, 0), manifest(job, 4, 1));
    let lost = |generation| {
        let error = "nobody has it".to_owned();
        RankEvent::StateLost { generation: Generation(generation), step: TrainStep(7), error }
    };
    // Of a generation that is over.
    world.report(sessions[1], id(job, 1, 1), lost(0));
    assert_eq!(world.state(job), JobState::Running);
    for rank in [1, 0, 2] {
        world.report(sessions[rank as usize], id(job, 1, rank), lost(1));
    }
    assert_eq!(world.state(job), JobState::Recovering);
    let told = events(&world, job);
    assert_eq!(told.matches("after step-7 nobody has it; the job goes back to its checkpoint at step-4").count(), 1);
    for rank in 0..3 {
        world.report(sessions[rank as usize], id(job, 1, rank), exited(4));
    }
    let from = StartFrom::Checkpoint(committed_at(&format!("file:///c/{job}/step-4-g1")));
    let starts = world.told(sessions[0]);
    assert!(starts.iter().any(|told| matches!(told, ToNode::Start(start) if start.from == from)), "{starts:?}");
    assert_eq!(world.control.cluster().jobs().get(job).unwrap().failures, 1);
    world.restart();
}

#[test]
fn a_checkpoint_whose_shards_are_of_different_states_is_not_committed() {
    let (mut world, job, sessions) = running_three("");
    for (rank, has) in [(0, 1), (1, 1), (2, 2)] {
        let RankEvent::ShardStored { generation, step, shard, .. } = shard(4, rank) else { unreachable!() };
        let stored = RankEvent::ShardStored { generation, step, shard, state: Fingerprint(has) };
        world.report(sessions[rank as usize], id(job, 1, rank), stored);
    }
    assert!(world.control.cluster().catalogue().last(job).is_none());
    assert!(!world.told(sessions[0]).iter().any(|told| matches!(told, ToNode::Commit { .. })));
    assert!(matches!(&world.told(sessions[2])[..], [ToNode::Stop { id, .. }, ..] if id.rank == Rank(2)));
    assert!(events(&world, job).contains("rank-2 on node-1 has 0000000000000002 as its state, 2 others have"));
    assert_eq!(world.state(job), JobState::Running);
}

#[test]
fn a_node_whose_ranks_are_wrong_again_and_again_gets_no_more() {
    let (mut world, job, sessions) = running_three("");
    let mut wrong = id(job, 1, 1);
    for time in 1..=3 {
        let run = world.control.cluster().jobs().get(job).unwrap().run.clone().unwrap();
        let replicas = run.members.iter().map(|id| (*id, Fingerprint(u64::from(*id == wrong)))).collect();
        let generation = run.generation;
        world.report(sessions[0], id(job, 1, 0), RankEvent::Differ { generation, step: TrainStep(time), replicas });
        world.report(sessions[1], wrong, exited(4));
        world.report(sessions[0], id(job, 1, 0), resumed(world.generation(job).0, 10 * time));
        world.ms += 60_000;
        for (session, sequence) in sessions.iter().zip([time; 3]) {
            world.step(Input::Heartbeat { session: *session, heartbeat: heartbeat(sequence) });
        }
        world.step(Input::Tick);
        let run = world.control.cluster().jobs().get(job).unwrap().run.clone().unwrap();
        let Some(next) = run.of_slot(Rank(1)) else {
            assert_eq!(time, 3, "{}", events(&world, job));
            return assert!(world.control.cluster().members().node(NodeId(2)).unwrap().is_quarantined());
        };
        wrong = next;
        world.ready(sessions[1], wrong);
        let generation = world.generation(job);
        world.report(sessions[1], wrong, RankEvent::Joined { generation, step: TrainStep(10 * time) });
    }
    panic!("{}", events(&world, job));
}

fn not_finite(generation: u64, given: Given) -> RankEvent {
    RankEvent::NotFinite { generation: Generation(generation), step: TrainStep(7), given }
}

fn of_lanes(lanes: &[u32]) -> Given {
    Given::NotFinite { lanes: lanes.to_vec().into() }
}

fn reason(world: &World, job: JobId) -> String {
    world.control.cluster().jobs().get(job).unwrap().reason.clone()
}

#[test]
fn a_sum_that_is_not_finite_fails_the_job_when_all_have_said_where_it_comes_from() {
    let (mut world, job, sessions) = running_three("");
    world.report(sessions[0], id(job, 1, 0), not_finite(1, Given::Finite));
    world.report(sessions[1], id(job, 1, 1), not_finite(1, of_lanes(&[3, 4])));
    assert_eq!(world.state(job), JobState::Running);
    world.report(sessions[2], id(job, 1, 2), not_finite(1, Given::Finite));
    assert_eq!(world.state(job), JobState::Recovering);
    for rank in 0..3 {
        world.report(sessions[rank as usize], id(job, 1, rank), exited(4));
    }
    assert_eq!(world.state(job), JobState::Failed);
    let reason = reason(&world, job);
    assert!(reason.contains("of step-7 is not finite, from lanes 3, 4 of rank-1 on node-2: lower"), "{reason}");
    world.restart();
}

#[test]
fn a_rank_whose_numbers_are_finite_when_it_computes_again_is_replaced() {
    let (mut world, job, sessions) = running_three("");
    for (rank, given) in [(0, Given::Finite), (1, Given::FiniteAgain), (2, Given::Finite)] {
        world.report(sessions[rank as usize], id(job, 1, rank), not_finite(1, given));
    }
    assert_eq!(world.state(job), JobState::Running);
    assert!(matches!(&world.told(sessions[1])[..], [ToNode::Stop { id, .. }, ..] if id.rank == Rank(1)));
    assert_eq!(world.told(sessions[2]).iter().filter_map(membership).collect::<Vec<_>>(), [(2, 2, 0, None)]);
    assert_eq!(world.control.cluster().miscomputed()[&NodeId(2)], 1);
    assert!(events(&world, job).contains("numbers of rank-1 on node-2 for step-7 were not finite, and are when"));
}

#[test]
fn a_job_goes_back_once_for_a_step_and_fails_when_it_is_not_finite_again() {
    let (mut world, job, sessions) = running_three("on_nan = \"rollback\"");
    for generation in [1, 2] {
        for rank in 0..3 {
            world.report(sessions[rank as usize], id(job, generation, rank), not_finite(generation, of_lanes(&[rank])));
        }
        assert_eq!(world.state(job), JobState::Recovering, "{}", events(&world, job));
        for rank in 0..3 {
            world.report(sessions[rank as usize], id(job, generation, rank), exited(4));
        }
        if generation == 1 {
            assert_eq!(world.state(job), JobState::Starting, "{}", events(&world, job));
            assert!(events(&world, job).contains("the job goes back to its beginning"));
            for rank in 0..3 {
                world.ready(sessions[rank as usize], id(job, 2, rank));
            }
        }
    }
    assert_eq!(world.state(job), JobState::Failed);
    assert!(reason(&world, job).contains("again after going back"), "{}", reason(&world, job));
}
