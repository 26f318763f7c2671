//! The catalogue: which checkpoints are visible. A checkpoint is prepared while its shards come in (that is part of the run, see
//! `machine.rs`) and visible from the entry on that carries its manifest. Owns visibility and pruning; never touches a file.
//!
//! C1 (I17): the steps of a job's visible checkpoints never go back; at one step only a newer generation replaces an older, unless that one is
//!   pinned or continued from: both hold the same state. A damaged one goes with its pin, and the newest before it takes its place (I22).
//! C2 (I23): the newest `keep` of a job stay visible, and so does any that is pinned or that a job which has not ended continues from.
//! C3: what is out of sight is removed from its store by those who have access to it: by a rank of the job after each commit, by a node's agent
//!   after a prune. The coordinator has no credentials of stores, and is on no data path. Their orders name what stays, not what goes, so that
//!   one that comes twice, or late, removes nothing that became visible meanwhile.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::{Digest, Generation, JobId, LogIndex, NodeId, Step};
use stoke_protocol::message::client::CheckpointView;

use super::cluster::Refused;
use super::planted::PlantedBug;
use super::time::Time;

/// Pinned checkpoints of a cluster. A job's names travel in one control frame with the `keep` newest; the jobs are remembered as long as pins.
pub const PINS_MAX: usize = 512;
/// Damaged checkpoints whose folders are kept for those who look into it.
const DAMAGED_MAX: usize = 4;

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Catalogue {
    jobs: BTreeMap<JobId, Shelf>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
struct Shelf {
    visible: BTreeMap<Step, Checkpoint>,
    /// Steps that were committed, and not removed before one was damaged; a step that is replaced counts once.
    commits: u64,
    damaged: Vec<Checkpoint>,
    /// Steps of visible ones that no policy takes away.
    pinned: BTreeSet<Step>,
    /// The prune whose folders a node has not yet said to be removed, and the node that was told to.
    unswept: Option<(LogIndex, Option<NodeId>)>,
}

/// A visible checkpoint.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Checkpoint {
    pub generation: Generation,
    pub step: Step,
    pub uri: String,
    pub shards: u32,
    pub bytes: u64,
    pub manifest_blake3: Digest,
    pub at: Time,
    /// The journal entry that made it visible.
    pub index: LogIndex,
}

/// How many a job keeps, and what may not go.
pub struct Keep<'a> {
    pub newest: u32,
    /// Whether a job that has not ended continues from it.
    pub needed: &'a dyn Fn(&str) -> bool,
    pub bug: Option<PlantedBug>,
}

impl Catalogue {
    pub fn last(&self, job: JobId) -> Option<&Checkpoint> {
        self.jobs.get(&job)?.visible.values().next_back()
    }

    pub fn of(&self, job: JobId) -> impl Iterator<Item = &Checkpoint> {
        self.jobs.get(&job).into_iter().flat_map(|shelf| shelf.visible.values())
    }

    pub fn jobs(&self) -> impl Iterator<Item = JobId> {
        self.jobs.keys().copied()
    }

    /// The manifest that was committed at a URI, by whichever job.
    pub fn manifest_at(&self, uri: &str) -> Option<Digest> {
        let visible = self.jobs.values().flat_map(|shelf| shelf.visible.values());
        visible.filter(|checkpoint| checkpoint.uri == uri).map(|checkpoint| checkpoint.manifest_blake3).next()
    }

    pub fn count(&self) -> usize {
        self.jobs.values().map(|shelf| shelf.visible.len()).sum()
    }

    /// Whether a checkpoint may become visible (C1); the error says why not.
    pub fn check(&self, job: JobId, generation: Generation, step: Step) -> Result<(), String> {
        match self.last(job) {
            Some(last) if step < last.step => {
                Err(format!("{step} is before {}, which is committed: the committed step never goes back", last.step))
            }
            Some(last) if step == last.step && generation <= last.generation => {
                Err(format!("{step} was committed by {} already", last.generation))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Makes a checkpoint visible and takes older ones out of sight.
    pub fn commit(&mut self, job: JobId, checkpoint: Checkpoint, keep: &Keep<'_>) {
        let shelf = self.jobs.entry(job).or_default();
        match shelf.visible.get(&checkpoint.step) {
            Some(old) if shelf.pinned.contains(&old.step) || (keep.needed)(&old.uri) => return,
            Some(_) => {}
            None => shelf.commits += 1,
        }
        shelf.visible.insert(checkpoint.step, checkpoint);
        for step in shelf.surplus(keep) {
            shelf.visible.remove(&step);
        }
    }

    pub fn is_pinned(&self, job: JobId, step: Step) -> bool {
        self.jobs.get(&job).is_some_and(|shelf| shelf.pinned.contains(&step))
    }

    pub fn has_pins(&self, job: JobId) -> bool {
        self.jobs.get(&job).is_some_and(|shelf| !shelf.pinned.is_empty())
    }

    /// Whether a checkpoint can be pinned, or let go; the error says why not.
    pub fn check_pin(&self, job: JobId, step: Step) -> Result<(), Refused> {
        if self.of(job).all(|checkpoint| checkpoint.step != step) {
            return Err(Refused::NotFound(format!("{job} has no committed checkpoint at {step}")));
        }
        let pins: usize = self.jobs.values().map(|shelf| shelf.pinned.len()).sum();
        if pins >= PINS_MAX && !self.is_pinned(job, step) {
            return Err(Refused::Unavailable(format!(
                "{PINS_MAX} checkpoints are pinned, the most that a cluster takes"
            )));
        }
        Ok(())
    }

    pub fn pin(&mut self, job: JobId, step: Step) {
        self.jobs.entry(job).or_default().pinned.insert(step);
    }

    pub fn unpin(&mut self, job: JobId, step: Step) {
        self.jobs.entry(job).or_default().pinned.remove(&step);
    }

    /// Which would go, oldest first.
    pub fn surplus(&self, job: JobId, keep: &Keep<'_>) -> Vec<Checkpoint> {
        let Some(shelf) = self.jobs.get(&job) else { return Vec::new() };
        shelf.surplus(keep).into_iter().map(|step| shelf.visible[&step].clone()).collect()
    }

    /// Takes the surplus out of sight; it is to be swept from its store.
    pub fn prune(&mut self, job: JobId, index: LogIndex, keep: &Keep<'_>) {
        let shelf = self.jobs.entry(job).or_default();
        for step in shelf.surplus(keep) {
            shelf.visible.remove(&step);
        }
        shelf.commits = shelf.visible.len() as u64;
        shelf.unswept = Some((index, None));
    }

    /// The prune of a job that waits to be swept.
    pub fn unswept(&self, job: JobId) -> Option<LogIndex> {
        self.jobs.get(&job)?.unswept.map(|(index, _)| index)
    }

    /// Jobs that wait to be swept, with the node that was told to.
    pub fn all_unswept(&self) -> impl Iterator<Item = (JobId, Option<NodeId>)> {
        self.jobs.iter().filter_map(|(job, shelf)| Some((*job, shelf.unswept?.1)))
    }

    pub fn assign_sweep(&mut self, job: JobId, to: Option<NodeId>) {
        if let Some((_, by)) = self.jobs.get_mut(&job).and_then(|shelf| shelf.unswept.as_mut()) {
            *by = to;
        }
    }

    pub fn swept(&mut self, job: JobId) {
        if let Some(shelf) = self.jobs.get_mut(&job) {
            shelf.unswept = None;
        }
    }

    /// A checkpoint cannot be used: it is not visible any more. Gives whether it was.
    pub fn damage(&mut self, job: JobId, uri: &str) -> bool {
        let Some(shelf) = self.jobs.get_mut(&job) else { return false };
        let Some(step) = shelf.visible.values().find(|visible| visible.uri == uri).map(|visible| visible.step) else {
            return false;
        };
        shelf.damaged.extend(shelf.visible.remove(&step));
        shelf.pinned.remove(&step);
        shelf.damaged.drain(..shelf.damaged.len().saturating_sub(DAMAGED_MAX));
        // Those that were removed as one too many do not come back: what is left is all that can be kept.
        shelf.commits = shelf.visible.len() as u64;
        true
    }

    /// Names of the folders that stay: all others of the job that are older than its newest checkpoint may go.
    pub fn kept(&self, job: JobId) -> Vec<String> {
        let shelf = self.jobs.get(&job).into_iter();
        let stay = shelf.flat_map(|shelf| shelf.visible.values().chain(&shelf.damaged));
        stay.filter_map(|checkpoint| checkpoint.uri.rsplit('/').next().map(str::to_owned)).collect()
    }

    /// C1 and C2 for one job, with what is known of its generations; the error names the step.
    pub fn check_job(
        &self,
        job: JobId,
        keep: u32,
        worlds: &BTreeMap<Generation, (u32, LogIndex)>,
    ) -> Result<(), String> {
        let Some(shelf) = self.jobs.get(&job) else { return Ok(()) };
        if (shelf.visible.len() as u64) < shelf.commits.min(keep.into()) {
            return Err(format!(
                "I23: {job} keeps {keep} of {} checkpoints, {} are visible",
                shelf.commits,
                shelf.visible.len()
            ));
        }
        if let Some(step) = shelf.pinned.iter().find(|step| !shelf.visible.contains_key(step)) {
            return Err(format!("I23: {job} has pinned {step}, which is not visible"));
        }
        let mut newest = LogIndex(0);
        for Checkpoint { generation, step, shards, index, .. } in shelf.visible.values() {
            if *index < newest {
                return Err(format!("I17: {job} committed {step} at {index}, after a later step at {newest}"));
            }
            newest = *index;
            let Some((world, started)) = worlds.get(generation) else {
                // The oldest are forgotten.
                if worlds.first_key_value().is_none_or(|(oldest, _)| generation >= oldest) {
                    return Err(format!("I2: {job} committed {step} in {generation}, in which nobody trained"));
                }
                continue;
            };
            let next = worlds.range(generation.next()..).next().map(|(_, (_, next))| next);
            if index < started || next.is_some_and(|next| next < index) {
                return Err(format!("I2: {job} committed {step} in {generation} while another generation was current"));
            }
            if shards != world {
                return Err(format!("I21: {job} committed {step} with {shards} of {world} shards"));
            }
        }
        Ok(())
    }

    pub fn forget(&mut self, job: JobId) {
        self.jobs.remove(&job);
    }

    pub fn views(&self, job: JobId) -> Vec<CheckpointView> {
        self.of(job).map(|checkpoint| self.view(job, checkpoint)).collect()
    }

    pub fn view(&self, job: JobId, checkpoint: &Checkpoint) -> CheckpointView {
        CheckpointView {
            job,
            generation: checkpoint.generation,
            step: checkpoint.step,
            uri: checkpoint.uri.clone(),
            shards: checkpoint.shards,
            bytes: checkpoint.bytes,
            committed_ms: checkpoint.at.0,
            manifest_blake3: checkpoint.manifest_blake3,
            pinned: self.is_pinned(job, checkpoint.step),
        }
    }
}

impl Shelf {
    /// Steps that the policy takes away: all but the newest, the pinned and those that are continued from.
    fn surplus(&self, keep: &Keep<'_>) -> Vec<Step> {
        let newest = match keep.bug {
            Some(PlantedBug::PrunedOneMore) => (keep.newest as usize).saturating_sub(1),
            _ => keep.newest as usize,
        };
        let surplus = self.visible.len().saturating_sub(newest);
        let old = self.visible.iter().take(surplus);
        let gone = old.filter(|(step, old)| !self.pinned.contains(step) && !(keep.needed)(&old.uri));
        gone.map(|(step, _)| *step).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: JobId = JobId(1);

    fn checkpoint(generation: u64, step: u64) -> Checkpoint {
        Checkpoint {
            generation: Generation(generation),
            step: Step(step),
            uri: format!("file:///c/step-{step}-g{generation}"),
            shards: 2,
            bytes: 10,
            manifest_blake3: Digest([0; 32]),
            at: Time(0),
            index: LogIndex(0),
        }
    }

    /// What stays.
    fn commit(catalogue: &mut Catalogue, generation: u64, step: u64, needed: &str) -> Vec<String> {
        let keep = Keep { newest: 2, needed: &|uri| uri == needed, bug: None };
        catalogue.check(JOB, Generation(generation), Step(step)).unwrap();
        catalogue.commit(JOB, checkpoint(generation, step), &keep);
        catalogue.kept(JOB)
    }

    #[test]
    fn the_newest_and_those_that_are_continued_from_stay_visible() {
        let mut catalogue = Catalogue::default();
        let needed = "file:///c/step-10-g1";
        for step in [10, 20, 30] {
            commit(&mut catalogue, 1, step, needed);
        }
        assert_eq!(commit(&mut catalogue, 1, 40, needed), ["step-10-g1", "step-30-g1", "step-40-g1"]);
        let steps: Vec<u64> = catalogue.of(JOB).map(|checkpoint| checkpoint.step.0).collect();
        assert_eq!(steps, [10, 30, 40]);
    }

    #[test]
    fn a_manifest_is_found_by_its_place_until_it_goes() {
        let mut catalogue = Catalogue::default();
        commit(&mut catalogue, 1, 10, "");
        assert_eq!(catalogue.manifest_at("file:///c/step-10-g1"), Some(Digest([0; 32])));
        assert_eq!(catalogue.manifest_at("file:///c/step-10-g2"), None);
        assert!(catalogue.damage(JOB, "file:///c/step-10-g1"));
        assert_eq!(catalogue.manifest_at("file:///c/step-10-g1"), None);
    }

    #[test]
    fn the_committed_step_never_goes_back_and_a_newer_generation_replaces_at_one_step() {
        let mut catalogue = Catalogue::default();
        commit(&mut catalogue, 1, 20, "");
        assert!(catalogue.check(JOB, Generation(2), Step(10)).is_err());
        assert!(catalogue.check(JOB, Generation(1), Step(20)).is_err());
        assert_eq!(commit(&mut catalogue, 2, 20, ""), ["step-20-g2"]);
        assert_eq!(catalogue.last(JOB).unwrap().generation, Generation(2));
    }

    #[test]
    fn pins_outlast_commits_and_prunes_until_they_are_taken_back() {
        let mut catalogue = Catalogue::default();
        commit(&mut catalogue, 1, 10, "");
        assert!(catalogue.check_pin(JOB, Step(11)).is_err() && catalogue.check_pin(JobId(2), Step(10)).is_err());
        catalogue.check_pin(JOB, Step(10)).unwrap();
        catalogue.pin(JOB, Step(10));
        [20, 30].into_iter().for_each(|step| drop(commit(&mut catalogue, 1, step, "")));
        assert_eq!(commit(&mut catalogue, 1, 40, ""), ["step-10-g1", "step-30-g1", "step-40-g1"]);
        let keep = Keep { newest: 1, needed: &|_| false, bug: None };
        let steps = |surplus: Vec<Checkpoint>| surplus.iter().map(|checkpoint| checkpoint.step.0).collect::<Vec<_>>();
        assert_eq!(steps(catalogue.surplus(JOB, &keep)), [30]);
        catalogue.prune(JOB, LogIndex(7), &keep);
        assert_eq!(
            (catalogue.kept(JOB), catalogue.unswept(JOB)),
            (vec!["step-10-g1".into(), "step-40-g1".into()], Some(LogIndex(7)))
        );
        catalogue.unpin(JOB, Step(10));
        assert_eq!(steps(catalogue.surplus(JOB, &keep)), [10]);
        catalogue.swept(JOB);
        assert_eq!(catalogue.all_unswept().count(), 0);
    }

    /// C1: a later generation begins at the step and stores it again.
    #[test]
    fn what_is_pinned_or_continued_from_is_not_replaced_at_its_step() {
        let mut catalogue = Catalogue::default();
        commit(&mut catalogue, 1, 10, "");
        assert_eq!(commit(&mut catalogue, 2, 10, ""), ["step-10-g2"]);
        assert_eq!(commit(&mut catalogue, 3, 10, "file:///c/step-10-g2"), ["step-10-g2"]);
        catalogue.pin(JOB, Step(10));
        assert_eq!(commit(&mut catalogue, 4, 10, ""), ["step-10-g2"]);
        catalogue.unpin(JOB, Step(10));
        assert_eq!(commit(&mut catalogue, 5, 10, ""), ["step-10-g5"]);
    }

    #[test]
    fn a_damaged_checkpoint_gives_way_to_the_one_before_it() {
        let mut catalogue = Catalogue::default();
        commit(&mut catalogue, 1, 20, "");
        commit(&mut catalogue, 1, 30, "");
        assert!(catalogue.damage(JOB, "file:///c/step-30-g1") && !catalogue.damage(JOB, "file:///c/step-30-g1"));
        assert_eq!(catalogue.last(JOB).unwrap().step, Step(20));
        assert_eq!(commit(&mut catalogue, 2, 30, ""), ["step-20-g1", "step-30-g2", "step-30-g1"]);
    }

    /// Found by seed 11 of the simulator: the state was taken as unsound, and a coordinator that was started again refused its own journal.
    #[test]
    fn a_job_whose_only_checkpoint_is_damaged_may_have_none_left() {
        let mut catalogue = Catalogue::default();
        (1..=5).for_each(|step| drop(commit(&mut catalogue, 1, 10 * step, "")));
        let worlds = BTreeMap::from([(Generation(1), (2, LogIndex(0)))]);
        for step in [50, 40] {
            assert!(catalogue.damage(JOB, &format!("file:///c/step-{step}-g1")));
            assert_eq!(catalogue.check_job(JOB, 2, &worlds), Ok(()));
        }
        assert_eq!(catalogue.last(JOB), None);
    }
}
