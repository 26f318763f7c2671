//! Modelled ranks together: how they come to a term, step in it, and lose each other. What one of them does alone is in `ranks.rs`; how they go on
//! without the coordinator in `alone.rs`.

use stoke_protocol::ids::{Generation, JobId, Step, Term};
use stoke_protocol::message::rank::{Exit, FromRank, Membership, Progress, Purpose, RankEvent, RankId};

use super::ranks::{Act, Process, ProcessId};
use super::world::{Happening, World};

/// A term that stands, as far as it trains.
#[derive(Debug)]
pub struct Gang {
    pub(super) members: Vec<ProcessId>,
    pub(super) joining: Vec<ProcessId>,
    pub(super) at: Step,
    /// It steps no further: its job makes room for another one.
    pub(super) holds: bool,
}

impl World {
    /// A member is gone from under a step: it may be complete on some of the others.
    pub(super) fn interrupt(&mut self, term: (JobId, Term), gone: ProcessId) {
        let Some(gang) = self.gangs.get(&term).filter(|gang| gang.members.contains(&gone)) else { return };
        let (at, members) = (gang.at, gang.members.clone());
        self.break_up(term);
        let lost = self.processes.values().find(|process| process.id.job == term.0).map(|process| process.plan.steps);
        let halfway = self.streams.ranks.chance("halfway", 0.5) && lost.is_some_and(|steps| at < steps);
        for member in members {
            let done = halfway && self.streams.ranks.chance("step-done", 0.5);
            if let Some(process) = self.processes.get_mut(&member).filter(|process| done && process.entered == term.1) {
                process.step = Some(at.next());
            }
        }
    }

    /// Its ranks see that it is over, and go on to what they were told of meanwhile.
    pub(super) fn break_up(&mut self, term: (JobId, Term)) {
        let Some(gang) = self.gangs.remove(&term) else { return };
        for peer in gang.members.into_iter().chain(gang.joining) {
            let wait = self.streams.ranks.between("enters", 1, 50);
            self.act_after(wait, peer, Act::Enter);
            if self.processes.get(&peer).is_some_and(|process| process.entered == term.1) {
                self.part_from(peer);
            }
        }
    }

    pub(super) fn hear_membership(&mut self, at: ProcessId, membership: Membership) {
        let Some(process) = self.processes.get_mut(&at) else { return };
        if process.newest.as_ref().is_some_and(|newest| newest.generation >= membership.generation) {
            return;
        }
        let (job, entered, last) = (process.id.job, process.entered, process.plan.steps);
        let after = membership.after;
        process.newest = Some(membership);
        // A planned one begins after the step that is under way.
        let stepping = self.gangs.get(&(job, entered)).is_some_and(|gang| gang.at < last);
        if !(stepping && after == Some(entered.generation)) {
            self.enter(at);
        }
    }

    /// Leaves its generation for the newest that it was told of.
    pub(super) fn enter(&mut self, at: ProcessId) {
        let Some(process) = self.processes.get_mut(&at) else { return };
        let Some(newest) = process.newest.clone() else { return };
        if process.entered.generation >= newest.generation {
            return;
        }
        let (before, id) = (process.entered, process.id);
        process.entered = newest.term();
        process.going_on.parted = false;
        let listed = newest.members.iter().chain(newest.joining.iter()).any(|member| member.id == id);
        self.interrupt((id.job, before), at);
        self.say(|_| format!("    {id} enters {}", newest.generation));
        if !listed {
            return self.act_after(1, at, Act::Exit(Exit::Code(0)));
        }
        self.form(id.job, &newest);
    }

    /// A term stands when everybody who is in it has entered it.
    pub(super) fn form(&mut self, job: JobId, membership: &Membership) {
        let (term, generation) = (membership.term(), membership.generation);
        let find = |id: RankId| {
            let here = |process: &Process| process.id == id && process.entered == term;
            self.processes.iter().find(|(_, process)| here(process)).map(|(at, _)| *at)
        };
        let all = |list: &[stoke_protocol::message::rank::Member]| -> Option<Vec<ProcessId>> {
            list.iter().map(|member| find(member.id)).collect()
        };
        let (Some(members), Some(joining)) = (all(&membership.members), all(&membership.joining)) else { return };
        if members.is_empty() || self.gangs.contains_key(&(job, term)) {
            return;
        }
        let Some(at) = self.agree(job, &members) else { return };
        if term.ballot > 0 {
            return self.went_on(job, term, members, at);
        }
        self.meet(&membership.members);
        for joiner in &joining {
            let process = self.processes.get_mut(joiner).expect("found above");
            process.step = process.step.filter(|step| *step == at);
            let wait = if process.step.is_some() { 1 } else { self.streams.ranks.between("takes-state", 50, 1_500) };
            self.act_after(wait, *joiner, Act::TakeState { generation });
        }
        self.say(|_| format!("    {job} {generation} stands at {at} with {} ranks", members.len()));
        self.says(members[0], FromRank::Event(RankEvent::Resumed { generation, step: at }));
        let first = &self.processes[&members[0]];
        let (plan, restored) = (first.plan, first.restored);
        let committed = members.iter().any(|member| self.processes[member].committed >= Some(at));
        let holds = membership.purpose == Purpose::Checkpoint && at < plan.steps;
        self.gangs.insert((job, term), Gang { members, joining, at, holds });
        let begun_here = restored == Some(at) && at < plan.steps;
        let due = (holds && at > Step(0) || plan.is_due(at) && !begun_here) && !committed;
        self.store_shards(job, term, due);
        if !due && at == plan.steps {
            // A rank that has finished says so again: the first member may be another one.
            for member in self.gangs[&(job, term)].members.clone() {
                self.act_after(1, member, Act::Finish);
            }
        }
        self.after(10, Happening::GangStep { job, term });
    }

    /// X10: who lacks the last step is handed its sum; nobody lacks two.
    fn agree(&mut self, job: JobId, members: &[ProcessId]) -> Option<Step> {
        let steps: Vec<Option<Step>> = members.iter().map(|member| self.processes[member].step).collect();
        let at = steps.iter().flatten().max().copied().unwrap_or_default();
        let behind = |step: &Option<Step>| step.is_none_or(|step| step.0 + 1 < at.0);
        if members.iter().any(|member| self.processes[member].going_on.unheard) && steps.iter().any(behind) {
            // Others went on without it while the coordinator was away.
            for (member, _) in members.iter().zip(&steps).filter(|(_, step)| behind(step)) {
                self.act_after(1, *member, Act::GiveUp);
            }
            return None;
        }
        if let Some(wrong) = steps.iter().find(|step| behind(step)) {
            self.oracle.note("X10", || format!("a member of {job} is at {wrong:?}, others are at {at}"));
        }
        for member in members {
            self.processes.get_mut(member).expect("looked at above").step = Some(at);
        }
        Some(at)
    }

    pub(super) fn take_state(&mut self, at: ProcessId, generation: Generation) {
        let Some(process) = self.processes.get(&at).filter(|process| process.entered.generation == generation) else {
            return;
        };
        let (job, term) = (process.id.job, process.entered);
        let Some(gang) = self.gangs.get(&(job, term)) else { return };
        let (step, giver) = (gang.at, gang.members[0]);
        // The giver may have gone with its machine.
        let Some(origin) = self.processes.get(&giver).map(|giver| giver.origin) else { return };
        let process = self.processes.get_mut(&at).expect("found above");
        (process.step, process.origin) = (Some(step), origin);
        self.says(at, FromRank::Event(RankEvent::Joined { generation, step }));
    }

    /// One step of all members. They stall together.
    pub fn gang_step(&mut self, job: JobId, term: Term) {
        let (generation, attended) = (term.generation, term.ballot == 0);
        let Some(gang) = self.gangs.get(&(job, term)) else { return };
        let (members, joining) = (gang.members.clone(), gang.joining.clone());
        let here = |member: &ProcessId| self.processes.get(member).is_some_and(|p| p.entered == term);
        if !members.iter().all(here) {
            return self.break_up((job, term));
        }
        let plan = self.processes[&members[0]].plan;
        let stands = |process: &Process| process.stopped || self.machines[process.machine].paused;
        if members.iter().any(|member| stands(&self.processes[member])) {
            return self.after(200, Happening::GangStep { job, term });
        }
        if gang.at < plan.steps && !gang.holds {
            if members.len() > 1 && self.streams.ranks.chance("peers-part", self.rates.peers_part) {
                return self.part(job, term, &members);
            }
            let gang = self.gangs.get_mut(&(job, term)).expect("found above");
            gang.at = gang.at.next();
            let at = gang.at;
            // One that joins may train in another term by now, or have come to its end there.
            let others: Vec<Term> = self.gangs.keys().filter(|at| at.0 == job && at.1 != term).map(|at| at.1).collect();
            let steps = |process: &&mut Process| {
                process.step.is_some_and(|step| step < at) && !others.contains(&process.entered)
            };
            for member in members.iter().chain(&joining) {
                if let Some(process) = self.processes.get_mut(member).filter(steps) {
                    process.step = Some(at);
                }
            }
            self.one_quorum(job, term);
            if attended {
                self.store_shards(job, term, plan.is_due(at));
            }
            if at.0.is_multiple_of(4) {
                self.says(members[0], FromRank::Progress(progress(generation, at, plan.steps)));
            }
        }
        let told = |member: &ProcessId| {
            let newest = self.processes[member].newest.as_ref();
            newest.is_some_and(|newest| newest.generation > generation)
        };
        let done = self.gangs[&(job, term)].at >= plan.steps;
        if members.iter().all(told) || done {
            // With nothing left to do together, everybody goes on by himself.
            self.gangs.remove(&(job, term));
            members.iter().chain(&joining).for_each(|member| self.enter(*member));
        } else {
            let slow = members.iter().any(|member| self.processes[member].slow);
            let wait = self.streams.ranks.between("step", 30, 400) * if slow { 5 } else { 1 };
            self.after(wait, Happening::GangStep { job, term });
        }
    }

    /// Two members lose each other, or all of one side and of the other do (F13); the others lose both.
    fn part(&mut self, job: JobId, term: Term, members: &[ProcessId]) {
        self.break_up((job, term));
        let in_two = self.streams.ranks.chance("in-two", 0.5);
        let last = if in_two { members.len() as u64 - 1 } else { 1 };
        let (here, there) = members.split_at(self.streams.ranks.between("one-side", 1, last) as usize);
        let (one, other, generation) = (here[0], there[0], term.generation);
        let sides = if in_two { (here, there) } else { (&here[..1], &there[..1]) };
        for one in sides.0 {
            sides.1.iter().for_each(|other| self.sever(*one, *other));
        }
        for (by, of) in [(one, other), (other, one)] {
            let peer = self.processes[&of].id;
            if self.streams.ranks.chance("both-lose", 0.8) || by == one {
                let wait = self.streams.ranks.between("loses-after", 1, 2_000);
                self.act_after(wait, by, Act::LosePeer { generation, peer });
            }
        }
    }

    /// By all members when it is due, and by each that has done steps which the coordinator has not heard of.
    fn store_shards(&mut self, job: JobId, term: Term, due: bool) {
        let Some(gang) = self.gangs.get(&(job, term)) else { return };
        let (step, members, generation) = (gang.at, gang.members.clone(), term.generation);
        let world = members.len() as u32;
        for (index, member) in (0..).zip(members) {
            let process = self.processes.get_mut(&member).expect("a member of a gang that stands");
            if !std::mem::take(&mut process.going_on.unheard) && !due {
                continue;
            }
            let wait = self.streams.ranks.between("stores", 5, 600);
            self.act_after(wait, member, Act::StoreShard { generation, step, index, world });
        }
    }
}

fn progress(generation: Generation, step: Step, steps: Step) -> Progress {
    Progress {
        generation,
        step,
        steps,
        loss: 1.0,
        accuracy: 0.5,
        learning_rate: 0.1,
        samples_per_second: 10.0,
        compute_ms: 1.0,
        exchange_ms: 1.0,
        apply_ms: 1.0,
        samples: 8 * step.0,
        skipped: 0,
        lanes: 2,
        rl: None,
    }
}
