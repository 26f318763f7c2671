//! The jobs that clients submit, as text and as what a modelled rank needs to know of it.

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::Step;
use stoke_protocol::spec::JobSpec;

use super::random::Stream;

/// What a job is called that nobody can run.
const POISON: &str = "poison";

/// What a modelled rank reads out of its spec.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    pub steps: Step,
    pub every: u64,
    pub cpus: u64,
    pub memory_bytes: u64,
    pub gpus: u64,
    /// Its processes end as soon as they have started (F33).
    pub poison: bool,
    pub ranks_min: usize,
}

impl Plan {
    pub fn read(spec: &str) -> Self {
        let spec = JobSpec::parse(spec).expect("the coordinator hands out specs that it has parsed");
        let steps = spec.training().steps.expect("simulated jobs have steps");
        Self {
            steps: Step(steps),
            every: spec.checkpoint.every.unwrap_or(steps),
            cpus: spec.resources.cpus.into(),
            memory_bytes: spec.resources.memory().0,
            gpus: spec.resources.gpus.into(),
            poison: spec.name == POISON,
            ranks_min: spec.resources.ranks_min.unwrap_or(1) as usize,
        }
    }
}

impl Plan {
    /// Whether a checkpoint is due after so many steps.
    pub fn is_due(&self, step: Step) -> bool {
        step > Step(0) && (step.0.is_multiple_of(self.every) || step == self.steps)
    }
}

/// A job as a client asks for it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct JobPlan {
    pub ranks: u64,
    pub ranks_min: u64,
    pub steps: u64,
    pub every: Option<u64>,
    pub keep: u64,
    pub attempts: u64,
    pub priority: u64,
    pub cpus: u64,
    pub memory_gib: u64,
    pub gpus: u64,
    pub zone: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub poison: bool,
    /// Ranks keep parts of the optimizer's state.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sharded: bool,
}

impl JobPlan {
    pub fn draw(random: &mut Stream) -> Self {
        let ranks = random.between("ranks", 1, 4);
        Self {
            ranks,
            ranks_min: if random.chance("one-may-do", 0.7) { 1 } else { random.between("ranks-min", 1, ranks) },
            cpus: random.between("cpus", 1, 2),
            memory_gib: random.between("memory", 1, 3),
            gpus: u64::from(random.chance("gpu", 0.1)),
            steps: random.between("steps", 2, 30),
            every: random.chance("checkpoints", 0.8).then(|| random.between("every", 1, 8)),
            keep: random.between("keep", 1, 3),
            attempts: random.between("attempts", 1, 5),
            zone: match random.between("zone", 0, 19) {
                0..=2 => Some("a".to_owned()),
                3 => Some("nowhere".to_owned()),
                _ => None,
            },
            priority: random.between("priority", 0, 2),
            poison: random.chance("poison", 0.05),
            sharded: random.chance("sharded", 0.3),
        }
    }

    /// The spec that is submitted.
    pub fn text(&self) -> String {
        let Self { ranks, ranks_min, steps, every, keep, attempts, priority, cpus, memory_gib, gpus, zone, .. } = self;
        let sharding = if self.sharded { "sharding = \"zero1\"\n" } else { "" };
        let name = if self.poison { POISON } else { "sim" };
        let zone = zone.as_ref().map(|zone| format!("[resources.labels]\nzone = {zone:?}\n")).unwrap_or_default();
        let every = every.map(|every| format!("every = {every}\n")).unwrap_or_default();
        format!(
            "name = {name:?}\ntrainer = \"digits\"\npriority = {priority}\n[train]\nsteps = {steps}\nbatch = 8\n{sharding}\
             [resources]\nranks = {ranks}\nranks_min = {ranks_min}\ncpus = {cpus}\nmemory = \"{memory_gib}GiB\"\ngpus = {gpus}\n{zone}\
             [checkpoint]\nkeep = {keep}\n{every}[restart]\nattempts = {attempts}\n"
        )
    }
}

/// What makes a job simpler, one thing at a time.
pub const SIMPLER: [fn(&mut JobPlan); 12] = [
    |job| (job.ranks, job.ranks_min) = (1, 1),
    |job| (job.ranks, job.ranks_min) = (2.min(job.ranks), job.ranks_min.min(2)),
    |job| job.ranks_min = 1,
    |job| job.steps = 2.min(job.steps),
    |job| job.steps -= job.steps / 2,
    |job| job.every = None,
    |job| (job.cpus, job.memory_gib) = (1, 1),
    |job| job.gpus = 0,
    |job| job.zone = None,
    |job| job.priority = 0,
    |job| job.sharded = false,
    |job| (job.keep, job.attempts) = (1, 1),
];
