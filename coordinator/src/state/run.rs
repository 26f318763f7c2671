//! The processes of a job, from a gang's start until the last of them is gone, and which of them are members. Owns the facts; what follows from
//! them is the job's (`machine.rs`, `elastic.rs`, `commits.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::{Fingerprint, Generation, NodeId, Rank, Step};
use stoke_protocol::list::List;
use stoke_protocol::message::rank::{Given, Member, Membership, Origin, Outcome, Purpose, RankId, ShardRecord};

use super::planted::PlantedBug;

/// The membership, the processes and the checkpoints that are under way.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Run {
    /// The membership that may commit.
    pub generation: Generation,
    pub resume: Option<Origin>,
    /// What the members do in the newest generation.
    pub purpose: Purpose,
    /// The step at which it began; unknown at first where it continues from what is no checkpoint of the job's own.
    pub begun: Option<Step>,
    /// In the order of lanes; empty until every rank of the gang is ready.
    pub members: Vec<RankId>,
    pub joining: Vec<RankId>,
    /// Who has lost the connection to whom in this generation.
    pub lost: BTreeSet<(RankId, RankId)>,
    /// What members of this generation say of a sum that is not finite.
    pub not_finite: BTreeMap<RankId, (Step, Given)>,
    /// Every process that was placed and is not gone, and finished members that are.
    pub ranks: BTreeMap<RankId, RankRun>,
    /// Checkpoints in preparation by this generation: shards by step and position, with the state that each was cut from.
    pub prepared: BTreeMap<Step, BTreeMap<u32, (ShardRecord, Fingerprint)>>,
    /// The one whose manifest is being written. Of others that are complete meanwhile only the newest is committed after it.
    pub committing: Option<Step>,
    pub committed: Option<Step>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RankRun {
    pub node: NodeId,
    pub address: Option<SocketAddr>,
    pub outcome: Option<Outcome>,
    /// The generation in which it has finished last.
    pub finished: Option<Generation>,
    /// It is not wanted any more: it failed, was evicted or replaced.
    pub leaving: bool,
    /// It leaves between two steps, and the others wait for it until then.
    pub parting: bool,
    /// It trains on until a successor on another node has caught up.
    pub moves: Option<Move>,
    /// No process of this rank can have an effect any more.
    pub gone: bool,
}

/// Why a rank is to move to another node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Move {
    /// Its node is to be emptied: where there is no room elsewhere, the job goes on with fewer ranks, if it may.
    Drained,
    /// It does badly where it is, for this reason: where there is no room elsewhere, it stays.
    Replaced(String),
}

impl std::fmt::Display for Move {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Drained => f.write_str("its node is being drained"),
            Self::Replaced(reason) => f.write_str(reason),
        }
    }
}

impl RankRun {
    /// Its process is there, or comes up, and is to stay a part of the job.
    pub fn is_wanted(&self) -> bool {
        !self.gone && !self.leaving
    }
}

impl Run {
    /// Every rank is gone.
    pub fn is_over(&self) -> bool {
        self.ranks.values().all(|rank| rank.gone)
    }

    /// The process of a slot that is wanted, if there is one.
    pub fn of_slot(&self, slot: Rank) -> Option<RankId> {
        self.ranks.iter().find(|(id, rank)| id.rank == slot && rank.is_wanted()).map(|(id, _)| *id)
    }

    /// When the first has finished nothing is trained any more: what is left is done by whoever is left.
    pub(super) fn is_finishing(&self) -> bool {
        self.ranks.values().any(|rank| rank.outcome.is_some())
    }

    pub(super) fn is_live(&self, id: RankId) -> bool {
        self.ranks.get(&id).is_some_and(|rank| !rank.gone)
    }

    fn member(&self, id: RankId) -> Option<Member> {
        Some(Member { id, address: self.ranks.get(&id)?.address? })
    }

    pub(super) fn membership(&self, after: Option<Generation>, restarts: u32) -> Membership {
        let addressed = |ids: &[RankId]| ids.iter().filter_map(|id| self.member(*id)).collect();
        let (members, joining) = (addressed(&self.members), addressed(&self.joining));
        let (generation, purpose) = (self.generation, self.purpose);
        Membership { generation, members, joining, after, ballot: 0, purpose, restarts }
    }
}

/// Whether a rank is in the membership.
pub fn rank_is_known(run: &Run, id: RankId) -> bool {
    run.members.contains(&id) || run.joining.contains(&id)
}

/// Every member's shard of a step, in order, or nothing.
pub(super) fn complete(run: &Run, step: Step, bug: Option<PlantedBug>) -> Option<List<ShardRecord>> {
    let shards = run.prepared.get(&step)?;
    let needed = match bug {
        Some(PlantedBug::ShardMissing) => run.members.len().saturating_sub(1).max(1),
        _ => run.members.len(),
    };
    (needed > 0 && shards.len() >= needed).then(|| shards.values().map(|(shard, _)| shard.clone()).collect())
}

/// The states that the shards of a step were cut from, by member, if they are all there and not the same.
pub(super) fn mixed(run: &Run, step: Step) -> Option<BTreeMap<RankId, Fingerprint>> {
    let shards = run.prepared.get(&step).filter(|shards| shards.len() == run.members.len())?;
    let states: BTreeMap<RankId, Fingerprint> =
        run.members.iter().copied().zip(shards.values().map(|(_, state)| *state)).collect();
    let first = states.values().next().copied();
    states.values().any(|state| Some(*state) != first).then_some(states)
}
