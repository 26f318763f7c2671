//! Ranks that keep parts of the optimizer's state (ZeRO stage 1): what this one keeps, what it hands over and is handed when others train than before, and how
//! the parameters that each has stepped come to all. Part of `trainer.rs`; who keeps what is `exchange/shares.rs`'s.
//!
//! X18: each part is kept by two ranks. Both step it, by the same sum; the owner's parameters go to all, and its buddy compares them with its own.
//! X20: a generation begins with whole parameters and each part where it belongs: parts are handed over, then the parameters gathered, and only then, when all
//! have what they are to keep, a rank lets go of what it is not to keep any more. Where that is given up, all still have what they say they have.
//! X21: a part that nobody has any more, or of which the two do not agree, sends the job back to its last checkpoint.

use std::collections::BTreeSet;

use stoke_jobs::Layout;
use stoke_protocol::ids::{Digest, Step};
use stoke_protocol::message::peer::Kept;
use stoke_protocol::message::rank::Membership;

use super::super::failure::{Failure, Undecided};
use super::super::work::Work;
use super::Trainer;
use crate::exchange::{Exchange, Parcel, Readers, Received, Shares, StateOf, hand_over};

/// See the module.
pub struct Sharded {
    /// Of each parameter, in values.
    sizes: Vec<usize>,
    /// What this rank has; none before it has a state.
    pub kept: Option<Kept>,
    /// The deal of the generation, and this rank's place in it.
    dealt: Option<(Shares, u32)>,
}

impl Sharded {
    /// `loaded`: it begins with the whole state, as the seed gives it.
    pub fn new(layout: &Layout, loaded: bool) -> Self {
        let sizes = layout.params.iter().map(|param| param.len).collect();
        Self { sizes, kept: loaded.then_some(Kept::ALL), dealt: None }
    }

    /// The parameters that this rank steps for all, by place.
    pub fn owned(&self) -> Option<Vec<usize>> {
        self.dealt.as_ref().map(|(shares, own)| shares.owned(*own))
    }

    /// Whether a tensor of a checkpoint is one that this rank keeps.
    pub fn wants(&self, layout: &Layout, name: &str) -> bool {
        let Some(((shares, own), place)) = self.dealt.as_ref().zip(layout.place_of_state(name)) else { return true };
        shares.keeps(*own, place)
    }
}

impl Trainer {
    /// Brings each part of the state to where it belongs among these members (X20). `kept`: what each has after `step` steps.
    pub(super) fn deal(
        &mut self,
        membership: &Membership,
        exchange: &mut Exchange,
        (step, kept, readers): (Step, &[Option<Kept>], Option<&Readers>),
        work: &Work<'_>,
    ) -> Result<(), Failure> {
        let (world, position) = (exchange.place().world, exchange.place().position);
        let sharded = self.sharded.as_mut().expect("X18: called where state is sharded");
        let shares = Shares::deal(&sharded.sizes, world);
        let parcels = if readers.is_some() { Ok(Vec::new()) } else { hand_over(&sharded.sizes, kept) };
        let places = shares.kept(position);
        sharded.dealt = Some((shares, position));
        if let Some(readers) = readers {
            self.train.keep(&places);
            self.restore(membership, readers, work)?;
        } else {
            let parcels = parcels.map_err(|place| self.lost(place))?;
            self.give_parts(membership, (position, &parcels), work)?;
            self.take_parts(membership, exchange, (step, position, &parcels), work)?;
            // At the job's beginning all have everything.
            if kept.iter().any(|kept| *kept != Some(Kept::ALL)) {
                self.gather(exchange)?;
            }
            self.train.keep(&places);
        }
        self.sharded.as_mut().expect("as above").kept = Some(Kept { world, position });
        Ok(())
    }

    fn give_parts(
        &self,
        membership: &Membership,
        (position, parcels): (u32, &[Parcel]),
        work: &Work<'_>,
    ) -> Result<(), Failure> {
        let term = membership.term();
        // No hash of the whole: parameters are gathered after this, and compared as ever.
        let (shards, weights_blake3) = (membership.members.len() as u32, Digest([0; 32]));
        let of = StateOf { step: Step(self.step), shards, loss: self.loss, ledger: self.ledger, weights_blake3 };
        for Parcel { to, params, .. } in parcels.iter().filter(|parcel| parcel.from == position) {
            let tensors = self.train.snapshot().part(params, true).tensors()?;
            let to = membership.members[*to as usize].id;
            tracing::info!(%term, %to, parameters = params.len(), "handing over a part of the optimizer's state");
            work.mesh.give_shard(&work.runtime, (term, of, position), tensors.into(), &[to]);
        }
        Ok(())
    }

    fn take_parts(
        &mut self,
        membership: &Membership,
        exchange: &Exchange,
        (step, position, parcels): (Step, u32, &[Parcel]),
        work: &Work<'_>,
    ) -> Result<(), Failure> {
        let mine = parcels.iter().filter(|parcel| parcel.to == position);
        let givers: BTreeSet<u32> = mine.map(|parcel| parcel.from).collect();
        if givers.is_empty() {
            assert_eq!(self.step, step.0, "X10: members that lack nothing have done the same steps");
            return Ok(());
        }
        let (term, world) = (membership.term(), exchange.place().world);
        let left = exchange.left();
        let received = work.runtime.block_on(async {
            tokio::select! {
                biased;
                failure = work.orders.interrupted(term.generation) => Err(failure),
                received = work.mesh.take_parts(term, world, givers) => Ok(received?),
                why = left => Err(why.into()),
            }
        })?;
        let Received { of: StateOf { step: theirs, loss, ledger, .. }, tensors } = received;
        let knows = self.loaded && self.step == step.0;
        if theirs != step || knows && ledger != self.ledger {
            let error = format!("parts of the state received are of {theirs} and {ledger}, {step} was expected");
            return Err(Failure::Error(error));
        }
        self.train.take_part(tensors)?;
        if !knows {
            (self.step, self.loss, self.ledger, self.loaded, self.origin) = (step.0, loss, ledger, true, None);
            self.meter.took_over(self.step);
        }
        Ok(())
    }

    /// Gives all the parameters that this rank has stepped, and takes those of the others (X18). Nothing where ranks keep the whole state.
    pub(super) fn gather(&mut self, exchange: &mut Exchange) -> Result<(), Failure> {
        let Some(Sharded { sizes, dealt: Some((shares, position)), .. }) = &self.sharded else { return Ok(()) };
        let (position, train) = (*position, &mut self.train);
        if shares.world() == 1 {
            return Ok(());
        }
        let mut gathering = exchange.gather(Step(self.step), shares)?;
        let (first, own) = (shares.range(position).start, gathering.own());
        train.parameters(&shares.owned(position), &mut |place, values| {
            own[shares.offset(place) - first..][..values.len()].copy_from_slice(values);
        });
        let all = gathering.complete()?;
        let copies: Vec<usize> =
            shares.kept(position).into_iter().filter(|place| shares.owner(*place) != position).collect();
        let mut differs = None;
        train.parameters(&copies, &mut |place, values| {
            let theirs = &all[shares.offset(place)..][..values.len()];
            let is_same = values.iter().zip(theirs).all(|(own, theirs)| own.to_bits() == theirs.to_bits());
            if !is_same {
                differs.get_or_insert(place);
            }
        });
        if let Some(place) = differs {
            let (path, owner) = (&train.layout().params[place].path, shares.owner(place));
            let error = format!(
                "the parameter {path} is not the same at the ranks at places {owner} and {position}, which both stepped it: the memory or the arithmetic of one is faulty"
            );
            return Err(Failure::Undecided(Undecided::StateLost { error }));
        }
        train.set_parameters(&mut |place| {
            let is_stepped_here = shares.keeps(position, place);
            (!is_stepped_here).then(|| &all[shares.offset(place)..][..sizes[place]])
        });
        self.meter.lap(super::Part::Exchange);
        Ok(())
    }

    fn lost(&self, place: usize) -> Failure {
        let path = &self.train.layout().params[place].path;
        let error = format!("nobody has the optimizer's state of {path} any more: both ranks that kept it are gone");
        Failure::Undecided(Undecided::StateLost { error })
    }
}
