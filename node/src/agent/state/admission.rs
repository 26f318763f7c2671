//! Whether a rank may start on this machine. Part of `state.rs`: owns the reasons of those that may not.

use stoke_protocol::message::rank::StartRank;
use stoke_protocol::spec::{Artifact, JobSpec, Program};

use super::super::claim::Claim;
use super::AgentState;

impl AgentState {
    /// Whether a rank may be started here, and with which program: the node decides for itself (A2, A3).
    pub(super) fn admit(&self, start: &StartRank) -> Result<(Claim, Option<Artifact>), String> {
        if self.shutting_down {
            return Err("the agent is going down".into());
        }
        if let Some(newest) = self.generations.get(&start.id.job).filter(|newest| **newest > start.id.generation) {
            return Err(format!("generation {newest} of {} was started here already", start.id.job));
        }
        let spec = JobSpec::parse(&start.spec).map_err(|error| format!("spec of {}: {error}", start.id.job))?;
        let (claim, has) = (Claim::of(&spec, start), &self.own.capacity);
        let used = self.ranks.values().fold(Claim::default(), |sum, rank| sum.plus(rank.claim));
        for (what, used, asked, has) in [
            ("cpus", used.cpus, claim.cpus, u64::from(has.cpus)),
            ("bytes of memory", used.memory_bytes, claim.memory_bytes, has.memory_bytes),
            ("gpus", used.gpus, claim.gpus, has.gpus.len() as u64),
        ] {
            if used.saturating_add(asked) > has {
                return Err(format!("{asked} {what} asked, {} of {has} are free", has.saturating_sub(used)));
            }
        }
        Ok((claim, spec.program.as_ref().and_then(Program::sent)))
    }
}
