//! Where the state of a rank comes from, and to whom it goes: the members that train already, a checkpoint, those who join. Part of `trainer.rs`.

use std::sync::atomic::AtomicBool;

use stoke_jobs::NamedTensor;
use stoke_protocol::ids::{Digest, Step, Term};
use stoke_protocol::message::rank::{Membership, RankEvent, RankId};

use super::super::failure::{Failure, text_of};
use super::super::joining::Joining;
use super::super::restore;
use super::super::work::Work;
use super::{Told, Trainer};
use crate::exchange::{Exchange, Readers, Received, Shard, StateOf};

impl Trainer {
    /// Follows the members until it may be one of them: the state of a step, then the sum of every step after it.
    pub(super) fn join(
        &mut self,
        term: Term,
        step: u64,
        exchange: &mut Exchange,
        work: &mut Work<'_>,
    ) -> Result<(), Failure> {
        let stands = match &self.joining {
            Some(joining) => joining.reaches() == step,
            None => self.loaded && self.step == step,
        };
        if self.sharded.is_some() {
            // It is handed its part when it is a member, and no sum before that is of use.
            self.loaded = false;
        } else if !stands {
            self.loaded = false;
            self.joining = Some(Joining::begin(&work.runtime, work.mesh.clone(), (term, step)));
        }
        let (world, generation) = (exchange.place().world, term.generation);
        let mut said = false;
        for step in step..self.plan.steps {
            work.orders.check(generation)?;
            let sum = exchange.observe(Step(step), self.compares(world, Step(step)))?;
            let all_told = self.tail.told(sum) == world as f32;
            match &mut self.joining {
                _ if self.sharded.is_some() => {}
                Some(joining) => joining.keep(sum),
                None => self.apply(sum)?,
            }
            self.settle()?;
            if (self.loaded || self.sharded.is_some()) && !said {
                said = true;
                (work.tell)(Told::Event(RankEvent::Joined { generation, step: Step(step + 1) }));
            }
            if all_told {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Takes the state if it is there by now, and does the steps that were summed meanwhile.
    fn settle(&mut self) -> Result<(), Failure> {
        let Some(joining) = &mut self.joining else { return Ok(()) };
        let Some(received) = joining.received()? else { return Ok(()) };
        let (from, sums) = self.joining.take().expect("looked at above").into_parts();
        self.adopt(received, from)?;
        sums.iter().try_for_each(|sum| self.apply(sum))
    }

    /// A member that lacks more than one step takes the state; the others wait for its lanes.
    pub(super) fn catch_up(&mut self, at: (Term, u64), work: &Work<'_>) -> Result<(), Failure> {
        let (term, step) = at;
        tracing::warn!(%term, from = self.step, to = step, "too far behind for one sum: taking the state of others");
        let arrives = AtomicBool::new(false);
        let received = work.runtime.block_on(async {
            tokio::select! {
                biased;
                failure = work.orders.interrupted(term.generation) => Err(failure),
                received = work.mesh.take_state(term, &arrives) => Ok(received?),
            }
        })?;
        self.adopt(received, step)
    }

    fn adopt(&mut self, received: Received, expected: u64) -> Result<(), Failure> {
        let Received { of: StateOf { step, loss, ledger, weights_blake3, .. }, tensors } = received;
        if step.0 != expected {
            return Err(Failure::Error(format!("the state received is of {step}, {expected} was expected")));
        }
        self.take_state(tensors, weights_blake3)
            .map_err(|what| Failure::Error(format!("take the state of {step} from peers: {what}")))?;
        (self.step, self.loss, self.ledger, self.loaded, self.origin) = (step.0, loss, ledger, true, None);
        self.meter.took_over(self.step);
        Ok(())
    }

    /// Takes the checkpoint over that all members begin with.
    pub(super) fn restore(
        &mut self,
        membership: &Membership,
        readers: &Readers,
        work: &Work<'_>,
    ) -> Result<(), Failure> {
        let manifest = self.origin.as_ref().expect("X10: whoever has no state has a checkpoint to begin with");
        let wanted = |name: &str| self.sharded.as_ref().is_none_or(|sharded| sharded.wants(self.train.layout(), name));
        let (of, tensors) = restore::gather(manifest, membership, (readers, &wanted), work)?;
        let uri = restore::uri_of(&work.start.from);
        let restored = self.train.restore(tensors);
        restored.map_err(|error| Failure::Permanent(format!("continue from {uri}: {}", text_of(&error))))?;
        let weights = Digest(self.train.weights_blake3());
        if weights != of.weights_blake3 {
            let error =
                format!("continue from {uri}: its weights hash to {weights}, the manifest says {}", of.weights_blake3);
            return Err(Failure::Damaged { uri: uri.to_owned(), error });
        }
        (self.step, self.loss, self.ledger, self.loaded) = (of.step.0, of.loss, of.ledger, true);
        if self.sharded.is_none() {
            self.origin = None;
        }
        Ok(())
    }

    fn take_state(&mut self, tensors: Vec<NamedTensor>, expected: Digest) -> Result<(), String> {
        self.train.restore(tensors).map_err(|error| text_of(&error))?;
        let restored = Digest(self.train.weights_blake3());
        if restored == expected { Ok(()) } else { Err(format!("its weights hash to {restored}, not to {expected}")) }
    }

    /// This rank's shard for those who join.
    pub(super) fn give_state(&self, term: Term, (index, count): (u32, u32), lacking: &[RankId], work: &Work<'_>) {
        if lacking.is_empty() {
            return;
        }
        let of = StateOf {
            step: Step(self.step),
            shards: count,
            loss: self.loss,
            ledger: self.ledger,
            weights_blake3: Digest([0; 32]),
        };
        let shard = Shard { term, of, index, state: self.train.snapshot() };
        work.mesh.give_state(&work.runtime, shard, lacking);
    }
}
