//! The two tasks of one peer on the network thread: one writes what the driver hands over, one reads frames for it. Owns the streams and the
//! receive window; never adds a number and never blocks.
//!
//! L4: a frame of another term ends the link before any of its values are read.
//! L5: at most `window` frames of a peer are held; a peer further ahead is not read, and QUIC or TCP holds it back.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use stoke_protocol::ids::Term;
use stoke_protocol::message::peer::{Part, TensorHeader};
use stoke_protocol::message::rank::RankId;
use stoke_protocol::transport::{BulkReceiver, Connection, Io, TransportError};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use super::bf16::Rounded;
use super::driver::Input;
use super::error::ExchangeError;
use super::frame::{Frame, Rope};
use super::mesh::Pair;
use super::operation::Outgoing;
use super::plan::PIECE_VALUES_MAX;
use super::wire::{Chunks, Receiver, Sender};

/// Frames of a peer that may be held besides two for each of its subtrees: with pieces of 256 KiB, 4 MiB. Fewer leave the network idle
/// while a fold waits for the slowest peer.
const WINDOW_FRAMES: usize = 16;

/// From the unclean end of a connection by TCP until the mesh's must have said why; and from the end of that until what was on its way by TCP must be here.
const VERDICT_MAX: Duration = Duration::from_secs(1);

/// Counts of one exchange.
#[derive(Debug, Default)]
pub struct Counters {
    /// Payload, without headers and packets.
    pub sent_bytes: AtomicU64,
    pub received_bytes: AtomicU64,
    /// Connections and frames of other generations that were refused.
    pub stale_refused: AtomicU64,
}

/// One peer, as the driver sees it. Dropping it ends the own stream after what is queued; the peer's may go on.
pub struct Link {
    /// Unbounded channels of small handles: an operation puts in one entry a piece, and no more than a pool's sums are under way.
    partials: UnboundedSender<Outgoing>,
    sums: UnboundedSender<Outgoing>,
}

/// The mesh beside a connection by TCP: the peer's stream there carries no values, and says what became of the peer.
struct Beside {
    mesh: BulkReceiver,
    connection: Connection,
    /// Told when TCP broke and the mesh lives.
    broken: Box<dyn FnOnce() + Send>,
}

/// What both tasks know.
#[derive(Clone)]
struct Side {
    peer: RankId,
    /// The peer's place in the generation.
    position: u32,
    term: Term,
    rounded: Rounded,
    counters: Arc<Counters>,
    inputs: UnboundedSender<Input>,
}

impl Link {
    /// Starts the tasks of a pair; the peer has this place in `term` and sends the sums of so many subtrees.
    pub fn start(
        io: &Io,
        (pair, position, subtrees): (Pair, u32, usize),
        (term, rounded): (Term, Rounded),
        counters: &Arc<Counters>,
        inputs: &UnboundedSender<Input>,
    ) -> (Self, [AbortHandle; 2]) {
        let Pair { peer, sender, receiver, tcp, .. } = pair;
        let (sender, receiver, beside) = match tcp {
            None => (Sender::Quic(sender), Receiver::Quic(receiver), None),
            Some((way, connection)) => {
                let (broken, mesh) = (Box::new(way.breaker()), receiver);
                let beside = Beside { mesh, connection, broken };
                (Sender::Tcp(way.sender, sender), Receiver::Tcp(way.receiver), Some(beside))
            }
        };
        let connection = beside.as_ref().map(|beside| beside.connection.clone());
        let side = Side { peer, position, term, rounded, counters: counters.clone(), inputs: inputs.clone() };
        let window = Arc::new(Semaphore::new(WINDOW_FRAMES + 2 * subtrees));
        let (partials, partials_out) = unbounded_channel();
        let (sums, sums_out) = unbounded_channel();
        let send = io.spawn(side.clone().send((sender, connection), sums_out, partials_out));
        let receive = io.spawn(side.receive(receiver, beside, window));
        (Self { partials, sums }, [send.abort_handle(), receive.abort_handle()])
    }

    /// Queues values. A lost link is reported as an input of the driver, not here.
    pub fn send(&self, out: Outgoing) {
        let _ = match out.header.part {
            Part::Partial(_) => self.partials.send(out),
            // No sum of a later step overtakes what this one was computed from: an observer reads none before it has all of this one.
            Part::Replica | Part::Sum | Part::CatchUp | Part::Parameters => self.sums.send(out),
        };
    }
}

impl Side {
    /// `connection`: the mesh's, if the values go by TCP: nobody reads there any more when it is over.
    async fn send(
        self,
        (mut stream, connection): (Sender, Option<Connection>),
        mut sums: UnboundedReceiver<Outgoing>,
        mut partials: UnboundedReceiver<Outgoing>,
    ) {
        let silenced = stream.silenced();
        let silenced = async {
            silenced.await;
            std::future::pending().await
        };
        let written = async {
            loop {
                // Sums first: they were just computed and lie in the cache, and the peer needs no memory for them.
                let out = tokio::select! {
                    biased;
                    Some(out) = sums.recv() => out,
                    Some(out) = partials.recv() => out,
                    else => return stream.finish().await,
                };
                self.counters.sent_bytes.fetch_add(out.values.len() as u64, Ordering::Relaxed);
                let written = stream.write(&out.header, out.values).await;
                if let Err(TransportError::Tcp(_)) = written {
                    // The reading side has an error too. The mesh's stream stays: by its end the peer would know that this rank has left.
                    return std::future::pending().await;
                }
                written?;
            }
        };
        let written = match connection {
            None => written.await,
            Some(connection) => tokio::select! {
                written = written => written,
                _ = connection.closed() => Ok(()),
                // It has ended the connection, as if the peer had.
                never = silenced => never,
            },
        };
        match written {
            // Why is known where the peer's word of it comes from.
            Err(TransportError::Tcp(_)) | Ok(()) => {}
            Err(error) => self.lost(error),
        }
    }

    async fn receive(self, mut stream: Receiver, beside: Option<Beside>, window: Arc<Semaphore>) {
        let read = self.read(&mut stream, window);
        let read = match beside {
            None => read.await,
            Some(beside) => beside.read(read).await,
        };
        match read {
            Ok(None) => self.gone(ExchangeError::PeerLeft { peer: self.peer }),
            Ok(Some(refused)) => self.gone(refused),
            Err(error) => self.lost(error),
        }
    }

    /// Until the peer's clean end, or a frame that is refused.
    async fn read(
        &self,
        stream: &mut Receiver,
        window: Arc<Semaphore>,
    ) -> Result<Option<ExchangeError>, TransportError> {
        while let Some(header) = stream.read_header().await? {
            if let Some(refused) = self.refusal(&header) {
                return Ok(Some(refused));
            }
            let place = window.clone().acquire_owned().await.expect("L5: the window is never closed");
            let start = usize::try_from(header.offset).unwrap_or(usize::MAX);
            let piece = start..start.saturating_add(header.count as usize);
            // Only what is summed is rounded.
            let rounded = if header.part == Part::Parameters { Rounded(0) } else { self.rounded };
            let bytes = rounded.bytes(&piece);
            let values = rounded.read(&piece, read_values(stream, bytes).await?);
            self.counters.received_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            self.tell(Input::Frame { from: self.position, frame: Frame { header, values, _place: Some(place) } });
        }
        Ok(None)
    }

    /// L4.
    fn refusal(&self, header: &TensorHeader) -> Option<ExchangeError> {
        let peer = self.peer;
        if header.term != self.term {
            self.counters.stale_refused.fetch_add(1, Ordering::Relaxed);
            return Some(ExchangeError::StaleTerm { peer, theirs: header.term, ours: self.term });
        }
        let (count, cap) = (header.count, PIECE_VALUES_MAX);
        (count as usize > cap).then_some(ExchangeError::TooLarge { peer, count, cap })
    }

    /// A stream that its sender gave up is of a peer that has left this generation; a connection that is over is of one that is lost.
    fn lost(&self, error: TransportError) {
        self.gone(if error.is_given_up() {
            ExchangeError::PeerLeft { peer: self.peer }
        } else {
            ExchangeError::PeerLost { peer: self.peer, source: Arc::new(error) }
        });
    }

    fn gone(&self, why: ExchangeError) {
        self.tell(Input::Gone { position: self.position, why });
    }

    /// Nobody listens any more once the exchange is dropped.
    fn tell(&self, input: Input) {
        let _ = self.inputs.send(input);
    }
}

impl Beside {
    /// What is read by TCP, unless the mesh says sooner, or better, what became of the peer.
    async fn read<T>(
        self,
        read: impl Future<Output = Result<Option<T>, TransportError>>,
    ) -> Result<Option<T>, TransportError> {
        let Self { mut mesh, connection, broken } = self;
        let has_left = AtomicBool::new(false);
        let watch = async {
            match mesh.read_chunk(1).await {
                Err(TransportError::Truncated) => {
                    // Its clean end: what it gave may still be on its way, as long as it is there.
                    has_left.store(true, Ordering::Relaxed);
                    let closed = connection.closed().await;
                    sleep(VERDICT_MAX).await;
                    TransportError::Closed(closed)
                }
                Err(error) => error,
                Ok(_) => TransportError::Ended,
            }
        };
        let (mut read, mut watch) = (pin!(read), pin!(watch));
        let error = tokio::select! {
            biased;
            read = &mut read => match read {
                Err(error @ TransportError::Tcp(_)) => error,
                read => return read,
            },
            error = &mut watch => return Err(error),
        };
        match timeout(VERDICT_MAX, watch).await {
            Ok(error) => Err(error),
            Err(_) if has_left.load(Ordering::Relaxed) => Ok(None),
            Err(_) => {
                broken();
                Err(error)
            }
        }
    }
}

pub(super) async fn read_values(stream: &mut impl Chunks, mut missing: usize) -> Result<Rope, TransportError> {
    let mut values = Rope::default();
    while missing > 0 {
        let chunk = stream.read_chunk(missing).await?;
        missing -= chunk.len();
        values.push(chunk);
    }
    Ok(values)
}
