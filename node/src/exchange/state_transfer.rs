//! The state of a running job, from the ranks that train to one that joins: each gives one shard of it, all at the same step, while they step
//! on. Owns the bytes between ranks; what a shard is made of is the checkpoint's business (`checkpoint/`).
//!
//! X11: no byte of a shard is used before the BLAKE3 of its run was compared, and no state before every shard names the same weights.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use stoke_jobs::{JobError, NamedTensor, Snapshot};
use stoke_protocol::ids::{Digest, Step, Term};
use stoke_protocol::ledger::Ledger;
use stoke_protocol::message::peer::{Opening, StateHeader};
use stoke_protocol::message::rank::RankId;
use stoke_protocol::spec::RANKS_MAX;
use stoke_protocol::transport::{BulkReceiver, BulkSender, TransportError};
use tokio::runtime::Handle;

use super::error::ExchangeError;
use super::form::lost;
use super::mesh::{Incoming, Mesh};
use crate::checkpoint;

/// The longest run of bytes that is taken.
const RUN_BYTES_MAX: u32 = 64 << 20;

/// The state of one member, and which part of it it gives.
pub struct Shard {
    pub term: Term,
    pub step: Step,
    pub index: u32,
    pub count: u32,
    pub loss: f32,
    pub ledger: Ledger,
    pub state: Snapshot,
}

/// The part as numbers.
struct Part {
    weights_blake3: Digest,
    tensors: Vec<NamedTensor>,
}

/// The whole state after `step` steps.
pub struct Received {
    pub step: Step,
    pub loss: f32,
    pub ledger: Ledger,
    pub weights_blake3: Digest,
    pub tensors: Vec<NamedTensor>,
}

impl Mesh {
    /// Sends a shard to the ranks that join, behind the caller's back. One that cannot take it is told of by its own end.
    pub fn give_state(&self, runtime: &Handle, shard: Shard, to: &[RankId]) {
        let to: Vec<_> = to.iter().filter_map(|peer| Some((*peer, self.connection(*peer)?))).collect();
        let Shard { term, step, index, count, loss, ledger, state } = shard;
        // Not on the network thread: hashing would hold packets up.
        runtime.spawn(async move {
            let part = match tokio::task::spawn_blocking(move || part_of(state, index, count)).await {
                Ok(Ok(part)) => Arc::new(part),
                Ok(Err(error)) => return tracing::error!(%error, "the state cannot be given"),
                // It panicked, which was logged, or the process ends.
                Err(_) => return,
            };
            let weights_blake3 = part.weights_blake3;
            for (peer, connection) in to {
                let part = part.clone();
                tokio::spawn(async move {
                    let opening =
                        Opening::State { term, step, shard: index, shards: count, loss, ledger, weights_blake3 };
                    let given = async { give(connection.open_bulk().await?, &opening, &part.tensors).await };
                    match given.await {
                        Ok(()) => tracing::info!(%peer, %step, shard = index, "state given"),
                        Err(error) => tracing::info!(%peer, %error, "state was not taken"),
                    }
                });
            }
        });
    }

    /// Receives the state in a term: every shard, from whoever gives it, side by side. `arrives` is set when every giver has begun: from then on
    /// the state comes, or an error, whatever term this rank enters meanwhile. Before that a newer term stops it for ever.
    pub async fn take_state(&self, term: Term, arrives: &AtomicBool) -> Result<Received, ExchangeError> {
        let mut shards: Vec<Option<(RankId, Vec<NamedTensor>)>> = Vec::new();
        let mut expected: Option<(Step, f32, Ledger, Digest)> = None;
        let mut reading = tokio::task::JoinSet::new();
        let mut begun = 0;
        loop {
            let incoming = tokio::select! {
                incoming = self.next_state(term), if shards.is_empty() || begun < shards.len() => incoming,
                Some(read) = reading.join_next(), if !reading.is_empty() => {
                    let (index, from, tensors): (u32, RankId, Vec<NamedTensor>) =
                        read.map_err(|_| ExchangeError::EndpointClosed)??;
                    shards[index as usize] = Some((from, tensors));
                    match expected {
                        Some((step, loss, ledger, weights_blake3)) if shards.iter().all(Option::is_some) => {
                            let tensors = shards.into_iter().flatten().flat_map(|(_, tensors)| tensors).collect();
                            return Ok(Received { step, loss, ledger, weights_blake3, tensors });
                        }
                        Some(_) | None => continue,
                    }
                }
            };
            let Incoming { from, opening, stream } = incoming;
            let refused = |problem: String| ExchangeError::State { peer: from, problem };
            let Opening::State { step, shard, shards: count, loss, ledger, weights_blake3, .. } = opening else {
                continue;
            };
            if count == 0 || count > RANKS_MAX || shard >= count {
                return Err(refused(format!("shard {shard} of {count}")));
            }
            let (first, ..) = *expected.get_or_insert((step, loss, ledger, weights_blake3));
            if shards.is_empty() {
                shards.resize_with(count as usize, || None);
            }
            if count as usize != shards.len() || step != first {
                return Err(refused(format!(
                    "shard {shard} of {count} at {step}, others give {} at {first}",
                    shards.len()
                )));
            }
            if expected.is_some_and(|(_, _, others, _)| others != ledger) {
                return Err(refused(format!("its samples at {step} are {ledger}, those of others differ")));
            }
            if expected.is_some_and(|(.., others)| others != weights_blake3) {
                return Err(refused(format!("its weights at {step} hash to {weights_blake3}, those of others differ")));
            }
            begun += 1;
            arrives.store(begun == shards.len(), Ordering::Release);
            reading.spawn(read_shard(stream, (shard, from)));
        }
    }
}

fn part_of(state: Snapshot, index: u32, count: u32) -> Result<Part, JobError> {
    let tensors = state.tensors()?;
    let weights_blake3 = Digest(stoke_jobs::weights_blake3(&tensors));
    Ok(Part { weights_blake3, tensors: checkpoint::own_shard(tensors, index, count) })
}

async fn give(mut stream: BulkSender, opening: &Opening, tensors: &[NamedTensor]) -> Result<(), TransportError> {
    stream.write_header(opening).await?;
    let runs = checkpoint::encode(tensors).map_err(|error| TransportError::Endpoint(std::io::Error::other(error)))?;
    for run in runs {
        let header = StateHeader { count: run.len() as u32, blake3: Digest(*blake3::hash(&run).as_bytes()) };
        stream.write_header(&header).await?;
        stream.write_chunk(run.into()).await?;
    }
    stream.finish()
}

async fn read_shard(
    mut stream: BulkReceiver,
    (index, peer): (u32, RankId),
) -> Result<(u32, RankId, Vec<NamedTensor>), ExchangeError> {
    let mut bytes = Vec::new();
    while let Some(StateHeader { count, blake3 }) = stream.read_header().await.map_err(|error| lost(peer, error))? {
        if count > RUN_BYTES_MAX {
            return Err(ExchangeError::State { peer, problem: format!("a run of {count} bytes") });
        }
        let start = bytes.len();
        bytes.resize(start + count as usize, 0);
        stream.read_exact(&mut bytes[start..]).await.map_err(|error| lost(peer, error))?;
        if *blake3::hash(&bytes[start..]).as_bytes() != blake3.0 {
            return Err(ExchangeError::State { peer, problem: format!("the bytes from {start} have another hash") });
        }
    }
    let tensors = checkpoint::decode(&bytes).map_err(|problem| ExchangeError::State { peer, problem })?;
    Ok((index, peer, tensors))
}
