//! Who makes room for a more urgent job. A decision without memory, part of a plan (`placement.rs`): which ranks leave their jobs, or which
//! jobs stop and wait; how they do is the jobs' (`yielding.rs`).
//!
//! E1: only jobs of lower priority make room, so that no two can push each other out in turns; only when that lets the whole gang fit, and no
//! more of them than are needed. The least urgent and the newest come first. E2: where it is enough that jobs shrink to their `ranks_min`, none
//! stops. E3: room that is on its way back counts as there, whoever gives it: nobody makes room twice, and nobody
//! less urgent takes a part of it that comes first. E4: a job that has made room is spared for a while
//! after it runs again.

use std::collections::BTreeSet;

use stoke_protocol::ids::{JobId, NodeId};
use stoke_protocol::message::rank::RankId;

use super::machine::Job;
use super::placement::View;
use super::room::Left;

/// Jobs or ranks that are looked at for one that waits: each costs a search of its own.
const VICTIMS_MAX: usize = 1_024;

/// What is to be done for a job that waits.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sacrifice {
    /// Ranks that leave their jobs.
    pub ranks: Vec<RankId>,
    /// Jobs that stop and wait.
    pub jobs: Vec<JobId>,
    /// Whose room is on its way back already.
    pub leaving: Vec<JobId>,
    /// Where the gang will be: what frees up there is for it.
    pub nodes: Vec<NodeId>,
}

/// What could go, with whose it is and where it has room.
struct Offer<'a, T> {
    what: T,
    job: &'a Job,
    nodes: Vec<NodeId>,
}

/// Nothing, where no room can be made or none has to be. Jobs that get ranks in the same plan make none.
pub fn sacrifice(view: &View<'_>, left: &Left<'_>, urgent: &Job, grows: &BTreeSet<JobId>) -> Option<Sacrifice> {
    let may = |job: &&Job| !view.spared.contains(&job.id) && !grows.contains(&job.id);
    let mut victims = view.jobs.yielders(urgent.priority).filter(may).peekable();
    if victims.peek().is_none() && view.jobs.leaving().next().is_none() {
        return None;
    }
    let mut base = left.clone();
    for job in view.jobs.leaving() {
        job.given_back().for_each(|(rank, node)| base.give_back(node, &job.ask.room_of(rank)));
    }
    if let Ok(nodes) = base.find(&urgent.ask) {
        let there = |job: &&Job| job.given_back().any(|(_, node)| nodes.contains(&node));
        let leaving = view.jobs.leaving().filter(there).map(|job| job.id).collect();
        return Some(Sacrifice { leaving, nodes, ..Sacrifice::default() });
    }
    let victims: Vec<&Job> = victims.collect();
    shrink(&victims, &base, urgent).or_else(|| stop(&victims, &base, urgent))
}

fn shrink(victims: &[&Job], base: &Left<'_>, urgent: &Job) -> Option<Sacrifice> {
    let spare = victims.iter().flat_map(|job| job.spare().into_iter().map(|(what, node)| (what, *job, node)));
    let useful = spare.filter(|(_, _, node)| base.could_take(*node, &urgent.ask));
    let offers = useful.map(|(what, job, node)| Offer { what, job, nodes: vec![node] }).take(VICTIMS_MAX).collect();
    let (ranks, nodes) = fewest(offers, base, urgent)?;
    let ranks = ranks.into_iter().map(|offer| offer.what).collect();
    Some(Sacrifice { ranks, nodes, ..Sacrifice::default() })
}

fn stop(victims: &[&Job], base: &Left<'_>, urgent: &Job) -> Option<Sacrifice> {
    let offer = |job: &Job| {
        let nodes = job.nodes();
        nodes.iter().any(|node| base.could_take(*node, &urgent.ask)).then_some(nodes)
    };
    let offers = victims.iter().filter_map(|job| Some(Offer { what: job.id, job, nodes: offer(job)? }));
    let (mut jobs, mut nodes) = fewest(offers.take(VICTIMS_MAX).collect(), base, urgent)?;
    let highest = jobs.iter().map(|offer| offer.job.priority).max();
    if jobs.len() > 1 {
        // One that is large enough, and not more urgent than these, is better than several.
        let equal = victims.iter().filter(|job| Some(job.priority) <= highest).take(VICTIMS_MAX);
        let single =
            equal.filter_map(|job| fewest(vec![Offer { what: job.id, job, nodes: offer(job)? }], base, urgent));
        (jobs, nodes) = single.into_iter().next().unwrap_or((jobs, nodes));
    }
    Some(Sacrifice { jobs: jobs.into_iter().map(|offer| offer.what).collect(), nodes, ..Sacrifice::default() })
}

/// As many from the front as are needed, without those that turn out not to be; and where the gang fits then.
fn fewest<'a, T>(
    mut offers: Vec<Offer<'a, T>>,
    base: &Left<'_>,
    urgent: &Job,
) -> Option<(Vec<Offer<'a, T>>, Vec<NodeId>)> {
    let with = |offers: &[Offer<'_, T>]| {
        let mut left = base.clone();
        offers.iter().for_each(|offer| offer.nodes.iter().for_each(|node| left.give_back(*node, &offer.job.ask.room)));
        left
    };
    with(&offers).find(&urgent.ask).ok()?;
    // The more room there is, the more fits: the end of those that are too few is found by halves.
    let counts: Vec<usize> = (1..=offers.len()).collect();
    let few = counts.partition_point(|count| with(&offers[..*count]).find(&urgent.ask).is_err());
    offers.truncate(few + 1);
    let mut left = with(&offers);
    for at in (0..offers.len()).rev() {
        let Offer { job, nodes, .. } = &offers[at];
        left.give(nodes, &job.ask);
        if left.find(&urgent.ask).is_ok() {
            offers.remove(at);
        } else {
            nodes.iter().for_each(|node| left.give_back(*node, &job.ask.room));
        }
    }
    let nodes = left.find(&urgent.ask).ok()?;
    Some((offers, nodes))
}
