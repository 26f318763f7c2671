//! Who is placed where, and why the others wait. A decision without memory: `plan(&View, &Options) -> Plan`; the journal keeps what was
//! decided, not how, so that a later release may plan otherwise and old journals still replay.
//!
//! P1 (I14): a gang is placed whole or not at all, and no room is held for a part of one.
//! P2: jobs are looked at by priority, then by submission. A later one may go first (backfill) when an earlier one does not fit, but only
//!   until `passes_max` gangs were placed since the earlier one came into the queue: then room is kept for it, so that it cannot starve.
//! P3 (I16): only nodes that are up and heard of get ranks.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use stoke_protocol::ids::{JobId, NodeId, Rank};
use stoke_protocol::message::rank::RankId;

use super::jobs::Jobs;
use super::machine::{Ask, Job};
use super::members::Members;
use super::planted::PlantedBug;
use super::preemption::{Sacrifice, sacrifice};
use super::room::Left;
use super::run::Move;
use super::words::rank_count;

/// What a plan looks at.
pub struct View<'a> {
    pub members: &'a Members,
    /// Nodes with a session and a lease.
    pub live: &'a BTreeSet<NodeId>,
    pub jobs: &'a Jobs,
    /// Running jobs that lack ranks and may have new ones, the most urgent first.
    pub missing: Vec<(JobId, Vec<Rank>)>,
    /// Ranks of running jobs that are to move to another node.
    pub moving: Vec<(JobId, Vec<RankId>)>,
    /// Jobs that are not asked to make room.
    pub spared: BTreeSet<JobId>,
    /// Queued jobs whose next attempt is not due yet.
    pub held_off: BTreeSet<JobId>,
    /// Gangs placed in the cluster so far.
    pub placements: u64,
    pub bug: Option<PlantedBug>,
}

impl View<'_> {
    /// Nodes that are up and get no ranks.
    fn withheld(&self) -> usize {
        let nodes = self.live.iter().filter_map(|id| self.members.node(*id));
        nodes.filter(|node| !node.serves(self.bug)).count()
    }

    /// A job that would make room for one of this priority, had it not just made some.
    fn spared_below(&self, priority: i32) -> Option<JobId> {
        let would =
            |id: &&JobId| self.jobs.get(**id).is_some_and(|job| !job.state.is_terminal() && job.priority < priority);
        self.spared.iter().find(would).copied()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Gangs that may be placed while a job waits before room is kept for it.
    pub passes_max: u64,
    /// Jobs that room is kept for at a time: more would empty the cluster for jobs that cannot run yet.
    pub kept_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { passes_max: 16, kept_max: 4 }
    }
}

/// Which jobs go where, and why the others wait.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Plan {
    pub placed: Vec<(JobId, Vec<NodeId>)>,
    /// Ranks for running jobs.
    pub added: Vec<(JobId, Vec<(Rank, NodeId)>)>,
    /// Ranks that are to move, have no room elsewhere, and leave, with the reason.
    pub retired: Vec<(RankId, String)>,
    /// Ranks that leave, and jobs that stop, so that a more urgent job has room.
    pub yielded: Vec<(RankId, JobId)>,
    pub preempted: Vec<(JobId, JobId)>,
    /// Ranks that are to move, and cannot.
    pub stuck: BTreeMap<RankId, Stuck>,
    pub waits: BTreeMap<JobId, Wait>,
}

/// Why a job stays in the queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wait {
    NoNodes,
    /// How its model is cut is not known yet; why, the surveys know.
    Uncut,
    /// It would not fit into the empty cluster.
    Impossible {
        room: u32,
        ranks: u32,
        ask: String,
        /// Nodes that are up and get no ranks.
        withheld: usize,
    },
    /// It has failed again without getting further, and waits a while.
    HeldOff,
    /// It does not fit now.
    NoRoom {
        room: u32,
        ranks: u32,
    },
    /// It does not fit now, and a less urgent job that could make room has just made some.
    Spared {
        room: u32,
        ranks: u32,
        job: JobId,
    },
    /// It does not fit now, and room is kept for it from now on.
    Kept {
        room: u32,
        ranks: u32,
    },
    /// Less urgent jobs make room for it, or ranks that end.
    RoomIsMade {
        by: Vec<JobId>,
    },
    /// It would fit, but the room is kept for a job that has waited too long.
    Behind {
        job: JobId,
    },
}

/// Why a rank that is to move stays for now: there is no room for it elsewhere.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stuck {
    /// Without it the job would not go on.
    Needed { ranks_min: u32, ask: String },
    /// It does badly where it is, but better than not at all.
    NoRoom { ask: String },
    /// It leaves when the ranks of its job have handed over parts of their state.
    HandsOver,
}

pub fn plan(view: &View<'_>, options: &Options) -> Plan {
    let mut plan = Plan::default();
    if view.jobs.queue().len() == 0 && view.missing.is_empty() && view.moving.is_empty() {
        return plan;
    }
    let mut left = Left::new(view.members, view.live, view.bug);
    let mut next = 0;
    let first = view.jobs.queue().next();
    add(view, &mut left, &mut plan, (&mut next, first.map(|job| job.priority)));
    relocate(view, &mut left, &mut plan);
    // Room only shrinks while a plan is made: an ask of the same shape that found less room before finds no more now.
    let mut tried: BTreeMap<Shape<'_>, Found> = BTreeMap::new();
    let mut kept: Vec<JobId> = Vec::new();
    for job in view.jobs.queue() {
        add(view, &mut left, &mut plan, (&mut next, Some(job.priority)));
        if view.held_off.contains(&job.id) {
            plan.waits.insert(job.id, Wait::HeldOff);
            continue;
        }
        if job.awaits_cut() {
            plan.waits.insert(job.id, Wait::Uncut);
            continue;
        }
        let ask = &job.ask;
        let shape = (ask.room, &ask.labels, ask.seats.as_slice());
        let before = tried.get(&shape).copied();
        let known = before.filter(|found| found.room < ask.ranks);
        let found = match known {
            Some(found) => Err(found.room),
            None => left.find(ask),
        };
        let room = match found {
            Ok(placement) => {
                left.give(&placement, ask);
                plan.placed.push((job.id, placement));
                continue;
            }
            Err(room) => room,
        };
        let when_empty = known.map_or_else(|| left.when_empty(ask), |found| found.when_empty);
        let ranks = ask.ranks;
        // The queue gets less urgent: nobody makes room for this one who made none for one before that needed no more.
        let mut hopeless = before.map_or(u32::MAX, |found| found.hopeless);
        let room_is_made = when_empty >= ranks && ranks < hopeless && make_room(view, &mut left, job, &mut plan);
        if !room_is_made {
            hopeless = hopeless.min(ranks);
        }
        tried.insert(shape, Found { room, when_empty, hopeless });
        let passed = view.placements.saturating_sub(job.queued_after) >= options.passes_max;
        let wait = if room_is_made {
            continue;
        } else if when_empty < ranks {
            if view.live.is_empty() {
                Wait::NoNodes
            } else {
                Wait::Impossible { room: when_empty, ranks, ask: words(ask), withheld: view.withheld() }
            }
        } else if passed && kept.len() < options.kept_max {
            left.keep(ask);
            kept.push(job.id);
            Wait::Kept { room, ranks }
        } else if let Some(first) = kept.first() {
            Wait::Behind { job: *first }
        } else if let Some(spared) = view.spared_below(job.priority) {
            Wait::Spared { room, ranks, job: spared }
        } else {
            Wait::NoRoom { room, ranks }
        };
        plan.waits.insert(job.id, wait);
    }
    add(view, &mut left, &mut plan, (&mut next, None));
    plan
}

/// Whether room is on its way to a job that does not fit now. It is kept for it.
fn make_room(view: &View<'_>, left: &mut Left<'_>, job: &Job, plan: &mut Plan) -> bool {
    // One at a time, and not beside ranks that leave for another reason: the next plan sees what this one has changed.
    if !plan.yielded.is_empty() || !plan.preempted.is_empty() || !plan.retired.is_empty() {
        return false;
    }
    let grows: BTreeSet<JobId> = plan.added.iter().map(|(job, _)| *job).collect();
    let Some(found) = sacrifice(view, left, job, &grows) else { return false };
    let Sacrifice { ranks, jobs, leaving, nodes } = found;
    plan.yielded.extend(ranks.iter().map(|id| (*id, job.id)));
    plan.preempted.extend(jobs.iter().map(|victim| (*victim, job.id)));
    left.keep_nodes(&nodes);
    let makers: BTreeSet<JobId> = ranks.iter().map(|id| id.job).chain(jobs).chain(leaving).collect();
    plan.waits.insert(job.id, Wait::RoomIsMade { by: makers.into_iter().collect() });
    true
}

/// P4: ranks that a running job lacks come before what is queued and no more urgent, one by one: its other ranks hold their room already. From the
/// `next` one on, down to priority `least`.
fn add(view: &View<'_>, left: &mut Left<'_>, plan: &mut Plan, (next, least): (&mut usize, Option<i32>)) {
    while let Some((id, missing)) = view.missing.get(*next) {
        let found = view.jobs.get(*id);
        if found.zip(least).is_some_and(|(job, least)| job.priority < least) {
            return;
        }
        *next += 1;
        // A job that makes room gets no ranks.
        let Some(job) = found.filter(|job| !plan.preempted.iter().any(|(victim, _)| *victim == job.id)) else {
            continue;
        };
        let mut places = Vec::new();
        for slot in missing {
            let ask = job.ask.of(*slot);
            let beside = job.unlucky_on(*slot).and_then(|node| left.find_beside(&ask, node).ok());
            let Some(node) = beside.or_else(|| left.find(&ask).ok()) else {
                // The others need as much, but where ranks are unequal.
                if job.ask.seats.is_empty() { break } else { continue }
            };
            left.give(&node, &ask);
            places.extend(node.first().map(|node| (*slot, *node)));
        }
        if !places.is_empty() {
            plan.added.push((*id, places));
        }
    }
}

/// P5: then successors of ranks that are to move, each on another node. Without room, a rank whose node is being drained leaves, if its job
/// may go on with fewer.
fn relocate(view: &View<'_>, left: &mut Left<'_>, plan: &mut Plan) {
    for (id, moving) in &view.moving {
        let Some((job, run)) = view.jobs.get(*id).and_then(|job| Some((job, job.run.as_ref()?))) else { continue };
        let ranks_min = job.ranks_min.max(1);
        let (mut places, mut members) = (Vec::new(), run.members.len() as u32);
        let mut may_part = job.may_part_in_turn();
        for rank in moving {
            let Some(from) = run.ranks.get(rank) else { continue };
            let ask = job.ask.of(rank.rank);
            if let Ok(node) = left.find_beside(&ask, from.node) {
                left.give(&node, &ask);
                places.extend(node.first().map(|node| (rank.rank, *node)));
            } else if from.moves != Some(Move::Drained) {
                plan.stuck.insert(*rank, Stuck::NoRoom { ask: words(&ask) });
            } else if members > ranks_min && may_part == 0 {
                plan.stuck.insert(*rank, Stuck::HandsOver);
            } else if members > ranks_min {
                members -= 1;
                may_part -= 1;
                plan.retired.push((*rank, "its node is being drained, and there is no room elsewhere".into()));
            } else {
                plan.stuck.insert(*rank, Stuck::Needed { ranks_min, ask: words(&ask) });
            }
        }
        if !places.is_empty() {
            plan.added.push((*id, places));
        }
    }
}

type Shape<'a> = (super::members::Room, &'a BTreeMap<String, String>, &'a [super::machine::Seat]);

/// What was found for a shape: ranks that fit now, and that would fit into the empty cluster.
#[derive(Clone, Copy)]
struct Found {
    room: u32,
    when_empty: u32,
    /// For so many ranks, or more, nobody makes room.
    hopeless: u32,
}

/// What each rank needs, for people.
pub fn words(ask: &Ask) -> String {
    let mut words = format!("{} cpu and {} memory", ask.room.cpus, stoke_protocol::spec::Bytes(ask.room.memory_bytes));
    if ask.room.gpus > 0 {
        words = format!("{words} and {} gpu", ask.room.gpus);
    }
    for (key, value) in &ask.labels {
        words = format!("{words} and label {key}={value}");
    }
    words
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Needed { ranks_min, ask } => write!(
                f,
                "has no room elsewhere ({ask}), and its job goes on with no fewer than {} (ranks_min): add a node or free one",
                rank_count(*ranks_min)
            ),
            Self::NoRoom { ask } => write!(f, "has no room elsewhere ({ask})"),
            Self::HandsOver => {
                f.write_str("has no room elsewhere, and leaves when the ranks have handed over parts of their state")
            }
        }
    }
}

fn short(room: u32, ranks: u32) -> String {
    format!("needs room for {}; there is room for {room} now", rank_count(ranks))
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoNodes => f.write_str("no node is up: start one with `stoke node --join TOKEN`"),
            Self::Uncut => f.write_str("its model is being surveyed"),
            Self::Impossible { room, ranks, ask, withheld } => {
                let which = if *withheld > 0 { "all nodes that take ranks" } else { "all nodes together" };
                write!(
                    f,
                    "needs {} of {ask}; {which}, if nothing else ran, have room for {room}: ",
                    rank_count(*ranks)
                )?;
                match withheld {
                    0 => f.write_str("ask for less or add nodes"),
                    _ => write!(
                        f,
                        "{withheld} more are drained or in quarantine, `stoke nodes` says why and how to get them back"
                    ),
                }
            }
            Self::HeldOff => {
                f.write_str("waits before its next attempt, because it has failed again without getting further")
            }
            Self::NoRoom { room, ranks } => f.write_str(&short(*room, *ranks)),
            Self::Spared { room, ranks, job } => {
                write!(
                    f,
                    "{}; {job} is less urgent, but has just made room and is spared for a minute",
                    short(*room, *ranks)
                )
            }
            Self::Kept { room, ranks } => write!(f, "{}, and what frees up is kept for it", short(*room, *ranks)),
            Self::RoomIsMade { by } => {
                let by: Vec<String> = by.iter().map(JobId::to_string).collect();
                write!(f, "room is made for it by {}", by.join(", "))
            }
            Self::Behind { job } => write!(f, "room is kept for {job}, which has waited too long"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stoke_protocol::ids::{Incarnation, JobId};
    use stoke_protocol::message::node::{Capacity, Gpu};

    use crate::state::event::Submission;
    use crate::state::members::{Offer, Room};
    use crate::state::time::Time;

    struct World {
        members: Members,
        live: BTreeSet<NodeId>,
        jobs: Jobs,
        placements: u64,
    }

    fn world(cpus: &[u32]) -> World {
        let mut world =
            World { members: Members::default(), live: BTreeSet::new(), jobs: Jobs::default(), placements: 0 };
        for cpus in cpus {
            world.node(Capacity { cpus: *cpus, memory_bytes: 1 << 30, ..Capacity::default() });
        }
        world
    }

    impl World {
        fn node(&mut self, capacity: Capacity) -> NodeId {
            let id = self.members.join(Time(0), "n".into());
            self.members.open(Time(0), id, (Incarnation(1), 1), Offer { capacity, ..Offer::default() });
            self.live.insert(id);
            id
        }

        fn job(&mut self, priority: i32, ranks: u32, cpus: u32) -> JobId {
            let room = Room { cpus, memory_bytes: 1, gpus: 0 };
            self.ask(priority, Ask { ranks, room, ..Ask::default() })
        }

        fn ask(&mut self, priority: i32, ask: Ask) -> JobId {
            let submission = Submission {
                key: self.jobs.last().next().to_string(),
                owner: "o".into(),
                name: "j".into(),
                trainer: "t".into(),
                spec: String::new(),
                checkpoints: String::new(),
                resume: None,
                keep: 1,
                priority,
                attempts_max: 1,
                ranks_min: 1,
                digest_every: 1,
                on_nan: stoke_protocol::spec::OnNan::Fail,
                straggler: stoke_protocol::spec::Straggler::Report,
                sharded: false,
                serves: None,
                runs: None,
                program: None,
                cut: Default::default(),
                ask,
            };
            self.jobs.submit(Time(0), self.placements, submission)
        }

        fn plan(&self) -> Plan {
            let view = View {
                members: &self.members,
                live: &self.live,
                jobs: &self.jobs,
                missing: Vec::new(),
                moving: Vec::new(),
                held_off: BTreeSet::new(),
                spared: BTreeSet::new(),
                placements: self.placements,
                bug: None,
            };
            plan(&view, &Options::default())
        }
    }

    fn nodes(ids: &[u64]) -> Vec<NodeId> {
        ids.iter().copied().map(NodeId).collect()
    }

    #[test]
    fn ranks_without_accelerators_are_spread_and_neighbours_share_a_node() {
        let mut world = world(&[4, 4, 4]);
        let three = world.job(0, 3, 1);
        let five = world.job(0, 5, 1);
        let plan = world.plan();
        assert_eq!(plan.placed[0], (three, nodes(&[3, 2, 1])));
        assert_eq!(plan.placed[1], (five, nodes(&[3, 3, 2, 2, 1])));
    }

    #[test]
    fn ranks_with_accelerators_are_packed_on_the_tightest_node() {
        let mut world = world(&[64]);
        let gpu = Gpu { name: "g".into(), memory_bytes: 1 };
        for count in [8, 4, 2] {
            let gpus = vec![gpu.clone(); count].into();
            world.node(Capacity { cpus: 64, memory_bytes: 1 << 30, gpus, ..Capacity::default() });
        }
        let room = Room { cpus: 1, memory_bytes: 1, gpus: 1 };
        let job = world.ask(0, Ask { ranks: 4, room, ..Ask::default() });
        let larger = world.ask(0, Ask { ranks: 10, room, ..Ask::default() });
        let plan = world.plan();
        assert_eq!(plan.placed[0], (job, nodes(&[3, 3, 3, 3])));
        assert_eq!(plan.placed[1], (larger, nodes(&[2, 2, 2, 2, 2, 2, 2, 2, 4, 4])));
    }

    #[test]
    fn gangs_are_whole_or_wait_with_a_reason() {
        let mut world = world(&[2, 2]);
        let large = world.job(0, 5, 1);
        let never = world.job(0, 1, 3);
        let fits = world.job(0, 4, 1);
        let plan = world.plan();
        assert_eq!(plan.placed.iter().map(|(job, _)| *job).collect::<Vec<_>>(), [fits]);
        assert!(matches!(plan.waits[&large], Wait::Impossible { room: 4, ranks: 5, .. }));
        assert!(matches!(plan.waits[&never], Wait::Impossible { room: 0, ranks: 1, .. }));
        world.live.clear();
        assert!(matches!(world.plan().waits[&fits], Wait::NoNodes));
    }

    #[test]
    fn higher_priority_goes_first_and_then_the_earlier_one() {
        let mut world = world(&[1]);
        let early = world.job(0, 1, 1);
        let late = world.job(0, 1, 1);
        let urgent = world.job(5, 1, 1);
        let plan = world.plan();
        assert_eq!(plan.placed, [(urgent, nodes(&[1]))]);
        assert_eq!(plan.waits.keys().copied().collect::<Vec<_>>(), [early, late]);
    }

    #[test]
    fn backfill_stops_when_it_would_starve_the_first_in_line() {
        let mut world = world(&[4, 1]);
        let holder = RankIdOf(99);
        world.members.hold(NodeId(1), holder.rank(), Room { cpus: 2, memory_bytes: 1, gpus: 0 });
        let large = world.job(0, 1, 4);
        let small = world.job(0, 1, 1);
        assert_eq!(world.plan().placed, [(small, nodes(&[1]))]);
        world.placements = Options::default().passes_max;
        let plan = world.plan();
        assert_eq!(plan.placed, [(small, nodes(&[2]))], "the large node is kept, the other one is not");
        assert!(matches!(plan.waits[&large], Wait::Kept { .. }));
    }

    #[test]
    fn one_large_plan_places_as_many_small_ones_do() {
        let mut at_once = world(&[3; 400]);
        let mut in_turn = world(&[3; 400]);
        let jobs: Vec<JobId> = (0..300).map(|_| at_once.job(0, 4, 1)).collect();
        let placed = at_once.plan().placed;
        assert_eq!(placed.iter().map(|(job, _)| *job).collect::<Vec<_>>(), jobs);
        for (job, nodes) in placed {
            assert_eq!(in_turn.job(0, 4, 1), job);
            assert_eq!(in_turn.plan().placed, [(job, nodes.clone())]);
            let mut orders = Vec::new();
            let mut scene = crate::state::machine::Scene {
                at: Time(0),
                index: stoke_protocol::ids::LogIndex(0),
                bug: None,
                orders: &mut orders,
            };
            in_turn.jobs.drive(job, 0, |job| job.start(&mut scene, &nodes, (None, None)));
            for (rank, node) in nodes.iter().enumerate() {
                let mut id = RankIdOf(job.0).rank();
                id.rank.0 = rank as u32;
                in_turn.members.hold(*node, id, Room { cpus: 1, memory_bytes: 1, gpus: 0 });
            }
        }
        assert!(in_turn.members.nodes().all(|node| node.free().cpus == 0));
    }

    #[test]
    fn labels_silence_and_memory_keep_ranks_away() {
        let mut world = world(&[4]);
        let labels = vec![("disk".to_owned(), "ssd".to_owned())].into();
        let labelled = world.node(Capacity { cpus: 1, memory_bytes: 10, labels, ..Capacity::default() });
        let wanted: BTreeMap<String, String> = [("disk".into(), "ssd".into())].into();
        let small = Room { cpus: 1, memory_bytes: 10, gpus: 0 };
        let job = world.ask(0, Ask { ranks: 1, room: small, labels: wanted.clone(), ..Ask::default() });
        assert_eq!(world.plan().placed, [(job, vec![labelled])]);
        world.live.remove(&labelled);
        assert!(world.plan().placed.is_empty());
        world.live.insert(labelled);
        let large = Room { memory_bytes: 11, ..small };
        let job = world.ask(9, Ask { ranks: 1, room: large, labels: wanted, ..Ask::default() });
        assert!(world.plan().waits.contains_key(&job));
    }

    struct RankIdOf(u64);
    impl RankIdOf {
        fn rank(&self) -> stoke_protocol::message::rank::RankId {
            let generation = stoke_protocol::ids::Generation(1);
            stoke_protocol::message::rank::RankId { job: JobId(self.0), generation, rank: stoke_protocol::ids::Rank(0) }
        }
    }
}
