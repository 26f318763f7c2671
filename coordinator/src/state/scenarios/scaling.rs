//! Models whose replicas come and go with their requests.

use stoke_protocol::message::load::{Demand, Load};

use super::*;

const SPEC: &str = "name = \"chat\"\n[serve]\nmodel = \"/m\"\nstages = 1\ntensor = 1\ncache = \"1MiB\"\n[serve.replicas]\nmax = 3\nrequests = 4\ngrow_after = \"3s\"\n\
                    shrink_after = \"10s\"\n[resources]\nmemory = \"200MiB\"\n";

fn ada() -> Subject {
    user(UserRole::Submitter, "ada")
}

impl World {
    /// The one rank of a job comes up, and a token goes through it.
    fn comes_up(&mut self, session: SessionId, job: JobId) {
        self.ready(session, id(job, 1, 0));
        self.report(session, id(job, 1, 0), resumed(1, 1));
        assert!(self.control.cluster().jobs().get(job).unwrap().answers());
    }

    fn serves(&mut self, session: SessionId, key: &str, spec: &str) -> JobId {
        let job = self.submit(key, spec);
        self.comes_up(session, job);
        job
    }

    /// So many seconds in which heads have so many requests.
    fn seconds(&mut self, session: SessionId, count: u64, requests: &[(JobId, u32)]) {
        for _ in 0..count {
            for (job, running) in requests {
                let load = Load { running: *running, ..Load::default() };
                self.step(Input::Load { session, id: id(*job, 1, 0), load });
            }
            self.wait(1_000, &[session]);
        }
    }

    /// Jobs that have not ended and do not leave.
    fn staying(&self) -> Vec<u64> {
        let jobs = self.control.cluster().jobs().iter();
        let stays = |job: &&crate::state::machine::Job| job.serving().is_some_and(|serves| serves.leave.is_none());
        jobs.filter(stays).map(|job| job.id.0).collect()
    }

    /// Lines of a job's timeline with these words.
    fn lines(&mut self, job: JobId, words: &str) -> Vec<String> {
        let Reply::Explained(explained) = self.ask(&ada(), Request::Explain { job }) else { panic!("no explanation") };
        let lines = explained.events.iter().map(|event| event.text.clone());
        lines.filter(|line| line.contains(words)).collect()
    }
}

fn one() -> (World, SessionId, JobId) {
    let mut world = World::new();
    let (_, session) = world.node(16);
    let job = world.serves(session, "k", SPEC);
    (world, session, job)
}

#[test]
fn a_model_grows_with_its_requests_and_shrinks_without_them() {
    let (mut world, session, job) = one();
    world.seconds(session, 6, &[(job, 9)]);
    assert_eq!(world.staying(), [1, 2]);
    world.seconds(session, 6, &[(job, 9)]);
    assert_eq!(world.staying(), [1, 2], "one comes up");
    assert_eq!(
        world.lines(job, "more"),
        ["autoscale: 1 more, job-2: 9 requests run or wait, 1 of 1 replicas answer; 4 for each, between 1 and 3"]
    );
    assert_eq!(world.control.cluster().jobs().get(JobId(2)).unwrap().owner, "ada");
    world.comes_up(session, JobId(2));
    world.seconds(session, 1, &[(job, 5), (JobId(2), 4)]);
    assert_eq!(world.staying(), [1, 2, 3]);
    assert_eq!(world.lines(JobId(3), "autoscale").len(), 1, "the new one knows why it is there");
    world.comes_up(session, JobId(3));
    world.seconds(session, 9, &[(job, 2), (JobId(2), 0), (JobId(3), 1)]);
    assert_eq!(world.staying(), [1, 2, 3], "its window is not over");
    world.seconds(session, 4, &[(job, 2), (JobId(2), 0), (JobId(3), 1)]);
    assert_eq!(world.staying(), [1]);
    let fewer =
        "autoscale: 2 fewer, job-3, job-2: 3 requests run or wait, 3 of 3 replicas answer; 4 for each, between 1 and 3";
    assert_eq!((world.lines(job, "fewer,"), world.lines(JobId(3), "fewer,")), (vec![fewer.into()], vec![fewer.into()]));
    assert_eq!(world.lines(JobId(2), "takes no new requests").len(), 1);
    assert_eq!([2, 3].map(|job| world.state(JobId(job))), [JobState::Cancelling; 2]);
    world.seconds(session, 30, &[(job, 0)]);
    assert_eq!(world.staying(), [1], "never below the least");
}

/// O4, and what rules is in the jobs.
#[test]
fn a_coordinator_that_starts_sees_a_whole_window_before_it_acts() {
    let (mut world, session, job) = one();
    world.seconds(session, 2, &[(job, 9)]);
    world.restart();
    let session = world.connect(NodeId(1), 16, 1, &[id(job, 1, 0)]);
    world.seconds(session, 2, &[(job, 9)]);
    assert_eq!(world.staying(), [1]);
    world.seconds(session, 3, &[(job, 9)]);
    assert_eq!(world.staying(), [1, 2]);
    world.comes_up(session, JobId(2));
    world.restart();
    let session = world.connect(NodeId(1), 16, 1, &[id(job, 1, 0), id(JobId(2), 1, 0)]);
    // Nobody is heard: that is no reason to let one go.
    world.seconds(session, 20, &[]);
    assert_eq!(world.staying(), [1, 2], "O3");
    world.seconds(session, 13, &[(job, 1), (JobId(2), 0)]);
    assert_eq!(world.staying(), [1]);
}

#[test]
fn growth_without_room_waits_in_no_queue_and_is_told_of_once() {
    let mut world = World::new();
    let (_, session) = world.node(1);
    let job = world.serves(session, "k", SPEC);
    world.seconds(session, 40, &[(job, 12)]);
    assert_eq!((world.staying(), world.control.cluster().jobs().queue().len()), (vec![1], 0));
    let told = world.lines(job, "more wanted");
    assert!(matches!(&told[..], [line] if line.contains("there is no room for one (1 rank of 1 cpu")), "{told:?}");
    let token = world.token(TokenScope::Node);
    world.join(token, Wants::Node { name: "n".into() }).unwrap();
    let second = world.connect(NodeId(2), 4, 1, &[]);
    for _ in 0..60 {
        world.seconds(session, 1, &[(job, 12)]);
        world.step(Input::Heartbeat { session: second, heartbeat: heartbeat(world.ms) });
    }
    assert_eq!(world.staying(), [1, 2], "there is room now");
}

#[test]
fn a_replica_that_fails_is_told_of_and_tried_again_later() {
    let (mut world, session, job) = one();
    world.seconds(session, 6, &[(job, 9)]);
    assert_eq!(world.staying(), [1, 2]);
    let failed = RankEvent::Failed { error: "no such model".into(), permanent: true };
    world.report(session, id(JobId(2), 1, 0), failed);
    world.report(session, id(JobId(2), 1, 0), exited(1));
    world.seconds(session, 4, &[(job, 9)]);
    assert_eq!(world.staying(), [1], "O5");
    let told = world.lines(job, "has failed");
    assert!(matches!(&told[..], [line] if line.contains("no such model") && line.contains("again in 5 s")), "{told:?}");
    world.seconds(session, 4, &[(job, 9)]);
    assert_eq!(world.staying(), [1, 3]);
}

/// What no head has counts, and what a canary has does not (Z3).
#[test]
fn questions_that_no_head_has_let_a_model_grow_and_those_of_a_canary_do_not() {
    let (mut world, session, job) = one();
    let canary = SPEC.replace("\"/m\"\n", "\"/n\"\nshare = 0.1\n");
    let canary = world.serves(session, "canary", &canary);
    world.seconds(session, 20, &[(job, 1), (canary, 90)]);
    assert_eq!(world.staying(), [1, 2]);
    let demand = |model: &str, held, refused| Demand { model: model.into(), held, refused };
    for _ in 0..6 {
        world.step(Input::Demand { session, demands: vec![demand("chat", 2, 6), demand("nobody's", 1_000, 0)] });
        world.seconds(session, 1, &[(job, 1), (canary, 0)]);
    }
    assert_eq!(world.staying(), [1, 2, 3]);
    let told = world.lines(job, "autoscale: 1 more, job-3: 9 requests run or wait, 1 of 1 replicas answer");
    assert_eq!(told.len(), 1);
    let Reply::Job(view) = world.ask(&ada(), Request::Job { job }) else { panic!("no view") };
    let serves = view.serves.unwrap();
    assert_eq!((serves.replicas, serves.answering, serves.held), (2, 1, 2));
    assert_eq!(serves.load.map(|load| load.running), Some(1));
}

/// Z1.
#[test]
fn the_newest_spec_rules_and_people_do_not_scale_what_scales_itself() {
    let (mut world, session, job) = one();
    let replicas = |replicas| Request::Replicas { model: "chat".into(), replicas };
    let refused = world.ask(&ada(), replicas(2));
    let Reply::Refused(Refusal { code: RefusalCode::Conflict, message, mend }) = refused else { panic!("{refused:?}") };
    assert!(message.contains("1 to 3, as job-1 says") && mend.contains("serve.replicas.min"), "{message}: {mend}");
    let wider = world.serves(session, "wider", &SPEC.replace("max = 3", "min = 2\nmax = 4"));
    world.seconds(session, 30, &[(job, 0), (wider, 0)]);
    assert_eq!(world.staying(), [1, 2], "two at least");
    let narrower = world.serves(session, "narrower", &SPEC.replace("max = 3", "max = 2"));
    world.seconds(session, 15, &[(job, 1), (wider, 1), (narrower, 0)]);
    assert_eq!(world.staying(), [3], "the others leave first");
    let own =
        SPEC.replace("[serve.replicas]\nmax = 3\nrequests = 4\ngrow_after = \"3s\"\nshrink_after = \"10s\"\n", "");
    let fixed = world.serves(session, "fixed", &own);
    world.seconds(session, 30, &[(narrower, 90), (fixed, 0)]);
    assert_eq!(world.staying(), [3, 4], "nothing scales itself any more");
    assert!(matches!(world.ask(&ada(), replicas(3)), Reply::Serving { .. }));
    assert_eq!(world.staying(), [3, 4, 5]);
}

/// Numbers that look drawn, the same for the same seed.
struct Draws(u64);

impl Draws {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

impl World {
    /// The process of a job of one rank, and whether it is up.
    fn process(&self, job: JobId) -> Option<(RankId, bool)> {
        let run = self.control.cluster().jobs().get(job)?.run.as_ref()?;
        let (id, rank) = run.ranks.iter().find(|(_, rank)| !rank.gone)?;
        Some((*id, rank.address.is_some()))
    }

    fn answering(&self) -> usize {
        let answers = |job: &&u64| self.control.cluster().jobs().get(JobId(**job)).unwrap().answers();
        self.staying().iter().filter(answers).count()
    }

    /// A process that was placed comes up, or one that is up dies.
    fn turns(&mut self, session: SessionId, job: JobId, dies: bool) {
        match self.process(job) {
            Some((id, false)) => {
                self.ready(session, id);
                let generation = self.generation(job);
                self.report(session, id, resumed(generation.0, generation.0));
            }
            Some((id, true)) if dies => self.report(session, id, exited(137)),
            Some(_) | None => {}
        }
    }
}

/// O1, O2, Z2: by seed, with requests that jump, ranks that die, and coordinators that start anew.
#[test]
fn replicas_stay_within_their_bounds_whatever_happens() {
    let (mut grown, mut shrunk) = (0, 0);
    for seed in 0..100 {
        let mut draws = Draws(seed);
        let mut world = World::new();
        let cpus = 1 + draws.below(4) as u32;
        let (node, mut session) = world.node(cpus);
        world.serves(session, "k", SPEC);
        let mut requests = 0;
        for _ in 0..200 {
            if draws.below(20) == 0 {
                requests = draws.below(16) as u32;
            }
            for job in world.staying().into_iter().map(JobId) {
                let (comes, dies) = (draws.below(3) == 0, draws.below(60) == 0);
                if comes || world.process(job).is_some_and(|(_, is_up)| is_up) {
                    world.turns(session, job, dies);
                }
            }
            if draws.below(70) == 0 {
                world.restart();
                let alive: Vec<RankId> =
                    world.control.cluster().jobs().iter().filter_map(|job| Some(world.process(job.id)?.0)).collect();
                session = world.connect(node, cpus, 1, &alive);
            }
            let before = (world.staying(), world.answering());
            if before.0.is_empty() {
                break;
            }
            for (at, job) in before.0.iter().enumerate() {
                let running = if at == 0 && draws.below(10) > 0 { requests } else { 0 };
                if let Some((id, true)) = world.process(JobId(*job)) {
                    world.step(Input::Load { session, id, load: Load { running, ..Load::default() } });
                }
            }
            world.wait(1_000, &[session]);
            let (after, answering) = (world.staying(), world.answering());
            let more = after.iter().filter(|job| !before.0.contains(job)).count();
            grown += more;
            shrunk += before.0.iter().filter(|job| !after.contains(job)).count();
            assert!(after.len() <= 3 && more <= before.0.len(), "seed {seed}: {before:?} to {after:?}");
            assert!(more == 0 || before.1 == before.0.len(), "O2, seed {seed}: {before:?} to {after:?}");
            assert!(answering > 0 || before.1 == 0, "Z2, seed {seed}: {before:?} to {after:?}");
            let never_ran = world.control.cluster().jobs().queue().filter(|job| job.worlds.is_empty()).count();
            assert_eq!(never_ran, 0, "Z2, seed {seed}: a replica waits in the queue");
        }
    }
    assert!(grown > 50 && shrunk > 50, "{grown} and {shrunk}");
}
