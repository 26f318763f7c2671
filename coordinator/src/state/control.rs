//! The control plane's whole brain: the durable cluster and the volatile rest, driven by inputs. The shell and the simulator call `step`,
//! append the records to a log, and run the effects when every record so far is durable; nothing else may change the state.
//!
//! S1 (I6): every effect of a step, answers to questions included, waits for the records before it: nothing that a client has seen is lost.
//! S2: what a restart forgets (sessions, progress, tickets, reasons to wait) is made again by hellos, reports and plans.

use std::collections::{BTreeMap, BTreeSet};

use stoke_protocol::identity::Subject;
use stoke_protocol::ids::{ClusterId, Digest, JobId, NodeId, Rank, TokenId};
use stoke_protocol::message::client::{JobState, Reply, Request, TokenScope};
use stoke_protocol::message::join::Wants;
use stoke_protocol::message::node::{Heartbeat, NodeHello, Report, ToNode};
use stoke_protocol::message::rank::{Progress, RankId};

use super::cluster::{Cluster, Refused};
use super::effect::{Effect, Member, Order};
use super::event::{Event, Record};
use super::liveness::{Liveness, Timings};
use super::machine::{Job, STOP_GRACE_MS};
use super::members::Stale;
use super::placement::{self, View, Wait};
use super::planted::PlantedBug;
use super::run::Run;
use super::suspicion::Hearings;
use super::time::{Mono, Now};

/// Refused joins and requests that are journalled a minute: an attacker must not fill the journal with them.
const AUDITED_A_MINUTE_MAX: u32 = 60;
/// Before a job that failed for the second time without getting further gets new ranks; doubled with each failure after it.
const BACK_OFF_MS: u64 = 1_000;
/// At most a minute.
const BACK_OFF_DOUBLINGS: u32 = 6;
/// Cancels that wait for ranks, of all clients.
const CANCELS_WAITING_MAX: usize = 1_024;

/// A connection of a node; drawn by the shell, never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SessionId(pub u64);

/// A question that waits for its answer; drawn by the shell, never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ticket(pub u64);

#[derive(Clone, Debug)]
pub enum Input {
    /// Once, before anything else, on an empty journal.
    Found {
        cluster: ClusterId,
        admin: String,
    },
    /// Once a process: after the journal was replayed, before anybody connects.
    Start {
        version: String,
    },
    /// A node's first frame. `node` is from its certificate.
    Hello {
        session: SessionId,
        node: NodeId,
        address: String,
        hello: NodeHello,
    },
    Report {
        session: SessionId,
        report: Report,
    },
    Progress {
        session: SessionId,
        id: RankId,
        progress: Progress,
    },
    Heartbeat {
        session: SessionId,
        heartbeat: Heartbeat,
    },
    Closed {
        session: SessionId,
    },
    SignRank {
        ticket: Ticket,
        session: SessionId,
        id: RankId,
    },
    /// `secret_hash` is of a fresh secret, for the case that a token is to be made.
    Request {
        ticket: Ticket,
        caller: Subject,
        request: Request,
        secret_hash: Digest,
    },
    Join {
        ticket: Ticket,
        token: TokenId,
        secret_hash: Digest,
        wants: Wants,
    },
    /// The client of a waiting question is gone.
    Dropped {
        ticket: Ticket,
    },
    /// The journal's disk is low (with the words for those who ask), or has room again.
    Storage {
        low: Option<String>,
    },
    /// A few times a second.
    Tick,
}

/// What came of an input: first the records, then, when they are durable, the effects.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Step {
    pub records: Vec<Record>,
    pub effects: Vec<Effect>,
}

#[derive(Clone, PartialEq, Debug, Default)]
pub struct Options {
    pub timings: Timings,
    pub placement: placement::Options,
    /// URI below which jobs without a folder of their own keep their checkpoints.
    pub checkpoints: String,
    pub version: String,
}

pub struct Control {
    pub(super) cluster: Cluster,
    pub(super) liveness: Liveness,
    pub(super) options: Options,
    pub(super) waits: BTreeMap<JobId, Wait>,
    pub(super) progress: BTreeMap<JobId, Progress>,
    cancels: BTreeMap<JobId, Vec<Ticket>>,
    pub(super) storage_low: Option<String>,
    /// Ranks that were placed, and since when they come up.
    starting: BTreeMap<RankId, Mono>,
    /// Until when a job that has failed gets no new ranks.
    held_off: BTreeMap<JobId, Mono>,
    hearings: Hearings,
    /// When ranks that nobody wants any more were last told to stop, and which were there then.
    nagged: Mono,
    unwanted: BTreeSet<RankId>,
    audited: (Mono, u32),
    unaudited: u64,
    replan: bool,
    pub(super) now: Now,
}

impl Control {
    /// Around a state that was replayed from a journal (or an empty one).
    pub fn new(cluster: Cluster, options: Options, now: Now) -> Self {
        let expected = cluster.members().nodes().filter(|node| node.up).map(|node| (node.id, node.incarnation));
        let mut liveness = Liveness::new(options.timings, now.mono, expected);
        liveness.plant(cluster.planted_bug());
        let placed = cluster.jobs().iter().filter_map(|job| Some((job, job.run.as_ref()?)));
        let placed = placed.flat_map(|(job, run)| run.ranks.keys().filter(|id| job.unready(**id).is_some()));
        let starting = placed.map(|id| (*id, now.mono)).collect();
        Self {
            cluster,
            liveness,
            options,
            waits: BTreeMap::new(),
            progress: BTreeMap::new(),
            cancels: BTreeMap::new(),
            storage_low: None,
            starting,
            held_off: BTreeMap::new(),
            hearings: Hearings::default(),
            nagged: now.mono,
            unwanted: BTreeSet::new(),
            audited: (now.mono, 0),
            unaudited: 0,
            replan: true,
            now,
        }
    }

    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    pub fn liveness(&self) -> &Liveness {
        &self.liveness
    }

    /// Why a job stays in the queue, as of the newest plan.
    pub fn wait(&self, job: JobId) -> Option<&Wait> {
        self.waits.get(&job)
    }

    /// Refusals that were not journalled, because there were too many of them or too little room.
    pub fn unaudited(&self) -> u64 {
        self.unaudited
    }

    pub fn step(&mut self, now: Now, input: Input) -> Step {
        self.now = Now { wall: now.wall.max(self.cluster.clock()), mono: now.mono.max(self.now.mono) };
        let mut step = Step::default();
        match input {
            Input::Found { cluster, admin } => self.must(&mut step, Event::Founded { cluster, admin }),
            Input::Start { version } => self.must(&mut step, Event::EpochRaised { version }),
            Input::Hello { session, node, address, hello } => self.hello(&mut step, (session, node), address, hello),
            Input::Report { session, report } => self.report(&mut step, session, report),
            Input::Progress { session, id, progress } => self.take_progress(&mut step, session, id, progress),
            Input::Heartbeat { session, heartbeat } => {
                self.replan |= self.liveness.heard(self.now.mono, session, Some(heartbeat));
            }
            // A plan has other reasons to wait when a node is silent.
            Input::Closed { session } => self.replan |= self.liveness.close(session).is_some(),
            Input::SignRank { ticket, session, id } => self.sign_rank(&mut step, ticket, session, id),
            Input::Request { ticket, caller, request, secret_hash } => {
                self.request(&mut step, ticket, &caller, (request, secret_hash));
            }
            Input::Join { ticket, token, secret_hash, wants } => {
                self.join(&mut step, ticket, (token, secret_hash), wants)
            }
            Input::Dropped { ticket } => {
                self.cancels.values_mut().for_each(|waiting| waiting.retain(|other| *other != ticket));
            }
            Input::Storage { low } => self.storage_low = low,
            Input::Tick => self.tick(&mut step),
        }
        self.place(&mut step);
        step
    }

    /// Journals an event and applies it, if it changes anything.
    pub(super) fn commit(&mut self, step: &mut Step, event: Event) -> Result<(), Refused> {
        self.cluster.check(self.now.wall, &event)?;
        let record = Record { at: self.now.wall, event };
        let orders = self.cluster.apply(&record);
        step.records.push(record);
        self.carry(step, orders);
        Ok(())
    }

    fn must(&mut self, step: &mut Step, event: Event) {
        let committed = self.commit(step, event);
        assert!(committed.is_ok(), "K2: a coordinator starts once on its journal: {committed:?}");
    }

    /// Orders in terms of nodes become effects in terms of sessions.
    fn carry(&mut self, step: &mut Step, orders: Vec<Order>) {
        for order in orders {
            match order {
                Order::Send { node, message } => {
                    if let Some(session) = self.liveness.session(node) {
                        step.effects.push(Effect::Send { session, message });
                    }
                }
                Order::Changed { job } => {
                    self.answer_cancels(step, job);
                    if self.cluster.jobs().get(job).is_none_or(|job| job.state.is_terminal()) {
                        self.waits.remove(&job);
                    }
                    step.effects.push(Effect::Changed { job });
                }
            }
        }
    }

    fn hello(&mut self, step: &mut Step, (session, node): (SessionId, NodeId), address: String, hello: NodeHello) {
        if let Err(reason) = self.check_hello(node, &hello) {
            step.effects.push(Effect::Close { session, reason });
            return;
        }
        let before = self.liveness.open(self.now.mono, node, session, hello.incarnation);
        if let Some(session) = before {
            let reason = format!("another session of {node} has opened");
            step.effects.push(Effect::Close { session, reason });
        }
        let welcome = ToNode::Welcome {
            epoch: self.cluster.epoch(),
            index: self.cluster.index().next(),
            heartbeat_ms: self.options.timings.heartbeat_ms,
            lease_ms: self.options.timings.lease_ms,
        };
        step.effects.push(Effect::Send { session, message: welcome });
        let committed = self.commit(step, Event::NodeUp { hello, address });
        assert!(committed.is_ok(), "M1: the hello of {node} was checked: {committed:?}");
    }

    /// I1, I5 and F32: who may open a session.
    fn check_hello(&self, node: NodeId, hello: &NodeHello) -> Result<(), String> {
        if Some(hello.cluster) != self.cluster.id() {
            return Err(format!("this is another cluster than {}: check the coordinator's address", hello.cluster));
        }
        if hello.node != node {
            return Err(format!("the certificate is of {node}, the hello of {}", hello.node));
        }
        if hello.epoch_seen > self.cluster.epoch() || hello.index_seen > self.cluster.index() {
            return Err(format!(
                "this coordinator ({}, {}) is behind what the node has obeyed ({}, {}): was an old copy of its folder started?",
                self.cluster.epoch(),
                self.cluster.index(),
                hello.epoch_seen,
                hello.index_seen
            ));
        }
        let bug = self.cluster.planted_bug();
        self.cluster
            .members()
            .check_hello(node, (hello.incarnation, hello.session), bug)
            .map_err(|stale| stale_words(node, &stale))
    }

    fn report(&mut self, step: &mut Step, session: SessionId, report: Report) {
        self.replan |= self.liveness.heard(self.now.mono, session, None);
        let Some((node, incarnation)) = self.liveness.node(session) else { return };
        let sequence = report.sequence;
        let (job, failures) = (report.id.job, self.failures(report.id.job));
        match self.commit(step, Event::Reported { node, incarnation, report }) {
            Ok(()) => self.hold_off(job, failures),
            Err(Refused::Stale(Stale::Duplicate { last })) => {
                let message = ToNode::Acknowledge { sequence: last, index: self.cluster.index() };
                step.effects.push(Effect::Send { session, message });
            }
            Err(Refused::Stale(stale)) => {
                let reason = format!("report {sequence} is refused: {}", stale_words(node, &stale));
                self.close(step, session, reason);
            }
            Err(
                Refused::Invalid(why) | Refused::NotFound(why) | Refused::Conflict(why) | Refused::Unavailable(why),
            ) => {
                self.close(step, session, format!("report {sequence} is refused: {why}"));
            }
        }
    }

    fn failures(&self, job: JobId) -> u32 {
        self.cluster.jobs().get(job).map_or(0, |job| job.failures + job.turned_away)
    }

    /// A job that has failed again without getting further gets new ranks later and later; the first time at once (I11).
    fn hold_off(&mut self, job: JobId, before: u32) {
        let failures = self.failures(job);
        if failures > before && failures > 1 {
            let wait_ms = BACK_OFF_MS << (failures - 2).min(BACK_OFF_DOUBLINGS);
            self.held_off.insert(job, self.now.mono.plus_ms(wait_ms));
        }
    }

    fn close(&mut self, step: &mut Step, session: SessionId, reason: String) {
        self.liveness.close(session);
        step.effects.push(Effect::Close { session, reason });
    }

    fn take_progress(&mut self, step: &mut Step, session: SessionId, id: RankId, progress: Progress) {
        self.replan |= self.liveness.heard(self.now.mono, session, None);
        let Some((node, _)) = self.liveness.node(session) else { return };
        let Some(job) = self.cluster.jobs().get(id.job) else { return };
        if !job.is_on(id, node) || !job.expects(id) {
            return;
        }
        let newest = self.progress.entry(id.job).or_insert(progress);
        if progress.step >= newest.step || id.rank.0 == 0 {
            *newest = progress;
            step.effects.push(Effect::Changed { job: id.job });
        }
    }

    fn sign_rank(&mut self, step: &mut Step, ticket: Ticket, session: SessionId, id: RankId) {
        let allowed = match self.liveness.node(session) {
            Some((node, incarnation)) => self.cluster.check_sign(node, incarnation, id),
            None => Err("the session is over".into()),
        };
        step.effects.push(match allowed {
            Ok(()) => Effect::SignRank { ticket, id },
            Err(reason) => Effect::Deny { ticket, reason },
        });
    }

    fn join(&mut self, step: &mut Step, ticket: Ticket, (token, secret_hash): (TokenId, Digest), wants: Wants) {
        let who = match &wants {
            Wants::Node { name } => format!("a machine that calls itself {name:?}"),
            Wants::User { name } => format!("somebody who calls himself {name:?}"),
        };
        let name = match &wants {
            Wants::User { name } => Subject::user(stoke_protocol::identity::UserRole::Viewer, name).map(|_| ()),
            Wants::Node { .. } => Ok(()),
        };
        let joined = match (name, &self.storage_low) {
            (Err(error), _) => Err(Refused::Invalid(error.to_string())),
            (Ok(()), Some(low)) => Err(Refused::Unavailable(low.clone())),
            (Ok(()), None) => self.commit(step, Event::Joined { token, secret_hash, wants: wants.clone() }),
        };
        match joined {
            Ok(()) => {
                let member = match wants {
                    Wants::Node { .. } => Member::Node { node: self.cluster.members().last() },
                    Wants::User { name } => Member::User { role: self.cluster.user_role(&name), name },
                };
                step.effects.push(Effect::Admit { ticket, member });
            }
            Err(refused) => {
                let reason = refused_words(refused);
                self.audit(step, who, format!("join with {token}"), reason.clone());
                step.effects.push(Effect::Deny { ticket, reason });
            }
        }
    }

    /// Journals a refusal (I34), unless there are too many of them.
    pub(super) fn audit(&mut self, step: &mut Step, who: String, verb: String, reason: String) {
        let (since, count) = self.audited;
        let fresh = self.now.mono.since_ms(since) >= 60_000;
        self.audited = if fresh { (self.now.mono, 1) } else { (since, count + 1) };
        if self.audited.1 > AUDITED_A_MINUTE_MAX || self.storage_low.is_some() {
            self.unaudited += 1;
            return;
        }
        let committed = self.commit(step, Event::Refused { who, verb, reason });
        assert!(committed.is_ok(), "K1: a refusal is always an entry");
    }

    fn tick(&mut self, step: &mut Step) {
        let live = self.liveness.live().len();
        for (node, incarnation, session) in self.liveness.tick(self.now.mono) {
            if let Some(session) = session {
                let reason = format!("{node} was silent for too long and is taken as lost: connect again");
                step.effects.push(Effect::Close { session, reason });
            }
            // A node that was lost before and never came back changes nothing.
            let _unchanged = self.commit(step, Event::NodeLost { node, incarnation });
        }
        self.replan |= self.liveness.live().len() != live;
        self.end_stalled(step);
        self.evict(step);
        if self.now.mono.since_ms(self.nagged) >= self.options.timings.exit_max_ms {
            self.nagged = self.now.mono;
            self.nag(step);
            self.progress.retain(|job, _| self.cluster.jobs().get(*job).is_some());
            self.held_off.retain(|job, _| self.cluster.jobs().get(*job).is_some_and(|job| !job.state.is_terminal()));
        }
    }

    /// Ranks that do not come up: a gang is ended, a rank that was added is given up.
    fn end_stalled(&mut self, step: &mut Step) {
        let (now, start_max_ms) = (self.now.mono, self.options.timings.start_max_ms);
        let jobs = self.cluster.jobs();
        self.starting.retain(|id, _| jobs.get(id.job).is_some_and(|job| job.unready(*id).is_some()));
        let late = self.starting.iter().filter(|(_, since)| now.since_ms(**since) >= start_max_ms);
        let late: Vec<RankId> = late.map(|(id, _)| *id).collect();
        for id in late {
            let Some(node) = self.cluster.jobs().get(id.job).and_then(|job| job.unready(id)) else { continue };
            let late = format!("was not ready within {} s", start_max_ms / 1_000);
            let starts = self.cluster.jobs().get(id.job).is_some_and(|job| job.state == JobState::Starting);
            let event = if starts {
                Event::Stalled {
                    job: id.job,
                    generation: id.generation,
                    reason: format!("{} on {node} {late}", id.rank),
                }
            } else {
                Event::Evicted { id, reason: late }
            };
            let failures = self.failures(id.job);
            // One that is over by now changes nothing.
            let _unchanged = self.commit(step, event);
            self.hold_off(id.job, failures);
        }
    }

    /// Ranks that others cannot reach.
    fn evict(&mut self, step: &mut Step) {
        if self.cluster.planted_bug() == Some(PlantedBug::PartedForgotten) {
            return;
        }
        let live = self.liveness.live();
        let silent = |run: &Run, id: RankId| run.ranks.get(&id).is_none_or(|rank| !live.contains(&rank.node));
        for (id, accusers) in self.hearings.due(self.now.mono, self.cluster.jobs().parted(), silent) {
            let accusers: Vec<String> = accusers.iter().map(|id| id.rank.to_string()).collect();
            let reason = format!("was given up: {} lost the connection to it", accusers.join(", "));
            let failures = self.failures(id.job);
            let _unchanged = self.commit(step, Event::Evicted { id, reason });
            self.hold_off(id.job, failures);
        }
    }

    /// Ranks that outlive their job, because their process hangs, hold room that others wait for.
    fn nag(&mut self, step: &mut Step) {
        let jobs = self.cluster.jobs();
        let wanted = |id: &RankId| {
            // While a job recovers or is cancelled its ranks were told already.
            let job = jobs.get(id.job).filter(|job| !job.state.is_terminal() && job.state != JobState::Queued);
            job.is_some_and(|job| job.expects(*id) || !job.is_active() && job.knows(*id))
        };
        let held = self.cluster.members().nodes().flat_map(|node| node.held.keys());
        let unwanted: BTreeSet<RankId> = held.filter(|id| !wanted(id)).copied().collect();
        // Twice in a row: since the last round at least. The wall clock may jump, so it cannot tell how long.
        let late = std::mem::replace(&mut self.unwanted, unwanted);
        for node in self.cluster.members().nodes() {
            let Some(session) = self.liveness.session(node.id) else { continue };
            for id in node.held.keys().filter(|id| late.contains(id) && self.unwanted.contains(id)) {
                let reason = "its generation is over".to_owned();
                let message = ToNode::Stop { id: *id, reason, grace_ms: STOP_GRACE_MS };
                step.effects.push(Effect::Send { session, message });
            }
        }
    }

    /// Makes a plan when something has changed that may let a job be placed, and journals what it places.
    fn place(&mut self, step: &mut Step) {
        if !(self.cluster.take_replan() | std::mem::take(&mut self.replan)) {
            return;
        }
        let plan = placement::plan(&self.view(), &self.options.placement);
        self.waits = plan.waits;
        for (job, places) in plan.added {
            let Some(generation) = self.cluster.jobs().get(job).map(|job| job.generation.next()) else { continue };
            let ids = places.iter().map(|(rank, _)| RankId { job, generation, rank: *rank });
            self.starting.extend(ids.map(|id| (id, self.now.mono)));
            let committed = self.commit(step, Event::RanksPlaced { job, generation, places });
            assert!(committed.is_ok() || self.cluster.planted_bug().is_some(), "K3: a plan fits: {committed:?}");
        }
        for (job, placement) in plan.placed {
            let Some(generation) = self.cluster.jobs().get(job).map(|job| job.generation.next()) else { continue };
            self.progress.remove(&job);
            let ids = (0..placement.len() as u32).map(|rank| RankId { job, generation, rank: Rank(rank) });
            self.starting.extend(ids.map(|id| (id, self.now.mono)));
            let committed = self.commit(step, Event::GenerationStarted { job, generation, placement });
            assert!(committed.is_ok() || self.cluster.planted_bug().is_some(), "K3: a plan fits: {committed:?}");
        }
    }

    /// Running jobs that lack ranks, the most urgent first.
    fn missing(&self) -> Vec<(JobId, Vec<Rank>)> {
        let waits = |job: &Job| self.held_off.get(&job.id).is_some_and(|until| self.now.mono < *until);
        let lacking = self.cluster.jobs().lacking().filter(|job| !waits(job));
        let mut missing: Vec<(&Job, Vec<Rank>)> = lacking.map(|job| (job, job.missing())).collect();
        missing.sort_by_key(|(job, _)| (std::cmp::Reverse(job.priority), job.id));
        missing.into_iter().map(|(job, missing)| (job.id, missing)).collect()
    }

    /// What a plan or an explanation looks at.
    pub fn view(&self) -> View<'_> {
        View {
            members: self.cluster.members(),
            live: self.liveness.live(),
            jobs: self.cluster.jobs(),
            missing: self.missing(),
            placements: self.cluster.placements(),
            bug: self.cluster.planted_bug(),
        }
    }

    /// Answered when no rank of the job can start any more (I10).
    pub(super) fn wait_for_cancel(&mut self, step: &mut Step, ticket: Ticket, job: JobId) {
        if self.cancels.values().map(Vec::len).sum::<usize>() >= CANCELS_WAITING_MAX {
            return super::requests::refuse_busy(step, ticket, "too many cancels wait for their ranks");
        }
        self.cancels.entry(job).or_default().push(ticket);
        self.answer_cancels(step, job);
    }

    fn answer_cancels(&mut self, step: &mut Step, id: JobId) {
        let early = self.cluster.planted_bug() == Some(PlantedBug::CancelAckedEarly);
        let Some(job) = self.cluster.jobs().get(id) else { return };
        if job.is_cancel_safe() || early {
            for ticket in self.cancels.remove(&id).unwrap_or_default() {
                step.effects.push(Effect::Reply { ticket, reply: Box::new(Reply::Cancelled { job: id }) });
            }
        } else if job.state.is_terminal() {
            // It ended by itself before its ranks were stopped.
            for ticket in self.cancels.remove(&id).unwrap_or_default() {
                super::requests::refuse_ended(step, ticket, job);
            }
        }
    }
}

impl Cluster {
    pub(super) fn user_role(&self, name: &str) -> TokenScope {
        self.users.get(name).map_or(TokenScope::Viewer, |user| user.role)
    }
}

fn stale_words(node: NodeId, stale: &Stale) -> String {
    match stale {
        Stale::Unknown => format!("{node} is not a member of this cluster: join again with a new token"),
        Stale::Incarnation { current } => format!("a newer agent of {node} has connected (incarnation {})", current.0),
        Stale::Session { current } => format!("a newer session of {node} has opened (session {current})"),
        Stale::Duplicate { last } => format!("{last} was the last one"),
    }
}

pub(super) fn refused_words(refused: Refused) -> String {
    match refused {
        Refused::Stale(stale) => stale_words(NodeId(0), &stale),
        Refused::Invalid(why) | Refused::NotFound(why) | Refused::Conflict(why) | Refused::Unavailable(why) => why,
    }
}
