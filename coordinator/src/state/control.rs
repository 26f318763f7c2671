//! The control plane's whole brain: the durable cluster and the volatile rest, driven by inputs. The shell and the simulator call `step`,
//! append the records to a log, and run the effects when every record so far is durable; nothing else may change the state.
//!
//! S1 (I6): every effect of a step, answers to questions included, waits for the records before it: nothing that a client has seen is lost.
//! S2: what a restart forgets (sessions, progress, tickets, reasons to wait) is made again by hellos, reports and plans.

use std::collections::{BTreeMap, BTreeSet};

use stoke_protocol::identity::Subject;
use stoke_protocol::ids::{ClusterId, Digest, JobId, NodeId, TokenId};
use stoke_protocol::message::client::{Reply, Request, TokenScope};
use stoke_protocol::message::join::Wants;
use stoke_protocol::message::load::{Demand, Load};
use stoke_protocol::message::node::{Heartbeat, NodeHello, Report, ToNode};
use stoke_protocol::message::rank::{Progress, RankId};
use stoke_protocol::message::serve::Routes;
use stoke_protocol::message::split::{Survey, Surveyed};

use super::cluster::{Cluster, Refused};
use super::effect::{Effect, Member, Order};
use super::event::{Event, Record};
use super::happenings::Happenings;
use super::history::Histories;
use super::liveness::{Liveness, Timings};
use super::load::Loads;
use super::machine::Job;
use super::members::Stale;
use super::placement::{self, Stuck, Wait};
use super::planted::PlantedBug;
use super::pruning::Sweep;
use super::quarantine::PROBATION_AFTER_MS;
use super::scaling::Scaling;
use super::stragglers::Stragglers;
use super::survey::Surveys;
use super::suspicion::Hearings;
use super::time::{Mono, Now};

/// Refused joins and requests that are journalled a minute: an attacker must not fill the journal with them.
const AUDITED_A_MINUTE_MAX: u32 = 60;
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
    Load {
        session: SessionId,
        id: RankId,
        load: Load,
    },
    /// Of a node's gateway.
    Demand {
        session: SessionId,
        demands: Vec<Demand>,
    },
    Swept {
        session: SessionId,
        sweep: Sweep,
    },
    /// A node has looked at a model; the round trip to it as the transport has measured it.
    Surveyed {
        session: SessionId,
        rtt_us: u32,
        survey: Survey,
        found: Result<Surveyed, String>,
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
    /// A node asks for a fresh certificate for itself.
    RenewNode {
        ticket: Ticket,
        session: SessionId,
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
    /// URL of the HTTP API, where there is one.
    pub api: Option<String>,
}

pub struct Control {
    pub(super) cluster: Cluster,
    pub(super) liveness: Liveness,
    pub(super) options: Options,
    pub(super) waits: BTreeMap<JobId, Wait>,
    pub(super) progress: BTreeMap<JobId, Progress>,
    pub(super) histories: Histories,
    pub(super) happenings: Happenings,
    cancels: BTreeMap<JobId, Vec<Ticket>>,
    pub(super) surveys: Surveys,
    pub(super) storage_low: Option<String>,
    /// Ranks that were placed, and since when they come up.
    pub(super) starting: BTreeMap<RankId, Mono>,
    /// Until when a job that has failed gets no new ranks.
    pub(super) held_off: BTreeMap<JobId, Mono>,
    pub(super) hearings: Hearings,
    /// When drains end that have a deadline.
    pub(super) deadlines: BTreeMap<NodeId, Mono>,
    /// Until when jobs that make room have time for their checkpoint.
    pub(super) yielding: BTreeMap<JobId, Mono>,
    /// Until when jobs that have made room are not asked again.
    pub(super) spared: BTreeMap<JobId, Mono>,
    /// When nodes in quarantine get a rank that tries them.
    pub(super) probations: BTreeMap<NodeId, Mono>,
    /// Why ranks that are to move stay, as of the newest plan.
    pub(super) stuck: BTreeMap<RankId, Stuck>,
    pub(super) stragglers: Stragglers,
    pub(super) loads: Loads,
    pub(super) scaling: Scaling,
    /// When ranks that nobody wants any more were last told to stop, and which were there then.
    pub(super) nagged: Mono,
    pub(super) unwanted: BTreeSet<RankId>,
    /// As every node was told them; nothing is known of what an earlier coordinator told.
    pub(super) routes: Option<Routes>,
    /// A job that serves looks different now.
    pub(super) reroute: bool,
    audited: (Mono, u32),
    unaudited: u64,
    pub(super) replan: bool,
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
        let deadlines = Self::deadlines(&cluster, now);
        let nodes = cluster.members().nodes();
        let quarantined = nodes.filter(|node| node.quarantine.as_ref().is_some_and(|found| !found.probation));
        let probations = quarantined.map(|node| (node.id, now.mono.plus_ms(PROBATION_AFTER_MS))).collect();
        let Timings { yield_max_ms, spared_ms, .. } = options.timings;
        let until = |ms| move |job: &Job| (job.id, now.mono.plus_ms(ms));
        let leaving = cluster.jobs().leaving();
        let yielding = leaving.filter(|job| job.yields.is_some()).map(until(yield_max_ms)).collect();
        let active = cluster.jobs().iter().filter(|job| job.is_active() && job.preemptions > 0);
        let spared = active.map(until(spared_ms)).collect();
        let surveys = Surveys::new(cluster.jobs().queue());
        let starting = placed.map(|id| (*id, now.mono)).collect();
        let happenings = Happenings::of(&cluster);
        Self {
            cluster,
            liveness,
            options,
            waits: BTreeMap::new(),
            progress: BTreeMap::new(),
            histories: Histories::default(),
            happenings,
            cancels: BTreeMap::new(),
            surveys,
            storage_low: None,
            starting,
            held_off: BTreeMap::new(),
            hearings: Hearings::default(),
            deadlines,
            yielding,
            spared,
            probations,
            stuck: BTreeMap::new(),
            stragglers: Stragglers::default(),
            loads: Loads::default(),
            scaling: Scaling::default(),
            nagged: now.mono,
            unwanted: BTreeSet::new(),
            routes: None,
            // Who connects is told; what is not known of here could not be ended.
            reroute: true,
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

    /// Of running jobs, as far as they have told.
    pub fn skipped_steps(&self) -> u64 {
        let runs = |job: &JobId| self.cluster.jobs().get(*job).is_some_and(|job| !job.state.is_terminal());
        self.progress.iter().filter(|(job, _)| runs(job)).map(|(_, progress)| progress.skipped).sum()
    }

    pub fn slow_ranks(&self) -> usize {
        self.stragglers.count()
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
            Input::Load { session, id, load } => self.take_load(&mut step, session, (id, load)),
            Input::Demand { session, demands } => self.take_demand(session, demands),
            Input::Swept { session, sweep } => self.take_sweep(&mut step, session, sweep),
            Input::Surveyed { session, rtt_us, survey, found } => self.take_surveyed(session, rtt_us, (survey, found)),
            Input::Heartbeat { session, heartbeat } => {
                self.replan |= self.liveness.heard(self.now.mono, session, Some(heartbeat));
            }
            // A plan has other reasons to wait when a node is silent.
            Input::Closed { session } => self.replan |= self.liveness.close(session).is_some(),
            Input::SignRank { ticket, session, id } => self.sign_rank(&mut step, ticket, session, id),
            Input::RenewNode { ticket, session } => self.renew_node(&mut step, ticket, session),
            Input::Request { ticket, caller, request, secret_hash } => {
                self.request(&mut step, ticket, &caller, (request, secret_hash));
            }
            Input::Join { ticket, token, secret_hash, wants } => {
                self.join(&mut step, ticket, (token, secret_hash), wants)
            }
            Input::Dropped { ticket } => {
                self.surveys.forget(ticket);
                self.cancels.values_mut().for_each(|waiting| waiting.retain(|other| *other != ticket));
            }
            Input::Storage { low } => self.storage_low = low,
            Input::Tick => self.tick(&mut step),
        }
        self.cut_models(&mut step);
        self.place(&mut step);
        self.tell_routes(&mut step);
        step
    }

    /// Journals an event and applies it, if it changes anything.
    pub(super) fn commit(&mut self, step: &mut Step, event: Event) -> Result<(), Refused> {
        self.cluster.check(self.now.wall, &event)?;
        let record = Record { at: self.now.wall, event };
        let orders = self.cluster.apply(&record);
        self.happenings.hear(&self.cluster, &record, &orders);
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
                Order::Send { node, mut message } => {
                    if let ToNode::Stop { id, grace_ms, .. } = &mut message {
                        // Commands have a grace of their own.
                        let job = self.cluster.jobs().get(id.job);
                        *grace_ms = job.map_or(*grace_ms, |job| job.stop_grace_ms(*grace_ms));
                    }
                    if let Some(session) = self.liveness.session(node) {
                        step.effects.push(Effect::Send { session, message });
                    }
                }
                Order::Changed { job } => {
                    self.answer_cancels(step, job);
                    if self.cluster.jobs().get(job).is_none_or(|job| job.state.is_terminal()) {
                        self.waits.remove(&job);
                    }
                    self.surveys.note(job, self.cluster.jobs().get(job));
                    step.effects.push(Effect::Changed { job });
                    self.reroute |= self.cluster.jobs().get(job).is_none_or(|job| job.serves.is_some());
                }
            }
        }
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

pub(super) fn stale_words(node: NodeId, stale: &Stale) -> String {
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
