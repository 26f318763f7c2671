//! The actor between a rank's agent and its threads: takes frames in order, starts what they ask for, and says what happened. Owns the
//! rank's phase; computes nothing and never blocks.
//!
//! Start → (load, make a key) Hello → Certificate → (bind) and (loaded) Ready → Membership, as often as it changes → training → Finished
//! → Release. A rank that runs a command needs no mesh, no data and no vault, and ends when its command has.

use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use stoke_protocol::ids::Generation;
use stoke_protocol::message::rank::{FromRank, Outcome, RankEvent, StartRank, ToRank};
use stoke_protocol::spec::JobSpec;
use stoke_protocol::transport::Io;
use tokio::sync::{mpsc as queue, oneshot};

use super::Place;
use super::beat::{self, Beat};
use super::damage;
use super::failure::{Failure, catch, text_of};
use super::orders::Orders;
use super::papers::Papers;
use super::trainer::{self, Assignment, Outside};
use super::vault::{self, Order, Subject, Vault};
use crate::checkpoint::{self, ShardMemory};
use crate::exchange::Mesh;
use crate::exec::{self, Port};
use crate::rollout;
use crate::server::{self, Meter};

/// What the vault still removes when the job is done is waited for so long. The process does nothing else any more.
const FLUSH_MAX: Duration = Duration::from_secs(3);

/// How often a rank tells its agent that its process runs. One that is silent for long is killed.
const ALIVE_EVERY: Duration = Duration::from_millis(500);

/// How a rank's process ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The job is done, or goes on without this rank.
    Released,
    Failed,
    /// The agent is gone, and no other one came.
    HungUp,
    Stopped,
}

pub enum Message {
    Frame(ToRank),
    /// There is no agent, and none will come.
    HungUp,
    /// No other agent could find this rank, for this reason.
    Homeless(String),
    Trainer(trainer::Told),
    /// The compute thread has ended.
    Ended(Result<(), Failure>),
    Vault(vault::Told),
    /// Time to say that this process lives, and to look whether the compute thread does.
    Tick,
}

/// What the actor is made of.
pub struct Arguments {
    pub io: Io,
    pub place: Place,
    /// To the agent. A full queue is an agent that does not read.
    pub say: queue::Sender<FromRank>,
    pub end: oneshot::Sender<End>,
}

pub struct Link;

pub struct Linked {
    io: Io,
    place: Place,
    /// Of the job.
    memory: Option<ShardMemory>,
    say: queue::Sender<FromRank>,
    orders: Orders,
    beat: Beat,
    start: Option<(StartRank, JobSpec)>,
    papers: Papers,
    /// Of a rank that runs a command: where that listens.
    listens: Option<SocketAddr>,
    /// The thread that has started a command runs.
    supervises: bool,
    /// The rank ends for this reason when that thread has.
    ending: Option<Stop>,
    /// Where peers reach this rank.
    address: Option<SocketAddr>,
    vault: Option<Vault>,
    /// Takes the mesh to the trainer, once.
    outside: Option<mpsc::Sender<Outside>>,
    loaded: bool,
    ready: bool,
    outcome: Option<(Generation, Outcome)>,
    finished: bool,
    /// Of the head of a gang that serves, and whether the next tick tells of it: every second one does.
    meter: Option<Arc<Meter>>,
    tells: bool,
    end: Option<oneshot::Sender<End>>,
}

impl Actor for Link {
    type Msg = Message;
    type State = Linked;
    type Arguments = Arguments;

    async fn pre_start(&self, myself: ActorRef<Message>, given: Arguments) -> Result<Linked, ActorProcessingErr> {
        let Arguments { io, place, say, end } = given;
        myself.send_interval(ALIVE_EVERY, || Message::Tick);
        Ok(Linked {
            io,
            place,
            memory: None,
            say,
            orders: Orders::new(),
            beat: Beat::new(),
            start: None,
            papers: Papers::default(),
            listens: None,
            supervises: false,
            ending: None,
            address: None,
            vault: None,
            outside: None,
            loaded: false,
            ready: false,
            outcome: None,
            finished: false,
            meter: None,
            tells: false,
            end: Some(end),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Message>,
        message: Message,
        rank: &mut Linked,
    ) -> Result<(), ActorProcessingErr> {
        let ended = matches!(message, Message::Ended(_));
        let done = match message {
            Message::Frame(frame) => rank.frame(frame, &myself),
            Message::HungUp => Err(Stop::End(End::HungUp)),
            Message::Homeless(error) => Err(Stop::Fail(error)),
            Message::Trainer(told) => rank.trainer(told),
            Message::Ended(Ok(()) | Err(Failure::Stopped)) => Ok(()),
            Message::Ended(Err(Failure::Error(error))) => Err(Stop::Fail(error)),
            Message::Ended(Err(Failure::Permanent(error))) => Err(Stop::FailForGood(error)),
            Message::Ended(Err(Failure::Damaged { uri, error })) => {
                let said = rank.say(FromRank::Event(RankEvent::Damaged { uri, error: error.clone() }));
                said.and(Err(Stop::Fail(error)))
            }
            Message::Ended(Err(failure)) => Err(Stop::Fail(format!("the compute thread ended: {failure:?}"))),
            Message::Tick => rank.tick(),
            Message::Vault(vault::Told::Event(event)) => rank.say(FromRank::Event(event)),
            Message::Vault(vault::Told::Failed(error)) => Err(Stop::Fail(error)),
        };
        rank.supervises &= !ended;
        let stop = done.err();
        if rank.supervises {
            // Its command ends first.
            if let Some(stop) = stop {
                rank.ending.get_or_insert(stop);
                rank.orders.stop();
            }
        } else if let Some(stop) = rank.ending.take().or(stop) {
            rank.stop(stop);
            myself.stop(None);
        }
        Ok(())
    }
}

/// Why the rank does not go on.
enum Stop {
    Fail(String),
    /// Another try would end the same way.
    FailForGood(String),
    End(End),
}

impl Linked {
    fn frame(&mut self, frame: ToRank, myself: &ActorRef<Message>) -> Result<(), Stop> {
        match frame {
            ToRank::Start(start) => self.begin(start, myself),
            ToRank::Certificate { certificate, authority } => self.bind(&certificate, &authority, myself),
            ToRank::Membership(membership) => {
                tracing::info!(generation = %membership.generation, members = membership.members.len(), "told of a generation");
                self.orders.membership(membership);
                Ok(())
            }
            ToRank::Commit { generation, step, shards } => {
                self.vault(Order::Commit { generation, step, shards: shards.0 })
            }
            ToRank::Committed { step, keep } => {
                self.orders.committed(step);
                self.vault(Order::Committed { step, keep: keep.0 })?;
                self.finish()
            }
            ToRank::Abandon { generation, step } => self.vault(Order::Abandon { generation, step }),
            ToRank::Rollouts { rollouts } => {
                self.orders.rollouts(rollouts.0);
                Ok(())
            }
            ToRank::Coordinator { reachable } => {
                self.orders.coordinator(reachable);
                Ok(())
            }
            // The tether's own.
            ToRank::Settle(_) | ToRank::Adopted | ToRank::Taken { .. } => Ok(()),
            ToRank::Release => Err(Stop::End(End::Released)),
            ToRank::Stop { reason } => {
                tracing::info!(%reason, "told to stop");
                Err(Stop::End(End::Stopped))
            }
            ToRank::Stores(settings) => {
                checkpoint::provide(settings.0.0.into_iter().collect());
                Ok(())
            }
        }
    }

    fn begin(&mut self, start: StartRank, myself: &ActorRef<Message>) -> Result<(), Stop> {
        if self.start.is_some() {
            return Ok(());
        }
        let spec = JobSpec::parse(&start.spec).map_err(|error| Stop::FailForGood(format!("spec: {error}")))?;
        let csr = self.papers.apply().map_err(|error| Stop::Fail(text_of(&error)))?;
        let artifact = spec.exec.as_ref().and_then(|exec| exec.artifact);
        self.say(FromRank::Hello { csr: csr.into(), artifact })?;
        self.start = Some((start.clone(), spec.clone()));
        let runtime = tokio::runtime::Handle::current();
        if spec.exec.is_some() {
            let port = Port::reserve(self.place.ip)
                .map_err(|error| Stop::Fail(format!("keep a port for the command: {error}")))?;
            (self.listens, self.supervises) = (Some(port.address()), true);
            let given = exec::Assignment { start, spec, orders: self.orders.clone(), port, runtime };
            return spawn(myself, move |tell| exec::run(given, tell));
        }
        let (to_trainer, outside) = mpsc::channel();
        self.outside = Some(to_trainer);
        self.memory = self.place.shards.as_deref().map(|root| ShardMemory::of(root, start.id.job));
        let (orders, beat, memory) = (self.orders.clone(), self.beat.clone(), self.memory.clone());
        let trainers = self.place.trainers;
        let given = Assignment { trainers, start, spec, memory, orders, beat, outside, runtime };
        let (serves, plays) = (given.spec.serve.is_some(), given.start.id.rank.is_rollout());
        spawn(myself, move |tell| match (serves, plays) {
            (true, _) => server::run(given, tell),
            (false, true) => rollout::run(given, tell),
            (false, false) => trainer::run(given, tell),
        })
    }

    fn tick(&mut self) -> Result<(), Stop> {
        // The next one makes up for it.
        let _ = self.say.try_send(FromRank::Alive);
        self.tells = !self.tells;
        if let Some(meter) = self.meter.as_ref().filter(|_| self.tells) {
            let _ = self.say.try_send(FromRank::Load(meter.load()));
        }
        if let Some(draw) = damage::asked() {
            self.orders.damage(draw);
        }
        if let Some(Ok(csr)) = self.papers.renewal() {
            // The next one makes up for it.
            let _ = self.say.try_send(FromRank::Renew { csr: csr.into() });
        }
        let Some(why) = self.beat.hangs() else { return Ok(()) };
        tracing::error!(threads = ?beat::threads(), "the compute thread hangs");
        Err(Stop::Fail(why))
    }

    fn bind(&mut self, certificate: &[u8], authority: &[u8], myself: &ActorRef<Message>) -> Result<(), Stop> {
        let fail = |error: &dyn std::error::Error| Stop::Fail(text_of(error));
        let issued = self.papers.take(certificate, authority).map_err(|error| fail(&error))?;
        let (Some(credentials), Some((start, spec))) = (issued, self.start.clone()) else { return Ok(()) };
        if self.listens.is_some() {
            self.address = self.listens;
            return self.get_ready();
        }
        let cluster = credentials.identity().cluster;
        let mesh = Mesh::bind(&self.io, self.place.ip, credentials).map_err(|error| fail(&error))?;
        self.address = Some(mesh.address());
        let link = myself.clone();
        let subject = Subject { cluster, start, spec, memory: self.memory.clone() };
        let vault = Vault::start(subject, move |told| drop(link.cast(Message::Vault(told))));
        let vault = self.vault.insert(vault.map_err(|error| fail(&error))?).clone();
        if let Some(trainer) = self.outside.take() {
            // One that has failed meanwhile says so itself.
            let _ = trainer.send(Outside { mesh, vault });
        }
        self.get_ready()
    }

    fn trainer(&mut self, told: trainer::Told) -> Result<(), Stop> {
        match told {
            trainer::Told::Loaded => {
                self.loaded = true;
                self.get_ready()
            }
            trainer::Told::Progress(progress) => {
                // The next one makes up for it.
                let _ = self.say.try_send(FromRank::Progress(progress));
                Ok(())
            }
            trainer::Told::Timed(steps) => {
                if !steps.is_empty() {
                    let _ = self.say.try_send(FromRank::Timed(steps.into()));
                }
                Ok(())
            }
            trainer::Told::Serving(meter) => {
                self.meter = Some(meter);
                Ok(())
            }
            trainer::Told::Event(event) => self.say(FromRank::Event(event)),
            trainer::Told::Trained { generation, outcome } => {
                tracing::info!(step = outcome.step.0, weights = %outcome.weights_blake3, "trained");
                self.outcome = Some((generation, outcome));
                self.finish()
            }
            trainer::Told::Left => {
                tracing::info!("the job goes on without this rank");
                Err(Stop::End(End::Released))
            }
        }
    }

    /// Ready means loaded too: peers begin to connect at once, and wait for each other only so long.
    fn get_ready(&mut self) -> Result<(), Stop> {
        let Some(address) = self.address.filter(|_| self.loaded && !self.ready) else { return Ok(()) };
        self.ready = true;
        self.say(FromRank::Event(RankEvent::Ready { address }))
    }

    /// Finished when the last step is trained and its checkpoint is in the catalogue.
    fn finish(&mut self) -> Result<(), Stop> {
        let committed = self.orders.highest_committed();
        let done = self.outcome.take_if(|(_, outcome)| Some(outcome.step) == committed);
        let Some((generation, outcome)) = done else { return Ok(()) };
        self.finished = true;
        self.say(FromRank::Event(RankEvent::Finished { generation, outcome }))
    }

    fn vault(&mut self, order: Order) -> Result<(), Stop> {
        if let Some(vault) = &self.vault {
            vault.tell(order);
        }
        Ok(())
    }

    fn say(&self, frame: FromRank) -> Result<(), Stop> {
        self.say.try_send(frame).map_err(|_| Stop::End(End::HungUp))
    }

    fn stop(&mut self, stop: Stop) {
        let end = match stop {
            Stop::Fail(error) => self.give_up(error, false),
            Stop::FailForGood(error) => self.give_up(error, true),
            Stop::End(end) => end,
        };
        if matches!(end, End::Released)
            && let Some(vault) = &self.vault
        {
            vault.flush(FLUSH_MAX);
            // The job is done: every rank of it clears what this node holds.
            self.memory.iter().filter(|_| self.finished).for_each(ShardMemory::clear);
        }
        // A trainer that computes, sums or waits wakes up.
        self.orders.stop();
        self.outside = None;
        if let Some(sender) = self.end.take() {
            let _ = sender.send(end);
        }
    }

    fn give_up(&self, error: String, permanent: bool) -> End {
        tracing::error!(%error, permanent, "rank gives up");
        let _ = self.say(FromRank::Event(RankEvent::Failed { error, permanent }));
        End::Failed
    }
}

/// Runs `work` on a thread of its own, which tells the actor what happens and how it ends.
fn spawn(
    myself: &ActorRef<Message>,
    work: impl FnOnce(&dyn Fn(trainer::Told)) -> Result<(), Failure> + Send + 'static,
) -> Result<(), Stop> {
    let link = myself.clone();
    let run = move || {
        let told = link.clone();
        let tell = move |say| drop(told.cast(Message::Trainer(say)));
        let ended = catch(|| work(&tell));
        let _ = link.cast(Message::Ended(ended));
    };
    let thread = std::thread::Builder::new().name("trainer".to_owned()).spawn(run);
    thread.map(drop).map_err(|error| Stop::Fail(format!("start the compute thread: {error}")))
}
