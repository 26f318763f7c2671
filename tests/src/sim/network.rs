//! The network between agents and the coordinator: connections as QUIC gives them. Frames of one connection arrive in order, late when packets
//! are lost; what a partition holds up arrives when it heals, if both ends still hold the connection; a connection that breaks takes what is
//! on the way with it, or not: packets that were sent may still arrive. Each end finds out by itself.

use std::collections::VecDeque;

use stoke_coordinator::state::pruning::Sweep;
use stoke_coordinator::state::{Input, SessionId};
use stoke_node::agent::state::Event as AgentEvent;
use stoke_protocol::ids::LogIndex;
use stoke_protocol::message::node::{FromNode, Heartbeat, Heat, ToNode};

use super::faults::Fault;
use super::world::{Happening, Ms, World};

/// An end that hears nothing for so long gives the connection up.
const IDLE_MS: Ms = 5_000;
/// Keep-alives are so far apart.
const KEEP_ALIVE_MS: Ms = 1_000;
/// A frame that a partition holds up is tried again so often.
const RETRY_MS: Ms = 250;
/// The coordinator's first frame is waited for so long.
const WELCOME_MS_MAX: Ms = 5_000;

/// An end of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Agent,
    Coordinator,
}

pub struct Conn {
    pub machine: usize,
    /// Of the agent.
    pub life: u64,
    /// Of the coordinator that answered.
    pub coordinator: u64,
    pub agent: End,
    pub server: End,
    pub up: Pipe<FromNode>,
    pub down: Pipe<ToNode>,
    pub beats: u64,
    /// The coordinator has closed it because the node was removed.
    pub revoked: bool,
}

pub struct End {
    pub open: bool,
    pub heard: Ms,
}

/// One direction of a control stream.
pub struct Pipe<T> {
    frames: VecDeque<(Ms, T)>,
    last: Ms,
}

impl<T> Pipe<T> {
    fn new() -> Self {
        Self { frames: VecDeque::new(), last: 0 }
    }
}

impl World {
    /// How long a packet takes on a machine's link, retransmissions included.
    pub fn delay(&mut self, machine: usize) -> Ms {
        let rates = self.rates;
        let link = &mut self.streams.links[machine];
        let mut delay = link.between("trip", 1, 20);
        if link.chance("loss", rates.loss) {
            delay += link.between("resent", 50, 600);
        }
        if link.chance("tail", rates.tail) {
            delay += link.between("tail-trip", 0, rates.tail_ms);
        }
        delay
    }

    fn is_cut(&self, machine: usize, to: Side) -> bool {
        match to {
            Side::Coordinator => self.machines[machine].cut_up,
            Side::Agent => self.machines[machine].cut_down,
        }
    }

    /// An agent calls the coordinator.
    pub fn dial(&mut self, machine: usize, life: u64) {
        if !self.machines[machine].is_life(life) {
            return;
        }
        self.conns_made += 1;
        let conn = SessionId(self.conns_made);
        let end = || End { open: true, heard: 0 };
        let (agent, server) = (end(), End { open: false, heard: 0 });
        let (up, down) = (Pipe::new(), Pipe::new());
        self.conns
            .insert(conn, Conn { machine, life, coordinator: 0, agent, server, up, down, beats: 0, revoked: false });
        if let Some(agent) = &mut self.machines[machine].agent {
            agent.dialling = Some(conn);
        }
        let trip = self.delay(machine) + self.delay(machine);
        self.after(trip, Happening::Handshake { conn });
        self.after(WELCOME_MS_MAX, Happening::WelcomeLate { conn });
    }

    /// The agent's end of a new connection stands, if the coordinator can be reached.
    pub fn handshake(&mut self, conn: SessionId) {
        let now = self.now;
        let Some(found) = self.conns.get(&conn) else { return };
        let machine = found.machine;
        let dialling = self.machines[machine].agent.as_ref().is_some_and(|agent| agent.dialling == Some(conn));
        if self.paused && dialling {
            return self.after(RETRY_MS, Happening::Handshake { conn });
        }
        let reachable = !self.is_cut(machine, Side::Agent) && !self.is_cut(machine, Side::Coordinator);
        let life = self.coordinator.as_ref().map(|coordinator| coordinator.life);
        let (Some(life), true, true) = (life, reachable, dialling) else {
            return self.give_up(conn);
        };
        let Some(hello) = self.machines[machine].hello(self.planted) else { return };
        let found = self.conns.get_mut(&conn).expect("found above");
        found.coordinator = life;
        (found.agent.heard, found.server.heard, found.server.open) = (now, now, true);
        self.say(|_| format!("{} dials {conn:?}: {} ranks, {}", hello.node, hello.ranks.len(), hello.incarnation));
        self.flap(conn, machine);
        self.send_up(conn, FromNode::Hello(hello));
        for of in [Side::Agent, Side::Coordinator] {
            self.after(KEEP_ALIVE_MS, Happening::Check { conn, of });
        }
    }

    /// The first packets of a connection are late, and meanwhile its agent dies or gives it up without a word: what it has said on the next
    /// connection may be there first.
    fn flap(&mut self, conn: SessionId, machine: usize) {
        let (now, rates) = (self.now, self.rates);
        let link = &mut self.streams.links[machine];
        if !link.chance("flap", rates.flap) {
            return;
        }
        let (late, gone, crash) =
            (link.between("flap-late", 200, 5_000), link.between("flap-gone", 5, 100), link.chance("flap-crash", 0.3));
        let found = self.conns.get_mut(&conn).expect("it was just made");
        found.up.last = now + late;
        if crash {
            self.after(gone, Happening::Heal { fault: Fault::Flap { node: machine } });
        } else {
            self.after(gone, Happening::Closed { conn, to: Side::Agent });
        }
    }

    pub fn welcome_late(&mut self, conn: SessionId) {
        let Some(found) = self.conns.get(&conn) else { return };
        let waits = self.machines[found.machine].agent.as_ref().is_some_and(|agent| agent.dialling == Some(conn));
        if waits {
            self.give_up(conn);
        }
    }

    pub fn send_up(&mut self, conn: SessionId, frame: FromNode) {
        let Some(machine) = self.conns.get(&conn).map(|conn| conn.machine) else { return };
        let due = self.now + self.delay(machine);
        let Some(found) = self.conns.get_mut(&conn).filter(|conn| conn.agent.open) else { return };
        let due = due.max(found.up.last);
        found.up.last = due;
        found.up.frames.push_back((due, frame));
        self.at(due, Happening::Frame { conn, to: Side::Coordinator });
    }

    pub fn send_down(&mut self, conn: SessionId, frame: ToNode) {
        let Some(machine) = self.conns.get(&conn).map(|conn| conn.machine) else { return };
        let due = self.now + self.delay(machine);
        let Some(found) = self.conns.get_mut(&conn).filter(|conn| conn.server.open) else { return };
        let due = due.max(found.down.last);
        found.down.last = due;
        found.down.frames.push_back((due, frame));
        self.at(due, Happening::Frame { conn, to: Side::Agent });
    }

    /// Every frame that is due is delivered, or held up by a partition.
    pub fn frame_due(&mut self, conn: SessionId, to: Side) {
        let now = self.now;
        let Some(found) = self.conns.get(&conn) else { return };
        if self.is_cut(found.machine, to) {
            // Somebody must be there to send it again.
            let sender = match to {
                Side::Coordinator => found.agent.open,
                Side::Agent => found.server.open,
            };
            if sender {
                self.after(RETRY_MS, Happening::Frame { conn, to });
            } else if let Some(found) = self.conns.get_mut(&conn) {
                match to {
                    Side::Coordinator => found.up.frames.clear(),
                    Side::Agent => found.down.frames.clear(),
                }
            }
            return;
        }
        loop {
            let life = self.coordinator_life();
            let Some(found) = self.conns.get_mut(&conn) else { return };
            match to {
                Side::Coordinator => {
                    let Some((_, frame)) = found.up.frames.pop_front_if(|(due, _)| *due <= now) else { return };
                    found.server.heard = now;
                    if found.server.open && life == Some(found.coordinator) {
                        self.frame_up(conn, frame);
                    }
                }
                Side::Agent => {
                    let Some((_, frame)) = found.down.frames.pop_front_if(|(due, _)| *due <= now) else { return };
                    found.agent.heard = now;
                    if found.agent.open {
                        self.frame_down(conn, frame);
                    }
                }
            }
        }
    }

    fn coordinator_life(&self) -> Option<u64> {
        self.coordinator.as_ref().map(|coordinator| coordinator.life)
    }

    fn frame_up(&mut self, conn: SessionId, frame: FromNode) {
        let Some(machine) = self.conns.get(&conn).map(|conn| conn.machine) else { return };
        self.coverage.note("from node", &frame);
        if let FromNode::Report(report) = &frame {
            self.coverage.note("rank event", &report.event);
        }
        let input = match frame {
            FromNode::Hello(hello) => {
                // Of the certificate with which its agent dialled: the node may have been removed since, and the machine be another one.
                let node = hello.node;
                Input::Hello { session: conn, node, address: format!("machine-{machine}"), hello }
            }
            FromNode::Report(report) => Input::Report { session: conn, report },
            FromNode::Progress { id, progress } => Input::Progress { session: conn, id, progress },
            FromNode::Load { id, load } => Input::Load { session: conn, id, load },
            FromNode::Demand(demands) => Input::Demand { session: conn, demands: demands.0 },
            FromNode::Swept { job, index, removed, error } => {
                Input::Swept { session: conn, sweep: Sweep { job, index, removed, error } }
            }
            FromNode::Surveyed { survey, found } => Input::Surveyed { session: conn, rtt_us: 1_000, survey, found },
            // For traces, of which the state knows nothing.
            FromNode::Timed { .. } => return,
        };
        self.input(input);
    }

    fn frame_down(&mut self, conn: SessionId, frame: ToNode) {
        self.coverage.note("to node", &frame);
        let Some(found) = self.conns.get(&conn) else { return };
        let (machine, life) = (found.machine, found.life);
        let Some(agent) = self.machines[machine].agent.as_mut().filter(|agent| agent.life == life) else { return };
        if agent.dialling == Some(conn) {
            (agent.dialling, agent.session, agent.failures) = (None, Some(conn), 0);
            agent.awake = self.now;
            self.after(1, Happening::HeartbeatDue { conn });
        } else if agent.session != Some(conn) || self.has_slept(conn) {
            return;
        }
        self.tell(machine, life, AgentEvent::Coordinator(frame));
    }

    /// An end closes the connection and tells the other.
    pub fn close(&mut self, conn: SessionId, by: Side) {
        let Some(machine) = self.conns.get(&conn).map(|conn| conn.machine) else { return };
        let trip = self.delay(machine);
        let Some(found) = self.conns.get_mut(&conn) else { return };
        let to = match by {
            Side::Agent => {
                found.agent.open = false;
                Side::Coordinator
            }
            Side::Coordinator => {
                found.server.open = false;
                Side::Agent
            }
        };
        let lost = self.rates.loss;
        if !self.is_cut(machine, to) && !self.streams.links[machine].chance("close-loss", lost) {
            self.after(trip, Happening::Closed { conn, to });
        }
    }

    /// An end finds that the connection is gone.
    pub fn lost(&mut self, conn: SessionId, of: Side) {
        let Some(found) = self.conns.get_mut(&conn) else { return };
        match of {
            Side::Agent => {
                let revoked = found.revoked;
                if std::mem::replace(&mut found.agent.open, false) {
                    self.agent_lost(conn);
                    if revoked {
                        self.agent_revoked(conn);
                    }
                }
            }
            Side::Coordinator => {
                let life = found.coordinator;
                if std::mem::replace(&mut found.server.open, false) && self.coordinator_life() == Some(life) {
                    self.input(Input::Closed { session: conn });
                }
            }
        }
        self.forget(conn);
    }

    /// Connections that both ends have given up and that have nothing on the way are gone.
    fn forget(&mut self, conn: SessionId) {
        let over = |conn: &Conn| {
            let quiet = conn.up.frames.is_empty() && conn.down.frames.is_empty();
            quiet && !conn.agent.open && !conn.server.open
        };
        if self.conns.get(&conn).is_some_and(over) {
            self.conns.remove(&conn);
        }
    }

    /// Keep-alives and the idle time-out of one end.
    pub fn check_idle(&mut self, conn: SessionId, of: Side) {
        let now = self.now;
        let coordinator = self.coordinator_life();
        let Some(found) = self.conns.get(&conn) else { return };
        let machine = found.machine;
        let agent_there = self.machines[machine].is_life(found.life);
        let there = [agent_there, coordinator == Some(found.coordinator)];
        let (own, other, end) = match of {
            Side::Agent => (there[0] && found.agent.open, there[1] && found.server.open, Side::Agent),
            Side::Coordinator => (there[1] && found.server.open, there[0] && found.agent.open, Side::Coordinator),
        };
        if !own {
            return self.forget(conn);
        }
        let other_paused = match of {
            Side::Agent => self.paused,
            Side::Coordinator => self.machines[machine].paused,
        };
        let reset = match of {
            Side::Agent => coordinator.is_some(),
            Side::Coordinator => self.machines[machine].agent.is_some(),
        };
        let both_ways = !self.is_cut(machine, Side::Agent) && !self.is_cut(machine, Side::Coordinator);
        let heard = !self.is_cut(machine, end) && other && !other_paused;
        let found = self.conns.get_mut(&conn).expect("found above");
        let side = match of {
            Side::Agent => &mut found.agent,
            Side::Coordinator => &mut found.server,
        };
        if heard {
            side.heard = now;
        }
        let silent = now - side.heard;
        // A process that does not know the connection answers with a reset.
        if silent >= IDLE_MS || (!other && reset && both_ways && !other_paused) {
            self.say(|_| format!("{conn:?} is lost to the {of:?} after {silent} ms of silence"));
            return self.lost(conn, of);
        }
        self.after(KEEP_ALIVE_MS, Happening::Check { conn, of });
    }

    /// An agent that did not run for longer than its lease gives its session up before it obeys anything.
    fn has_slept(&mut self, conn: SessionId) -> bool {
        let now = self.now;
        let Some(found) = self.conns.get(&conn) else { return true };
        let Some(agent) = &mut self.machines[found.machine].agent else { return true };
        let slept = now - std::mem::replace(&mut agent.awake, now);
        if slept > self.plan.timings().lease_ms {
            self.say(|_| format!("{conn:?} is given up by its agent, which slept for {slept} ms"));
            self.close(conn, Side::Agent);
            self.agent_lost(conn);
            return true;
        }
        false
    }

    pub fn heartbeat_due(&mut self, conn: SessionId) {
        if self.conns.get(&conn).is_none_or(|conn| !conn.agent.open) || self.has_slept(conn) {
            return;
        }
        let Some(found) = self.conns.get_mut(&conn).filter(|conn| conn.agent.open) else { return };
        let (machine, life) = (found.machine, found.life);
        found.beats += 1;
        let sequence = found.beats;
        let rates = self.rates;
        let Some(incarnation) = self.machines[machine].agent.as_ref().filter(|agent| agent.life == life) else {
            return;
        };
        let incarnation = incarnation.incarnation;
        let heartbeat = Heartbeat {
            incarnation,
            sequence,
            cpu_used: 0.5,
            memory_used_bytes: 1,
            routes: LogIndex(0),
            leaving: 0,
            heat: Heat::default(),
        };
        for copy in 0..2 {
            let link = &mut self.streams.links[machine];
            let (lost, twice) = (link.chance("beat-loss", rates.loss), link.chance("duplicate", rates.duplicate));
            if lost || (copy == 1 && !twice) || self.machines[machine].cut_up {
                continue;
            }
            let trip = self.delay(machine);
            self.after(trip, Happening::Beat { conn, heartbeat });
        }
        let wait = self.machines[machine].lasts(self.plan.timings().heartbeat_ms);
        self.after(wait, Happening::HeartbeatDue { conn });
    }

    pub fn beat(&mut self, conn: SessionId, heartbeat: Heartbeat) {
        let now = self.now;
        let life = self.coordinator_life();
        let Some(found) = self.conns.get_mut(&conn).filter(|conn| conn.server.open) else { return };
        if life == Some(found.coordinator) {
            found.server.heard = now;
            self.input(Input::Heartbeat { session: conn, heartbeat });
        }
    }
}
