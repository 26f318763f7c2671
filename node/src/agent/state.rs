//! What an agent decides: which ranks run here, what they and the coordinator are told. Pure: no clock, socket, process or file.
//!
//! | rank       | on                           | becomes    | and                                        |
//! | ---        | ---                          | ---        | ---                                        |
//! | (absent)   | Start that fits              | Starting   | spawn                                      |
//! | (absent)   | the same, with a program     | Fetching   | fetch it                                   |
//! | Fetching   | it is there                  | Starting   | spawn                                      |
//! | Fetching   | it cannot be had, or Stop    | (absent)   | report Exited(NotStarted)                  |
//! | (absent)   | Start that does not fit      | (absent)   | report Exited(NotStarted)                  |
//! | (absent)   | Inherited, before all else   | Up         | told to the coordinator as alive           |
//! | Up         | Hello of the process         | Signing    | its agent before was gone too early        |
//! | Starting   | Hello of the process         | Signing    | ask for a certificate                      |
//! | Signing    | certificate                  | Up         | pass it on                                 |
//! | Up         | Renew of the process         | Up         | ask for a certificate, and pass it on      |
//! | any alive  | Stop, or the process hangs up| Stopping   | tell it, kill after the grace              |
//! | any alive  | nothing heard of it for long | Stopping   | report Failed, kill                        |
//! | any alive  | process gone                 | (absent)   | report Exited, remember the end            |
//!
//! A1 (I1): frames of a coordinator of a lower epoch, or with a shorter journal, than was seen are never obeyed.
//! A2 (I3): a rank id is started at most once here; a generation that is lower than one that was started is never started.
//! A3 (I13): the claims of the ranks that are alive never exceed the machine's capacity.
//! A4: the last report of a rank is Exited, once; before it, Ready and Failed at most once each.
//!     Over several lives of the agent they may come twice: what the coordinator has not acknowledged is said again.
//! A5: everything that the coordinator says may come twice.
//! A6: a rank's process is its own from the start to the report of its end, whichever agent asks: one that is inherited is not started again
//!     and not called gone, and one whose end was acknowledged is forgotten.

mod admission;
mod fetching;
mod said;

use std::collections::{BTreeMap, VecDeque};

use stoke_protocol::ids::{ClusterId, Generation, Incarnation, JobId, LogIndex, NodeId, Step};
use stoke_protocol::message::node::{Capacity, FromNode, GatewayAt, NodeHello, RankInventory, ToNode};
use stoke_protocol::message::rank::{Exit, FromRank, Progress, RankEvent, RankId, StartRank, ToRank};
use stoke_protocol::message::serve::Routes;
use stoke_protocol::message::split::{Survey, Surveyed};
use stoke_protocol::spec::{Artifact, GRACE_MAX};

use self::said::Said;
use super::claim::Claim;
use super::fence::{Fence, Fences};
use super::outbox::{Outbox, Taken, shortened};
use super::sweeps::{Sweep, Sweeps};
use crate::artifact::Fetched;

/// Ends that are remembered, so that a late Start or Stop of one is answered and not obeyed.
const ENDS_MAX: usize = 1024;
/// A process that hung up has this long to go by itself: time for a panic's message to be written.
const HANG_UP_GRACE_MS: u64 = 5_000;
/// A grace that the coordinator may ask for: that of a command, and a moment more. A longer one would keep a slot for nothing.
const GRACE_MS_MAX: u64 = GRACE_MAX.0 + 10_000;

/// Who and what this agent is; fixed for its life.
#[derive(Clone, Debug)]
pub struct Own {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub name: String,
    pub incarnation: Incarnation,
    pub capacity: Capacity,
    /// Where this node's gateway takes requests, if it has one.
    pub gateway: Option<GatewayAt>,
}

#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// An agent before this one has started the rank, and its process may live. Comes before any session (A6).
    Inherited { id: RankId, claim: Claim },
    /// A frame of the session.
    Coordinator(ToNode),
    /// The session is gone.
    Disconnected,
    /// There was no session, and the coordinator could not be reached.
    Unreached,
    /// A frame of a rank's process.
    Rank { id: RankId, frame: FromRank },
    /// The answer to [`Effect::Sign`].
    Signed { id: RankId, answer: Signed },
    /// The answer to [`Effect::Fetch`].
    Fetched { id: RankId, fetched: Fetched },
    /// [`Effect::Spawn`] failed.
    NotStarted { id: RankId, error: String },
    /// The process closed its link.
    HungUp { id: RankId },
    /// The process has said nothing for so long: it is stopped, or hangs.
    Silent { id: RankId, for_ms: u64 },
    /// The process is gone, and everything that it said was taken in.
    Exited { id: RankId, exit: Exit },
    /// The agent is to end.
    ShutDown { grace_ms: u64 },
    /// [`Effect::Sweep`] is done, or failed.
    Swept { job: JobId, index: LogIndex, removed: u32, error: Option<String> },
    /// [`Effect::Survey`] is done, or failed.
    Surveyed { survey: Survey, found: Result<Surveyed, String> },
    /// [`Effect::Note`] is done, or failed.
    Noted { fence: Option<Fence> },
}

/// What became of a signing request.
#[derive(Clone, PartialEq, Debug)]
pub enum Signed {
    Certificate {
        certificate: Vec<u8>,
        authority: Vec<u8>,
    },
    Refused {
        reason: String,
    },
    /// No answer; asked again.
    Lost,
}

/// In order: an effect is done before the next one begins.
#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    /// Make the fence durable; nothing after it is done if that fails.
    Persist(Fence),
    /// Make the fence durable off this thread; answered by [`Event::Noted`]. One at a time.
    Note(Fence),
    /// To the coordinator, on the session's control stream.
    Send(FromNode),
    /// The coordinator is not one to obey (A1).
    Disconnect {
        reason: String,
    },
    /// Have the program of a rank from the coordinator; answered by [`Event::Fetched`].
    Fetch {
        id: RankId,
        artifact: Artifact,
    },
    Spawn(StartRank),
    ToRank {
        id: RankId,
        frame: ToRank,
    },
    /// Ask the coordinator for the artifact that a rank needs, and then for its certificate.
    Sign {
        id: RankId,
        csr: Vec<u8>,
        artifact: Option<Artifact>,
    },
    /// Kill the rank's processes after so long, if they are still there.
    KillAfter {
        id: RankId,
        grace_ms: u64,
    },
    /// Nobody asks for the rank any more: its record may go.
    Forget {
        id: RankId,
    },
    /// Remove the folders of a job's old checkpoints, off this thread; answered by [`Event::Swept`]. One at a time.
    Sweep {
        job: JobId,
        sweep: Sweep,
    },
    /// For the gateway.
    Routes(Routes),
    /// Look at a model's files, off this thread; answered by [`Event::Surveyed`].
    Survey(Survey),
    /// For the log: a person should know.
    Warn(String),
    /// The last rank is gone after [`Event::ShutDown`].
    AllGone,
}

#[derive(Debug)]
pub struct AgentState {
    own: Own,
    fences: Fences,
    /// Hellos so far.
    sessions: u64,
    connected: bool,
    /// Known to be away: a session was lost, or could not be had. Of neither, an agent that has just begun knows nothing.
    away: bool,
    shutting_down: bool,
    ranks: BTreeMap<RankId, Entry>,
    ends: VecDeque<(RankId, Exit)>,
    /// The highest generation that was started, of each job with a rank or an end here (A2).
    generations: BTreeMap<JobId, Generation>,
    outbox: Outbox,
    sweeps: Sweeps,
}

#[derive(Debug)]
struct Entry {
    phase: Phase,
    claim: Claim,
    progress: Option<Progress>,
    /// The number of the last event that it has said.
    heard: u64,
    /// Which of the reports that come once were made (A4).
    said: Said,
}

#[derive(Debug, PartialEq)]
enum Phase {
    Fetching { start: Box<StartRank>, artifact: Artifact },
    Starting,
    Signing { csr: Vec<u8>, artifact: Option<Artifact> },
    Up,
    Stopping,
}

impl AgentState {
    pub fn new(own: Own, fence: Fence) -> Self {
        Self {
            own,
            fences: Fences::new(fence),
            sessions: 0,
            connected: false,
            away: false,
            shutting_down: false,
            ranks: BTreeMap::new(),
            ends: VecDeque::new(),
            generations: BTreeMap::new(),
            outbox: Outbox::default(),
            sweeps: Sweeps::default(),
        }
    }

    /// The first frame of a session.
    pub fn hello(&mut self) -> NodeHello {
        self.sessions += 1;
        let alive = self.ranks.iter().map(|(id, rank)| RankInventory {
            id: *id,
            alive: true,
            step: rank.progress.map_or(Step(0), |progress| progress.step),
        });
        let gone = self.outbox.ends().map(|id| RankInventory { id, alive: false, step: Step(0) });
        NodeHello {
            cluster: self.own.cluster,
            node: self.own.node,
            name: self.own.name.clone(),
            incarnation: self.own.incarnation,
            session: self.sessions,
            epoch_seen: self.fences.seen().epoch,
            index_seen: self.fences.seen().index,
            capacity: self.own.capacity.clone(),
            gateway: self.own.gateway,
            ranks: alive.chain(gone).collect(),
        }
    }

    pub fn fence(&self) -> Fence {
        self.fences.seen()
    }

    /// [`Effect::Persist`] is done.
    pub fn persisted(&mut self, fence: Fence) {
        self.fences.persisted(fence);
    }

    /// Whether the coordinator has acknowledged everything.
    pub fn is_flushed(&self) -> bool {
        self.outbox.is_empty()
    }

    /// Ranks whose processes are here, for the simulator's checks.
    pub fn alive(&self) -> impl Iterator<Item = RankId> {
        self.ranks.keys().copied()
    }

    pub fn apply(&mut self, event: Event) -> Vec<Effect> {
        let mut out = Vec::new();
        match event {
            Event::Inherited { id, claim } => self.inherit(id, claim),
            Event::Coordinator(frame) => self.coordinator(frame, &mut out),
            Event::Disconnected => {
                self.outbox.rewind();
                if std::mem::take(&mut self.connected) {
                    self.away = true;
                    self.tell_ranks(&mut out);
                }
            }
            Event::Unreached => {
                if !self.connected && !std::mem::replace(&mut self.away, true) {
                    self.tell_ranks(&mut out);
                }
            }
            Event::Rank { id, frame } => self.rank(id, frame, &mut out),
            Event::Fetched { id, fetched } => self.fetched(id, fetched, &mut out),
            Event::Signed { id, answer } => self.signed(id, answer, &mut out),
            Event::NotStarted { id, error } => self.ended(id, Exit::NotStarted(error), &mut out),
            Event::HungUp { id } => {
                if let Some(rank) = self.ranks.get_mut(&id) {
                    rank.phase = Phase::Stopping;
                    out.push(Effect::KillAfter { id, grace_ms: HANG_UP_GRACE_MS });
                }
            }
            Event::Silent { id, for_ms } => self.silent(id, for_ms, &mut out),
            Event::Exited { id, exit } => self.ended(id, exit, &mut out),
            Event::ShutDown { grace_ms } => self.shut_down(grace_ms, &mut out),
            Event::Noted { fence } => out.extend(self.fences.noted(fence).map(Effect::Note)),
            Event::Surveyed { survey, found } => {
                self.say(FromNode::Surveyed { survey, found: found.map_err(shortened) }, &mut out);
            }
            Event::Swept { job, index, removed, error } => {
                self.say(FromNode::Swept { job, index, removed, error: error.map(shortened) }, &mut out);
                out.extend(self.sweeps.ended().map(|(job, sweep)| Effect::Sweep { job, sweep }));
            }
        }
        self.flush(&mut out);
        out
    }

    fn coordinator(&mut self, frame: ToNode, out: &mut Vec<Effect>) {
        if let ToNode::Welcome { epoch, index, .. } = frame {
            return self.welcome(Fence { epoch, index }, out);
        }
        if !self.connected {
            // A1: nothing is obeyed before the epoch was compared.
            return out.push(Effect::Disconnect { reason: "the coordinator gave orders before its welcome".into() });
        }
        match frame {
            ToNode::Welcome { .. } => {}
            ToNode::Acknowledge { sequence, index } => {
                out.extend(self.fences.acknowledged(index).map(Effect::Note));
                let taken = self.outbox.acknowledge(sequence);
                self.taken(&taken, out);
            }
            ToNode::Start(start) => self.start(start, out),
            ToNode::Membership { id, membership } => self.pass_on(id, ToRank::Membership(membership), out),
            ToNode::Commit { id, generation, step, shards } => {
                self.pass_on(id, ToRank::Commit { generation, step, shards }, out);
            }
            ToNode::Committed { id, step, keep } => self.pass_on(id, ToRank::Committed { step, keep }, out),
            ToNode::Rollouts { id, rollouts } => self.pass_on(id, ToRank::Rollouts { rollouts }, out),
            ToNode::Abandon { id, generation, step } => self.pass_on(id, ToRank::Abandon { generation, step }, out),
            ToNode::Release { id } => self.pass_on(id, ToRank::Release, out),
            ToNode::Stop { id, reason, grace_ms } => self.stop(id, reason, grace_ms, out),
            ToNode::Sweep { job, index, checkpoints, newest, keep } => {
                let begun = self.sweeps.order(job, Sweep { index, checkpoints, newest, keep: keep.0 });
                out.extend(begun.map(|(job, sweep)| Effect::Sweep { job, sweep }));
            }
            ToNode::Routes(routes) => out.push(Effect::Routes(routes)),
            ToNode::Survey(survey) => out.push(Effect::Survey(survey)),
        }
    }

    fn welcome(&mut self, theirs: Fence, out: &mut Vec<Effect>) {
        match self.fences.meet(theirs) {
            Ok(fence) => out.extend(fence.map(Effect::Persist)),
            Err(reason) => return out.push(Effect::Disconnect { reason }),
        }
        (self.connected, self.away) = (true, false);
        self.outbox.rewind();
        self.tell_ranks(out);
        for (id, rank) in &self.ranks {
            match &rank.phase {
                Phase::Fetching { artifact, .. } => out.push(Effect::Fetch { id: *id, artifact: *artifact }),
                Phase::Signing { csr, artifact } => {
                    out.push(Effect::Sign { id: *id, csr: csr.clone(), artifact: *artifact });
                }
                Phase::Starting | Phase::Up | Phase::Stopping => {}
            }
            if let Some(progress) = rank.progress {
                out.push(Effect::Send(FromNode::Progress { id: *id, progress }));
            }
        }
    }

    fn inherit(&mut self, id: RankId, claim: Claim) {
        let newest = self.generations.entry(id.job).or_default();
        *newest = id.generation.max(*newest);
        self.ranks.insert(id, Entry::new(Phase::Up, claim));
    }

    /// The coordinator has it: ranks need not say it again, and records of those that are gone may go (A6).
    fn taken(&self, taken: &[Taken], out: &mut Vec<Effect>) {
        let mut said: BTreeMap<RankId, u64> = BTreeMap::new();
        for Taken { id, said: number, ended } in taken {
            let highest = said.entry(*id).or_default();
            *highest = (*highest).max(*number);
            if *ended {
                out.push(Effect::Forget { id: *id });
            }
        }
        for (id, said) in said.into_iter().filter(|(id, said)| *said > 0 && self.ranks.contains_key(id)) {
            out.push(Effect::ToRank { id, frame: ToRank::Taken { said } });
        }
    }

    fn start(&mut self, start: StartRank, out: &mut Vec<Effect>) {
        let id = start.id;
        if self.ranks.contains_key(&id) {
            return;
        }
        if let Some((_, exit)) = self.ends.iter().find(|(ended, _)| *ended == id) {
            // A2. The coordinator may have missed the end; telling it twice does no harm.
            let exit = exit.clone();
            return self.report_end(id, exit, out);
        }
        let (claim, program) = match self.admit(&start) {
            Ok(admitted) => admitted,
            Err(reason) => return self.gone(id, Exit::NotStarted(reason), out),
        };
        self.generations.insert(id.job, id.generation);
        let (phase, effect) = match program {
            Some(artifact) => (Phase::Fetching { start: Box::new(start), artifact }, Effect::Fetch { id, artifact }),
            None => (Phase::Starting, Effect::Spawn(start)),
        };
        self.ranks.insert(id, Entry::new(phase, claim));
        out.push(effect);
    }

    fn pass_on(&mut self, id: RankId, frame: ToRank, out: &mut Vec<Effect>) {
        if self.ranks.get(&id).is_some_and(|rank| rank.phase == Phase::Up) {
            out.push(Effect::ToRank { id, frame });
        }
    }

    /// Ranks wait for the coordinator's word only while it can reach them.
    fn tell_ranks(&self, out: &mut Vec<Effect>) {
        let frame = ToRank::Coordinator { reachable: self.connected };
        let up = self.ranks.iter().filter(|(_, rank)| rank.phase == Phase::Up);
        out.extend(up.map(|(id, _)| Effect::ToRank { id: *id, frame: frame.clone() }));
    }

    fn stop(&mut self, id: RankId, reason: String, grace_ms: u64, out: &mut Vec<Effect>) {
        if self.stopped_before_start(id, out) {
            return;
        }
        let Some(rank) = self.ranks.get_mut(&id) else {
            if self.outbox.ends().any(|ended| ended == id) {
                return;
            }
            return match self.ends.iter().find(|(ended, _)| *ended == id).map(|(_, exit)| exit.clone()) {
                Some(exit) => self.report_end(id, exit, out),
                None => self.gone(id, Exit::NotStarted("stopped before it was started".into()), out),
            };
        };
        if rank.phase != Phase::Stopping {
            rank.phase = Phase::Stopping;
            out.push(Effect::ToRank { id, frame: ToRank::Stop { reason } });
        }
        out.push(Effect::KillAfter { id, grace_ms: grace_ms.min(GRACE_MS_MAX) });
    }

    fn rank(&mut self, id: RankId, frame: FromRank, out: &mut Vec<Effect>) {
        let Some(rank) = self.ranks.get_mut(&id) else { return };
        match frame {
            FromRank::Hello { csr, artifact } => {
                // A rank says it until it has its certificate.
                if matches!(rank.phase, Phase::Starting | Phase::Up) {
                    rank.phase = Phase::Signing { csr: csr.0.clone(), artifact };
                    if self.connected {
                        out.push(Effect::Sign { id, csr: csr.0, artifact });
                    }
                }
            }
            FromRank::Renew { csr } => {
                // Without an answer a rank says it again.
                if rank.phase == Phase::Up && self.connected {
                    out.push(Effect::Sign { id, csr: csr.0, artifact: None });
                }
            }
            FromRank::Alive | FromRank::Leaving { .. } => {}
            FromRank::Return { next, .. } => {
                rank.heard = next.saturating_sub(1);
                // What the agent before this one has told it may be old; until this one knows better, it holds.
                if rank.phase == Phase::Up && (self.connected || self.away) {
                    out.push(Effect::ToRank { id, frame: ToRank::Coordinator { reachable: self.connected } });
                }
            }
            FromRank::Progress(progress) => {
                rank.progress = Some(progress);
                self.say(FromNode::Progress { id, progress }, out);
            }
            FromRank::Load(load) => self.say(FromNode::Load { id, load }, out),
            FromRank::Timed(steps) => self.say(FromNode::Timed { id, steps }, out),
            FromRank::Event(event) => {
                rank.heard += 1;
                let heard = rank.heard;
                if let Some(event) = rank.said.once(event) {
                    self.report(id, event, heard, out);
                }
            }
        }
    }

    /// What nobody misses without a session: it is asked for again, or the next one tells more.
    fn say(&self, message: FromNode, out: &mut Vec<Effect>) {
        if self.connected {
            out.push(Effect::Send(message));
        }
    }

    fn signed(&mut self, id: RankId, answer: Signed, out: &mut Vec<Effect>) {
        let Some(rank) = self.ranks.get_mut(&id) else { return };
        match (&rank.phase, answer) {
            (Phase::Signing { .. } | Phase::Up, Signed::Certificate { certificate, authority }) => {
                let renewed = rank.phase == Phase::Up;
                rank.phase = Phase::Up;
                let frame = ToRank::Certificate { certificate: certificate.into(), authority: authority.into() };
                out.push(Effect::ToRank { id, frame });
                if !self.connected && !renewed {
                    out.push(Effect::ToRank { id, frame: ToRank::Coordinator { reachable: false } });
                }
            }
            (Phase::Signing { csr, artifact }, Signed::Lost) if self.connected => {
                out.push(Effect::Sign { id, csr: csr.clone(), artifact: *artifact });
            }
            (Phase::Signing { .. }, Signed::Refused { reason }) => {
                rank.phase = Phase::Stopping;
                let error = format!("the coordinator refused a certificate: {reason}");
                if let Some(failed) = rank.said.once(RankEvent::Failed { error: error.clone(), permanent: false }) {
                    self.report(id, failed, 0, out);
                }
                out.push(Effect::ToRank { id, frame: ToRank::Stop { reason: error } });
                out.push(Effect::KillAfter { id, grace_ms: HANG_UP_GRACE_MS });
            }
            // A renewal: the rank goes on with the certificate that it has, and asks again.
            _ => {}
        }
    }

    /// The others are told before the process is gone: it may take a while to die.
    fn silent(&mut self, id: RankId, for_ms: u64, out: &mut Vec<Effect>) {
        let Some(rank) = self.ranks.get_mut(&id).filter(|rank| rank.phase != Phase::Stopping) else { return };
        rank.phase = Phase::Stopping;
        let error = format!("its process said nothing for {for_ms} ms: it is stopped or hangs, and is killed");
        if let Some(failed) = rank.said.once(RankEvent::Failed { error, permanent: false }) {
            self.report(id, failed, 0, out);
        }
        out.push(Effect::KillAfter { id, grace_ms: 0 });
    }

    fn shut_down(&mut self, grace_ms: u64, out: &mut Vec<Effect>) {
        self.shutting_down = true;
        let ids: Vec<RankId> = self.ranks.keys().copied().collect();
        for id in ids {
            self.stop(id, "the agent of its machine is going down".into(), grace_ms, out);
        }
        if self.ranks.is_empty() && !out.contains(&Effect::AllGone) {
            out.push(Effect::AllGone);
        }
    }

    /// The process of a rank is gone.
    fn ended(&mut self, id: RankId, exit: Exit, out: &mut Vec<Effect>) {
        if let Some(rank) = self.ranks.remove(&id) {
            // It was not the rank's fault, nor the job's.
            let exit = if self.shutting_down && rank.phase == Phase::Stopping { Exit::AgentStopped } else { exit };
            self.gone(id, exit, out);
        }
    }

    /// Remembers an end and reports it, also of a rank that never had a process.
    fn gone(&mut self, id: RankId, exit: Exit, out: &mut Vec<Effect>) {
        self.ends.push_back((id, exit.clone()));
        if self.ends.len() > ENDS_MAX {
            self.ends.pop_front();
            let (ranks, ends) = (&self.ranks, &self.ends);
            let known = |job: JobId| ranks.keys().any(|id| id.job == job) || ends.iter().any(|(id, _)| id.job == job);
            self.generations.retain(|job, _| known(*job));
        }
        self.report_end(id, exit, out);
        if self.shutting_down && self.ranks.is_empty() {
            out.push(Effect::AllGone);
        }
    }

    fn report_end(&mut self, id: RankId, exit: Exit, out: &mut Vec<Effect>) {
        self.report(id, RankEvent::Exited { exit }, 0, out);
    }

    /// `said`: see [`Outbox::push`].
    fn report(&mut self, id: RankId, event: RankEvent, said: u64, out: &mut Vec<Effect>) {
        if self.outbox.push(id, event, said) {
            out.push(Effect::Warn("outbox is full, the report of an old checkpoint was dropped".into()));
        }
    }

    fn flush(&mut self, out: &mut Vec<Effect>) {
        if self.connected {
            // Before AllGone, so that the last ends are on their way.
            let at = out.iter().position(|effect| *effect == Effect::AllGone).unwrap_or(out.len());
            let sends = self.outbox.take_sendable().into_iter().map(FromNode::Report).map(Effect::Send);
            out.splice(at..at, sends);
        }
    }
}

impl Entry {
    fn new(phase: Phase, claim: Claim) -> Self {
        Self { phase, claim, progress: None, heard: 0, said: Said::default() }
    }
}
