//! Machines and their agents: the real `AgentState` in a modelled shell, which carries its effects out in order as the real one does. Owns
//! when an agent dials, dies and comes back; the planted bugs of agents are here, in the shell.

use std::collections::{BTreeMap, VecDeque};

use stoke_coordinator::state::SessionId;
use stoke_node::agent::fence::{Fence, UNNOTED_MAX};
use stoke_node::agent::state::{AgentState, Effect, Event, Own, Signed};
use stoke_node::agent::{Claim, Sweep};
use stoke_node::artifact::Fetched;
use stoke_protocol::ids::{Epoch, Incarnation, JobId, LogIndex, NodeId};
use stoke_protocol::message::node::{Capacity, FromNode, Gpu, NodeHello, ToNode};
use stoke_protocol::message::rank::{Exit, FromRank, RankId, ToRank};
use stoke_protocol::spec::JobSpec;

use super::network::Side;
use super::oracle::CLUSTER;
use super::plan::MachinePlan;
use super::planted::{AgentBug, Planted};
use super::world::{Happening, Ms, World};

/// The longest wait between two calls of an agent.
const DIAL_MS_MAX: Ms = 3_000;
/// After the last rank is gone, a stopping agent has this long to tell.
const FAREWELL_MS: Ms = 1_000;
/// An agent that has ended is started again after so long.
const SUPERVISED_MS: Ms = 2_000;
/// A signing request without an answer is given up.
const SIGN_MS_MAX: Ms = 5_000;

pub struct Machine {
    /// Given when it joins.
    pub node: Option<NodeId>,
    pub capacity: Capacity,
    /// On disk.
    incarnation: u64,
    pub fence: Fence,
    /// On disk: the ranks that were started, and what those have written down that ended without an agent.
    pub kept: BTreeMap<RankId, Claim>,
    pub last_words: BTreeMap<RankId, Vec<FromRank>>,
    /// The highest coordinator that was obeyed here, for the checks.
    pub obeyed: Fence,
    lives: u64,
    pub agent: Option<Agent>,
    pub cut_up: bool,
    pub cut_down: bool,
    pub paused: bool,
    pub deferred: Vec<Happening>,
    /// How fast its clock runs.
    rate: f64,
}

/// An agent process.
pub struct Agent {
    pub life: u64,
    pub incarnation: Incarnation,
    pub state: AgentState,
    pub session: Option<SessionId>,
    pub dialling: Option<SessionId>,
    pub failures: u32,
    /// When its session was last seen to run.
    pub awake: Ms,
    /// Reports that were sent in any session.
    sent: u64,
}

impl Machine {
    pub fn new(plan: &MachinePlan) -> Self {
        let gpu = || Gpu { name: "sim".into(), memory_bytes: 1 << 30 };
        let name = format!("m{}", plan.name);
        let capacity = Capacity {
            cpus: plan.cpus,
            memory_bytes: plan.memory_gib << 30,
            disk_bytes: 1 << 40,
            gpus: (0..plan.gpus).map(|_| gpu()).collect(),
            labels: vec![("zone".to_owned(), plan.zone.clone()), ("host".to_owned(), name)].into(),
            version: "sim".into(),
        };
        Self {
            node: None,
            capacity,
            incarnation: 0,
            fence: Fence::default(),
            kept: BTreeMap::new(),
            last_words: BTreeMap::new(),
            obeyed: Fence::default(),
            lives: 0,
            agent: None,
            cut_up: false,
            cut_down: false,
            paused: false,
            deferred: Vec::new(),
            rate: plan.rate,
        }
    }

    /// A duration by this machine's clock.
    pub fn lasts(&self, ms: Ms) -> Ms {
        ((ms as f64 * self.rate) as Ms).max(1)
    }

    pub fn is_life(&self, life: u64) -> bool {
        self.agent.as_ref().is_some_and(|agent| agent.life == life)
    }

    pub fn hello(&mut self, planted: Planted) -> Option<NodeHello> {
        let mut hello = self.agent.as_mut()?.state.hello();
        if planted == Planted::Agent(AgentBug::FenceForgotten) {
            (hello.epoch_seen, hello.index_seen) = (Epoch(0), LogIndex(0));
        }
        Some(hello)
    }
}

impl World {
    pub fn agent_boot(&mut self, machine: usize) {
        let reused = self.planted == Planted::Agent(AgentBug::IncarnationReused);
        let found = &mut self.machines[machine];
        let (Some(node), None) = (found.node, &found.agent) else { return };
        if !reused || found.incarnation == 0 {
            found.incarnation += 1;
        }
        found.lives += 1;
        // What a coordinator acknowledged last may be forgotten, and no more than that (F32).
        let remembered = found.obeyed.index.0.saturating_sub(UNNOTED_MAX - 1);
        found.obeyed.index = found.fence.index.max(LogIndex(remembered));
        let incarnation = Incarnation(found.incarnation);
        let capacity = found.capacity.clone();
        let own = Own { cluster: CLUSTER, node, name: format!("m{machine}"), incarnation, capacity, gateway: None };
        let mut state = AgentState::new(own, found.fence);
        if self.planted == Planted::Agent(AgentBug::InventoryForgotten) {
            found.kept.clear();
        }
        let kept: Vec<(RankId, Claim)> = found.kept.iter().map(|(id, claim)| (*id, *claim)).collect();
        for (id, claim) in &kept {
            state.apply(Event::Inherited { id: *id, claim: *claim });
        }
        let life = found.lives;
        let (session, dialling) = (None, None);
        found.agent =
            Some(Agent { life, incarnation, state, session, dialling, failures: 0, awake: self.now, sent: 0 });
        self.changed = true;
        self.say(|_| format!("the agent of {node} starts as {incarnation}"));
        kept.iter().for_each(|(id, _)| self.adopt(machine, life, *id));
        self.dial(machine, life);
    }

    /// Its processes go on.
    pub fn agent_crash(&mut self, machine: usize) {
        if self.machines[machine].agent.take().is_some() {
            self.say(|world| format!("the agent of {:?} dies", world.machines[machine].node));
            self.orphan(machine);
            self.changed = true;
        }
    }

    /// Its processes end with it, and nobody sees them go.
    pub fn node_crash(&mut self, machine: usize) {
        self.say(|world| format!("the machine of {:?} dies", world.machines[machine].node));
        self.machines[machine].agent = None;
        self.processes.retain(|_, process| process.machine != machine);
        self.changed = true;
    }

    pub fn agent_leave(&mut self, machine: usize, life: u64) {
        if self.machines[machine].is_life(life) {
            let session = self.machines[machine].agent.as_ref().and_then(|agent| agent.session);
            if let Some(session) = session {
                self.close(session, Side::Agent);
            }
            self.agent_crash(machine);
            self.after(SUPERVISED_MS, Happening::AgentBoot { machine });
        }
    }

    /// The attempt to reach the coordinator has failed.
    pub fn give_up(&mut self, conn: SessionId) {
        let Some(machine) = self.conns.get(&conn).map(|conn| conn.machine) else { return };
        self.close(conn, Side::Agent);
        let dialling = |agent: &&Agent| agent.dialling == Some(conn);
        if let Some(life) = self.machines[machine].agent.as_ref().filter(dialling).map(|agent| agent.life) {
            self.tell(machine, life, Event::Unreached);
            self.dial_later(machine);
        }
    }

    /// An agent's connection is gone.
    pub fn agent_lost(&mut self, conn: SessionId) {
        let Some(found) = self.conns.get(&conn) else { return };
        let (machine, life) = (found.machine, found.life);
        let Some(agent) = self.machines[machine].agent.as_mut().filter(|agent| agent.life == life) else { return };
        if agent.session == Some(conn) {
            agent.session = None;
            self.tell(machine, life, Event::Disconnected);
            self.dial_later(machine);
        } else if agent.dialling == Some(conn) {
            self.tell(machine, life, Event::Unreached);
            self.dial_later(machine);
        }
    }

    /// Its node was removed: the agent ends with its ranks, and the machine asks for a new token.
    pub fn agent_revoked(&mut self, conn: SessionId) {
        let Some((machine, life)) = self.conns.get(&conn).map(|conn| (conn.machine, conn.life)) else { return };
        if self.machines[machine].is_life(life) {
            self.node_crash(machine);
            self.machines[machine].node = None;
            self.rejoin(machine);
        }
    }

    fn dial_later(&mut self, machine: usize) {
        let Some(agent) = &mut self.machines[machine].agent else { return };
        agent.dialling = None;
        agent.failures += 1;
        let most = (100 << agent.failures.min(6)).min(DIAL_MS_MAX);
        let life = agent.life;
        let wait = self.streams.scheduler.between("dial-later", most / 2, most);
        let wait = self.machines[machine].lasts(wait);
        self.after(wait, Happening::Dial { machine, life });
    }

    /// Drives an agent's state and carries its effects out.
    pub fn tell(&mut self, machine: usize, life: u64, event: Event) {
        if !self.machines[machine].is_life(life) {
            return;
        }
        self.say(|_| format!("  agent {machine} hears {}", short(&event)));
        let event = self.before_state(machine, life, event);
        self.coverage.note("agent event", &event);
        let agent = self.machines[machine].agent.as_mut().expect("its life was checked");
        let welcome = match &event {
            Event::Coordinator(ToNode::Welcome { epoch, index, .. }) => Some(Fence { epoch: *epoch, index: *index }),
            _ => None,
        };
        let mut effects: VecDeque<Effect> = agent.state.apply(event).into();
        if let Some(fence) = welcome {
            let refused = effects.iter().any(|effect| matches!(effect, Effect::Disconnect { .. }));
            if !refused {
                self.oracle.obeyed(machine, self.machines[machine].obeyed, fence);
                self.machines[machine].obeyed = fence;
                self.changed = true;
            }
        }
        let fence = self.machines[machine].agent.as_ref().map(|agent| agent.state.fence()).unwrap_or_default();
        let obeyed = &mut self.machines[machine].obeyed;
        (obeyed.epoch, obeyed.index) = (obeyed.epoch.max(fence.epoch), obeyed.index.max(fence.index));
        while let Some(effect) = effects.pop_front() {
            if let Some(more) = self.carry(machine, life, effect) {
                self.coverage.note("agent event", &more);
                let agent = self.machines[machine].agent.as_mut().expect("its life was checked");
                effects.extend(agent.state.apply(more));
            }
        }
    }

    /// Planted bugs that stand before the state.
    fn before_state(&mut self, machine: usize, life: u64, event: Event) -> Event {
        match (self.planted, event) {
            (
                Planted::Agent(AgentBug::FenceForgotten),
                Event::Coordinator(ToNode::Welcome { epoch, index, heartbeat_ms, lease_ms }),
            ) => {
                self.oracle.obeyed(machine, self.machines[machine].obeyed, Fence { epoch, index });
                let fence = self.machines[machine].agent.as_ref().map(|agent| agent.state.fence()).unwrap_or_default();
                let (epoch, index) = (epoch.max(fence.epoch), index.max(fence.index));
                Event::Coordinator(ToNode::Welcome { epoch, index, heartbeat_ms, lease_ms })
            }
            (Planted::Agent(AgentBug::StartedTwice), Event::Coordinator(ToNode::Start(start))) => {
                let twice = self.processes.values().any(|process| process.machine == machine && process.id == start.id);
                if twice {
                    self.spawn(machine, life, start.clone());
                }
                Event::Coordinator(ToNode::Start(start))
            }
            (_, event) => event,
        }
    }

    /// Gives what the state is to be told next, if the effect is answered at once or has failed.
    fn carry(&mut self, machine: usize, life: u64, effect: Effect) -> Option<Event> {
        let planted = self.planted;
        self.coverage.note("agent effect", &effect);
        let node = self.machines[machine].node;
        match effect {
            Effect::Persist(fence) => {
                self.machines[machine].fence = fence;
                self.machines[machine].agent.as_mut()?.state.persisted(fence);
            }
            Effect::Note(fence) => {
                self.machines[machine].fence = fence;
                return Some(Event::Noted { fence: Some(fence) });
            }
            Effect::Send(frame) => self.send_report(machine, frame),
            Effect::Disconnect { reason } => {
                self.say(|_| format!("{node:?} does not obey: {reason}"));
                let session = self.machines[machine].agent.as_mut()?.session.take();
                if let Some(session) = session {
                    self.close(session, Side::Agent);
                    self.dial_later(machine);
                }
                return Some(Event::Disconnected);
            }
            Effect::Spawn(start) => {
                let rates = self.rates;
                if self.streams.ranks.chance("spawn-fails", rates.spawn_fails) {
                    return Some(Event::NotStarted { id: start.id, error: "out of processes".into() });
                }
                let claim = JobSpec::parse(&start.spec).map(|spec| Claim::of(&spec, &start)).unwrap_or_default();
                self.machines[machine].kept.insert(start.id, claim);
                self.spawn(machine, life, start);
            }
            // No job here has a program of its own.
            Effect::Fetch { id, .. } => return Some(Event::Fetched { id, fetched: Fetched::There }),
            Effect::Forget { id } => {
                self.machines[machine].kept.remove(&id);
                self.machines[machine].last_words.remove(&id);
            }
            Effect::ToRank { id, frame } => {
                if let (Planted::Agent(bug), ToRank::Stop { .. }) = (planted, &frame) {
                    match bug {
                        AgentBug::StopIgnored => return None,
                        AgentBug::ExitReportedEarly => return Some(Event::Exited { id, exit: Exit::Code(0) }),
                        _ => {}
                    }
                }
                self.pass_to_rank(machine, life, id, frame);
            }
            Effect::Sign { id, .. } => self.sign(machine, life, id),
            Effect::KillAfter { id, grace_ms } => {
                if planted != Planted::Agent(AgentBug::StopIgnored) {
                    let wait = self.machines[machine].lasts(grace_ms);
                    self.after(wait, Happening::KillDue { machine, life, id });
                }
            }
            Effect::Sweep { job, sweep } => {
                // Some take long: what is committed or pinned meanwhile must outlast them.
                let wait = self.streams.ranks.between("sweep", 1, 3_000);
                self.after(wait, Happening::Sweep { machine, life, sweep: Box::new((job, sweep)) });
            }
            // No job of the simulation serves.
            Effect::Survey(_) => {}
            // No gateway is modelled.
            Effect::Routes(_) => {}
            Effect::Warn(text) => self.say(|_| format!("{node:?} warns: {text}")),
            Effect::AllGone => self.after(FAREWELL_MS, Happening::AgentLeave { machine, life }),
        }
        None
    }

    fn send_report(&mut self, machine: usize, frame: FromNode) {
        let forgets = self.planted == Planted::Agent(AgentBug::ReportsNotResent);
        let Some(agent) = &mut self.machines[machine].agent else { return };
        let Some(session) = agent.session else { return };
        if let FromNode::Report(report) = &frame {
            if forgets && report.sequence <= agent.sent {
                return;
            }
            agent.sent = agent.sent.max(report.sequence);
        }
        self.send_up(session, frame);
    }

    /// A signing request has a stream of its own: it overtakes and is overtaken.
    fn sign(&mut self, machine: usize, life: u64, id: RankId) {
        let session = self.machines[machine].agent.as_ref().and_then(|agent| agent.session);
        let answer = Signed::Lost;
        let lost = Happening::SignAnswered { machine, life, id, answer };
        match session {
            Some(conn) if !self.machines[machine].cut_up => {
                let trip = self.delay(machine);
                self.after(trip, Happening::SignAsked { conn, id });
                // In case that no answer comes; the state takes in only one.
                self.after(SIGN_MS_MAX, lost);
            }
            Some(_) | None => self.after(SIGN_MS_MAX, lost),
        }
    }

    pub fn sweep(&mut self, machine: usize, life: u64, (job, sweep): (JobId, Sweep)) {
        if !self.machines[machine].is_life(life) {
            return;
        }
        let denied = self.streams.ranks.between("sweep denied", 0, 9) == 0;
        if !denied {
            self.store.sweep(job, sweep.newest, &sweep.keep);
            self.changed = true;
        }
        let error = denied.then(|| "access denied".to_owned());
        self.tell(machine, life, Event::Swept { job, index: sweep.index, removed: 0, error });
    }

    pub fn kill_due(&mut self, machine: usize, life: u64, id: RankId) {
        if self.machines[machine].is_life(life) {
            self.end_processes(machine, id, Exit::Signal(9));
        }
    }
}

fn short(event: &Event) -> String {
    let mut text = format!("{event:?}");
    if let Some((at, _)) = text.char_indices().nth(180) {
        text.truncate(at);
    }
    text
}
