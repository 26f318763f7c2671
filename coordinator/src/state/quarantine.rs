//! Nodes on which ranks fail that do well elsewhere. Owns what is remembered of failures, the verdict, and how a quarantine ends; what a failure
//! means to its job is the job's. Parts of `cluster.rs` and `control.rs`.
//!
//! A failure speaks against its node when there is a witness: other ranks of the job lived on other nodes at that moment, or the job got further
//! elsewhere afterwards. A job that has failed on two nodes speaks against none: it may be its own fault (I11). One job alone never does.
//! Wrong numbers (I19) are no job's fault: they count by themselves.
//!
//! Q6 (F33): a job speaks against one node at a time. What has put a node in quarantine is no evidence against it any more, but it stays one for
//! all others: while the quarantine lasts, and for the rest of the window after it.
//!
//! | node         | event                                                      | next        |
//! |--------------|------------------------------------------------------------|-------------|
//! | serves       | enough failures with witnesses, of two jobs; or by request | quarantined |
//! | serves       | enough ranks with wrong numbers                            | quarantined |
//! | quarantined  | a while is over                                            | on probation: it gets one rank |
//! | on probation | that rank stores a shard or finishes                       | serves      |
//! | on probation | a rank fails there, or has wrong numbers                   | quarantined |
//! | any of both  | lifted by a person                                         | serves      |

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use stoke_protocol::identity::Subject;
use stoke_protocol::ids::{JobId, NodeId};
use stoke_protocol::message::rank::{Exit, RankEvent, RankId};

use super::cluster::{Cluster, Refused};
use super::control::{Control, Step};
use super::event::Event;
use super::machine::Job;
use super::requests::{Answer, owner, refusal};
use super::time::Time;

/// Failures with witnesses within the window that put a node in quarantine. Fewer would take chance for a pattern.
const FAULTS_MIN: usize = 3;
/// They are of so many jobs: one job may have a rank that fails wherever it is.
const JOBS_MIN: usize = 2;
/// Older failures are forgotten.
const WINDOW_MS: u64 = 10 * 60_000;
/// Ranks of a job that fail within so long of each other fall together. Less than `STOP_GRACE_MS`: a rank that is killed because its job is
/// being stopped is none of them.
const TOGETHER_MS: u64 = 1_000;
/// A rank that was told to stop, and did.
const STOPPED: i32 = 4;
/// Failures that are remembered, of all nodes: more push the oldest out.
const FAULTS_MAX: usize = 1_024;
/// Ranks with wrong numbers that put a node in quarantine: a single flipped bit may befall any machine.
const MISCOMPUTED_MAX: u32 = 3;
/// A node is left alone for so long before one rank tries it.
pub(super) const PROBATION_AFTER_MS: u64 = 10 * 60_000;

/// Why a node gets no ranks, or only one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Quarantine {
    pub reason: String,
    /// One rank may try it.
    pub probation: bool,
}

/// A rank that failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Fault {
    node: NodeId,
    job: JobId,
    at: Time,
    standing: Standing,
}

/// What a failure says. Its node apart it speaks for all others, whatever its standing: the job has failed elsewhere too.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Standing {
    /// Nobody knows whether the job does well elsewhere. The first two are encoded as `false` and `true`, which older snapshots have here.
    Open,
    /// The job did well elsewhere: it speaks against its node.
    Witnessed,
    /// Its node is in quarantine, or on probation: it is kept for so long.
    Charged,
    /// Its node was, and serves again, or was let go.
    Settled,
}

/// What speaks against nodes.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Faults {
    /// The failures of the last minutes, oldest first.
    failed: Vec<Fault>,
    /// Ranks that had other numbers than most of their peers, or than they had when they computed again.
    miscomputed: BTreeMap<NodeId, u32>,
}

impl Faults {
    fn add(&mut self, fault: Fault) {
        self.failed.retain(|old| old.counts(fault.at));
        if self.failed.len() >= FAULTS_MAX {
            self.failed.remove(0);
        }
        self.failed.push(fault);
    }

    /// A rank on this node had wrong numbers.
    pub(super) fn miscomputed(&mut self, node: NodeId) {
        let count = self.miscomputed.entry(node).or_default();
        *count = count.saturating_add(1);
    }

    /// A job has got further on these nodes: what failed on others speaks against those.
    fn vouch(&mut self, job: JobId, nodes: &BTreeSet<NodeId>) {
        let others = self.failed.iter_mut().filter(|fault| fault.job == job && !nodes.contains(&fault.node));
        others.filter(|fault| fault.standing == Standing::Open).for_each(|fault| fault.standing = Standing::Witnessed);
    }

    /// Whether a rank of this job has failed on another node in the same moment.
    fn falls(&self, job: JobId, node: NodeId, at: Time) -> bool {
        let newest = self.failed.iter().rev().find(|fault| fault.job == job);
        newest.is_some_and(|last| last.node != node && at.0.saturating_sub(last.at.0) < TOGETHER_MS)
    }

    /// Nothing that has happened speaks against this node any more; it still speaks for others (Q6).
    fn put_aside(&mut self, node: NodeId, standing: Standing) {
        self.failed.iter_mut().filter(|fault| fault.node == node).for_each(|fault| fault.standing = standing);
        self.miscomputed.remove(&node);
    }

    /// The node serves again, or is no member any more.
    pub(super) fn settle(&mut self, node: NodeId) {
        self.put_aside(node, Standing::Settled);
    }

    /// Whether a rank has failed here, or had wrong numbers, since the node was last in quarantine.
    fn speak_against(&self, node: NodeId) -> bool {
        let open = |fault: &Fault| matches!(fault.standing, Standing::Open | Standing::Witnessed);
        self.miscomputed.contains_key(&node) || self.failed.iter().any(|fault| fault.node == node && open(fault))
    }

    /// Why a node is to be left alone, if it is.
    pub fn verdict(&self, now: Time, node: NodeId) -> Option<String> {
        let wrong = self.miscomputed.get(&node).copied().unwrap_or(0);
        if wrong >= MISCOMPUTED_MAX {
            return Some(format!("{wrong} ranks had wrong numbers here"));
        }
        let counting = || self.failed.iter().filter(|fault| fault.counts(now));
        let elsewhere: BTreeSet<JobId> = counting().filter(|fault| fault.node != node).map(|fault| fault.job).collect();
        let speaks = |f: &&Fault| f.node == node && f.standing == Standing::Witnessed && !elsewhere.contains(&f.job);
        let against: Vec<&Fault> = counting().filter(speaks).collect();
        let jobs: BTreeSet<JobId> = against.iter().map(|fault| fault.job).collect();
        if against.len() < FAULTS_MIN || jobs.len() < JOBS_MIN {
            return None;
        }
        let jobs: Vec<String> = jobs.iter().map(JobId::to_string).collect();
        Some(format!("{} ranks of {} failed here and not elsewhere", against.len(), jobs.join(", ")))
    }
}

impl Fault {
    fn counts(&self, now: Time) -> bool {
        self.standing == Standing::Charged || now.0.saturating_sub(self.at.0) < WINDOW_MS
    }
}

/// Whether other members of a job live on other nodes.
fn has_witness(job: &Job, id: RankId, node: NodeId) -> bool {
    let Some(run) = &job.run else { return false };
    let other = |member: &RankId| run.ranks.get(member).is_some_and(|rank| rank.is_wanted() && rank.node != node);
    run.members.iter().filter(|member| **member != id).any(other)
}

impl Cluster {
    /// Before a report has its effect on the job: what it says of the node.
    pub(super) fn judge(&mut self, at: Time, node: NodeId, (id, event): (RankId, &RankEvent)) {
        let failed = match event {
            RankEvent::Failed { permanent, .. } => !permanent,
            RankEvent::Exited { exit: Exit::Code(code) } => *code != 0,
            RankEvent::Exited { exit: Exit::Signal(_) } => true,
            _ => false,
        };
        let Some(job) = self.jobs.get(id.job) else { return };
        if !job.expects(id) {
            // Its job is being stopped because of a rank that has failed first.
            let by_itself = failed && !matches!(event, RankEvent::Exited { exit: Exit::Code(STOPPED) });
            if by_itself && job.stops(id) && self.faults.falls(id.job, node, at) {
                self.faults.add(Fault { node, job: id.job, at, standing: Standing::Open });
            }
            return;
        }
        if failed {
            let standing = if has_witness(job, id, node) { Standing::Witnessed } else { Standing::Open };
            self.faults.add(Fault { node, job: id.job, at, standing });
        }
        if matches!(event, RankEvent::ShardStored { .. } | RankEvent::Finished { .. }) {
            let run = job.run.as_ref();
            let nodes = run.into_iter().flat_map(|run| run.members.iter().filter_map(|id| run.ranks.get(id)));
            let nodes: BTreeSet<NodeId> = nodes.map(|rank| rank.node).collect();
            self.faults.vouch(id.job, &nodes);
            if self.members.node(node).and_then(|node| node.quarantine.as_ref()).is_some_and(|found| found.probation) {
                self.faults.settle(node);
                self.members.quarantine(node, None);
                self.replan = true;
            }
        }
    }

    /// Why a node is to be left alone from now on, if the failures there say so.
    pub(super) fn verdict(&self, now: Time, node: NodeId) -> Option<String> {
        match &self.members.node(node)?.quarantine {
            None => self.faults.verdict(now, node),
            Some(quarantine) if quarantine.probation => {
                let failed = self.faults.speak_against(node);
                failed.then(|| format!("a rank that tried it failed; before that: {}", quarantine.reason))
            }
            Some(_) => None,
        }
    }

    /// Nodes on which ranks had wrong numbers since they were last in quarantine, and how many.
    pub fn miscomputed(&self) -> &BTreeMap<NodeId, u32> {
        &self.faults.miscomputed
    }

    pub(super) fn check_quarantine(&self, node: NodeId) -> Result<(), Refused> {
        match &self.check_node(node)?.quarantine {
            Some(Quarantine { probation: false, .. }) => {
                Err(Refused::Conflict(format!("{node} is in quarantine already")))
            }
            Some(_) | None => Ok(()),
        }
    }

    pub(super) fn check_probation(&self, node: NodeId) -> Result<(), Refused> {
        match &self.check_node(node)?.quarantine {
            Some(Quarantine { probation: false, .. }) => Ok(()),
            Some(_) | None => Err(Refused::Conflict(format!("{node} is not in quarantine"))),
        }
    }

    pub(super) fn put_in_quarantine(&mut self, node: NodeId, reason: &str) {
        self.replan = true;
        self.faults.put_aside(node, Standing::Charged);
        self.members.quarantine(node, Some(Quarantine { reason: reason.to_owned(), probation: false }));
    }

    pub(super) fn put_on_probation(&mut self, node: NodeId) {
        self.replan = true;
        // Only what fails from here on counts: ranks that were there may have failed meanwhile.
        self.faults.put_aside(node, Standing::Charged);
        let quarantine = self.members.node(node).and_then(|node| node.quarantine.clone());
        self.members.quarantine(node, quarantine.map(|found| Quarantine { probation: true, ..found }));
    }

    pub(super) fn release(&mut self, node: NodeId) {
        self.replan = true;
        self.faults.settle(node);
        self.members.pardon(node);
    }
}

impl Control {
    /// A node gets no new ranks until it is lifted, or a rank that tries it does well. For those who watch machines; ranks that are there stay.
    pub fn quarantine(&mut self, step: &mut Step, node: NodeId, reason: String) -> Result<(), Refused> {
        self.commit(step, Event::NodeQuarantined { node, reason })?;
        self.probations.insert(node, self.now.mono.plus_ms(PROBATION_AFTER_MS));
        Ok(())
    }

    /// After a report: whether its node is to be left alone, or one whose numbers it showed to be wrong.
    pub(super) fn convict(&mut self, step: &mut Step, node: NodeId) {
        let shown: Vec<NodeId> = self.cluster.miscomputed().keys().copied().filter(|other| *other != node).collect();
        for node in std::iter::once(node).chain(shown) {
            self.convict_one(step, node);
        }
    }

    fn convict_one(&mut self, step: &mut Step, node: NodeId) {
        if let Some(reason) = self.cluster.verdict(self.now.wall, node) {
            let committed = self.quarantine(step, node, reason);
            assert!(committed.is_ok(), "Q5: a verdict is of a node that serves: {committed:?}");
        }
    }

    pub(super) fn begin_probations(&mut self, step: &mut Step) {
        let now = self.now.mono;
        let due: Vec<NodeId> = self.probations.iter().filter(|(_, due)| now >= **due).map(|(node, _)| *node).collect();
        for node in due {
            self.probations.remove(&node);
            // One that was lifted meanwhile has none.
            let _unchanged = self.commit(step, Event::ProbationBegun { node });
        }
    }

    pub(super) fn ask_release(&mut self, step: &mut Step, caller: &Subject, node: NodeId) -> Answer {
        let found =
            self.cluster.check_node(node).map_err(|refused| refusal(refused, "`stoke nodes` lists the nodes"))?;
        if found.is_quarantined() || found.quarantine.is_some() {
            self.probations.remove(&node);
            self.commit(step, Event::QuarantineLifted { node, by: owner(caller) })
                .map_err(|refused| refusal(refused, "`stoke nodes` lists the nodes"))?;
        }
        self.node_answer(node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(node: u64, job: u64, at: u64, witness: bool) -> Fault {
        let standing = if witness { Standing::Witnessed } else { Standing::Open };
        Fault { node: NodeId(node), job: JobId(job), at: Time(at), standing }
    }

    fn verdict(faults: &[Fault]) -> Option<String> {
        failed(faults).verdict(Time(1_000), NodeId(1))
    }

    fn failed(faults: &[Fault]) -> Faults {
        Faults { failed: faults.to_vec(), ..Faults::default() }
    }

    #[test]
    fn failures_of_two_jobs_that_do_well_elsewhere_speak_against_a_node() {
        let against = [fault(1, 1, 0, true), fault(1, 1, 1, true), fault(1, 2, 2, true)];
        assert_eq!(verdict(&against).as_deref(), Some("3 ranks of job-1, job-2 failed here and not elsewhere"));
        assert_eq!(verdict(&against[..2]), None, "too few");
        assert_eq!(failed(&against).verdict(Time(WINDOW_MS + 10), NodeId(1)), None, "too long ago");
        assert_eq!(failed(&against).verdict(Time(1_000), NodeId(2)), None, "another node");
    }

    #[test]
    fn a_poison_job_speaks_against_no_node() {
        assert_eq!(verdict(&[0, 1, 2, 3].map(|at| fault(1, 1, at, true))), None, "one job alone");
        assert_eq!(
            verdict(&[1, 2, 3].map(|job| fault(1, job, job, false))),
            None,
            "nobody knows whether it works elsewhere"
        );
        let everywhere = [fault(1, 1, 0, true), fault(1, 1, 1, true), fault(1, 2, 2, true), fault(2, 1, 3, true)];
        assert_eq!(verdict(&everywhere), None, "it failed on another node too");
    }

    #[test]
    fn a_job_that_gets_further_elsewhere_is_a_witness() {
        let mut faults = failed(&[1, 2, 2].map(|job| fault(1, job, 5, false)));
        faults.vouch(JobId(1), &[NodeId(2)].into());
        assert_eq!(faults.verdict(Time(10), NodeId(1)), None);
        faults.vouch(JobId(2), &[NodeId(3)].into());
        assert!(faults.verdict(Time(10), NodeId(1)).is_some());
        faults.settle(NodeId(1));
        assert_eq!(faults.verdict(Time(10), NodeId(1)), None);
    }

    #[test]
    fn what_has_put_a_node_in_quarantine_speaks_for_all_others_while_that_lasts() {
        let three = |node, at| [fault(node, 1, at, true), fault(node, 1, at, true), fault(node, 2, at, true)];
        let mut faults = failed(&three(1, 0));
        assert!(faults.verdict(Time(0), NodeId(1)).is_some());
        faults.put_aside(NodeId(1), Standing::Charged);
        let later = 10 * WINDOW_MS;
        three(2, later).into_iter().for_each(|fault| faults.add(fault));
        let verdicts = |faults: &Faults| [1, 2].map(|node| faults.verdict(Time(later), NodeId(node)).is_some());
        assert_eq!(verdicts(&faults), [false, false], "an hour later too");
        faults.vouch(JobId(1), &[NodeId(2)].into());
        assert_eq!(verdicts(&faults), [false, false], "nothing counts against a node twice");
        faults.settle(NodeId(1));
        assert_eq!(verdicts(&faults), [false, true], "long ago");
    }

    #[test]
    fn snapshots_with_witnesses_as_bits_are_read() {
        let old = [(NodeId(1), JobId(2), Time(3), false), (NodeId(1), JobId(2), Time(3), true)];
        let bytes = stoke_protocol::codec::encode_record(&old).unwrap();
        let read: [Fault; 2] = stoke_protocol::codec::decode_record(&bytes).unwrap();
        assert_eq!(read, [fault(1, 2, 3, false), fault(1, 2, 3, true)]);
    }
}
