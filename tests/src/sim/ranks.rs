//! Modelled processes of ranks: what a worker does as its agent, its peers and the coordinator see it. Each does what `rank.rs` of the
//! protocol tells; the ranks of a generation step together, and none steps without the others.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use stoke_node::agent::state::Event;
use stoke_protocol::ids::{Digest, Generation, JobId, Rank, Step};
use stoke_protocol::message::rank::{
    Exit, FromRank, Outcome, Progress, RankEvent, RankId, ShardRecord, StartRank, ToRank,
};

use super::specs::Plan;
use super::store::{digest, uri};
use super::world::{Happening, Ms, World};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ProcessId(pub u64);

pub struct Process {
    pub machine: usize,
    pub life: u64,
    pub id: RankId,
    pub world: u32,
    pub plan: Plan,
    pub checkpoints: String,
    /// The step that it continues from.
    pub from: Step,
    training: bool,
    /// Does not stop when told to.
    deaf: bool,
    wrong: bool,
    /// What it has said reaches the agent in this order.
    said: Ms,
    heard: Ms,
    finished: bool,
}

/// The ranks of a generation, as far as they train.
#[derive(Debug, Default)]
pub struct Gang {
    members: BTreeMap<Rank, ProcessId>,
    at: Step,
    begun: bool,
}

/// What a process does by itself.
#[derive(Clone, Debug)]
pub enum Act {
    Hello,
    Ready,
    StoreShard { step: Step },
    StoreManifest { step: Step },
    Finish,
    GiveUp,
    Exit(Exit),
    HangUp,
}

impl World {
    pub fn spawn(&mut self, machine: usize, life: u64, start: StartRank) {
        let (id, rates) = (start.id, self.rates);
        self.processes_made += 1;
        let process = ProcessId(self.processes_made);
        let from = self.resume_step(&start);
        let random = &mut self.streams.ranks;
        let boots = random.between(20, 1_500);
        let deaf = random.chance(rates.deaf);
        let wrong = random.chance(rates.wrong_digest);
        let dies = random.chance(rates.rank_dies).then(|| (random.between(10, 12_000), random.between(0, 5)));
        let plan = Plan::read(&start.spec);
        let made = Process {
            machine,
            life,
            id,
            world: start.world,
            plan,
            checkpoints: start.checkpoints,
            from,
            training: false,
            deaf,
            wrong,
            said: 0,
            heard: 0,
            finished: false,
        };
        self.processes.insert(process, made);
        self.changed = true;
        self.say(|_| format!("    {id} starts on machine {machine} from {from}"));
        self.oracle.spawned(id);
        self.act_after(boots, process, Act::Hello);
        if let Some((when, how)) = dies {
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

    /// Where a generation continues. All its ranks decide alike: the newest checkpoint that they can read.
    fn resume_step(&mut self, start: &StartRank) -> Step {
        let rates = self.rates;
        let Some(newest) = start.resume.as_deref().and_then(|uri| self.store.folder(uri)).map(|folder| folder.step)
        else {
            return Step(0);
        };
        let (job, generation) = (start.id.job, start.id.generation);
        let mut draw = super::random::Stream::new(job.0 << 16 | generation.0, "damaged");
        if draw.chance(rates.damaged_checkpoint) { self.store.before(job, newest).unwrap_or(newest) } else { newest }
    }

    fn act_after(&mut self, wait: Ms, process: ProcessId, act: Act) {
        self.after(wait, Happening::RankActs { process, act });
    }

    fn process_of(&self, machine: usize, life: u64, id: RankId) -> Option<ProcessId> {
        let mine = |process: &Process| process.machine == machine && process.life == life && process.id == id;
        self.processes.iter().find(|(_, process)| mine(process)).map(|(at, _)| *at)
    }

    pub fn pass_to_rank(&mut self, machine: usize, life: u64, id: RankId, frame: ToRank) {
        let Some(at) = self.process_of(machine, life, id) else { return };
        let wait = self.streams.ranks.between(1, 3);
        let process = self.processes.get_mut(&at).expect("found above");
        let due = (self.now + wait).max(process.heard);
        process.heard = due;
        self.at(due, Happening::ToRank { process: at, frame });
    }

    fn says(&mut self, at: ProcessId, frame: FromRank) {
        let wait = self.streams.ranks.between(1, 3);
        let Some(process) = self.processes.get_mut(&at) else { return };
        let due = (self.now + wait).max(process.said);
        process.said = due;
        let (machine, life, id) = (process.machine, process.life, process.id);
        let event = Event::Rank { id, frame };
        self.at(due, Happening::Agent { machine, life, event });
    }

    pub fn deliver_to_rank(&mut self, at: ProcessId, frame: ToRank) {
        let Some(process) = self.processes.get(&at) else { return };
        let id = process.id;
        let wait = self.streams.ranks.between(1, 400);
        match frame {
            ToRank::Start(_) => {}
            ToRank::Certificate { .. } => self.act_after(wait, at, Act::Ready),
            ToRank::Peers(_) => self.join_gang(at, id),
            ToRank::Commit { step, .. } => self.act_after(wait, at, Act::StoreManifest { step }),
            ToRank::Committed { step, prune } => {
                let (last, rank) = (process.plan.steps, id.rank);
                if rank == Rank(0) {
                    prune.iter().for_each(|uri| self.store.remove(uri));
                    self.changed = true;
                }
                if step == last {
                    self.act_after(1, at, Act::Finish);
                }
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
            Act::Hello => self.says(at, FromRank::Hello { csr: vec![1, 2, 3].into() }),
            Act::Ready => {
                let port = 10_000 + (at.0 % 50_000) as u16;
                let address = SocketAddr::from(([10, 0, 0, machine as u8 + 1], port));
                self.says(at, FromRank::Event(RankEvent::Ready { address }));
            }
            Act::StoreShard { step } => {
                let folder = uri(&process.checkpoints, id.generation, step);
                let file = format!("shard-{}-of-{}.safetensors", id.rank.0, process.world);
                let blake3 = digest(&format!("{folder}/{file}"));
                let (world, from) = (process.world, process.from);
                self.store.put_shard(&folder, id, world, (from, step));
                let shard = ShardRecord { index: id.rank.0, file, bytes: 100, blake3 };
                self.says(at, FromRank::Event(RankEvent::ShardStored { step, shard }));
            }
            Act::StoreManifest { step } => {
                let uri = uri(&process.checkpoints, id.generation, step);
                self.store.put_manifest(&uri);
                let manifest_blake3 = digest(&uri);
                self.says(at, FromRank::Event(RankEvent::ManifestStored { step, uri, manifest_blake3 }));
            }
            Act::Finish => {
                if !std::mem::replace(&mut process.finished, true) {
                    let outcome = outcome(process);
                    self.says(at, FromRank::Event(RankEvent::Finished { outcome }));
                }
            }
            Act::GiveUp => {
                self.says(at, FromRank::Event(RankEvent::Failed { error: "lost a peer".into() }));
                self.act_after(5, at, Act::Exit(Exit::Code(3)));
            }
            Act::HangUp => self.tell(machine, life, Event::HungUp { id }),
            Act::Exit(exit) => self.end_process(at, exit),
        }
    }

    pub fn end_processes(&mut self, machine: usize, id: RankId, exit: Exit) {
        let mine = |process: &super::ranks::Process| process.machine == machine && process.id == id;
        let ended: Vec<ProcessId> = self.processes.iter().filter(|(_, p)| mine(p)).map(|(at, _)| *at).collect();
        for at in ended {
            self.end_process(at, exit.clone());
        }
    }

    /// The process is gone; its agent sees it after everything that it has said.
    pub fn end_process(&mut self, at: ProcessId, exit: Exit) {
        let Some(process) = self.processes.remove(&at) else { return };
        self.changed = true;
        let (machine, life, id) = (process.machine, process.life, process.id);
        self.say(|_| format!("    {id} ends on machine {machine}: {exit:?}"));
        let due = (self.now + 1).max(process.said);
        self.at(due, Happening::RankGone { machine, life, id, exit });
        // Some of its peers find out by themselves, the others wait to be stopped.
        let Some(gang) = self.gangs.get(&(id.job, id.generation)) else { return };
        let peers: Vec<ProcessId> = gang.members.values().copied().filter(|peer| *peer != at).collect();
        for peer in peers {
            let unfinished = self.processes.get(&peer).is_some_and(|process| !process.finished);
            if unfinished && self.streams.ranks.chance(0.4) {
                let wait = self.streams.ranks.between(100, 3_000);
                self.act_after(wait, peer, Act::GiveUp);
            }
        }
    }

    fn join_gang(&mut self, at: ProcessId, id: RankId) {
        let Some(process) = self.processes.get_mut(&at) else { return };
        if std::mem::replace(&mut process.training, true) {
            return;
        }
        let (world, from) = (process.world as usize, process.from);
        let gang = self.gangs.entry((id.job, id.generation)).or_default();
        gang.members.insert(id.rank, at);
        if gang.members.len() == world && !std::mem::replace(&mut gang.begun, true) {
            gang.at = from;
            self.after(10, Happening::GangStep { job: id.job, generation: id.generation });
        }
    }

    /// One step of all ranks of a generation. They stall together; a gang that has lost a member never steps again.
    pub fn gang_step(&mut self, job: JobId, generation: Generation) {
        let Some(gang) = self.gangs.get(&(job, generation)) else { return };
        let members: Vec<ProcessId> = gang.members.values().copied().collect();
        let (Some(first), true) =
            (self.processes.get(&members[0]), members.iter().all(|member| self.processes.contains_key(member)))
        else {
            self.gangs.remove(&(job, generation));
            return;
        };
        let plan = first.plan;
        if gang.at >= plan.steps {
            // A restart from the last checkpoint of a job whose end was not told: the last step is stored again.
            return self.store_shards(&members, plan.steps);
        }
        let paused = members.iter().any(|member| self.machines[self.processes[member].machine].paused);
        if paused {
            return self.after(200, Happening::GangStep { job, generation });
        }
        let gang = self.gangs.get_mut(&(job, generation)).expect("found above");
        gang.at = gang.at.next();
        let at = gang.at;
        if at.0.is_multiple_of(plan.every) || at == plan.steps {
            self.store_shards(&members, at);
        }
        if at.0.is_multiple_of(4) {
            let frame = FromRank::Progress(progress(at, plan.steps));
            self.says(members[0], frame);
        }
        if at < plan.steps {
            let wait = self.streams.ranks.between(30, 400);
            self.after(wait, Happening::GangStep { job, generation });
        }
    }

    fn store_shards(&mut self, members: &[ProcessId], step: Step) {
        for member in members {
            let wait = self.streams.ranks.between(5, 600);
            self.act_after(wait, *member, Act::StoreShard { step });
        }
    }
}

fn outcome(process: &Process) -> Outcome {
    let weights =
        if process.wrong { format!("wrong on {}", process.id) } else { format!("weights of {}", process.id.job) };
    let weights_blake3: Digest = digest(&weights);
    let step = process.plan.steps;
    Outcome { step, loss: 0.5, samples: 8 * step.0, weights_blake3, metrics: BTreeMap::new() }
}

fn progress(step: Step, steps: Step) -> Progress {
    Progress {
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
    }
}
