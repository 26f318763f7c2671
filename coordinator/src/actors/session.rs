//! A node's session: one actor a connection. It carries frames both ways and ends with its connection. Owns the session's bounds; never
//! decides what a frame means.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ractor::{Actor, ActorProcessingErr, ActorRef};
use stoke_protocol::identity::{Authority, Subject};
use stoke_protocol::ids::NodeId;
use stoke_protocol::label::{check_labels, check_node_name, is_plain};
use stoke_protocol::message::node::{FromNode, Heartbeat, NodeHello, NodeReply, NodeRequest, ToNode};
use stoke_protocol::transport::{CloseCode, Connection, FrameReceiver, FrameSender, Request, TransportError};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::handle::ClusterHandle;
use super::messages::{Answer, Link, Message as ClusterMessage, Question, Words};
use crate::artifacts::Artifacts;
use crate::config::Lifetimes;
use crate::metrics::Metrics;
use crate::state::SessionId;
use crate::state::pruning::Sweep;

/// A node that has connected says hello within this time.
const HELLO_MAX: Duration = Duration::from_secs(5);
/// Frames that wait for a node that reads slowly; one more closes its session, and it gets them again when it reconnects.
const FRAMES_WAITING_MAX: usize = 4_096;
/// Words of one node in the cluster's mailbox: more wait in its QUIC stream.
const WORDS_WAITING_MAX: usize = 256;
/// Signing requests of one node at a time: a gang's ranks on one machine.
const REQUESTS_MAX: usize = 64;
/// Accelerators of one machine; more make lists of nodes long.
const GPUS_MAX: usize = 256;
/// The release and the names of accelerators.
const WORD_BYTES_MAX: usize = 128;

pub(crate) enum Message {
    /// From the cluster: to the node.
    Send(Box<ToNode>),
    /// From the cluster: the session is over.
    Close { reason: String },
    /// From the cluster: the node was removed.
    Revoke { reason: String },
    /// From the cluster: this coordinator goes down.
    ShutDown,
    /// From this session's tasks: the connection is over.
    Ended,
}

pub(crate) struct SessionActor;

pub(crate) struct Arguments {
    pub session: SessionId,
    pub node: NodeId,
    pub connection: Connection,
    pub cluster: ClusterHandle,
    pub authority: Arc<Authority>,
    pub lifetimes: Lifetimes,
    pub metrics: Arc<Metrics>,
    pub artifacts: Artifacts,
}

pub(crate) struct State {
    session: SessionId,
    connection: Connection,
    cluster: ClusterHandle,
    frames: mpsc::Sender<ToNode>,
    tasks: [AbortHandle; 2],
}

impl Actor for SessionActor {
    type Msg = Message;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(&self, myself: ActorRef<Message>, arguments: Arguments) -> Result<State, ActorProcessingErr> {
        let (frames, to_send) = mpsc::channel(FRAMES_WAITING_MAX);
        let (session, connection) = (arguments.session, arguments.connection.clone());
        let cluster = arguments.cluster.clone();
        let talk = Arc::new(Talk { arguments, myself });
        let expiry = talk.clone();
        let conversation = tokio::spawn(async move { talk.run(to_send).await }).abort_handle();
        let expiry = tokio::spawn(async move { expiry.outlive().await }).abort_handle();
        Ok(State { session, connection, cluster, frames, tasks: [conversation, expiry] })
    }

    async fn handle(
        &self,
        myself: ActorRef<Message>,
        message: Message,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            Message::Send(frame) => {
                if state.frames.try_send(*frame).is_err() {
                    state.connection.close(CloseCode::TooSlow, "orders are not being read");
                }
            }
            Message::Close { reason } => state.connection.close(CloseCode::Superseded, &reason),
            Message::Revoke { reason } => state.connection.close(CloseCode::Revoked, &reason),
            Message::ShutDown => state.connection.close(CloseCode::ShuttingDown, "the coordinator goes down"),
            Message::Ended => myself.stop(None),
        }
        Ok(())
    }

    async fn post_stop(&self, _myself: ActorRef<Message>, state: &mut State) -> Result<(), ActorProcessingErr> {
        state.tasks.iter().for_each(AbortHandle::abort);
        state.connection.close(CloseCode::Done, "session over");
        // The cluster may have ended before its sessions.
        state.cluster.send(ClusterMessage::Closed { session: state.session });
        Ok(())
    }
}

/// The network side of a session.
struct Talk {
    arguments: Arguments,
    myself: ActorRef<Message>,
}

impl Talk {
    async fn run(&self, to_send: mpsc::Receiver<ToNode>) {
        let node = self.arguments.node;
        match self.converse(to_send).await {
            Ok(()) => tracing::debug!(%node, "session ended"),
            Err(error @ TransportError::Frame(_)) => {
                self.arguments.metrics.refused_frames.inc();
                tracing::warn!(%node, %error, "session refused");
            }
            Err(error) => tracing::info!(%node, %error, "session ended"),
        }
        let _stopped = self.myself.send_message(Message::Ended);
    }

    async fn converse(&self, to_send: mpsc::Receiver<ToNode>) -> Result<(), TransportError> {
        let connection = &self.arguments.connection;
        let hello = async {
            let (sender, mut receiver) = connection.accept_frames().await?;
            let first: FromNode = receiver.expect().await?;
            Ok::<_, TransportError>((sender, receiver, first))
        };
        let late = TransportError::Deadline { what: "wait for the node's hello", after: HELLO_MAX };
        let (sender, receiver, first) = timeout(HELLO_MAX, hello).await.map_err(|_| late)??;
        let FromNode::Hello(hello) = first else {
            connection.close(CloseCode::Malformed, "the first frame of a session is Hello");
            return Ok(());
        };
        if let Err(problem) = check_offer(&hello) {
            connection.close(CloseCode::Malformed, &problem);
            return Ok(());
        }
        self.cluster(ClusterMessage::Hello {
            session: self.arguments.session,
            node: self.arguments.node,
            address: connection.remote_address().to_string(),
            hello: Box::new(hello),
            link: Link { actor: self.myself.clone(), connection: connection.clone() },
        });
        tokio::select! {
            biased;
            ended = self.listen(receiver) => ended,
            ended = self.speak(sender, to_send) => ended,
            ended = self.beats() => ended,
            ended = self.requests() => ended,
        }
    }

    /// An order that does not fit into a frame is dropped: its session would end with it, and the next one again, for ever.
    async fn speak(&self, mut sender: FrameSender, mut to_send: mpsc::Receiver<ToNode>) -> Result<(), TransportError> {
        while let Some(frame) = to_send.recv().await {
            match sender.send(&frame).await {
                Err(TransportError::Frame(error)) => {
                    tracing::error!(node = %self.arguments.node, %error, "an order cannot be sent: report this");
                }
                sent => sent?,
            }
        }
        sender.finish()
    }

    async fn listen(&self, mut receiver: FrameReceiver) -> Result<(), TransportError> {
        let waiting = Arc::new(Semaphore::new(WORDS_WAITING_MAX));
        while let Some(frame) = receiver.recv::<FromNode>().await? {
            let words = match frame {
                FromNode::Report(report) => Words::Report(report),
                FromNode::Progress { id, progress } => Words::Progress { id, progress },
                FromNode::Load { id, load } => Words::Load { id, load },
                FromNode::Timed { id, steps } => Words::Timed { id, steps: steps.0 },
                FromNode::Demand(demands) => Words::Demand(demands.0),
                FromNode::Swept { job, index, removed, error } => Words::Swept(Sweep { job, index, removed, error }),
                FromNode::Surveyed { survey, found } => {
                    let rtt_us = u32::try_from(self.arguments.connection.least_rtt().as_micros()).unwrap_or(u32::MAX);
                    Words::Surveyed { rtt_us, survey, found }
                }
                FromNode::Hello(_) => {
                    self.arguments.connection.close(CloseCode::Malformed, "a session has one Hello");
                    return Ok(());
                }
            };
            let permit = waiting.clone().acquire_owned().await.ok();
            self.cluster(ClusterMessage::Heard { session: self.arguments.session, words, permit });
        }
        Ok(())
    }

    async fn beats(&self) -> Result<(), TransportError> {
        let waiting = Arc::new(Semaphore::new(1));
        loop {
            let heartbeat: Heartbeat = self.arguments.connection.recv_datagram().await?;
            // While the last one was not looked at, another says nothing new.
            let Ok(permit) = waiting.clone().try_acquire_owned() else { continue };
            let (session, words) = (self.arguments.session, Words::Heartbeat(Box::new(heartbeat)));
            self.cluster(ClusterMessage::Heard { session, words, permit: Some(permit) });
        }
    }

    async fn requests(&self) -> Result<(), TransportError> {
        let room = Arc::new(Semaphore::new(REQUESTS_MAX));
        loop {
            let request = self.arguments.connection.accept_request().await?;
            let place = room.clone().acquire_owned().await;
            let desk = Desk {
                session: self.arguments.session,
                node: self.arguments.node,
                cluster: self.arguments.cluster.clone(),
                authority: self.arguments.authority.clone(),
                lifetimes: self.arguments.lifetimes,
                metrics: self.arguments.metrics.clone(),
                artifacts: self.arguments.artifacts.clone(),
            };
            tokio::spawn(async move {
                if let Err(error) = desk.answer(request).await {
                    tracing::debug!(node = %desk.node, %error, "request of a node was not answered");
                }
                drop(place);
            });
        }
    }

    /// A live connection does not outlive the certificate that opened it.
    async fn outlive(&self) {
        let left = self.arguments.connection.peer_expires_at().duration_since(SystemTime::now()).unwrap_or_default();
        tokio::time::sleep(left).await;
        self.arguments
            .connection
            .close(CloseCode::Unauthenticated, "the certificate has expired: connect with a renewed one");
    }

    fn cluster(&self, message: ClusterMessage) {
        if !self.arguments.cluster.send(message) {
            // Without its cluster a session has nobody to speak for; it may have ended itself.
            let _ended = self.myself.send_message(Message::Ended);
        }
    }
}

/// What a node says of itself is journalled and shown to everybody.
fn check_offer(hello: &NodeHello) -> Result<(), String> {
    check_node_name(&hello.name)?;
    let capacity = &hello.capacity;
    check_labels(capacity.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())))?;
    if capacity.gpus.len() > GPUS_MAX {
        return Err(format!("{} accelerators: at most {GPUS_MAX} are taken", capacity.gpus.len()));
    }
    let words = capacity.gpus.iter().map(|gpu| &gpu.name).chain([&capacity.version]);
    match words.into_iter().find(|word| word.len() > WORD_BYTES_MAX || !is_plain(word)) {
        Some(_) => {
            Err(format!("a release or an accelerator has up to {WORD_BYTES_MAX} bytes without control characters"))
        }
        None => Ok(()),
    }
}

/// Answers one request of a node.
struct Desk {
    session: SessionId,
    node: NodeId,
    cluster: ClusterHandle,
    authority: Arc<Authority>,
    lifetimes: Lifetimes,
    metrics: Arc<Metrics>,
    artifacts: Artifacts,
}

impl Desk {
    async fn answer(&self, request: Request) -> Result<(), TransportError> {
        let (question, reply) = request.read::<NodeRequest>().await?;
        let answer = match question {
            NodeRequest::SignRank { id, csr } => {
                self.metrics.requests.with_label_values(&["sign-rank"]).inc();
                let question = Question::SignRank { session: self.session, id };
                match self.cluster.ask(question).await {
                    Some(Answer::Sign(id)) => {
                        let subject = Subject::Rank { job: id.job, generation: id.generation, rank: id.rank };
                        self.metrics.rank_certificates.inc();
                        self.sign(&csr, &subject, self.lifetimes.rank_s)
                    }
                    Some(Answer::Denied(reason)) => NodeReply::Refused { reason },
                    Some(_) | None => NodeReply::Refused { reason: "the coordinator is going down".into() },
                }
            }
            NodeRequest::Renew { csr } => {
                self.metrics.requests.with_label_values(&["renew"]).inc();
                match self.cluster.ask(Question::RenewNode { session: self.session }).await {
                    Some(Answer::Granted) => self.sign(&csr, &Subject::Node(self.node), self.lifetimes.node_s),
                    Some(Answer::Denied(reason)) => NodeReply::Refused { reason },
                    Some(_) | None => NodeReply::Refused { reason: "the coordinator is going down".into() },
                }
            }
            NodeRequest::Artifact { artifact, offset } => {
                self.metrics.requests.with_label_values(&["artifact"]).inc();
                let artifacts = self.artifacts.clone();
                match tokio::task::spawn_blocking(move || artifacts.read(artifact, offset)).await {
                    Ok(Ok((bytes, part))) => NodeReply::ArtifactPart { bytes, part: part.into() },
                    Ok(Err(error)) => NodeReply::Refused { reason: format!("read artifact {artifact}: {error}") },
                    Err(_) => NodeReply::Refused { reason: "the coordinator is going down".into() },
                }
            }
        };
        reply.send(&answer).await
    }

    fn sign(&self, csr: &[u8], subject: &Subject, seconds: u64) -> NodeReply {
        match self.authority.issue(csr, subject, Duration::from_secs(seconds)) {
            Ok(issued) => NodeReply::Certificate { certificate: issued.certificate.into() },
            Err(error) => NodeReply::Refused { reason: error.to_string() },
        }
    }
}
