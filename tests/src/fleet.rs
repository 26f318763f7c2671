//! Thousands of simulated machines around the real control machine, for benches: each does at once, or after the time that it is said to take, what an agent
//! and its ranks do. No network, no disk, no loss: `sim` has those, for dozens of machines. Owns the clock.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use stoke_coordinator::record_bytes;
use stoke_coordinator::state::{Cluster, Control, Effect, Input, Mono, Now, Options, SessionId, Step, Ticket, Time};
use stoke_protocol::identity::{Subject, UserRole};
use stoke_protocol::ids::{ClusterId, Digest, Epoch, Generation, Incarnation, JobId, LogIndex, NodeId};
use stoke_protocol::message::client::{Reply, Request, TokenScope};
use stoke_protocol::message::join::Wants;
use stoke_protocol::message::node::{Capacity, Heartbeat, NodeHello, Report, ToNode};
use stoke_protocol::message::rank::{Exit, Membership, Progress, RankEvent, RankId};

const CLUSTER: ClusterId = ClusterId([1; 16]);

/// How long things take that are not the control machine's, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// From the order until a rank's process listens.
    pub boot_ms: u64,
    /// Until the members of a new generation have met.
    pub form_ms: u64,
    /// Until one that joins has the state of the others.
    pub join_ms: u64,
    /// Of a step, while all ranks have the same number of lanes.
    pub step_ms: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { boot_ms: 100, form_ms: 10, join_ms: 100, step_ms: 1_000 }
    }
}

/// What comes of itself.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Happening {
    Ready(RankId),
    Resumed(RankId, Generation),
    Joined(RankId, Generation),
    Exited(RankId),
}

struct Machine {
    name: String,
    capacity: Capacity,
    incarnation: u64,
    reports: u64,
    beats: u64,
    /// Its agent is there.
    up: bool,
    ranks: BTreeSet<RankId>,
}

/// A job's training, as its ranks do it.
#[derive(Clone, Debug, Default)]
pub struct Training {
    pub generation: Generation,
    pub steps: u64,
    /// Since when it steps, and how long a step takes; none: it stands still.
    pub since: Option<(u64, u64)>,
    /// Milliseconds in which it stood still or did what it did again.
    pub lost_ms: u64,
    stands_since: u64,
}

pub struct Fleet {
    pub control: Control,
    pub now_ms: u64,
    pub pace: Pace,
    /// Of one job.
    lanes: u64,
    ticket: u64,
    machines: BTreeMap<NodeId, Machine>,
    places: BTreeMap<RankId, NodeId>,
    /// The newest of each rank.
    memberships: BTreeMap<RankId, Membership>,
    pub trainings: BTreeMap<JobId, Training>,
    due: BinaryHeap<Reverse<(u64, Happening)>>,
    /// What the control machine has cost: calls, their time, and its journal.
    pub calls: u64,
    pub busy: Duration,
    pub records: u64,
    pub record_bytes: u64,
    /// Of the inputs that took longest.
    pub slowest: Duration,
}

impl Fleet {
    pub fn new(pace: Pace, lanes: u64) -> Self {
        let now = Now { wall: Time(1), mono: Mono(1) };
        let mut fleet = Self {
            control: Control::new(Cluster::default(), Options::default(), now),
            now_ms: 1,
            pace,
            lanes,
            ticket: 0,
            machines: BTreeMap::new(),
            places: BTreeMap::new(),
            memberships: BTreeMap::new(),
            trainings: BTreeMap::new(),
            due: BinaryHeap::new(),
            calls: 0,
            busy: Duration::ZERO,
            records: 0,
            record_bytes: 0,
            slowest: Duration::ZERO,
        };
        fleet.give(Input::Found { cluster: CLUSTER, admin: "admin".into() });
        fleet.give(Input::Start { version: "bench".into() });
        fleet
    }

    /// Gives the control machine an input, and does what it orders.
    pub fn give(&mut self, input: Input) -> Step {
        let now = Now { wall: Time(self.now_ms), mono: Mono(self.now_ms) };
        let begun = Instant::now();
        let step = self.control.step(now, input);
        let bytes: usize = step.records.iter().map(|record| record_bytes(record).len()).sum();
        let took = begun.elapsed();
        self.calls += 1;
        self.busy += took;
        self.slowest = self.slowest.max(took);
        self.records += step.records.len() as u64;
        self.record_bytes += bytes as u64;
        for effect in &step.effects {
            if let Effect::Send { session, message } = effect {
                self.obey(NodeId(session.0 & SESSION_NODE), message.clone());
            }
        }
        step
    }

    pub fn ask(&mut self, request: Request) -> Step {
        self.ticket += 1;
        let caller = Subject::User { name: "admin".into(), role: UserRole::Admin };
        self.give(Input::Request { ticket: Ticket(self.ticket), caller, request, secret_hash: Digest([7; 32]) })
    }

    /// A machine joins and connects.
    pub fn join(&mut self, capacity: Capacity) -> NodeId {
        let number = self.machines.len() as u64 + 1;
        let made = self.ask(Request::TokenCreate { scope: TokenScope::Node, ttl_seconds: 3_600 });
        let token = made.effects.iter().find_map(|effect| match effect {
            Effect::TokenMade { token, .. } => Some(*token),
            _ => None,
        });
        let (token, name) = (token.expect("an admin makes tokens"), format!("n{number}"));
        self.ticket += 1;
        let wants = Wants::Node { name: name.clone() };
        self.give(Input::Join { ticket: Ticket(self.ticket), token, secret_hash: Digest([7; 32]), wants });
        let node = NodeId(number);
        let machine =
            Machine { name, capacity, incarnation: 0, reports: 0, beats: 0, up: false, ranks: BTreeSet::new() };
        self.machines.insert(node, machine);
        self.connect(node);
        node
    }

    /// Its agent begins anew, without ranks.
    pub fn connect(&mut self, node: NodeId) {
        let machine = self.machines.get_mut(&node).expect("it has joined");
        machine.incarnation += 1;
        (machine.up, machine.reports) = (true, 0);
        let hello = NodeHello {
            cluster: CLUSTER,
            node,
            name: machine.name.clone(),
            incarnation: Incarnation(machine.incarnation),
            session: 1,
            epoch_seen: Epoch(0),
            index_seen: LogIndex(0),
            capacity: machine.capacity.clone(),
            gateway: None,
            ranks: Vec::new().into(),
        };
        let session = self.session(node);
        self.give(Input::Hello { session, node, address: "10.0.0.1:1".into(), hello });
    }

    fn session(&self, node: NodeId) -> SessionId {
        SessionId(self.machines[&node].incarnation << 32 | node.0)
    }

    pub fn submit(&mut self, key: u64, spec: String) -> Option<JobId> {
        let step = self.ask(Request::Submit { key: format!("k{key}"), spec });
        step.effects.iter().find_map(|effect| match effect {
            Effect::Reply { reply, .. } => match &**reply {
                Reply::Submitted { job, .. } => Some(*job),
                _ => None,
            },
            _ => None,
        })
    }

    /// All that are there say so.
    pub fn heartbeats(&mut self) {
        let there: Vec<NodeId> = self.machines.iter().filter(|(_, found)| found.up).map(|(node, _)| *node).collect();
        for node in there {
            let session = self.session(node);
            let machine = self.machines.get_mut(&node).expect("found above");
            machine.beats += 1;
            let heartbeat = Heartbeat {
                incarnation: Incarnation(machine.incarnation),
                sequence: machine.beats,
                cpu_used: 0.5,
                memory_used_bytes: 1 << 30,
                routes: LogIndex(0),
                leaving: 0,
                heat: Default::default(),
            };
            self.give(Input::Heartbeat { session, heartbeat });
        }
    }

    /// The first member of each job says where it stands.
    pub fn progresses(&mut self) {
        let firsts: Vec<(RankId, Generation)> = self
            .memberships
            .iter()
            .filter(|(id, found)| found.members.first().is_some_and(|first| first.id == **id))
            .filter(|(id, _)| self.trainings.get(&id.job).is_some_and(|training| training.since.is_some()))
            .map(|(id, found)| (*id, found.generation))
            .collect();
        for (id, generation) in firsts {
            let step = self.steps(id.job);
            let session = self.session(self.places[&id]);
            let progress = Progress {
                generation,
                step: stoke_protocol::ids::Step(step),
                steps: stoke_protocol::ids::Step(u64::MAX),
                loss: 1.0,
                accuracy: 0.5,
                learning_rate: 1e-3,
                samples_per_second: 1.0,
                compute_ms: self.pace.step_ms as f32,
                exchange_ms: 1.0,
                apply_ms: 1.0,
                samples: step,
                skipped: 0,
                lanes: 1,
                rl: None,
            };
            self.give(Input::Progress { session, id, progress });
        }
    }

    /// Steps that are done now.
    fn steps(&self, job: JobId) -> u64 {
        let training = &self.trainings[&job];
        training.steps + training.since.map_or(0, |(since, step_ms)| (self.now_ms - since) / step_ms)
    }

    /// Time passes, with a heartbeat and a tick every half second.
    pub fn run(&mut self, ms: u64) {
        let end = self.now_ms + ms;
        while self.now_ms < end {
            let next = (self.now_ms + HEARTBEAT_MS).min(end);
            while let Some(Reverse((due, happening))) = self.due.peek().cloned() {
                if due > next {
                    break;
                }
                self.due.pop();
                self.now_ms = self.now_ms.max(due);
                self.happen(happening);
            }
            self.now_ms = next;
            self.heartbeats();
            self.give(Input::Tick);
        }
    }

    /// Time in which nothing happens but steps: nobody is late for it.
    pub fn skip(&mut self, ms: u64) {
        self.now_ms += ms;
        self.heartbeats();
        self.progresses();
    }

    /// Nothing is on its way.
    pub fn is_calm(&self) -> bool {
        self.due.is_empty()
    }

    pub fn ranks(&self) -> Vec<RankId> {
        self.places.keys().copied().collect()
    }

    pub fn place(&self, id: RankId) -> Option<NodeId> {
        self.places.get(&id).copied()
    }

    fn after(&mut self, ms: u64, happening: Happening) {
        self.due.push(Reverse((self.now_ms + ms, happening)));
    }

    /// What an agent does with a frame.
    fn obey(&mut self, node: NodeId, message: ToNode) {
        if !self.machines.get(&node).is_some_and(|machine| machine.up) {
            return;
        }
        match message {
            ToNode::Start(start) => {
                self.machines.get_mut(&node).expect("it is up").ranks.insert(start.id);
                self.places.insert(start.id, node);
                self.after(self.pace.boot_ms, Happening::Ready(start.id));
            }
            ToNode::Membership { id, membership } => self.enter(id, membership),
            ToNode::Stop { id, .. } | ToNode::Release { id } => self.after(10, Happening::Exited(id)),
            _ => {}
        }
    }

    fn enter(&mut self, id: RankId, membership: Membership) {
        let known =
            self.memberships.get(&id).map(|known| (known.generation, known.joining.iter().any(|other| other.id == id)));
        let joins = membership.joining.iter().any(|other| other.id == id);
        if known.is_some_and(|(generation, _)| generation > membership.generation) || !self.places.contains_key(&id) {
            return;
        }
        let generation = membership.generation;
        let is_first = membership.members.first().is_some_and(|first| first.id == id);
        let is_new = known.is_none_or(|(known, _)| known != generation);
        let planned = membership.after.is_some();
        if joins && known.is_none_or(|(_, joining)| !joining) {
            self.after(self.pace.join_ms, Happening::Joined(id, generation));
        }
        if is_first && is_new {
            // Members that all live go on between two of their steps.
            let training = self.trainings.entry(id.job).or_default();
            let rest = training
                .since
                .filter(|_| planned)
                .map_or(0, |(since, step_ms)| step_ms - (self.now_ms - since) % step_ms);
            self.after(self.pace.form_ms + rest, Happening::Resumed(id, generation));
        }
        self.memberships.insert(id, membership);
    }

    fn report(&mut self, id: RankId, event: RankEvent) {
        let Some(node) = self.places.get(&id).copied() else { return };
        let session = self.session(node);
        let machine = self.machines.get_mut(&node).expect("it has a rank");
        if !machine.up {
            return;
        }
        machine.reports += 1;
        let report = Report { sequence: machine.reports, id, event };
        self.give(Input::Report { session, report });
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Ready(id) => {
                let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1 + (id.rank.0 % 60_000) as u16));
                self.report(id, RankEvent::Ready { address });
            }
            Happening::Resumed(id, generation) => {
                let newest = self.memberships.get(&id).filter(|found| found.generation == generation);
                let Some(ranks) = newest.map(|found| found.members.len() as u64) else { return };
                self.settle(id.job);
                // The rank with the most lanes is waited for.
                let step_ms = self.pace.step_ms * self.lanes.div_ceil(ranks) * ranks / self.lanes;
                let step_ms = step_ms.max(self.pace.step_ms);
                let (now, training) = (self.now_ms, self.trainings.entry(id.job).or_default());
                training.lost_ms += now - training.stands_since;
                (training.since, training.generation) = (Some((now, step_ms)), generation);
                let step = stoke_protocol::ids::Step(training.steps);
                self.report(id, RankEvent::Resumed { generation, step });
            }
            Happening::Joined(id, _) => {
                let Some(generation) = self.memberships.get(&id).map(|found| found.generation) else { return };
                let step = stoke_protocol::ids::Step(self.steps(id.job));
                self.report(id, RankEvent::Joined { generation, step });
            }
            Happening::Exited(id) => self.end(id, Exit::Code(0)),
        }
    }

    /// Whole steps count; what was begun does not.
    fn settle(&mut self, job: JobId) {
        let now = self.now_ms;
        let training = self.trainings.entry(job).or_default();
        let Some((since, step_ms)) = training.since.take() else { return };
        let (done, begun) = ((now - since) / step_ms, (now - since) % step_ms);
        training.steps += done;
        // Steps that took longer than they need, and the one that was begun.
        training.lost_ms += done * (step_ms - self.pace.step_ms) + begun;
        training.stands_since = now;
    }

    fn end(&mut self, id: RankId, exit: Exit) {
        self.report(id, RankEvent::Exited { exit });
        if let Some(node) = self.places.remove(&id) {
            self.machines.get_mut(&node).expect("it had a rank").ranks.remove(&id);
        }
        self.memberships.remove(&id);
    }

    /// The job of a rank stands still from now on; what is wrong is found later.
    pub fn stand_still(&mut self, job: JobId) {
        self.settle(job);
    }

    /// A rank's process dies: its agent sees it at once.
    pub fn kill_rank(&mut self, id: RankId) {
        self.settle(id.job);
        self.end(id, Exit::Signal(9));
    }

    /// A rank's parameters are not those of the others: every member sees it at the end of the step.
    pub fn corrupt(&mut self, id: RankId) {
        let Some(membership) = self.memberships.get(&id).cloned() else { return };
        self.settle(id.job);
        let step = stoke_protocol::ids::Step(self.trainings[&id.job].steps);
        let fingerprint = |member: RankId| stoke_protocol::ids::Fingerprint(u64::from(member != id));
        let replicas: Vec<_> = membership.members.iter().map(|member| (member.id, fingerprint(member.id))).collect();
        for member in membership.members.iter() {
            let (generation, replicas) = (membership.generation, replicas.clone().into());
            self.report(member.id, RankEvent::Differ { generation, step, replicas });
        }
    }

    /// Of a job, those that own lanes now.
    pub fn members(&self, job: JobId) -> usize {
        let run = self.control.cluster().jobs().get(job).and_then(|job| job.run.as_ref());
        run.map_or(0, |run| run.members.len())
    }

    /// A machine is gone, with its ranks; nobody says so.
    pub fn kill_node(&mut self, node: NodeId) {
        let machine = self.machines.get_mut(&node).expect("a machine");
        machine.up = false;
        for id in std::mem::take(&mut machine.ranks) {
            self.settle(id.job);
            self.places.remove(&id);
            self.memberships.remove(&id);
        }
    }
}

/// The part of a session's number that is its node's.
const SESSION_NODE: u64 = (1 << 32) - 1;

/// The default of the coordinator.
const HEARTBEAT_MS: u64 = 500;
