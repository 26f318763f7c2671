//! The side of a rank that plays where others connect: reads what learners order, one stream each, and writes what was played. Owns the caps; plays nothing.

use std::sync::Arc;

use bytes::Bytes;
use stoke_jobs::rl::Played;
use stoke_protocol::identity::Subject;
use stoke_protocol::message::peer::{FromPlayer, ToPlayer, WeightsId};
use stoke_protocol::transport::{BulkReceiver, BulkSender, CloseCode, Connection, TransportError};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::feed::{Feed, Weights};

/// Of a lane's state.
pub const STATE_BYTES_MAX: u32 = 64 << 20;
/// Orders of one learner whose answers are not written yet; more wait in their stream.
const ORDERS_MAX: usize = 16;
/// Ranks that weights are passed on to, by one learner's word.
const CHILDREN_MAX: usize = 16;

/// A lane that is to be played.
pub struct Part {
    pub lane: u32,
    pub state: Vec<u8>,
    pub weights: Arc<Weights>,
    pub reply: Reply,
}

/// Where the answer to an order goes. There is room for it.
pub struct Reply {
    order: u64,
    room: mpsc::OwnedPermit<Answer>,
}

impl Reply {
    pub fn played(self, played: Result<Played, String>) {
        let order = self.order;
        self.room.send(match played {
            Ok(played) => Answer::Played(order, Box::new(played)),
            Err(error) => Answer::Other(FromPlayer::Failed { order, error: error.chars().take(200).collect() }),
        });
    }

    fn wanting(self) {
        let order = self.order;
        self.room.send(Answer::Other(FromPlayer::Wanting { order }));
    }
}

enum Answer {
    Played(u64, Box<Played>),
    Other(FromPlayer),
}

/// Who is connected.
#[derive(Clone, Copy)]
struct Peer {
    learns: bool,
    connection: u64,
}

pub struct Stage {
    pub lanes: u32,
    pub feed: Arc<Feed>,
    pub parts: mpsc::Sender<Part>,
}

impl Stage {
    pub async fn receive(self: Arc<Self>, connection: Connection) {
        let peer = connection.peer().to_string();
        let Subject::Rank { rank, .. } = connection.peer().subject else { return };
        let from = Peer { learns: !rank.is_rollout(), connection: self.feed.connected() };
        let served = async {
            let sender = connection.open_bulk().await?;
            let receiver = connection.accept_bulk().await?;
            let (answers, to_write) = mpsc::channel(ORDERS_MAX);
            let mut beside = JoinSet::new();
            beside.spawn(write(sender, to_write));
            if from.learns {
                beside.spawn(tell_of_weights(self.feed.clone(), answers.clone()));
            }
            self.read(receiver, from, answers).await
        };
        let served = served.await;
        self.feed.pass_on(from.connection, &[]);
        match served {
            Ok(()) => tracing::debug!(%peer, "a learner has left"),
            Err(error) => tracing::info!(%peer, %error, "a learner is gone"),
        }
    }

    async fn read(
        &self,
        mut receiver: BulkReceiver,
        from: Peer,
        answers: mpsc::Sender<Answer>,
    ) -> Result<(), TransportError> {
        while let Some(order) = receiver.read_header::<ToPlayer>().await? {
            match order {
                ToPlayer::Weights { id, count } => self.feed.receive(&mut receiver, (id, count)).await?,
                ToPlayer::Play { order, lane, weights, bytes } if bytes <= STATE_BYTES_MAX && lane < self.lanes => {
                    let mut state = vec![0; bytes as usize];
                    receiver.read_exact(&mut state).await?;
                    let Ok(room) = answers.clone().reserve_owned().await else { return Ok(()) };
                    let reply = Reply { order, room };
                    tokio::spawn(enter(self.feed.clone(), self.parts.clone(), (lane, state, weights), reply));
                }
                ToPlayer::PassOn { players } if players.len() <= CHILDREN_MAX && from.learns => {
                    self.feed.pass_on(from.connection, &players);
                }
                ToPlayer::Play { .. } | ToPlayer::PassOn { .. } => {
                    receiver.stop(CloseCode::Malformed);
                    return Err(TransportError::Ended);
                }
            }
        }
        Ok(())
    }
}

/// A lane may be played when its weights are here.
async fn enter(
    feed: Arc<Feed>,
    parts: mpsc::Sender<Part>,
    (lane, state, weights): (u32, Vec<u8>, WeightsId),
    reply: Reply,
) {
    match feed.weights(weights).await {
        // A rank that has ended plays nothing.
        Some(weights) => drop(parts.send(Part { lane, state, weights, reply }).await),
        None => reply.wanting(),
    }
}

/// A learner hears of all weights that are whole.
async fn tell_of_weights(feed: Arc<Feed>, answers: mpsc::Sender<Answer>) -> Result<(), TransportError> {
    let mut told = None;
    loop {
        let id = feed.newest(told).await;
        answers.send(Answer::Other(FromPlayer::Loaded { id })).await.map_err(|_| TransportError::Ended)?;
        told = Some(id);
    }
}

async fn write(mut sender: BulkSender, mut answers: mpsc::Receiver<Answer>) -> Result<(), TransportError> {
    while let Some(answer) = answers.recv().await {
        match answer {
            Answer::Played(order, played) => {
                let Played { trajectory, after, failures, strays } = *played;
                let bytes = trajectory.encode();
                let (trajectory, state) = (bytes.len() as u32, after.len() as u32);
                let header = FromPlayer::Played { order, trajectory, state, failures, strays };
                sender.write_header(&header).await?;
                sender.write_chunks(&mut [Bytes::from(bytes), Bytes::from(after)]).await?;
            }
            Answer::Other(header) => sender.write_header(&header).await?,
        }
    }
    Ok(())
}
