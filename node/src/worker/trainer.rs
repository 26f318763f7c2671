//! The compute thread of a rank: load, restore, then step after step, generation after generation. Owns the trainer and its time; talks to the
//! rest of the process through channels and never to the network itself (the exchange does).
//!
//! T1: a step is applied when its sum is complete, whichever generation completed it: the sum does not depend on who made it (if rounded: T4).
//! T2: a planned generation begins between two steps, the same two on every rank: all have been told of it, and the sum itself says so.
//! T3: steps that a quorum does while the coordinator is away stand; checkpoints wait until it is back, because only its memberships commit.
//! T4: ranks whose gradients are rounded on the wire never go on without the coordinator: a quorum's sum of a step would be another than that of who left.
//! T5: where ranks keep parts of the optimizer's state, each applies a sum to what it keeps, and the parameters are gathered before the next step (`sharded.rs`).

mod sharded;
mod transfer;

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use bytes::Bytes;
use stoke_jobs::{Applied, JobError, LaneWork, Metrics, Plan, Pulse, Train, Trainers};
use stoke_protocol::ids::{Digest, Fingerprint, Generation, Step};
use stoke_protocol::ledger::Ledger;
use stoke_protocol::message::rank::{
    Given, Membership, Outcome, Progress, Purpose, RankEvent, StartFrom, StartRank, StepTimes,
};
use stoke_protocol::spec::{JobSpec, Sharding};
use tokio::runtime::Handle;

use self::sharded::Sharded;
use super::beat::Beat;
use super::damage;
use super::failure::{Failure, Undecided};
use super::finite::{self, Skips};
use super::joining::Joining;
use super::meter::{Meter, Part};
use super::orders::Orders;
use super::plan::{is_due, loaded, shape_of};
use super::restore;
use super::tail::Tail;
use super::vault::{Copy, Order, Vault};
use super::work::Work;
use crate::checkpoint::{Manifest, ShardMemory};
use crate::exchange::{Exchange, Formed, LaneSums, Mesh, State};
use crate::objects::Objects;
use crate::{rollout, server};

/// What the trainer says to the rest of the process.
pub enum Told {
    /// Data and model are there: the rank may be called ready.
    Loaded,
    Progress(Progress),
    Timed(Vec<StepTimes>),
    Event(RankEvent),
    /// The last step is done.
    Trained {
        generation: Generation,
        outcome: Outcome,
    },
    /// This rank is not in the newest generation.
    Left,
    /// It takes questions, and counts them there.
    Serving(Arc<server::Meter>),
}

/// What it is given when its certificate is there.
pub struct Outside {
    pub mesh: Mesh,
    pub vault: Vault,
}

/// What it is given at its start.
pub struct Assignment {
    pub trainers: Trainers,
    pub start: StartRank,
    pub spec: JobSpec,
    /// Shards of this job in this node's memory.
    pub memory: Option<ShardMemory>,
    pub orders: Orders,
    pub beat: Beat,
    pub outside: Receiver<Outside>,
    pub runtime: Handle,
}

/// Trains to the last step, and on until the orders say stop: another generation may need what this rank has. Blocks for as long as that
/// takes.
pub fn run(given: Assignment, tell: &dyn Fn(Told)) -> Result<(), Failure> {
    let mut trainer = Trainer::load(&given)?;
    tell(Told::Loaded);
    let Assignment { start, spec, memory, orders, beat, outside, runtime, .. } = given;
    let Ok(Outside { mesh, vault }) = outside.recv() else { return Err(Failure::Stopped) };
    let mesh = Arc::new(mesh);
    if spec.resources.rollouts > 0 {
        trainer.train.play_elsewhere(Box::new(rollout::Pool::start(mesh.clone(), orders.clone())));
    }
    let mut work = Work { start, spec, memory, orders, runtime, mesh, vault, beat, tell };
    let mut membership = work.runtime.block_on(work.orders.next(Generation(0)))?;
    let mut given = membership.clone();
    loop {
        let (generation, attended) = (membership.generation, membership.ballot == 0);
        let own = work.start.id;
        if !membership.members.iter().chain(membership.joining.iter()).any(|member| member.id == own) {
            tell(Told::Left);
            return Ok(());
        }
        let served = trainer.serve(&membership, &mut work);
        work.orders.left();
        let parted = match served {
            Ok(()) | Err(Failure::Interrupted) => false,
            Err(Failure::PeerLeft) => true,
            Err(Failure::PeerLost { peer, error }) => {
                tracing::warn!(%peer, %error, "lost a peer, waiting for another generation");
                tell(Told::Event(RankEvent::PeerLost { generation, peer, error }));
                true
            }
            Err(Failure::Undecided(why)) => {
                tracing::error!(step = trainer.step, ?why, "the step is not done, waiting for another generation");
                let event = why.event(generation, Step(trainer.step));
                // Where a quorum goes on alone the coordinator hears of it in the generation that it makes when it is back.
                attended.then(|| tell(Told::Event(event)));
                false
            }
            Err(failure @ (Failure::Stopped | Failure::Error(_) | Failure::Permanent(_) | Failure::Damaged { .. })) => {
                return Err(failure);
            }
        };
        membership = work.runtime.block_on(work.next(&given, parted))?;
        if membership.ballot == 0 {
            given = membership.clone();
        }
    }
}

struct Trainer {
    train: Box<dyn Train>,
    plan: Plan,
    /// Steps that were applied.
    step: u64,
    /// The samples of these steps (I20).
    ledger: Ledger,
    tail: Tail,
    /// Mean loss of the last of them.
    loss: f32,
    /// Whether there is a state: a rank that joins has none at first.
    loaded: bool,
    /// The checkpoint that it begins with, until its state is there.
    origin: Option<Manifest>,
    /// The step of that checkpoint.
    restored: Option<u64>,
    /// Steps were done that the coordinator has not heard of: the next checkpoint is due when it is back (T3).
    unheard: bool,
    /// The sum of the last step, for those who lack it; with the steps that are done after it.
    last_sum: Option<(u64, Bytes)>,
    /// What a rank that joins has received so far.
    joining: Option<Joining>,
    /// Where ranks keep parts of the optimizer's state: this one's.
    sharded: Option<Sharded>,
    /// Steps between comparisons of the members' parameters; 0: none.
    compare_every: u64,
    skips: Skips,
    meter: Meter,
    beat: Beat,
}

impl Trainer {
    fn load(given: &Assignment) -> Result<Self, Failure> {
        let Assignment { start, spec, .. } = given;
        stoke_jobs::read_stores_by(Box::new(Objects));
        let load = |plan| given.trainers.load(&start.spec, &spec.trainer, plan);
        let (plan, train) = loaded(spec, load, Failure::Permanent)?;
        let origin = match &start.from {
            StartFrom::Checkpoint(origin) => Some(restore::open(origin, (spec, &*train), plan.steps)?),
            StartFrom::Seed | StartFrom::Peers => None,
        };
        let restored = origin.as_ref().map(|manifest| manifest.step.0);
        if restored == Some(plan.steps) {
            tracing::warn!(
                step = plan.steps,
                "the checkpoint is of the job's last step, so that nothing is left to train: ask for more steps to go on"
            );
        }
        let step = restored.unwrap_or(0);
        tracing::info!(
            step,
            steps = plan.steps,
            samples = train.samples(),
            parameters = train.layout().len(),
            "trainer loaded"
        );
        let loaded = start.from == StartFrom::Seed;
        let meter = Meter::new(&plan, step);
        let beat = given.beat.clone();
        let tail = Tail::new(train.layout().flat_len(), spec.training().lanes);
        let compare_every = spec.training().digest_every;
        let skips = Skips::new(spec.training().on_nan);
        let (last_sum, joining, unheard) = (None, None, false);
        let sharded = (spec.training().sharding == Sharding::Zero1).then(|| Sharded::new(train.layout(), loaded));
        let (loss, ledger) = (f32::NAN, Ledger::default());
        Ok(Self {
            train,
            plan,
            step,
            ledger,
            tail,
            loss,
            loaded,
            origin,
            restored,
            unheard,
            last_sum,
            joining,
            sharded,
            compare_every,
            skips,
            meter,
            beat,
        })
    }

    /// One generation, from its forming to its end.
    fn serve(&mut self, membership: &Membership, work: &mut Work<'_>) -> Result<(), Failure> {
        let generation = membership.generation;
        let shape = shape_of(&work.spec, &*self.train, self.tail.values());
        // What a giver has not begun to send will not come any more; it is asked for anew.
        self.joining.take_if(|joining| !joining.arrives());
        let forming = work.mesh.form(membership, self.state(work), shape);
        let formed = work.runtime.block_on(async {
            tokio::select! {
                biased;
                failure = work.orders.superseded(generation) => Err(failure),
                formed = forming => Ok(formed?),
            }
        })?;
        let Formed { mut exchange, step, catch_up, lacking, gives, readers, keeps, .. } = formed;
        work.orders.entered(generation, exchange.abort_handle());
        self.meter.begin(generation, step.0);
        if let Some(sum) = catch_up {
            self.apply(sum.read())?;
            self.last_sum = Some((self.step, sum.share()));
        }
        let term = membership.term();
        let served = match gives {
            _ if exchange.place().is_observer() => self.join(term, step.0, &mut exchange, work),
            _ if self.sharded.is_some() => {
                let dealt = self.deal(membership, &mut exchange, (step, &keeps, readers.as_ref()), work);
                dealt.and_then(|()| self.train(membership, &mut exchange, work))
            }
            Some(part) => {
                let gathered = readers.map_or(Ok(()), |readers| self.restore(membership, &readers, work));
                gathered.and_then(|()| {
                    assert_eq!(self.step, step.0, "X10: members that need no state have done the same steps");
                    self.give_state(term, part, &lacking, work);
                    self.train(membership, &mut exchange, work)
                })
            }
            None => self.catch_up((term, step.0), work).and_then(|()| self.train(membership, &mut exchange, work)),
        };
        // Not after a step that was summed and could not be applied.
        let sum = exchange.into_last_sum().filter(|(step, _)| step.0 + 1 == self.step);
        self.last_sum = sum.map(|(_, sum)| (self.step, sum)).or_else(|| self.last_sum.take());
        served
    }

    fn state(&self, work: &Work<'_>) -> State {
        let restores = self.origin.as_ref().map(|manifest| restore::offer(manifest, work));
        let joining = self.joining.as_ref().map(|joining| Step(joining.reaches()));
        let keeps = self.sharded.as_ref().map(|sharded| sharded.keeps).unwrap_or_default();
        // Whoever keeps parts and has none is handed them, however far it was.
        let has_state = self.loaded && (self.sharded.is_none() || !keeps.is_empty());
        let step = has_state.then_some(Step(self.step)).or(joining);
        let sum = self.last_sum.as_ref().filter(|(step, _)| *step == self.step).map(|(_, sum)| sum.clone());
        State { step, sum, restores, keeps }
    }

    fn train(&mut self, membership: &Membership, exchange: &mut Exchange, work: &mut Work<'_>) -> Result<(), Failure> {
        let (place, generation) = (exchange.place(), membership.generation);
        let attended = membership.ballot == 0;
        self.enter(membership, exchange, work);
        if self.holds(membership) {
            // The job makes room for another one, and is stopped when the checkpoint is committed.
            exchange.finish();
            return Ok(());
        }
        let mut sums = exchange.lane_sums();
        while self.step < self.plan.steps {
            let all_told = self.step(generation, exchange, &mut sums, &work.orders)?;
            let lanes = sums.owned().len() as u32;
            if let Some(progress) =
                self.meter.due((generation, lanes), self.step, (self.train.skipped(), self.train.rl()))
            {
                if place.position == 0 && self.meter.is_log_due() {
                    let Progress { loss, accuracy, samples_per_second, .. } = progress;
                    tracing::info!(step = self.step, loss, accuracy, samples_per_second, "training");
                }
                (work.tell)(Told::Progress(progress));
                (work.tell)(Told::Timed(self.meter.take_timed()));
            }
            if attended && is_due(&work.spec, self.step, self.plan.steps) {
                self.checkpoint(generation, exchange, work);
            }
            if all_told && self.step < self.plan.steps {
                exchange.leave();
                return Ok(());
            }
        }
        tracing::info!(step = self.step, samples_per_second = self.meter.samples_per_second(self.step), "steps done");
        // Nothing of the exchange is needed any more; peers that evaluate must not keep it open.
        exchange.finish();
        if !attended {
            return Ok(());
        }
        let outcome = self.outcome(place.position == 0, &work.vault)?;
        (work.tell)(Told::Trained { generation, outcome });
        Ok(())
    }

    /// Says where a membership goes on, and stores what is due before its first step.
    fn enter(&mut self, membership: &Membership, exchange: &Exchange, work: &Work<'_>) {
        let (generation, step) = (membership.generation, Step(self.step));
        if membership.ballot > 0 {
            let members = membership.members.iter().map(|member| member.id).collect();
            tracing::warn!(term = %membership.term(), %step, members = membership.members.len(), "going on without the coordinator");
            (work.tell)(Told::Event(RankEvent::WentOn { generation, step, members }));
            self.unheard = true;
            return;
        }
        if exchange.place().position == 0 {
            (work.tell)(Told::Event(RankEvent::Resumed { generation, step }));
        }
        // What the generation before stored of this step and did not see committed is not worth a thing.
        let begun_here = self.restored == Some(self.step) && self.step < self.plan.steps;
        let committed = work.orders.highest_committed().is_some_and(|committed| committed >= step);
        let unheard = std::mem::take(&mut self.unheard);
        let due = is_due(&work.spec, self.step, self.plan.steps) || unheard;
        if self.step > 0 && !committed && (self.holds(membership) || due && !begun_here) {
            self.checkpoint(generation, exchange, work);
        }
    }

    /// Whether it steps no further, so that its job makes room for another one. One whose steps are done ends instead.
    fn holds(&self, membership: &Membership) -> bool {
        membership.purpose == Purpose::Checkpoint && self.step < self.plan.steps
    }

    /// One step; whether all members have been told of the next generation (T2).
    fn step(
        &mut self,
        generation: Generation,
        exchange: &mut Exchange,
        sums: &mut LaneSums,
        orders: &Orders,
    ) -> Result<bool, Failure> {
        if let Some(draw) = orders.take_damage() {
            damage::flip(&mut *self.train, draw)?;
        }
        let told = u32::from(orders.is_told_of_next(generation));
        let (world, step) = (exchange.place().world, Step(self.step));
        let compared = self.compares(world, step);
        self.sum_lanes((generation, orders), told, sums, &mut |lane, _, sums| {
            if sums.is_taken_early(lane) {
                exchange.give_early(step, compared, sums);
            }
        })?;
        // After the lanes: whatever befell the parameters before the last lane read them shows.
        let replica = compared.then(|| Fingerprint(self.train.fingerprint()));
        self.meter.lap(Part::Compute);
        let sum = exchange.all_reduce(step, sums, replica)?;
        self.meter.lap(Part::Exchange);
        let all_told = self.tail.told(sum) == world as f32;
        match self.commit(sum) {
            Err(Failure::Undecided(_)) => {
                // The others must see the whole sum too, to say the same of it.
                exchange.finish();
                let given = self.not_finite((generation, orders), sums)?;
                Err(Failure::Undecided(Undecided::NotFinite { given }))
            }
            applied => {
                match applied? {
                    Some(applied) => {
                        self.gather(exchange)?;
                        self.meter.stepped(&applied, self.step);
                    }
                    None => exchange.forget(),
                }
                Ok(all_told)
            }
        }
    }

    /// Computes this rank's lanes of the step and sums them; shows `see` their values as they come, with the sums. `told`: of the next generation (T2).
    fn sum_lanes(
        &mut self,
        (generation, orders): (Generation, &Orders),
        told: u32,
        sums: &mut LaneSums,
        see: &mut dyn FnMut(u32, &[f32], &mut LaneSums),
    ) -> Result<(), Failure> {
        let (size, flat) = (self.train.samples(), self.train.layout().flat_len());
        let counted_at = self.train.layout().samples_at();
        self.train.prepare(self.step, sums.owned())?;
        for lane in sums.owned() {
            orders.check(generation)?;
            let positions = self.plan.lane_positions(self.step, lane);
            let samples = self.plan.samples_at(size, positions.clone());
            sums.begin(lane);
            let (train, beat, mut counted) = (&mut self.train, &self.beat, 0.0);
            let goes_on = || {
                beat.pulse();
                orders.check(generation).is_ok()
            };
            let early = sums.is_taken_early(lane);
            let work = LaneWork { pulse: Pulse::new(&goes_on), early, ..LaneWork::new(self.step, lane, &samples) };
            let done = beat.piece(|| {
                train.lane(work, &mut |offset, values| {
                    counted = values.get(counted_at - offset).copied().unwrap_or(counted);
                    sums.push(offset, values);
                    see(lane, values, sums);
                })
            });
            if let Err(JobError::GivenUp) = done {
                orders.check(generation)?;
            }
            done?;
            let told = if lane == sums.owned().start { told } else { 0 };
            sums.push(flat, self.tail.of_lane(lane, told, &positions, counted));
        }
        Ok(())
    }

    /// What this rank's lanes gave to a sum that is not finite: they are computed once more, which tells a faulty machine from the data.
    fn not_finite(&mut self, at: (Generation, &Orders), sums: &mut LaneSums) -> Result<Given, Failure> {
        if finite::are_finite(sums.finish()) {
            return Ok(Given::Finite);
        }
        let mut lanes: Vec<u32> = Vec::new();
        self.sum_lanes(at, 0, sums, &mut |lane, values, _| {
            if lanes.last() != Some(&lane) && !finite::is_finite(values) {
                lanes.push(lane);
            }
        })?;
        if finite::are_finite(sums.finish()) {
            return Ok(Given::FiniteAgain);
        }
        finite::tell_rows(&self.plan, self.train.samples(), self.step, &lanes);
        Ok(Given::NotFinite { lanes: lanes.into() })
    }

    /// Whether members compare the parameters that a step's lanes were computed from.
    fn compares(&self, world: u32, step: Step) -> bool {
        // What ranks gather from each other hides a bit that has flipped meanwhile.
        world > 1 && (self.sharded.is_some() || step.0.checked_rem(self.compare_every) == Some(0))
    }

    /// Commits the step whose whole sum this is, and says so.
    fn apply(&mut self, sum: &[f32]) -> Result<(), Failure> {
        let applied = self.commit(sum)?;
        applied.iter().for_each(|applied| self.meter.stepped(applied, self.step));
        Ok(())
    }

    /// None: it was skipped.
    fn commit(&mut self, sum: &[f32]) -> Result<Option<Applied>, Failure> {
        let (train, step) = (&mut self.train, self.step);
        let flat = train.layout().flat_len();
        // Every rank sees the same, and no other try would end otherwise.
        let ledger = self.tail.record(self.ledger, step, &self.plan, sum).map_err(Failure::Permanent)?;
        let applied = self.beat.piece(|| train.apply(step, &sum[..flat]));
        self.meter.lap(Part::Apply);
        let applied = match applied {
            Err(JobError::NonFinite { what, .. }) if self.skips.take() => {
                tracing::warn!(step, what, "not finite: the step is skipped");
                self.train.skip();
                (self.step, self.ledger) = (self.step + 1, ledger);
                return Ok(None);
            }
            Err(JobError::NonFinite { .. }) => {
                return Err(Failure::Undecided(Undecided::NotFinite { given: Given::Finite }));
            }
            applied => applied?,
        };
        self.skips.applied();
        if applied.samples != self.plan.batch as u64 {
            let (counted, batch) = (applied.samples, self.plan.batch);
            return Err(Failure::Permanent(format!("step {step} summed {counted} samples of a batch of {batch}")));
        }
        self.step += 1;
        self.origin = None;
        self.ledger = ledger;
        self.loss = applied.loss as f32;
        Ok(Some(applied))
    }

    /// Hands the state to the vault. Training is held for as long as this takes.
    fn checkpoint(&self, generation: Generation, exchange: &Exchange, work: &Work<'_>) {
        let begun = Instant::now();
        let (index, world) = (exchange.place().position, exchange.place().world);
        let (state, last) = (self.train.snapshot(), self.step == self.plan.steps);
        let taken_us = begun.elapsed().as_micros() as u64;
        let (step, loss, ledger) = (Step(self.step), self.loss, self.ledger);
        let own = self.sharded.as_ref().and_then(Sharded::owned);
        work.vault.store(Copy { generation, step, index, world, loss, ledger, state, own, last });
        let held_us = begun.elapsed().as_micros() as u64;
        tracing::info!(step = self.step, taken_us, held_us, "state handed over");
    }

    fn outcome(&mut self, is_first: bool, vault: &Vault) -> Result<Outcome, Failure> {
        let mut metrics = Metrics::new();
        if is_first {
            metrics = self.train.evaluate()?;
            vault.tell(Order::Metrics(metrics.clone()));
        }
        Ok(Outcome {
            step: Step(self.step),
            loss: self.loss,
            samples: self.step * self.plan.batch as u64,
            ledger: self.ledger,
            skipped: self.train.skipped(),
            weights_blake3: Digest(self.train.weights_blake3()),
            metrics,
        })
    }
}
