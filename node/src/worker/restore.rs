//! The start from a checkpoint: every rank reads its manifest before it is ready. Shards that are near it reads itself; what the members of the
//! first generation have to fetch from an object store, one fetches and gives to the others. Owns what a checkpoint must be for a job to go on
//! from it; changes no trainer.

use std::time::Instant;

use stoke_jobs::{NamedTensor, Train};
use stoke_protocol::ledger::Ledger;
use stoke_protocol::message::peer::Restores;
use stoke_protocol::message::rank::{Membership, Origin, RankId, StartFrom};
use stoke_protocol::spec::JobSpec;

use super::failure::{Failure, text_of};
use super::plan::mismatch;
use super::work::Work;
use crate::checkpoint::{self, CheckpointError, Manifest};
use crate::exchange::{Readers, StateOf};

/// What a checkpoint says of itself, if a job of this spec can go on from it.
pub fn open(origin: &Origin, loaded: (&JobSpec, &dyn Train), steps: u64) -> Result<Manifest, Failure> {
    let Origin { uri, manifest_blake3 } = origin;
    let opened = checkpoint::patiently(|| checkpoint::open_committed(uri, *manifest_blake3));
    let manifest = opened.map_err(|error| unreadable(uri, &error))?;
    match mismatch(&manifest, loaded, steps) {
        Some(reason) => Err(Failure::Permanent(format!("continue from {uri}: {reason}"))),
        None => Ok(manifest),
    }
}

/// What this rank tells the others of the checkpoint that it begins with.
pub fn offer(manifest: &Manifest, work: &Work<'_>) -> Restores {
    let look = || checkpoint::near(uri_of(&work.start.from), manifest, work.memory.as_ref());
    let near = work.beat.reading(look);
    Restores { step: manifest.step, near: near.into_iter().collect() }
}

/// The state of a checkpoint, as far as its tensors are wanted: this rank reads its part of the shards, gives others what they lack of it, and takes theirs.
pub fn gather(
    manifest: &Manifest,
    membership: &Membership,
    (readers, wanted): (&Readers, &dyn Fn(&str) -> bool),
    work: &Work<'_>,
) -> Result<(StateOf, Vec<NamedTensor>), Failure> {
    let (term, begun, uri) = (membership.term(), Instant::now(), uri_of(&work.start.from));
    let of = StateOf {
        step: manifest.step,
        shards: manifest.shards.len() as u32,
        loss: manifest.loss.unwrap_or(f32::NAN),
        ledger: manifest.ledger.unwrap_or(Ledger::from(manifest.cursor)),
        weights_blake3: manifest.weights_blake3,
    };
    let members = || (0..).zip(membership.members.iter().map(|member| member.id));
    let (place, _) = members().find(|(_, id)| *id == work.start.id).expect("a member restores");
    let own: Vec<u32> = (0..of.shards).filter(|shard| readers.reads(place, *shard)).collect();
    // Others give while this one reads.
    let (mesh, taken) = (work.mesh.clone(), own.clone());
    let mut taking = tokio::task::JoinSet::new();
    taking.spawn_on(async move { mesh.take_shards(term, of, &taken).await }, &work.runtime);
    let read = || checkpoint::load_shards(uri, manifest, &own, work.memory.as_ref());
    let read = work.beat.reading(|| checkpoint::patiently(read));
    let mut tensors = Vec::new();
    let is_wanted = |tensor: &NamedTensor| wanted(&tensor.name);
    for (index, shard) in read.map_err(|error| unreadable(uri, &error))? {
        let lacks = |(member, _): &(u32, RankId)| readers.giver(index) == place && !readers.reads(*member, index);
        let to: Vec<RankId> = members().filter(lacks).map(|(_, id)| id).collect();
        if to.is_empty() {
            tensors.extend(shard.into_iter().filter(is_wanted));
        } else {
            tensors.extend(shard.iter().filter(|tensor| is_wanted(tensor)).cloned());
            work.mesh.give_shard(&work.runtime, (term, of, index), shard.into(), &to);
        }
    }
    let received = work.runtime.block_on(async {
        tokio::select! {
            biased;
            failure = work.orders.interrupted(term.generation) => Err(failure),
            Some(taken) = taking.join_next() => Ok(taken.map_err(|_| Failure::Stopped)??),
        }
    })?;
    tensors.extend(received.into_iter().filter(is_wanted));
    tracing::info!(
        step = of.step.0,
        read = own.len(),
        of = of.shards,
        ms = begun.elapsed().as_millis() as u64,
        "checkpoint gathered"
    );
    Ok((of, tensors))
}

/// Of the checkpoint that a rank begins with.
pub fn uri_of(from: &StartFrom) -> &str {
    match from {
        StartFrom::Checkpoint(origin) => &origin.uri,
        StartFrom::Seed | StartFrom::Peers => unreachable!("only a rank with a checkpoint restores one"),
    }
}

fn unreadable(uri: &str, error: &CheckpointError) -> Failure {
    let damaged = error.is_damage();
    let error = format!("continue from {uri}: {}", text_of(error));
    if damaged { Failure::Damaged { uri: uri.to_owned(), error } } else { Failure::Error(error) }
}
