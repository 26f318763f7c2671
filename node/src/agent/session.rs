//! The session with the coordinator: dials, says hello, and keeps it up. Owns the connection and when to dial again; understands no frame
//! but the first.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use stoke_protocol::identity::{Credentials, Subject};
use stoke_protocol::ids::Incarnation;
use stoke_protocol::message::node::{FromNode, ToNode};
use stoke_protocol::message::rank::RankId;
use stoke_protocol::spec::Artifact;
use stoke_protocol::transport::{CloseCode, Closed, Connection, Endpoint, FrameReceiver, FrameSender, TransportError};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::actor::Message;
use super::backoff::Backoff;
use super::conversation::{self, Awake, Conversation};
use super::log::LogBook;
use super::state::{Event, Signed};
use crate::artifact::{Cache, Fetched};
use crate::gateway::Watch;

/// The coordinator's welcome comes within this, or it is busy with something else.
const WELCOME_MAX: Duration = Duration::from_secs(5);
/// A name is looked up within this.
const RESOLVE_MAX: Duration = Duration::from_secs(5);
/// Frames that wait for the network; the state sends at most a window of reports, and progress may be dropped.
const FRAMES_MAX: usize = 1024;

/// What a session is made of.
#[derive(Clone)]
pub struct SessionArguments {
    pub endpoint: Endpoint,
    pub credentials: Credentials,
    /// Where renewed credentials are saved.
    pub identity_dir: PathBuf,
    /// `host:port`, tried in turn.
    pub coordinator: Vec<String>,
    pub incarnation: Incarnation,
    pub logs: LogBook,
    /// That ranks need which run commands.
    pub artifacts: Cache,
    /// Tells which questions are at jobs that leave.
    pub gateway: Option<Watch>,
    /// Whether heartbeats carry how busy the machine is; a simulated one is not.
    pub measure: bool,
    /// Of the back-off's jitter.
    pub seed: u64,
}

pub enum SessionMessage {
    Dial,
    Dialled(Box<Result<Dialled, Undialled>>),
    Send {
        session: u64,
        frame: FromNode,
    },
    Fetch {
        session: u64,
        id: RankId,
        artifact: Artifact,
    },
    Sign {
        session: u64,
        id: RankId,
        csr: Vec<u8>,
        artifact: Option<Artifact>,
    },
    /// The agent does not want this coordinator.
    Close {
        session: u64,
        reason: String,
    },
    Lost {
        session: u64,
        reason: String,
    },
}

/// A connection on which both sides have said who they are.
pub struct Dialled {
    connection: Connection,
    sender: FrameSender,
    receiver: FrameReceiver,
    welcome: ToNode,
    heartbeat: Duration,
    lease: Duration,
}

/// Why there is none.
pub enum Undialled {
    Failed(String),
    /// This node was removed from the cluster.
    Revoked(String),
}

pub struct Session;

pub struct Standing {
    arguments: SessionArguments,
    agent: ActorRef<Message>,
    backoff: Backoff,
    /// Number of the last session; frames of another are stale.
    number: u64,
    live: Option<Live>,
    /// Said once an outage.
    last_error: String,
}

struct Live {
    connection: Connection,
    frames: mpsc::Sender<FromNode>,
    conversation: AbortHandle,
}

impl Actor for Session {
    type Msg = SessionMessage;
    type State = Standing;
    type Arguments = (SessionArguments, ActorRef<Message>);

    async fn pre_start(
        &self,
        myself: ActorRef<SessionMessage>,
        (arguments, agent): Self::Arguments,
    ) -> Result<Standing, ActorProcessingErr> {
        myself.cast(SessionMessage::Dial)?;
        let backoff = Backoff::new(arguments.seed);
        Ok(Standing { arguments, agent, backoff, number: 0, live: None, last_error: String::new() })
    }

    async fn handle(
        &self,
        myself: ActorRef<SessionMessage>,
        message: SessionMessage,
        standing: &mut Standing,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            SessionMessage::Dial => standing.dial(&myself),
            SessionMessage::Dialled(result) => standing.dialled(*result, &myself),
            SessionMessage::Send { session, frame } => standing.send(session, frame, &myself),
            SessionMessage::Fetch { session, id, artifact } => standing.fetch(session, id, artifact),
            SessionMessage::Sign { session, id, csr, artifact } => standing.sign(session, id, (csr, artifact)),
            SessionMessage::Close { session, reason } => {
                if let Some(live) = standing.live.as_ref().filter(|_| session == standing.number) {
                    live.connection.close(CloseCode::Superseded, &reason);
                }
            }
            SessionMessage::Lost { session, reason } => standing.lost(session, &reason, &myself),
        }
        Ok(())
    }

    async fn post_stop(&self, _: ActorRef<SessionMessage>, standing: &mut Standing) -> Result<(), ActorProcessingErr> {
        if let Some(live) = standing.live.take() {
            live.conversation.abort();
        }
        standing.arguments.endpoint.close(CloseCode::ShuttingDown, "the agent was stopped").await;
        Ok(())
    }
}

impl Standing {
    fn dial(&mut self, myself: &ActorRef<SessionMessage>) {
        let (arguments, agent, session) = (self.arguments.clone(), self.agent.clone(), myself.clone());
        tokio::spawn(async move {
            let dialled = dial(&arguments, &agent).await;
            let _ = session.cast(SessionMessage::Dialled(Box::new(dialled)));
        });
    }

    fn dialled(&mut self, result: Result<Dialled, Undialled>, myself: &ActorRef<SessionMessage>) {
        let dialled = match result {
            Ok(dialled) => dialled,
            Err(Undialled::Failed(reason)) => {
                let _ = self.agent.cast(Message::Event(Event::Unreached, None));
                return self.again(&reason, myself);
            }
            // No other try can help: the agent ends.
            Err(Undialled::Revoked(reason)) => return drop(self.agent.cast(Message::Revoked(reason))),
        };
        self.number += 1;
        let (frames, queue) = mpsc::channel(FRAMES_MAX);
        let (remote, local) = (dialled.connection.remote_address().ip(), dialled.connection.local_ip());
        tracing::info!(coordinator = %dialled.connection.remote_address(), "connected");
        self.last_error.clear();
        self.backoff.reset();
        let (session, connection) = (self.number, dialled.connection.clone());
        // The agent hears of the session before any frame of it.
        let welcome = dialled.welcome;
        let _ = self.agent.cast(Message::Connected { session, remote, local, welcome });
        let conversation = Conversation {
            session,
            connection: dialled.connection,
            agent: self.agent.clone(),
            arguments: self.arguments.clone(),
            heartbeat: dialled.heartbeat,
            awake: Awake::new(dialled.lease),
        };
        let myself = myself.clone();
        let task = tokio::spawn(async move {
            let reason = conversation::keep_up(conversation, dialled.sender, dialled.receiver, queue).await;
            let _ = myself.cast(SessionMessage::Lost { session, reason });
        });
        self.live = Some(Live { connection, frames, conversation: task.abort_handle() });
    }

    fn send(&mut self, session: u64, frame: FromNode, myself: &ActorRef<SessionMessage>) {
        let Some(live) = self.live.as_ref().filter(|_| session == self.number) else { return };
        let droppable = matches!(
            frame,
            FromNode::Progress { .. } | FromNode::Load { .. } | FromNode::Demand(_) | FromNode::Timed { .. }
        );
        if live.frames.try_send(frame).is_err() && !droppable {
            // A report must not be lost on a session that lives: a new one sends it again.
            live.connection.close(CloseCode::TooSlow, "reports are not being read");
            let _ = myself.cast(SessionMessage::Lost { session, reason: "the coordinator does not read".to_owned() });
        }
    }

    fn fetch(&mut self, session: u64, id: RankId, artifact: Artifact) {
        let Some(live) = self.live.as_ref().filter(|_| session == self.number) else { return };
        let (connection, agent, artifacts) =
            (live.connection.clone(), self.agent.clone(), self.arguments.artifacts.clone());
        tokio::spawn(async move {
            let fetched = artifacts.fetch_program(&connection, artifact).await;
            if fetched == Fetched::Lost {
                tokio::time::sleep(conversation::SIGN_AGAIN).await;
            }
            let _ = agent.cast(Message::Event(Event::Fetched { id, fetched }, None));
        });
    }

    fn sign(&mut self, session: u64, id: RankId, (csr, artifact): (Vec<u8>, Option<Artifact>)) {
        let Some(live) = self.live.as_ref().filter(|_| session == self.number) else { return };
        let (connection, agent) = (live.connection.clone(), self.agent.clone());
        let authority = self.arguments.credentials.roots().swap_remove(0);
        let artifacts = self.arguments.artifacts.clone();
        tokio::spawn(async move {
            let fetched = match artifact {
                Some(artifact) => artifacts.fetch(&connection, artifact).await,
                None => Fetched::There,
            };
            let answer = match fetched {
                Fetched::There => conversation::sign(&connection, id, csr, authority).await,
                Fetched::Lost => Signed::Lost,
                Fetched::Refused(reason) | Fetched::Unfit(reason) => Signed::Refused { reason },
            };
            if answer == Signed::Lost {
                tokio::time::sleep(conversation::SIGN_AGAIN).await;
            }
            let _ = agent.cast(Message::Event(Event::Signed { id, answer }, None));
        });
    }

    fn lost(&mut self, session: u64, reason: &str, myself: &ActorRef<SessionMessage>) {
        if session != self.number {
            return;
        }
        let Some(live) = self.live.take() else { return };
        live.conversation.abort();
        let _ = self.agent.cast(Message::Disconnected { session });
        self.again(reason, myself);
    }

    fn again(&mut self, reason: &str, myself: &ActorRef<SessionMessage>) {
        let wait = self.backoff.wait();
        if self.last_error != reason {
            tracing::warn!(%reason, again_in = ?wait, "no session with the coordinator");
            self.last_error = reason.to_owned();
        }
        myself.send_after(wait, || SessionMessage::Dial);
    }
}

async fn dial(arguments: &SessionArguments, agent: &ActorRef<Message>) -> Result<Dialled, Undialled> {
    let mut errors = Vec::new();
    for name in &arguments.coordinator {
        let addresses = match resolve(name).await {
            Ok(addresses) => addresses,
            Err(error) => {
                errors.push(error);
                continue;
            }
        };
        for address in addresses {
            match meet(arguments, agent, address).await {
                Ok(dialled) => return Ok(dialled),
                Err(error) => match error.closed() {
                    Some(Closed::ByPeer { code: CloseCode::Revoked, reason }) => {
                        return Err(Undialled::Revoked(reason.clone()));
                    }
                    Some(_) | None => errors.push(error.to_string()),
                },
            }
        }
    }
    Err(Undialled::Failed(errors.join("; ")))
}

/// The addresses of `host:port`. An address needs no look-up.
pub(super) async fn resolve(name: &str) -> Result<Vec<SocketAddr>, String> {
    if let Ok(address) = name.parse() {
        return Ok(vec![address]);
    }
    let mend = "write the coordinator as host:port";
    match timeout(RESOLVE_MAX, tokio::net::lookup_host(name)).await {
        Ok(Ok(addresses)) => Ok(addresses.collect()),
        Ok(Err(error)) => Err(format!("look up {name:?}: {error} ({mend})")),
        Err(_) => Err(format!("look up {name:?}: no answer in {} s", RESOLVE_MAX.as_secs())),
    }
}

async fn meet(
    arguments: &SessionArguments,
    agent: &ActorRef<Message>,
    address: SocketAddr,
) -> Result<Dialled, TransportError> {
    let connection = arguments.endpoint.connect(address, &Subject::Coordinator).await?;
    let hello = ractor::call!(agent, Message::Hello).map_err(|_| TransportError::Ended)?;
    let welcome = async {
        let (mut sender, mut receiver) = connection.open_frames().await?;
        sender.send(&FromNode::Hello(hello)).await?;
        let welcome = receiver.expect::<ToNode>().await?;
        Ok::<_, TransportError>((sender, receiver, welcome))
    };
    let late = TransportError::Deadline { what: "wait for the coordinator's welcome", after: WELCOME_MAX };
    let (sender, receiver, welcome) = timeout(WELCOME_MAX, welcome).await.map_err(|_| late)??;
    let (heartbeat, lease) = match &welcome {
        ToNode::Welcome { heartbeat_ms, lease_ms, .. } => {
            (Duration::from_millis((*heartbeat_ms).max(1)), Duration::from_millis((*lease_ms).max(1)))
        }
        // The agent refuses it with the reason.
        _ => (WELCOME_MAX, WELCOME_MAX),
    };
    Ok(Dialled { connection, sender, receiver, welcome, heartbeat, lease })
}

/// The unspecified address of the family of `peer`, any port. On the loopback a node speaks from the address where its ranks listen: that
/// is how nodes of one machine are told apart.
pub(super) fn any_port_towards(peer: Option<IpAddr>, own: Option<IpAddr>) -> SocketAddr {
    let both_loopback = |own: &IpAddr| {
        own.is_loopback() && peer.is_some_and(|peer| peer.is_loopback() && peer.is_ipv4() == own.is_ipv4())
    };
    if let Some(own) = own.filter(both_loopback) {
        return (own, 0).into();
    }
    match peer {
        Some(IpAddr::V6(_)) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
        Some(IpAddr::V4(_)) | None => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
    }
}
