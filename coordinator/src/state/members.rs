//! The nodes and what they hold. Owns identity, incarnations, capacity, and the room that ranks take; never decides where a rank goes
//! (`placement.rs`) and knows nothing of heartbeats (`liveness.rs`).
//!
//! M1 (I5): a node's incarnation only grows; what an older one says changes nothing.
//! M2 (I13): the room held by ranks is at most the capacity, unless the node came back smaller (`shrunk`).
//! M3 (I15): room is given back by the exit of the rank, or by an inventory of the node that no longer has it. A lost node keeps its ranks
//!   on its books, and takes no new ones until it is back.
//! M4: each report of an incarnation is taken in at most once, in order.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::{Incarnation, JobId, NodeId};
use stoke_protocol::message::client::DrainView;
use stoke_protocol::message::node::{Capacity, GatewayAt};
use stoke_protocol::message::rank::RankId;

use super::planted::PlantedBug;
use super::quarantine::Quarantine;
use super::time::Time;

/// Members: more would make a snapshot slow and a plan longer than a heartbeat.
pub const NODES_MAX: usize = 20_000;

/// Jobs in a row whose ranks a node could not start before it gets no more.
const UNSTARTABLE_JOBS_MAX: usize = 3;

/// Processors, memory and accelerators: what a rank takes, or what is left.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub struct Room {
    pub cpus: u32,
    pub memory_bytes: u64,
    pub gpus: u32,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Members {
    last: NodeId,
    nodes: BTreeMap<NodeId, Node>,
    /// Nodes that are up, by free processors and by free accelerators: where the planner starts looking.
    by_cpus: BTreeSet<(u32, NodeId)>,
    by_gpus: BTreeSet<(u32, NodeId)>,
    up: u32,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Node {
    pub id: NodeId,
    pub name: String,
    pub address: String,
    /// Whether it may get ranks, as far as the journal knows. A node that has joined and never opened a session is not up.
    pub up: bool,
    pub incarnation: Incarnation,
    /// The newest session of this incarnation; what an older one says comes too late.
    pub session: u64,
    /// The last report of this incarnation that was taken in.
    pub reported: u64,
    /// How many reports of this incarnation were taken in: not more than their last number, or one counted twice.
    pub taken: u64,
    pub capacity: Capacity,
    /// Where its gateway takes requests over HTTP, if it has one.
    pub gateway: Option<GatewayAt>,
    pub labels: BTreeMap<String, String>,
    pub held: BTreeMap<RankId, Room>,
    pub used: Room,
    /// It came back with less than its ranks hold.
    pub shrunk: bool,
    /// Jobs whose ranks could not even be started here, since one could.
    pub unstartable: BTreeSet<JobId>,
    /// It is being emptied, or is empty and stays so.
    pub drain: Option<Drain>,
    /// Ranks fail here, or it is on probation after that.
    pub quarantine: Option<Quarantine>,
    pub changed: Time,
}

/// What a node says of itself when it connects.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Offer {
    pub name: String,
    pub address: String,
    pub capacity: Capacity,
    pub gateway: Option<GatewayAt>,
}

/// A node that is to have no ranks, until somebody lifts it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Drain {
    pub by: String,
    pub since: Time,
    /// After so long its ranks are stopped.
    pub deadline_ms: Option<u64>,
    /// They were.
    pub overdue: bool,
}

/// Why words of a node change nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stale {
    Unknown,
    Incarnation {
        current: Incarnation,
    },
    /// A newer hello of the same incarnation came first.
    Session {
        current: u64,
    },
    /// The report was taken in before.
    Duplicate {
        last: u64,
    },
}

impl Room {
    pub fn of(capacity: &Capacity) -> Self {
        let gpus = u32::try_from(capacity.gpus.len()).unwrap_or(u32::MAX);
        Self { cpus: capacity.cpus, memory_bytes: capacity.memory_bytes, gpus }
    }

    pub fn holds(&self, ask: &Self) -> bool {
        self.cpus >= ask.cpus && self.memory_bytes >= ask.memory_bytes && self.gpus >= ask.gpus
    }

    /// How many times `ask` fits.
    pub fn slots(&self, ask: &Self) -> u32 {
        let times = |have: u64, need: u64| have.checked_div(need).unwrap_or(u64::MAX);
        let slots = times(self.cpus.into(), ask.cpus.into())
            .min(times(self.memory_bytes, ask.memory_bytes))
            .min(times(self.gpus.into(), ask.gpus.into()));
        u32::try_from(slots).unwrap_or(u32::MAX)
    }

    pub fn add(&mut self, other: &Self) {
        self.cpus = self.cpus.saturating_add(other.cpus);
        self.memory_bytes = self.memory_bytes.saturating_add(other.memory_bytes);
        self.gpus = self.gpus.saturating_add(other.gpus);
    }

    pub fn take(&mut self, other: &Self) {
        self.cpus = self.cpus.saturating_sub(other.cpus);
        self.memory_bytes = self.memory_bytes.saturating_sub(other.memory_bytes);
        self.gpus = self.gpus.saturating_sub(other.gpus);
    }
}

impl Drain {
    pub fn view(&self) -> DrainView {
        let Self { by, since, deadline_ms, overdue } = self.clone();
        DrainView { by, since_ms: since.0, deadline_ms, overdue }
    }
}

impl Node {
    /// I11, I16: a machine that starts no process is empty, and so would draw one gang after the other. It is left alone until its agent is
    /// restarted. One job is not enough: its program may be at fault.
    pub fn is_quarantined(&self) -> bool {
        self.is_dead() || self.quarantine.as_ref().is_some_and(|quarantine| !quarantine.probation)
    }

    fn is_dead(&self) -> bool {
        self.unstartable.len() >= UNSTARTABLE_JOBS_MAX
    }

    /// Ranks that may be placed here, where that is not only a question of room: a node on probation has one at a time.
    pub fn slots_max(&self) -> Option<u32> {
        self.quarantine.as_ref().map(|_| u32::from(self.held.is_empty()))
    }

    /// I16: whether it may get ranks, as far as the journal knows.
    pub fn serves(&self, bug: Option<PlantedBug>) -> bool {
        self.up && !self.is_quarantined() && (self.drain.is_none() || bug == Some(PlantedBug::DrainedNodePlaced))
    }

    /// No rank of it is waited for: none is there, or it is lost, and its ranks count as gone.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty() || !self.up
    }

    /// Why it is left alone, and how that ends.
    pub fn quarantine_words(&self) -> String {
        if let Some(quarantine) = self.quarantine.as_ref().filter(|_| !self.is_dead()) {
            let Quarantine { reason, probation } = quarantine;
            return match probation {
                true => format!("{reason}; it is on probation: one rank may try it"),
                false => format!(
                    "{reason}; one rank tries it after some minutes, or mend it and say so: `stoke node release {}`",
                    self.id
                ),
            };
        }
        let jobs: Vec<String> = self.unstartable.iter().map(JobId::to_string).collect();
        format!("it could not start ranks of {}; mend it and restart its agent", jobs.join(", "))
    }

    pub fn free(&self) -> Room {
        let mut free = Room::of(&self.capacity);
        free.take(&self.used);
        free
    }
}

impl Members {
    pub fn join(&mut self, now: Time, name: String) -> NodeId {
        self.last = self.last.next();
        let node = Node {
            id: self.last,
            name,
            address: String::new(),
            up: false,
            incarnation: Incarnation(0),
            session: 0,
            reported: 0,
            taken: 0,
            capacity: Capacity::default(),
            gateway: None,
            labels: BTreeMap::new(),
            held: BTreeMap::new(),
            used: Room::default(),
            shrunk: false,
            unstartable: BTreeSet::new(),
            drain: None,
            quarantine: None,
            changed: now,
        };
        self.nodes.insert(self.last, node);
        self.last
    }

    /// Its id is never given again.
    pub fn remove(&mut self, id: NodeId) {
        self.change(id, |node| node.up = false);
        self.nodes.remove(&id);
    }

    pub fn was_removed(&self, id: NodeId) -> bool {
        (1..=self.last.0).contains(&id.0) && !self.nodes.contains_key(&id)
    }

    /// The newest node's id.
    pub fn last(&self) -> NodeId {
        self.last
    }

    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    pub fn nodes(&self) -> impl ExactSizeIterator<Item = &Node> {
        self.nodes.values()
    }

    pub fn up(&self) -> u32 {
        self.up
    }

    pub(super) fn by_cpus(&self) -> &BTreeSet<(u32, NodeId)> {
        &self.by_cpus
    }

    pub(super) fn by_gpus(&self) -> &BTreeSet<(u32, NodeId)> {
        &self.by_gpus
    }

    /// Whether a session of this incarnation may open (M1).
    pub fn check_hello(
        &self,
        id: NodeId,
        (incarnation, session): (Incarnation, u64),
        bug: Option<PlantedBug>,
    ) -> Result<(), Stale> {
        let node = self.nodes.get(&id).ok_or(Stale::Unknown)?;
        if incarnation < node.incarnation && bug != Some(PlantedBug::IncarnationUnfenced) {
            return Err(Stale::Incarnation { current: node.incarnation });
        }
        let overtaken = incarnation == node.incarnation && session <= node.session;
        if overtaken && bug != Some(PlantedBug::SessionUnfenced) {
            return Err(Stale::Session { current: node.session });
        }
        Ok(())
    }

    /// Whether a report is newer than the last one of its node (M1). Numbers may be left out: an agent that was alone for long drops reports
    /// of checkpoints that nobody waits for any more.
    pub fn check_report(
        &self,
        id: NodeId,
        incarnation: Incarnation,
        sequence: u64,
        bug: Option<PlantedBug>,
    ) -> Result<(), Stale> {
        let node = self.nodes.get(&id).ok_or(Stale::Unknown)?;
        if incarnation != node.incarnation && bug != Some(PlantedBug::IncarnationUnfenced) {
            return Err(Stale::Incarnation { current: node.incarnation });
        }
        if sequence <= node.reported && bug != Some(PlantedBug::ReportsCountedTwice) {
            return Err(Stale::Duplicate { last: node.reported });
        }
        Ok(())
    }

    pub fn reported(&mut self, id: NodeId, sequence: u64) {
        self.change(id, |node| (node.reported, node.taken) = (node.reported.max(sequence), node.taken + 1));
    }

    /// A session has opened. Room that its ranks hold stays held: the inventory is compared by the caller.
    pub fn open(&mut self, now: Time, id: NodeId, (incarnation, session): (Incarnation, u64), offer: Offer) {
        let Offer { name, address, capacity, gateway } = offer;
        self.change(id, |node| {
            if incarnation != node.incarnation {
                (node.reported, node.taken) = (0, 0);
                node.unstartable.clear();
            }
            (node.incarnation, node.session) = (incarnation, session);
            (node.name, node.address, node.up, node.changed) = (name, address, true, now);
            node.labels = capacity.labels.iter().cloned().collect();
            node.capacity = capacity;
            node.gateway = gateway;
            node.shrunk = !Room::of(&node.capacity).holds(&node.used);
        });
    }

    /// Whether a process of this job could be started here.
    pub fn started(&mut self, id: NodeId, job: JobId, could: bool) {
        self.change(id, |node| {
            if could {
                node.unstartable.clear();
            } else if !node.is_dead() {
                node.unstartable.insert(job);
            }
        });
    }

    pub fn drain(&mut self, id: NodeId, drain: Option<Drain>) {
        self.change(id, |node| node.drain = drain);
    }

    pub fn quarantine(&mut self, id: NodeId, quarantine: Option<Quarantine>) {
        self.change(id, |node| node.quarantine = quarantine);
    }

    /// Nothing that has happened speaks against it any more.
    pub fn pardon(&mut self, id: NodeId) {
        self.change(id, |node| {
            node.quarantine = None;
            node.unstartable.clear();
        });
    }

    pub fn lose(&mut self, now: Time, id: NodeId) {
        self.change(id, |node| (node.up, node.changed) = (false, now));
    }

    /// The rank takes its room. Whether there is room was checked for the whole gang.
    pub fn hold(&mut self, id: NodeId, rank: RankId, room: Room) {
        self.change(id, |node| {
            let before = node.held.insert(rank, room);
            assert!(before.is_none(), "M2: {rank} is placed once");
            node.used.add(&room);
        });
    }

    /// The rank is gone: its room is free. Gives whether it held any.
    pub fn release(&mut self, id: NodeId, rank: RankId, bug: Option<PlantedBug>) -> bool {
        self.change(id, |node| {
            let Some(room) = node.held.remove(&rank) else { return false };
            node.used.take(&room);
            if bug == Some(PlantedBug::ReleasedTwice) {
                node.used.take(&room);
            }
            node.shrunk = !Room::of(&node.capacity).holds(&node.used);
            true
        })
        .unwrap_or(false)
    }

    /// Changes a node and keeps the indexes true.
    fn change<T>(&mut self, id: NodeId, change: impl FnOnce(&mut Node) -> T) -> Option<T> {
        let node = self.nodes.get_mut(&id)?;
        let (free, up) = (node.free(), node.up);
        let changed = change(node);
        let (free_now, up_now) = (node.free(), node.up);
        if (free, up) != (free_now, up_now) {
            if up {
                self.by_cpus.remove(&(free.cpus, id));
                self.by_gpus.remove(&(free.gpus, id));
                self.up -= 1;
            }
            if up_now {
                self.by_cpus.insert((free_now.cpus, id));
                if free_now.gpus > 0 {
                    self.by_gpus.insert((free_now.gpus, id));
                }
                self.up += 1;
            }
        }
        Some(changed)
    }

    /// M2 and the indexes, for every node; the error names the node.
    pub fn check(&self) -> Result<(), String> {
        for node in self.nodes.values() {
            let mut sum = Room::default();
            node.held.values().for_each(|room| sum.add(room));
            if sum != node.used {
                return Err(format!("M2: {} counts {:?} as used, its ranks hold {sum:?}", node.id, node.used));
            }
            if !node.shrunk && !Room::of(&node.capacity).holds(&node.used) {
                return Err(format!(
                    "I13: {} has {:?}, its ranks hold {:?}",
                    node.id,
                    Room::of(&node.capacity),
                    node.used
                ));
            }
            if node.taken > node.reported {
                return Err(format!("M4: {} reported {} times, {} were taken in", node.id, node.reported, node.taken));
            }
            let free = node.free();
            if node.up != self.by_cpus.contains(&(free.cpus, node.id)) {
                return Err(format!("M2: the index of free processors is wrong about {}", node.id));
            }
        }
        let up = self.nodes.values().filter(|node| node.up).count();
        if up != self.by_cpus.len() || up != self.up as usize {
            return Err(format!("M2: {up} nodes are up, the index has {}", self.by_cpus.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stoke_protocol::ids::{Generation, JobId, Rank};

    fn rank(rank: u32) -> RankId {
        RankId { job: JobId(1), generation: Generation(1), rank: Rank(rank) }
    }

    fn members(cpus: u32) -> (Members, NodeId) {
        let mut members = Members::default();
        let id = members.join(Time(0), "n".into());
        let capacity = Capacity { cpus, memory_bytes: 8, ..Capacity::default() };
        members.open(Time(0), id, (Incarnation(1), 1), Offer { capacity, ..Offer::default() });
        (members, id)
    }

    #[test]
    fn room_is_held_until_the_rank_is_gone_also_on_a_lost_node() {
        let (mut members, id) = members(4);
        members.hold(id, rank(0), Room { cpus: 3, memory_bytes: 1, gpus: 0 });
        members.lose(Time(1), id);
        assert_eq!(members.node(id).unwrap().free().cpus, 1);
        members.check().unwrap();
        assert!(members.by_cpus().is_empty());
        assert!(members.release(id, rank(0), None));
        assert!(!members.release(id, rank(0), None));
        assert_eq!(members.node(id).unwrap().free().cpus, 4);
        members.check().unwrap();
    }

    #[test]
    fn stale_words_are_told_apart() {
        let (mut members, id) = members(4);
        assert_eq!(members.check_report(id, Incarnation(1), 1, None), Ok(()));
        members.reported(id, 1);
        assert_eq!(members.check_report(id, Incarnation(1), 1, None), Err(Stale::Duplicate { last: 1 }));
        assert_eq!(members.check_report(id, Incarnation(1), 3, None), Ok(()));
        assert_eq!(
            members.check_report(id, Incarnation(0), 2, None),
            Err(Stale::Incarnation { current: Incarnation(1) })
        );
        assert_eq!(members.check_hello(NodeId(9), (Incarnation(1), 1), None), Err(Stale::Unknown));
    }
}
