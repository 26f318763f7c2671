//! The jobs that clients submit, as text and as what a modelled rank needs to know of it.

use stoke_protocol::ids::Step;
use stoke_protocol::spec::JobSpec;

use super::random::Stream;

/// What a modelled rank reads out of its spec.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    pub steps: Step,
    pub every: u64,
    pub cpus: u64,
    pub memory_bytes: u64,
    pub gpus: u64,
}

impl Plan {
    pub fn read(spec: &str) -> Self {
        let spec = JobSpec::parse(spec).expect("the coordinator hands out specs that it has parsed");
        let steps = spec.train.steps.expect("simulated jobs have steps");
        Self {
            steps: Step(steps),
            every: spec.checkpoint.every.unwrap_or(steps),
            cpus: spec.resources.cpus.into(),
            memory_bytes: spec.resources.memory.0,
            gpus: spec.resources.gpus.into(),
        }
    }
}

impl Plan {
    /// Whether a checkpoint is due after so many steps.
    pub fn is_due(&self, step: Step) -> bool {
        step > Step(0) && (step.0.is_multiple_of(self.every) || step == self.steps)
    }
}

pub fn draw(random: &mut Stream) -> String {
    let ranks = random.between(1, 4);
    let ranks_min = if random.chance(0.7) { 1 } else { random.between(1, ranks) };
    let cpus = random.between(1, 2);
    let memory = random.between(1, 3);
    let gpus = u64::from(random.chance(0.1));
    let steps = random.between(2, 30);
    let every = if random.chance(0.8) { format!("every = {}\n", random.between(1, 8)) } else { String::new() };
    let (keep, attempts) = (random.between(1, 3), random.between(1, 5));
    let zone = match random.between(0, 19) {
        0..=2 => "[resources.labels]\nzone = \"a\"\n",
        3 => "[resources.labels]\nzone = \"nowhere\"\n",
        _ => "",
    };
    let priority = random.between(0, 2);
    format!(
        "name = \"sim\"\ntrainer = \"digits\"\npriority = {priority}\n[train]\nsteps = {steps}\nbatch = 8\n\
         [resources]\nranks = {ranks}\nranks_min = {ranks_min}\ncpus = {cpus}\nmemory = \"{memory}GiB\"\ngpus = {gpus}\n{zone}\
         [checkpoint]\nkeep = {keep}\n{every}[restart]\nattempts = {attempts}\n"
    )
}
