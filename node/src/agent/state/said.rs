//! Which of a rank's reports were made (A4). Part of `state.rs`.

use stoke_protocol::message::rank::RankEvent;

use super::super::outbox::shortened;

#[derive(Debug, Default)]
pub struct Said {
    ready: bool,
    failed: bool,
}

impl Said {
    /// The event if the rank may say it now (A4). Exited is the agent's word, not the rank's.
    pub fn once(&mut self, event: RankEvent) -> Option<RankEvent> {
        let first = |said: &mut bool| !std::mem::replace(said, true);
        match event {
            RankEvent::Ready { .. } => first(&mut self.ready).then_some(event),
            RankEvent::Failed { error, permanent } => {
                first(&mut self.failed).then(|| RankEvent::Failed { error: shortened(error), permanent })
            }
            RankEvent::ShardStored { .. } | RankEvent::ManifestStored { .. } | RankEvent::Finished { .. } => {
                Some(event)
            }
            RankEvent::Resumed { .. } | RankEvent::Joined { .. } | RankEvent::PeerLost { .. } => Some(event),
            RankEvent::WentOn { .. } | RankEvent::NotStored { .. } | RankEvent::Damaged { .. } => Some(event),
            RankEvent::Differ { .. } | RankEvent::NotFinite { .. } => Some(event),
            RankEvent::StateLost { .. } | RankEvent::CommandEnded { .. } => Some(event),
            RankEvent::Exited { .. } => None,
        }
    }
}
