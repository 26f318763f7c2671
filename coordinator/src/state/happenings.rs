//! What has happened in the cluster, the newest lines of all jobs and nodes together, for people who look. Volatile and bounded: a coordinator that starts anew begins with
//! what the timelines of its jobs still say. Decides nothing.

use std::collections::{BTreeSet, VecDeque};

use stoke_protocol::ids::{JobId, LogIndex, NodeId};
use stoke_protocol::list::List;
use stoke_protocol::message::client::ClusterEvent;
use stoke_protocol::message::join::Wants;

use super::cluster::Cluster;
use super::effect::Order;
use super::event::{Event, Record};
use super::time::Time;

/// Lines that are kept, and told at once: about 40 KiB.
const LINES_MAX: usize = 256;
/// Of so many jobs, the newest, timelines are read at the start.
const JOBS_READ_MAX: usize = 64;

#[derive(Default)]
pub struct Happenings(VecDeque<ClusterEvent>);

impl Happenings {
    /// As far as the timelines of jobs tell.
    pub fn of(cluster: &Cluster) -> Self {
        let jobs = cluster.jobs().iter().rev().take(JOBS_READ_MAX);
        let told = jobs.flat_map(|job| {
            job.timeline.lines().into_iter().map(|line| (Time(line.at_ms), line.index, job.id, line.text))
        });
        let mut lines: Vec<_> = told.filter(|(.., text)| !is_everyday(text)).collect();
        lines.sort_by_key(|(_, index, ..)| *index);
        let mut happenings = Self::default();
        for (at, index, job, text) in lines {
            happenings.add(at, index, (Some(job), None), text);
        }
        happenings
    }

    /// What an entry was that has just been applied.
    pub fn hear(&mut self, cluster: &Cluster, record: &Record, orders: &[Order]) {
        if let Some((node, text)) = words(cluster, &record.event) {
            self.add(record.at, cluster.index(), (None, node), text);
        }
        for id in touched(&record.event, orders) {
            let Some(job) = cluster.jobs().get(id) else { continue };
            for text in job.timeline.of(cluster.index()).filter(|text| !is_everyday(text)) {
                self.add(record.at, cluster.index(), (Some(id), None), text.to_owned());
            }
        }
    }

    /// Behind an entry, oldest first.
    pub fn after(&self, index: LogIndex) -> List<ClusterEvent> {
        let first = self.0.partition_point(|event| event.index <= index);
        self.0.range(first..).cloned().collect()
    }

    fn add(&mut self, at: Time, index: LogIndex, (job, node): (Option<JobId>, Option<NodeId>), text: String) {
        if self.0.len() >= LINES_MAX {
            self.0.pop_front();
        }
        let grave = is_grave(&text);
        self.0.push_back(ClusterEvent { at_ms: at.0, index, job, node, grave, text });
    }
}

/// Jobs whose timelines may have a line of this entry.
fn touched(event: &Event, orders: &[Order]) -> BTreeSet<JobId> {
    let changed = orders.iter().filter_map(|order| match order {
        Order::Changed { job } => Some(*job),
        Order::Send { .. } => None,
    });
    let named = match event {
        Event::Reported { report, .. } => Some(report.id.job),
        Event::PaceNoted { id, .. } => Some(id.job),
        _ => None,
    };
    changed.chain(named).collect()
}

/// Checkpoints come again and again, and have a list of their own.
fn is_everyday(text: &str) -> bool {
    text.starts_with("checkpoint at ") && text.contains(" committed")
}

fn is_grave(text: &str) -> bool {
    let beginnings = ["failed", "is lost", "is in quarantine", "its drain is overdue"];
    beginnings.iter().any(|words| text.starts_with(words)) || text.contains(" ended: ") || text.contains(" was not ")
}

/// Of entries that are of no job.
fn words(cluster: &Cluster, event: &Event) -> Option<(Option<NodeId>, String)> {
    let of = |node: &NodeId, text: String| Some((Some(*node), text));
    match event {
        Event::Founded { admin, .. } => Some((None, format!("the cluster was founded for {admin}"))),
        Event::EpochRaised { version } => {
            Some((None, format!("the coordinator has started (stoke {version}, {})", cluster.epoch())))
        }
        Event::Joined { wants: Wants::Node { name }, .. } => {
            of(&cluster.members().last(), format!("has joined as {name}"))
        }
        Event::Joined { wants: Wants::User { name }, .. } => Some((None, format!("user {name} has logged in"))),
        Event::NodeUp { hello, .. } => of(&hello.node, format!("is connected: {}", hello.name)),
        Event::NodeLost { node, .. } => of(node, "is lost: it has not been heard of".into()),
        Event::DrainAsked { node, by, .. } => of(node, format!("is drained by {by}")),
        Event::DrainLifted { node, by } => of(node, format!("serves again, by {by}")),
        Event::DrainOverdue { node } => of(node, "its drain is overdue: the ranks that are left are stopped".into()),
        Event::NodeRemoved { node, by } => of(node, format!("was removed by {by}")),
        Event::NodeQuarantined { node, reason } => of(node, format!("is in quarantine: {reason}")),
        Event::ProbationBegun { node } => of(node, "is on probation: one rank may try it".into()),
        Event::QuarantineLifted { node, by } => of(node, format!("was let out of quarantine by {by}")),
        // Of a job, or of no interest to those who only look.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(index: u64, text: &str) -> (Time, LogIndex, String) {
        (Time(index * 10), LogIndex(index), text.to_owned())
    }

    #[test]
    fn newest_lines_are_kept_and_told_once_to_who_asks_behind_an_entry() {
        let mut happenings = Happenings::default();
        for number in 1..=300 {
            let (at, index, text) = event(number, "submitted by ada");
            happenings.add(at, index, (Some(JobId(number)), None), text);
        }
        let all = happenings.after(LogIndex(0));
        assert_eq!((all.len(), all[0].index), (LINES_MAX, LogIndex(45)));
        let new: Vec<u64> = happenings.after(LogIndex(298)).iter().map(|event| event.index.0).collect();
        assert_eq!(new, [299, 300]);
        assert!(happenings.after(LogIndex(300)).is_empty());
    }

    #[test]
    fn losses_are_grave_and_checkpoints_everyday() {
        for text in ["is lost: it has not been heard of", "g1 ended: rank-1 was killed; the others go on", "failed: x"]
        {
            assert!(is_grave(text), "{text}");
        }
        assert!(!is_grave("succeeded") && !is_grave("g1 runs, its world size is 2"));
        assert!(is_everyday("checkpoint at step-12 committed (12 in a row)"));
        assert!(!is_everyday("checkpoint at step-13 was not written by rank-0: no space"));
    }
}
