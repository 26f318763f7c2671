//! Jobs that run a command: what is known of how their commands end. A gang of them begins anew as a whole when one of it is lost, by the same generations
//! as ranks that train; there is no step, so nothing gets further, and `attempts` failures end the job. Part of the machine in `machine.rs`.
//!
//! C1: the job succeeds when the command of every member has exited with 0 in one generation. C2: an end of an older generation changes nothing: its rank
//! runs the command again, or says the end again where the members are the same.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::{Digest, Generation, Rank, Step};
use stoke_protocol::ledger::Ledger;
use stoke_protocol::message::client::{ExecView, JobState};
use stoke_protocol::message::node::ToNode;
use stoke_protocol::message::rank::{Exit, Outcome, RankId};
use stoke_protocol::spec::{Artifact, JobSpec};

use super::control::Control;
use super::effect::Order;
use super::machine::{Job, Scene};
use super::run::Run;
use super::words::rank_count;

/// What the coordinator keeps of a job's `[exec]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Runs {
    pub grace_ms: u64,
    /// Of the newest generation, as its ranks were told.
    pub restarts: u32,
    /// What each start of a command finds in its folder.
    pub artifact: Option<Artifact>,
    /// How commands of the newest gang have ended.
    pub exits: BTreeMap<Rank, Exit>,
}

impl Runs {
    /// None for a job without `[exec]`.
    pub fn of(spec: &JobSpec) -> Option<Self> {
        let exec = spec.exec.as_ref()?;
        Some(Self { grace_ms: exec.grace.0, restarts: 0, artifact: exec.artifact, exits: BTreeMap::new() })
    }
}

impl Job {
    /// A rank's command has ended; where it has failed, the rank says why next.
    pub fn command_ended(&mut self, scene: &mut Scene<'_>, id: RankId, generation: Generation, exit: &Exit) {
        let Some(run) = self.run.as_mut().filter(|_| self.state == JobState::Running) else { return };
        if !run.members.contains(&id) {
            return;
        }
        if let Some(runs) = &mut self.runs {
            runs.exits.insert(id.rank, exit.clone());
        }
        // C2.
        if *exit == Exit::Code(0)
            && generation == run.generation
            && let Some(rank) = run.ranks.get_mut(&id)
        {
            (rank.outcome, rank.finished) = (Some(done()), Some(generation));
            self.note(scene, format!("the command of {} has exited with 0", id.rank));
            self.conclude_commands(scene);
        }
        self.changed(scene);
    }

    /// C1.
    pub(super) fn conclude_commands(&mut self, scene: &mut Scene<'_>) {
        let Some(run) = self.run.as_ref().filter(|_| self.state == JobState::Running) else { return };
        let has_exited = |id: &RankId| run.ranks.get(id).is_some_and(|rank| rank.outcome.is_some());
        if run.members.is_empty() || !run.members.iter().all(has_exited) {
            return;
        }
        // Also to ranks of lost nodes: one that comes back must not wait for ever.
        for (id, rank) in &run.ranks {
            scene.orders.push(Order::Send { node: rank.node, message: ToNode::Release { id: *id } });
        }
        self.end(scene, JobState::Succeeded, String::new());
    }

    /// How long a rank that is told to stop may take: its command's grace comes on top.
    pub fn stop_grace_ms(&self, usual_ms: u64) -> u64 {
        usual_ms.saturating_add(self.runs.as_ref().map_or(0, |runs| runs.grace_ms))
    }

    pub(super) fn exec_view(&self) -> Option<ExecView> {
        let runs = self.runs.as_ref()?;
        let exits = runs.exits.iter().map(|(rank, exit)| (*rank, exit.clone())).collect();
        Some(ExecView { restarts: runs.restarts, attempts: self.attempts_max, artifact: runs.artifact, exits })
    }

    /// What a generation that goes on does, for the timeline.
    pub(super) fn resumed_words(&self, generation: Generation, step: Step) -> String {
        match (&self.runs, &self.run) {
            (Some(_), Some(run)) => {
                format!("{generation} runs its command on {}", rank_count(run.members.len() as u32))
            }
            (None, _) | (_, None) => format!("{generation} goes on at {step}"),
        }
    }
}

impl Control {
    /// Artifacts that a job which has not ended may start with.
    pub(super) fn needed_artifacts(&self) -> BTreeSet<Artifact> {
        let living = self.cluster.jobs().iter().filter(|job| !job.state.is_terminal());
        living.filter_map(|job| job.program.or_else(|| job.runs.as_ref()?.artifact)).collect()
    }
}

impl Run {
    /// Commands begin anew, so those that have ended have not.
    pub(super) fn forget_ends(&mut self) {
        self.ranks.retain(|_, rank| !rank.gone);
        for rank in self.ranks.values_mut() {
            (rank.outcome, rank.finished) = (None, None);
        }
    }
}

/// The outcome of a rank that has nothing to show: that it is there says that it is done.
fn done() -> Outcome {
    Outcome {
        step: Step(0),
        loss: 0.0,
        samples: 0,
        ledger: Ledger::default(),
        skipped: 0,
        weights_blake3: Digest([0; 32]),
        metrics: BTreeMap::new(),
    }
}
