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
/// What a rank says of its failure is cut here, because it travels in a control frame.
const ERROR_BYTES_MAX: usize = 4 * 1024;
/// Reports on the way at a time: a long outage is delivered in pieces that the session's queue holds.
const WINDOW: usize = 256;

#[derive(Debug, Default)]
pub struct Outbox {
    last: u64,
    queue: VecDeque<Waiting>,
    /// So many at the front were sent in this session.
    sent: usize,
    /// The highest number that was sent in any session: the coordinator may have taken it in.
    told: u64,
}

#[derive(Debug)]
struct Waiting {
    report: Report,
    /// The rank's own number of it; 0 for what the agent says of the rank.
    said: u64,
}

/// A report that the coordinator has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken {
    pub id: RankId,
    /// The rank's own number of it; 0 for what the agent said of the rank.
    pub said: u64,
    /// It was the last of the rank.
    pub ended: bool,
}

impl Outbox {
    /// Takes in what happened to a rank, as its own event number `said` or, with 0, as its agent sees it. True if an older report had to go
    /// for it (O3).
    pub fn push(&mut self, id: RankId, event: RankEvent, said: u64) -> bool {
        let full = self.queue.len() >= REPORTS_MAX;
        if full && !self.shed() && is_droppable(&event) {
            return true;
        }
        self.last += 1;
        self.queue.push_back(Waiting { report: Report { sequence: self.last, id, event }, said });
        full
    }

    /// Forgets everything up to `sequence`, and gives what that was.
    pub fn acknowledge(&mut self, sequence: u64) -> Vec<Taken> {
        let count = self.queue.iter().take_while(|waiting| waiting.report.sequence <= sequence).count();
        self.sent = self.sent.saturating_sub(count);
        let taken = |Waiting { report, said }: Waiting| Taken {
            id: report.id,
            said,
            ended: matches!(report.event, RankEvent::Exited { .. }),
        };
        self.queue.drain(..count).map(taken).collect()
    }

    /// The session is gone: everything that was not acknowledged is sent again.
    pub fn rewind(&mut self) {
        self.sent = 0;
    }

    /// What may be sent now, marked as sent.
    pub fn take_sendable(&mut self) -> Vec<Report> {
        let until = self.queue.len().min(WINDOW);
        let reports = self.queue.range(self.sent.min(until)..until).map(|waiting| waiting.report.clone()).collect();
        self.sent = self.sent.max(until);
        self.told = self.told.max(self.sent.checked_sub(1).map_or(0, |last| self.queue[last].report.sequence));
        reports
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Ranks whose end is not acknowledged yet.
    pub fn ends(&self) -> impl Iterator<Item = RankId> {
        let reports = self.queue.iter().map(|waiting| &waiting.report);
        reports.filter(|report| matches!(report.event, RankEvent::Exited { .. })).map(|report| report.id)
    }

    /// Drops the oldest report about a checkpoint that nobody has heard yet; false if there is none.
    fn shed(&mut self) -> bool {
        let unheard = |waiting: &Waiting| waiting.report.sequence > self.told && is_droppable(&waiting.report.event);
        let Some(oldest) = self.queue.iter().position(unheard) else { return false };
        self.queue.remove(oldest);
        self.queue.range_mut(oldest..).for_each(|waiting| waiting.report.sequence -= 1);
        self.last -= 1;
        true
    }
}

/// What may go where there is no room for everything: words about checkpoints, for another follows, and about lost connections.
pub fn is_droppable(event: &RankEvent) -> bool {
    matches!(
        event,
        RankEvent::ShardStored { .. }
            | RankEvent::ManifestStored { .. }
            | RankEvent::NotStored { .. }
            | RankEvent::PeerLost { .. }
            | RankEvent::WentOn { .. }
    )
}

/// An error as it fits into a report.
pub fn shortened(mut error: String) -> String {
    error.truncate(error.floor_char_boundary(ERROR_BYTES_MAX));
    error
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::{Digest, Fingerprint, Generation, JobId, Rank, Step};
    use stoke_protocol::message::rank::{Exit, ShardRecord};

    use super::*;

    fn id(rank: u32) -> RankId {
        RankId { job: JobId(1), generation: Generation(1), rank: Rank(rank) }
    }

    fn shard(step: u64) -> RankEvent {
        let shard = ShardRecord { index: 0, file: "shard".into(), bytes: 1, blake3: Digest([0; 32]) };
        RankEvent::ShardStored { generation: Generation(1), step: Step(step), shard, state: Fingerprint(0) }
    }

    fn numbers(reports: &[Report]) -> Vec<u64> {
        reports.iter().map(|report| report.sequence).collect()
    }

    #[test]
    fn reports_are_sent_again_until_they_are_acknowledged() {
        let mut outbox = Outbox::default();
        (0..3).for_each(|step| assert!(!outbox.push(id(0), shard(step), step + 1)));
        assert_eq!(numbers(&outbox.take_sendable()), [1, 2, 3]);
        assert!(outbox.take_sendable().is_empty());
        assert_eq!(outbox.acknowledge(2).len(), 2);
        outbox.push(id(0), RankEvent::Exited { exit: Exit::Code(0) }, 0);
        assert_eq!(numbers(&outbox.take_sendable()), [4]);
        outbox.rewind();
        assert_eq!(numbers(&outbox.take_sendable()), [3, 4]);
        assert_eq!(outbox.ends().collect::<Vec<_>>(), [id(0)]);
        let taken = outbox.acknowledge(9);
        let last = Taken { id: id(0), said: 0, ended: true };
        assert_eq!((taken[0].said, taken[0].ended, taken[1]), (3, false, last));
        assert_eq!(outbox.ends().count(), 0);
    }

    #[test]
    fn a_long_outage_is_delivered_in_pieces() {
        let mut outbox = Outbox::default();
        (0..600).for_each(|step| assert!(!outbox.push(id(0), shard(step), 0)));
        assert_eq!(outbox.take_sendable().len(), WINDOW);
        assert!(outbox.take_sendable().is_empty());
        outbox.acknowledge(100);
        assert_eq!(numbers(&outbox.take_sendable()), (257..=356).collect::<Vec<_>>());
    }

    #[test]
    fn a_full_outbox_drops_checkpoints_and_never_what_happened_to_ranks() {
        let mut outbox = Outbox::default();
        outbox.push(id(0), RankEvent::Failed { error: "x".into(), permanent: false }, 0);
        outbox.push(id(0), shard(0), 0);
        outbox.take_sendable();
        for step in 1..REPORTS_MAX as u64 + 50 {
            outbox.push(id(0), shard(step), 0);
        }
        outbox.push(id(0), RankEvent::Exited { exit: Exit::Code(1) }, 0);
        assert_eq!(outbox.queue.len(), REPORTS_MAX);
        assert!(matches!(outbox.queue[0].report.event, RankEvent::Failed { .. }));
        // What was sent stays, and the first that was not has gone.
        assert_eq!(outbox.queue[1].report.event, shard(0));
        assert_eq!(outbox.queue[2].report.event, shard(53));
        // O1: or the coordinator would refuse all that follows.
        assert!(outbox.queue.iter().zip(1..).all(|(waiting, number)| waiting.report.sequence == number));
        outbox.rewind();
        while !outbox.take_sendable().is_empty() {
            let last = outbox.queue[outbox.sent - 1].report.sequence;
            outbox.acknowledge(last);
        }
        assert!(outbox.is_empty());
    }
}
