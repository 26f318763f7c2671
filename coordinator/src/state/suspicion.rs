//! Who is at fault when ranks lose each other. Owns the verdict on what the run remembers (`Run::lost`) and the moment before it; giving a rank
//! up is journalled (`Event::Evicted`).
//!
//! U1: only words about the newest generation count. U2: a moment passes between the first word and the verdict, so that all who lost somebody
//! are heard, and the report of an exit, which says more, comes first.

use std::collections::{BTreeMap, BTreeSet};

use stoke_protocol::ids::{Generation, JobId};
use stoke_protocol::message::rank::RankId;

use super::machine::Job;
use super::run::{Run, rank_is_known};
use super::time::Mono;

/// U2.
const HEARING_MS: u64 = 500;

/// Since when words about a generation are there. A restart hears them anew.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Hearings(BTreeMap<JobId, (Generation, Mono)>);

impl Hearings {
    /// The ranks to be given up now, with those who lost them.
    pub fn due<'a>(
        &mut self,
        now: Mono,
        parted: impl Iterator<Item = &'a Job>,
        silent: impl Fn(&Run, RankId) -> bool,
    ) -> Vec<(RankId, Vec<RankId>)> {
        let runs: BTreeMap<JobId, &Run> = parted.filter_map(|job| Some((job.id, job.run.as_ref()?))).collect();
        self.0.retain(|job, (generation, _)| runs.get(job).is_some_and(|run| run.generation == *generation));
        let mut verdicts = Vec::new();
        for (job, run) in runs {
            let (_, since) = *self.0.entry(job).or_insert((run.generation, now));
            if now.since_ms(since) >= HEARING_MS {
                verdicts.extend(verdict(run, |id| silent(run, id)));
            }
        }
        verdicts
    }
}

/// Whose going mends the most: one on a silent node first, then the one that most others lost, a rank that only joins, the higher slot.
fn verdict(run: &Run, silent: impl Fn(RankId) -> bool) -> Option<(RankId, Vec<RankId>)> {
    let pairs = || run.lost.iter().filter(|(by, of)| rank_is_known(run, *by) && rank_is_known(run, *of));
    let accused: BTreeSet<RankId> = pairs().flat_map(|(by, of)| [*by, *of]).collect();
    let accusers = |id: RankId| -> BTreeSet<RankId> {
        let other = |(by, of): &(RankId, RankId)| match id {
            id if id == *of => Some(*by),
            id if id == *by => Some(*of),
            _ => None,
        };
        pairs().filter_map(other).collect()
    };
    let named = |id: RankId| pairs().filter(|(_, of)| *of == id).count();
    let guilt = |id: &RankId| (silent(*id), accusers(*id).len(), named(*id), run.joining.contains(id), *id);
    let guilty = accused.into_iter().max_by_key(guilt)?;
    Some((guilty, accusers(guilty).into_iter().collect()))
}
