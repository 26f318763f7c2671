//! How modelled ranks go on while the coordinator is away: the decision is the real one (`exchange/quorum.rs`), its meetings are modelled. Owns what
//! ranks know of each other meanwhile.

use stoke_node::exchange::quorum::{Decision, Sight, decide, membership};
use stoke_protocol::ids::{JobId, Step, Term};
use stoke_protocol::message::peer::Proposal;
use stoke_protocol::message::rank::{FromRank, Member, Membership, RankEvent, RankId};

use super::gangs::Gang;
use super::planted::{Planted, RankBug};
use super::ranks::{Act, ProcessId};
use super::world::{Happening, Ms, World};

/// How long the loss of a peer may go unseen.
const IDLE_MS: (Ms, Ms) = (200, 11_000);
/// A rank that waits looks again.
const LOOK_AGAIN_MS: Ms = 2_000;
const FORM_MS_MAX: Ms = 30_000;

impl World {
    /// Its exchange broke: if nobody tells it how to go on, it finds a quorum.
    pub(super) fn part_from(&mut self, at: ProcessId) {
        let wait = self.streams.ranks.between("idle", IDLE_MS.0, IDLE_MS.1);
        let Some(process) = self.processes.get_mut(&at) else { return };
        process.going_on.parted = true;
        self.act_after(wait, at, Act::GoOn);
    }

    pub(super) fn sever(&mut self, one: ProcessId, other: ProcessId) {
        let (one, other) = (self.processes[&one].id, self.processes[&other].id);
        self.severed.extend([(one, other), (other, one)]);
    }

    /// The coordinator's memberships make connections anew.
    pub(super) fn meet(&mut self, members: &[Member]) {
        let met = |id: &RankId| members.iter().any(|member| member.id == *id);
        self.severed.retain(|(one, other)| !met(one) || !met(other));
    }

    fn has_connection(&self, own: RankId, peer: RankId) -> bool {
        let lives = self.processes.values().any(|other| other.id == peer && !self.machines[other.machine].paused);
        lives && !self.severed.contains(&(own, peer))
    }

    pub(super) fn go_on(&mut self, at: ProcessId) {
        let Some(process) = self.processes.get(&at) else { return };
        let going_on = &process.going_on;
        let Some(given) = process.newest.clone().filter(|_| going_on.parted && going_on.alone) else { return };
        if given.generation != process.entered.generation || self.machines[process.machine].paused {
            return self.act_after(LOOK_AGAIN_MS, at, Act::GoOn);
        }
        let (own, entered, offers) = (process.id, process.entered, going_on.offers.clone());
        let sight = Sight { given: &given, own, entered, proposals: &offers, floor: process.plan.ranks_min };
        let careless = self.planted == Planted::Rank(RankBug::QuorumIgnored);
        let living = |member: &Member| member.id == own || self.has_connection(own, member.id);
        let few =
            Membership { members: given.members.iter().filter(|m| living(m)).copied().collect(), ..given.clone() };
        let sight = if careless { Sight { given: &few, floor: 1, ..sight } } else { sight };
        match decide(&sight, |peer| self.has_connection(own, peer)) {
            None => self.act_after(LOOK_AGAIN_MS, at, Act::GoOn),
            Some(Decision::Take(proposal)) => self.enter_term(at, &given, &proposal),
            Some(Decision::Propose(proposal)) => {
                for peer in proposal.members.iter().filter(|peer| **peer != own) {
                    let Some(peer) = self.processes.iter().find(|(_, other)| other.id == *peer) else { continue };
                    let (peer, wait) = (*peer.0, self.streams.ranks.between("offered", 1, 20));
                    self.act_after(wait, peer, Act::Offered { from: own, proposal: proposal.clone() });
                }
                self.enter_term(at, &given, &proposal);
            }
        }
    }

    pub(super) fn offered(&mut self, at: ProcessId, from: RankId, proposal: Proposal) {
        let Some(process) = self.processes.get_mut(&at) else { return };
        process.going_on.offers.retain(|(other, _)| *other != from);
        process.going_on.offers.push((from, proposal));
        self.go_on(at);
    }

    fn enter_term(&mut self, at: ProcessId, given: &Membership, proposal: &Proposal) {
        let Some(process) = self.processes.get_mut(&at) else { return };
        process.entered = proposal.term;
        process.going_on.parted = false;
        let (id, term) = (process.id, proposal.term);
        self.say(|_| format!("    {id} goes on to {term}"));
        self.act_after(FORM_MS_MAX, at, Act::FormLate { term });
        self.form(id.job, &membership(given, proposal));
    }

    pub(super) fn form_late(&mut self, at: ProcessId, term: Term) {
        let Some(process) = self.processes.get(&at).filter(|process| process.entered == term) else { return };
        let (job, done) = (process.id.job, process.step == Some(process.plan.steps));
        let given = process.newest.clone();
        if done || self.gangs.contains_key(&(job, term)) {
            return;
        }
        // It says whom it waits for: the coordinator may be back, and tell the others nothing new.
        let entered = |id: RankId| self.processes.values().any(|other| other.id == id && other.entered == term);
        if let Some(absent) = given.and_then(|given| given.members.iter().find(|m| !entered(m.id)).copied()) {
            let (generation, error) = (term.generation, "absent".to_owned());
            self.says(at, FromRank::Event(RankEvent::PeerLost { generation, peer: absent.id, error }));
        }
        self.part_from(at);
    }

    /// A quorum stands.
    pub(super) fn went_on(&mut self, job: JobId, term: Term, members: Vec<ProcessId>, step: Step) {
        let ids: Vec<RankId> = members.iter().map(|member| self.processes[member].id).collect();
        self.say(|_| format!("    {job} {term} stands at {step} with {} ranks, alone", ids.len()));
        for member in &members {
            self.processes.get_mut(member).expect("listed above").going_on.unheard = true;
            let (generation, members) = (term.generation, ids.clone().into());
            self.says(*member, FromRank::Event(RankEvent::WentOn { generation, step, members }));
        }
        self.gangs.insert((job, term), Gang { members, joining: vec![], at: step, holds: false });
        self.after(10, Happening::GangStep { job, term });
    }

    /// Q1 (I18): of one generation at most one set of ranks steps.
    pub(super) fn one_quorum(&mut self, job: JobId, term: Term) {
        let stands = |gang: &Gang, term: Term| {
            gang.members.iter().all(|member| self.processes.get(member).is_some_and(|found| found.entered == term))
        };
        let same = |(other, found): &&(JobId, Term)| *other == job && found.generation == term.generation;
        let others = self.gangs.keys().filter(same).filter(|(_, other)| *other != term);
        let other = others.copied().find(|key| stands(&self.gangs[key], key.1));
        if let Some((_, other)) = other {
            self.oracle.note("I18", || format!("{job} steps as {term} and as {other}"));
        }
    }
}
