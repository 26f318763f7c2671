//! The coordinator's process: the real `Control` on a model log. Owns the hand-off that the real shell does with a thread: records gather while
//! the disk is busy, effects wait until every record before them is durable, and a crash loses what was not. Restarts replay and compare.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use stoke_coordinator::journal::{Log, ModelLog, Recovered};
use stoke_coordinator::state::{
    Cluster, Control, Effect, Event, Input, Mono, Now, Options, PlantedBug, Record, SessionId, Step, Ticket, Time,
    placement,
};
use stoke_node::agent::state::Signed;
use stoke_protocol::codec;
use stoke_protocol::ids::{LogIndex, NodeId};
use stoke_protocol::message::rank::RankId;

use super::network::Side;
use super::oracle::CLUSTER;
use super::planted::Planted;
use super::world::{Happening, Ms, World};

const TICK_MS: Ms = 250;
/// After a crash that nobody asked for, the supervisor starts it again.
const RESTART_MS: Ms = 700;

pub struct Coordinator {
    pub life: u64,
    pub control: Control,
    /// An old copy of the journal in the coordinator's place: nothing that it does is the cluster's truth.
    pub copy: bool,
    log: ModelLog,
    pub started: Ms,
    /// Nodes that have connected in this life.
    connected: BTreeSet<NodeId>,
    rate: f64,
    /// Records that the disk has not been given yet, and those that it is busy with.
    gathered: Vec<Record>,
    writing: Vec<Record>,
    /// What waits for the record at its index.
    waiting: VecDeque<(LogIndex, Effect)>,
    durable: LogIndex,
    snapshot: LogIndex,
    /// The disk was low when it was last looked at.
    low: bool,
    tickets: BTreeMap<Ticket, Origin>,
    drawn: u64,
}

/// Who waits for an answer.
#[derive(Clone, Copy, Debug)]
enum Origin {
    Client { ask: u64 },
    Signing { conn: SessionId, id: RankId },
}

impl Coordinator {
    fn now(&self, world_ms: Ms, wall_ms: i64) -> Now {
        let mono = ((world_ms - self.started) as f64 * self.rate) as u64;
        Now { wall: Time((wall_ms + world_ms as i64) as u64), mono: Mono(mono) }
    }

    /// Nothing waits for the disk.
    pub fn is_quiet(&self) -> bool {
        self.gathered.is_empty() && self.writing.is_empty() && self.waiting.is_empty()
    }
}

impl World {
    /// The cluster as its coordinator sees it, or as it is on disk while there is none.
    pub fn cluster(&self) -> &Cluster {
        match &self.coordinator {
            Some(coordinator) if !coordinator.copy => coordinator.control.cluster(),
            Some(_) | None => &self.shadow,
        }
    }

    pub fn boot(&mut self) {
        if self.coordinator.is_some() {
            return;
        }
        let mut log = self.disk.clone();
        let recovered = log.recover().expect("the model disk can always be read");
        let replayed = self.replay(&recovered);
        let last = recovered.last();
        self.oracle.replayed(last, replayed.state_hash(), self.shadow.index(), self.shadow.state_hash());
        let founded = replayed.id().is_some();
        self.shadow = replayed.clone();
        self.start(replayed, log, (last, recovered.snapshot.map(|entry| entry.index).unwrap_or_default()), false);
        if !founded {
            self.input(Input::Found { cluster: CLUSTER, admin: "root".into() });
        }
        self.input(Input::Start { version: "sim".into() });
        let epoch = self.cluster().epoch();
        self.say(|_| format!("coordinator starts as {epoch} at {last}"));
    }

    /// An old copy of the folder is started in the coordinator's place. Every node must have seen more than it.
    pub fn boot_copy(&mut self, depth: u64) -> bool {
        let seen = self.machines.iter().map(|machine| machine.fence.index.0).min().unwrap_or(0);
        let most = (self.history.len() as u64).min(seen.saturating_sub(2));
        if most < 3 {
            return false;
        }
        let entries = 2 + depth as usize % (most as usize - 1);
        let mut log = ModelLog::default();
        log.append(&self.history[..entries]).expect("a fresh disk has room");
        let recovered = log.recover().expect("the model disk can always be read");
        let replayed = self.replay(&recovered);
        if replayed.epoch().next() > self.shadow.epoch() && replayed.index() >= self.shadow.index() {
            return false;
        }
        self.say(|_| format!("an old copy of the journal is started, {entries} entries"));
        self.start(replayed, log, (recovered.last(), LogIndex(0)), true);
        self.input(Input::Start { version: "copy".into() });
        true
    }

    fn replay(&self, recovered: &Recovered) -> Cluster {
        let mut cluster = match &recovered.snapshot {
            Some(snapshot) => Cluster::from_bytes(&snapshot.payload).expect("a snapshot decodes"),
            None => Cluster::default(),
        };
        cluster.plant(self.planted.state());
        for entry in &recovered.entries {
            let record: Record = codec::decode_record(&entry.payload).expect("a record decodes");
            cluster.apply(&record);
        }
        cluster
    }

    fn start(&mut self, cluster: Cluster, log: ModelLog, (durable, snapshot): (LogIndex, LogIndex), copy: bool) {
        self.lives += 1;
        let life = self.lives;
        let options = Options {
            timings: self.plan.timings(),
            placement: placement::Options { passes_max: 4, ..placement::Options::default() },
            checkpoints: "file:///checkpoints".into(),
            version: "sim".into(),
            api: None,
        };
        let rate = self.streams.scheduler.drift("coordinator-drift");
        let now = Now { wall: Time((self.wall_ms + self.now as i64) as u64), mono: Mono(0) };
        self.coordinator = Some(Coordinator {
            life,
            control: Control::new(cluster, options, now),
            copy,
            log,
            started: self.now,
            connected: BTreeSet::new(),
            rate,
            gathered: Vec::new(),
            writing: Vec::new(),
            waiting: VecDeque::new(),
            durable,
            snapshot,
            low: false,
            tickets: BTreeMap::new(),
            drawn: 0,
        });
        self.changed = true;
        self.after(TICK_MS, Happening::Tick { life });
    }

    pub fn tick(&mut self, life: u64) {
        if self.coordinator.as_ref().is_some_and(|coordinator| coordinator.life == life) {
            self.input(Input::Tick);
            self.look_at_room();
            self.after(TICK_MS, Happening::Tick { life });
        }
    }

    /// One input of the real state, checked against what it may do, and its records and effects handed on.
    pub fn input(&mut self, input: Input) {
        let Some(coordinator) = &mut self.coordinator else { return };
        self.coverage.note("coordinator input", &input);
        let now = coordinator.now(self.now, self.wall_ms);
        let before = self.oracle.before(coordinator.control.cluster(), &input, coordinator.control.liveness());
        let step = coordinator.control.step(now, input);
        step.records.iter().for_each(|record| self.coverage.note("coordinator event", &record.event));
        let copy = coordinator.copy;
        if !copy {
            let (over, connected) = (now.mono.0 >= self.plan.failover_grace_ms, &coordinator.connected);
            let graced = |node| over || connected.contains(&node);
            self.oracle.after(&coordinator.control, before, &step.records, &graced);
            coordinator.connected.extend(coordinator.control.liveness().live());
            let lost = step.records.iter().any(|record| matches!(record.event, Event::NodeLost { .. }));
            if lost && self.woke.is_some_and(|woke| self.now < woke + self.plan.timings().lease_ms * 9 / 10) {
                self.oracle.note("H4", || "a node is lost by the time for which the coordinator was stopped".into());
            }
        }
        if !step.records.is_empty() {
            self.changed = true;
            let records = step.records.clone();
            self.say(|_| {
                records.iter().map(|record| format!("C: {}", words(&record.event))).collect::<Vec<_>>().join(" | ")
            });
        }
        self.hand_over(step);
    }

    fn hand_over(&mut self, step: Step) {
        let early = self.planted == Planted::State(PlantedBug::AckBeforeDurable);
        let Some(coordinator) = &mut self.coordinator else { return };
        coordinator.gathered.extend(step.records);
        let upto = coordinator.control.cluster().index();
        if early || (upto == coordinator.durable && coordinator.waiting.is_empty()) {
            step.effects.into_iter().for_each(|effect| self.carry_out(effect));
        } else {
            coordinator.waiting.extend(step.effects.into_iter().map(|effect| (upto, effect)));
        }
        self.write();
    }

    /// Gives the disk what has gathered, if it is idle.
    fn write(&mut self) {
        let rates = self.rates;
        let Some(coordinator) = &mut self.coordinator else { return };
        if !coordinator.writing.is_empty() || coordinator.gathered.is_empty() {
            return;
        }
        coordinator.writing = std::mem::take(&mut coordinator.gathered);
        let life = coordinator.life;
        let disk = &mut self.streams.disk;
        let took = match disk.chance("slow", rates.slow_disk) {
            true => disk.between("slow-sync", 1, rates.slow_ms),
            false => disk.between("sync", 1, 8),
        };
        self.after(took, Happening::Synced { life });
    }

    pub fn synced(&mut self, life: u64) {
        let Some(coordinator) = self.coordinator.as_mut().filter(|coordinator| coordinator.life == life) else {
            return;
        };
        let records = std::mem::take(&mut coordinator.writing);
        if std::mem::take(&mut self.sync_fails) || !self.append(&records) {
            // J4: it ends, and recovers from disk.
            self.say(|_| "the journal cannot be written: the coordinator ends".into());
            self.crash_coordinator();
            return self.after(RESTART_MS, Happening::Boot);
        }
        let coordinator = self.coordinator.as_mut().expect("found above");
        coordinator.durable = LogIndex(coordinator.durable.0 + records.len() as u64);
        let durable = coordinator.durable;
        let mut ready = Vec::new();
        while let Some((_, effect)) = coordinator.waiting.pop_front_if(|(upto, _)| *upto <= durable) {
            ready.push(effect);
        }
        ready.into_iter().for_each(|effect| self.carry_out(effect));
        self.look_at_room();
        self.keep_snapshot();
        self.write();
    }

    /// After each commit and a few times a second: while nothing is appended nothing else would tell.
    fn look_at_room(&mut self) {
        let Some(coordinator) = &mut self.coordinator else { return };
        let room = coordinator.log.room().expect("the model disk tells its room");
        let low = !room.is_enough();
        if std::mem::replace(&mut coordinator.low, low) != low {
            let low = low.then(|| format!("the journal's disk has {} bytes left", room.free));
            self.input(Input::Storage { low });
        }
    }

    /// Makes records durable; false if the disk refuses.
    fn append(&mut self, records: &[Record]) -> bool {
        let Some(coordinator) = &mut self.coordinator else { return false };
        let encode = |record: &Record| codec::encode_record(record).expect("a record encodes");
        let payloads: Vec<Vec<u8>> = records.iter().map(encode).collect();
        if coordinator.log.append(&payloads).is_err() {
            return false;
        }
        if coordinator.copy {
            return true;
        }
        for (record, payload) in records.iter().zip(payloads) {
            self.shadow.apply(record);
            if matches!(record.event, Event::EpochRaised { .. }) {
                self.oracle.started(self.shadow.epoch());
            }
            self.oracle.recorded(&record.event);
            self.digest(&payload);
            self.history.push(payload);
        }
        self.changed = true;
        true
    }

    fn keep_snapshot(&mut self) {
        let Some(coordinator) = self.coordinator.as_mut().filter(|coordinator| !coordinator.copy) else { return };
        let due = coordinator.durable.0 >= coordinator.snapshot.0 + self.plan.snapshot_every;
        // Only of what is durable: the state ahead of it may be lost.
        if due && coordinator.durable == self.shadow.index() && self.planted != Planted::LyingDisk {
            let payload = self.shadow.to_bytes();
            coordinator.log.snapshot(coordinator.durable, &payload).expect("the model disk takes snapshots");
            coordinator.snapshot = coordinator.durable;
        }
    }

    /// Power is cut: a part of what the disk was busy with may be there all the same.
    pub fn crash_coordinator(&mut self) {
        let Some(coordinator) = &mut self.coordinator else { return };
        let writing = std::mem::take(&mut coordinator.writing);
        if !writing.is_empty() && !coordinator.copy && self.streams.disk.chance("kept", 0.5) {
            let some = self.streams.disk.between("kept-part", 0, writing.len() as u64) as usize;
            // A disk that is full takes nothing, which a crash may do too.
            let _taken = self.append(&writing[..some]);
        }
        self.coordinator = None;
        self.disk.crash();
        (self.paused, self.woke) = (false, None);
        self.changed = true;
        self.say(|world| format!("coordinator dies, durable is {}", world.shadow.index()));
        for happening in std::mem::take(&mut self.deferred) {
            self.after(0, happening);
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        self.coverage.note("coordinator effect", &effect);
        match effect {
            Effect::Send { session, message } => self.send_down(session, message),
            Effect::Close { session, reason } => {
                self.say(|_| format!("C closes {session:?}: {reason}"));
                self.close(session, Side::Coordinator);
            }
            Effect::Revoke { session, reason } => {
                self.say(|_| format!("C revokes {session:?}: {reason}"));
                if let Some(conn) = self.conns.get_mut(&session) {
                    conn.revoked = true;
                }
                self.close(session, Side::Coordinator);
            }
            Effect::Changed { .. } => {}
            Effect::SignRank { ticket, id } => {
                let authority = vec![7];
                let certificate = vec![id.rank.0 as u8];
                self.answer_signing(ticket, Signed::Certificate { certificate, authority });
            }
            Effect::Deny { ticket, reason } => match self.take_ticket(ticket) {
                Some(Origin::Signing { conn, id }) => self.signed(conn, id, Signed::Refused { reason }),
                Some(Origin::Client { ask }) => self.denied(ask, &reason),
                None => {}
            },
            Effect::Reply { ticket, reply } => {
                if let Some(Origin::Client { ask }) = self.take_ticket(ticket) {
                    self.reply(ask, *reply);
                }
            }
            Effect::TokenMade { ticket, token } => {
                if let Some(Origin::Client { ask }) = self.take_ticket(ticket) {
                    self.token_made(ask, token);
                }
            }
            Effect::Admit { ticket, member } => {
                if let Some(Origin::Client { ask }) = self.take_ticket(ticket) {
                    self.admitted(ask, member);
                }
            }
            Effect::Artifacts { ticket, .. } | Effect::Granted { ticket } => {
                if let Some(Origin::Client { ask }) = self.take_ticket(ticket) {
                    self.granted(ask);
                }
            }
        }
    }

    fn take_ticket(&mut self, ticket: Ticket) -> Option<Origin> {
        self.coordinator.as_mut()?.tickets.remove(&ticket)
    }

    fn draw_ticket(&mut self, origin: Origin) -> Option<Ticket> {
        let coordinator = self.coordinator.as_mut()?;
        coordinator.drawn += 1;
        let ticket = Ticket(coordinator.drawn);
        coordinator.tickets.insert(ticket, origin);
        Some(ticket)
    }

    /// Nobody waits for the answers to a client's question any more.
    pub fn hang_up(&mut self, ask: u64) {
        let Some(coordinator) = self.coordinator.as_mut().filter(|_| !self.paused) else { return };
        let waits = |origin: &Origin| matches!(origin, Origin::Client { ask: waiting } if *waiting == ask);
        let tickets = coordinator.tickets.extract_if(.., |_, origin| waits(origin));
        let tickets: Vec<Ticket> = tickets.map(|(ticket, _)| ticket).collect();
        tickets.into_iter().for_each(|ticket| self.input(Input::Dropped { ticket }));
    }

    pub fn client_ticket(&mut self, ask: u64) -> Option<Ticket> {
        self.draw_ticket(Origin::Client { ask })
    }

    pub fn sign_asked(&mut self, conn: SessionId, id: RankId) {
        let Some(found) = self.conns.get(&conn).filter(|conn| conn.server.open) else { return };
        if self.coordinator.as_ref().is_none_or(|coordinator| coordinator.life != found.coordinator) {
            return;
        }
        if let Some(ticket) = self.draw_ticket(Origin::Signing { conn, id }) {
            self.input(Input::SignRank { ticket, session: conn, id });
        }
    }

    fn answer_signing(&mut self, ticket: Ticket, answer: Signed) {
        if let Some(Origin::Signing { conn, id }) = self.take_ticket(ticket) {
            self.signed(conn, id, answer);
        }
    }

    fn signed(&mut self, conn: SessionId, id: RankId, answer: Signed) {
        let Some(found) = self.conns.get(&conn).filter(|conn| conn.server.open) else { return };
        let (machine, life) = (found.machine, found.life);
        if self.machines[machine].cut_down {
            return;
        }
        let trip = self.delay(machine);
        self.after(trip, Happening::SignAnswered { machine, life, id, answer });
    }
}

fn words(event: &Event) -> String {
    let mut text = format!("{event:?}");
    if let Some((at, _)) = text.char_indices().nth(220) {
        text.truncate(at);
    }
    text
}
