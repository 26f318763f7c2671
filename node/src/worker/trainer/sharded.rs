//! Ranks that keep parts of the optimizer's state (ZeRO stage 1): what this one keeps, what it hands over and is handed when others train than before, and how
//! the parameters that each has stepped come to all. Part of `trainer.rs`; who keeps what is `exchange/shares.rs`'s.
//!
//! X18: each part is kept by two ranks. Both step it, by the same sum; the owner's parameters go to all, and its buddy compares them with its own.
//! X20: a generation begins with whole parameters and each part where it belongs: parts are handed over, then the parameters gathered, and only then, when all
//! have what they are to keep, a rank lets go of what it is not to keep any more. Until then it has both, tells of both, and steps both.
//! X21: a part that nobody has any more, or of which the two do not agree, sends the job back to its last checkpoint; whoever has found the latter says so in
//! every generation until it is stopped.

use std::collections::BTreeSet;

use stoke_jobs::Layout;
use stoke_protocol::ids::{Digest, Step};
use stoke_protocol::message::peer::{Keeps, Kept};
use stoke_protocol::message::rank::{Membership, RankId};

use super::super::failure::{Failure, Undecided};
use super::super::work::Work;
use super::Trainer;
use crate::exchange::{Exchange, Parcel, Readers, Received, Shares, StateOf, hand_over};

/// See the module.
pub struct Sharded {
    /// Of each parameter, in values.
    sizes: Vec<usize>,
    /// What this rank has; nothing before it has a state.
    pub keeps: Keeps,
    /// The deal of the generation that it is in.
    dealt: Option<Dealt>,
    /// Of which it and another rank do not agree, in words.
    doubt: Option<String>,
}

struct Dealt {
    shares: Shares,
    /// This rank's place.
    position: u32,
    /// The parameters that it steps for all, and those that it steps as the buddy of their owners, by place.
    own: Vec<usize>,
    copies: Vec<usize>,
    members: Vec<RankId>,
}

impl Sharded {
    /// `loaded`: it begins with the whole state, as the seed gives it.
    pub fn new(layout: &Layout, loaded: bool) -> Self {
        let sizes = layout.params.iter().map(|param| param.len).collect();
        Self { sizes, keeps: loaded.then_some(Kept::ALL).into_iter().collect(), dealt: None, doubt: None }
    }

    /// The parameters that this rank steps for all, by place.
    pub fn owned(&self) -> Option<Vec<usize>> {
        self.dealt.as_ref().map(|dealt| dealt.own.clone())
    }

    /// Whether a tensor of a checkpoint is one that this rank keeps.
    pub fn wants(&self, layout: &Layout, name: &str) -> bool {
        let Some((dealt, place)) = self.dealt.as_ref().zip(layout.place_of_state(name)) else { return true };
        dealt.shares.keeps(dealt.position, place)
    }

    /// All parameters of whose state it has told that it has it, by place.
    fn told(&self) -> Vec<usize> {
        let parts = self.keeps.iter().map(|kept| (Shares::deal(&self.sizes, kept.world), kept.position));
        let parts: Vec<(Shares, u32)> = parts.collect();
        let has = |place: &usize| parts.iter().any(|(shares, position)| shares.keeps(*position, *place));
        (0..self.sizes.len()).filter(has).collect()
    }
}

impl Trainer {
    /// Brings each part of the state to where it belongs among these members (X20). `keeps`: what each has after `step` steps.
    pub(super) fn deal(
        &mut self,
        membership: &Membership,
        exchange: &mut Exchange,
        (step, keeps, readers): (Step, &[Keeps], Option<&Readers>),
        work: &Work<'_>,
    ) -> Result<(), Failure> {
        let (world, position) = (exchange.place().world, exchange.place().position);
        let kept = Kept { world, position };
        let sharded = self.sharded();
        if let Some(error) = sharded.doubt.clone() {
            return Err(Failure::Undecided(Undecided::StateLost { error }));
        }
        let shares = Shares::deal(&sharded.sizes, world);
        let places = shares.kept(position);
        let members = membership.members.iter().map(|member| member.id).collect();
        let own = shares.owned(position);
        let copies = places.iter().copied().filter(|place| shares.owner(*place) != position).collect();
        sharded.dealt = Some(Dealt { shares, position, own, copies, members });
        if let Some(readers) = readers {
            sharded.keeps = Keeps::default();
            self.train.keep(&places);
            self.restore(membership, readers, work)?;
        } else {
            let parcels = hand_over(&sharded.sizes, keeps).map_err(|place| self.lost(place))?;
            self.give_parts(membership, (position, &parcels), work)?;
            self.take_parts(membership, exchange, (step, position, &parcels), work)?;
            let sharded = self.sharded();
            sharded.keeps.push(kept);
            let told = sharded.told();
            self.train.keep(&told);
            // At the job's beginning all have everything.
            if keeps.iter().any(|keeps| !keeps.iter().eq([Kept::ALL])) {
                self.gather(exchange)?;
            }
            self.train.keep(&places);
        }
        self.sharded().keeps = [kept].into_iter().collect();
        Ok(())
    }

    fn sharded(&mut self) -> &mut Sharded {
        self.sharded.as_mut().expect("X18: called where ranks keep parts of the state")
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
        let mine: Vec<&Parcel> = parcels.iter().filter(|parcel| parcel.from == position).collect();
        // On a GPU it is a copy of all.
        let state = (!mine.is_empty()).then(|| self.train.snapshot());
        for (Parcel { to, params, .. }, state) in mine.into_iter().zip(state.iter().cycle()) {
            let tensors = state.clone().part(params, true).tensors()?;
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
        if !knows {
            // What it has is of another step.
            self.sharded().keeps = Keeps::default();
        }
        self.train.take_part(tensors)?;
        if !knows {
            (self.step, self.loss, self.ledger, self.loaded, self.origin) = (step.0, loss, ledger, true, None);
            self.meter.took_over(self.step);
        }
        Ok(())
    }

    /// Gives all the parameters that this rank has stepped, and takes those of the others (X18). Nothing where each rank keeps the whole state: its parameters are
    /// compared as ever.
    pub(super) fn gather(&mut self, exchange: &mut Exchange) -> Result<(), Failure> {
        let Some(Sharded { sizes, dealt: Some(dealt), doubt, .. }) = &mut self.sharded else { return Ok(()) };
        let (Dealt { shares, position, own: owned, copies, members }, train) = (dealt, &mut self.train);
        let position = *position;
        if shares.world() <= 2 {
            return Ok(());
        }
        let mut gathering = exchange.gather(Step(self.step), shares)?;
        let (first, own) = (shares.range(position).start, gathering.own());
        train.parameters(owned, &mut |place, values| {
            own[shares.offset(place) - first..][..values.len()].copy_from_slice(values);
        });
        let all = gathering.complete()?;
        let mut differs = None;
        train.parameters(copies, &mut |place, values| {
            let theirs = &all[shares.offset(place)..][..values.len()];
            if values.iter().zip(theirs).any(|(own, theirs)| own.to_bits() != theirs.to_bits()) {
                differs.get_or_insert(place);
            }
        });
        if let Some(place) = differs {
            let (path, owner, own) =
                (&train.layout().params[place].path, members[shares.owner(place) as usize], members[position as usize]);
            let error = format!(
                "{} and {} both stepped the parameter {path} and have not the same: the memory or the arithmetic of one is faulty",
                owner.rank, own.rank
            );
            *doubt = Some(error.clone());
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
