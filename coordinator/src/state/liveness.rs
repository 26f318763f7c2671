//! Who is heard of: sessions, leases, and when a silent node is lost. Volatile: a restart forgets it and gives every node the
//! failover grace to come back in.
//! It never frees anything by itself: it tells, and the telling is journalled (`Event::NodeLost`).
//!
//! | lease  | event                                  | next   |
//! |--------|----------------------------------------|--------|
//! | live   | nothing heard for `lease_ms`, or session closed | silent |
//! | silent | heartbeat or frame in its session      | live   |
//! | silent | nothing for `lost_grace_ms` more; one that has not connected since the start: failover grace over | lost: forgotten until its next hello |
//!
//! H1 (I4): a lease is a hint. H2 (F17): a node that has not connected since the coordinator started is not lost before the failover
//! grace: all of them have to reconnect first. One that has, and is silent again, is lost as ever.
//! H3 (I5): a node has one session, the newest; words in another are not heard. H4: silence counts only while the coordinator itself runs: after
//! it was stopped for a while it listens anew, and after a lease or more as if it had just started. H5: a node whose session is open and that has not spoken in it yet may be
//! waiting for its welcome, which a slow disk holds back: it is not lost before the failover grace, or the end of the session.

use std::collections::{BTreeMap, BTreeSet};

use stoke_protocol::ids::{Incarnation, NodeId};
use stoke_protocol::message::node::Heartbeat;

use super::control::SessionId;
use super::planted::PlantedBug;
use super::time::Mono;

/// Of a lease, and at least: without a tick for so long, where they come every 100 ms, the coordinator was stopped, or its machine was, and its own
/// ears were closed (H4).
const STOPPED_PART: u64 = 3;
const STOPPED_MS_MIN: u64 = 250;

#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timings {
    /// Between heartbeats: a sixth of the lease, so that five in a row may be lost.
    pub heartbeat_ms: u64,
    /// Without a word for so long a node is silent: it gets no new ranks.
    pub lease_ms: u64,
    /// Silent for so long on top, it is lost: its ranks are taken as gone.
    pub lost_grace_ms: u64,
    /// After its start the coordinator takes no node as lost before this that has not connected yet: all of them have to reconnect first.
    pub failover_grace_ms: u64,
    /// Ranks of a generation that are not all ready after this long are stopped, and the job is tried again: a process that hangs at its
    /// start must not hold a gang's room for ever.
    pub start_max_ms: u64,
    /// A job that makes room for a more urgent one has so long for its checkpoint; then it stops, and begins at the one before. Ranks that die or
    /// hang and stores that fail are seen sooner: a large checkpoint must not be given up.
    pub yield_max_ms: u64,
    /// A job that has made room is not asked again for so long after it runs: it must get further in between.
    pub spared_ms: u64,
    /// A rank whose job has ended is told to stop, again and again, when it is still there after this long.
    pub exit_max_ms: u64,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            heartbeat_ms: 500,
            lease_ms: 3_000,
            lost_grace_ms: 1_000,
            failover_grace_ms: 30_000,
            start_max_ms: 120_000,
            yield_max_ms: 300_000,
            spared_ms: 60_000,
            exit_max_ms: 30_000,
        }
    }
}

impl Timings {
    /// For networks that hold a packet back for less than half a second: a silent node is lost after 1.1 s, not 4 s. Five heartbeats in a row
    /// may be lost here too.
    pub fn fast() -> Self {
        Self { heartbeat_ms: 150, lease_ms: 900, lost_grace_ms: 200, ..Self::default() }
    }
}

#[derive(Clone, PartialEq, Debug)]
pub struct Liveness {
    timings: Timings,
    started: Mono,
    leases: BTreeMap<NodeId, Lease>,
    sessions: BTreeMap<SessionId, NodeId>,
    live: BTreeSet<NodeId>,
    /// The last tick (H4).
    ticked: Mono,
    bug: Option<PlantedBug>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Lease {
    pub session: Option<SessionId>,
    pub incarnation: Incarnation,
    /// Whether it has connected since the coordinator started (H2).
    pub connected: bool,
    /// Whether it has spoken in its session (H5).
    pub spoken: bool,
    pub heard: Mono,
    pub heartbeat: Option<Heartbeat>,
}

impl Liveness {
    /// Before any node has connected: those in `expected` have the grace to do so.
    pub fn new(timings: Timings, now: Mono, expected: impl Iterator<Item = (NodeId, Incarnation)>) -> Self {
        let lease = |incarnation| Lease {
            session: None,
            incarnation,
            connected: false,
            spoken: false,
            heard: now,
            heartbeat: None,
        };
        Self {
            timings,
            started: now,
            leases: expected.map(|(node, incarnation)| (node, lease(incarnation))).collect(),
            sessions: BTreeMap::new(),
            live: BTreeSet::new(),
            ticked: now,
            bug: None,
        }
    }

    pub fn plant(&mut self, bug: Option<PlantedBug>) {
        self.bug = bug;
    }

    pub fn timings(&self) -> &Timings {
        &self.timings
    }

    /// Nodes with a session and a lease.
    pub fn live(&self) -> &BTreeSet<NodeId> {
        &self.live
    }

    pub fn lease(&self, node: NodeId) -> Option<&Lease> {
        self.leases.get(&node)
    }

    pub fn session(&self, node: NodeId) -> Option<SessionId> {
        self.leases.get(&node)?.session
    }

    pub fn all_sessions(&self) -> impl Iterator<Item = SessionId> {
        self.sessions.keys().copied()
    }

    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// The node of a session, while it is the node's newest (H3).
    pub fn node(&self, session: SessionId) -> Option<(NodeId, Incarnation)> {
        let node = self.sessions.get(&session)?;
        Some((*node, self.leases.get(node)?.incarnation))
    }

    /// A session has opened; gives the one that it replaces.
    pub fn open(&mut self, now: Mono, node: NodeId, session: SessionId, incarnation: Incarnation) -> Option<SessionId> {
        let lease =
            Lease { session: Some(session), incarnation, connected: true, spoken: false, heard: now, heartbeat: None };
        let before = self.leases.insert(node, lease).and_then(|lease| lease.session).filter(|old| *old != session);
        before.map(|old| self.sessions.remove(&old));
        self.sessions.insert(session, node);
        self.live.insert(node);
        before
    }

    /// A session has closed; its node is silent at once. Gives the node.
    pub fn close(&mut self, session: SessionId) -> Option<NodeId> {
        let node = self.sessions.remove(&session)?;
        if let Some(lease) = self.leases.get_mut(&node) {
            lease.session = None;
        }
        self.live.remove(&node);
        Some(node)
    }

    /// A node is no member any more. Gives its session.
    pub fn forget(&mut self, node: NodeId) -> Option<SessionId> {
        self.live.remove(&node);
        let session = self.leases.remove(&node)?.session?;
        self.sessions.remove(&session);
        Some(session)
    }

    /// Anything heard in a session renews the lease. Gives whether the node was silent until now.
    pub fn heard(&mut self, now: Mono, session: SessionId, heartbeat: Option<Heartbeat>) -> bool {
        let Some(node) = self.sessions.get(&session) else { return false };
        let Some(lease) = self.leases.get_mut(node) else { return false };
        if heartbeat.is_some_and(|heartbeat| heartbeat.incarnation != lease.incarnation) {
            return false;
        }
        (lease.heard, lease.connected, lease.spoken) = (now, true, true);
        // Datagrams may overtake each other.
        let newer = |old: &Heartbeat| heartbeat.is_some_and(|new| new.sequence > old.sequence);
        if lease.heartbeat.as_ref().is_none_or(newer) && heartbeat.is_some() {
            lease.heartbeat = heartbeat;
        }
        self.live.insert(*node)
    }

    /// Whose lease is over, and who is lost; those are forgotten here.
    pub fn tick(&mut self, now: Mono) -> Vec<(NodeId, Incarnation, Option<SessionId>)> {
        self.forgive(now);
        let Timings { lease_ms, lost_grace_ms, failover_grace_ms, .. } = self.timings;
        let skipped = self.bug == Some(PlantedBug::FailoverGraceSkipped);
        let graced = now >= self.started.plus_ms(failover_grace_ms) || skipped;
        let mut lost = Vec::new();
        for (node, lease) in &self.leases {
            let silent_ms = now.since_ms(lease.heard);
            if silent_ms >= lease_ms {
                self.live.remove(node);
            }
            let unwelcomed = lease.session.is_some() && !lease.spoken && silent_ms < failover_grace_ms;
            if silent_ms >= lease_ms + lost_grace_ms && (graced || lease.connected) && !unwelcomed {
                lost.push((*node, lease.incarnation, lease.session));
            }
        }
        for (node, _, session) in &lost {
            self.leases.remove(node);
            session.map(|session| self.sessions.remove(&session));
        }
        lost
    }

    /// H4: nobody could be heard since the last tick if that is long ago.
    fn forgive(&mut self, now: Mono) {
        let stopped_ms = now.since_ms(std::mem::replace(&mut self.ticked, now));
        let least_ms = (self.timings.lease_ms / STOPPED_PART).max(STOPPED_MS_MIN);
        if stopped_ms < least_ms || self.bug == Some(PlantedBug::StopCountsAsSilence) {
            return;
        }
        let anew = stopped_ms >= self.timings.lease_ms;
        if anew {
            self.started = now;
        }
        for lease in self.leases.values_mut() {
            lease.heard = if anew { now } else { lease.heard.plus_ms(stopped_ms).min(now) };
            lease.connected &= !anew;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId(1);

    fn liveness(failover_grace_ms: u64) -> Liveness {
        let timings = Timings { failover_grace_ms, ..Timings::default() };
        Liveness::new(timings, Mono(0), [(NODE, Incarnation(1))].into_iter())
    }

    /// Every tick up to `until`; who is lost by then.
    fn run(liveness: &mut Liveness, (from, until): (u64, u64)) -> usize {
        (from..=until).step_by(100).map(|at| liveness.tick(Mono(at)).len()).sum()
    }

    #[test]
    fn silence_while_the_coordinator_itself_was_stopped_does_not_count() {
        let mut liveness = liveness(30_000);
        liveness.open(Mono(0), NODE, SessionId(1), Incarnation(1));
        assert_eq!(run(&mut liveness, (0, 1_000)), 0);
        // Less than a lease: what it had of its lease before is gone, and no more.
        assert_eq!(run(&mut liveness, (3_500, 6_400)), 0);
        assert!(liveness.heard(Mono(6_450), SessionId(1), None));
        // A lease and more: as after a start, the node may come back until the failover grace is over.
        assert_eq!(run(&mut liveness, (20_000, 49_900)), 0, "H4");
        assert!(liveness.heard(Mono(49_950), SessionId(1), None));
        assert_eq!(run(&mut liveness, (50_000, 53_900)), 0);
        assert_eq!(run(&mut liveness, (54_000, 54_000)), 1, "it has come back, and is silent again");
    }

    #[test]
    fn a_node_that_waits_for_its_welcome_is_not_lost() {
        let mut liveness = liveness(30_000);
        liveness.open(Mono(0), NODE, SessionId(1), Incarnation(1));
        assert_eq!(run(&mut liveness, (0, 29_900)), 0, "H5");
        assert_eq!(run(&mut liveness, (30_000, 30_000)), 1);
        liveness.open(Mono(40_000), NODE, SessionId(2), Incarnation(1));
        liveness.close(SessionId(2));
        assert_eq!(run(&mut liveness, (30_100, 43_900)), 0);
        assert_eq!(run(&mut liveness, (44_000, 44_000)), 1, "its session has ended");
    }

    #[test]
    fn silent_node_is_lost_after_lease_and_grace() {
        let mut liveness = liveness(0);
        liveness.open(Mono(0), NODE, SessionId(1), Incarnation(1));
        assert_eq!(run(&mut liveness, (0, 2_900)), 0);
        assert!(liveness.live().contains(&NODE));
        assert!(liveness.tick(Mono(3_000)).is_empty() && !liveness.live().contains(&NODE));
        assert!(liveness.heard(Mono(4_000), SessionId(1), None));
        assert_eq!(run(&mut liveness, (3_100, 7_900)), 0);
        assert_eq!(liveness.tick(Mono(8_000)), [(NODE, Incarnation(1), Some(SessionId(1)))]);
        assert!(!liveness.heard(Mono(8_001), SessionId(1), None), "a lost node needs a new hello");
    }

    #[test]
    fn a_node_that_has_not_come_back_is_not_lost_before_the_failover_grace() {
        let mut liveness = liveness(30_000);
        assert_eq!(run(&mut liveness, (0, 29_900)), 0);
        assert_eq!(liveness.tick(Mono(30_000)).len(), 1);
    }

    #[test]
    fn a_node_that_came_back_and_is_silent_again_is_lost_within_the_failover_grace() {
        let mut liveness = liveness(30_000);
        liveness.open(Mono(1_000), NODE, SessionId(1), Incarnation(1));
        liveness.close(SessionId(1));
        assert_eq!(run(&mut liveness, (0, 4_900)), 0);
        assert_eq!(liveness.tick(Mono(5_000)), [(NODE, Incarnation(1), None)], "H2");
    }

    #[test]
    fn the_newest_session_is_the_only_one_that_is_heard() {
        let mut liveness = liveness(0);
        assert_eq!(liveness.open(Mono(0), NODE, SessionId(1), Incarnation(1)), None);
        assert_eq!(liveness.open(Mono(0), NODE, SessionId(2), Incarnation(1)), Some(SessionId(1)));
        assert_eq!(liveness.node(SessionId(1)), None);
        assert_eq!(liveness.close(SessionId(1)), None);
        assert!(liveness.live().contains(&NODE));
    }
}
