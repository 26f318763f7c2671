//! The catalogue: which checkpoints are visible. A checkpoint is prepared while its shards come in (that is part of the run, see
//! `machine.rs`) and visible from the entry on that carries its manifest. Owns visibility and pruning; never touches a file.
//!
//! C1 (I17): the steps of a job's visible checkpoints never go back; at one step only a newer generation replaces an older.
//!   A damaged one goes, and the newest before it takes its place (I22).
//! C2 (I23): the newest `keep` of a job stay visible, and so does any that a job which has not ended continues from.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::{Digest, Generation, JobId, LogIndex, Step};
use stoke_protocol::message::client::CheckpointView;

use super::planted::PlantedBug;
use super::time::Time;

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
    pub pinned: &'a dyn Fn(&str) -> bool,
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
        if shelf.visible.insert(checkpoint.step, checkpoint).is_none() {
            shelf.commits += 1;
        }
        let newest = match keep.bug {
            Some(PlantedBug::PrunedOneMore) => (keep.newest as usize).saturating_sub(1),
            _ => keep.newest as usize,
        };
        let surplus = shelf.visible.len().saturating_sub(newest);
        let old = shelf.visible.iter().take(surplus).filter(|(_, old)| !(keep.pinned)(&old.uri));
        let old: Vec<Step> = old.map(|(step, _)| *step).collect();
        for step in old {
            shelf.visible.remove(&step);
        }
    }

    /// A checkpoint cannot be used: it is not visible any more. Gives whether it was.
    pub fn damage(&mut self, job: JobId, uri: &str) -> bool {
        let Some(shelf) = self.jobs.get_mut(&job) else { return false };
        let Some(step) = shelf.visible.values().find(|visible| visible.uri == uri).map(|visible| visible.step) else {
            return false;
        };
        shelf.damaged.extend(shelf.visible.remove(&step));
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
        self.of(job).map(|checkpoint| checkpoint.view(job)).collect()
    }
}

impl Checkpoint {
    pub fn view(&self, job: JobId) -> CheckpointView {
        CheckpointView {
            job,
            generation: self.generation,
            step: self.step,
            uri: self.uri.clone(),
            shards: self.shards,
            bytes: self.bytes,
            committed_ms: self.at.0,
            manifest_blake3: self.manifest_blake3,
        }
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
    fn commit(catalogue: &mut Catalogue, generation: u64, step: u64, pinned: &str) -> Vec<String> {
        let keep = Keep { newest: 2, pinned: &|uri| uri == pinned, bug: None };
        catalogue.check(JOB, Generation(generation), Step(step)).unwrap();
        catalogue.commit(JOB, checkpoint(generation, step), &keep);
        catalogue.kept(JOB)
    }

    #[test]
    fn the_newest_and_the_pinned_stay_visible() {
        let mut catalogue = Catalogue::default();
        let pinned = "file:///c/step-10-g1";
        for step in [10, 20, 30] {
            commit(&mut catalogue, 1, step, pinned);
        }
        assert_eq!(commit(&mut catalogue, 1, 40, pinned), ["step-10-g1", "step-30-g1", "step-40-g1"]);
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
