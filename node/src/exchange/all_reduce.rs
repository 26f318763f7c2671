//! The exchange as the compute thread uses it: one call a step that gives the partial sums and returns the complete one. Owns the buffers
//! and the order of operations; waits while the driver works on the network thread. It lives for one generation.
//!
//! X9: after an error every later call fails with the same one: a generation that lost a rank is over.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use stoke_protocol::ids::{Fingerprint, Step, Term};
use stoke_protocol::message::rank::RankId;
use stoke_protocol::transport::Io;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::AbortHandle as TaskHandle;

use super::buffer::{Buffer, Pool};
use super::driver::{Driver, Input, Output};
use super::error::ExchangeError;
use super::lane_sum::LaneSums;
use super::link::{Counters, Link};
use super::mesh::Pair;
use super::operation::Operation;
use super::plan::Plan;

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
    wake: Sender<Output>,
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
        let _ = self.wake.send(Output::Aborted);
    }
}

impl Exchange {
    /// `ranks` are all of the generation in order, `pairs` the connected others by their place.
    pub(super) fn new(
        io: &Io,
        (term, ranks): (Term, Vec<RankId>),
        pairs: Vec<(u32, Pair)>,
        (shape, place): (Shape, Place),
        counters: Arc<Counters>,
    ) -> Self {
        let plan = Plan::new(shape.values, shape.lanes, (place.world, place.observers), place.position);
        let (wake, outputs) = channel();
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
        let operations = Driver::new(Operation::new(plan, term), (ranks, links), wake.clone());
        tasks.push(io.spawn(operations.run(inputs)).abort_handle());
        Self {
            shape,
            place,
            driver,
            outputs,
            // The last sum stays with the caller while the next is made, and one more may wait for acknowledgements.
            sums: Pool::new(shape.values, 3),
            sum: None,
            last: None,
            gone: BTreeMap::new(),
            failed: None,
            abort: AbortHandle { reason: Arc::default(), wake },
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
        let partials = sums.freeze();
        self.sum(step, partials, replica)
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
        self.last.zip(self.sum.take().map(Buffer::share))
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

impl Drop for Exchange {
    fn drop(&mut self) {
        self.tasks.iter().chain(&self.writing).for_each(TaskHandle::abort);
    }
}
