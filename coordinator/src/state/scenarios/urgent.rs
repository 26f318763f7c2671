//! Jobs that make room for more urgent ones: who does, how, and how they come back.

use stoke_protocol::message::rank::Purpose;

use super::*;
use crate::state::machine::Job;

impl World {
    fn job_in(&self, job: JobId) -> &Job {
        self.control.cluster().jobs().get(job).unwrap()
    }

    fn ask_cancel(&mut self, job: JobId) {
        // It is answered when its ranks are gone.
        let _later = self.try_ask(&user(UserRole::Operator, "o"), Request::Cancel { job });
    }

    fn why(&mut self, job: JobId) -> String {
        match self.ask(&user(UserRole::Viewer, "v"), Request::Job { job }) {
            Reply::Job(view) => view.reason,
            other => panic!("{other:?}"),
        }
    }
}

fn urgent(priority: i32, ranks: u32) -> String {
    format!("priority = {priority}\n{}", spec(&format!("ranks = {ranks}")))
}

/// A job of two ranks that goes on with no fewer fills the only node.
fn full() -> (World, JobId, SessionId) {
    let mut world = World::new();
    let (_, session) = world.node(2);
    let job = world.submit("low", &spec("ranks = 2\nranks_min = 2"));
    for rank in 0..2 {
        world.ready(session, id(job, 1, rank));
    }
    world.report(session, id(job, 1, 0), resumed(1, 0));
    world.told(session);
    (world, job, session)
}

/// A job of one rank that trains.
fn run_one(world: &mut World, session: SessionId, (key, priority): (&str, i32)) -> JobId {
    let job = world.submit(key, &urgent(priority, 1));
    world.ready(session, id(job, 1, 0));
    job
}

/// Two ranks store a checkpoint, and it is committed.
fn store(world: &mut World, session: SessionId, job: JobId, (generation, step): (u64, u64)) {
    for rank in 0..2 {
        world.report(session, id(job, 1, rank), shard_of(generation, step, rank));
    }
    world.report(session, id(job, 1, 0), manifest(job, step, generation));
}

/// Both ranks of a job finish and are gone.
fn end(world: &mut World, session: SessionId, job: JobId) {
    for rank in 0..2 {
        world.report(session, id(job, 1, rank), outcome(1));
    }
    for rank in 0..2 {
        world.report(session, id(job, 1, rank), exited(0));
    }
}

fn purposes(told: Vec<ToNode>) -> Vec<(u64, Purpose, Option<u64>)> {
    let purpose = |message| match message {
        ToNode::Membership { membership, .. } => {
            Some((membership.generation.0, membership.purpose, membership.after.map(|after| after.0)))
        }
        _ => None,
    };
    told.into_iter().filter_map(purpose).collect()
}

#[test]
fn a_less_urgent_job_stores_a_checkpoint_stops_and_goes_on_from_there() {
    let (mut world, low, session) = full();
    let high = world.submit("high", &urgent(5, 2));
    // Between two steps, like every planned generation: all its members store the same step, and hold.
    assert_eq!(purposes(world.told(session)), [(2, Purpose::Checkpoint, Some(1)); 2]);
    assert!(world.why(high).contains(&format!("room is made for it by {low}")), "{}", world.why(high));
    assert!(world.why(low).contains(&format!("makes room for {high}")), "{}", world.why(low));
    world.report(session, id(low, 1, 0), resumed(2, 7));
    assert_eq!(world.state(low), JobState::Running, "there is something to store");
    world.told(session);
    store(&mut world, session, low, (2, 7));
    assert_eq!(world.state(low), JobState::Recovering);
    assert_eq!(world.told(session).iter().filter(|told| matches!(told, ToNode::Stop { .. })).count(), 2);
    for rank in 0..2 {
        assert_eq!(world.state(high), JobState::Queued);
        world.report(session, id(low, 1, rank), exited(4));
    }
    assert_eq!((world.state(low), world.state(high)), (JobState::Queued, JobState::Starting));
    assert_eq!((world.job_in(low).failures, world.job_in(low).recoveries), (0, 0));
    assert!(world.why(low).contains(&format!("made room for {high}")), "{}", world.why(low));
    // It does not push the other one out again, and comes back by itself.
    for rank in 0..2 {
        world.ready(session, id(high, 1, rank));
    }
    end(&mut world, session, high);
    assert_eq!((world.state(high), world.state(low)), (JobState::Succeeded, JobState::Starting));
    let run = world.job_in(low).run.as_ref().unwrap();
    let from = run.resume.as_ref().map(|origin| origin.uri.clone());
    assert_eq!(from, Some(format!("file:///c/{low}/step-7-g2")));
}

#[test]
fn room_that_comes_back_piece_by_piece_is_for_the_most_urgent_that_fits() {
    let mut world = World::new();
    let (_, session) = world.node(2);
    let first = world.submit("first", &urgent(5, 2));
    for rank in 0..2 {
        world.ready(session, id(first, 1, rank));
    }
    let small = world.submit("small", &urgent(0, 1));
    let large = world.submit("large", &urgent(5, 2));
    world.ask_cancel(first);
    world.report(session, id(first, 1, 0), exited(4));
    assert_eq!((world.state(small), world.state(large)), (JobState::Queued, JobState::Queued));
    assert!(world.why(large).contains(&format!("by {first}")), "{}", world.why(large));
    world.report(session, id(first, 1, 1), exited(4));
    assert_eq!((world.state(small), world.state(large)), (JobState::Queued, JobState::Starting));
}

#[test]
fn a_job_of_equal_priority_waits_its_turn() {
    let (mut world, low, session) = full();
    let equal = world.submit("equal", &urgent(0, 2));
    world.wait(2_000, &[session]);
    assert_eq!((world.state(low), world.state(equal)), (JobState::Running, JobState::Queued));
    assert!(world.job_in(low).yields.is_none());
    // Nor is anybody stopped for one that would not fit even then.
    let large = world.submit("large", &urgent(9, 3));
    assert!(world.job_in(low).yields.is_none());
    assert!(world.why(large).contains("have room for 2"), "{}", world.why(large));
}

#[test]
fn a_job_that_can_shrink_is_not_stopped() {
    let mut world = World::new();
    let (_, session) = world.node(2);
    let low = world.submit("low", &spec("ranks = 2"));
    for rank in 0..2 {
        world.ready(session, id(low, 1, rank));
    }
    world.told(session);
    let high = world.submit("high", &urgent(5, 1));
    assert_eq!(purposes(world.told(session)), [(2, Purpose::Train, Some(1)); 2]);
    assert_eq!(world.job_in(low).run.as_ref().unwrap().members, [id(low, 1, 0)]);
    world.report(session, id(low, 1, 1), exited(0));
    assert_eq!((world.state(low), world.state(high)), (JobState::Running, JobState::Starting));
    world.ready(session, id(high, 1, 0));
    world.report(session, id(high, 1, 0), outcome(1));
    world.report(session, id(high, 1, 0), exited(0));
    let grown = world.job_in(low).run.as_ref().unwrap();
    assert_eq!(grown.ranks.len(), 2, "its rank comes back");
    assert_eq!((world.job_in(low).failures, world.job_in(low).recoveries), (0, 0));
}

#[test]
fn the_newest_of_the_least_urgent_makes_room_and_no_more_than_are_needed() {
    let mut world = World::new();
    let (_, session) = world.node(4);
    let jobs = [("a", 0), ("b", 1), ("c", 0), ("d", 0)].map(|named| run_one(&mut world, session, named));
    world.submit("high", &urgent(5, 2));
    let yields = jobs.map(|job| world.job_in(job).yields.is_some());
    assert_eq!(yields, [false, false, true, true]);
}

#[test]
fn a_job_that_stores_nothing_in_time_stops_anyway_and_one_that_has_nothing_new_stops_at_once() {
    let (mut world, low, session) = full();
    world.submit("high", &urgent(5, 2));
    world.report(session, id(low, 1, 0), resumed(2, 7));
    world.restart();
    let session = world.connect(NodeId(1), 2, 1, &[id(low, 1, 0), id(low, 1, 1)]);
    assert_eq!(purposes(world.told(session))[0].1, Purpose::Checkpoint, "it is told again after a restart");
    world.wait(299_000, &[session]);
    assert_eq!(world.state(low), JobState::Running);
    world.wait(2_000, &[session]);
    assert_eq!((world.state(low), world.job_in(low).failures), (JobState::Recovering, 0));
    let (mut world, low, session) = full();
    world.submit("high", &urgent(5, 2));
    world.report(session, id(low, 1, 0), resumed(2, 0));
    assert_eq!(world.state(low), JobState::Recovering, "nothing was done since it began");
}

#[test]
fn steps_of_a_generation_that_was_never_heard_of_are_stored() {
    let mut world = World::new();
    let (_, session) = world.node(2);
    let low = world.submit("low", &urgent(0, 2));
    for rank in 0..2 {
        world.ready(session, id(low, 1, rank));
    }
    world.submit("high", &urgent(5, 2));
    // While the coordinator was away, for example: the first generation's word comes after the end of its time.
    world.report(session, id(low, 1, 0), resumed(1, 0));
    world.report(session, id(low, 1, 0), resumed(2, 7));
    assert_eq!(world.state(low), JobState::Running, "seven steps are to be stored");
    store(&mut world, session, low, (2, 7));
    assert_eq!(world.state(low), JobState::Recovering);
}

#[test]
fn a_checkpoint_that_cannot_be_stored_holds_nobody_up() {
    let (mut world, low, session) = full();
    world.submit("high", &urgent(5, 2));
    world.report(session, id(low, 1, 0), resumed(2, 7));
    let (generation, step) = (Generation(2), TrainStep(7));
    world.report(session, id(low, 1, 1), RankEvent::NotStored { generation, step, error: "the disk is full".into() });
    assert_eq!((world.state(low), world.job_in(low).failures), (JobState::Recovering, 0));
}

#[test]
fn a_rank_that_dies_while_its_job_makes_room_costs_no_step() {
    let mut world = World::new();
    let (_, session) = world.node(3);
    let low = world.submit("low", &spec("ranks = 3\nranks_min = 2"));
    for rank in 0..3 {
        world.ready(session, id(low, 1, rank));
    }
    world.report(session, id(low, 1, 0), resumed(1, 0));
    let high = world.submit("high", &urgent(5, 3));
    world.report(session, id(low, 1, 0), resumed(2, 7));
    world.told(session);
    world.report(session, id(low, 1, 2), exited(9));
    assert_eq!(purposes(world.told(session)), [(3, Purpose::Checkpoint, None); 2], "the others store it");
    world.report(session, id(low, 1, 0), resumed(3, 7));
    store(&mut world, session, low, (3, 7));
    for rank in 0..2 {
        world.report(session, id(low, 1, rank), exited(4));
    }
    assert_eq!((world.state(low), world.state(high)), (JobState::Queued, JobState::Starting));
}

#[test]
fn a_cancel_ends_a_job_that_makes_room() {
    let (mut world, low, session) = full();
    let high = world.submit("high", &urgent(5, 2));
    world.ask_cancel(low);
    for rank in 0..2 {
        world.report(session, id(low, 1, rank), exited(4));
    }
    assert_eq!((world.state(low), world.state(high)), (JobState::Cancelled, JobState::Starting));
}

#[test]
fn a_job_that_waits_for_room_looks_at_all_who_could_make_it() {
    let mut world = World::new();
    let (_, session) = world.node(100);
    let jobs: Vec<JobId> = (0..100).map(|key| run_one(&mut world, session, (&format!("{key}"), 0))).collect();
    world.submit("high", &("priority = 5\n".to_owned() + &spec("cpus = 80\nranks = 1")));
    let yields = jobs.iter().filter(|job| world.job_in(**job).yields.is_some()).count();
    assert_eq!(yields, 80);
}

#[test]
fn only_jobs_whose_room_is_of_use_are_stopped() {
    let mut world = World::new();
    let (_, large) = world.node(4);
    let wide = world.submit("wide", "name = \"j\"\ntrainer = \"domains\"\n[train]\nsteps = 10\nbatch = 8\n[resources]\nmemory = 1024\ncpus = 4\nranks = 1");
    world.ready(large, id(wide, 1, 0));
    let (_, small) = world.node(1);
    let newest = run_one(&mut world, small, ("newest", 0));
    let urgent = "priority = 5\n".to_owned() + &spec("cpus = 3\nranks = 1");
    world.submit("high", &urgent);
    let yields = [wide, newest].map(|job| world.job_in(job).yields.is_some());
    assert_eq!(yields, [true, false]);
}

#[test]
fn one_job_is_stopped_rather_than_several_that_are_no_less_urgent() {
    for (priority, expected) in [(0, [true, false, false]), (1, [false, true, true])] {
        let mut world = World::new();
        let (_, session) = world.node(4);
        let large = world.submit("large", &format!("priority = {priority}\n{}", spec("ranks = 2\nranks_min = 2")));
        for rank in 0..2 {
            world.ready(session, id(large, 1, rank));
        }
        let small = ["one", "other"].map(|key| run_one(&mut world, session, (key, 0)));
        world.submit("high", &urgent(5, 2));
        let yields = [large, small[0], small[1]].map(|job| world.job_in(job).yields.is_some());
        assert_eq!(yields, expected, "the large one has priority {priority}");
    }
}

#[test]
fn jobs_of_three_priorities_end_in_their_order_and_none_is_stopped_twice() {
    let (mut world, low, session) = full();
    let mut before = low;
    for priority in 1..=2 {
        let next = world.submit(&priority.to_string(), &urgent(priority, 2));
        world.report(session, id(before, 1, 0), resumed(2, 3));
        store(&mut world, session, before, (2, 3));
        for rank in 0..2 {
            world.report(session, id(before, 1, rank), exited(4));
        }
        for rank in 0..2 {
            world.ready(session, id(next, 1, rank));
        }
        world.report(session, id(next, 1, 0), resumed(1, 0));
        before = next;
    }
    let middle = JobId(low.0 + 1);
    assert_eq!(
        [low, middle, before].map(|job| world.state(job)),
        [JobState::Queued, JobState::Queued, JobState::Running]
    );
    end(&mut world, session, before);
    assert_eq!([low, middle].map(|job| world.state(job)), [JobState::Queued, JobState::Starting]);
    assert_eq!([low, middle, before].map(|job| world.job_in(job).preemptions), [1, 1, 0]);
}

#[test]
fn a_job_that_has_made_room_is_spared_for_a_while() {
    let (mut world, low, session) = full();
    let high = world.submit("high", &urgent(5, 2));
    world.report(session, id(low, 1, 0), resumed(2, 0));
    for rank in 0..2 {
        world.report(session, id(low, 1, rank), exited(4));
    }
    for rank in 0..2 {
        world.ready(session, id(high, 1, rank));
    }
    end(&mut world, session, high);
    let generation = world.job_in(low).generation.0;
    for rank in 0..2 {
        world.ready(session, id(low, generation, rank));
    }
    assert_eq!(world.state(low), JobState::Running);
    let higher = world.submit("higher", &urgent(9, 2));
    world.wait(50_000, &[session]);
    assert!(world.job_in(low).yields.is_none(), "it has run for less than a minute");
    let why = world.why(higher);
    assert!(why.contains("job-1 is less urgent, but has just made room"), "{why}");
    world.wait(15_000, &[session]);
    assert!(world.job_in(low).yields.is_some());
}

#[test]
fn an_urgent_job_that_fits_nowhere_does_not_put_a_missing_rank_behind_its_equals() {
    let mut world = World::new();
    let (_, session) = world.node(2);
    let low = world.submit("low", &spec("ranks = 2"));
    for rank in 0..2 {
        world.ready(session, id(low, 1, rank));
    }
    world.submit("large", &urgent(9, 3));
    let equal = world.submit("equal", &urgent(0, 1));
    world.report(session, id(low, 1, 1), exited(9));
    assert_eq!(world.job_in(low).run.as_ref().unwrap().ranks.len(), 2, "its rank comes back");
    assert_eq!(world.state(equal), JobState::Queued);
}
