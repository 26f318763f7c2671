//! The agent's decisions, one fact a test.

use std::net::SocketAddr;

use stoke_protocol::ids::{
    ClusterId, Digest, Epoch, Fingerprint, Generation, Incarnation, JobId, LogIndex, NodeId, Rank, Step,
};
use stoke_protocol::message::node::{Capacity, FromNode, Report, ToNode};
use stoke_protocol::message::rank::{
    Cookie, Exit, FromRank, Progress, RankEvent, RankId, ShardRecord, StartFrom, StartRank, ToRank,
};
use stoke_protocol::message::split::Survey;
use stoke_protocol::spec::{Artifact, Precision};

use super::claim::Claim;
use super::fence::Fence;
use super::state::{AgentState, Effect, Event, Own, Signed};
use crate::artifact::Fetched;

fn agent() -> AgentState {
    let capacity = Capacity { cpus: 4, memory_bytes: 4 << 30, ..Capacity::default() };
    let own = Own {
        cluster: ClusterId([1; 16]),
        node: NodeId(7),
        name: "n7".into(),
        incarnation: Incarnation(3),
        capacity,
        gateway: None,
    };
    AgentState::new(own, Fence { epoch: Epoch(5), index: LogIndex(40) })
}

fn id(generation: u64, rank: u32) -> RankId {
    RankId { job: JobId(1), generation: Generation(generation), rank: Rank(rank) }
}

fn start(id: RankId, cpus: u32) -> ToNode {
    let spec = format!(
        "name = \"t\"\ntrainer = \"digits\"\n[train]\nsteps = 1\nbatch = 8\n[resources]\ncpus = {cpus}\nmemory = \"1GiB\"\n"
    );
    ToNode::Start(StartRank { id, spec, checkpoints: "file:///c".into(), from: StartFrom::Seed, memory_bytes: 1 << 30 })
}

fn welcome(epoch: u64, index: u64) -> ToNode {
    ToNode::Welcome { epoch: Epoch(epoch), index: LogIndex(index), heartbeat_ms: 500, lease_ms: 3000 }
}

impl AgentState {
    fn told(&mut self, frame: ToNode) -> Vec<Effect> {
        self.apply(Event::Coordinator(frame))
    }

    fn says(&mut self, id: RankId, event: RankEvent) -> Vec<Effect> {
        self.apply(Event::Rank { id, frame: FromRank::Event(event) })
    }
}

fn connected() -> AgentState {
    let mut agent = agent();
    agent.told(welcome(5, 40));
    agent
}

/// An agent with one rank that has its certificate.
fn running() -> AgentState {
    let mut agent = connected();
    agent.told(start(id(1, 0), 2));
    agent.apply(Event::Rank { id: id(1, 0), frame: FromRank::Hello { csr: vec![9].into(), artifact: None } });
    let answer = Signed::Certificate { certificate: vec![1], authority: vec![2] };
    agent.apply(Event::Signed { id: id(1, 0), answer });
    agent
}

fn reports(effects: &[Effect]) -> Vec<&Report> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Send(FromNode::Report(report)) => Some(report),
            _ => None,
        })
        .collect()
}

fn shard(step: u64) -> RankEvent {
    let shard = ShardRecord { index: 0, file: "s".into(), bytes: 1, blake3: Digest([0; 32]) };
    RankEvent::ShardStored { generation: Generation(1), step: Step(step), shard, state: Fingerprint(0) }
}

fn progress(step: u64) -> Progress {
    Progress {
        generation: Generation(1),
        step: Step(step),
        steps: Step(9),
        loss: 0.0,
        accuracy: 0.0,
        learning_rate: 0.0,
        samples_per_second: 0.0,
        compute_ms: 0.0,
        exchange_ms: 0.0,
        apply_ms: 0.0,
        samples: 0,
        skipped: 0,
        lanes: 2,
        rl: None,
    }
}

#[test]
fn an_old_coordinator_is_refused_and_a_newer_one_is_remembered_first() {
    let mut agent = agent();
    assert!(
        matches!(&agent.told(welcome(4, 99))[..], [Effect::Disconnect { reason }] if reason.contains("old coordinator"))
    );
    assert!(matches!(&agent.told(welcome(6, 39))[..], [Effect::Disconnect { reason }] if reason.contains("old copy")));
    assert_eq!(agent.fence(), Fence { epoch: Epoch(5), index: LogIndex(40) });
    let fence = Fence { epoch: Epoch(6), index: LogIndex(41) };
    assert_eq!(agent.told(welcome(6, 41))[0], Effect::Persist(fence));
    assert_eq!(agent.hello().epoch_seen, Epoch(6));
}

#[test]
fn the_index_of_what_is_acknowledged_becomes_durable_now_and_then() {
    let mut agent = agent();
    agent.told(welcome(6, 41));
    agent.persisted(Fence { epoch: Epoch(6), index: LogIndex(41) });
    let acknowledged = |index| ToNode::Acknowledge { sequence: 0, index: LogIndex(index) };
    let noted = |effects: &[Effect]| effects.iter().any(|effect| matches!(effect, Effect::Note(_)));
    assert!(!noted(&agent.told(acknowledged(56))));
    let fence = |index| Fence { epoch: Epoch(6), index: LogIndex(index) };
    assert!(agent.told(acknowledged(57)).contains(&Effect::Note(fence(57))));
    assert!(!noted(&agent.told(acknowledged(90))), "one at a time");
    assert_eq!(agent.apply(Event::Noted { fence: Some(fence(57)) }), [Effect::Note(fence(90))]);
    assert!(agent.apply(Event::Noted { fence: None }).is_empty());
    assert!(agent.told(acknowledged(90)).contains(&Effect::Note(fence(90))), "again, where it has failed");
}

#[test]
fn nothing_is_obeyed_before_the_welcome() {
    let mut agent = agent();
    assert!(matches!(agent.told(start(id(1, 0), 1))[..], [Effect::Disconnect { .. }]));
    assert_eq!(agent.alive().count(), 0);
}

#[test]
fn a_rank_is_started_once() {
    let mut agent = connected();
    assert!(matches!(agent.told(start(id(1, 0), 2))[..], [Effect::Spawn(_)]));
    assert!(agent.told(start(id(1, 0), 2)).is_empty());
    agent.apply(Event::Exited { id: id(1, 0), exit: Exit::Code(1) });
    let again = agent.told(start(id(1, 0), 2));
    assert!(matches!(&reports(&again)[..], [Report { event: RankEvent::Exited { exit: Exit::Code(1) }, .. }]));
    assert_eq!(agent.alive().count(), 0);
}

#[test]
fn an_old_generation_is_not_started_after_a_newer_one() {
    let mut agent = connected();
    agent.told(start(id(2, 0), 1));
    let effects = agent.told(start(id(1, 0), 1));
    let exit = &reports(&effects)[0].event;
    assert!(matches!(exit, RankEvent::Exited { exit: Exit::NotStarted(why) } if why.contains("g2")), "{exit:?}");
}

#[test]
fn a_rank_that_does_not_fit_is_refused_by_the_node_itself() {
    let mut agent = connected();
    agent.told(start(id(1, 0), 3));
    let effects = agent.told(start(id(1, 1), 2));
    let exit = &reports(&effects)[0].event;
    assert!(
        matches!(exit, RankEvent::Exited { exit: Exit::NotStarted(why) } if why == "2 cpus asked, 1 of 4 are free")
    );
    agent.apply(Event::Exited { id: id(1, 0), exit: Exit::Code(0) });
    assert!(matches!(agent.told(start(id(1, 2), 4))[..], [Effect::Spawn(_)]));
}

#[test]
fn a_certificate_is_asked_for_again_after_a_reconnect() {
    let mut agent = connected();
    agent.told(start(id(1, 0), 1));
    let sign = Effect::Sign { id: id(1, 0), csr: vec![9], artifact: None };
    let hello = Event::Rank { id: id(1, 0), frame: FromRank::Hello { csr: vec![9].into(), artifact: None } };
    assert_eq!(agent.apply(hello), std::slice::from_ref(&sign));
    agent.apply(Event::Disconnected);
    assert!(agent.apply(Event::Signed { id: id(1, 0), answer: Signed::Lost }).is_empty());
    assert_eq!(agent.told(welcome(5, 40)), std::slice::from_ref(&sign));
    assert_eq!(agent.apply(Event::Signed { id: id(1, 0), answer: Signed::Lost }), [sign]);
    let answer = Signed::Certificate { certificate: vec![1], authority: vec![2] };
    let frame = ToRank::Certificate { certificate: vec![1].into(), authority: vec![2].into() };
    assert_eq!(agent.apply(Event::Signed { id: id(1, 0), answer }), [Effect::ToRank { id: id(1, 0), frame }]);
}

#[test]
fn a_rank_that_runs_has_its_certificate_renewed_and_outlives_a_refusal() {
    let mut agent = connected();
    agent.told(start(id(1, 0), 1));
    let renew = Event::Rank { id: id(1, 0), frame: FromRank::Renew { csr: vec![7].into() } };
    assert!(agent.apply(renew.clone()).is_empty(), "it has none yet");
    agent.apply(Event::Rank { id: id(1, 0), frame: FromRank::Hello { csr: vec![9].into(), artifact: None } });
    let answer = |byte| Signed::Certificate { certificate: vec![byte], authority: vec![2] };
    agent.apply(Event::Signed { id: id(1, 0), answer: answer(1) });
    let sign = Effect::Sign { id: id(1, 0), csr: vec![7], artifact: None };
    assert_eq!(agent.apply(renew.clone()), [sign]);
    assert!(agent.apply(Event::Signed { id: id(1, 0), answer: Signed::Lost }).is_empty());
    assert!(agent.apply(Event::Signed { id: id(1, 0), answer: Signed::Refused { reason: "busy".into() } }).is_empty());
    let frame = ToRank::Certificate { certificate: vec![3].into(), authority: vec![2].into() };
    assert_eq!(
        agent.apply(Event::Signed { id: id(1, 0), answer: answer(3) }),
        [Effect::ToRank { id: id(1, 0), frame }]
    );
    agent.apply(Event::Disconnected);
    assert!(agent.apply(renew).is_empty(), "nobody is there who signs");
}

#[test]
fn a_refused_certificate_ends_the_rank_with_the_reason() {
    let mut agent = connected();
    agent.told(start(id(1, 0), 1));
    agent.apply(Event::Rank { id: id(1, 0), frame: FromRank::Hello { csr: vec![9].into(), artifact: None } });
    let effects = agent.apply(Event::Signed { id: id(1, 0), answer: Signed::Refused { reason: "not placed".into() } });
    assert!(matches!(&reports(&effects)[0].event, RankEvent::Failed { error, .. } if error.contains("not placed")));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::KillAfter { .. })));
}

#[test]
fn ranks_go_on_while_the_coordinator_is_away_and_everything_is_reported_later() {
    let mut agent = running();
    let ready = RankEvent::Ready { address: SocketAddr::from(([127, 0, 0, 1], 1)) };
    assert_eq!(reports(&agent.says(id(1, 0), ready)).len(), 1);
    agent.apply(Event::Disconnected);
    assert!(agent.says(id(1, 0), shard(10)).is_empty());
    assert!(agent.apply(Event::Rank { id: id(1, 0), frame: FromRank::Progress(progress(11)) }).is_empty());
    assert!(agent.apply(Event::Rank { id: id(1, 0), frame: FromRank::Progress(progress(12)) }).is_empty());
    let hello = agent.hello();
    assert_eq!((hello.ranks[0].id, hello.ranks[0].alive, hello.ranks[0].step), (id(1, 0), true, Step(12)));
    let effects = agent.told(welcome(6, 41));
    assert!(effects.contains(&Effect::Send(FromNode::Progress { id: id(1, 0), progress: progress(12) })));
    assert_eq!(reports(&effects).iter().map(|report| report.sequence).collect::<Vec<_>>(), [1, 2]);
    agent.told(ToNode::Acknowledge { sequence: 2, index: LogIndex(50) });
    assert_eq!(agent.hello().index_seen, LogIndex(50));
    agent.apply(Event::Disconnected);
    assert!(reports(&agent.told(welcome(6, 50))).is_empty());
}

#[test]
fn an_end_is_in_the_inventory_until_it_is_acknowledged() {
    let mut agent = running();
    agent.apply(Event::Disconnected);
    agent.apply(Event::Exited { id: id(1, 0), exit: Exit::Signal(9) });
    assert!(!agent.hello().ranks[0].alive);
    let effects = agent.told(welcome(5, 40));
    let sequence = reports(&effects)[0].sequence;
    agent.told(ToNode::Acknowledge { sequence, index: LogIndex(41) });
    assert!(agent.hello().ranks.is_empty());
}

#[test]
fn a_rank_cannot_report_its_own_end_nor_repeat_what_comes_once() {
    let mut agent = running();
    assert!(agent.says(id(1, 0), RankEvent::Exited { exit: Exit::Code(0) }).is_empty());
    let failed = || RankEvent::Failed { error: "é".repeat(4000), permanent: false };
    let effects = agent.says(id(1, 0), failed());
    assert!(matches!(&reports(&effects)[0].event, RankEvent::Failed { error, .. } if error.len() == 4096));
    assert!(agent.says(id(1, 0), failed()).is_empty());
    assert_eq!(agent.says(id(1, 0), shard(1)).len() + agent.says(id(1, 0), shard(2)).len(), 2);
}

#[test]
fn stop_is_polite_first_and_comes_once_to_the_rank() {
    let mut agent = running();
    let stop = |grace_ms| ToNode::Stop { id: id(1, 0), reason: "cancelled".into(), grace_ms };
    let polite = Effect::ToRank { id: id(1, 0), frame: ToRank::Stop { reason: "cancelled".into() } };
    assert_eq!(agent.told(stop(100)), [polite, Effect::KillAfter { id: id(1, 0), grace_ms: 100 }]);
    assert_eq!(agent.told(stop(1 << 40)), [Effect::KillAfter { id: id(1, 0), grace_ms: 310_000 }]);
    // Orders for training come too late.
    assert!(agent.told(ToNode::Release { id: id(1, 0) }).is_empty());
}

#[test]
fn stopping_a_rank_that_is_not_there_reports_its_end_and_forbids_its_start() {
    let mut agent = connected();
    let stop = || ToNode::Stop { id: id(1, 0), reason: "x".into(), grace_ms: 1 };
    let effects = agent.told(stop());
    assert!(matches!(reports(&effects)[0].event, RankEvent::Exited { exit: Exit::NotStarted(_) }));
    // Not acknowledged yet: once is enough.
    assert!(agent.told(stop()).is_empty());
    assert!(!agent.told(start(id(1, 0), 1)).iter().any(|effect| matches!(effect, Effect::Spawn(_))));
}

#[test]
fn a_process_that_hangs_up_is_killed_if_it_stays() {
    let mut agent = running();
    assert!(matches!(agent.apply(Event::HungUp { id: id(1, 0) })[..], [Effect::KillAfter { .. }]));
    let effects = agent.apply(Event::Exited { id: id(1, 0), exit: Exit::Code(101) });
    assert!(matches!(reports(&effects)[0].event, RankEvent::Exited { exit: Exit::Code(101) }));
}

#[test]
fn shutting_down_stops_every_rank_reports_the_ends_and_starts_none() {
    let mut agent = running();
    let effects = agent.apply(Event::ShutDown { grace_ms: 10 });
    assert!(matches!(effects[..], [Effect::ToRank { frame: ToRank::Stop { .. }, .. }, Effect::KillAfter { .. }]));
    assert!(!agent.told(start(id(1, 1), 1)).iter().any(|effect| matches!(effect, Effect::Spawn(_))));
    let effects = agent.apply(Event::Exited { id: id(1, 0), exit: Exit::Code(4) });
    assert_eq!(effects.last(), Some(&Effect::AllGone));
    assert_eq!(reports(&effects).len(), 1);
    assert_eq!(connected().apply(Event::ShutDown { grace_ms: 10 }), [Effect::AllGone]);
}

#[test]
fn an_inherited_rank_is_alive_and_not_started_again_and_its_room_is_taken() {
    let mut agent = agent();
    let claim = Claim { cpus: 3, memory_bytes: 1 << 30, gpus: 0 };
    agent.apply(Event::Inherited { id: id(2, 0), claim });
    assert!(agent.hello().ranks.iter().any(|rank| rank.id == id(2, 0) && rank.alive));
    agent.told(welcome(5, 40));
    assert!(agent.told(start(id(2, 0), 3)).is_empty(), "I3");
    let refused = agent.told(start(id(2, 1), 2));
    assert!(matches!(&reports(&refused)[..], [Report { event: RankEvent::Exited { exit: Exit::NotStarted(_) }, .. }]));
    let older = agent.told(start(id(1, 0), 1));
    assert!(matches!(&reports(&older)[..], [Report { event: RankEvent::Exited { exit: Exit::NotStarted(_) }, .. }]));
    // What the coordinator says again at the hello reaches it.
    let release = agent.told(ToNode::Release { id: id(2, 0) });
    assert_eq!(release, [Effect::ToRank { id: id(2, 0), frame: ToRank::Release }]);
    // Its certificate had not come before its agent was gone.
    let hello =
        agent.apply(Event::Rank { id: id(2, 0), frame: FromRank::Hello { csr: vec![9].into(), artifact: None } });
    assert_eq!(hello, [Effect::Sign { id: id(2, 0), csr: vec![9], artifact: None }]);
}

#[test]
fn a_rank_hears_what_was_taken_by_its_own_numbers_and_is_forgotten_when_its_end_was() {
    let mut agent = connected();
    agent.apply(Event::Inherited { id: id(1, 0), claim: Claim::default() });
    let back = FromRank::Return { id: id(1, 0), cookie: Cookie::default(), next: 8 };
    agent.apply(Event::Rank { id: id(1, 0), frame: back });
    let said = agent.says(id(1, 0), shard(10));
    let [Report { sequence, .. }] = reports(&said)[..] else { panic!("a report: {said:?}") };
    agent.says(id(1, 0), shard(20));
    let taken = |said| Effect::ToRank { id: id(1, 0), frame: ToRank::Taken { said } };
    let acknowledge = |sequence| ToNode::Acknowledge { sequence, index: LogIndex(50) };
    assert_eq!(agent.told(acknowledge(*sequence)), [taken(8)]);
    assert_eq!(agent.told(acknowledge(sequence + 1)), [taken(9)]);
    agent.apply(Event::Exited { id: id(1, 0), exit: Exit::Unseen });
    assert_eq!(agent.told(acknowledge(sequence + 2)), [Effect::Forget { id: id(1, 0) }]);
}

/// A rank that took itself for alone while only its agent was gone would part from those whom the coordinator can reach.
#[test]
fn an_inherited_rank_hears_of_the_coordinator_what_its_agent_knows_and_nothing_before() {
    let mut agent = agent();
    agent.apply(Event::Inherited { id: id(1, 0), claim: Claim::default() });
    let back =
        || Event::Rank { id: id(1, 0), frame: FromRank::Return { id: id(1, 0), cookie: Cookie::default(), next: 1 } };
    let told = |reachable| Effect::ToRank { id: id(1, 0), frame: ToRank::Coordinator { reachable } };
    assert_eq!(agent.apply(back()), []);
    assert_eq!(agent.apply(Event::Unreached), [told(false)]);
    assert_eq!(agent.apply(Event::Unreached), []);
    assert_eq!(agent.apply(back()), [told(false)]);
    assert!(agent.told(welcome(5, 40)).contains(&told(true)));
    assert_eq!(agent.apply(back()), [told(true)]);
    assert_eq!(agent.apply(Event::Disconnected), [told(false)]);
}

#[test]
fn sweeps_run_one_at_a_time_and_the_newest_order_of_a_job_counts() {
    let mut agent = connected();
    let order = |job, index| ToNode::Sweep {
        job: JobId(job),
        index: LogIndex(index),
        checkpoints: "file:///c".into(),
        newest: (Step(9), Generation(1)),
        keep: vec!["step-00000009-g1".to_owned()].into(),
    };
    let begun = |effects: Vec<Effect>| -> Vec<(u64, u64)> {
        let begun = effects.into_iter().filter_map(|effect| match effect {
            Effect::Sweep { job, sweep } => Some((job.0, sweep.index.0)),
            _ => None,
        });
        begun.collect()
    };
    let swept = |job, index| Event::Swept { job: JobId(job), index: LogIndex(index), removed: 1, error: None };
    assert_eq!(begun(agent.told(order(2, 50))), [(2, 50)]);
    for (job, index) in [(2, 50), (1, 51), (1, 52), (3, 53)] {
        assert_eq!(begun(agent.told(order(job, index))), []);
    }
    // Its answer is lost with the session, and the order comes again.
    agent.apply(Event::Disconnected);
    assert_eq!(begun(agent.apply(swept(2, 50))), [(1, 52)]);
    agent.told(welcome(5, 60));
    assert_eq!(begun(agent.told(order(2, 50))), []);
    let effects = agent.apply(swept(1, 52));
    assert!(matches!(effects[0], Effect::Send(FromNode::Swept { index: LogIndex(52), error: None, .. })));
    assert_eq!(begun(effects), [(2, 50)]);
    assert_eq!(begun(agent.apply(swept(2, 50))), [(3, 53)]);
    assert_eq!(begun(agent.apply(swept(3, 53))), []);
}

#[test]
fn a_survey_is_begun_and_its_answer_goes_to_whoever_is_there() {
    let mut agent = connected();
    let survey = || Survey { model: "m".into(), precision: Precision::Rounded, threads: 1 };
    assert_eq!(agent.told(ToNode::Survey(survey())), [Effect::Survey(survey())]);
    let surveyed = || Event::Surveyed { survey: survey(), found: Err("x".repeat(100_000)) };
    let sent = agent.apply(surveyed());
    let [Effect::Send(FromNode::Surveyed { found: Err(words), .. })] = &sent[..] else { panic!("{sent:?}") };
    assert!(words.len() < 10_000, "it fits into a frame");
    agent.apply(Event::Disconnected);
    assert_eq!(agent.apply(surveyed()), []);
}

/// A rank whose program is of the user's own.
fn start_program(id: RankId) -> ToNode {
    let hash = format!("blake3:{}", "01".repeat(32));
    let spec = format!("name = \"t\"\ntrainer = \"own\"\nprogram = \"{hash}\"\n[train]\nsteps = 1\nbatch = 8\n");
    ToNode::Start(StartRank { id, spec, checkpoints: "file:///c".into(), from: StartFrom::Seed, memory_bytes: 1 << 30 })
}

#[test]
fn a_program_is_fetched_before_its_process_starts_over_any_number_of_sessions() {
    let mut agent = connected();
    let (rank, artifact) = (id(1, 0), Artifact(Digest([1; 32])));
    let fetch = Effect::Fetch { id: rank, artifact };
    assert_eq!(agent.told(start_program(rank)), std::slice::from_ref(&fetch));
    assert_eq!(agent.apply(Event::Fetched { id: rank, fetched: Fetched::Lost }), std::slice::from_ref(&fetch));
    agent.apply(Event::Disconnected);
    assert_eq!(agent.apply(Event::Fetched { id: rank, fetched: Fetched::Lost }), []);
    assert!(agent.hello().ranks.iter().any(|known| known.id == rank && known.alive), "the coordinator waits for it");
    assert!(agent.told(welcome(5, 40)).contains(&fetch));
    let spawned = agent.apply(Event::Fetched { id: rank, fetched: Fetched::There });
    assert!(matches!(&spawned[..], [Effect::Spawn(start)] if start.id == rank), "{spawned:?}");
    assert_eq!(agent.apply(Event::Fetched { id: rank, fetched: Fetched::There }), [], "of a session before");
}

#[test]
fn a_program_that_cannot_run_here_fails_the_job_and_one_that_is_stopped_before_it_starts_is_gone() {
    let mut agent = connected();
    agent.told(start_program(id(1, 0)));
    let out = agent.apply(Event::Fetched { id: id(1, 0), fetched: Fetched::Unfit("it is none".into()) });
    let events: Vec<&RankEvent> = reports(&out).iter().map(|report| &report.event).collect();
    let [RankEvent::Failed { error, permanent: true }, RankEvent::Exited { exit: Exit::NotStarted(_) }] = events[..]
    else {
        panic!("{events:?}")
    };
    assert!(error.contains("it is none"), "{error}");
    agent.told(start_program(id(2, 0)));
    let out = agent.told(ToNode::Stop { id: id(2, 0), reason: "cancelled".into(), grace_ms: 5 });
    assert!(
        matches!(reports(&out)[..], [Report { event: RankEvent::Exited { exit: Exit::NotStarted(_) }, .. }]),
        "{out:?}"
    );
    assert_eq!(agent.apply(Event::Fetched { id: id(2, 0), fetched: Fetched::There }), []);
    agent.told(start_program(id(3, 0)));
    let out = agent.apply(Event::ShutDown { grace_ms: 5 });
    assert_eq!(out.iter().filter(|effect| **effect == Effect::AllGone).count(), 1, "{out:?}");
}
