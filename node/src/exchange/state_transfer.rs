//! The state of a running job, from the ranks that train to one that joins: each gives one shard of it, all at the same step, while they step
//! on. And that of a checkpoint between ranks that begin with it: each gives what it has read. Owns the bytes between ranks; what a shard is made of is the checkpoint's business (`checkpoint/`).
//!
//! X11: no byte of a shard is used before the BLAKE3 of its run was compared, and no state before every shard names the same weights.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use stoke_jobs::{JobError, NamedTensor, Snapshot};
use stoke_protocol::ids::{Digest, Step, Term};
use stoke_protocol::ledger::Ledger;
use stoke_protocol::message::peer::{Opening, StateHeader};
use stoke_protocol::message::rank::RankId;
use stoke_protocol::spec::RANKS_MAX;
use stoke_protocol::transport::{BulkReceiver, BulkSender, Connection, TransportError};
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
    pub of: StateOf,
    pub index: u32,
    pub state: Snapshot,
}

/// What every shard says of the state that it is a part of.
#[derive(Clone, Copy, Debug)]
pub struct StateOf {
    pub step: Step,
    pub shards: u32,
    pub loss: f32,
    pub ledger: Ledger,
    /// Of the whole state; a shard of a snapshot finds it out itself.
    pub weights_blake3: Digest,
}

/// The whole state.
pub struct Received {
    pub of: StateOf,
    pub tensors: Vec<NamedTensor>,
}

impl StateOf {
    fn opening(self, term: Term, shard: u32) -> Opening {
        let Self { step, shards, loss, ledger, weights_blake3 } = self;
        Opening::State { term, step, shard, shards, loss, ledger, weights_blake3 }
    }

    /// What is wrong with a shard of another state.
    fn mismatch(&self, other: &Self) -> Option<String> {
        let Self { step, shards, ledger, weights_blake3, .. } = *other;
        if (step, shards) != (self.step, self.shards) {
            return Some(format!("one of {shards} at {step}, others give {} at {}", self.shards, self.step));
        }
        if ledger != self.ledger {
            return Some(format!("its samples at {step} are {ledger}, those of others differ"));
        }
        let differs = weights_blake3 != self.weights_blake3;
        differs.then(|| format!("its weights at {step} hash to {weights_blake3}, those of others differ"))
    }
}

impl Mesh {
    /// Sends a shard to ranks that lack the state, behind the caller's back. One that cannot take it is told of by its own end.
    pub fn give_state(&self, runtime: &Handle, shard: Shard, to: &[RankId]) {
        let to = self.connections(to);
        let Shard { term, mut of, index, state } = shard;
        // Not on the network thread: hashing would hold packets up.
        runtime.spawn(async move {
            let part = tokio::task::spawn_blocking(move || {
                let tensors = state.tensors()?;
                of.weights_blake3 = Digest(stoke_jobs::weights_blake3(&tensors));
                Ok::<_, JobError>((of, checkpoint::own_shard(tensors, index, of.shards)))
            });
            match part.await {
                Ok(Ok((of, tensors))) => give_all(of.opening(term, index), tensors.into(), to),
                Ok(Err(error)) => tracing::error!(%error, "the state cannot be given"),
                // It panicked, which was logged, or the process ends.
                Err(_) => {}
            }
        });
    }

    /// Sends a shard of the checkpoint that all begin with.
    pub fn give_shard(
        &self,
        runtime: &Handle,
        (term, of, index): (Term, StateOf, u32),
        tensors: Arc<[NamedTensor]>,
        to: &[RankId],
    ) {
        let to = self.connections(to);
        runtime.spawn(async move { give_all(of.opening(term, index), tensors, to) });
    }

    fn connections(&self, to: &[RankId]) -> Vec<(RankId, Connection)> {
        to.iter().filter_map(|peer| Some((*peer, self.connection(*peer)?))).collect()
    }

    /// Receives the state in a term: every shard, from whoever gives it, side by side. `arrives` is set when every giver has begun: from then on
    /// the state comes, or an error, whatever term this rank enters meanwhile. Before that a newer term stops it for ever.
    pub async fn take_state(&self, term: Term, arrives: &AtomicBool) -> Result<Received, ExchangeError> {
        self.take(term, arrives, Taking::default()).await
    }

    /// Receives parts of a state from members of a generation of `world`, by their places, whoever knows how far they are: one part of each.
    pub async fn take_parts(&self, term: Term, world: u32, givers: BTreeSet<u32>) -> Result<Received, ExchangeError> {
        let taking = Taking { givers: Some((world, givers)), ..Taking::default() };
        self.take(term, &AtomicBool::default(), taking).await
    }

    /// Receives the shards of a known state that are not in `own`.
    pub async fn take_shards(&self, term: Term, of: StateOf, own: &[u32]) -> Result<Vec<NamedTensor>, ExchangeError> {
        let mut taking = Taking::of(of);
        for shard in own {
            taking.shards[*shard as usize] = Some(Vec::new());
            taking.awaited.remove(shard);
        }
        Ok(self.take(term, &AtomicBool::default(), taking).await?.tensors)
    }

    async fn take(&self, term: Term, arrives: &AtomicBool, mut taking: Taking) -> Result<Received, ExchangeError> {
        let mut reading = tokio::task::JoinSet::new();
        loop {
            if let Some(of) = taking.of.filter(|_| taking.shards.iter().all(Option::is_some)) {
                let tensors = taking.shards.into_iter().flatten().flatten().collect();
                return Ok(Received { of, tensors });
            }
            let Incoming { from, opening, stream } = tokio::select! {
                incoming = self.next_state(term), if !taking.all_begun() => incoming,
                Some(read) = reading.join_next(), if !reading.is_empty() => {
                    let (index, tensors): (u32, Vec<NamedTensor>) = read.map_err(|_| ExchangeError::EndpointClosed)??;
                    taking.shards[index as usize] = Some(tensors);
                    continue;
                }
            };
            let Opening::State { step, shard, shards, loss, ledger, weights_blake3, .. } = opening else { continue };
            let of = StateOf { step, shards, loss, ledger, weights_blake3 };
            taking.begin(shard, of).map_err(|problem| ExchangeError::State { peer: from, problem })?;
            arrives.store(taking.all_begun(), Ordering::Release);
            reading.spawn(async move { Ok::<_, ExchangeError>((shard, read_shard(stream, from).await?)) });
        }
    }
}

/// What has arrived of a state.
#[derive(Default)]
struct Taking {
    of: Option<StateOf>,
    shards: Vec<Option<Vec<NamedTensor>>>,
    /// Shards that nobody has begun to give.
    awaited: BTreeSet<u32>,
    /// Before the first has: of how many there are which, if not all.
    givers: Option<(u32, BTreeSet<u32>)>,
}

impl Taking {
    fn of(of: StateOf) -> Self {
        let shards = (0..of.shards).map(|_| None).collect();
        Self { of: Some(of), shards, awaited: (0..of.shards).collect(), givers: None }
    }

    /// A shard is about to arrive; the first one says what the others are of.
    fn begin(&mut self, shard: u32, of: StateOf) -> Result<(), String> {
        if of.shards == 0 || of.shards > RANKS_MAX || shard >= of.shards {
            return Err(format!("shard {shard} of {}", of.shards));
        }
        if self.of.is_none() {
            let givers = self.givers.take();
            *self = Self::of(of);
            if let Some((world, givers)) = givers {
                if world != of.shards {
                    return Err(format!("shard {shard} of {}, and there are {world} members", of.shards));
                }
                self.awaited = givers;
                let others = (0..world).filter(|place| !self.awaited.contains(place));
                others.for_each(|place| self.shards[place as usize] = Some(Vec::new()));
            }
        }
        if let Some(problem) = self.of.and_then(|expected| expected.mismatch(&of)) {
            return Err(format!("shard {shard}: {problem}"));
        }
        if self.awaited.remove(&shard) {
            Ok(())
        } else {
            Err(format!("shard {shard} of {}, which is not awaited", of.shards))
        }
    }

    fn all_begun(&self) -> bool {
        self.of.is_some() && self.awaited.is_empty()
    }
}

fn give_all(opening: Opening, tensors: Arc<[NamedTensor]>, to: Vec<(RankId, Connection)>) {
    for (peer, connection) in to {
        let (opening, tensors) = (opening.clone(), tensors.clone());
        tokio::spawn(async move {
            let given = async { give(connection.open_bulk().await?, &opening, &tensors).await };
            match given.await {
                Ok(()) => tracing::info!(%peer, "a shard of the state given"),
                Err(error) => tracing::info!(%peer, %error, "a shard of the state was not taken"),
            }
        });
    }
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

async fn read_shard(mut stream: BulkReceiver, peer: RankId) -> Result<Vec<NamedTensor>, ExchangeError> {
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
    checkpoint::decode(&bytes).map_err(|problem| ExchangeError::State { peer, problem })
}
