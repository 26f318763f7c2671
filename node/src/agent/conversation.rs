//! One connection while it lives: frames each way, heartbeats on their own timer, log reads, renewal of the certificate. Ends with the first
//! of them that fails; never dials.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use ractor::ActorRef;
use stoke_protocol::identity::KeyRequest;
use stoke_protocol::ids::LogIndex;
use stoke_protocol::message::node::{FromNode, Heartbeat, NodeReply, NodeRequest, ReadLog, ToNode};
use stoke_protocol::message::rank::RankId;
use stoke_protocol::transport::{Connection, FrameReceiver, FrameSender, Request, TransportError};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::actor::Message;
use super::log::LogBook;
use super::session::SessionArguments;
use super::state::Signed;
use crate::gateway::Watch;
use crate::probe::Usage;

/// A coordinator that speaks of something else.
const NO_ANSWER: &str = "the answer is to another question";
/// Frames of the coordinator that may wait in the agent's mailbox.
const FRAMES_MAX: usize = 256;
/// Between two words of what the gateway could not bring to a head.
const DEMAND_EVERY: Duration = Duration::from_secs(1);
/// Log reads at a time; each followed log holds a thread.
const LOG_READS_MAX: usize = 32;
/// A signature takes a millisecond; a coordinator that needs longer is going away.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Before a signing request without an answer is made again.
pub(super) const SIGN_AGAIN: Duration = Duration::from_secs(1);
/// Before a renewal that failed is tried again; a third of the certificate's life is left for that.
const RENEW_AGAIN: Duration = Duration::from_secs(30);
/// Between two renewals at least: certificates start in the past (clock tolerance), so that short ones are due when they are made.
const RENEW_GAP: Duration = Duration::from_secs(10);
/// A sleep until a time of day is cut, because clocks are set and machines are suspended.
const RENEW_LOOK: Duration = Duration::from_secs(60);

pub struct Conversation {
    pub session: u64,
    pub connection: Connection,
    pub agent: ActorRef<Message>,
    pub arguments: SessionArguments,
    pub heartbeat: Duration,
    pub awake: Awake,
}

/// Notes that this agent runs. One that was stopped for longer than its lease (SIGSTOP, a suspended machine) was given up by the coordinator
/// meanwhile: it must not obey what still waits in its buffers, a start of a job that was cancelled since, say (I4, I10).
pub struct Awake {
    lease: Duration,
    began: Instant,
    seen_ms: AtomicU64,
}

impl Awake {
    pub fn new(lease: Duration) -> Self {
        Self { lease, began: Instant::now(), seen_ms: AtomicU64::new(0) }
    }

    fn note(&self) -> Result<(), TransportError> {
        let now_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let before_ms = self.seen_ms.swap(now_ms, Ordering::Relaxed);
        if Duration::from_millis(now_ms.saturating_sub(before_ms)) > self.lease {
            return Err(TransportError::Deadline { what: "this agent was stopped", after: self.lease });
        }
        Ok(())
    }
}

/// Returns why the session is over.
pub async fn keep_up(
    talk: Conversation,
    sender: FrameSender,
    receiver: FrameReceiver,
    queue: mpsc::Receiver<FromNode>,
) -> String {
    let ended = tokio::select! {
        biased;
        ended = read(&talk, receiver) => ended,
        ended = write(&talk, sender, queue) => ended,
        ended = beat(&talk) => ended,
        ended = serve(&talk) => ended,
        () = renew(&talk) => return "renewal ended".to_owned(),
    };
    // The connection knows better than the stream why it ended.
    match (talk.connection.close_reason(), ended) {
        (Some(closed), _) => closed.to_string(),
        (None, Err(error)) => error.to_string(),
        (None, Ok(())) => "the coordinator ended the session".to_owned(),
    }
}

async fn read(talk: &Conversation, mut receiver: FrameReceiver) -> Result<(), TransportError> {
    let room = Arc::new(Semaphore::new(FRAMES_MAX));
    while let Some(frame) = receiver.recv::<ToNode>().await? {
        talk.awake.note()?;
        let place = room.clone().acquire_owned().await.ok();
        let _ = talk.agent.cast(Message::Frame { session: talk.session, frame, place });
    }
    Ok(())
}

async fn write(
    talk: &Conversation,
    mut sender: FrameSender,
    mut queue: mpsc::Receiver<FromNode>,
) -> Result<(), TransportError> {
    let mut ticks = interval(DEMAND_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = false;
    loop {
        let frame = tokio::select! {
            biased;
            frame = queue.recv() => match frame {
                Some(frame) => frame,
                None => return sender.finish(),
            },
            _ = ticks.tick() => {
                let demand = talk.arguments.gateway.as_ref().map(Watch::demand).unwrap_or_default();
                // That there is none any more is news once.
                if std::mem::replace(&mut told, !demand.is_empty()) || told {
                    FromNode::Demand(demand.into())
                } else {
                    continue;
                }
            }
        };
        sender.send(&frame).await?;
    }
}

async fn beat(talk: &Conversation) -> Result<(), TransportError> {
    let mut usage = talk.arguments.measure.then(Usage::new);
    let mut ticks = interval(talk.heartbeat);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for sequence in 1.. {
        ticks.tick().await;
        talk.awake.note()?;
        let (cpu_used, memory_used_bytes) = usage.as_mut().map_or((0.0, 0), Usage::read);
        let heat = usage.as_ref().map(Usage::heat).unwrap_or_default();
        let incarnation = talk.arguments.incarnation;
        let (routes, leaving) = talk.arguments.gateway.as_ref().map_or((LogIndex(0), 0), Watch::leaving);
        let heartbeat = Heartbeat { incarnation, sequence, cpu_used, memory_used_bytes, routes, leaving, heat };
        match talk.connection.send_datagram(&heartbeat) {
            // The path's packets may shrink for a moment; the next one makes up for it.
            Ok(()) | Err(TransportError::DatagramTooLarge { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    unreachable!("heartbeats have no last number")
}

async fn serve(talk: &Conversation) -> Result<(), TransportError> {
    let room = Arc::new(Semaphore::new(LOG_READS_MAX));
    loop {
        let request = talk.connection.accept_request().await?;
        // Dropping a request resets its stream: the asker is told, and may try again.
        let Ok(place) = room.clone().try_acquire_owned() else { continue };
        let logs = talk.arguments.logs.clone();
        tokio::spawn(async move {
            if let Err(error) = answer(request, &logs).await {
                tracing::debug!(%error, "log was not read to its end");
            }
            drop(place);
        });
    }
}

async fn answer(request: Request, logs: &LogBook) -> Result<(), TransportError> {
    let (question, reply) = request.read::<ReadLog>().await?;
    let (mut sender, mut chunks) = (reply.into_frames(), logs.read(question));
    loop {
        let chunk = tokio::select! {
            biased;
            chunk = chunks.recv() => chunk,
            () = sender.stopped() => return Ok(()),
        };
        let Some(chunk) = chunk else { return sender.finish() };
        sender.send(&chunk).await?;
    }
}

/// Asks for a rank's certificate.
pub(super) async fn sign(connection: &Connection, id: RankId, csr: Vec<u8>, authority: Vec<u8>) -> Signed {
    let request = NodeRequest::SignRank { id, csr: csr.into() };
    match connection.request(&request, ANSWER_MAX).await {
        Ok(NodeReply::Certificate { certificate }) => Signed::Certificate { certificate: certificate.0, authority },
        Ok(NodeReply::Refused { reason }) => {
            tracing::warn!(rank = %id, %reason, "the coordinator refused a certificate");
            Signed::Refused { reason }
        }
        Ok(NodeReply::ArtifactPart { .. }) => Signed::Refused { reason: NO_ANSWER.into() },
        Err(error) => {
            tracing::debug!(rank = %id, %error, "no certificate yet");
            Signed::Lost
        }
    }
}

/// Renews the node's certificate at two thirds of its life, for as long as the connection lives.
async fn renew(talk: &Conversation) {
    loop {
        let due = talk.arguments.credentials.renew_at();
        while let Ok(left) = due.duration_since(SystemTime::now()) {
            sleep(left.min(RENEW_LOOK)).await;
        }
        match renew_once(talk).await {
            Ok(()) => sleep(RENEW_GAP).await,
            Err(error) => {
                tracing::warn!(%error, "certificate of this node was not renewed, trying again");
                sleep(RENEW_AGAIN).await;
            }
        }
    }
}

async fn renew_once(talk: &Conversation) -> Result<(), String> {
    let credentials = &talk.arguments.credentials;
    let key = KeyRequest::new().map_err(|error| error.to_string())?;
    let request = NodeRequest::Renew { csr: key.csr().to_vec().into() };
    match talk.connection.request(&request, ANSWER_MAX).await {
        Ok(NodeReply::Certificate { certificate }) => {
            credentials.renew(key, &certificate).map_err(|error| error.to_string())?;
            credentials.save(&talk.arguments.identity_dir).map_err(|error| error.to_string())?;
            tracing::info!("certificate of this node was renewed");
            Ok(())
        }
        Ok(NodeReply::Refused { reason }) => Err(reason),
        Ok(NodeReply::ArtifactPart { .. }) => Err(NO_ANSWER.into()),
        Err(error) => Err(error.to_string()),
    }
}
