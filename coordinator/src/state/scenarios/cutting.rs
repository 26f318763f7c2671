//! Models whose cut is left to the cluster: who is asked, when the cut is chosen, and that it stays.

use stoke_protocol::message::rank::StartRank;
use stoke_protocol::message::split::{Planned, Split, Survey, Surveyed};
use stoke_protocol::spec::Precision;

use super::*;
use crate::state::split::Cut;

const SPEC: &str = "name = \"chat\"\n[serve]\nmodel = \"m\"\ncache = \"50MiB\"\n";

/// Of 1.2 GiB, where a node has 1 GiB.
fn found() -> Result<Surveyed, String> {
    Ok(Surveyed {
        layers: 30,
        layer_bytes: 40 << 20,
        embedding_bytes: 1 << 20,
        output_bytes: 0,
        kv_heads: 3,
        parts_max: 3,
        token_bytes: 512,
        context: 2048,
        vocabulary: 1024,
        layer_ns: 1_000_000,
    })
}

fn missing() -> Result<Surveyed, String> {
    Err("there is no folder m on this machine".into())
}

fn ada() -> Subject {
    user(UserRole::Submitter, "ada")
}

impl World {
    fn surveyed(&mut self, session: SessionId, found: Result<Surveyed, String>) -> Step {
        let survey = Survey { model: "m".into(), precision: Precision::Rounded, threads: 1 };
        self.step(Input::Surveyed { session, rtt_us: 400, survey, found })
    }

    /// How often a session was asked, and the starts that it was told.
    fn asked(&mut self, session: SessionId) -> (usize, Vec<StartRank>) {
        let (mut asked, mut starts) = (0, Vec::new());
        for message in self.told(session) {
            match message {
                ToNode::Survey(_) => asked += 1,
                ToNode::Start(start) => starts.push(start),
                _ => {}
            }
        }
        (asked, starts)
    }

    fn reason(&mut self, job: JobId) -> String {
        let Reply::Job(view) = self.ask(&ada(), Request::Job { job }) else { panic!("no job") };
        view.reason
    }

    fn nodes_of(&mut self, job: JobId) -> Vec<String> {
        let Reply::Explained(explanation) = self.ask(&ada(), Request::Explain { job }) else {
            panic!("no explanation")
        };
        explanation.nodes.iter().map(|(_, line)| line.clone()).collect()
    }

    fn cut(&self, job: JobId) -> Cut {
        self.control.cluster().jobs().get(job).unwrap().cut.clone()
    }
}

fn layers(start: &StartRank) -> &str {
    start.spec.lines().find(|line| line.starts_with("layers")).expect("a cut")
}

#[test]
fn a_model_is_cut_when_its_nodes_have_answered_and_the_cut_outlives_the_coordinator() {
    let mut world = World::new();
    let (_, first) = world.node(1);
    let (_, second) = world.node(1);
    let job = world.submit("k", SPEC);
    assert_eq!([world.asked(first).0, world.asked(second).0], [1, 1]);
    world.surveyed(first, found());
    assert_eq!(world.state(job), JobState::Queued);
    assert_eq!(world.reason(job), "its model is being surveyed on node-2");
    assert_eq!(world.nodes_of(job)[1], "is being surveyed");
    world.surveyed(second, found());
    assert_eq!(world.state(job), JobState::Starting);
    let starts = [world.asked(first).1, world.asked(second).1].concat();
    assert_eq!(starts.iter().map(layers).collect::<Vec<_>>(), ["layers = [15, 15]"; 2]);
    let nodes = world.control.cluster().members().nodes();
    let held: Vec<u64> = nodes.map(|node| node.used.memory_bytes).collect();
    assert!(held.iter().all(|held| (800 << 20..900 << 20).contains(held)), "{held:?}");
    assert!(starts.iter().all(|start| held.contains(&start.memory_bytes)));
    let cut = world.cut(job);
    world.restart();
    assert_eq!(world.cut(job), cut);
    let first = world.connect(NodeId(1), 1, 1, &[id(job, 1, 0)]);
    let again = world.asked(first);
    assert_eq!((again.0, again.1.iter().map(layers).collect::<Vec<_>>()), (0, vec!["layers = [15, 15]"]));
}

#[test]
fn a_coordinator_that_starts_again_asks_again_and_a_node_that_comes_is_asked_too() {
    let mut world = World::new();
    let (node, first) = world.node(1);
    let job = world.submit("k", SPEC);
    world.surveyed(first, found());
    let short = world.reason(job);
    assert!(short.contains("does not fit") && short.contains("node-1 has 1GiB"), "{short}");
    world.restart();
    let first = world.connect(node, 1, 1, &[]);
    assert_eq!(world.asked(first).0, 1);
    world.surveyed(first, found());
    assert_eq!(world.state(job), JobState::Queued);
    let (_, second) = world.node(1);
    assert_eq!(world.asked(second).0, 1);
    world.surveyed(second, found());
    assert_eq!(world.state(job), JobState::Starting);
}

#[test]
fn what_no_node_has_is_said_node_by_node_and_asked_for_again() {
    let mut world = World::new();
    let (_, first) = world.node(1);
    let (_, second) = world.node(1);
    let job = world.submit("k", SPEC);
    world.surveyed(first, missing());
    world.surveyed(second, missing());
    let reason = world.reason(job);
    assert!(
        reason.starts_with("no node can serve \"m\": node-") && reason.contains("there is no folder m"),
        "{reason}"
    );
    assert_eq!(world.nodes_of(job), ["there is no folder m on this machine"; 2]);
    assert_eq!([world.asked(first).0, world.asked(second).0], [1, 1]);
    world.wait(5_500, &[first, second]);
    assert_eq!([world.asked(first).0, world.asked(second).0], [1, 1], "it may have been mended");
    world.surveyed(first, found());
    world.surveyed(second, found());
    assert_eq!(world.state(job), JobState::Starting);
}

#[test]
fn what_all_nodes_lack_twice_fails_and_is_waited_for_where_a_node_is_away() {
    let mut world = World::new();
    let (_, first) = world.node(1);
    let (_, second) = world.node(1);
    let job = world.submit("k", SPEC);
    world.surveyed(first, missing());
    world.surveyed(second, missing());
    world.wait(5_500, &[first, second]);
    world.surveyed(first, missing());
    assert_eq!(world.state(job), JobState::Queued);
    world.surveyed(second, missing());
    assert_eq!(world.state(job), JobState::Failed);
    assert!(world.reason(job).contains("there is no folder m"), "{}", world.reason(job));
    world.restart();
    assert_eq!(world.state(job), JobState::Failed);
    let first = world.connect(NodeId(1), 1, 1, &[]);
    let job = world.submit("k-2", SPEC);
    for _ in 0..4 {
        world.surveyed(first, missing());
        world.wait(5_500, &[first]);
    }
    assert_eq!(world.state(job), JobState::Queued, "the other node may have it");
}

#[test]
fn a_spec_that_does_not_fit_its_model_fails_at_once() {
    let mut world = World::new();
    let (_, first) = world.node(1);
    let spec = SPEC.replace("[serve]\n", "[serve]\nstages = 31\n");
    let job = world.submit("k", &spec);
    world.surveyed(first, found());
    assert_eq!(world.state(job), JobState::Failed);
    assert_eq!(world.reason(job), "stages = 31: the model has 30 layers, use at most 30");
    assert_eq!(world.cut(job), Cut::Awaited);
}

#[test]
fn a_node_with_another_model_under_the_same_name_gets_no_rank() {
    let mut world = World::new();
    let sessions = [(); 3].map(|()| world.node(1).1);
    let job = world.submit("k", SPEC);
    let other = found().map(|found| Surveyed { layers: 31, layer_ns: 1, ..found });
    world.surveyed(sessions[0], other);
    assert_eq!(
        world.nodes_of(job)[0],
        "has the model: a layer takes 0.000 ms, 0.40 ms to the coordinator and back; 1GiB of memory and 1 cpus are free"
    );
    world.surveyed(sessions[1], found());
    world.surveyed(sessions[2], found());
    assert_eq!(world.state(job), JobState::Starting);
    assert!(world.asked(sessions[0]).1.is_empty());
}

#[test]
fn what_a_node_says_that_cannot_be_is_not_counted_with() {
    let mut world = World::new();
    let (_, first) = world.node(1);
    let job = world.submit("k", SPEC);
    let wrong = found().map(|found| Surveyed { layers: u32::MAX, layer_bytes: u64::MAX, ..found });
    world.surveyed(first, wrong);
    assert!(world.reason(job).contains("says what no model has"), "{}", world.reason(job));
}

/// V1: a node that hangs holds nobody up for ever.
#[test]
fn a_node_that_says_nothing_is_left_out() {
    let mut world = World::new();
    let (_, first) = world.node(1);
    let (_, second) = world.node(1);
    let (_, third) = world.node(1);
    let job = world.submit("k", SPEC);
    world.surveyed(first, found());
    world.surveyed(second, found());
    world.wait(29_000, &[first, second, third]);
    assert_eq!(world.state(job), JobState::Queued);
    world.wait(2_000, &[first, second, third]);
    assert_eq!(world.state(job), JobState::Starting);
}

#[test]
fn a_replica_is_cut_as_the_first_one_and_waits_for_room() {
    let mut world = World::new();
    let (_, first) = world.node(1);
    let (_, second) = world.node(1);
    let job = world.submit("k", SPEC);
    world.surveyed(first, found());
    world.surveyed(second, found());
    let replica = world.submit("k-2", &SPEC.replace("name = \"chat\"\n", "name = \"chat\"\npriority = -1\n"));
    let (Cut::Chosen(theirs), Cut::Chosen(own)) = (world.cut(job), world.cut(replica)) else { panic!("not cut") };
    assert_eq!(own.split, Split { why: "as job-1 is".into(), ..theirs.split });
    assert_eq!(world.state(replica), JobState::Queued);
    assert_eq!(world.reason(replica), "needs room for 2 ranks; there is room for 0 now");
}

/// One node that dies takes one of them along.
#[test]
fn a_replica_goes_to_a_node_without_the_model_where_there_is_one() {
    let mut world = World::new();
    let sessions = [(); 3].map(|()| world.node(2).1);
    let small = found().map(|found| Surveyed { layers: 4, ..found });
    let spec = SPEC.replace("[serve]\n", "[serve]\nstages = 1\ntensor = 1\n");
    let jobs = ["a", "b", "c", "d"].map(|key| world.submit(key, &spec));
    for session in sessions {
        world.surveyed(session, small.clone());
    }
    let mut nodes = jobs.map(|job| {
        let run = world.control.cluster().jobs().get(job).unwrap().run.clone().unwrap();
        run.ranks.values().map(|rank| rank.node.0).collect::<Vec<_>>()
    });
    nodes.sort();
    assert_eq!(nodes, [[1], [1], [2], [3]]);
}

#[test]
fn a_plan_is_told_and_nothing_is_journalled() {
    let mut world = World::new();
    let (_, first) = world.node(1);
    let (_, second) = world.node(1);
    let entries = world.records.len();
    let plan = || Request::Plan { spec: SPEC.into() };
    assert_eq!(world.try_ask(&ada(), plan()), None, "the nodes are asked first");
    let reply = |step: Step| {
        step.effects.into_iter().find_map(|effect| match effect {
            Effect::Reply { reply, .. } => Some(*reply),
            _ => None,
        })
    };
    let step = world.surveyed(first, found());
    assert_eq!(reply(step), None);
    let step = world.surveyed(second, found());
    let Some(Reply::Planned(planned)) = reply(step) else { panic!("no plan") };
    let split = planned.split.unwrap();
    assert_eq!((split.stages, split.tensor, split.ranks.len()), (2, 1, 2));
    assert!(planned.nodes.iter().all(|(_, line)| line.contains("has the model: a layer takes 1.000 ms")));
    let Some(Reply::Planned(again)) = world.try_ask(&ada(), plan()) else { panic!("the answers are known") };
    assert_eq!(again.split, Some(split));
    assert_eq!(world.records.len(), entries);
    let viewer = world.ask(&user(UserRole::Viewer, "v"), plan());
    assert!(matches!(viewer, Reply::Refused(Refusal { code: RefusalCode::Forbidden, .. })), "{viewer:?}");
    assert_eq!(planned.reason, "");
    let written = format!("{SPEC}stages = 2\ntensor = 1\n[resources]\nmemory = \"1000MiB\"\n");
    let Some(Reply::Planned(whole)) = world.try_ask(&ada(), Request::Plan { spec: written }) else { panic!("no plan") };
    assert!(whole.split.unwrap().ranks.iter().all(|rank| rank.memory_bytes == 1000 << 20));
    let encoder = "name = \"e\"\n[serve]\nmodel = \"m\"\ntask = \"embed\"\n";
    let refused = world.ask(&ada(), Request::Plan { spec: encoder.into() });
    assert!(matches!(refused, Reply::Refused(Refusal { code: RefusalCode::Invalid, .. })), "{refused:?}");
    let job = world.submit("k", SPEC);
    let Some(Reply::Planned(waits)) = world.try_ask(&ada(), plan()) else { panic!("no plan") };
    assert!(waits.split.is_some() && waits.reason.contains("does not fit"), "{job}: {}", waits.reason);
}

#[test]
fn a_plan_for_a_model_that_is_nowhere_names_the_nodes() {
    let mut world = World::new();
    let (_, first) = world.node(1);
    assert_eq!(world.try_ask(&ada(), Request::Plan { spec: SPEC.into() }), None);
    let step = world.surveyed(first, missing());
    let planned: Vec<Planned> = step
        .effects
        .into_iter()
        .filter_map(|effect| match effect {
            Effect::Reply { reply, .. } => {
                if let Reply::Planned(planned) = *reply {
                    Some(*planned)
                } else {
                    None
                }
            }
            _ => None,
        })
        .collect();
    assert_eq!(planned[0].split, None);
    assert!(planned[0].reason.contains("node-1 said: there is no folder m"), "{}", planned[0].reason);
    world.wait(500, &[first]);
    assert_eq!(world.try_ask(&ada(), Request::Plan { spec: SPEC.into() }), None, "it may have been mended");
    assert_eq!(world.asked(first).0, 2);
}

/// Seen by a reviewer: a rank failed for good on one node, again and again, while another one was free.
#[test]
fn a_rank_that_has_failed_twice_on_a_node_goes_to_another_one() {
    let mut world = World::new();
    let (_, first) = world.node(1);
    let (_, second) = world.node(4);
    let (_, third) = world.node(3);
    let spec = "name = \"chat\"\n[serve]\nmodel = \"/m\"\nstages = 2\ntensor = 1\ncache = \"1MiB\"\n[resources]\nmemory = \"200MiB\"\n";
    let job = world.submit("k", spec);
    let node_of = |world: &World, rank: u32| {
        let run = world.control.cluster().jobs().get(job).unwrap().run.as_ref().unwrap();
        run.ranks.iter().rev().find(|(id, _)| id.rank.0 == rank).map(|(id, rank)| (*id, rank.node))
    };
    let session = |node: NodeId| [first, second, third][node.0 as usize - 1];
    for rank in [0, 1] {
        let (id, node) = node_of(&world, rank).unwrap();
        world.ready(session(node), id);
    }
    let mut nodes = Vec::new();
    for _ in 0..3 {
        let (id, node) = node_of(&world, 1).unwrap();
        nodes.push(node);
        world.ready(session(node), id);
        world.report(session(node), id, exited(1));
        world.wait(10_000, &[first, second, third]);
    }
    assert_eq!(nodes[0], nodes[1], "what it has read may be there still");
    assert_ne!(nodes[1], nodes[2]);
}
