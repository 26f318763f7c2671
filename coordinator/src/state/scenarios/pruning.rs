//! Pins and prunes: what stays, and which node is told to remove the others.

use stoke_protocol::message::client::CheckpointView;

use super::*;
use crate::state::pruning::Sweep;

impl World {
    fn prune(&mut self, job: JobId) -> Vec<u64> {
        let request = Request::Prune { job, keep: Some(1), dry_run: false };
        let Reply::Pruned { removed, .. } = self.ask(&user(UserRole::Submitter, "ada"), request) else {
            panic!("not pruned")
        };
        removed.iter().map(|view| view.step.0).collect()
    }

    fn visible(&self, job: JobId) -> Vec<CheckpointView> {
        self.control.cluster().catalogue().views(job)
    }

    /// The entry of the prune, and what stays, as this session was told.
    fn sweeps(&mut self, session: SessionId) -> Vec<(LogIndex, Vec<String>)> {
        let told = self.told(session).into_iter();
        told.filter_map(|message| match message {
            ToNode::Sweep { index, keep, .. } => Some((index, keep.0)),
            _ => None,
        })
        .collect()
    }

    fn swept(&mut self, session: SessionId, job: JobId, index: LogIndex, error: Option<&str>) {
        let sweep = Sweep { job, index, removed: 2, error: error.map(str::to_owned) };
        self.step(Input::Swept { session, sweep });
    }

    /// Up to where one of these sessions was told to sweep. It has done so.
    fn swept_up_to(&mut self, job: JobId, sessions: [SessionId; 2]) -> Option<(TrainStep, Generation)> {
        let told = sessions.map(|session| (session, self.told(session))).into_iter();
        let mut sweeps = told.flat_map(|(session, told)| told.into_iter().map(move |message| (session, message)));
        let (session, index, newest) = sweeps.find_map(|(session, message)| match message {
            ToNode::Sweep { index, newest, .. } => Some((session, index, newest)),
            _ => None,
        })?;
        self.swept(session, job, index, None);
        assert_eq!(self.control.cluster().catalogue().unswept(job), None);
        Some(newest)
    }

    fn cancel(&mut self, job: JobId, sessions: [SessionId; 2]) {
        // It is answered when its ranks are gone.
        let _later = self.try_ask(&user(UserRole::Operator, "o"), Request::Cancel { job });
        for (rank, session) in (0..).zip(sessions) {
            self.report(session, id(job, 1, rank), RankEvent::Exited { exit: Exit::Code(4) });
        }
        assert_eq!(self.state(job), JobState::Cancelled);
    }
}

/// A job of two ranks with checkpoints at 1, 2 and 3.
fn stored() -> (World, JobId, [SessionId; 2]) {
    let (mut world, job, sessions) = running();
    for step in 1..=3 {
        (0..).zip(sessions).for_each(|(rank, session)| world.report(session, id(job, 1, rank), shard(step, rank)));
        world.report(sessions[0], id(job, 1, 0), manifest(job, step, 1));
    }
    assert_eq!(world.visible(job).len(), 3);
    (world, job, sessions)
}

#[test]
fn what_a_job_continues_from_is_not_pruned_under_it_however_its_uri_was_typed() {
    let (mut world, job, _) = stored();
    let resume = format!("[checkpoint]\nresume = \"{}/\"", world.visible(job)[0].uri);
    let after = world.submit("after", &spec(&resume));
    assert_eq!(world.prune(job), [2]);
    assert_eq!(world.visible(job).iter().map(|view| view.step.0).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(world.prune(job), [0; 0]);
    world.ask(&user(UserRole::Submitter, "ada"), Request::Cancel { job: after });
    assert_eq!(world.prune(job), [1]);
}

#[test]
fn a_sweep_is_ordered_until_a_node_has_done_it() {
    let (mut world, job, [first, second]) = stored();
    world.told(first);
    assert_eq!(world.prune(job), [1, 2]);
    let sweep = world.sweeps(first);
    let [(index, keep)] = &sweep[..] else { panic!("one order: {sweep:?}") };
    assert_eq!(keep[..], ["step-3-g1"]);
    // Its session is another one, then it is lost.
    let first = world.connect(NodeId(1), 2, 1, &[id(job, 1, 0)]);
    assert_eq!(world.sweeps(first), sweep);
    world.step(Input::Closed { session: first });
    assert_eq!(world.sweeps(second), []);
    world.wait(10_000, &[second]);
    assert_eq!(world.sweeps(second), sweep);
    // It cannot, so the next one is asked; also by the next coordinator.
    world.swept(second, job, *index, Some("denied"));
    assert_eq!(world.sweeps(second), []);
    let first = world.connect(NodeId(1), 2, 2, &[]);
    assert_eq!(world.sweeps(first), sweep);
    world.restart();
    let first = world.connect(NodeId(1), 2, 2, &[]);
    assert_eq!(world.sweeps(first), sweep);
    // A late answer of another prune is none.
    world.swept(first, job, LogIndex(1), None);
    assert_eq!(world.control.cluster().catalogue().unswept(job), Some(*index));
    world.swept(first, job, *index, None);
    assert_eq!(world.control.cluster().catalogue().unswept(job), None);
    let first = world.connect(NodeId(1), 2, 2, &[]);
    assert_eq!(world.sweeps(first), []);
}

/// A report that comes again, or a manifest that could not be read back, takes nothing from what is visible.
#[test]
fn a_checkpoint_that_is_committed_is_never_abandoned() {
    let (mut world, job, [first, second]) = stored();
    world.told(first);
    for step in [1, 3] {
        let event = RankEvent::NotStored { generation: Generation(1), step: TrainStep(step), error: "again".into() };
        world.report(first, id(job, 1, 0), event);
    }
    world.report(first, id(job, 1, 0), manifest(job, 2, 1));
    let told = [world.told(first), world.told(second)].concat();
    assert!(!told.iter().any(|message| matches!(message, ToNode::Abandon { .. })), "{told:?}");
}

/// Of a job that is over, what it began after its last checkpoint too, and as often as it is asked for: only the store tells whether there is any.
#[test]
fn a_prune_of_a_job_that_is_over_takes_what_it_left_unfinished() {
    let (mut world, job, sessions) = stored();
    world.prune(job);
    assert_eq!(world.swept_up_to(job, sessions), Some((TrainStep(3), Generation(1))));
    world.prune(job);
    assert_eq!(world.swept_up_to(job, sessions), None);
    world.cancel(job, sessions);
    for _ in 0..2 {
        world.prune(job);
        assert_eq!(world.swept_up_to(job, sessions), Some((TrainStep(u64::MAX), Generation(u64::MAX))));
    }
}

#[test]
fn a_job_that_ended_before_its_first_checkpoint_is_swept_too() {
    let (mut world, job, sessions) = running();
    (0..).zip(sessions).take(1).for_each(|(rank, session)| world.report(session, id(job, 1, rank), shard(1, rank)));
    world.cancel(job, sessions);
    assert_eq!(world.prune(job), [0; 0]);
    assert_eq!(world.swept_up_to(job, sessions), Some((TrainStep(u64::MAX), Generation(u64::MAX))));
}
