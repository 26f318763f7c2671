//! The agent's actor: takes events in, asks the state, carries its effects out in order. Owns the processes' handles; decides nothing.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use stoke_protocol::ids::JobId;
use stoke_protocol::message::node::{NodeHello, ToNode};
use stoke_protocol::message::rank::RankId;
use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};
use tokio::time::Instant;

use super::disk::{Home, StateFile};
use super::fence::Fence;
use super::inventory::Kept;
use super::session::{Session, SessionArguments, SessionMessage};
use super::shards::ShardFolder;
use super::spawn::{RankEvents, RankProcess, Spawner};
use super::state::{AgentState, Effect, Event};
use super::surveys::Surveyor;
use super::sweeps::Sweep;
use crate::checkpoint;
use crate::config::Config;
use crate::gateway::Gateway;
use crate::worker::failure::text_of;

/// How often silent ranks are looked for.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// After the last rank is gone, its end has this long to be acknowledged before the agent goes.
const FAREWELL_MAX: Duration = Duration::from_millis(1_000);

/// What the agent's actor is told.
#[derive(Debug)]
pub enum Message {
    /// Something that the state decides about; the permit is its place in a rank's share of the mailbox.
    Event(Event, Option<OwnedSemaphorePermit>),
    /// The session asks for its first frame.
    Hello(RpcReplyPort<NodeHello>),
    /// A session stands: its number, the addresses of both ends, and the coordinator's first frame.
    Connected {
        session: u64,
        remote: IpAddr,
        local: Option<IpAddr>,
        welcome: ToNode,
    },
    Frame {
        session: u64,
        frame: ToNode,
        place: Option<OwnedSemaphorePermit>,
    },
    Disconnected {
        session: u64,
    },
    /// The coordinator has removed this node: nothing of it may go on.
    Revoked(String),
    /// Time to look for ranks that are silent.
    Look,
    /// Somebody wants to know that messages are still taken.
    Beat(RpcReplyPort<()>),
    /// A grace is over.
    Kill(RankId),
    /// Stop all ranks, say farewell, end; answered by the end of the actor.
    ShutDown,
    /// The farewell has taken long enough.
    Leave,
}

/// What the actor is made of.
pub struct Arguments {
    pub config: Config,
    pub home: Home,
    pub state: AgentState,
    pub spawner: Arc<dyn Spawner>,
    pub shards: Option<ShardFolder>,
    pub has_threads: bool,
    /// Ranks of the agents before this one.
    pub kept: Vec<Kept>,
    pub session: SessionArguments,
    /// Is told where jobs serve.
    pub gateway: Option<Gateway>,
    /// Is told whether this agent has a session with a coordinator that it obeys.
    pub accepted: watch::Sender<bool>,
    /// Resolves with the reason of an end that nobody asked for, or with nothing after [`Message::ShutDown`].
    pub ended: oneshot::Sender<Option<String>>,
}

pub struct AgentActor;

pub struct Acting {
    config: Config,
    home: Home,
    state: AgentState,
    spawner: Arc<dyn Spawner>,
    shards: Option<ShardFolder>,
    has_threads: bool,
    session: ActorRef<SessionMessage>,
    /// The number of the session that is up, and the address that ranks listen on.
    live: Option<u64>,
    rank_ip: Option<IpAddr>,
    processes: BTreeMap<RankId, Box<dyn RankProcess>>,
    /// When each was heard of last.
    heard: BTreeMap<RankId, Instant>,
    /// When this was looked at last: an agent that was stopped itself has heard nobody.
    looked: Instant,
    leaving: bool,
    gateway: Option<Gateway>,
    accepted: watch::Sender<bool>,
    surveyor: Surveyor,
    /// Of an end that nobody here has asked for.
    reason: Option<String>,
    ended: Option<oneshot::Sender<Option<String>>>,
}

impl Actor for AgentActor {
    type Msg = Message;
    type State = Acting;
    type Arguments = Arguments;

    async fn pre_start(&self, myself: ActorRef<Message>, given: Arguments) -> Result<Acting, ActorProcessingErr> {
        // Before the session, whose first frame tells what runs here.
        let (mut state, now) = (given.state, Instant::now());
        let (mut processes, mut heard) = (BTreeMap::new(), BTreeMap::new());
        for kept in given.kept {
            let id = kept.id;
            state.apply(Event::Inherited { id, claim: kept.claim });
            processes.insert(id, given.spawner.adopt(kept, RankEvents::new(id, myself.clone())));
            heard.insert(id, now);
        }
        let arguments = (given.session, myself.clone());
        let (session, _) = Session::spawn_linked(None, Session, arguments, myself.get_cell()).await?;
        myself.send_interval(LOOK_EVERY, || Message::Look);
        Ok(Acting {
            config: given.config,
            home: given.home,
            state,
            spawner: given.spawner,
            shards: given.shards,
            has_threads: given.has_threads,
            session,
            live: None,
            rank_ip: None,
            processes,
            heard,
            looked: now,
            leaving: false,
            gateway: given.gateway,
            accepted: given.accepted,
            surveyor: Surveyor::default(),
            reason: None,
            ended: Some(given.ended),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<Message>,
        message: Message,
        acting: &mut Acting,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            Message::Event(event, _place) => acting.take(event, &myself),
            Message::Hello(reply) => drop(reply.send(acting.state.hello())),
            Message::Connected { session, remote, local, welcome } => {
                acting.live = Some(session);
                let usable = local.filter(|ip| !ip.is_unspecified());
                acting.rank_ip =
                    Some(acting.config.listen_ip.or(usable).unwrap_or_else(|| acting.config.rank_ip(remote)));
                acting.take(Event::Coordinator(welcome), &myself);
                // A welcome that is not obeyed has ended the session by now.
                acting.accepted.send_replace(acting.live.is_some());
            }
            Message::Frame { session, frame, place: _place } => {
                if acting.live == Some(session) {
                    acting.take(Event::Coordinator(frame), &myself);
                }
            }
            Message::Disconnected { session } => {
                if acting.live == Some(session) {
                    acting.live = None;
                    acting.accepted.send_replace(false);
                    acting.take(Event::Disconnected, &myself);
                }
            }
            Message::Revoked(reason) => {
                acting.home.set_identity_aside();
                acting.reason = Some(reason);
                // No agent that comes after this one is told to stop its ranks.
                acting.take(Event::ShutDown { grace_ms: 0 }, &myself);
            }
            Message::Look => acting.look(&myself),
            Message::Beat(reply) => drop(reply.send(())),
            Message::Kill(id) => acting.kill(id),
            Message::ShutDown => acting.take(Event::ShutDown { grace_ms: acting.config.stop_grace_ms }, &myself),
            Message::Leave => myself.stop(None),
        }
        if acting.leaving && acting.state.is_flushed() {
            myself.stop(None);
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<Message>,
        event: SupervisionEvent,
        acting: &mut Acting,
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(_, error) = event {
            acting.end(Some(format!("session of the agent failed: {error}")));
            myself.stop(None);
        }
        Ok(())
    }

    async fn post_stop(&self, _myself: ActorRef<Message>, acting: &mut Acting) -> Result<(), ActorProcessingErr> {
        // After a shutdown there are no ranks; otherwise the next agent finds those that there are.
        if acting.processes.is_empty() {
            acting.shards.iter().for_each(ShardFolder::remove);
        }
        if let Some(gateway) = acting.gateway.take() {
            gateway.stop().await;
        }
        let _ = acting.session.stop_and_wait(None, Some(FAREWELL_MAX)).await;
        let reason = acting.reason.take();
        acting.end(reason);
        Ok(())
    }
}

impl Acting {
    fn take(&mut self, event: Event, myself: &ActorRef<Message>) {
        match &event {
            Event::Exited { id, .. } => {
                self.processes.remove(id);
                self.heard.remove(id);
            }
            Event::Rank { id, .. } => drop(self.heard.insert(*id, Instant::now())),
            _ => {}
        }
        let mut effects: VecDeque<Effect> = self.state.apply(event).into();
        while let Some(effect) = effects.pop_front() {
            match effect {
                Effect::Persist(fence) => match self.home.state().persist(fence) {
                    Ok(()) => self.state.persisted(fence),
                    Err(error) => {
                        tracing::error!(%error, "epoch of the coordinator cannot be stored, it is not obeyed");
                        effects.clear();
                        self.disconnect("the node cannot store its epoch");
                        effects.extend(self.state.apply(Event::Disconnected));
                    }
                },
                Effect::Note(fence) => self.aside(note(fence, self.home.state().clone()), myself),
                Effect::Send(frame) => {
                    if let Some(session) = self.live {
                        let _ = self.session.cast(SessionMessage::Send { session, frame });
                    }
                }
                Effect::Disconnect { reason } => {
                    tracing::warn!(%reason, "coordinator is not obeyed");
                    self.disconnect(&reason);
                    effects.extend(self.state.apply(Event::Disconnected));
                }
                Effect::Spawn(start) => {
                    let id = start.id;
                    let ip = self.rank_ip.expect("A1: a start comes in a session");
                    match self.spawner.spawn(start, ip, RankEvents::new(id, myself.clone())) {
                        Ok(process) => {
                            self.processes.insert(id, process);
                            self.heard.insert(id, Instant::now());
                        }
                        Err(error) => {
                            tracing::warn!(rank = %id, %error, "rank could not be started");
                            effects.extend(self.state.apply(Event::NotStarted { id, error }));
                        }
                    }
                }
                Effect::ToRank { id, frame } => {
                    if let Some(process) = self.processes.get(&id) {
                        process.send(frame);
                    }
                }
                Effect::Fetch { id, artifact } => {
                    if let Some(session) = self.live {
                        let _ = self.session.cast(SessionMessage::Fetch { session, id, artifact });
                    }
                }
                Effect::Sign { id, csr, artifact } => {
                    if let Some(session) = self.live {
                        let _ = self.session.cast(SessionMessage::Sign { session, id, csr, artifact });
                    }
                }
                Effect::KillAfter { id, grace_ms } => {
                    myself.send_after(Duration::from_millis(grace_ms), move || Message::Kill(id));
                }
                Effect::Forget { id } => self.spawner.forget(id),
                Effect::Sweep { job, sweep } => self.aside(sweep_job(job, sweep), myself),
                Effect::Routes(routes) => self.gateway.iter().for_each(|gateway| gateway.routes(routes.clone())),
                Effect::Survey(survey) => self.surveyor.begin(survey, myself.clone()),
                Effect::Warn(text) => tracing::warn!("{text}"),
                Effect::AllGone => {
                    self.leaving = true;
                    let patience = if self.live.is_some() { FAREWELL_MAX } else { Duration::ZERO };
                    myself.send_after(patience, || Message::Leave);
                }
            }
        }
    }

    /// Does what takes long without holding anybody up, and takes what it gives.
    fn aside(&self, work: impl FnOnce() -> Event + Send + 'static, myself: &ActorRef<Message>) {
        let agent = myself.clone();
        let work = move || {
            // An agent that is gone needs no answer.
            let _ = agent.cast(Message::Event(work(), None));
        };
        match self.has_threads {
            true => drop(tokio::task::spawn_blocking(work)),
            false => work(),
        }
    }

    /// Ranks that have said nothing for long.
    fn look(&mut self, myself: &ActorRef<Message>) {
        let live = self.processes.keys().map(|id| id.job);
        self.shards.iter_mut().for_each(|shards| shards.look(live.clone()));
        let now = Instant::now();
        let longest = Duration::from_millis(self.config.rank_silence_ms);
        // What waits in the sockets comes first after a stop of this process.
        if now - std::mem::replace(&mut self.looked, now) > LOOK_EVERY * 4 {
            self.heard.values_mut().for_each(|heard| *heard = now);
        }
        let silent = self.heard.iter().filter(|(_, heard)| now - **heard > longest);
        let silent: Vec<(RankId, u64)> = silent.map(|(id, heard)| (*id, (now - *heard).as_millis() as u64)).collect();
        for (id, for_ms) in silent {
            self.heard.remove(&id);
            tracing::warn!(rank = %id, for_ms, "rank is silent");
            self.take(Event::Silent { id, for_ms }, myself);
        }
    }

    fn disconnect(&mut self, reason: &str) {
        if let Some(session) = self.live.take() {
            let _ = self.session.cast(SessionMessage::Close { session, reason: reason.to_owned() });
        }
    }

    fn kill(&mut self, id: RankId) {
        if let Some(process) = self.processes.get(&id) {
            tracing::warn!(rank = %id, "rank did not stop within its grace and is killed");
            process.kill();
        }
    }

    fn end(&mut self, reason: Option<String>) {
        if let Some(ended) = self.ended.take() {
            let _ = ended.send(reason);
        }
    }
}

/// A process that ends does not wait for it: what it leaves is swept when the order comes again.
fn sweep_job(job: JobId, Sweep { index, checkpoints, newest, keep }: Sweep) -> impl FnOnce() -> Event + Send + 'static {
    move || {
        let (removed, error) = match checkpoint::patiently(|| checkpoint::sweep(&checkpoints, newest, &keep)) {
            Ok(removed) => (removed.len() as u32, None),
            Err(error) => (0, Some(text_of(&error))),
        };
        tracing::info!(%job, removed, error, "pruned checkpoints swept");
        Event::Swept { job, index, removed, error }
    }
}

/// A disk that is slow holds nobody up.
fn note(fence: Fence, state: Arc<StateFile>) -> impl FnOnce() -> Event + Send + 'static {
    move || {
        let noted =
            state.persist(fence).inspect_err(|error| tracing::warn!(%error, "the journal's index is not stored"));
        Event::Noted { fence: noted.ok().map(|()| fence) }
    }
}
