//! The exchange as the compute thread uses it: one call a step that gives the partial sums and returns the complete one. Owns the buffers
//! and the order of operations; waits while the driver works on the network thread. It lives for one generation.
//!
//! X9: after an error every later call fails with the same one: a generation that lost a rank is over.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use stoke_protocol::ids::{Fingerprint, Step, Term};
use stoke_protocol::lanes;
use stoke_protocol::message::peer::Part;
use stoke_protocol::message::rank::RankId;
use stoke_protocol::transport::Io;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::AbortHandle as TaskHandle;

use super::buffer::{Buffer, Pool};
use super::driver::{Driver, Input, Outlet, Output};
use super::error::ExchangeError;
use super::fold::Folder;
use super::frame::Cursor;
use super::lane_sum::LaneSums;
use super::link::{Counters, Link};
use super::memory::{Line, Memory};
use super::mesh::Pair;
use super::operation::{Operation, Unexpected};
use super::plan::Plan;
use super::sum::as_bytes;

/// What is summed: equal on every rank, or frames are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Values of the flat vector.
    pub values: usize,
    pub lanes: u32,
}

/// All ranks of one generation, connected.
pub struct Exchange {
    shape: Shape,
    place: Place,
    driver: UnboundedSender<Input>,
    outputs: Receiver<Output>,
    /// Where all ranks are on one machine: they sum there, and the driver only tells who is gone.
    shared: Option<Shared>,
    sums: Pool,
    /// The last complete sum.
    sum: Option<Buffer>,
    last: Option<Step>,
    /// Peers from which nothing more comes.
    gone: BTreeMap<u32, ExchangeError>,
    failed: Option<ExchangeError>,
    abort: AbortHandle,
    counters: Arc<Counters>,
    /// They end with the exchange.
    tasks: Vec<TaskHandle>,
    /// Those that write to peers; after `leave` they end when everything is written.
    writing: Vec<TaskHandle>,
}

/// This rank's side of the memory of its machine.
struct Shared {
    memory: Arc<Memory>,
    plan: Plan,
    folder: Folder,
    ranks: Vec<RankId>,
    /// Operations that all have ended; the sum of the last one is there.
    operations: u64,
}

/// A rank's place in a generation: `position` below `world` owns lanes, one above observes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub world: u32,
    pub observers: u32,
    pub position: u32,
}

impl Place {
    pub fn is_observer(self) -> bool {
        self.position >= self.world
    }
}

/// Stops an exchange from any thread: a blocked call returns at once, later ones fail.
#[derive(Clone)]
pub struct AbortHandle {
    reason: Arc<OnceLock<String>>,
    outlet: Outlet,
}

/// Counts since the mesh stood, and before: refusals count from the bind on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExchangeStats {
    pub sent_bytes: u64,
    pub received_bytes: u64,
    /// Connections and frames of other generations that were refused.
    pub stale_refused: u64,
}

impl AbortHandle {
    /// The first reason stays.
    pub fn abort(&self, reason: &str) {
        let _ = self.reason.set(reason.to_owned());
        self.outlet.tell(Output::Aborted);
    }
}

impl Exchange {
    /// `ranks` are all of the generation in order, `pairs` the connected others by their place.
    pub(super) fn new(
        io: &Io,
        (term, ranks): (Term, Vec<RankId>),
        pairs: Vec<(u32, Pair)>,
        (plan, place): (Plan, Place),
        (memory, counters): (Option<Arc<Memory>>, Arc<Counters>),
    ) -> Self {
        let shape = Shape { values: plan.values, lanes: plan.lanes };
        let (outputs, heard) = channel();
        let outlet = Outlet { outputs, memory: memory.clone() };
        let shared = memory.map(|memory| {
            let folder = Folder::new(plan.fold.clone());
            Shared { memory, plan: plan.clone(), folder, ranks: ranks.clone(), operations: 0 }
        });
        let (driver, inputs) = unbounded_channel();
        let mut links: Vec<Option<Link>> = ranks.iter().map(|_| None).collect();
        let (mut tasks, mut writing) = (Vec::new(), Vec::new());
        for (position, pair) in pairs {
            let pair = (pair, position, plan.leaves_of(position).len());
            let (link, [writes, reads]) = Link::start(io, pair, term, &counters, &driver);
            links[position as usize] = Some(link);
            writing.push(writes);
            tasks.push(reads);
        }
        let operations = Driver::new(Operation::new(plan, term), (ranks, links), outlet.clone());
        tasks.push(io.spawn(operations.run(inputs)).abort_handle());
        Self {
            shape,
            place,
            driver,
            outputs: heard,
            shared,
            // The last sum stays with the caller while the next is made, and one more may wait for acknowledgements.
            sums: Pool::new(shape.values, 3),
            sum: None,
            last: None,
            gone: BTreeMap::new(),
            failed: None,
            abort: AbortHandle { reason: Arc::default(), outlet },
            counters,
            tasks,
            writing,
        }
    }

    pub fn place(&self) -> Place {
        self.place
    }

    pub fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    pub fn stats(&self) -> ExchangeStats {
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        ExchangeStats {
            sent_bytes: count(&self.counters.sent_bytes),
            received_bytes: count(&self.counters.received_bytes),
            stale_refused: count(&self.counters.stale_refused),
        }
    }

    /// The sum over all lanes of all ranks, in tree order: the same bits on every rank and for every world. Blocks until it is complete.
    /// All ranks call it for the same steps, in growing order; `sums` holds all owned lanes of the step, and `replica` the parameters that they
    /// were computed from: where those differ there is no sum (X12). Not for the network thread.
    pub fn all_reduce<'a>(
        &'a mut self,
        step: Step,
        sums: &'a mut LaneSums,
        replica: Option<Fingerprint>,
    ) -> Result<&'a [f32], ExchangeError> {
        assert!(!self.place.is_observer(), "X6: an observer has no lanes");
        assert_eq!(sums.values(), self.shape.values, "X6: vectors of the exchange's length");
        self.check_open(step)?;
        if self.place.world + self.place.observers == 1 {
            self.last = Some(step);
            return Ok(sums.finish()[0].values.read());
        }
        if self.shared.is_some() {
            return match self.sum_in_memory(step, sums, replica) {
                Ok(operation) => {
                    self.last = Some(step);
                    Ok(self.shared.as_ref().map_or(&[], |shared| shared.memory.sum(operation)))
                }
                Err(error) => Err(self.failed.insert(error).clone()),
            };
        }
        let partials = sums.freeze();
        self.sum(step, partials, replica)
    }

    /// Sums for the lanes of this rank's place, made where the exchange needs them.
    pub fn lane_sums(&self) -> LaneSums {
        let Place { world, position, .. } = self.place;
        let Shape { values, lanes } = self.shape;
        let owned = lanes::assign(lanes, world)[position as usize].clone();
        match &self.shared {
            Some(Shared { memory, plan, .. }) => {
                LaneSums::within(memory.clone(), plan.leaves_of(position).start, lanes, owned)
            }
            None => LaneSums::new(values, lanes, owned),
        }
    }

    /// Gives the partials, adds the own chunk of everybody's, and waits until all have added theirs (X14). The number of the operation, whose sum is
    /// in memory then.
    fn sum_in_memory(
        &mut self,
        step: Step,
        sums: &mut LaneSums,
        replica: Option<Fingerprint>,
    ) -> Result<u64, ExchangeError> {
        let shared = self.shared.as_ref().expect("X14: called where memory is shared");
        let (memory, position, operation) = (shared.memory.clone(), self.place.position, shared.operations + 1);
        for (partial, leaf) in sums.finish().iter().zip(shared.plan.leaves_of(position)) {
            if !partial.values.is_shared() {
                Buffer::shared(&memory, leaf).write(0..memory.values()).copy_from_slice(partial.values.read());
            }
        }
        let line = memory.line(position);
        line.describe(step, replica);
        line.given.store(operation, Ordering::Release);
        memory.ring();
        self.wait_for(&memory, |line| &line.given, operation)?;
        self.check_alike(step, replica)?;
        let shared = self.shared.as_mut().expect("X14: called where memory is shared");
        shared.add(operation);
        line.added.store(operation, Ordering::Release);
        memory.ring();
        self.wait_for(&memory, |line| &line.added, operation)?;
        self.shared.iter_mut().for_each(|shared| shared.operations = operation);
        Ok(operation)
    }

    /// Until all ranks have counted so far, or one that has not is gone.
    fn wait_for(
        &mut self,
        memory: &Memory,
        counter: fn(&Line) -> &AtomicU64,
        operation: u64,
    ) -> Result<(), ExchangeError> {
        let Self { outputs, gone, abort, place, .. } = self;
        let lags = |position: &u32| counter(memory.line(*position)).load(Ordering::Acquire) < operation;
        memory.wait(|| {
            while let Ok(output) = outputs.try_recv() {
                if let Output::Gone { position, why } = output {
                    gone.insert(position, why);
                }
            }
            if let Some(reason) = abort.reason.get() {
                return Some(Err(ExchangeError::Aborted { reason: reason.clone() }));
            }
            let mut lagging = (0..place.world).filter(lags).peekable();
            if lagging.peek().is_none() {
                return Some(Ok(()));
            }
            lagging.find_map(|position| gone.get(&position)).map(|why| Err(why.clone()))
        })
    }

    /// All sum the same step, of the same parameters (X12).
    fn check_alike(&self, step: Step, replica: Option<Fingerprint>) -> Result<(), ExchangeError> {
        let Some(Shared { memory, ranks, .. }) = &self.shared else { return Ok(()) };
        let told: Vec<_> =
            (0..).zip(ranks).map(|(position, peer)| (*peer, memory.line(position).described())).collect();
        let unexpected = |(peer, (theirs, compared)): &(RankId, (Step, Option<Fingerprint>))| {
            let source = Unexpected { step: *theirs, part: Part::Sum, offset: 0, count: 0 };
            let is_alike = *theirs == step && compared.is_some() == replica.is_some();
            (!is_alike).then_some(ExchangeError::Refused { peer: *peer, source })
        };
        if let Some(refused) = told.iter().find_map(unexpected) {
            return Err(refused);
        }
        if told.iter().all(|(_, (_, theirs))| *theirs == replica) {
            return Ok(());
        }
        let replicas = told.into_iter().filter_map(|(peer, (_, theirs))| Some((peer, theirs?))).collect();
        Err(ExchangeError::Differ { step, replicas })
    }

    /// The same sum at a rank that observes.
    pub fn observe(&mut self, step: Step) -> Result<&[f32], ExchangeError> {
        assert!(self.place.is_observer(), "X6: a rank with lanes gives them");
        self.check_open(step)?;
        self.sum(step, Vec::new(), None)
    }

    fn sum(&mut self, step: Step, partials: Vec<Bytes>, replica: Option<Fingerprint>) -> Result<&[f32], ExchangeError> {
        self.sum.take().into_iter().for_each(|spent| self.sums.put(spent));
        // An observer that takes no more sums holds their memory until another generation begins without it.
        let aborted = || self.abort.reason.get().is_some();
        let Some(sum) = self.sums.take_unless(aborted) else {
            self.check_aborted()?;
            unreachable!("X9: the wait ends with a buffer, or with a reason that stays");
        };
        let begin = Input::Begin { step, partials, replica, sum };
        match self.driver.send(begin).map_err(|_| ExchangeError::EndpointClosed).and_then(|()| self.wait()) {
            Ok(sum) => {
                self.last = Some(step);
                Ok(self.sum.insert(sum).read())
            }
            Err(error) => Err(self.failed.insert(error).clone()),
        }
    }

    /// No more steps in this generation: waits until no member lacks anything of ours, that is until each has ended its stream too, or the
    /// exchange is aborted. Blocks; not for the network thread. Dropping an exchange instead ends it at once.
    pub fn finish(&mut self) {
        let _ = self.driver.send(Input::Finish);
        let Place { world, position, .. } = self.place;
        let left = |gone: &BTreeMap<u32, ExchangeError>| {
            (0..world).any(|member| member != position && !gone.contains_key(&member))
        };
        while self.failed.is_none() && left(&self.gone) && self.abort.reason.get().is_none() {
            match self.outputs.recv().expect("X9: this exchange holds a sender itself") {
                Output::Gone { position, why } => {
                    self.gone.insert(position, why);
                }
                Output::Complete(_) | Output::Failed(_) | Output::Aborted => {}
            }
        }
    }

    /// No more steps in this generation after the last one, which all members have summed: what is queued is still written when the exchange
    /// is dropped. Members do not wait for observers, which may lack the sums of several steps.
    pub fn leave(&mut self) {
        self.writing.clear();
    }

    /// Ends at once. The last complete sum, with its step, for those who lack it in the next generation; none where nobody can lack it.
    pub fn into_last_sum(mut self) -> Option<(Step, Bytes)> {
        let shared = self.shared.as_ref().filter(|shared| shared.operations > 0);
        let in_memory = shared.map(|shared| shared.memory.clone().share_sum(shared.operations));
        self.last.zip(in_memory.or_else(|| self.sum.take().map(Buffer::share)))
    }

    fn check_open(&self, step: Step) -> Result<(), ExchangeError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.check_aborted()?;
        match self.last {
            Some(last) if step <= last => Err(ExchangeError::StepOrder { step, last }),
            _ => Ok(()),
        }
    }

    fn check_aborted(&self) -> Result<(), ExchangeError> {
        self.abort.reason.get().map_or(Ok(()), |reason| Err(ExchangeError::Aborted { reason: reason.clone() }))
    }

    /// Until the driver is done with the step that was begun.
    fn wait(&mut self) -> Result<Buffer, ExchangeError> {
        loop {
            let output = self.outputs.recv().expect("X9: this exchange holds a sender itself");
            self.check_aborted()?;
            match output {
                Output::Complete(sum) => return Ok(sum),
                Output::Failed(error) => return Err(error),
                Output::Gone { position, why } => {
                    self.gone.insert(position, why);
                }
                Output::Aborted => {}
            }
        }
    }
}

impl Shared {
    /// This rank's chunk of the sum, from the partials of all. All have given, and nobody else writes there.
    fn add(&mut self, operation: u64) {
        let Self { memory, plan, folder, .. } = self;
        let chunk = plan.chunk(plan.rank);
        let partials = (0..plan.leaves.len()).map(|leaf| Cursor::of(as_bytes(&memory.partial(leaf)[chunk.clone()])));
        let mut partials: Vec<Cursor<'_>> = partials.collect();
        // SAFETY: chunks are disjoint (X5), and this one is this rank's.
        folder.fold(&mut partials, unsafe { memory.sum_mut(operation, chunk) });
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.tasks.iter().chain(&self.writing).for_each(TaskHandle::abort);
    }
}
