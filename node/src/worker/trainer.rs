//! The compute thread of a rank: load, restore, then step after step. Owns the trainer and its time; talks to the rest of the process
//! through channels and never to the network itself (the exchange does).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;

use stoke_jobs::{LaneWork, Metrics, Plan, Train};
use stoke_protocol::ids::{Digest, Step};
use stoke_protocol::lanes;
use stoke_protocol::message::rank::{Outcome, PeerAddress, Progress, StartRank};
use stoke_protocol::spec::JobSpec;

use super::failure::{Failure, text_of};
use super::meter::{Meter, Part};
use super::plan::{is_due, mismatch, plan_of, steps_of};
use super::vault::{Copy, Order, Vault};
use crate::checkpoint;
use crate::exchange::{AbortHandle, Exchange, LaneSums, PeerEndpoint, Shape};

/// What the trainer says to the rest of the process.
pub enum Told {
    /// Data and model are there: the rank may be called ready.
    Loaded,
    /// How to interrupt a sum that waits for peers.
    Connected(AbortHandle),
    Progress(Progress),
}

/// What it is given when the generation is complete.
pub struct Generation {
    pub endpoint: PeerEndpoint,
    pub peers: Vec<PeerAddress>,
    pub vault: Vault,
}

/// What it is given at its start.
pub struct Assignment {
    pub start: StartRank,
    pub spec: JobSpec,
    /// Set when the rank is to stop; looked at between lanes.
    pub stop: Arc<AtomicBool>,
    pub generation: Receiver<Generation>,
    pub runtime: tokio::runtime::Handle,
}

/// Trains to the last step. Blocks for as long as that takes.
pub fn run(given: Assignment, tell: &dyn Fn(Told)) -> Result<Outcome, Failure> {
    let mut trainer = Trainer::load(&given)?;
    tell(Told::Loaded);
    let Ok(generation) = given.generation.recv() else { return Err(Failure::Stopped) };
    trainer.train(&given, generation, tell)
}

struct Trainer {
    train: Box<dyn Train>,
    plan: Plan,
    /// Steps that were applied.
    step: u64,
    /// Mean loss of the last of them.
    loss: f32,
    /// Whether the last step is in a checkpoint of this job already.
    resumed_at_end: bool,
}

impl Trainer {
    fn load(given: &Assignment) -> Result<Self, Failure> {
        let Assignment { start, spec, .. } = given;
        let load = |plan: &Plan| stoke_jobs::load(&start.spec, &spec.trainer, plan.clone());
        let (mut plan, mut train);
        if let Some(steps) = spec.train.steps {
            plan = plan_of(spec, steps);
            train = load(&plan)?;
        } else {
            // The schedule's length follows from the size of the data, which only a loaded trainer knows.
            plan = plan_of(spec, 1);
            plan.steps = steps_of(spec, load(&plan)?.samples());
            train = load(&plan)?;
        }
        let mut resumed = (0, f32::NAN);
        if let Some(uri) = start.resume.as_ref().or(spec.checkpoint.resume.as_ref()) {
            resumed = restore(uri, &mut *train, spec, plan.steps)?;
        }
        let (step, loss) = resumed;
        tracing::info!(
            step,
            steps = plan.steps,
            samples = train.samples(),
            parameters = train.layout().len(),
            "trainer loaded"
        );
        Ok(Self { resumed_at_end: step == plan.steps, train, plan, step, loss })
    }

    fn train(&mut self, given: &Assignment, generation: Generation, tell: &dyn Fn(Told)) -> Result<Outcome, Failure> {
        let Assignment { start, spec, runtime, .. } = given;
        let Generation { endpoint, peers, vault } = generation;
        let shape = Shape { values: self.train.layout().flat_len(), lanes: spec.train.lanes };
        let mut exchange = runtime.block_on(endpoint.connect(&peers, shape))?;
        tell(Told::Connected(exchange.abort_handle()));
        let owned = lanes::assign(spec.train.lanes, start.world)[start.id.rank.0 as usize].clone();
        let mut sums = LaneSums::new(shape.values, shape.lanes, owned);
        let mut meter = Meter::new(&self.plan, self.step);
        while self.step < self.plan.steps {
            self.step(&mut exchange, &mut sums, &given.stop, &mut meter)?;
            if let Some(progress) = meter.due(self.step) {
                tell(Told::Progress(progress));
            }
            if is_due(spec, self.step, self.plan.steps) {
                vault.store(self.copy(start)?);
            }
        }
        tracing::info!(step = self.step, samples_per_second = meter.samples_per_second(self.step), "steps done");
        // Nothing of the exchange is needed any more; peers that evaluate must not keep it open.
        exchange.close();
        if self.resumed_at_end {
            vault.store(self.copy(start)?);
        }
        self.outcome(start, &vault)
    }

    fn step(
        &mut self,
        exchange: &mut Exchange,
        sums: &mut LaneSums,
        stop: &AtomicBool,
        meter: &mut Meter,
    ) -> Result<(), Failure> {
        let size = self.train.samples();
        for lane in sums.owned() {
            if stop.load(Ordering::Relaxed) {
                return Err(Failure::Stopped);
            }
            let samples = self.plan.lane_samples(size, self.step, lane);
            sums.begin(lane);
            let work = LaneWork { step: self.step, lane, samples: &samples };
            self.train.lane(work, &mut |offset, values| sums.push(offset, values))?;
        }
        meter.lap(Part::Compute);
        let sum = exchange.all_reduce(Step(self.step), sums)?;
        meter.lap(Part::Exchange);
        let applied = self.train.apply(self.step, sum)?;
        meter.lap(Part::Apply);
        self.step += 1;
        self.loss = applied.loss as f32;
        meter.stepped(&applied, self.step);
        Ok(())
    }

    /// This rank's share of the state, apart from everything that the next step changes (V1).
    fn copy(&self, start: &StartRank) -> Result<Copy, Failure> {
        let tensors = self.train.save()?;
        let mut own = checkpoint::plan_shards(&tensors, start.world).swap_remove(start.id.rank.0 as usize).into_iter();
        let mut next = own.next();
        let tensors = tensors.into_iter().enumerate().filter_map(|(index, tensor)| {
            let ours = next == Some(index);
            if ours {
                next = own.next();
            }
            ours.then_some(tensor)
        });
        Ok(Copy {
            step: Step(self.step),
            loss: self.loss,
            tensors: tensors.collect(),
            weights_blake3: Digest(self.train.weights_blake3()),
            last: self.step == self.plan.steps,
        })
    }

    fn outcome(&mut self, start: &StartRank, vault: &Vault) -> Result<Outcome, Failure> {
        let mut metrics = Metrics::new();
        if start.id.rank.0 == 0 {
            metrics = self.train.evaluate()?;
            vault.tell(Order::Metrics(metrics.clone()));
        }
        Ok(Outcome {
            step: Step(self.step),
            loss: self.loss,
            samples: self.step * self.plan.batch as u64,
            weights_blake3: Digest(self.train.weights_blake3()),
            metrics,
        })
    }
}

/// Takes a checkpoint over; returns its step and its loss.
fn restore(uri: &str, train: &mut dyn Train, spec: &JobSpec, steps: u64) -> Result<(u64, f32), Failure> {
    let failed = |what: String| Failure::Error(format!("continue from {uri}: {what}"));
    let (manifest, tensors) = checkpoint::load(uri).map_err(|error| failed(text_of(&error)))?;
    if let Some(reason) = mismatch(&manifest, spec, steps) {
        return Err(failed(reason));
    }
    train.restore(tensors).map_err(|error| failed(text_of(&error)))?;
    let restored = Digest(train.weights_blake3());
    if restored != manifest.weights_blake3 {
        return Err(failed(format!("its weights hash to {restored}, the manifest says {}", manifest.weights_blake3)));
    }
    Ok((manifest.step.0, manifest.loss.unwrap_or(f32::NAN)))
}
