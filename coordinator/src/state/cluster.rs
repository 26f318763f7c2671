//! The durable state: the fold of the journal. Owns how each event changes members, jobs, checkpoints and tokens, and which orders follow;
//! never decides placement (that comes as an event), never sees a session, and never asks what time it is.
//!
//! K1 (I8): `apply` is a function of the state and the entry; an entry that `check` refuses changes nothing but the index.
//! K2 (I1): the epoch grows by one with each start. K3 (I14): a generation's gang is whole, and each node has the room.
//! K4 (I15): a rank's room is held from the entry that places it to the one that tells of its end.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::{ClusterId, Digest, Epoch, Generation, Incarnation, JobId, LogIndex, NodeId, Rank};
use stoke_protocol::message::client::{JobState, TokenScope};
use stoke_protocol::message::join::Wants;
use stoke_protocol::message::node::{NodeHello, Report, ToNode};
use stoke_protocol::message::rank::{Exit, RankEvent, RankId};

use super::checkpoints::{Catalogue, Checkpoint, Keep};
use super::effect::Order;
use super::elastic::End;
use super::event::{Event, Record};
use super::jobs::Jobs;
use super::machine::{Scene, stop_order};
use super::members::{Members, NODES_MAX, Room, Stale};
use super::planted::PlantedBug;
use super::time::Time;
use super::tokens::Tokens;
use super::words::exit_words;

/// Users that have joined: each is a person or a program.
const USERS_MAX: usize = 10_000;
/// A machine's name is shown in tables.
const NODE_NAME_CHARS_MAX: usize = 63;

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
    #[serde(skip)]
    pub(super) bug: Option<PlantedBug>,
    /// Something has changed that may let a job be placed.
    #[serde(skip)]
    replan: bool,
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

    /// Whether an event would change anything, and if not, why not. Asked before an event is journalled, and again when it is applied.
    pub fn check(&self, at: Time, event: &Event) -> Result<(), Refused> {
        match event {
            Event::Founded { .. } => match self.cluster {
                None => Ok(()),
                Some(cluster) => Err(Refused::Conflict(format!("this journal is cluster {cluster}'s"))),
            },
            Event::EpochRaised { .. } | Event::Refused { .. } | Event::TokenCreated { .. } => Ok(()),
            Event::TokenRevoked { token, .. } => self.tokens.check_revoke(*token),
            Event::Joined { token, secret_hash, wants } => {
                let checked = self.tokens.check(at, *token, secret_hash, wants);
                if self.bug != Some(PlantedBug::UsedTokenAccepted) {
                    checked.map_err(Refused::Invalid)?;
                }
                self.check_wants(wants)
            }
            Event::NodeUp { hello, .. } => self
                .members
                .check_hello(hello.node, (hello.incarnation, hello.session), self.bug)
                .map_err(Refused::Stale),
            Event::NodeLost { node, incarnation } => match self.members.node(*node) {
                Some(found) if found.up && found.incarnation == *incarnation => Ok(()),
                Some(found) => Err(Refused::Stale(Stale::Incarnation { current: found.incarnation })),
                None => Err(Refused::Stale(Stale::Unknown)),
            },
            Event::Reported { node, incarnation, report } => {
                self.members.check_report(*node, *incarnation, report.sequence, self.bug).map_err(Refused::Stale)
            }
            Event::Submitted(submission) => match self.jobs.by_key(&submission.owner, &submission.key) {
                Some(job) if self.bug != Some(PlantedBug::KeyIgnored) => {
                    Err(Refused::Conflict(format!("{} has this key", job.id)))
                }
                Some(_) | None => Ok(()),
            },
            Event::CancelAsked { job, .. } => self.check_cancel(*job),
            Event::Stalled { job, generation, .. } => match self.jobs.get(*job) {
                Some(found) if found.state == JobState::Starting && found.generation == *generation => Ok(()),
                Some(_) | None => Err(Refused::Conflict(format!("{job} {generation} is over"))),
            },
            Event::RanksPlaced { job, generation, places } => self.check_add(*job, *generation, places),
            Event::Scaled { job, ranks, .. } => match self.jobs.get(*job) {
                Some(found) => found.check_scale(*ranks).map_err(Refused::Conflict),
                None => Err(Refused::NotFound(format!("there is no {job}"))),
            },
            Event::Evicted { id, .. } => match self.jobs.get(id.job) {
                Some(found) if found.expects(*id) => Ok(()),
                Some(_) | None => Err(Refused::Conflict(format!("{id} is not wanted any more"))),
            },
            Event::GenerationStarted { job, generation, placement } => self.check_start(*job, *generation, placement),
        }
    }

    fn check_wants(&self, wants: &Wants) -> Result<(), Refused> {
        match wants {
            Wants::Node { .. } if self.members.nodes().len() >= NODES_MAX => {
                Err(Refused::Unavailable(format!("the cluster has {NODES_MAX} nodes, the most that it takes")))
            }
            Wants::Node { name } if name.is_empty() || name.chars().count() > NODE_NAME_CHARS_MAX => {
                Err(Refused::Invalid(format!("node name {name:?}: use 1 to {NODE_NAME_CHARS_MAX} characters")))
            }
            Wants::User { .. } if self.users.len() >= USERS_MAX => {
                Err(Refused::Unavailable(format!("the cluster has {USERS_MAX} users, the most that it takes")))
            }
            Wants::User { name } if self.users.contains_key(name) => Err(Refused::Conflict(format!(
                "a user named {name:?} has joined already: jobs belong to names, so choose another one"
            ))),
            Wants::Node { .. } | Wants::User { .. } => Ok(()),
        }
    }

    fn check_cancel(&self, id: JobId) -> Result<(), Refused> {
        let job = self.jobs.get(id).ok_or_else(|| Refused::NotFound(format!("there is no {id}")))?;
        match job.state {
            JobState::Queued | JobState::Starting | JobState::Running | JobState::Recovering => Ok(()),
            JobState::Cancelling | JobState::Cancelled => Err(Refused::Conflict(format!("{id} was cancelled before"))),
            JobState::Succeeded => Err(Refused::Conflict(format!("{id} has succeeded already"))),
            JobState::Failed => Err(Refused::Conflict(format!("{id} has failed already"))),
        }
    }

    /// K3: the gang is whole, the job waits for it, and every node has the room.
    fn check_start(&self, id: JobId, generation: Generation, placement: &[NodeId]) -> Result<(), Refused> {
        let refused = |why: String| Err(Refused::Conflict(format!("{id} {generation}: {why}")));
        let Some(job) = self.jobs.get(id) else { return refused("there is no such job".into()) };
        let lenient = self.bug == Some(PlantedBug::CancelledStaysQueued);
        if (job.state != JobState::Queued && !lenient) || generation != job.generation.next() {
            return refused(format!("the job is {:?} in {}", job.state, job.generation));
        }
        if placement.len() != job.ask.ranks as usize && self.bug != Some(PlantedBug::GangPlacedPartially) {
            return refused(format!("{} ranks are placed of {}", placement.len(), job.ask.ranks));
        }
        self.check_room(job, placement.iter().copied()).or_else(refused)
    }

    /// K3 for ranks that are added: the slots are empty, and every node has the room.
    fn check_add(&self, id: JobId, generation: Generation, places: &[(Rank, NodeId)]) -> Result<(), Refused> {
        let refused = |why: String| Err(Refused::Conflict(format!("{id} {generation}: {why}")));
        let Some(job) = self.jobs.get(id) else { return refused("there is no such job".into()) };
        if generation != job.generation.next() {
            return refused(format!("the job is {:?} in {}", job.state, job.generation));
        }
        let missing = job.missing();
        let mut slots: BTreeSet<Rank> = BTreeSet::new();
        if let Some((slot, _)) = places.iter().find(|(slot, _)| !missing.contains(slot) || !slots.insert(*slot)) {
            return refused(format!("{slot} is not missing"));
        }
        self.check_room(job, places.iter().map(|(_, node)| *node)).or_else(refused)
    }

    fn check_room(&self, job: &super::machine::Job, nodes: impl Iterator<Item = NodeId>) -> Result<(), String> {
        let mut asked: BTreeMap<NodeId, Room> = BTreeMap::new();
        for node in nodes {
            asked.entry(node).or_default().add(&job.ask.room);
        }
        for (node, mut room) in asked {
            if self.bug == Some(PlantedBug::MemoryOvercommitted) {
                room.memory_bytes = 0;
            }
            match self.members.node(node) {
                Some(found) if found.up && !found.is_quarantined() && found.free().holds(&room) => {}
                Some(_) | None => return Err(format!("{node} has no room for it")),
            }
        }
        Ok(())
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
                if let Some(forgotten) = self.jobs.forget_one() {
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
            Event::Stalled { job, reason, .. } => {
                self.jobs.drive(*job, self.placements, |job| job.stalled(&mut scene, reason));
            }
            Event::RanksPlaced { job, places, .. } => self.add(&mut scene, *job, places),
            Event::Scaled { job, ranks, by } => {
                self.replan = true;
                self.jobs.drive(*job, self.placements, |job| job.scale(&mut scene, *ranks, by));
            }
            Event::Evicted { id, reason } => {
                self.replan = true;
                self.jobs.drive(id.job, self.placements, |job| job.evicted(&mut scene, *id, reason));
            }
        }
        self.free_early(&mut orders);
        orders
    }

    fn join(&mut self, at: Time, token: stoke_protocol::ids::TokenId, wants: &Wants) {
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

    /// Inventory sync: what the node has is compared with what it should have. Adopt first, decide after.
    fn node_up(&mut self, scene: &mut Scene<'_>, hello: &NodeHello, address: &str) {
        let node = hello.node;
        let restarted = self.members.node(node).is_some_and(|found| found.incarnation != hello.incarnation);
        let offer = (hello.name.clone(), address.to_owned(), hello.capacity.clone());
        self.members.open(scene.at, node, (hello.incarnation, hello.session), offer);
        self.replan = true;
        let has: BTreeMap<RankId, bool> = hello.ranks.iter().map(|rank| (rank.id, rank.alive)).collect();
        let held: BTreeSet<RankId> =
            self.members.node(node).map(|node| node.held.keys().copied().collect()).unwrap_or_default();
        let mut gone: BTreeMap<JobId, Vec<RankId>> = BTreeMap::new();
        for id in held.iter().copied() {
            match has.get(&id) {
                Some(true) => self.remind(scene, node, id),
                // The report of its end is on its way.
                Some(false) => {}
                None if !restarted && self.never_started(id) => self.remind(scene, node, id),
                None => {
                    self.members.release(node, id, self.bug);
                    gone.entry(id.job).or_default().push(id);
                }
            }
        }
        for (job, ids) in gone {
            self.gone(scene, job, &ids, "went with its agent, which was restarted");
        }
        for (id, _) in has.iter().filter(|(id, alive)| **alive && !held.contains(*id)) {
            scene.orders.push(stop_order(node, *id, "this coordinator does not know it"));
        }
    }

    /// Expected, and the order to start it may not have arrived.
    fn never_started(&self, id: RankId) -> bool {
        self.jobs.get(id.job).is_some_and(|job| job.unready(id).is_some())
    }

    fn remind(&self, scene: &mut Scene<'_>, node: NodeId, id: RankId) {
        match self.jobs.get(id.job) {
            Some(job) => job.remind(scene, node, id, self.catalogue.kept(id.job)),
            None => scene.orders.push(stop_order(node, id, "its job is forgotten")),
        }
    }

    fn gone(&mut self, scene: &mut Scene<'_>, job: JobId, ids: &[RankId], how: &str) {
        self.replan = true;
        self.jobs.drive(job, self.placements, |job| job.gone(scene, ids, how, End::Machine));
    }

    /// Its ranks are gone as far as their jobs go; their room on the node stays held until the node tells (K4).
    fn node_lost(&mut self, scene: &mut Scene<'_>, node: NodeId) {
        self.members.lose(scene.at, node);
        let mut held: BTreeMap<JobId, Vec<RankId>> = BTreeMap::new();
        for id in self.members.node(node).into_iter().flat_map(|node| node.held.keys()) {
            held.entry(id.job).or_default().push(*id);
        }
        for (job, ids) in held {
            self.gone(scene, job, &ids, "is lost: its node fell silent");
        }
    }

    fn report(&mut self, scene: &mut Scene<'_>, node: NodeId, report: &Report) {
        self.members.reported(node, report.sequence);
        let acknowledge = ToNode::Acknowledge { sequence: report.sequence, index: scene.index };
        scene.orders.push(Order::Send { node, message: acknowledge });
        let id = report.id;
        if !self.members.node(node).is_some_and(|node| node.held.contains_key(&id)) {
            // I32: a node speaks of its own ranks only.
            self.counts.foreign_reports += 1;
            return;
        }
        match &report.event {
            RankEvent::Ready { .. } => self.members.started(node, id.job, true),
            RankEvent::Exited { exit: Exit::NotStarted(_) } => self.members.started(node, id.job, false),
            RankEvent::Exited { .. } | RankEvent::Finished { .. } | RankEvent::Failed { .. } => {}
            RankEvent::ShardStored { .. } | RankEvent::ManifestStored { .. } | RankEvent::Resumed { .. } => {}
            RankEvent::Joined { .. } | RankEvent::PeerLost { .. } => {}
            RankEvent::NotStored { .. } | RankEvent::Damaged { .. } => {}
        }
        if matches!(report.event, RankEvent::Exited { .. }) {
            self.members.release(node, id, self.bug);
            self.replan = true;
        }
        let run = self.jobs.get(id.job).and_then(|job| job.run.as_ref());
        let known = run.is_some_and(|run| run.ranks.contains_key(&id));
        // A planted bug takes the words of an old rank for those of the one that has its slot now.
        let mistaken =
            run.filter(|_| self.bug == Some(PlantedBug::ReportsUnfenced)).and_then(|run| run.of_slot(id.rank));
        match mistaken.filter(|_| !known) {
            Some(id) => self.rank_event(scene, id, &report.event),
            None if known => self.rank_event(scene, id, &report.event),
            None => {
                self.counts.stale_reports += 1;
                if !matches!(report.event, RankEvent::Exited { .. }) {
                    scene.orders.push(stop_order(node, id, "the job goes on without it"));
                }
            }
        }
    }

    fn rank_event(&mut self, scene: &mut Scene<'_>, id: RankId, event: &RankEvent) {
        if let RankEvent::ManifestStored { generation, step, uri, manifest_blake3 } = event {
            return self.manifest(scene, id, (*generation, *step), (uri, *manifest_blake3));
        }
        if let RankEvent::Damaged { uri, error } = event {
            let mine = self.catalogue.damage(id.job, uri);
            self.jobs.drive(id.job, self.placements, |job| job.damaged(scene, id, (uri, mine), error));
            return;
        }
        self.jobs.drive(id.job, self.placements, |job| match event {
            RankEvent::Ready { address } => job.ready(scene, id, *address),
            RankEvent::ShardStored { generation, step, shard } => {
                job.shard_stored(scene, id, (*generation, *step), shard.clone());
            }
            RankEvent::ManifestStored { .. } | RankEvent::Damaged { .. } => {}
            RankEvent::PeerLost { generation, peer, .. } => job.peer_lost(id, *generation, *peer),
            RankEvent::NotStored { generation, step, error } => {
                let words = format!("checkpoint at {step} was not written by {}: {error}", id.rank);
                job.not_stored(scene, id, (*generation, *step), words);
            }
            RankEvent::Finished { generation, outcome } => job.finished(scene, id, *generation, outcome.clone()),
            RankEvent::Failed { error, permanent } => job.failed(scene, id, error, *permanent),
            RankEvent::Exited { exit } => {
                let end = match exit {
                    Exit::Code(0) => End::Left,
                    Exit::AgentRestarted | Exit::AgentStopped => End::Machine,
                    Exit::Code(_) | Exit::Signal(_) | Exit::NotStarted(_) => End::Fault,
                };
                job.gone(scene, &[id], &exit_words(exit), end);
            }
            RankEvent::Resumed { generation, step } => job.resumed(scene, id, *generation, *step),
            RankEvent::Joined { generation, step } => job.joined(scene, id, *generation, *step),
        });
        self.replan |= matches!(event, RankEvent::Failed { .. });
    }

    /// The second phase of a checkpoint: it becomes visible, or its generation fails with the reason.
    fn manifest(
        &mut self,
        scene: &mut Scene<'_>,
        id: RankId,
        (generation, step): (Generation, stoke_protocol::ids::Step),
        manifest: (&str, Digest),
    ) {
        let Some(job) = self.jobs.get(id.job).filter(|job| job.is_active()) else { return };
        let (uri, manifest_blake3) = manifest;
        let unfenced = matches!(self.bug, Some(PlantedBug::ShardsUnfenced | PlantedBug::ReportsUnfenced));
        if job.run.as_ref().is_none_or(|run| run.generation != generation) && !unfenced {
            // It came too late: the members that stored it are not the members any more, and those store it again.
            self.counts.stale_reports += 1;
            return;
        }
        let outside = || Err(format!("{uri} is not in the job's folder {}", job.checkpoints));
        let checked = match self.catalogue.check(id.job, generation, step) {
            _ if self.bug == Some(PlantedBug::CommittedStepBack) => Ok(()),
            Ok(()) if !uri.strip_prefix(&job.checkpoints).is_some_and(|rest| rest.starts_with('/')) => outside(),
            checked => checked,
        };
        let shards = job.prepared(id, step, self.bug).ok_or("its shards were not all stored".to_owned());
        let shards = match checked.and(shards) {
            Ok(shards) => shards,
            Err(why) => {
                // Its rank is no worse for it; the next checkpoint takes its place.
                let words = format!("checkpoint at {step} not taken: {why}");
                self.jobs.drive(id.job, self.placements, |job| job.not_stored(scene, id, (generation, step), words));
                return;
            }
        };
        let checkpoint = Checkpoint {
            generation,
            step,
            uri: uri.to_owned(),
            shards: shards.len() as u32,
            bytes: shards.iter().map(|shard| shard.bytes).sum(),
            manifest_blake3,
            at: scene.at,
            index: scene.index,
        };
        let resumed: BTreeSet<&str> =
            self.jobs.iter().filter(|job| !job.state.is_terminal()).filter_map(|job| job.resume.as_deref()).collect();
        let keep = Keep { newest: job.keep, pinned: &|uri| resumed.contains(uri), bug: self.bug };
        self.catalogue.commit(id.job, checkpoint, &keep);
        let kept = self.catalogue.kept(id.job);
        self.jobs.drive(id.job, self.placements, |job| job.committed(scene, step, kept));
    }

    fn start(&mut self, scene: &mut Scene<'_>, id: JobId, placement: &[NodeId]) {
        let Some(job) = self.jobs.get(id) else { return };
        let resume = self.catalogue.last(id).map(|last| last.uri.clone()).or_else(|| job.resume.clone());
        let (room, generation) = (job.ask.room, job.generation.next());
        for (rank, node) in (0..).map(Rank).zip(placement) {
            self.hold(*node, RankId { job: id, generation, rank }, room);
        }
        self.placements += 1;
        self.jobs.drive(id, self.placements, |job| job.start(scene, placement, resume));
    }

    fn add(&mut self, scene: &mut Scene<'_>, id: JobId, places: &[(Rank, NodeId)]) {
        let Some(job) = self.jobs.get(id) else { return };
        let (room, generation) = (job.ask.room, job.generation.next());
        for (rank, node) in places {
            self.hold(*node, RankId { job: id, generation, rank: *rank }, room);
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

    /// Whether a rank may have a certificate: it was placed on this node, and is wanted (I32, J6).
    pub fn check_sign(&self, node: NodeId, incarnation: Incarnation, id: RankId) -> Result<(), String> {
        let found = self.members.node(node).ok_or_else(|| format!("{node} is not a member"))?;
        if found.incarnation != incarnation {
            return Err(format!("{node} has a newer incarnation"));
        }
        if !found.held.contains_key(&id) {
            return Err(format!("{id} was not placed on {node}"));
        }
        match self.jobs.get(id.job) {
            Some(job) if job.expects(id) => Ok(()),
            Some(_) | None => Err(format!("{id} is not wanted any more")),
        }
    }
}
