//! The room that is left while a plan is made: the members' free room less what the plan has already given away. Owns the search for nodes;
//! never decides who is served first (`placement.rs`). Lives for one plan.

use std::collections::{BTreeMap, BTreeSet};

use stoke_protocol::ids::{NodeId, Rank};

use super::machine::{Ask, Seat};
use super::members::{Members, Node, Room};
use super::planted::PlantedBug;

/// Nodes that a plan may touch before it makes a copy of the index.
const TOUCHED_MAX: usize = 256;

/// Members, as a plan sees them.
#[derive(Clone)]
pub struct Left<'a> {
    members: &'a Members,
    live: &'a BTreeSet<NodeId>,
    bug: Option<PlantedBug>,
    /// What is free on the nodes that this plan has changed.
    given: BTreeMap<NodeId, Room>,
    /// Nodes of `given` by free processors; the members' own index is wrong about them.
    touched: BTreeSet<(u32, NodeId)>,
    /// A copy of the index that is right about all nodes, from the moment on when many were touched: most plans place a job or two, and a
    /// copy of ten thousand entries would cost more than the rest of the plan.
    copy: Option<BTreeSet<(u32, NodeId)>>,
    kept: BTreeSet<NodeId>,
    /// Not for the rank that is looked at.
    shunned: Option<NodeId>,
}

/// A node with room for so many ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Candidate {
    node: NodeId,
    slots: u32,
}

impl<'a> Left<'a> {
    pub fn new(members: &'a Members, live: &'a BTreeSet<NodeId>, bug: Option<PlantedBug>) -> Self {
        let (given, touched, kept) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        Self { members, live, bug, given, touched, copy: None, kept, shunned: None }
    }

    /// Nodes for a whole gang, rank by rank, or how many ranks there would be room for.
    ///
    /// Ranks without accelerators are spread: one a node, most free processors first, and a second on a node only when every node has one.
    /// Such ranks are bound by their machine's memory and cores, and a machine that dies takes one of them along, not all.
    /// Ranks with accelerators are packed: links inside a machine are many times faster than between machines, and whole machines stay
    /// free for large gangs.
    pub fn find(&self, ask: &Ask) -> Result<Vec<NodeId>, u32> {
        if !ask.seats.is_empty() {
            return self.seat(ask);
        }
        if ask.room.gpus > 0 { self.pack(ask) } else { self.spread(ask) }
    }

    /// The same anywhere but on one node.
    pub fn find_beside(&mut self, ask: &Ask, shunned: NodeId) -> Result<Vec<NodeId>, u32> {
        self.shunned = Some(shunned);
        let found = self.find(ask);
        self.shunned = None;
        found
    }

    /// Unequal ranks: the largest first, each on the node that it was meant for if there is room, else on the one with the most free processors.
    fn seat(&self, ask: &Ask) -> Result<Vec<NodeId>, u32> {
        let mut left = self.clone();
        let mut order: Vec<(Rank, Seat)> = (0..).map(Rank).zip(ask.seats.iter().copied()).collect();
        order.sort_by_key(|(rank, seat)| (std::cmp::Reverse(seat.memory_bytes), *rank));
        let mut found = BTreeMap::new();
        for (rank, seat) in order {
            let one = Ask { seats: Vec::new(), ..ask.of(rank) };
            let meant = Some(seat.node).filter(|node| left.slots(*node, &one) > 0);
            let other = || left.most_free().map(|(_, node)| node).find(|node| left.slots(*node, &one) > 0);
            if let Some(node) = meant.or_else(other) {
                left.give(&[node], &one);
                found.insert(rank, node);
            }
        }
        let placed = u32::try_from(found.len()).unwrap_or(u32::MAX);
        if placed < ask.ranks { Err(placed) } else { Ok(found.into_values().collect()) }
    }

    fn spread(&self, ask: &Ask) -> Result<Vec<NodeId>, u32> {
        let needed = ask.ranks as usize;
        let mut found: Vec<Candidate> = Vec::new();
        for (cpus, node) in self.most_free() {
            if cpus < ask.room.cpus || found.len() == needed {
                break;
            }
            let slots = self.slots(node, ask);
            if slots > 0 {
                found.push(Candidate { node, slots });
            }
        }
        deal(&found, ask.ranks, self.bug)
    }

    /// Nodes by free processors, the most first.
    fn most_free(&self) -> impl Iterator<Item = (u32, NodeId)> {
        let index = self.copy.as_ref().unwrap_or(self.members.by_cpus());
        let right = move |(_, node): &&(u32, NodeId)| self.copy.is_some() || !self.given.contains_key(node);
        let mut untouched = index.iter().rev().filter(right).copied().peekable();
        let mut touched = self.touched.iter().rev().copied().peekable();
        std::iter::from_fn(move || if untouched.peek() >= touched.peek() { untouched.next() } else { touched.next() })
    }

    fn pack(&self, ask: &Ask) -> Result<Vec<NodeId>, u32> {
        let untouched = self.members.by_gpus().iter().map(|(_, node)| *node);
        let untouched = untouched.filter(|node| !self.given.contains_key(node));
        // A node that had none may have some by now.
        let nodes = untouched.chain(self.given.keys().copied());
        let candidate = |node| Candidate { node, slots: self.slots(node, ask) };
        let mut found: Vec<Candidate> = nodes.map(candidate).filter(|candidate| candidate.slots > 0).collect();
        let room: u32 = found.iter().fold(0, |sum, candidate| sum.saturating_add(candidate.slots));
        if room < ask.ranks && self.bug != Some(PlantedBug::GangPlacedPartially) {
            return Err(room);
        }
        let mut placement = Vec::new();
        while (placement.len() as u32) < ask.ranks.min(room) {
            let left = ask.ranks - placement.len() as u32;
            // The tightest node that takes all that is left, else the roomiest.
            let tightest =
                found.iter().enumerate().filter(|(_, c)| c.slots >= left).min_by_key(|(_, c)| (c.slots, c.node));
            let roomiest = || found.iter().enumerate().max_by_key(|(_, c)| (c.slots, std::cmp::Reverse(c.node)));
            let Some((at, best)) = tightest.or_else(roomiest) else { break };
            placement.extend(std::iter::repeat_n(best.node, best.slots.min(left) as usize));
            found.remove(at);
        }
        Ok(placement)
    }

    /// How many ranks fit on a node now.
    fn slots(&self, id: NodeId, ask: &Ask) -> u32 {
        let Some(node) = self.members.node(id) else { return 0 };
        if self.kept.contains(&id) || self.shunned == Some(id) || !self.is_usable(node) || !carries(node, ask) {
            return 0;
        }
        let slots = self.free(node).slots(&ask.room);
        // A node on probation gets one rank, also of a plan that places several.
        let given = self.given.contains_key(&id);
        node.slots_max().map_or(slots, |most| if given { 0 } else { slots.min(most) })
    }

    pub fn is_usable(&self, node: &Node) -> bool {
        node.serves(self.bug) && (self.live.contains(&node.id) || self.bug == Some(PlantedBug::SilentNodePlaced))
    }

    pub fn is_kept(&self, id: NodeId) -> bool {
        self.kept.contains(&id)
    }

    pub fn free(&self, node: &Node) -> Room {
        let mut free = self.given.get(&node.id).copied().unwrap_or_else(|| node.free());
        if self.bug == Some(PlantedBug::MemoryOvercommitted) {
            free.memory_bytes = u64::MAX;
        }
        free
    }

    /// Gives room away.
    pub fn give(&mut self, placement: &[NodeId], ask: &Ask) {
        for (rank, id) in (0..).map(Rank).zip(placement) {
            let Some(node) = self.members.node(*id) else { continue };
            let before = self.given.get(id).copied().unwrap_or_else(|| node.free());
            let mut after = before;
            after.take(&ask.room_of(rank));
            self.set(*id, before, after);
        }
        if self.touched.len() > TOUCHED_MAX {
            let untouched = self.members.by_cpus().iter().filter(|(_, node)| !self.given.contains_key(node));
            self.copy = Some(untouched.copied().chain(std::mem::take(&mut self.touched)).collect());
        }
    }

    /// What a rank holds is as good as free.
    pub fn give_back(&mut self, id: NodeId, room: &Room) {
        let Some(node) = self.members.node(id) else { return };
        let before = self.given.get(&id).copied().unwrap_or_else(|| node.free());
        let mut after = before;
        after.add(room);
        self.set(id, before, after);
    }

    fn set(&mut self, id: NodeId, before: Room, after: Room) {
        self.given.insert(id, after);
        let index = self.copy.as_mut().unwrap_or(&mut self.touched);
        index.remove(&(before.cpus, id));
        index.insert((after.cpus, id));
    }

    /// Whether ranks of this kind could be on this node, if there were room.
    pub fn could_take(&self, id: NodeId, ask: &Ask) -> bool {
        let usable = self.members.node(id).filter(|node| self.is_usable(node) && carries(node, ask));
        usable.is_some_and(|node| !self.kept.contains(&id) && Room::of(&node.capacity).slots(&ask.room) > 0)
    }

    /// What frees up on these nodes is for one job.
    pub fn keep_nodes(&mut self, nodes: &[NodeId]) {
        self.kept.extend(nodes);
    }

    /// How many ranks would fit if no other job were there: on usable nodes, whole machines.
    pub fn when_empty(&self, ask: &Ask) -> u32 {
        let nodes = self.members.nodes().filter(|node| self.is_usable(node) && carries(node, ask));
        if !ask.seats.is_empty() {
            let mut empty = Self::new(self.members, self.live, self.bug);
            nodes.for_each(|node| empty.set(node.id, node.free(), Room::of(&node.capacity)));
            return empty.seat(ask).map_or_else(|placed| placed, |_| ask.ranks);
        }
        nodes.fold(0, |sum, node| sum.saturating_add(Room::of(&node.capacity).slots(&ask.room)))
    }

    /// Keeps enough nodes for a gang that has waited too long, whole machines, those with the most room first: what frees up there is for it.
    /// The choice is stable from plan to plan, because nothing else is placed on them meanwhile.
    pub fn keep(&mut self, ask: &Ask) {
        let usable = self.members.nodes().filter(|node| self.is_usable(node) && carries(node, ask));
        let mut nodes: Vec<(u32, u32, NodeId)> = usable
            .filter(|node| !self.kept.contains(&node.id))
            .map(|node| (self.free(node).slots(&ask.room), Room::of(&node.capacity).slots(&ask.room), node.id))
            .filter(|(_, whole, _)| *whole > 0)
            .collect();
        nodes.sort_unstable_by_key(|(free, whole, id)| (std::cmp::Reverse(*free), std::cmp::Reverse(*whole), *id));
        let mut room = 0u32;
        for (_, whole, id) in nodes {
            if room >= ask.ranks {
                break;
            }
            room = room.saturating_add(whole);
            self.kept.insert(id);
        }
    }
}

/// Whether the node has every label that is asked for.
pub fn carries(node: &Node, ask: &Ask) -> bool {
    ask.labels.iter().all(|(key, value)| node.labels.get(key) == Some(value))
}

/// Deals ranks to candidates in rounds, one each, so that the loads differ by as little as they can; ranks of a node are neighbours.
fn deal(found: &[Candidate], ranks: u32, bug: Option<PlantedBug>) -> Result<Vec<NodeId>, u32> {
    let room = found.iter().fold(0u32, |sum, candidate| sum.saturating_add(candidate.slots));
    if room < ranks && bug != Some(PlantedBug::GangPlacedPartially) {
        return Err(room);
    }
    let mut counts = vec![0; found.len()];
    let mut left = ranks.min(room);
    while left > 0 {
        for (count, candidate) in counts.iter_mut().zip(found) {
            if left > 0 && *count < candidate.slots {
                *count += 1;
                left -= 1;
            }
        }
    }
    let deal =
        found.iter().zip(counts).flat_map(|(candidate, count)| std::iter::repeat_n(candidate.node, count as usize));
    Ok(deal.collect())
}
