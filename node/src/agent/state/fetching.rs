//! Ranks whose program is fetched before they can start. Part of `state.rs`: owns the way from Fetching to Starting, or to the end of a rank that has had no
//! process.

use stoke_protocol::message::rank::{Exit, RankEvent, RankId};

use super::{AgentState, Effect, Fetched, Phase};

impl AgentState {
    /// The answer to [`Effect::Fetch`]. One of a session that is gone may come twice.
    pub(super) fn fetched(&mut self, id: RankId, fetched: Fetched, out: &mut Vec<Effect>) {
        let Some(rank) = self.ranks.get_mut(&id) else { return };
        let Phase::Fetching { start, artifact } = &rank.phase else { return };
        match fetched {
            Fetched::There => {
                let start = (**start).clone();
                rank.phase = Phase::Starting;
                out.push(Effect::Spawn(start));
            }
            Fetched::Lost if self.connected => out.push(Effect::Fetch { id, artifact: *artifact }),
            Fetched::Lost => {}
            Fetched::Refused(reason) => self.ended(id, Exit::NotStarted(reason), out),
            Fetched::Unfit(reason) => {
                let error = format!("its program: {reason}");
                if let Some(failed) = rank.said.once(RankEvent::Failed { error: error.clone(), permanent: true }) {
                    self.report(id, failed, 0, out);
                }
                self.ended(id, Exit::NotStarted(error), out);
            }
        }
    }

    /// Whether a rank that is to stop had no process yet; it is gone then.
    pub(super) fn stopped_before_start(&mut self, id: RankId, out: &mut Vec<Effect>) -> bool {
        let fetches = self.ranks.get(&id).is_some_and(|rank| matches!(rank.phase, Phase::Fetching { .. }));
        if fetches {
            self.ended(id, Exit::NotStarted("stopped before it was started".into()), out);
        }
        fetches
    }
}
