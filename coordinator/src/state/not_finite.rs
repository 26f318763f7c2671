//! Steps whose sum is not finite: whose numbers they are, and what follows. Part of the machine in `machine.rs`. No rank has applied the sum.
//!
//! N1: a rank whose own numbers were not finite, and are when it computes them again, has a faulty machine: it is replaced, and the others do
//! the step again. N2: otherwise it is the job's own doing, and the spec says what follows (`train.on_nan`). Going back helps once: what is not
//! finite at the same step again would be for ever, because every step is a function of the state and its samples.

use stoke_protocol::ids::{Generation, NodeId, Step};
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::rank::{Given, RankEvent, RankId};
use stoke_protocol::spec::OnNan;

use super::cluster::Cluster;
use super::machine::{Job, Scene};
use super::replicas::{listed, named};
use super::run::Run;

/// What helps, behind every reason.
const MEND: &str = "lower [schedule] lr, set [train] clip_norm, or look at the rows that the ranks' logs name";
/// The same of reinforcement learning.
const MEND_RL: &str = "lower [rl] lr or max_grad_norm, or scale the environment's rewards down";

/// What a member says.
struct Finding {
    generation: Generation,
    step: Step,
    given: Given,
}

impl Cluster {
    /// A member says what its lanes gave to a sum that is not finite.
    pub(super) fn not_finite(&mut self, scene: &mut Scene<'_>, by: RankId, event: &RankEvent) {
        let RankEvent::NotFinite { generation, step, given } = event else { return };
        let begins = self.begins(by.job);
        let finding = Finding { generation: *generation, step: *step, given: given.clone() };
        self.replan = true;
        let faulty = self.jobs.drive(by.job, self.placements, |job| job.not_finite(scene, by, finding, &begins));
        faulty.unwrap_or_default().into_iter().for_each(|node| self.faults.miscomputed(node));
    }
}

impl Job {
    /// Gives the nodes of members that are at fault. `begins`: with what it would begin again.
    fn not_finite(&mut self, scene: &mut Scene<'_>, by: RankId, finding: Finding, begins: &str) -> Vec<NodeId> {
        let Finding { generation, step, given } = finding;
        let Some(run) = self.run.as_mut().filter(|_| self.state == JobState::Running) else { return Vec::new() };
        if run.generation != generation || !run.members.contains(&by) {
            return Vec::new();
        }
        run.not_finite.insert(by, (step, given));
        let told = |id: &RankId| run.not_finite.get(id).is_some_and(|(at, _)| *at == step);
        // A job that skips fails by the first word: a rank that joined late has skipped fewer.
        if self.on_nan != OnNan::Skip && !run.members.iter().all(told) {
            return Vec::new();
        }
        let again = |id: &&RankId| matches!(run.not_finite.get(id), Some((_, Given::FiniteAgain)));
        let faulty: Vec<RankId> = run.members.iter().filter(again).copied().collect();
        let what = format!("loss or gradient of {step} is not finite, from {}", sources(run));
        if !faulty.is_empty() {
            let names: Vec<String> = faulty.iter().map(|id| named(run, *id)).collect();
            let computed =
                format!("numbers of {} for {step} were not finite, and are when computed again", listed(names));
            if faulty.len() < run.members.len() {
                return self.expel(scene, &faulty, &computed);
            }
            self.go_back(scene, format!("{computed}; the job goes back to {begins}"));
            return Vec::new();
        }
        let mend = if self.trainer == "rl" { MEND_RL } else { MEND };
        match self.on_nan {
            OnNan::Rollback if self.went_back_for != Some(step) => {
                self.went_back_for = Some(step);
                self.go_back(scene, format!("{what}; the job goes back to {begins}"));
            }
            OnNan::Rollback => self.give_up(scene, format!("{what}, again after going back: {mend}")),
            OnNan::Skip => self.give_up(scene, format!("{what}, as of the steps before, which were skipped: {mend}")),
            OnNan::Fail => {
                self.give_up(scene, format!("{what}: {mend}; [train] on_nan = \"skip\" leaves such steps out"))
            }
        }
        Vec::new()
    }

    /// No attempt can help.
    fn give_up(&mut self, scene: &mut Scene<'_>, reason: String) {
        self.doomed = true;
        self.recover(scene, reason);
    }
}

/// Lanes by rank.
fn sources(run: &Run) -> String {
    let of = |(id, (_, given)): (&RankId, &(Step, Given))| match given {
        Given::Finite | Given::FiniteAgain => None,
        Given::NotFinite { lanes } if lanes.is_empty() => Some(format!("the sum of the lanes of {}", named(run, *id))),
        Given::NotFinite { lanes } => {
            let lanes: Vec<String> = lanes.iter().map(u32::to_string).collect();
            Some(format!("lanes {} of {}", listed(lanes), named(run, *id)))
        }
    };
    let words: Vec<String> = run.not_finite.iter().filter_map(of).collect();
    match words.is_empty() {
        true if run.not_finite.len() < run.members.len() => "ranks that have not said which lanes".to_owned(),
        true => "no rank by itself, but their sum".to_owned(),
        false => listed(words),
    }
}
