//! The side of a rank that plays where learners connect: reads what they order, one stream each, and writes what was played. Owns the caps; plays nothing.

use std::sync::Arc;

use bytes::Bytes;
use stoke_jobs::rl::Played;
use stoke_protocol::message::peer::{FromPlayer, ToPlayer};
use stoke_protocol::transport::{BulkReceiver, BulkSender, Connection, TransportError};
use tokio::sync::{mpsc, oneshot};

/// Of a lane's state.
pub const STATE_BYTES_MAX: u32 = 64 << 20;
/// Answers of one learner that wait to be written.
const ANSWERS_MAX: usize = 16;

/// A policy as it was told.
pub struct Weights {
    pub version: u64,
    pub values: Vec<f32>,
}

/// A lane that is to be played.
pub struct Part {
    pub lane: u32,
    pub state: Vec<u8>,
    pub weights: Arc<Weights>,
    pub reply: oneshot::Sender<Result<Played, String>>,
}

pub struct Stage {
    pub weights_len: usize,
    pub lanes: u32,
    pub parts: mpsc::Sender<Part>,
}

impl Stage {
    pub async fn receive(self: Arc<Self>, connection: Connection) {
        let peer = connection.peer().to_string();
        let served = async {
            let sender = connection.open_bulk().await?;
            let receiver = connection.accept_bulk().await?;
            let (answers, to_write) = mpsc::channel(ANSWERS_MAX);
            let writing = tokio::spawn(write(sender, to_write));
            let read = self.read(receiver, answers).await;
            writing.abort();
            read
        };
        match served.await {
            Ok(()) => tracing::debug!(%peer, "a learner has left"),
            Err(error) => tracing::info!(%peer, %error, "a learner is gone"),
        }
    }

    async fn read(
        &self,
        mut receiver: BulkReceiver,
        answers: mpsc::Sender<(u64, oneshot::Receiver<Result<Played, String>>)>,
    ) -> Result<(), TransportError> {
        let mut weights: Option<Arc<Weights>> = None;
        while let Some(order) = receiver.read_header::<ToPlayer>().await? {
            match order {
                ToPlayer::Weights { version, count } if count as usize == self.weights_len => {
                    let mut bytes = vec![0; count as usize * 4];
                    receiver.read_exact(&mut bytes).await?;
                    let (numbers, _) = bytes.as_chunks::<4>();
                    let values = numbers.iter().map(|number| f32::from_le_bytes(*number)).collect();
                    weights = Some(Arc::new(Weights { version, values }));
                }
                ToPlayer::Play { order, lane, bytes } if bytes <= STATE_BYTES_MAX && lane < self.lanes => {
                    let mut state = vec![0; bytes as usize];
                    receiver.read_exact(&mut state).await?;
                    let Some(weights) = weights.clone() else { return Err(TransportError::Ended) };
                    let (reply, played) = oneshot::channel();
                    let part = Part { lane, state, weights, reply };
                    let told = self.parts.send(part).await.is_ok() && answers.send((order, played)).await.is_ok();
                    if !told {
                        return Ok(());
                    }
                }
                ToPlayer::Weights { .. } | ToPlayer::Play { .. } => {
                    receiver.stop(stoke_protocol::transport::CloseCode::Malformed);
                    return Err(TransportError::Ended);
                }
            }
        }
        Ok(())
    }
}

async fn write(
    mut sender: BulkSender,
    mut answers: mpsc::Receiver<(u64, oneshot::Receiver<Result<Played, String>>)>,
) -> Result<(), TransportError> {
    while let Some((order, played)) = answers.recv().await {
        let Ok(played) = played.await else { return Ok(()) };
        match played {
            Ok(Played { trajectory, after, failures }) => {
                let bytes = trajectory.encode();
                let header =
                    FromPlayer::Played { order, trajectory: bytes.len() as u32, state: after.len() as u32, failures };
                sender.write_header(&header).await?;
                sender.write_chunks(&mut [Bytes::from(bytes), Bytes::from(after)]).await?;
            }
            Err(error) => {
                let error = error.chars().take(200).collect();
                sender.write_header(&FromPlayer::Failed { order, error }).await?;
            }
        }
    }
    Ok(())
}
