//! Who is at fault when ranks lose each other. Volatile: whoever lost a peer says it again in the next generation. It only points; giving a
//! rank up is journalled (`Event::Evicted`).
//!
//! U1: only words about the newest generation count. U2: a moment passes between the first word and the verdict, so that all who lost somebody
//! are heard, and the report of an exit, which says more, comes first.

use std::collections::{BTreeMap, BTreeSet};

use stoke_protocol::ids::{Generation, JobId};
use stoke_protocol::message::rank::RankId;

use super::machine::Run;
use super::time::Mono;

/// U2.
const HEARING_MS: u64 = 500;

#[derive(Clone, PartialEq, Debug, Default)]
pub struct Suspicions {
    jobs: BTreeMap<JobId, Case>,
}

#[derive(Clone, PartialEq, Debug)]
struct Case {
    generation: Generation,
    since: Mono,
    /// Who lost whom.
    lost: BTreeSet<(RankId, RankId)>,
}

impl Suspicions {
    pub fn add(&mut self, now: Mono, by: RankId, generation: Generation, of: RankId) {
        let fresh = Case { generation, since: now, lost: BTreeSet::new() };
        let case = self.jobs.entry(by.job).or_insert_with(|| fresh.clone());
        if case.generation < generation {
            *case = fresh;
        }
        if case.generation == generation && by.job == of.job {
            case.lost.insert((by, of));
        }
    }

    /// The ranks to be given up now, with those who lost them. `run` is the newest run of a job that runs, `silent` whether a rank's node is.
    pub fn due<'a>(
        &mut self,
        now: Mono,
        run: impl Fn(JobId) -> Option<&'a Run>,
        silent: impl Fn(RankId) -> bool,
    ) -> Vec<(RankId, Vec<RankId>)> {
        self.jobs.retain(|job, case| run(*job).is_some_and(|run| run.generation == case.generation));
        let due = self.jobs.iter().filter(|(_, case)| now.since_ms(case.since) >= HEARING_MS);
        let verdicts: Vec<_> = due.filter_map(|(job, case)| Some((*job, case.verdict(run(*job)?, &silent)?))).collect();
        for (job, _) in &verdicts {
            self.jobs.remove(job);
        }
        verdicts.into_iter().map(|(_, verdict)| verdict).collect()
    }
}

impl Case {
    /// Whose going mends the most: one on a silent node first, then the one that most others lost, a rank that only joins, the higher slot.
    fn verdict(&self, run: &Run, silent: &impl Fn(RankId) -> bool) -> Option<(RankId, Vec<RankId>)> {
        let known = |id: &RankId| run.members.contains(id) || run.joining.contains(id);
        let pairs = || self.lost.iter().filter(|(by, of)| known(by) && known(of));
        let accused: BTreeSet<RankId> = pairs().flat_map(|(by, of)| [*by, *of]).collect();
        let accusers = |id: RankId| -> Vec<RankId> {
            let both = pairs().filter_map(|(by, of)| if *of == id { Some(*by) } else { (*by == id).then_some(*of) });
            both.collect::<BTreeSet<RankId>>().into_iter().collect()
        };
        let named = |id: RankId| pairs().filter(|(_, of)| *of == id).count();
        let guilt = |id: &RankId| (silent(*id), accusers(*id).len(), named(*id), run.joining.contains(id), *id);
        let guilty = accused.into_iter().max_by_key(guilt)?;
        Some((guilty, accusers(guilty)))
    }
}
