//! Models whose jobs come and go with their requests: what `autoscale.rs` is shown, and what follows of its verdicts, by the same entries as when a
//! person asks for replicas. Owns which job's keys rule, which one leaves, and what the timelines say.
//!
//! Z1: the newest job of a model that stays, without a share or a shadow, rules: its `replicas`, or that there are none. So a spec with other bounds
//!   takes over by being submitted; jobs with others leave first.
//! Z2: a replica is submitted only where there is room for it now, and the last job that answers is never let go.
//! Z3: jobs with a share or a shadow are neither counted nor scaled.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::{JobState, Refusal, ScaleView};
use stoke_protocol::message::load::FirstTokens;
use stoke_protocol::message::serve::Traffic;

use super::autoscale::{FAILED_MS_MAX, NO_ROOM_MS_MAX, Policy, Scaler, Seen, Verdict, Why};
use super::control::{Control, Step};
use super::event::Event;
use super::machine::{Job, Scene};
use super::placement::words;
use super::room::Left;
use super::serving::Serves;
use super::time::Mono;
use super::words::rank_count;

/// Who asks for what is done here, as the journal has it.
const BY: &str = "autoscale";
/// Between two looks at a model.
const LOOK_MS: u64 = 1_000;

/// What is remembered of the models that scale themselves. Volatile.
#[derive(Clone, Default, Debug)]
pub struct Scaling {
    looked: Mono,
    models: BTreeMap<String, Model>,
}

#[derive(Clone, Default, Debug)]
struct Model {
    scaler: Scaler,
    /// Replicas that were added and have not answered yet.
    added: Vec<JobId>,
}

/// The jobs of a model that count (Z3), oldest first.
#[derive(Clone, Default, Debug)]
pub(super) struct Regulars {
    jobs: Vec<Regular>,
}

#[derive(Clone, Copy, Debug)]
struct Regular {
    id: JobId,
    answers: bool,
    policy: Option<Policy>,
}

impl Regulars {
    /// How many there are, how many of them answer, and the bounds that rule.
    pub fn view(&self) -> (u32, u32, Option<ScaleView>) {
        (self.jobs.len() as u32, self.answering(), self.ruling().map(|(_, policy)| policy.view()))
    }

    pub fn jobs(&self) -> impl Iterator<Item = JobId> {
        self.jobs.iter().map(|job| job.id)
    }

    /// Z1.
    fn ruling(&self) -> Option<(JobId, Policy)> {
        let newest = self.jobs.last()?;
        Some((newest.id, newest.policy?))
    }

    /// Who goes where so many are enough: jobs with other keys than those that rule, then those that do not answer, then the newest.
    fn surplus(&self, to: u32) -> Vec<JobId> {
        let rules = self.jobs.last().and_then(|newest| newest.policy);
        let mut order = self.jobs.clone();
        order.sort_by_key(|job| (job.policy == rules, job.answers, Reverse(job.id)));
        let (mut answering, mut gone) = (self.answering(), Vec::new());
        for job in order.iter().take(self.jobs.len().saturating_sub(to as usize)) {
            // Z2: the others may not come up.
            if job.answers && answering == 1 {
                break;
            }
            answering -= u32::from(job.answers);
            gone.push(job.id);
        }
        gone
    }

    fn answering(&self) -> u32 {
        self.jobs.iter().filter(|job| job.answers).count() as u32
    }
}

impl Control {
    /// What each model has now.
    pub(super) fn regulars(&self) -> BTreeMap<String, Regulars> {
        let mut models = BTreeMap::<String, Regulars>::new();
        for job in self.cluster.jobs().iter() {
            let regular = |serves: &&Serves| serves.traffic() == Traffic::Rest;
            let Some(serves) = job.serving().filter(regular) else { continue };
            let regular = Regular { id: job.id, answers: job.answers(), policy: serves.policy };
            models.entry(serves.model.clone()).or_default().jobs.push(regular);
        }
        models
    }

    /// The job whose keys scale a model, and those.
    pub(super) fn scales(&self, model: &str) -> Option<(JobId, Policy)> {
        let newest = self.cluster.regular(model).next_back()?;
        Some((newest.id, newest.serves.as_ref()?.policy?))
    }

    /// Looks at all models that scale themselves, when it is time.
    pub(super) fn autoscale(&mut self, step: &mut Step) {
        if self.now.mono.since_ms(self.scaling.looked) < LOOK_MS {
            return;
        }
        self.scaling.looked = self.now.mono;
        let mut before = std::mem::take(&mut self.scaling.models);
        for (name, regulars) in self.regulars() {
            let Some((ruling, policy)) = regulars.ruling() else { continue };
            let mut model = before.remove(&name).unwrap_or_default();
            self.settle(step, &mut model, (ruling, &regulars));
            let seen = self.seen(&name, &regulars);
            match model.scaler.look(self.now.mono, &policy, &seen) {
                Verdict::Stay => {}
                Verdict::Grow { to, why } => self.grow(step, &mut model, (ruling, to - seen.replicas), &why),
                Verdict::Shrink { to, why } => self.shrink(step, &regulars, to, &why),
            }
            self.scaling.models.insert(name, model);
        }
    }

    /// What has become of the replicas that were added last.
    fn settle(&mut self, step: &mut Step, model: &mut Model, (ruling, regulars): (JobId, &Regulars)) {
        let jobs = self.cluster.jobs();
        let failed = model.added.iter().filter_map(|id| jobs.get(*id)).find(|job| job.state == JobState::Failed);
        if let Some(failed) = failed {
            let words = format!("{}, which was added, has failed: {}", failed.id, failed.reason);
            let (again_ms, _) = model.scaler.put_off(self.now.mono, FAILED_MS_MAX);
            model.added.clear();
            let words = format!("{words}; more replicas are tried again in {} s", again_ms / 1_000);
            return self.note_scale(step, vec![ruling], words);
        }
        let its = |id: &JobId| regulars.jobs.iter().find(|job| job.id == *id);
        let before = model.added.len();
        model.added.retain(|id| its(id).is_some_and(|job| !job.answers));
        if before > 0 && model.added.is_empty() {
            model.scaler.has_grown();
        }
    }

    fn seen(&self, model: &str, regulars: &Regulars) -> Seen {
        let now = self.now.mono;
        let (held, refused) = self.loads.unplaced(now, model);
        let (mut requests, mut unheard) = (u64::from(held) + u64::from(refused), 0);
        let mut times = FirstTokens::default();
        for job in &regulars.jobs {
            match self.loads.of(now, job.id) {
                Some(load) => {
                    requests += u64::from(load.running) + u64::from(load.waiting);
                    times.merge(&self.loads.recent(now, job.id));
                }
                None => unheard += u32::from(job.answers),
            }
        }
        let (replicas, answering) = (regulars.jobs.len() as u32, regulars.answering());
        Seen { replicas, answering, unheard, requests, first_token_ms: times.quantile_ms(0.99) }
    }

    /// So many replicas more, or as many as there is room for.
    fn grow(&mut self, step: &mut Step, model: &mut Model, (ruling, more): (JobId, u32), why: &Why) {
        let Some(ask) = self.cluster.jobs().get(ruling).map(|job| job.ask.clone()) else { return };
        let mut left = Left::new(self.cluster.members(), self.liveness.live(), self.cluster.planted_bug());
        let fits = |left: &mut Left<'_>| left.find(&ask).map(|placement| left.give(&placement, &ask)).is_ok();
        let added = match (0..more).take_while(|_| fits(&mut left)).count() {
            0 => Err(format!("there is no room for one ({} of {})", rank_count(ask.ranks), words(&ask))),
            count => self.add_replicas(step, ruling, count).map_err(|Refusal { message, .. }| message),
        };
        match added {
            Ok(added) => {
                let noted = [&[ruling], &added[..]].concat();
                self.note_scale(step, noted, format!("{BY}: {} more, {}: {why}", added.len(), named(&added)));
                model.added = added;
            }
            Err(problem) => {
                let (_, is_first) = model.scaler.put_off(self.now.mono, NO_ROOM_MS_MAX);
                if is_first {
                    let words = format!("{BY}: {more} more wanted, but {problem}; tried again, later and later: {why}");
                    self.note_scale(step, vec![ruling], words);
                }
            }
        }
    }

    fn shrink(&mut self, step: &mut Step, regulars: &Regulars, to: u32, why: &Why) {
        let surplus = regulars.surplus(to);
        if surplus.is_empty() {
            return;
        }
        // And for the timeline of the one that rules from now on.
        let stays = regulars.jobs().filter(|job| !surplus.contains(job)).last();
        let noted = stays.into_iter().chain(surplus.iter().copied()).collect();
        self.note_scale(step, noted, format!("{BY}: {} fewer, {}: {why}", surplus.len(), named(&surplus)));
        for job in surplus {
            // One that has ended by itself meanwhile needs no more.
            let _unchanged = self.commit(step, Event::LeaveAsked { job, by: BY.to_owned() });
        }
    }

    fn note_scale(&mut self, step: &mut Step, jobs: Vec<JobId>, words: String) {
        // Jobs that are gone have no timeline.
        let _unchanged = self.commit(step, Event::ScaleNoted { jobs, words });
    }
}

impl Job {
    pub(super) fn scale_noted(&mut self, scene: &mut Scene<'_>, words: &str) {
        self.note(scene, words.to_owned());
        self.changed(scene);
    }
}

fn named(jobs: &[JobId]) -> String {
    jobs.iter().map(JobId::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regulars(jobs: &[(u64, bool, u32)]) -> Regulars {
        let policy =
            |max| Policy { min: 1, max, requests: 1, first_token_ms: None, grow_after_ms: 0, shrink_after_ms: 0 };
        let job = |(id, answers, max): &(u64, bool, u32)| Regular {
            id: JobId(*id),
            answers: *answers,
            policy: Some(policy(*max)),
        };
        Regulars { jobs: jobs.iter().map(job).collect() }
    }

    fn surplus(jobs: &[(u64, bool, u32)], to: u32) -> Vec<u64> {
        regulars(jobs).surplus(to).into_iter().map(|job| job.0).collect()
    }

    #[test]
    fn those_of_other_bounds_leave_first_then_those_that_do_not_answer_then_the_newest() {
        let same = [(1, true, 4), (2, false, 4), (3, true, 4)];
        assert_eq!((surplus(&same, 2), surplus(&same, 1)), (vec![2], vec![2, 3]));
        let other = [(1, true, 2), (2, true, 2), (3, true, 4)];
        assert_eq!((surplus(&other, 2), surplus(&other, 1)), (vec![2], vec![2, 1]), "Z1");
        assert!(surplus(&other, 3).is_empty());
    }

    #[test]
    fn the_last_that_answers_stays() {
        assert!(surplus(&[(1, true, 2), (2, false, 4)], 1).is_empty(), "Z2");
        assert_eq!(surplus(&[(1, true, 2), (2, true, 2), (3, false, 4)], 1), [2], "Z2");
    }
}
