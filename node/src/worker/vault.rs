//! Checkpoints of one rank, written behind the trainer's back by a thread of their own. Owns what was handed over until it is durable; decides
//! neither when a checkpoint is taken (the trainer) nor when it is visible (the coordinator).
//!
//! V1: what is written is the state of before the next step: the trainer hands over a snapshot that no later step can touch, and the vault turns
//!     it into numbers, hashes and writes it while training goes on.
//! V2: checkpoints are written in the order of their steps, at most [`COPIES_MAX`] wait; then the trainer does.
//! V3: a checkpoint that cannot be written is dropped with a warning and training goes on, but for the last one, which is tried for longer where
//!   its store may come back. What was written of one that will not be is removed: it must not fill the disk that the next one needs.
//! V4: of a checkpoint that is committed nothing is removed here but whole older ones, by `Committed`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;
use std::time::Duration;

use stoke_jobs::{NamedTensor, Snapshot};
use stoke_protocol::ids::{ClusterId, Digest, Fingerprint, Generation, Step};
use stoke_protocol::ledger::Ledger;
use stoke_protocol::message::rank::{RankEvent, ShardRecord, StartRank};
use stoke_protocol::spec::JobSpec;

use super::failure::text_of;
use crate::checkpoint::{self, CheckpointError, FORMAT, Folder, Manifest, ShardMemory};

/// One is written while the trainer hands over the next: two states in memory beside the one that is trained.
const COPIES_MAX: usize = 1;

/// Checkpoints that are remembered as abandoned while none is committed. One that is forgotten leaves at most a shard behind.
const ABANDONED_MAX: usize = 64;

/// What the vault is told.
pub enum Order {
    Store(Box<Copy>),
    /// Held-out metrics, for the manifest of the last step.
    Metrics(BTreeMap<String, f64>),
    Commit {
        generation: Generation,
        step: Step,
        shards: Vec<ShardRecord>,
    },
    Committed {
        step: Step,
        /// Names of the folders that stay.
        keep: Vec<String>,
    },
    /// The checkpoint will not be: another member could not store its part.
    Abandon {
        generation: Generation,
        step: Step,
    },
    /// Answered when everything before it is done.
    Flush(SyncSender<()>),
}

/// The state after `step` steps, and which part of it a rank writes.
pub struct Copy {
    pub generation: Generation,
    pub step: Step,
    /// Which shard of how many.
    pub index: u32,
    pub world: u32,
    pub loss: f32,
    pub ledger: Ledger,
    pub state: Snapshot,
    /// The parameters of which this rank keeps the optimizer's state, and writes both, by place in the layout; none: the state is whole, and cut evenly.
    pub own: Option<Vec<usize>>,
    pub last: bool,
}

/// What the vault says.
#[derive(Debug)]
pub enum Told {
    Event(RankEvent),
    /// The last checkpoint could not be written, so that the job cannot end well.
    Failed(String),
}

/// The way to the vault's thread.
#[derive(Clone)]
pub struct Vault {
    orders: Sender<Order>,
    room: SyncSender<()>,
}

/// What all checkpoints of a rank have in common.
pub struct Subject {
    pub cluster: ClusterId,
    pub start: StartRank,
    pub spec: JobSpec,
    /// Of this job on this node, if shards are kept there.
    pub memory: Option<ShardMemory>,
}

impl Vault {
    /// Starts the thread. It ends when the last handle is dropped.
    pub fn start(subject: Subject, tell: impl Fn(Told) + Send + 'static) -> std::io::Result<Self> {
        let (orders, queue) = channel();
        let (room, taken) = sync_channel(COPIES_MAX);
        let keeper = Keeper {
            subject,
            tell,
            written: BTreeMap::new(),
            abandoned: BTreeSet::new(),
            committed: None,
            metrics: None,
            waiting: None,
        };
        thread::Builder::new().name("vault".to_owned()).spawn(move || keeper.run(&queue, &taken))?;
        Ok(Self { orders, room })
    }

    /// Hands a copy over; waits while the one before it is being written (V2).
    pub fn store(&self, copy: Copy) {
        // A vault that is gone was told to end: the copy is not wanted any more.
        if self.room.send(()).is_ok() {
            self.tell(Order::Store(Box::new(copy)));
        }
    }

    /// Waits until everything that was ordered is done, at most for `longest`.
    pub fn flush(&self, longest: Duration) {
        let (done, flushed) = sync_channel(1);
        self.tell(Order::Flush(done));
        let _ = flushed.recv_timeout(longest);
    }

    /// Never waits.
    pub fn tell(&self, order: Order) {
        let _ = self.orders.send(order);
    }
}

/// A shard that is durable, with what the manifest says of its checkpoint.
struct Written {
    world: u32,
    index: u32,
    loss: f32,
    ledger: Ledger,
    /// The first member's.
    weights_blake3: Option<Digest>,
    last: bool,
}

struct Keeper<F> {
    subject: Subject,
    tell: F,
    written: BTreeMap<(Step, Generation), Written>,
    /// Checkpoints that will not be, newer than the last that was committed: their copies may still wait here.
    abandoned: BTreeSet<(Step, Generation)>,
    /// The newest that is visible.
    committed: Option<Step>,
    metrics: Option<BTreeMap<String, f64>>,
    /// The order to commit the last checkpoint, while its metrics are being made.
    waiting: Option<(Generation, Step, Vec<ShardRecord>)>,
}

impl<F: Fn(Told)> Keeper<F> {
    fn run(mut self, orders: &Receiver<Order>, taken: &Receiver<()>) {
        for order in orders {
            match order {
                Order::Store(copy) => {
                    self.store(*copy);
                    let _ = taken.recv();
                }
                Order::Metrics(metrics) => {
                    self.metrics = Some(metrics);
                    if let Some((generation, step, shards)) = self.waiting.take() {
                        self.commit(generation, step, shards);
                    }
                }
                Order::Commit { generation, step, shards } => self.commit(generation, step, shards),
                Order::Committed { step, keep } => self.committed(step, &keep),
                Order::Abandon { generation, step } => self.abandon(generation, step),
                Order::Flush(done) => drop(done.try_send(())),
            }
        }
    }

    fn folder(&self, generation: Generation, step: Step) -> Result<Folder, CheckpointError> {
        let name = checkpoint::folder_name(step, generation);
        Folder::at(&format!("{}/{name}", self.subject.start.checkpoints))
    }

    fn store(&mut self, copy: Copy) {
        let Copy { generation, step, index, world, loss, ledger, state, own, last } = copy;
        if !last && self.abandoned.contains(&(step, generation)) {
            return tracing::info!(%step, "not stored: another member could not store its part");
        }
        let stored = self.folder(generation, step).and_then(|folder| {
            let own_part = own.map(|places| state.clone().part(&places, index == 0).tensors());
            // What members have in common.
            let tensors = if own_part.is_some() { state.weights() } else { state.tensors() };
            let tensors = tensors.map_err(CheckpointError::State)?;
            // Only the first member writes a manifest.
            let weights_blake3 = (index == 0).then(|| Digest(stoke_jobs::weights_blake3(&tensors)));
            let state = Fingerprint(stoke_jobs::fingerprint(&tensors));
            let own = own_part.unwrap_or_else(|| Ok(checkpoint::own_shard(tensors, index, world)));
            let own = own.map_err(CheckpointError::State)?;
            let write = || {
                let write = || checkpoint::write_shard(&folder, index, world, &own);
                let stored = match write() {
                    Err(CheckpointError::Full { .. }) if self.makes_room(generation) => write(),
                    stored => stored,
                };
                if stored.is_err() {
                    let _ = checkpoint::abandon(&folder, index, world);
                }
                stored
            };
            let stored = if last { checkpoint::patiently(write) } else { write() };
            Ok((stored?, weights_blake3, state, own))
        });
        match stored {
            Ok((shard, weights_blake3, state, own)) => {
                let written = Written { world, index, loss, ledger, weights_blake3, last };
                self.written.insert((step, generation), written);
                tracing::info!(%step, %generation, bytes = shard.bytes, "shard stored");
                (self.tell)(Told::Event(RankEvent::ShardStored { generation, step, shard: shard.clone(), state }));
                self.remember(step, shard, &own);
            }
            Err(error) => self.failed(generation, step, last, &error),
        }
    }

    /// After it was told: nobody waits for this.
    fn remember(&self, step: Step, shard: ShardRecord, tensors: &[NamedTensor]) {
        let Some(memory) = &self.subject.memory else { return };
        if let Err(error) = memory.keep(step, &shard.into(), tensors) {
            tracing::debug!(%step, %error, "the shard is not kept in memory");
        }
    }

    fn commit(&mut self, generation: Generation, step: Step, shards: Vec<ShardRecord>) {
        let written = self.written.get(&(step, generation));
        let Some((written, weights_blake3)) = written.and_then(|written| Some((written, written.weights_blake3?)))
        else {
            return tracing::warn!(%step, %generation, "told to commit a checkpoint that is not here");
        };
        if written.last && self.metrics.is_none() {
            self.waiting = Some((generation, step, shards));
            return;
        }
        let last = written.last;
        let write = || self.write_manifest((generation, step), weights_blake3, shards.clone());
        match if last { checkpoint::patiently(write) } else { write() } {
            Ok(event) => (self.tell)(Told::Event(event)),
            Err(error) => self.failed(generation, step, last, &error),
        }
    }

    fn write_manifest(
        &self,
        (generation, step): (Generation, Step),
        weights_blake3: Digest,
        shards: Vec<ShardRecord>,
    ) -> Result<RankEvent, CheckpointError> {
        let Subject { cluster, start, spec, .. } = &self.subject;
        let written = &self.written[&(step, generation)];
        let manifest = Manifest {
            format: FORMAT.to_owned(),
            cluster: *cluster,
            job: start.id.job,
            name: spec.name.clone(),
            trainer: spec.trainer.clone(),
            generation,
            step,
            cursor: step.0 * spec.training().samples_a_step(),
            world: written.world,
            lanes: spec.training().lanes,
            seed: spec.training().seed,
            spec: start.spec.clone(),
            shards: shards.into_iter().map(Into::into).collect(),
            ledger: Some(written.ledger),
            loss: written.loss.is_finite().then_some(written.loss),
            weights_blake3,
            metrics: if written.last { self.metrics.clone().unwrap_or_default() } else { BTreeMap::new() },
        };
        let folder = self.folder(generation, step)?;
        let manifest_blake3 = checkpoint::write_manifest(&folder, &manifest)?;
        Ok(RankEvent::ManifestStored { generation, step, uri: folder.uri().to_owned(), manifest_blake3 })
    }

    /// Old checkpoints go; so do those that were begun before this one and never got their manifest. Only the first member of the generation
    /// that committed removes.
    fn committed(&mut self, step: Step, keep: &[String]) {
        let newest = self.written.iter().rfind(|((written, _), _)| *written == step);
        let first = newest.filter(|(_, written)| written.index == 0).map(|((_, generation), _)| *generation);
        self.written.retain(|(written, _), _| *written >= step);
        self.abandoned.retain(|(abandoned, _)| *abandoned > step);
        self.committed = self.committed.max(Some(step));
        let Some(generation) = first else { return };
        match checkpoint::remove_older(&self.subject.start.checkpoints, (step, generation), keep) {
            Ok(removed) if removed.is_empty() => {}
            Ok(removed) => tracing::info!(?removed, "old checkpoints removed"),
            Err(error) => {
                tracing::warn!(error = text_of(&error), "old checkpoints were not removed, the next ones try again")
            }
        }
    }

    fn abandon(&mut self, generation: Generation, step: Step) {
        if self.committed.is_some_and(|committed| step <= committed) {
            return tracing::error!(%step, "V4: told to abandon a checkpoint that is committed, which stays");
        }
        if self.abandoned.len() >= ABANDONED_MAX {
            self.abandoned.pop_first();
        }
        self.abandoned.insert((step, generation));
        let Some(Written { index, world, .. }) = self.written.remove(&(step, generation)) else { return };
        self.waiting.take_if(|(of, at, _)| (*of, *at) == (generation, step));
        let gone = self.folder(generation, step).and_then(|folder| checkpoint::abandon(&folder, index, world));
        if let Err(error) = gone {
            tracing::warn!(%step, error = text_of(&error), "the shard of a checkpoint that will not be stays");
        }
    }

    /// Whether there was something to remove on a full disk: what members of older generations began before they were lost.
    fn makes_room(&self, generation: Generation) -> bool {
        let removed = checkpoint::remove_unfinished(&self.subject.start.checkpoints, generation);
        tracing::info!(?removed, "the disk is full");
        removed.is_ok_and(|removed| !removed.is_empty())
    }

    fn failed(&self, generation: Generation, step: Step, last: bool, error: &CheckpointError) {
        let error = text_of(error);
        if last {
            return (self.tell)(Told::Failed(format!("the last checkpoint, at {step}, was not written: {error}")));
        }
        tracing::warn!(%step, %error, "checkpoint was not written; the one before it stays, training goes on");
        (self.tell)(Told::Event(RankEvent::NotStored { generation, step, error }));
    }
}
