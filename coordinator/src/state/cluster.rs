//! The durable state: the fold of the journal. Owns how each event changes members, jobs, checkpoints and tokens, and which orders follow;
//! never decides placement (that comes as an event), never sees a session, and never asks what time it is.
//!
//! K1 (I8): `apply` is a function of the state and the entry; an entry that `check` refuses changes nothing but the index.
//! K2 (I1): the epoch grows by one with each start. K3 (I14): a generation's gang is whole, and each node has the room.
//! K4 (I15): a rank's room is held from the entry that places it to the one that tells of its end.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::{ClusterId, Digest, Epoch, JobId, LogIndex, NodeId, Rank, Step, TokenId};
use stoke_protocol::message::client::TokenScope;
use stoke_protocol::message::join::Wants;
use stoke_protocol::message::node::ToNode;
use stoke_protocol::message::rank::{Origin, RankId};

use super::checkpoints::Catalogue;
use super::effect::Order;
use super::event::{Event, Record};
use super::jobs::Jobs;
use super::machine::{Job, Scene};
use super::members::{Members, Room, Stale};
use super::planted::PlantedBug;
use super::pruning::Sweep;
use super::quarantine::Faults;
use super::run::Move;
use super::time::Time;
use super::tokens::Tokens;

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Cluster {
    pub(super) cluster: Option<ClusterId>,
    pub(super) epoch: Epoch,
    pub(super) index: LogIndex,
    /// Of the newest entry; time in the journal never goes back.
    pub(super) clock: Time,
    pub(super) members: Members,
    pub(super) users: BTreeMap<String, User>,
    pub(super) jobs: Jobs,
    pub(super) catalogue: Catalogue,
    pub(super) tokens: Tokens,
    /// Gangs placed so far.
    pub(super) placements: u64,
    pub(super) counts: Counts,
    pub(super) faults: Faults,
    #[serde(skip)]
    pub(super) bug: Option<PlantedBug>,
    /// Something has changed that may let a job be placed.
    #[serde(skip)]
    pub(super) replan: bool,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct User {
    pub role: TokenScope,
    pub since: Time,
}

/// What was taken in and changed nothing, since the journal began.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Reports of ranks that the node does not hold (I32).
    pub foreign_reports: u64,
    /// Reports of generations that are over (I2).
    pub stale_reports: u64,
    pub refused_requests: u64,
    pub entries_refused: u64,
}

/// Why an event changes nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refused {
    Stale(Stale),
    Invalid(String),
    NotFound(String),
    Conflict(String),
    Unavailable(String),
}

impl Cluster {
    /// A cluster with a defence broken on purpose. For tests only.
    pub fn with_planted_bug(bug: PlantedBug) -> Self {
        Self { bug: Some(bug), ..Self::default() }
    }

    pub fn id(&self) -> Option<ClusterId> {
        self.cluster
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Entries applied so far.
    pub fn index(&self) -> LogIndex {
        self.index
    }

    /// Of the newest entry.
    pub fn clock(&self) -> Time {
        self.clock
    }

    pub fn members(&self) -> &Members {
        &self.members
    }

    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    pub fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    pub fn placements(&self) -> u64 {
        self.placements
    }

    pub fn planted_bug(&self) -> Option<PlantedBug> {
        self.bug
    }

    /// Carries a planted bug over a restart of a simulated coordinator.
    pub fn plant(&mut self, bug: Option<PlantedBug>) {
        self.bug = bug;
    }

    /// Whether a plan is worth making; asking clears it.
    pub fn take_replan(&mut self) -> bool {
        std::mem::take(&mut self.replan)
    }

    /// A digest of everything that is durable: two replays of one journal agree (I8).
    pub fn state_hash(&self) -> Digest {
        Digest(*blake3::hash(&self.to_bytes()).as_bytes())
    }

    /// For snapshots.
    pub fn to_bytes(&self) -> Vec<u8> {
        stoke_protocol::codec::encode_record(self).expect("the state has only types that encode")
    }

    /// The opposite of `to_bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, stoke_protocol::codec::CodecError> {
        stoke_protocol::codec::decode_record(bytes)
    }

    /// Folds one entry into the state and says what is to be done once it is durable.
    pub fn apply(&mut self, record: &Record) -> Vec<Order> {
        let mut orders = Vec::new();
        let checked = self.check(record.at, &record.event);
        self.index = self.index.next();
        self.clock = self.clock.max(record.at);
        if checked.is_err() {
            self.counts.entries_refused += 1;
            return orders;
        }
        let mut scene = Scene { at: record.at, index: self.index, bug: self.bug, orders: &mut orders };
        match &record.event {
            Event::Founded { cluster, admin } => {
                self.cluster = Some(*cluster);
                self.users.insert(admin.clone(), User { role: TokenScope::Admin, since: record.at });
            }
            Event::EpochRaised { .. } if self.bug == Some(PlantedBug::EpochNotRaised) && self.epoch.0 > 0 => {}
            Event::EpochRaised { .. } => self.epoch = self.epoch.next(),
            Event::TokenCreated { scope, secret_hash, expires, by } => {
                self.tokens.create(*scope, *secret_hash, *expires, by.clone());
            }
            Event::TokenRevoked { token, .. } => self.tokens.revoke(*token),
            Event::Joined { token, wants, .. } => self.join(record.at, *token, wants),
            Event::NodeUp { hello, address } => self.node_up(&mut scene, hello, address),
            Event::NodeLost { node, .. } => self.node_lost(&mut scene, *node),
            Event::Reported { node, report, .. } => self.report(&mut scene, *node, report),
            Event::Submitted(submission) => {
                let id = self.jobs.submit(record.at, self.placements, (**submission).clone());
                let text = format!("submitted by {}", submission.owner);
                let index = scene.index;
                self.jobs.drive(id, self.placements, |job| job.timeline.add(record.at, index, text));
                if let Some(forgotten) = self.jobs.forget_one(|job| self.catalogue.has_pins(job)) {
                    self.catalogue.forget(forgotten);
                }
                scene.orders.push(Order::Changed { job: id });
                self.replan = true;
            }
            Event::CancelAsked { job, by } => {
                self.jobs.drive(*job, self.placements, |job| job.cancel(&mut scene, by));
                if self.bug == Some(PlantedBug::CancelledStaysQueued) {
                    self.jobs.queue_again(*job);
                }
            }
            Event::GenerationStarted { job, placement, .. } => self.start(&mut scene, *job, placement),
            Event::Refused { .. } => self.counts.refused_requests += 1,
            Event::Stalled { job, reason, .. } => self.drive(*job, |job| job.stalled(&mut scene, reason)),
            Event::RanksPlaced { job, places, .. } => self.add(&mut scene, *job, places),
            Event::Scaled { job, ranks, by } => self.drive(*job, |job| job.scale(&mut scene, *ranks, by)),
            Event::DrainAsked { node, deadline_ms, by } => self.drain(&mut scene, *node, (*deadline_ms, by)),
            Event::DrainLifted { node, .. } => self.lift_drain(&mut scene, *node),
            Event::DrainOverdue { node } => self.drain_overdue(&mut scene, *node),
            Event::Preempted { job, by } => self.drive(*job, |job| job.yield_to(&mut scene, *by)),
            Event::YieldOverdue { job } => self.drive(*job, |job| job.stop_for_another(&mut scene)),
            Event::RankYielded { id, by } => self.drive(id.job, |job| job.give_rank(&mut scene, *id, *by)),
            Event::NodeQuarantined { node, reason } => self.put_in_quarantine(*node, reason),
            Event::ProbationBegun { node } => self.put_on_probation(*node),
            Event::QuarantineLifted { node, .. } => self.release(*node),
            Event::NodeRemoved { node, .. } => {
                self.faults.settle(*node);
                self.members.remove(*node);
                self.sweep_elsewhere(&mut scene, *node);
            }
            Event::MoveAsked { id, reason } => {
                self.drive(id.job, |job| job.move_away(&mut scene, *id, Move::Replaced(reason.clone())));
            }
            Event::PaceNoted { id, words } => {
                self.jobs.drive(id.job, self.placements, |job| job.pace_noted(&mut scene, *id, words));
            }
            Event::RankRetired { id, reason } => self.drive(id.job, |job| job.retire(&mut scene, *id, reason)),
            Event::Evicted { id, reason } => self.drive(id.job, |job| job.evicted(&mut scene, *id, reason)),
            Event::Pinned { job, step, by } => self.pin(&mut scene, *job, *step, by),
            Event::Unpinned { job, step, by } => self.unpin(&mut scene, *job, *step, by),
            Event::Pruned { job, keep, by } => self.prune(&mut scene, *job, *keep, by),
            Event::Swept { node, job, index, removed, error } => {
                let sweep = Sweep { job: *job, index: *index, removed: *removed, error: error.clone() };
                self.swept(&mut scene, *node, &sweep);
            }
            Event::Promoted { job, by } => self.promote(&mut scene, *job, by),
            Event::RolledBack { model, by } => self.roll_back(&mut scene, model, by),
            Event::LeaveAsked { job, by } => self.let_go(&mut scene, *job, by),
            Event::ScaleNoted { jobs, words } => {
                for job in jobs {
                    self.jobs.drive(*job, self.placements, |job| job.scale_noted(&mut scene, words));
                }
            }
            Event::SplitChosen { job, chosen } => self.drive(*job, |job| job.take_split(&mut scene, chosen)),
            Event::SplitRefused { job, reason } => self.drive(*job, |job| job.refuse_split(&mut scene, reason)),
        }
        self.free_early(&mut orders);
        orders
    }

    /// What may let ranks be placed.
    pub(super) fn drive(&mut self, job: JobId, drive: impl FnOnce(&mut Job)) {
        self.replan = true;
        self.jobs.drive(job, self.placements, drive);
    }

    fn join(&mut self, at: Time, token: TokenId, wants: &Wants) {
        let role = self.tokens.scope(token);
        self.tokens.spend(at, token);
        match wants {
            Wants::Node { name } => {
                self.members.join(at, name.clone());
            }
            Wants::User { name } => {
                self.users.insert(name.clone(), User { role, since: at });
            }
        }
    }

    fn start(&mut self, scene: &mut Scene<'_>, id: JobId, placement: &[NodeId]) {
        let Some(job) = self.jobs.get(id) else { return };
        let last = self.catalogue.last(id);
        let own = last.map(|last| (last.uri.clone(), Some(last.manifest_blake3)));
        let named = || job.resume.clone().map(|uri| (uri.clone(), self.catalogue.manifest_at(&uri)));
        let resume = own.or_else(named).map(|(uri, manifest_blake3)| Origin { uri, manifest_blake3 });
        let begun = if resume.is_none() { Some(Step(0)) } else { last.map(|last| last.step) };
        let (ask, generation) = (job.ask.clone(), job.generation.next());
        for (rank, node) in (0..).map(Rank).zip(placement) {
            self.hold(*node, RankId { job: id, generation, rank }, ask.room_of(rank));
        }
        self.placements += 1;
        self.jobs.drive(id, self.placements, |job| job.start(scene, placement, (resume, begun)));
    }

    fn add(&mut self, scene: &mut Scene<'_>, id: JobId, places: &[(Rank, NodeId)]) {
        let Some(job) = self.jobs.get(id) else { return };
        let (ask, generation) = (job.ask.clone(), job.generation.next());
        for (rank, node) in places {
            self.hold(*node, RankId { job: id, generation, rank: *rank }, ask.room_of(*rank));
        }
        self.jobs.drive(id, self.placements, |job| job.add(scene, places));
    }

    fn hold(&mut self, node: NodeId, id: RankId, room: Room) {
        self.members.hold(node, id, room);
        let fits = self.members.node(node).is_some_and(|node| Room::of(&node.capacity).holds(&node.used));
        assert!(fits || self.bug.is_some(), "I13: {node} has no room for {id}");
    }

    /// Only for `PlantedBug::SlotFreedBeforeExit`.
    fn free_early(&mut self, orders: &mut [Order]) {
        if self.bug != Some(PlantedBug::SlotFreedBeforeExit) {
            return;
        }
        for order in orders {
            if let Order::Send { node, message: ToNode::Stop { id, .. } } = order {
                self.members.release(*node, *id, None);
            }
        }
    }
}
