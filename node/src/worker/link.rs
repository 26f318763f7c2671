//! The actor between a rank's agent and its threads: takes frames in order, starts what they ask for, and says what happened. Owns the
//! rank's phase; computes nothing and never blocks.
//!
//! Start → (load, make a key) Hello → Certificate → (bind) and (loaded) Ready → Peers → training → Finished → Release.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use stoke_protocol::identity::{Credentials, KeyRequest};
use stoke_protocol::ids::Step;
use stoke_protocol::message::rank::{FromRank, Outcome, RankEvent, StartRank, ToRank};
use stoke_protocol::spec::JobSpec;
use stoke_protocol::transport::Io;
use tokio::sync::{mpsc as queue, oneshot};

use super::failure::{Failure, catch, text_of};
use super::trainer::{self, Assignment, Generation};
use super::vault::{self, Order, Subject, Vault};
use crate::exchange::{AbortHandle, PeerEndpoint};

/// A rank that lost a peer waits so long to be stopped before it gives up by itself: longer than the coordinator needs to lose a node.
const PEERS_LOST_MAX: Duration = Duration::from_secs(30);

/// How a rank's process ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The job is done.
    Released,
    Failed,
    /// The agent is gone.
    HungUp,
    Stopped,
}

pub enum Message {
    Frame(ToRank),
    HungUp,
    Trainer(trainer::Told),
    Trained(Result<Outcome, Failure>),
    Vault(vault::Told),
    /// Nobody stopped this rank after it lost a peer.
    GiveUp(String),
}

/// What the actor is made of.
pub struct Arguments {
    pub io: Io,
    /// Where to listen for peers.
    pub ip: IpAddr,
    /// To the agent. A full queue is an agent that does not read.
    pub say: queue::Sender<FromRank>,
    pub end: oneshot::Sender<End>,
}

pub struct Link;

pub struct Linked {
    io: Io,
    ip: IpAddr,
    say: queue::Sender<FromRank>,
    stop: Arc<AtomicBool>,
    start: Option<(StartRank, JobSpec)>,
    key: Option<KeyRequest>,
    endpoint: Option<PeerEndpoint>,
    vault: Option<Vault>,
    /// Takes the generation to the trainer, once.
    generation: Option<mpsc::Sender<Generation>>,
    loaded: bool,
    ready: bool,
    abort: Option<AbortHandle>,
    outcome: Option<Outcome>,
    /// The highest step whose checkpoint is in the catalogue.
    committed: Option<Step>,
    end: Option<oneshot::Sender<End>>,
}

impl Actor for Link {
    type Msg = Message;
    type State = Linked;
    type Arguments = Arguments;

    async fn pre_start(&self, _: ActorRef<Message>, given: Arguments) -> Result<Linked, ActorProcessingErr> {
        let Arguments { io, ip, say, end } = given;
        Ok(Linked {
            io,
            ip,
            say,
            stop: Arc::default(),
            start: None,
            key: None,
            endpoint: None,
            vault: None,
            generation: None,
            loaded: false,
            ready: false,
            abort: None,
            outcome: None,
            committed: None,
            end: Some(end),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Message>,
        message: Message,
        rank: &mut Linked,
    ) -> Result<(), ActorProcessingErr> {
        let done = match message {
            Message::Frame(frame) => rank.frame(frame, &myself),
            Message::HungUp => Err(Stop::End(End::HungUp)),
            Message::Trainer(told) => rank.trainer(told),
            Message::Trained(Ok(outcome)) => rank.trained(outcome),
            Message::Trained(Err(Failure::Stopped)) => Ok(()),
            Message::Trained(Err(Failure::Peers(error))) => {
                tracing::warn!(%error, "a peer is gone, waiting to be stopped");
                myself.send_after(PEERS_LOST_MAX, || Message::GiveUp(error));
                Ok(())
            }
            Message::Trained(Err(Failure::Error(error))) | Message::GiveUp(error) => Err(Stop::Fail(error)),
            Message::Vault(vault::Told::Event(event)) => rank.say(FromRank::Event(event)),
            Message::Vault(vault::Told::Failed(error)) => Err(Stop::Fail(error)),
        };
        if let Err(stop) = done {
            rank.stop(stop);
            myself.stop(None);
        }
        Ok(())
    }
}

/// Why the rank does not go on.
enum Stop {
    Fail(String),
    End(End),
}

impl Linked {
    fn frame(&mut self, frame: ToRank, myself: &ActorRef<Message>) -> Result<(), Stop> {
        match frame {
            ToRank::Start(start) => self.begin(start, myself),
            ToRank::Certificate { certificate, authority } => self.bind(&certificate, &authority, myself),
            ToRank::Peers(peers) => {
                // They come again after a reconnect of the agent; once is enough.
                if let (Some(generation), Some(endpoint)) = (self.generation.take(), self.endpoint.take()) {
                    let vault = self.vault.clone().expect("the vault was started before the endpoint was bound");
                    let _ = generation.send(Generation { endpoint, peers: peers.0, vault });
                }
                Ok(())
            }
            ToRank::Commit { step, shards } => self.vault(Order::Commit { step, shards: shards.0 }),
            ToRank::Committed { step, prune } => {
                self.committed = self.committed.max(Some(step));
                self.vault(Order::Committed { step, prune: prune.0 })?;
                self.finish()
            }
            ToRank::Release => Err(Stop::End(End::Released)),
            ToRank::Stop { reason } => {
                tracing::info!(%reason, "told to stop");
                Err(Stop::End(End::Stopped))
            }
        }
    }

    fn begin(&mut self, start: StartRank, myself: &ActorRef<Message>) -> Result<(), Stop> {
        if self.start.is_some() {
            return Ok(());
        }
        let spec = JobSpec::parse(&start.spec).map_err(|error| Stop::Fail(format!("spec: {error}")))?;
        let key = KeyRequest::new().map_err(|error| Stop::Fail(text_of(&error)))?;
        self.say(FromRank::Hello { csr: key.csr().to_vec().into() })?;
        self.key = Some(key);
        self.start = Some((start.clone(), spec.clone()));
        let (to_trainer, generation) = mpsc::channel();
        self.generation = Some(to_trainer);
        let runtime = tokio::runtime::Handle::current();
        let given = Assignment { start, spec, stop: self.stop.clone(), generation, runtime };
        let link = myself.clone();
        let train = move || {
            let told = link.clone();
            let trained = catch(|| trainer::run(given, &move |say| drop(told.cast(Message::Trainer(say)))));
            let _ = link.cast(Message::Trained(trained));
        };
        let thread = std::thread::Builder::new().name("trainer".to_owned()).spawn(train);
        thread.map(drop).map_err(|error| Stop::Fail(format!("start the compute thread: {error}")))
    }

    fn bind(&mut self, certificate: &[u8], authority: &[u8], myself: &ActorRef<Message>) -> Result<(), Stop> {
        let (Some(key), Some((start, spec))) = (self.key.take(), self.start.clone()) else { return Ok(()) };
        let fail = |error: &dyn std::error::Error| Stop::Fail(text_of(error));
        let credentials: Credentials = key.accept(certificate, &[authority.to_vec()]).map_err(|error| fail(&error))?;
        let cluster = credentials.identity().cluster;
        let endpoint = PeerEndpoint::bind(&self.io, self.ip, credentials).map_err(|error| fail(&error))?;
        self.endpoint = Some(endpoint);
        let link = myself.clone();
        let vault = Vault::start(Subject { cluster, start, spec }, move |told| drop(link.cast(Message::Vault(told))));
        self.vault = Some(vault.map_err(|error| fail(&error))?);
        self.get_ready()
    }

    fn trainer(&mut self, told: trainer::Told) -> Result<(), Stop> {
        match told {
            trainer::Told::Loaded => {
                self.loaded = true;
                self.get_ready()
            }
            trainer::Told::Connected(abort) => {
                self.abort = Some(abort);
                Ok(())
            }
            trainer::Told::Progress(progress) => {
                // The next one makes up for it.
                let _ = self.say.try_send(FromRank::Progress(progress));
                Ok(())
            }
        }
    }

    /// Ready means loaded too: peers begin to connect at once, and wait for each other only so long.
    fn get_ready(&mut self) -> Result<(), Stop> {
        let Some(endpoint) = self.endpoint.as_ref().filter(|_| self.loaded && !self.ready) else { return Ok(()) };
        let address = endpoint.address();
        self.ready = true;
        self.say(FromRank::Event(RankEvent::Ready { address }))
    }

    fn trained(&mut self, outcome: Outcome) -> Result<(), Stop> {
        tracing::info!(step = outcome.step.0, weights = %outcome.weights_blake3, "trained");
        self.outcome = Some(outcome);
        self.finish()
    }

    /// Finished when the last step is trained and its checkpoint is in the catalogue.
    fn finish(&mut self) -> Result<(), Stop> {
        let committed = self.committed;
        let done = self.outcome.take_if(|outcome| Some(outcome.step) == committed);
        done.map_or(Ok(()), |outcome| self.say(FromRank::Event(RankEvent::Finished { outcome })))
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
        self.stop.store(true, Ordering::Relaxed);
        let (reason, end) = match stop {
            Stop::Fail(error) => {
                tracing::error!(%error, "rank gives up");
                let _ = self.say(FromRank::Event(RankEvent::Failed { error: error.clone() }));
                (error, End::Failed)
            }
            Stop::End(end) => ("this rank was told to end".to_owned(), end),
        };
        if let Some(abort) = &self.abort {
            abort.abort(&reason);
        }
        // A trainer that waits for its generation wakes up.
        self.generation = None;
        if let Some(sender) = self.end.take() {
            let _ = sender.send(end);
        }
    }
}
