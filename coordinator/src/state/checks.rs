//! Whether an entry would change anything, and if not, why not. Asked before an event is journalled, and again when it is applied. Changes
//! nothing. Part of `cluster.rs`.

use std::collections::{BTreeMap, BTreeSet};

use stoke_protocol::ids::{Generation, Incarnation, JobId, NodeId, Rank};
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::join::Wants;
use stoke_protocol::message::rank::RankId;

use super::cluster::{Cluster, Refused};
use super::event::Event;
use super::machine::Job;
use super::members::{NODES_MAX, Room, Stale};
use super::planted::PlantedBug;
use super::time::Time;

/// Users that have joined: each is a person or a program.
const USERS_MAX: usize = 10_000;
/// A machine's name is shown in tables.
const NODE_NAME_CHARS_MAX: usize = 63;

impl Cluster {
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
                Some(_) | None => self.check_serves(submission),
            },
            Event::CancelAsked { job, .. } => self.check_cancel(*job),
            Event::Stalled { job, generation, .. } => match self.jobs.get(*job) {
                Some(found) if found.state == JobState::Starting && found.generation == *generation => Ok(()),
                Some(_) | None => Err(Refused::Conflict(format!("{job} {generation} is over"))),
            },
            Event::RanksPlaced { job, generation, places } => self.check_add(*job, *generation, places),
            Event::Scaled { job, ranks, .. } => self.ask_job(*job, |job| job.check_scale(*ranks)),
            Event::Evicted { id, .. } | Event::PaceNoted { id, .. } | Event::MoveAsked { id, .. } => {
                match self.jobs.get(id.job) {
                    Some(found) if found.expects(*id) => Ok(()),
                    Some(_) | None => Err(Refused::Conflict(format!("{id} is not wanted any more"))),
                }
            }
            Event::DrainAsked { node, .. } => self.check_node(*node).map(drop),
            Event::DrainLifted { node, .. } => self.check_lift(*node),
            Event::DrainOverdue { node } => self.check_overdue(*node),
            Event::Preempted { job, .. } => self.ask_job(*job, Job::check_yield),
            Event::YieldOverdue { job } => self.ask_job(*job, Job::check_overdue),
            Event::RankYielded { id, .. } => self.ask_job(id.job, |job| job.check_give(*id)),
            Event::NodeQuarantined { node, .. } => self.check_quarantine(*node),
            Event::ProbationBegun { node } => self.check_probation(*node),
            Event::QuarantineLifted { node, .. } => self.check_node(*node).map(drop),
            Event::NodeRemoved { node, .. } => self.check_remove(*node),
            Event::RankRetired { id, .. } => self.ask_job(id.job, |job| job.check_retire(*id)),
            Event::GenerationStarted { job, generation, placement } => self.check_start(*job, *generation, placement),
            Event::Pinned { job, step, .. } | Event::Unpinned { job, step, .. } => {
                self.catalogue.check_pin(*job, *step)
            }
            Event::Pruned { job, keep, .. } => self.check_prune(*job, *keep),
            Event::Swept { job, index, .. } => self.check_swept(*job, *index),
            Event::Promoted { job, .. } => self.check_promoted(*job),
            Event::RolledBack { model, .. } => self.check_rolled_back(model),
            Event::LeaveAsked { job, .. } => self.check_leave(*job),
            Event::ScaleNoted { jobs, .. } => match jobs.iter().any(|job| self.jobs.get(*job).is_some()) {
                true => Ok(()),
                false => Err(Refused::NotFound("none of these jobs is known".into())),
            },
            Event::SplitChosen { job, .. } | Event::SplitRefused { job, .. } => self.ask_job(*job, Job::check_split),
        }
    }

    pub(super) fn ask_job(&self, id: JobId, check: impl FnOnce(&Job) -> Result<(), String>) -> Result<(), Refused> {
        let job = self.jobs.get(id).ok_or_else(|| Refused::NotFound(format!("there is no {id}")))?;
        check(job).map_err(Refused::Conflict)
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
        self.check_room(job, (0..).map(Rank).zip(placement.iter().copied())).or_else(refused)
    }

    /// K3 for ranks that are added: the slots are empty, and every node has the room.
    fn check_add(&self, id: JobId, generation: Generation, places: &[(Rank, NodeId)]) -> Result<(), Refused> {
        let refused = |why: String| Err(Refused::Conflict(format!("{id} {generation}: {why}")));
        let Some(job) = self.jobs.get(id) else { return refused("there is no such job".into()) };
        if generation != job.generation.next() {
            return refused(format!("the job is {:?} in {}", job.state, job.generation));
        }
        let vacant = job.vacant();
        let mut slots: BTreeSet<Rank> = BTreeSet::new();
        if let Some((slot, _)) = places.iter().find(|(slot, _)| !vacant.contains(slot) || !slots.insert(*slot)) {
            return refused(format!("{slot} is not missing"));
        }
        if let Some((slot, node)) = places.iter().find(|(slot, node)| job.moves_from(*slot) == Some(*node)) {
            return refused(format!("{slot} is to move away from {node}"));
        }
        self.check_room(job, places.iter().copied()).or_else(refused)
    }

    fn check_room(&self, job: &Job, places: impl Iterator<Item = (Rank, NodeId)>) -> Result<(), String> {
        let mut asked: BTreeMap<NodeId, (u32, Room)> = BTreeMap::new();
        for (rank, node) in places {
            let (ranks, room) = asked.entry(node).or_default();
            *ranks += 1;
            room.add(&job.ask.room_of(rank));
        }
        for (node, (ranks, mut room)) in asked {
            if self.bug == Some(PlantedBug::MemoryOvercommitted) {
                room.memory_bytes = 0;
            }
            match self.members.node(node) {
                Some(found) if found.serves(self.bug) && found.free().holds(&room) => {
                    if found.slots_max().is_some_and(|most| ranks > most) {
                        return Err(format!("{node} is on probation and gets one rank"));
                    }
                }
                Some(_) | None => return Err(format!("{node} has no room for it")),
            }
        }
        Ok(())
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
