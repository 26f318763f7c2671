//! The task on the network thread that runs the operations: frames in, sums out. It adds where the packets were decrypted a moment ago, while
//! they lie in that core's cache and their memory can be used for the next ones; one piece at a time, so that no packet waits long.
//! Owns the links' sending ends, and what became of each peer; the caller's side is all_reduce.rs.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use bytes::Bytes;
use stoke_protocol::ids::{Fingerprint, Step};
use stoke_protocol::message::peer::Part;
use stoke_protocol::message::rank::RankId;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::watch;

use super::all_gather::AllGather;
use super::buffer::Buffer;
use super::error::ExchangeError;
use super::frame::Frame;
use super::link::Link;
use super::memory::Memory;
use super::operation::{Contribution, Operation, Outgoing};

/// What happens, in the order in which each sender says it.
#[derive(Debug)]
pub enum Input {
    /// From the caller: sum this step. Answered by `Complete` or `Failed`.
    Begin { step: Step, given: Contribution, sum: Buffer },
    /// From the caller: what it gives to this step comes by `Give`, then `Seal`. Answered as `Begin` is, then.
    Open { step: Step, compared: bool, sum: Buffer },
    /// From the caller: everything is given, and was computed from these parameters.
    Seal { replica: Option<Fingerprint> },
    /// From the caller: the host's sums of one piece of the values that `to` owns, as they go over the wire; or of one of its own, as they are.
    Give { to: u32, index: usize, sums: Vec<Bytes> },
    /// From the caller, between two sums: gather the parameters after this step, of which each rank has a range. Answered as `Begin` is.
    Gather { step: Step, ranges: Vec<Range<usize>>, values: Buffer },
    /// From a link.
    Frame { from: u32, frame: Frame },
    /// From a link: nothing more comes from the peer. It ended its stream (`PeerLeft`), or something went wrong.
    Gone { position: u32, why: ExchangeError },
    /// From the caller: the last sum was not applied.
    Forget,
    /// From the caller: no more steps. The own streams end after what is queued.
    Finish,
}

/// What the caller is told.
#[derive(Debug)]
pub enum Output {
    Complete(Buffer),
    Failed(ExchangeError),
    Gone {
        position: u32,
        why: ExchangeError,
    },
    /// From an abort handle: look at the reason that was set.
    Aborted,
}

/// The way to the caller, wherever it waits.
#[derive(Clone)]
pub struct Outlet {
    pub outputs: Sender<Output>,
    /// Where it waits for ranks of its machine.
    pub memory: Option<Arc<Memory>>,
}

impl Outlet {
    /// Nobody listens any more once the exchange is dropped.
    pub fn tell(&self, output: Output) {
        let is_awaited_there = matches!(output, Output::Gone { .. } | Output::Aborted);
        let _ = self.outputs.send(output);
        self.memory.iter().filter(|_| is_awaited_there).for_each(|memory| memory.ring());
    }
}

/// Where the ranks of a generation are: at the sum of a step (`true`), or at the gathering of the parameters before it.
type Turn = (Step, bool);

pub struct Driver {
    operation: Operation,
    gathering: AllGather,
    /// By place in the generation.
    peers: Vec<RankId>,
    /// None for this rank, for pairs that have nothing to say to each other, and after `Finish`.
    links: Vec<Option<Link>>,
    /// Frames of the next operation, from peers that were faster. At most a receive window a peer.
    ahead: VecDeque<(u32, Frame)>,
    gone: BTreeMap<u32, ExchangeError>,
    /// The first member that is gone, for a caller who waits for what is none of the exchange's.
    first_gone: watch::Sender<Option<ExchangeError>>,
    outlet: Outlet,
}

impl Driver {
    pub fn new(
        (operation, gathering): (Operation, AllGather),
        (peers, links): (Vec<RankId>, Vec<Option<Link>>),
        (outlet, first_gone): (Outlet, watch::Sender<Option<ExchangeError>>),
    ) -> Self {
        Self { operation, gathering, peers, links, ahead: VecDeque::new(), gone: BTreeMap::new(), first_gone, outlet }
    }

    /// Runs until the exchange is dropped.
    pub async fn run(mut self, mut inputs: UnboundedReceiver<Input>) {
        while let Some(input) = inputs.recv().await {
            if let Err(error) = self.take(input) {
                self.outlet.tell(Output::Failed(error));
            } else if let Some(values) = self.operation.take_complete().or_else(|| self.gathering.take_complete()) {
                self.outlet.tell(Output::Complete(values));
            }
        }
    }

    fn take(&mut self, input: Input) -> Result<(), ExchangeError> {
        match input {
            Input::Begin { step, given, sum } => {
                self.operation.begin(step, given, sum, &mut sender(&self.links));
                self.begun()
            }
            Input::Open { step, compared, sum } => {
                self.operation.open(step, compared, sum);
                self.begun()
            }
            Input::Seal { replica } => {
                self.operation.seal(replica, &mut sender(&self.links));
                self.check_alike()
            }
            Input::Give { to, index, sums } => {
                self.operation.give(to, index, sums, &mut sender(&self.links));
                Ok(())
            }
            Input::Gather { step, ranges, values } => {
                self.gathering.begin(step, ranges, values, &mut sender(&self.links));
                self.begun()
            }
            Input::Forget => {
                self.operation.forget();
                Ok(())
            }
            Input::Frame { from, frame } => self.receive(from, frame),
            Input::Gone { position, why } => self.lose(position, why),
            Input::Finish => {
                self.links.iter_mut().for_each(|link| drop(link.take()));
                Ok(())
            }
        }
    }

    /// Takes what came before.
    fn begun(&mut self) -> Result<(), ExchangeError> {
        for (from, frame) in std::mem::take(&mut self.ahead) {
            self.receive(from, frame)?;
        }
        self.check_alike()?;
        self.check_owed()
    }

    /// Nobody who is gone owes anything.
    fn check_owed(&self) -> Result<(), ExchangeError> {
        let missed = self.gone.iter().find(|(position, _)| self.is_owed_by(**position));
        missed.map_or(Ok(()), |(_, why)| Err(why.clone()))
    }

    fn receive(&mut self, from: u32, frame: Frame) -> Result<(), ExchangeError> {
        let is_sum = frame.header.part != Part::Parameters;
        if self.turn().is_none_or(|now| (frame.header.step, is_sum) > now) {
            self.ahead.push_back((from, frame));
            return Ok(());
        }
        let peer = self.peers[from as usize];
        let refused = |source| ExchangeError::Refused { peer, source };
        if !is_sum {
            return self.gathering.receive(from, &frame).map_err(refused);
        }
        self.operation.receive(from, frame, &mut sender(&self.links)).map_err(refused)?;
        self.check_alike()
    }

    /// None: nothing is under way.
    fn turn(&self) -> Option<Turn> {
        let sums = self.operation.is_active().then(|| (self.operation.step(), true));
        sums.or_else(|| self.gathering.is_active().then(|| (self.gathering.step(), false)))
    }

    fn is_owed_by(&self, peer: u32) -> bool {
        self.operation.is_active() && self.operation.is_owed_by(peer) || self.gathering.is_owed_by(peer)
    }

    fn check_alike(&self) -> Result<(), ExchangeError> {
        match self.operation.differing() {
            // Somebody is broken: nobody is to be voted out for it.
            Some(replicas) if replicas.windows(2).all(|pair| pair[0] == pair[1]) => {
                let peer = self.peers[self.operation.told_by().unwrap_or(0) as usize];
                Err(ExchangeError::State { peer, problem: "it said that replicas differ, and they do not".into() })
            }
            Some(replicas) => {
                let replicas = self.peers.iter().copied().zip(replicas).collect();
                Err(ExchangeError::Differ { step: self.operation.step(), replicas })
            }
            // Whoever is gone will not say what it has.
            None if self.operation.differs() => self.check_owed(),
            None => Ok(()),
        }
    }

    /// Who already gave everything may go: this step stands without it, the next one cannot.
    fn lose(&mut self, position: u32, why: ExchangeError) -> Result<(), ExchangeError> {
        if self.gone.contains_key(&position) {
            return Ok(());
        }
        self.gone.insert(position, why.clone());
        if self.gathering.is_of(position) {
            self.first_gone.send_if_modified(|gone| gone.is_none() && gone.replace(why.clone()).is_none());
        }
        self.outlet.tell(Output::Gone { position, why: why.clone() });
        if self.is_owed_by(position) { Err(why) } else { Ok(()) }
    }
}

fn sender(links: &[Option<Link>]) -> impl FnMut(Outgoing) {
    |out| {
        if let Some(link) = &links[out.to as usize] {
            link.send(out);
        }
    }
}
