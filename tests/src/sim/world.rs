//! Everything that a run consists of, the one queue of what happens next, and who takes in what. Owns time and order; what happens is decided
//! in the module of whom it happens to.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use stoke_coordinator::journal::ModelLog;
use stoke_coordinator::state::{Cluster, SessionId};
use stoke_node::agent::Sweep;
use stoke_node::agent::state::{Event as AgentEvent, Signed};
use stoke_protocol::ids::{Generation, JobId, Term};
use stoke_protocol::message::node::Heartbeat;
use stoke_protocol::message::rank::{Exit, RankId, ToRank};

use super::agents::Machine;
use super::clients::{Answer, Clients};
use super::coordinator::Coordinator;
use super::coverage::Coverage;
use super::faults::{Fault, Rates};
use super::gangs::Gang;
use super::invariants::{Memory, TABLE};
use super::network::{Conn, Side};
use super::oracle::Oracle;
use super::plan::Plan;
use super::planted::Planted;
use super::random::{Choices, Source, Stream};
use super::ranks::{Act, Process, ProcessId};
use super::store::Store;

/// Milliseconds of simulated time since the run began.
pub type Ms = u64;

/// When machines ask to join.
const COME_MS: Ms = 50;

/// What happens at a time.
#[derive(Clone, Debug)]
pub enum Happening {
    Boot,
    Tick { life: u64 },
    Synced { life: u64 },
    Dial { machine: usize, life: u64 },
    Handshake { conn: SessionId },
    WelcomeLate { conn: SessionId },
    Frame { conn: SessionId, to: Side },
    Closed { conn: SessionId, to: Side },
    Check { conn: SessionId, of: Side },
    HeartbeatDue { conn: SessionId },
    Beat { conn: SessionId, heartbeat: Heartbeat },
    SignAsked { conn: SessionId, id: RankId },
    SignAnswered { machine: usize, life: u64, id: RankId, answer: Signed },
    Agent { machine: usize, life: u64, event: AgentEvent },
    AgentBoot { machine: usize },
    AgentLeave { machine: usize, life: u64 },
    KillDue { machine: usize, life: u64, id: RankId },
    Sweep { machine: usize, life: u64, sweep: Box<(JobId, Sweep)> },
    ToRank { process: ProcessId, frame: ToRank },
    RankGone { machine: usize, life: u64, id: RankId, exit: Exit },
    RankActs { process: ProcessId, act: Act },
    RankResumes { process: ProcessId },
    RankSilent { process: ProcessId, for_ms: Ms },
    GangStep { job: JobId, term: Term },
    MachineComes { machine: usize },
    Asks { ask: usize },
    Asked { ask: u64, attempt: u32 },
    Answered { ask: u64, answer: Answer },
    AskTimedOut { ask: u64, attempt: u32 },
    Inject { fault: usize },
    Heal { fault: Fault },
    Calm,
}

/// Who is stopped when a process or a machine is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Taker {
    Coordinator,
    Machine(usize),
    Nobody,
}

pub struct World {
    pub now: Ms,
    queue: BTreeMap<(Ms, u64), Happening>,
    sequence: u64,
    pub events: u64,
    hash: u64,
    pub planted: Planted,
    pub plan: Plan,
    pub rates: Rates,
    pub calm: bool,
    pub coordinator: Option<Coordinator>,
    /// Lives of coordinators so far.
    pub lives: u64,
    pub paused: bool,
    /// Since when the coordinator was stopped, and when it went on after a lease or more (H4).
    pub stopped_at: Ms,
    pub woke: Option<Ms>,
    pub deferred: Vec<Happening>,
    pub wall_ms: i64,
    /// The next sync of the journal fails.
    pub sync_fails: bool,
    pub disk: ModelLog,
    /// The fold of what is durable, and its records as they were written.
    pub shadow: Cluster,
    pub history: Vec<Vec<u8>>,
    pub machines: Vec<Machine>,
    pub conns: BTreeMap<SessionId, Conn>,
    pub conns_made: u64,
    pub processes: BTreeMap<ProcessId, Process>,
    pub processes_made: u64,
    pub gangs: BTreeMap<(JobId, Term), Gang>,
    /// Ranks that have no connection to each other.
    pub severed: BTreeSet<(RankId, RankId)>,
    pub store: Store,
    /// Whether a generation finds the newest checkpoint damaged: all its ranks find the same.
    pub damaged: BTreeMap<(JobId, Generation), bool>,
    /// Whether it begins with an older one than it was told.
    pub older: BTreeMap<(JobId, Generation), bool>,
    pub clients: Clients,
    pub oracle: Oracle,
    pub coverage: Coverage,
    memory: Memory,
    /// Something that an invariant looks at has changed.
    pub changed: bool,
    pub streams: Streams,
    story: Option<VecDeque<String>>,
    story_max: usize,
}

/// One a concern.
pub struct Streams {
    pub scheduler: Stream,
    pub disk: Stream,
    pub ranks: Stream,
    pub clients: Stream,
    pub client_net: Stream,
    pub links: Vec<Stream>,
}

impl Streams {
    fn new(source: &Source, plan: &Plan) -> Self {
        let stream = |concern: &str| Stream::of(source, concern);
        Self {
            scheduler: stream("scheduler"),
            disk: stream("disk"),
            ranks: stream("ranks"),
            clients: stream("clients"),
            client_net: stream("client-net"),
            links: plan.machines.iter().map(|machine| stream(&format!("link-{}", machine.name))).collect(),
        }
    }

    fn set_time(&mut self, now: Ms) {
        let Self { scheduler, disk, ranks, clients, client_net, links } = self;
        [scheduler, disk, ranks, clients, client_net].into_iter().chain(links).for_each(|stream| stream.set_time(now));
    }

    pub fn all(&self) -> impl Iterator<Item = &Stream> {
        let Self { scheduler, disk, ranks, clients, client_net, links } = self;
        [scheduler, disk, ranks, clients, client_net].into_iter().chain(links)
    }

    /// Everything that was drawn.
    pub fn drawn(&self) -> Choices {
        self.all().map(Stream::drawn).filter(|(_, sites)| !sites.is_empty()).collect()
    }
}

impl World {
    pub fn new(plan: Plan, source: &Source, planted: Planted, story_max: usize) -> Self {
        let mut shadow = Cluster::default();
        shadow.plant(planted.state());
        let disk = ModelLog::default();
        if planted == Planted::LyingDisk {
            disk.lie_about_sync();
        }
        let machines = plan.machines.iter().map(Machine::new).collect();
        let streams = Streams::new(source, &plan);
        let mut world = Self {
            now: 0,
            queue: BTreeMap::new(),
            sequence: 0,
            events: 0,
            hash: 0,
            planted,
            rates: plan.rates,
            calm: false,
            coordinator: None,
            lives: 0,
            paused: false,
            stopped_at: 0,
            woke: None,
            deferred: Vec::new(),
            wall_ms: 1_700_000_000_000,
            sync_fails: false,
            disk,
            shadow,
            history: Vec::new(),
            machines,
            conns: BTreeMap::new(),
            conns_made: 0,
            processes: BTreeMap::new(),
            processes_made: 0,
            gangs: BTreeMap::new(),
            severed: BTreeSet::new(),
            store: Store::default(),
            damaged: BTreeMap::new(),
            older: BTreeMap::new(),
            clients: Clients::new(),
            oracle: Oracle::default(),
            coverage: Coverage::default(),
            memory: Memory::default(),
            changed: true,
            streams,
            story: (story_max > 0).then(VecDeque::new),
            story_max,
            plan,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        self.at(0, Happening::Boot);
        for machine in 0..self.machines.len() {
            self.at(COME_MS, Happening::MachineComes { machine });
        }
        for ask in 0..self.plan.asks.len() {
            self.at(self.plan.asks[ask].at, Happening::Asks { ask });
        }
        for fault in 0..self.plan.faults.len() {
            self.at(self.plan.faults[fault].at, Happening::Inject { fault });
        }
        self.at(self.plan.chaos_ms, Happening::Calm);
    }

    pub fn at(&mut self, time: Ms, happening: Happening) {
        self.sequence += 1;
        self.queue.insert((time.max(self.now), self.sequence), happening);
    }

    pub fn after(&mut self, wait: Ms, happening: Happening) {
        self.at(self.now + wait, happening);
    }

    /// A line of the story; made only when somebody reads it.
    pub fn say(&mut self, line: impl FnOnce(&Self) -> String) {
        if self.story.is_none() {
            return;
        }
        let line = format!("{:>8} ms  {}", self.now, line(self));
        if let Some(lines) = &mut self.story {
            lines.push_back(line);
            if lines.len() > self.story_max {
                lines.pop_front();
            }
        }
    }

    pub fn story(&mut self) -> Vec<String> {
        self.story.take().map(Vec::from).unwrap_or_default()
    }

    /// Takes part in the rolling hash.
    pub fn digest(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word));
        }
    }

    pub fn mix(&mut self, word: u64) {
        self.hash = (self.hash.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// The next thing happens; false when nothing is left.
    pub fn step(&mut self) -> Result<bool, (&'static str, String)> {
        let Some(((time, sequence), happening)) = self.queue.pop_first() else { return Ok(false) };
        self.now = time;
        self.streams.set_time(time);
        self.events += 1;
        self.mix(time);
        self.mix(sequence);
        match self.taker(&happening) {
            Taker::Coordinator if self.paused => self.deferred.push(happening),
            Taker::Machine(machine) if self.machines[machine].paused => self.machines[machine].deferred.push(happening),
            Taker::Machine(_) if self.is_stopped(&happening) => self.defer_for_rank(happening),
            Taker::Coordinator | Taker::Machine(_) | Taker::Nobody => self.happen(happening),
        }
        if std::mem::take(&mut self.changed) {
            let mut memory = std::mem::take(&mut self.memory);
            for (name, holds) in TABLE {
                holds(self, &mut memory).map_err(|what| (*name, what))?;
            }
            self.memory = memory;
        }
        Ok(true)
    }

    fn taker(&self, happening: &Happening) -> Taker {
        let conn_machine = |conn: &SessionId| self.conns.get(conn).map_or(Taker::Nobody, |c| Taker::Machine(c.machine));
        let machine_of = |id: &ProcessId| self.processes.get(id).map_or(Taker::Nobody, |p| Taker::Machine(p.machine));
        match happening {
            Happening::Tick { .. } | Happening::Synced { .. } | Happening::Asked { .. } => Taker::Coordinator,
            Happening::Beat { .. } | Happening::SignAsked { .. } => Taker::Coordinator,
            Happening::Frame { to: Side::Coordinator, .. }
            | Happening::Closed { to: Side::Coordinator, .. }
            | Happening::Check { of: Side::Coordinator, .. } => Taker::Coordinator,
            Happening::Frame { conn, to: Side::Agent }
            | Happening::Closed { conn, to: Side::Agent }
            | Happening::Check { conn, of: Side::Agent }
            | Happening::Handshake { conn }
            | Happening::WelcomeLate { conn }
            | Happening::HeartbeatDue { conn } => conn_machine(conn),
            Happening::Dial { machine, .. }
            | Happening::SignAnswered { machine, .. }
            | Happening::Agent { machine, .. }
            | Happening::AgentBoot { machine }
            | Happening::AgentLeave { machine, .. }
            | Happening::KillDue { machine, .. }
            | Happening::Sweep { machine, .. }
            | Happening::RankGone { machine, .. } => Taker::Machine(*machine),
            Happening::ToRank { process, .. }
            | Happening::RankActs { process, .. }
            | Happening::RankSilent { process, .. } => machine_of(process),
            Happening::GangStep { .. } | Happening::Boot | Happening::RankResumes { .. } => Taker::Nobody,
            Happening::MachineComes { .. } | Happening::Asks { .. } => Taker::Nobody,
            Happening::Answered { .. } | Happening::AskTimedOut { .. } => Taker::Nobody,
            Happening::Inject { .. } | Happening::Heal { .. } | Happening::Calm => Taker::Nobody,
        }
    }

    fn happen(&mut self, happening: Happening) {
        self.coverage.note("happening", &happening);
        match happening {
            Happening::Boot => self.boot(),
            Happening::Tick { life } => self.tick(life),
            Happening::Synced { life } => self.synced(life),
            Happening::Dial { machine, life } => self.dial(machine, life),
            Happening::Handshake { conn } => self.handshake(conn),
            Happening::WelcomeLate { conn } => self.welcome_late(conn),
            Happening::Frame { conn, to } => self.frame_due(conn, to),
            Happening::Closed { conn, to } => self.lost(conn, to),
            Happening::Check { conn, of } => self.check_idle(conn, of),
            Happening::HeartbeatDue { conn } => self.heartbeat_due(conn),
            Happening::Beat { conn, heartbeat } => self.beat(conn, heartbeat),
            Happening::SignAsked { conn, id } => self.sign_asked(conn, id),
            Happening::SignAnswered { machine, life, id, answer } => {
                self.tell(machine, life, AgentEvent::Signed { id, answer })
            }
            Happening::Agent { machine, life, event } => self.tell(machine, life, event),
            Happening::AgentBoot { machine } => self.agent_boot(machine),
            Happening::AgentLeave { machine, life } => self.agent_leave(machine, life),
            Happening::KillDue { machine, life, id } => self.kill_due(machine, life, id),
            Happening::Sweep { machine, life, sweep } => self.sweep(machine, life, *sweep),
            Happening::ToRank { process, frame } => self.deliver_to_rank(process, frame),
            Happening::RankGone { machine, life, id, exit } => {
                self.tell(machine, life, AgentEvent::Exited { id, exit })
            }
            Happening::RankActs { process, act } => self.rank_acts(process, act),
            Happening::RankResumes { process } => self.rank_resumes(process),
            Happening::RankSilent { process, for_ms } => self.rank_silent(process, for_ms),
            Happening::GangStep { job, term } => self.gang_step(job, term),
            Happening::MachineComes { machine } => self.machine_comes(machine),
            Happening::Asks { ask } => self.asks(ask),
            Happening::Asked { ask, attempt } => self.asked(ask, attempt),
            Happening::Answered { ask, answer } => self.answered(ask, answer),
            Happening::AskTimedOut { ask, attempt } => self.ask_timed_out(ask, attempt),
            Happening::Inject { fault } => self.inject(self.plan.faults[fault].fault),
            Happening::Heal { fault } => self.heal(fault),
            Happening::Calm => self.calm_down(),
        }
    }
}
