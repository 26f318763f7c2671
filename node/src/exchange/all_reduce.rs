//! The exchange as the compute thread uses it: one call a step that gives the partial sums and returns the complete one. Owns the buffers
//! and the order of operations. The sums are computed here, on the thread that waits anyway; the network thread only moves bytes.
//!
//! X9: after an error every later call fails with the same one: a membership that lost a rank is over.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use stoke_protocol::ids::{Rank, Step};
use stoke_protocol::message::rank::RankId;
use stoke_protocol::transport::{CloseCode, Connection, Endpoint};
use tokio::task::AbortHandle as TaskHandle;

use super::buffer::{Buffer, Pool};
use super::error::ExchangeError;
use super::fold::Folder;
use super::frame::Frame;
use super::lane_sum::LaneSums;
use super::link::{Counters, Link, LinkEvent};
use super::operation::{Operation, Outgoing};
use super::plan::Plan;

/// How long a close waits for the peers to say that they have all they need.
const CLOSE_MAX: Duration = Duration::from_secs(5);

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
    plan: Plan,
    folder: Folder,
    /// By rank; none for this one.
    links: Vec<Option<Link>>,
    events: Receiver<LinkEvent>,
    /// Frames of the next operation, from peers that were faster. At most a receive window a peer.
    early: VecDeque<(u32, Frame)>,
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
    wake: Sender<LinkEvent>,
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
        let _ = self.wake.send(LinkEvent::Aborted);
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
        let (wake, events) = channel();
        let mut links: Vec<Option<Link>> = (0..world).map(|_| None).collect();
        for (rank, connection) in connections {
            let subtrees = plan.leaves_of[rank.0 as usize].len();
            let peer = (connection, rank, subtrees);
            links[rank.0 as usize] = Some(Link::start(endpoint.io(), peer, own.generation, &counters, &wake));
        }
        Self {
            endpoint,
            own,
            folder: Folder::new(plan.fold.clone()),
            links,
            events,
            early: VecDeque::new(),
            // The last sum stays with the caller while the next is made, and one more may wait for acknowledgements.
            sums: Pool::new(shape.values, 3),
            sum: None,
            last: None,
            gone: BTreeMap::new(),
            failed: None,
            abort: AbortHandle { reason: Arc::default(), wake },
            counters,
            tasks: Vec::new(),
            plan,
        }
    }

    /// Keeps a task of the endpoint for as long as the exchange lives.
    pub(super) fn with_task(mut self, task: TaskHandle) -> Self {
        self.tasks.push(task);
        self
    }

    pub fn world(&self) -> u32 {
        self.plan.world
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
        assert_eq!(sums.values(), self.plan.values, "X6: vectors of the exchange's length");
        self.check_open(step)?;
        if self.plan.world == 1 {
            self.last = Some(step);
            return Ok(sums.finish()[0].values.read());
        }
        self.sum.take().into_iter().for_each(|spent| self.sums.put(spent));
        let mut sum = self.sums.take();
        if let Err(error) = self.run(step, sums, &mut sum) {
            self.sums.put(sum);
            return Err(self.failed.insert(error).clone());
        }
        self.last = Some(step);
        Ok(self.sum.insert(sum).read())
    }

    /// Ends in order: waits until every peer has ended too, because until then it may lack values of ours. Blocks; not for the network
    /// thread. Dropping an exchange instead ends it at once.
    pub fn close(mut self) {
        self.links.iter_mut().flatten().for_each(Link::finish);
        let deadline = Instant::now() + CLOSE_MAX;
        let peers = self.links.iter().flatten().count();
        while self.failed.is_none() && self.gone.len() < peers && self.abort.reason.get().is_none() {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(LinkEvent::Gone { rank, why }) => {
                    self.gone.entry(rank).or_insert(why);
                }
                Ok(LinkEvent::Frame { .. } | LinkEvent::Aborted) => {}
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
        if let Some(why) = self.gone.values().next() {
            return Err(why.clone());
        }
        match self.last {
            Some(last) if step <= last => Err(ExchangeError::StepOrder { step, last }),
            _ => Ok(()),
        }
    }

    fn check_aborted(&self) -> Result<(), ExchangeError> {
        self.abort.reason.get().map_or(Ok(()), |reason| Err(ExchangeError::Aborted { reason: reason.clone() }))
    }

    fn run(&mut self, step: Step, sums: &mut LaneSums, sum: &mut Buffer) -> Result<(), ExchangeError> {
        let Self { links, plan, folder, early, .. } = self;
        let mut send = |out: Outgoing| {
            links[out.to as usize].as_ref().expect("X6: a plan sends to peers only").send(out);
        };
        let mut operation =
            Operation::begin((plan, folder), (self.own.generation, step), sums.finish(), sum, &mut send);
        let refused = |from, source| ExchangeError::Refused { rank: Rank(from), source };
        for (from, frame) in early.drain(..) {
            operation.receive(from, frame, &mut send).map_err(|error| refused(from, error))?;
        }
        while !operation.is_complete() {
            let event = self.events.recv().expect("X9: this exchange holds a sender itself");
            if let Some(reason) = self.abort.reason.get() {
                return Err(ExchangeError::Aborted { reason: reason.clone() });
            }
            match event {
                LinkEvent::Frame { from, frame } if frame.header.step > step => early.push_back((from.0, frame)),
                LinkEvent::Frame { from, frame } => {
                    operation.receive(from.0, frame, &mut send).map_err(|error| refused(from.0, error))?;
                }
                // Who already gave everything may go: the step stands without it, the next one does not.
                LinkEvent::Gone { rank, why } => {
                    let why = self.gone.entry(rank).or_insert(why);
                    if operation.is_owed_by(rank.0) {
                        return Err(why.clone());
                    }
                }
                LinkEvent::Aborted => {}
            }
        }
        Ok(())
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.tasks.iter().for_each(TaskHandle::abort);
    }
}
