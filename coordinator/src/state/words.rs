//! What a job's states, exits and differences are called by people. Decides nothing.

use std::collections::BTreeMap;

use stoke_protocol::ids::{Digest, Step};
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::rank::{Exit, Outcome, RankId};

use super::machine::REASON_CHARS_MAX;

/// How a process went, in words that follow "rank-1 on node-2".
pub fn exit_words(exit: &Exit) -> String {
    match exit {
        Exit::Code(0) => "exited before it had finished".into(),
        Exit::Code(4) => "was told to stop".into(),
        Exit::Code(code) => format!("exited with code {code}"),
        Exit::Signal(signal) => format!("was killed by signal {signal}"),
        Exit::NotStarted(why) => {
            format!("could not be started: {}", why.chars().take(REASON_CHARS_MAX).collect::<String>())
        }
        Exit::AgentRestarted => "ended while its agent was away, nobody saw how".into(),
        Exit::AgentStopped => "went with its agent, which was stopped".into(),
        Exit::Unseen => "ended without a word (its agent was restarted, and cannot tell how)".into(),
    }
}

/// `1 rank`, `2 ranks`.
pub fn rank_count(count: u32) -> String {
    if count == 1 { "1 rank".to_owned() } else { format!("{count} ranks") }
}

/// As the command line spells it.
pub fn state_word(state: JobState) -> &'static str {
    match state {
        JobState::Queued => "queued",
        JobState::Starting => "starting",
        JobState::Running => "running",
        JobState::Recovering => "recovering",
        JobState::Cancelling => "cancelling",
        JobState::Succeeded => "succeeded",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

/// What differs between replicas that must be equal, with the ranks named (J7): those of the smaller group.
pub(super) fn differing(members: &[RankId], outcomes: &[&Outcome]) -> Option<String> {
    let mut groups: BTreeMap<(Step, Digest), Vec<String>> = BTreeMap::new();
    for (id, outcome) in members.iter().zip(outcomes) {
        groups.entry((outcome.step, outcome.weights_blake3)).or_default().push(id.rank.to_string());
    }
    if groups.len() < 2 {
        return None;
    }
    let majority = groups.iter().max_by_key(|(_, ranks)| ranks.len()).map(|(key, _)| *key)?;
    let others: Vec<String> = groups
        .iter()
        .filter(|(key, _)| **key != majority)
        .map(|((step, digest), ranks)| format!("{} at {step} with weights {}", ranks.join(", "), short(digest)))
        .collect();
    Some(format!("replicas differ: {} against {} of the others", others.join("; "), short(&majority.1)))
}

/// The first member whose ledger is not that of the steps that it says it has done, or not that of the others (J7).
pub(super) fn unaccounted(members: &[RankId], outcomes: &[&Outcome]) -> Option<String> {
    let expected = outcomes.first()?.ledger;
    let wrong = |outcome: &Outcome| outcome.ledger.end != outcome.samples || outcome.ledger != expected;
    let (id, outcome) = members.iter().zip(outcomes).find(|(_, outcome)| wrong(outcome))?;
    let (ledger, samples, rank) = (outcome.ledger, outcome.samples, id.rank);
    Some(format!("samples are not accounted for: {rank} has the ledger {ledger} after {samples} samples"))
}

/// Enough of a digest to tell two apart.
fn short(digest: &Digest) -> String {
    digest.to_string().chars().take(12).collect()
}
