//! The invariants of a run, checked after every event that changes what they look at: a name from the reliability catalogue and a function
//! each. They see the coordinator's state, the durable one, every process and everything that was noted; they change nothing.

use std::collections::{BTreeMap, BTreeSet};

use stoke_coordinator::state::Cluster;
use stoke_protocol::ids::{Generation, Incarnation, JobId, NodeId, Step};
use stoke_protocol::message::client::JobState;
use stoke_protocol::message::rank::RankId;

use super::store::uri;
use super::world::World;

type Holds = fn(&World, &mut Memory) -> Result<(), String>;

/// Name and function; the first that does not hold ends the run.
pub const TABLE: &[(&str, Holds)] = &[
    ("noted", nothing_was_noted),
    ("state", the_state_is_sound),
    ("I2+I17+I20", commits_go_forward_by_the_newest_generation),
    ("I3", a_rank_has_one_process),
    ("I5", incarnations_only_grow),
    ("I6", what_was_acknowledged_is_there),
    ("I7", a_key_has_one_job),
    ("I8", ends_absorb),
    ("I10", a_cancelled_job_stays_cancelled),
    ("I11", attempts_are_bounded),
    ("I13", processes_fit_their_machine),
    ("I15", a_process_holds_its_room),
    ("I21+I23", what_is_visible_is_complete),
    ("F33", a_job_speaks_against_one_node),
    ("I32", what_is_forbidden_does_not_happen),
];

/// What the last look has seen.
#[derive(Default)]
pub struct Memory {
    ended: BTreeMap<JobId, JobState>,
    /// The newest checkpoint, and how many were damaged before.
    commits: BTreeMap<JobId, (u64, Step, Generation)>,
    incarnations: BTreeMap<NodeId, Incarnation>,
    checked: Option<stoke_protocol::ids::LogIndex>,
}

fn nothing_was_noted(world: &World, _: &mut Memory) -> Result<(), String> {
    match &world.oracle.noted {
        Some((name, what)) => Err(format!("{name}: {what}")),
        None => Ok(()),
    }
}

/// The durable state and the one that is ahead of it.
fn states(world: &World) -> [&Cluster; 2] {
    [&world.shadow, world.cluster()]
}

fn the_state_is_sound(world: &World, memory: &mut Memory) -> Result<(), String> {
    let index = world.cluster().index();
    if memory.checked.replace(index) == Some(index) {
        return Ok(());
    }
    world.cluster().check_invariants()
}

fn commits_go_forward_by_the_newest_generation(world: &World, memory: &mut Memory) -> Result<(), String> {
    let catalogue = world.shadow.catalogue();
    for job in catalogue.jobs() {
        let Some(last) = catalogue.last(job) else { continue };
        let damages = world.oracle.damages.get(&job).copied().unwrap_or(0);
        let now = (damages, last.step, last.generation);
        let before = memory.commits.insert(job, now);
        if before == Some(now) {
            continue;
        }
        if before.is_some_and(|before| now < before) {
            return Err(format!("{job} has committed {now:?} after {before:?}"));
        }
        let folder = world.store.folder(&last.uri).ok_or_else(|| format!("{} is not in the store", last.uri))?;
        if (folder.job, folder.generation, folder.step) != (job, last.generation, last.step) {
            return Err(format!("{} is not the checkpoint of {now:?}", last.uri));
        }
        // I20: the samples of a lineage are [0, cursor) in one piece, so a checkpoint goes on from one that was visible.
        let continued = folder.parent == Step(0) || before.is_some();
        if folder.parent > last.step || !continued {
            return Err(format!("{job} at {} goes on from {}", last.step, folder.parent));
        }
    }
    Ok(())
}

fn a_rank_has_one_process(world: &World, _: &mut Memory) -> Result<(), String> {
    let mut seen: BTreeSet<RankId> = BTreeSet::new();
    match world.processes.values().find(|process| !seen.insert(process.id)) {
        Some(process) => Err(format!("{} has two processes", process.id)),
        None => Ok(()),
    }
}

fn incarnations_only_grow(world: &World, memory: &mut Memory) -> Result<(), String> {
    for node in world.shadow.members().nodes() {
        let before = memory.incarnations.insert(node.id, node.incarnation);
        if before.is_some_and(|before| node.incarnation < before) {
            return Err(format!("{} was {before:?} and is {}", node.id, node.incarnation));
        }
    }
    Ok(())
}

fn what_was_acknowledged_is_there(world: &World, _: &mut Memory) -> Result<(), String> {
    for ((owner, key), submission) in &world.oracle.submissions {
        let Some(acked) = submission.acked else { continue };
        let durable = world.shadow.jobs().by_key(owner, key).map(|job| job.id);
        if durable != Some(acked) {
            return Err(format!("{owner} was told of {acked} under {key:?}, durable is {durable:?}"));
        }
    }
    Ok(())
}

fn a_key_has_one_job(world: &World, _: &mut Memory) -> Result<(), String> {
    let mut keys = BTreeSet::new();
    match world.cluster().jobs().iter().find(|job| !keys.insert((&job.owner, &job.key))) {
        Some(job) => Err(format!("{} is the second job of {:?}", job.id, job.key)),
        None => Ok(()),
    }
}

fn ends_absorb(world: &World, memory: &mut Memory) -> Result<(), String> {
    for job in world.shadow.jobs().iter() {
        if let Some(before) = memory.ended.get(&job.id).filter(|before| **before != job.state) {
            return Err(format!("{} was {before:?} and is {:?}", job.id, job.state));
        }
        if job.state.is_terminal() {
            memory.ended.insert(job.id, job.state);
        }
    }
    for (job, shown) in &world.oracle.shown {
        let state = world.shadow.jobs().get(*job).map(|job| job.state);
        if state != Some(*shown) {
            return Err(format!("{job} was shown as {shown:?} and is {state:?}"));
        }
    }
    Ok(())
}

fn a_cancelled_job_stays_cancelled(world: &World, _: &mut Memory) -> Result<(), String> {
    for id in &world.oracle.cancelled {
        let state = world.shadow.jobs().get(*id).map(|job| job.state);
        if !matches!(state, Some(JobState::Cancelling | JobState::Cancelled)) {
            return Err(format!("the cancel of {id} was answered, it is {state:?}"));
        }
    }
    Ok(())
}

fn attempts_are_bounded(world: &World, _: &mut Memory) -> Result<(), String> {
    match world.cluster().jobs().iter().find(|job| job.failures > job.attempts_max) {
        Some(job) => Err(format!("{} has failed {} times of {}", job.id, job.failures, job.attempts_max)),
        None => Ok(()),
    }
}

/// Not as the coordinator books it: as the processes are.
fn processes_fit_their_machine(world: &World, _: &mut Memory) -> Result<(), String> {
    for (at, machine) in world.machines.iter().enumerate() {
        let (mut cpus, mut memory, mut gpus) = (0, 0, 0);
        for process in world.processes.values().filter(|process| process.machine == at) {
            cpus += process.plan.cpus;
            memory += process.plan.memory_bytes;
            gpus += process.plan.gpus;
        }
        let has = &machine.capacity;
        if cpus > has.cpus.into() || memory > has.memory_bytes || gpus > has.gpus.len() as u64 {
            return Err(format!(
                "machine {at} has {has:?}, its processes take {cpus} cpus, {memory} bytes, {gpus} gpus"
            ));
        }
    }
    Ok(())
}

/// A slot is given away only when its process is gone, however late anybody hears of it.
fn a_process_holds_its_room(world: &World, _: &mut Memory) -> Result<(), String> {
    for process in world.processes.values() {
        let node = world.machines[process.machine].node.expect("only members run ranks");
        for state in states(world) {
            // The room of a removed node is nobody's: no rank is placed there before its agent has ended with its processes.
            if state.members().was_removed(node) {
                continue;
            }
            if !state.members().node(node).is_some_and(|node| node.held.contains_key(&process.id)) {
                return Err(format!("{} has a process on {node} and no room there", process.id));
            }
        }
    }
    Ok(())
}

fn what_is_visible_is_complete(world: &World, _: &mut Memory) -> Result<(), String> {
    let catalogue = world.shadow.catalogue();
    for job in catalogue.jobs() {
        for checkpoint in catalogue.of(job) {
            match world.store.folder(&checkpoint.uri) {
                Some(folder) if folder.is_complete() => {}
                Some(folder) => return Err(format!("{} is visible with {:?}", checkpoint.uri, folder.shards)),
                None => return Err(format!("{} is visible and was removed", checkpoint.uri)),
            }
            let base = world.shadow.jobs().get(job).map(|job| job.checkpoints.clone()).unwrap_or_default();
            if checkpoint.uri != uri(&base, checkpoint.generation, checkpoint.step) {
                return Err(format!(
                    "{} does not name {} of {}",
                    checkpoint.uri, checkpoint.step, checkpoint.generation
                ));
            }
        }
    }
    Ok(())
}

/// As people are told it: the jobs for whose ranks a node is left alone are named by no other one's quarantine.
fn a_job_speaks_against_one_node(world: &World, _: &mut Memory) -> Result<(), String> {
    let mut named: BTreeMap<&str, NodeId> = BTreeMap::new();
    for node in world.cluster().members().nodes() {
        let Some(quarantine) = &node.quarantine else { continue };
        let words: BTreeSet<&str> = quarantine.reason.split([' ', ',']).collect();
        for job in words.into_iter().filter(|word| word.starts_with("job-")) {
            if let Some(other) = named.insert(job, node.id) {
                return Err(format!("{job} has put {other} and {} in quarantine", node.id));
            }
        }
    }
    Ok(())
}

fn what_is_forbidden_does_not_happen(world: &World, _: &mut Memory) -> Result<(), String> {
    match world.cluster().jobs().iter().find(|job| world.oracle.forbidden.contains(&job.key)) {
        Some(job) => Err(format!("{} was submitted by {}, who may only look", job.id, job.owner)),
        None => Ok(()),
    }
}
