//! The exchange as the compute thread uses it: one call a step that gives the partial sums and returns the complete one. Owns the buffers
//! and the order of operations; waits while the driver works on the network thread.
//!
//! X9: after an error every later call fails with the same one: a membership that lost a rank is over.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use stoke_protocol::ids::{Rank, Step};
use stoke_protocol::message::rank::RankId;
use stoke_protocol::transport::{CloseCode, Connection, Endpoint};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::AbortHandle as TaskHandle;

use super::buffer::{Buffer, Pool};
use super::driver::{Driver, Input, Output};
use super::error::ExchangeError;
use super::lane_sum::LaneSums;
use super::link::{Counters, Link};
use super::operation::Operation;
use super::plan::Plan;

/// How long a close waits for the peers to say that they have all they need. Until then the last sums may still be on their way over a slow
/// network; a dead peer is noticed long before by its connection.
const CLOSE_MAX: Duration = Duration::from_secs(60);

/// What is summed: equal on every rank, or frames are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Values of the flat vector.
    pub values: usize,
    pub lanes: u32,
}

/// All ranks of one generation, connected.
pub struct Exchange {
    endpoint: Endpoint,
    own: RankId,
    shape: Shape,
    world: u32,
    driver: UnboundedSender<Input>,
    outputs: Receiver<Output>,
    sums: Pool,
    /// The last complete sum.
    sum: Option<Buffer>,
    last: Option<Step>,
    /// Peers from which nothing more comes.
    gone: BTreeMap<Rank, ExchangeError>,
    failed: Option<ExchangeError>,
    abort: AbortHandle,
    counters: Arc<Counters>,
    tasks: Vec<TaskHandle>,
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
    /// `connections` are all other ranks of the generation.
    pub(super) fn new(
        endpoint: Endpoint,
        own: RankId,
        connections: BTreeMap<Rank, Connection>,
        shape: Shape,
        counters: Arc<Counters>,
    ) -> Self {
        let world = connections.len() as u32 + 1;
        let plan = Plan::new(shape.values, shape.lanes, world, own.rank.0);
        let (wake, outputs) = channel();
        let (driver, inputs) = unbounded_channel();
        let (mut links, mut tasks): (Vec<Option<Link>>, Vec<TaskHandle>) =
            ((0..world).map(|_| None).collect(), Vec::new());
        for (rank, connection) in connections {
            let peer = (connection, rank, plan.leaves_of[rank.0 as usize].len());
            let (link, running) = Link::start(endpoint.io(), peer, own.generation, &counters, &driver);
            links[rank.0 as usize] = Some(link);
            tasks.extend(running);
        }
        let operations = Driver::new(Operation::new(plan, own.generation), links, wake.clone());
        tasks.push(endpoint.io().spawn(operations.run(inputs)).abort_handle());
        Self {
            endpoint,
            own,
            shape,
            world,
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
        }
    }

    /// Keeps a task of the endpoint for as long as the exchange lives.
    pub(super) fn with_task(mut self, task: TaskHandle) -> Self {
        self.tasks.push(task);
        self
    }

    pub fn world(&self) -> u32 {
        self.world
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
    /// All ranks call it for the same steps, in growing order; `sums` holds all owned lanes of the step. Not for the network thread.
    pub fn all_reduce<'a>(&'a mut self, step: Step, sums: &'a mut LaneSums) -> Result<&'a [f32], ExchangeError> {
        assert_eq!(sums.values(), self.shape.values, "X6: vectors of the exchange's length");
        self.check_open(step)?;
        if self.world == 1 {
            self.last = Some(step);
            return Ok(sums.finish()[0].values.read());
        }
        self.sum.take().into_iter().for_each(|spent| self.sums.put(spent));
        let begin = Input::Begin { step, partials: sums.freeze(), sum: self.sums.take() };
        match self.driver.send(begin).map_err(|_| ExchangeError::EndpointClosed).and_then(|()| self.wait()) {
            Ok(sum) => {
                self.last = Some(step);
                Ok(self.sum.insert(sum).read())
            }
            Err(error) => Err(self.failed.insert(error).clone()),
        }
    }

    /// Ends in order: waits until every peer has ended too, because until then it may lack values of ours. Blocks; not for the network
    /// thread. Dropping an exchange instead ends it at once.
    pub fn close(mut self) {
        let _ = self.driver.send(Input::Finish);
        let deadline = Instant::now() + CLOSE_MAX;
        let peers = self.world as usize - 1;
        while self.failed.is_none() && self.gone.len() < peers && self.abort.reason.get().is_none() {
            match self.outputs.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Output::Gone { rank, why }) => {
                    self.gone.insert(rank, why);
                }
                Ok(Output::Complete(_) | Output::Failed(_) | Output::Aborted) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    tracing::warn!(own = %self.own, "peers did not end their streams in time");
                    break;
                }
            }
        }
        let endpoint = self.endpoint.clone();
        self.endpoint.io().spawn(async move { endpoint.close(CloseCode::Done, "exchange is over").await });
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
                Output::Gone { rank, why } => {
                    self.gone.insert(rank, why);
                }
                Output::Aborted => {}
            }
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.tasks.iter().for_each(TaskHandle::abort);
    }
}
