//! Modelled processes of ranks: what a worker does as its agent, its peers and the coordinator see it. Each does what `rank.rs` of the
//! protocol tells. The members of a generation step together, and none steps without the others; a step that somebody's death interrupts may
//! be complete on some of them and not on others.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use stoke_coordinator::state::Input;
use stoke_node::agent::state::Event;
use stoke_node::worker::Pending;
use stoke_protocol::ids::{Digest, Fingerprint, Generation, Step, Term};
use stoke_protocol::ledger::Ledger;
use stoke_protocol::message::node::Report;
use stoke_protocol::message::peer::Proposal;
use stoke_protocol::message::rank::{
    Cookie, Exit, FromRank, Membership, Origin, Outcome, RankEvent, RankId, ShardRecord, StartFrom, StartRank, ToRank,
};

use super::planted::{AgentBug, Planted};
use super::specs::Plan;
use super::store::{digest, uri};
use super::world::{Happening, Ms, World};

/// A process that says nothing for so long is taken as one that hangs.
const SILENCE_MS: Ms = 5_000;
/// A rank without an agent ends after so long.
const ORPHAN_GRACE_MS: Ms = 40_000;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ProcessId(pub u64);

pub struct Process {
    pub machine: usize,
    /// Of the agent that watches it.
    pub life: u64,
    /// Whether that agent hears it: not before it has proved itself.
    attached: bool,
    /// Another agent has started it.
    inherited: bool,
    pending: Pending,
    pub id: RankId,
    pub plan: Plan,
    pub checkpoints: String,
    /// The checkpoint, or the seed, that its state goes back to.
    pub(super) origin: Step,
    /// The step of the checkpoint that it began with.
    pub(super) restored: Option<Step>,
    /// Steps that it has done; none without a state.
    pub(super) step: Option<Step>,
    pub(super) newest: Option<Membership>,
    pub(super) entered: Term,
    pub(super) going_on: GoingOn,
    pub(super) committed: Option<Step>,
    /// Shards that it has stored, by checkpoint.
    stored: BTreeMap<(Step, Generation), u32>,
    /// Does not stop when told to.
    deaf: bool,
    wrong: bool,
    pub(super) slow: bool,
    /// What it was to begin with, if that is damaged.
    damaged: Option<String>,
    pub(super) stopped: bool,
    deferred: Vec<Happening>,
    /// What it has said reaches the agent in this order.
    said: Ms,
    heard: Ms,
}

/// What a process knows when it has lost its peers, for `alone.rs`.
#[derive(Default)]
pub struct GoingOn {
    /// Its agent says that the coordinator is away.
    pub alone: bool,
    /// Its exchange broke, and it is in no other.
    pub parted: bool,
    /// It has done steps that the coordinator has not heard of.
    pub unheard: bool,
    pub offers: Vec<(RankId, Proposal)>,
}

/// What a process does by itself.
#[derive(Clone, Debug)]
pub enum Act {
    Hello,
    Ready,
    TakeState {
        generation: Generation,
    },
    /// What was copied at the end of a step, by which member of how many.
    StoreShard {
        generation: Generation,
        step: Step,
        index: u32,
        world: u32,
    },
    StoreManifest {
        generation: Generation,
        step: Step,
    },
    Finish,
    /// The generation that it is in is over.
    Enter,
    LosePeer {
        generation: Generation,
        peer: RankId,
    },
    GiveUp,
    Exit(Exit),
    HangUp,
    /// The connection to those that are gone has timed out, or something has changed since.
    GoOn,
    Offered {
        from: RankId,
        proposal: Proposal,
    },
    /// Those who were to meet in a term have had long enough.
    FormLate {
        term: Term,
    },
    /// Proves itself to an agent that has found it.
    Return {
        life: u64,
    },
    /// No agent has come since that of this life.
    EndAlone {
        life: u64,
    },
}

impl World {
    pub fn spawn(&mut self, machine: usize, life: u64, start: StartRank) {
        let (id, rates) = (start.id, self.rates);
        self.processes_made += 1;
        let process = ProcessId(self.processes_made);
        let (step, poison) = (self.first_step(&start), Plan::read(&start.spec).poison);
        let damaged = self.damaged_checkpoint(&start);
        let random = &mut self.streams.ranks;
        let boots = random.between("boot", 20, 1_500);
        let deaf = random.chance("deaf", rates.deaf);
        let wrong = random.chance("wrong", rates.wrong_digest);
        let slow = random.chance("slow", rates.slow_rank);
        let dies = random.chance("dies", rates.rank_dies);
        let dies = dies.then(|| (random.between("dies-after", 10, 12_000), random.between("dies-how", 0, 6)));
        let made = Process {
            machine,
            life,
            attached: true,
            inherited: false,
            pending: Pending::default(),
            id,
            plan: Plan::read(&start.spec),
            checkpoints: start.checkpoints,
            origin: step.unwrap_or_default(),
            restored: step.filter(|step| *step > Step(0)),
            step,
            newest: None,
            entered: Term::default(),
            going_on: GoingOn::default(),
            committed: None,
            stored: BTreeMap::new(),
            deaf,
            wrong,
            slow,
            damaged,
            stopped: false,
            deferred: Vec::new(),
            said: 0,
            heard: 0,
        };
        self.processes.insert(process, made);
        self.changed = true;
        self.say(|_| format!("    {id} starts on machine {machine} from {step:?}"));
        let node = self.machines[machine].node.and_then(|node| self.shadow.members().node(node));
        self.oracle.spawned(id, node.is_none_or(|node| !node.up));
        // Or hangs at its start, and its gang does not come up.
        if dies.is_none_or(|(_, how)| how < 6) {
            self.act_after(boots, process, Act::Hello);
        }
        if poison {
            self.act_after(boots + 1, process, Act::Exit(Exit::Code(1)));
        } else if let Some((when, how)) = dies.filter(|(_, how)| *how < 6) {
            let act = match how {
                0 => Act::Exit(Exit::Code(0)),
                1 => Act::Exit(Exit::Signal(9)),
                2 => Act::Exit(Exit::Signal(11)),
                3 => Act::GiveUp,
                4 => Act::HangUp,
                _ => Act::Exit(Exit::Code(1)),
            };
            self.act_after(when, process, act);
        }
    }

    /// Where a process begins.
    fn first_step(&mut self, start: &StartRank) -> Option<Step> {
        match &start.from {
            StartFrom::Seed => Some(Step(0)),
            StartFrom::Peers => None,
            StartFrom::Checkpoint(Origin { uri, manifest_blake3 }) => {
                assert_eq!(*manifest_blake3, Some(digest(uri)), "I22: {uri} is named with the manifest of another");
                let newest = self.store.folder(uri).map(|folder| folder.step).unwrap_or_default();
                // A worker of another release may take an older one without a word: the committed step must not go back even so.
                let (job, rate) = (start.id.job, self.rates.older_checkpoint);
                let random = &mut self.streams.ranks;
                let generation = (job, start.id.generation);
                let older = *self.older.entry(generation).or_insert_with(|| random.chance("older", rate));
                Some(newest).map(|newest| if older { self.store.before(job, newest).unwrap_or(newest) } else { newest })
            }
        }
    }

    /// The checkpoint that it is to begin with, if it is damaged: all ranks of a generation find the same.
    fn damaged_checkpoint(&mut self, start: &StartRank) -> Option<String> {
        let StartFrom::Checkpoint(Origin { uri, .. }) = &start.from else { return None };
        let rate = self.rates.damaged_checkpoint;
        let random = &mut self.streams.ranks;
        let generation = (start.id.job, start.id.generation);
        let damaged = *self.damaged.entry(generation).or_insert_with(|| random.chance("damaged", rate));
        damaged.then(|| uri.clone())
    }

    pub(super) fn act_after(&mut self, wait: Ms, process: ProcessId, act: Act) {
        self.after(wait, Happening::RankActs { process, act });
    }

    fn process_of(&self, machine: usize, life: u64, id: RankId) -> Option<ProcessId> {
        let mine = |process: &Process| process.machine == machine && process.life == life && process.id == id;
        self.processes.iter().find(|(_, process)| mine(process)).map(|(at, _)| *at)
    }

    pub fn pass_to_rank(&mut self, machine: usize, life: u64, id: RankId, frame: ToRank) {
        let Some(at) = self.process_of(machine, life, id) else { return };
        let wait = self.streams.ranks.between("hears", 1, 3);
        let process = self.processes.get_mut(&at).expect("found above");
        let due = (self.now + wait).max(process.heard);
        process.heard = due;
        self.at(due, Happening::ToRank { process: at, frame });
    }

    pub(super) fn says(&mut self, at: ProcessId, frame: FromRank) {
        self.coverage.note("from rank", &frame);
        if let Some(process) = self.processes.get_mut(&at) {
            process.pending.push(frame);
            self.pump(at);
        }
    }

    /// What it has to say goes to its agent, if it has one.
    fn pump(&mut self, at: ProcessId) {
        while let Some(process) = self.processes.get_mut(&at).filter(|process| process.attached) {
            let Some(frame) = process.pending.pop() else { return };
            let (machine, life, id) = (process.machine, process.life, process.id);
            let wait = self.streams.ranks.between("says", 1, 3);
            let process = self.processes.get_mut(&at).expect("found above");
            let due = (self.now + wait).max(process.said);
            process.said = due;
            self.at(due, Happening::Agent { machine, life, event: Event::Rank { id, frame } });
        }
    }

    /// The agent of a machine is gone; its ranks are not.
    pub fn orphan(&mut self, machine: usize) {
        let here: Vec<ProcessId> =
            self.processes.iter().filter(|(_, process)| process.machine == machine).map(|(at, _)| *at).collect();
        for at in here {
            let process = self.processes.get_mut(&at).expect("found above");
            process.attached = false;
            let life = process.life;
            self.act_after(ORPHAN_GRACE_MS, at, Act::EndAlone { life });
        }
    }

    /// An agent has a rank in its records.
    pub fn adopt(&mut self, machine: usize, life: u64, id: RankId) {
        let by_slot = self.planted == Planted::Agent(AgentBug::AdoptedBySlot);
        let slot = |id: RankId| (id.job, id.rank);
        let its = |process: &Process| process.id == id || by_slot && slot(process.id) == slot(id);
        let found = self.processes.iter_mut().find(|(_, process)| process.machine == machine && its(process));
        let Some((at, process)) = found else { return self.report_gone(machine, life, id, Exit::AgentRestarted) };
        (process.id, process.life, process.inherited) = (id, life, true);
        let at = *at;
        // What the agent before has sent is read first, what this one sends waits.
        let wait = self.streams.ranks.between("returns", 1, 30);
        let process = self.processes.get_mut(&at).expect("found above");
        let due = (self.now + wait).max(process.heard + 1);
        process.heard = due;
        self.at(due, Happening::RankActs { process: at, act: Act::Return { life } });
    }

    /// A process is gone; its agent hears what it has written down, and then of its end.
    fn report_gone(&mut self, machine: usize, life: u64, id: RankId, mut exit: Exit) {
        let due = self.now + 1;
        for frame in self.machines[machine].last_words.get(&id).cloned().unwrap_or_default() {
            if let FromRank::Leaving { code } = frame {
                exit = Exit::Code(code.into());
            }
            self.at(due, Happening::Agent { machine, life, event: Event::Rank { id, frame } });
        }
        self.at(due, Happening::RankGone { machine, life, id, exit });
    }

    pub fn deliver_to_rank(&mut self, at: ProcessId, frame: ToRank) {
        self.coverage.note("to rank", &frame);
        let Some(process) = self.processes.get_mut(&at) else { return };
        let wait = self.streams.ranks.between("obeys", 1, 400);
        match frame {
            ToRank::Start(_) | ToRank::Stores(_) | ToRank::Settle(_) | ToRank::Adopted => {}
            // Whoever learns needs nobody who plays.
            ToRank::Rollouts { .. } => {}
            ToRank::Abandon { generation, step } => {
                if process.committed.is_some_and(|committed| step <= committed) {
                    let id = process.id;
                    return self.oracle.note("I21", || format!("{id} is to abandon {step}, which is committed"));
                }
                if let Some(index) = process.stored.remove(&(step, generation)) {
                    self.store.remove_shard(&uri(&process.checkpoints, generation, step), index);
                    self.changed = true;
                }
            }
            ToRank::Taken { said } => process.pending.taken(said),
            ToRank::Certificate { .. } => {
                process.pending.certified();
                self.act_after(wait, at, Act::Ready);
            }
            ToRank::Membership(membership) => self.hear_membership(at, membership),
            ToRank::Commit { generation, step, .. } => {
                self.act_after(wait, at, Act::StoreManifest { generation, step })
            }
            ToRank::Committed { step, keep } => {
                process.committed = process.committed.max(Some(step));
                let first = process.newest.as_ref().is_some_and(|newest| newest.position(process.id) == Some(0));
                if first {
                    let (job, generation) = (process.id.job, process.entered.generation);
                    self.store.remove_older(job, (step, generation), &keep);
                    self.changed = true;
                }
                self.act_after(1, at, Act::Finish);
            }
            ToRank::Coordinator { reachable } => {
                process.going_on.alone = !reachable;
                self.act_after(1, at, Act::GoOn);
            }
            ToRank::Release => self.act_after(wait, at, Act::Exit(Exit::Code(0))),
            ToRank::Stop { .. } if process.deaf => {}
            ToRank::Stop { .. } => self.act_after(wait, at, Act::Exit(Exit::Code(4))),
        }
    }

    pub fn rank_acts(&mut self, at: ProcessId, act: Act) {
        let Some(process) = self.processes.get_mut(&at) else { return };
        let (machine, life, id) = (process.machine, process.life, process.id);
        match act {
            Act::Hello => self.says(at, FromRank::Hello { csr: vec![1, 2, 3].into(), artifact: None }),
            Act::Ready => {
                if let Some(uri) = process.damaged.take() {
                    let error = "a shard has other bytes".to_owned();
                    self.says(at, FromRank::Event(RankEvent::Damaged { uri, error }));
                    return self.act_after(1, at, Act::GiveUp);
                }
                let port = 10_000 + (at.0 % 50_000) as u16;
                let address = SocketAddr::from(([10, 0, 0, machine as u8 + 1], port));
                self.says(at, FromRank::Event(RankEvent::Ready { address }));
            }
            Act::TakeState { generation } => self.take_state(at, generation),
            Act::StoreShard { generation, step, index, world } => {
                let folder = uri(&process.checkpoints, generation, step);
                if self.streams.ranks.chance("store-fails", self.rates.store_fails) {
                    return self.not_stored(at, generation, step);
                }
                let file = format!("shard-{index}-of-{world}.safetensors");
                let blake3 = digest(&format!("{folder}/{file}"));
                let origin = process.origin;
                process.stored.insert((step, generation), index);
                self.store.put_shard(&folder, (id.job, generation), (index, world), (origin, step));
                let shard = ShardRecord { index, file, bytes: 100, blake3 };
                self.says(
                    at,
                    FromRank::Event(RankEvent::ShardStored { generation, step, shard, state: Fingerprint(0) }),
                );
            }
            Act::StoreManifest { generation, step } => {
                let uri = uri(&process.checkpoints, generation, step);
                if self.streams.ranks.chance("store-fails", self.rates.store_fails) {
                    return self.not_stored(at, generation, step);
                }
                self.store.put_manifest(&uri);
                let manifest_blake3 = digest(&uri);
                self.says(at, FromRank::Event(RankEvent::ManifestStored { generation, step, uri, manifest_blake3 }));
            }
            Act::Finish => {
                let last = process.plan.steps;
                if process.step == Some(last) && process.committed == Some(last) {
                    let (generation, outcome) = (process.entered.generation, outcome(process));
                    self.says(at, FromRank::Event(RankEvent::Finished { generation, outcome }));
                }
            }
            Act::Enter => self.enter(at),
            Act::LosePeer { generation, peer } => {
                if process.entered.generation == generation {
                    let error = "silent".to_owned();
                    self.says(at, FromRank::Event(RankEvent::PeerLost { generation, peer, error }));
                }
            }
            Act::GiveUp => {
                let error = "lost a peer".to_owned();
                self.says(at, FromRank::Event(RankEvent::Failed { error, permanent: false }));
                self.act_after(5, at, Act::Exit(Exit::Code(3)));
            }
            Act::GoOn => self.go_on(at),
            Act::Offered { from, proposal } => self.offered(at, from, proposal),
            Act::FormLate { term } => self.form_late(at, term),
            Act::HangUp => self.tell(machine, life, Event::HungUp { id }),
            Act::Exit(exit) => self.end_process(at, exit),
            Act::Return { life: of } if of == life && self.machines[machine].is_life(life) => {
                let process = self.processes.get_mut(&at).expect("found above");
                process.attached = true;
                let next = process.pending.rewind();
                let frame = FromRank::Return { id, cookie: Cookie::default(), next };
                self.tell(machine, life, Event::Rank { id, frame });
                self.pump(at);
            }
            Act::EndAlone { life: of } if of == life && !process.attached => self.end_process(at, Exit::Code(3)),
            Act::Return { .. } | Act::EndAlone { .. } => {}
        }
    }

    /// Without the last one the rank fails; any other is done without.
    fn not_stored(&mut self, at: ProcessId, generation: Generation, step: Step) {
        if self.processes[&at].plan.steps == step {
            return self.act_after(1, at, Act::GiveUp);
        }
        let error = "no space left on device".to_owned();
        self.says(at, FromRank::Event(RankEvent::NotStored { generation, step, error }));
    }

    pub fn kill_ranks(&mut self, which: impl Fn(&Process) -> bool) {
        let ended: Vec<ProcessId> = self.processes.iter().filter(|(_, p)| which(p)).map(|(at, _)| *at).collect();
        ended.into_iter().for_each(|at| self.end_process(at, Exit::Signal(9)));
    }

    pub fn pause_rank(&mut self, at: ProcessId, lasts: Ms) {
        let Some(process) = self.processes.get_mut(&at) else { return };
        process.stopped = true;
        self.after(SILENCE_MS, Happening::RankSilent { process: at, for_ms: SILENCE_MS });
        self.after(lasts, Happening::RankResumes { process: at });
    }

    pub fn rank_resumes(&mut self, at: ProcessId) {
        let Some(process) = self.processes.get_mut(&at) else { return };
        process.stopped = false;
        let deferred = std::mem::take(&mut process.deferred);
        deferred.into_iter().for_each(|happening| self.after(0, happening));
    }

    /// Its agent looks after it.
    pub fn rank_silent(&mut self, at: ProcessId, for_ms: Ms) {
        let Some(process) = self.processes.get(&at).filter(|process| process.stopped) else { return };
        let (machine, life, id) = (process.machine, process.life, process.id);
        self.tell(machine, life, Event::Silent { id, for_ms });
    }

    /// Whether it would happen to a process that is stopped.
    pub fn is_stopped(&self, happening: &Happening) -> bool {
        let (Happening::ToRank { process, .. } | Happening::RankActs { process, .. }) = happening else { return false };
        self.processes.get(process).is_some_and(|process| process.stopped)
    }

    pub fn defer_for_rank(&mut self, happening: Happening) {
        let (Happening::ToRank { process, .. } | Happening::RankActs { process, .. }) = &happening else { return };
        if let Some(process) = self.processes.get_mut(process) {
            process.deferred.push(happening);
        }
    }

    /// Whoever has taken an agent over says that a rank of another node is gone.
    pub fn lie(&mut self, machine: usize, pick: u64) {
        let others: Vec<RankId> = self.processes.values().filter(|p| p.machine != machine).map(|p| p.id).collect();
        let (Some(agent), false) = (&self.machines[machine].agent, self.paused) else { return };
        let (Some(session), Some(node)) = (agent.session, self.machines[machine].node) else { return };
        let Some(id) = others.get(pick as usize % others.len().max(1)).copied() else { return };
        let reported = self.cluster().members().node(node).map_or(0, |node| node.reported);
        let report = Report { sequence: reported + 1, id, event: RankEvent::Exited { exit: Exit::Code(0) } };
        self.input(Input::Report { session, report });
    }

    pub fn end_processes(&mut self, machine: usize, id: RankId, exit: Exit) {
        let mine = |process: &super::ranks::Process| process.machine == machine && process.id == id;
        let ended: Vec<ProcessId> = self.processes.iter().filter(|(_, p)| mine(p)).map(|(at, _)| *at).collect();
        for at in ended {
            self.end_process(at, exit.clone());
        }
    }

    /// The process is gone; its agent sees it after everything that it has said, or hears what it wrote down because it had none.
    pub fn end_process(&mut self, at: ProcessId, exit: Exit) {
        let Some(mut process) = self.processes.remove(&at) else { return };
        self.changed = true;
        let (machine, life, id) = (process.machine, process.life, process.id);
        self.say(|_| format!("    {id} ends on machine {machine}: {exit:?}"));
        let seen = match exit {
            Exit::Signal(_) if process.inherited => Exit::Unseen,
            _ => exit.clone(),
        };
        if process.attached {
            let due = (self.now + 1).max(process.said);
            self.at(due, Happening::RankGone { machine, life, id, exit: seen });
        } else {
            if let Exit::Code(code) = exit {
                let first = FromRank::Return { id, cookie: Cookie::default(), next: process.pending.rewind() };
                process.pending.push(FromRank::Leaving { code: code as u8 });
                let words = std::iter::once(first).chain(std::iter::from_fn(|| process.pending.pop()));
                self.machines[machine].last_words.insert(id, words.collect());
            }
            self.report_gone(machine, life, id, seen);
        }
        self.interrupt((id.job, process.entered), at);
    }
}

fn outcome(process: &Process) -> Outcome {
    let weights =
        if process.wrong { format!("wrong on {}", process.id) } else { format!("weights of {}", process.id.job) };
    let weights_blake3: Digest = digest(&weights);
    let step = process.plan.steps;
    let ledger = Ledger { first: 0, end: 8 * step.0 };
    Outcome { step, loss: 0.5, samples: ledger.end, ledger, skipped: 0, weights_blake3, metrics: BTreeMap::new() }
}
