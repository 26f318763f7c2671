//! The exchange as the compute thread uses it: one call a step that gives the partial sums and returns the complete one. Owns the buffers
//! and the order of operations; waits while the driver works on the network thread. It lives for one generation.
//!
//! X9: after an error every later call fails with the same one: a generation that lost a rank is over.

mod gathering;

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
use tokio::sync::mpsc::error::SendError;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::watch;
use tokio::task::AbortHandle as TaskHandle;

use super::all_gather::AllGather;
use super::bf16::{LeftOver, Rounded};
use super::buffer::{Buffer, Pool};
use super::driver::{Driver, Input, Outlet, Output};
use super::early::Early;
use super::error::ExchangeError;
use super::host::Host;
use super::lane_sum::LaneSums;
use super::link::{Counters, Link};
use super::memory::{Line, Memory};
use super::mesh::Pair;
use super::operation::{Contribution, Operation, Unexpected, bytes_of};
use super::plan::Plan;

/// What is summed: equal on every rank, or frames are refused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shape {
    /// Values of the flat vector.
    pub values: usize,
    /// How many of them, the last, are no gradients.
    pub tail: usize,
    pub lanes: u32,
    /// Whether gradients go between machines as bf16 (X17).
    pub rounded: bool,
    /// Whether some are known long before others, so that it pays to give them then ([`Exchange::give_early`]).
    pub early: bool,
}

/// All ranks of one generation, connected.
pub struct Exchange {
    shape: Shape,
    place: Place,
    driver: UnboundedSender<Input>,
    outputs: Receiver<Output>,
    /// The memory that this rank shares with others of its machine. If all are there, they sum there, and the driver only tells who is gone.
    host: Option<Host>,
    /// Where values are rounded on the wire: what that has left over of what this rank gives for its host.
    rounding: Option<Rounding>,
    /// Where values leave before all are computed.
    early: Option<Early>,
    sums: Pool,
    /// The last complete sum.
    sum: Option<Buffer>,
    last: Option<Step>,
    /// Parameters that were gathered since.
    gathered: Option<Buffer>,
    /// Peers from which nothing more comes.
    gone: BTreeMap<u32, ExchangeError>,
    first_gone: watch::Receiver<Option<ExchangeError>>,
    failed: Option<ExchangeError>,
    abort: AbortHandle,
    counters: Arc<Counters>,
    /// They end with the exchange.
    tasks: Vec<TaskHandle>,
    /// Those that write to peers; after `leave` they end when everything is written.
    writing: Vec<TaskHandle>,
}

struct Rounding {
    plan: Plan,
    left_over: LeftOver,
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

    fn is_set(&self) -> bool {
        self.reason.get().is_some()
    }

    fn check(&self) -> Result<(), ExchangeError> {
        self.reason.get().map_or(Ok(()), |reason| Err(ExchangeError::Aborted { reason: reason.clone() }))
    }
}

impl Exchange {
    /// `ranks` are all of the generation in order, `pairs` the connected others by their place.
    pub(super) fn new(
        io: &Io,
        (term, ranks): (Term, Vec<RankId>),
        pairs: Vec<(u32, Pair)>,
        (plan, place, shape): (Plan, Place, Shape),
        (memory, counters): (Option<Arc<Memory>>, Arc<Counters>),
    ) -> Self {
        // Ranks of one machine have no wire.
        let rounded = if shape.rounded && plan.is_spread() { shape.values - shape.tail } else { 0 };
        // Ranks that share memory add there when all have given.
        let early = (shape.early && plan.is_spread() && plan.is_flat()).then(|| Early::new(plan.clone()));
        let (outputs, heard) = channel();
        let (gone, first_gone) = watch::channel(None);
        let outlet = Outlet { outputs, memory: memory.clone() };
        let rounding = (rounded > 0).then(|| Rounding::new(plan.clone(), Rounded(rounded)));
        let host = memory.map(|memory| Host::new(memory, plan.clone(), ranks.clone()));
        let (driver, inputs) = unbounded_channel();
        let mut links: Vec<Option<Link>> = ranks.iter().map(|_| None).collect();
        let (mut tasks, mut writing) = (Vec::new(), Vec::new());
        for (position, pair) in pairs {
            let pair = (pair, position, plan.heard_from(position).len());
            let frames = (term, Rounded(rounded));
            let (link, [writes, reads]) = Link::start(io, pair, frames, &counters, &driver);
            links[position as usize] = Some(link);
            writing.push(writes);
            tasks.push(reads);
        }
        let gathering = AllGather::new(plan.clone(), term);
        let operation = Operation::new(plan, term, Rounded(rounded));
        let operations = Driver::new((operation, gathering), (ranks, links), (outlet.clone(), gone));
        tasks.push(io.spawn(operations.run(inputs)).abort_handle());
        Self {
            shape,
            place,
            driver,
            outputs: heard,
            host,
            rounding,
            early,
            // The last sum stays with the caller while the next is made, and two more may wait for acknowledgements.
            sums: Pool::new(shape.values, 4),
            sum: None,
            last: None,
            gathered: None,
            gone: BTreeMap::new(),
            first_gone,
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

    /// The sum over all lanes of all ranks, in tree order: the same bits on every rank and for every world, unless they are rounded (X17). Blocks until it is complete.
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
        if self.host.is_some() {
            return match self.sum_in_memory(step, sums, replica) {
                Ok(operation) => {
                    self.last = Some(step);
                    Ok(self.host.as_ref().map_or(&[], |host| host.memory.sum(operation)))
                }
                Err(error) => Err(self.failed.insert(error).clone()),
            };
        }
        if self.early.is_some() {
            sums.finish();
            if !self.early.as_ref().is_some_and(|early| early.is_open(step)) {
                let sum = self.spare_sum()?;
                self.open(step, replica.is_some(), sum);
            }
            self.give_complete(sums);
            return self.sealed(step, replica);
        }
        self.sum(step, Contribution { partials: sums.freeze(), replica, differs: false })
    }

    /// Gives what is complete of a step whose last lane is still computed; [`Exchange::all_reduce`] gives the rest. `compared`: whether it will be called with
    /// the parameters. Does not wait for others: what cannot be given now is given then. An error is the sum's.
    pub fn give_early(&mut self, step: Step, compared: bool, sums: &mut LaneSums) {
        let Some(early) = &self.early else { return };
        if self.check_open(step).is_err() {
            return;
        }
        if !early.is_open(step) {
            self.sums.put_all(self.gathered.take());
            let Some(sum) = self.sums.take_unless(|| true) else { return };
            self.open(step, compared, sum);
        }
        self.give_complete(sums);
    }

    /// Gives all pieces of the open step that are complete and were not given.
    fn give_complete(&mut self, sums: &mut LaneSums) {
        let Self { early: Some(early), rounding, driver, place, .. } = self else { return };
        while let Some((to, index, sums)) = early.next(sums) {
            let sums = match rounding {
                Some(rounding) if to != place.position => rounding.round(to, index, sums.iter().map(|sum| &sum[..])),
                _ => sums,
            };
            let _ = driver.send(Input::Give { to, index, sums });
        }
    }

    /// Sums for the lanes of this rank's place, made where the exchange needs them.
    pub fn lane_sums(&self) -> LaneSums {
        let Place { world, position, .. } = self.place;
        let Shape { values, lanes, .. } = self.shape;
        let alone = || LaneSums::new(values, lanes, lanes::assign(lanes, world)[position as usize].clone());
        let sums = self.host.as_ref().map_or_else(alone, Host::lane_sums);
        if self.early.is_some() { sums.taken_early() } else { sums }
    }

    /// Gives the partials, adds the own pieces of everybody's, and waits until all of the host have added theirs (X14). The number of the operation, whose
    /// sum is in memory then.
    fn sum_in_memory(
        &mut self,
        step: Step,
        sums: &mut LaneSums,
        replica: Option<Fingerprint>,
    ) -> Result<u64, ExchangeError> {
        let operation = self.host().give(step, sums, replica);
        self.wait_for(|line| &line.given, operation)?;
        let differs = self.differs(step, replica)?;
        if self.host().plan.is_spread() {
            self.sum_with_others((step, operation), (replica, differs))?;
        } else if differs {
            let described = self.host().described().into_iter();
            let replicas = described.filter_map(|(peer, (_, theirs))| Some((peer, theirs?))).collect();
            return Err(ExchangeError::Differ { step, replicas });
        } else {
            self.host().add(operation);
        }
        self.host().added(operation);
        self.wait_for(|line| &line.added, operation)?;
        (self.host().operations, self.host().summed) = (operation, Some(operation));
        Ok(operation)
    }

    fn host(&mut self) -> &mut Host {
        self.host.as_mut().expect("X14: called where memory is shared")
    }

    /// Gives other hosts this one's sums of their ranks' values, and writes the sums that they give, and of this rank's own values, where the host
    /// reads them.
    fn sum_with_others(
        &mut self,
        (step, operation): (Step, u64),
        (replica, differs): (Option<Fingerprint>, bool),
    ) -> Result<(), ExchangeError> {
        let Self { host, rounding, driver, abort, .. } = self;
        let host = host.as_mut().expect("X14: called where memory is shared");
        let aborted = || abort.is_set();
        let Some(sum) = host.take_sum(operation, aborted) else {
            return Err(abort.check().expect_err("X8: the wait ends with a buffer, or with a reason that stays"));
        };
        let given = Contribution { partials: host.partials(), replica, differs };
        driver.send(Input::Begin { step, given, sum }).map_err(|_| ExchangeError::EndpointClosed)?;
        if !differs {
            let give = |to, index, sums: Vec<Bytes>| {
                let sums = match rounding {
                    Some(rounding) => rounding.round(to, index, sums.iter().map(|sum| &sum[..])),
                    None => sums,
                };
                driver.send(Input::Give { to, index, sums }).is_ok()
            };
            if !host.fold_for_others(aborted, give) {
                abort.check()?;
                return Err(ExchangeError::EndpointClosed);
            }
        }
        let sum = self.wait()?;
        self.host().put_sum(operation, sum);
        Ok(())
    }

    /// Until all of the host have counted so far, or one that has not is gone.
    fn wait_for(&mut self, counter: fn(&Line) -> &AtomicU64, operation: u64) -> Result<(), ExchangeError> {
        let Self { outputs, gone, abort, host, .. } = self;
        let host = host.as_ref().expect("X14: called where memory is shared");
        let lags = |(_, line): &(u32, &Line)| counter(line).load(Ordering::Acquire) < operation;
        host.memory.wait(|| {
            while let Ok(output) = outputs.try_recv() {
                if let Output::Gone { position, why } = output {
                    gone.insert(position, why);
                }
            }
            if let Err(aborted) = abort.check() {
                return Some(Err(aborted));
            }
            let mut lagging = host.lines().filter(lags).peekable();
            if lagging.peek().is_none() {
                return Some(Ok(()));
            }
            lagging.find_map(|(position, _)| gone.get(&position)).map(|why| Err(why.clone()))
        })
    }

    /// Whether the host's ranks have different parameters (X12). All sum the same step.
    fn differs(&mut self, step: Step, replica: Option<Fingerprint>) -> Result<bool, ExchangeError> {
        let described = self.host().described();
        for (peer, (theirs, compared)) in &described {
            if *theirs != step || compared.is_some() != replica.is_some() {
                let source = Unexpected { step: *theirs, part: Part::Sum, offset: 0, count: 0 };
                return Err(ExchangeError::Refused { peer: *peer, source });
            }
        }
        Ok(described.iter().any(|(_, (_, theirs))| *theirs != replica))
    }

    /// The same sum at a rank that observes. `compared`: whether members compare the parameters that it is of.
    pub fn observe(&mut self, step: Step, compared: bool) -> Result<&[f32], ExchangeError> {
        assert!(self.place.is_observer(), "X6: a rank with lanes gives them");
        self.check_open(step)?;
        if self.early.is_none() {
            return self.sum(step, Contribution::default());
        }
        let sum = self.spare_sum()?;
        self.open(step, compared, sum);
        self.sealed(step, None)
    }

    fn sum(&mut self, step: Step, given: Contribution) -> Result<&[f32], ExchangeError> {
        let sum = self.spare_sum()?;
        let begun = self.begin(step, given, sum).map_err(|_| ExchangeError::EndpointClosed);
        self.summed(step, begun)
    }

    /// The sum of a step to which this rank has given everything.
    fn sealed(&mut self, step: Step, replica: Option<Fingerprint>) -> Result<&[f32], ExchangeError> {
        let sealed = self.driver.send(Input::Seal { replica }).map_err(|_| ExchangeError::EndpointClosed);
        self.summed(step, sealed)
    }

    /// A driver that is gone is noticed when the step is sealed.
    fn open(&mut self, step: Step, compared: bool, sum: Buffer) {
        self.early.as_mut().expect("X8: steps are opened where values go early").open(step);
        let _ = self.driver.send(Input::Open { step, compared, sum });
    }

    /// Memory for a sum.
    fn spare_sum(&mut self) -> Result<Buffer, ExchangeError> {
        self.sums.put_all(self.gathered.take());
        // An observer that takes no more sums holds their memory until another generation begins without it.
        let Some(sum) = self.sums.take_unless(|| self.abort.is_set()) else {
            self.abort.check()?;
            unreachable!("X9: the wait ends with a buffer, or with a reason that stays");
        };
        Ok(sum)
    }

    /// Waits for the sum of a step that was begun.
    fn summed(&mut self, step: Step, begun: Result<(), ExchangeError>) -> Result<&[f32], ExchangeError> {
        match begun.and_then(|()| self.wait()) {
            Ok(sum) => {
                self.last = Some(step);
                // Until then it was for those who lack it.
                self.sums.put_all(self.sum.take());
                Ok(self.sum.insert(sum).read())
            }
            Err(error) => Err(self.failed.insert(error).clone()),
        }
    }

    /// Begins a step of a rank that shares no memory. What is rounded is so here, piece by piece, while those before are on their way.
    fn begin(&mut self, step: Step, given: Contribution, sum: Buffer) -> Result<(), SendError<Input>> {
        let partials = given.partials.clone();
        self.driver.send(Input::Begin { step, given, sum })?;
        let Some(rounding) = self.rounding.as_mut().filter(|_| !partials.is_empty()) else { return Ok(()) };
        let pieces: Vec<(u32, usize)> = rounding.plan.given().collect();
        for (to, index) in pieces {
            let piece = bytes_of(&rounding.plan.piece(to, index));
            let sums = rounding.round(to, index, partials.iter().map(|partial| &partial[piece.clone()]));
            self.driver.send(Input::Give { to, index, sums })?;
        }
        Ok(())
    }

    /// The last sum was not applied, at any rank: what its rounding has left over counts for nothing.
    pub fn forget(&mut self) {
        if let Some(rounding) = &mut self.rounding {
            rounding.left_over.forget();
            let _ = self.driver.send(Input::Forget);
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
        while self.failed.is_none() && left(&self.gone) && !self.abort.is_set() {
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
        let summed = self.host.as_ref().and_then(|host| Some((&host.memory, host.summed?)));
        let in_memory = summed.map(|(memory, operation)| Buffer::sum(memory, operation).share());
        self.last.zip(in_memory.or_else(|| self.sum.take().map(Buffer::share)))
    }

    /// Waits until a member is gone: nothing more comes from it in this generation.
    pub fn left(&self) -> impl Future<Output = ExchangeError> + use<> {
        let mut gone = self.first_gone.clone();
        async move {
            match gone.wait_for(Option::is_some).await.map(|gone| gone.clone()) {
                Ok(Some(why)) => why,
                // Nobody can tell any more: the exchange has ended.
                Ok(None) | Err(_) => std::future::pending().await,
            }
        }
    }

    fn check_open(&self, step: Step) -> Result<(), ExchangeError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.abort.check()?;
        match self.last {
            Some(last) if step <= last => Err(ExchangeError::StepOrder { step, last }),
            _ => Ok(()),
        }
    }

    /// Until the driver is done with the step that was begun.
    fn wait(&mut self) -> Result<Buffer, ExchangeError> {
        loop {
            let output = self.outputs.recv().expect("X9: this exchange holds a sender itself");
            self.abort.check()?;
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

impl Rounding {
    fn new(plan: Plan, rounded: Rounded) -> Self {
        let left_over = LeftOver::new(rounded, plan.values, plan.host_sums.len());
        Self { plan, left_over }
    }

    fn round<'a>(&mut self, to: u32, index: usize, sums: impl Iterator<Item = &'a [u8]>) -> Vec<Bytes> {
        let piece = self.plan.piece(to, index);
        sums.enumerate().map(|(number, sum)| self.left_over.give(number, &piece, sum)).collect()
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.tasks.iter().chain(&self.writing).for_each(TaskHandle::abort);
    }
}
