//! Reports that the coordinator has not acknowledged. Pure. Owns their order, their numbers and their bound; never sends anything.
//!
//! O1: numbers grow by one from 1 within an incarnation, without a gap, and reports leave in that order. The coordinator refuses what comes
//!     after a gap, so only a report that was never sent may go, and those after it move up.
//! O2: a report stays until a number that is not lower is acknowledged.
//! O3: at most [`REPORTS_MAX`] stay. Beyond, the oldest report about a checkpoint or a lost connection goes: that checkpoint is then never
//!     committed, and the next one takes its place. What happened to a rank is never dropped (a few reports a rank, and ranks are bounded by the machine).

use std::collections::VecDeque;

use stoke_protocol::message::node::Report;
use stoke_protocol::message::rank::{RankEvent, RankId};

/// Hours of checkpoints while the coordinator is away; about 1 MiB.
pub const REPORTS_MAX: usize = 4096;
/// Reports on the way at a time: a long outage is delivered in pieces that the session's queue holds.
const WINDOW: usize = 256;

#[derive(Debug, Default)]
pub struct Outbox {
    last: u64,
    queue: VecDeque<Report>,
    /// So many at the front were sent in this session.
    sent: usize,
    /// The highest number that was sent in any session: the coordinator may have taken it in.
    told: u64,
}

impl Outbox {
    /// Takes in what happened to a rank. True if an older report had to go for it (O3).
    pub fn push(&mut self, id: RankId, event: RankEvent) -> bool {
        let full = self.queue.len() >= REPORTS_MAX;
        if full && !self.shed() && is_droppable(&event) {
            return true;
        }
        self.last += 1;
        self.queue.push_back(Report { sequence: self.last, id, event });
        full
    }

    /// Forgets everything up to `sequence`.
    pub fn acknowledge(&mut self, sequence: u64) {
        while self.queue.front().is_some_and(|report| report.sequence <= sequence) {
            self.queue.pop_front();
            self.sent = self.sent.saturating_sub(1);
        }
    }

    /// The session is gone: everything that was not acknowledged is sent again.
    pub fn rewind(&mut self) {
        self.sent = 0;
    }

    /// What may be sent now, marked as sent.
    pub fn take_sendable(&mut self) -> Vec<Report> {
        let until = self.queue.len().min(WINDOW);
        let reports = self.queue.range(self.sent.min(until)..until).cloned().collect();
        self.sent = self.sent.max(until);
        self.told = self.told.max(self.sent.checked_sub(1).map_or(0, |last| self.queue[last].sequence));
        reports
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Ranks whose end is not acknowledged yet.
    pub fn ends(&self) -> impl Iterator<Item = RankId> {
        self.queue.iter().filter(|report| matches!(report.event, RankEvent::Exited { .. })).map(|report| report.id)
    }

    /// Drops the oldest report about a checkpoint that nobody has heard yet; false if there is none.
    fn shed(&mut self) -> bool {
        let unheard = |report: &Report| report.sequence > self.told && is_droppable(&report.event);
        let Some(oldest) = self.queue.iter().position(unheard) else { return false };
        self.queue.remove(oldest);
        self.queue.range_mut(oldest..).for_each(|report| report.sequence -= 1);
        self.last -= 1;
        true
    }
}

fn is_droppable(event: &RankEvent) -> bool {
    matches!(
        event,
        RankEvent::ShardStored { .. }
            | RankEvent::ManifestStored { .. }
            | RankEvent::NotStored { .. }
            | RankEvent::PeerLost { .. }
            | RankEvent::WentOn { .. }
    )
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::{Digest, Generation, JobId, Rank, Step};
    use stoke_protocol::message::rank::{Exit, ShardRecord};

    use super::*;

    fn id(rank: u32) -> RankId {
        RankId { job: JobId(1), generation: Generation(1), rank: Rank(rank) }
    }

    fn shard(step: u64) -> RankEvent {
        let shard = ShardRecord { index: 0, file: "shard".into(), bytes: 1, blake3: Digest([0; 32]) };
        RankEvent::ShardStored { generation: Generation(1), step: Step(step), shard }
    }

    fn numbers(reports: &[Report]) -> Vec<u64> {
        reports.iter().map(|report| report.sequence).collect()
    }

    #[test]
    fn reports_are_sent_again_until_they_are_acknowledged() {
        let mut outbox = Outbox::default();
        (0..3).for_each(|step| assert!(!outbox.push(id(0), shard(step))));
        assert_eq!(numbers(&outbox.take_sendable()), [1, 2, 3]);
        assert!(outbox.take_sendable().is_empty());
        outbox.acknowledge(2);
        outbox.push(id(0), RankEvent::Exited { exit: Exit::Code(0) });
        assert_eq!(numbers(&outbox.take_sendable()), [4]);
        outbox.rewind();
        assert_eq!(numbers(&outbox.take_sendable()), [3, 4]);
        assert_eq!(outbox.ends().collect::<Vec<_>>(), [id(0)]);
        outbox.acknowledge(9);
        assert_eq!(outbox.ends().count(), 0);
    }

    #[test]
    fn a_long_outage_is_delivered_in_pieces() {
        let mut outbox = Outbox::default();
        (0..600).for_each(|step| assert!(!outbox.push(id(0), shard(step))));
        assert_eq!(outbox.take_sendable().len(), WINDOW);
        assert!(outbox.take_sendable().is_empty());
        outbox.acknowledge(100);
        assert_eq!(numbers(&outbox.take_sendable()), (257..=356).collect::<Vec<_>>());
    }

    #[test]
    fn a_full_outbox_drops_checkpoints_and_never_what_happened_to_ranks() {
        let mut outbox = Outbox::default();
        outbox.push(id(0), RankEvent::Failed { error: "x".into(), permanent: false });
        outbox.push(id(0), shard(0));
        outbox.take_sendable();
        for step in 1..REPORTS_MAX as u64 + 50 {
            outbox.push(id(0), shard(step));
        }
        outbox.push(id(0), RankEvent::Exited { exit: Exit::Code(1) });
        assert_eq!(outbox.queue.len(), REPORTS_MAX);
        assert!(matches!(outbox.queue[0].event, RankEvent::Failed { .. }));
        // What was sent stays, and the first that was not has gone.
        assert_eq!(outbox.queue[1].event, shard(0));
        assert_eq!(outbox.queue[2].event, shard(53));
        // O1: or the coordinator would refuse all that follows.
        assert!(outbox.queue.iter().zip(1..).all(|(report, number)| report.sequence == number));
        outbox.rewind();
        while !outbox.take_sendable().is_empty() {
            let last = outbox.queue[outbox.sent - 1].sequence;
            outbox.acknowledge(last);
        }
        assert!(outbox.is_empty());
    }
}
