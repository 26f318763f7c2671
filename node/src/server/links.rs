//! The streams between the ranks of a serving gang in one generation. Owns who meets whom, and the tasks that carry frames between the network and
//! the compute thread's inbox; knows nothing of what the bytes mean.
//!
//! B10: ranks that meet have the same files, as far as samples of them show: answers of two models in one are worse than none.
//! B1: a frame of another term ends the generation before any of its bytes are used. B2: so many frames of a peer are held at most; one that is
//! further ahead is not read, and QUIC holds it back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;

use bytes::{Bytes, BytesMut};
use futures_util::future::try_join_all;
use stoke_protocol::ids::{Fingerprint, Term};
use stoke_protocol::message::peer::{Keeps, Standing};
use stoke_protocol::message::rank::{Membership, RankId};
use stoke_protocol::message::serve::StageHeader;
use stoke_protocol::transport::{BulkReceiver, BulkSender, TransportError};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::split::Spot;
use super::{Event, Gone};
use crate::exchange::{CONNECT_MAX, ExchangeError, Mesh, Pair};
use crate::worker::text_of;

/// B2.
const FRAMES_MAX: usize = 64;
/// A batch of the largest size with rows of the widest models that there are.
const FRAME_BYTES_MAX: usize = 256 << 20;

/// What a peer has sent.
pub struct Frame {
    /// The peer's rank in the gang.
    pub from: u32,
    pub header: StageHeader,
    pub bytes: Vec<u8>,
    _place: OwnedSemaphorePermit,
}

/// To a peer.
struct Way {
    queue: UnboundedSender<(StageHeader, Bytes)>,
    /// Bytes in the queue.
    queued: Arc<AtomicUsize>,
}

/// Dropping it leaves the generation: what is queued is lost, and peers see that this rank has left.
pub struct Links {
    term: Term,
    to: BTreeMap<u32, Way>,
    tasks: Vec<AbortHandle>,
}

impl Links {
    /// Meets every rank of the gang that this one has to do with. `membership` is whole: its members are the gang's ranks in order.
    pub async fn form(
        mesh: &Mesh,
        membership: &Membership,
        (spot, files): (Spot, Fingerprint),
        inbox: &Sender<Event>,
    ) -> Result<Self, Gone> {
        let term = membership.term();
        mesh.enter(term);
        let standing = Standing {
            term,
            step: None,
            has_sum: false,
            restores: None,
            files: Some(files),
            machine: None,
            door: None,
            tcp: None,
            keeps: Keeps::default(),
        };
        let deadline = Instant::now() + CONNECT_MAX;
        let meet = |rank: u32| async move {
            let member = membership.members[rank as usize];
            Ok::<_, ExchangeError>((rank, mesh.meet(&member, standing, deadline).await?))
        };
        let pairs = try_join_all(spot.peers().into_iter().map(meet)).await?;
        let (mut to, mut tasks) = (BTreeMap::new(), Vec::new());
        for (rank, Pair { peer, standing, sender, mut receiver, .. }) in pairs {
            if standing.files != Some(files) {
                let gone = differ(mesh.own(), peer);
                if matches!(gone, Gone::Left) {
                    // It must hear what this rank has before the stream ends.
                    let _ended = receiver.read_header::<StageHeader>().await;
                }
                return Err(gone);
            }
            let ((queue, taken), queued) = (unbounded_channel(), Arc::default());
            let side = Side { peer, rank, term, inbox: inbox.clone() };
            tasks.push(mesh.io().spawn(side.clone().write(sender, taken, Arc::clone(&queued))).abort_handle());
            to.insert(rank, Way { queue, queued });
            tasks.push(mesh.io().spawn(side.read(receiver)).abort_handle());
        }
        Ok(Self { term, to, tasks })
    }

    pub fn term(&self) -> Term {
        self.term
    }

    /// Queues bytes for a rank that this one has met. A lost link comes as an event, not here.
    pub fn send(&self, to: u32, header: StageHeader, bytes: Bytes) {
        let way = self.way(to);
        way.queued.fetch_add(bytes.len(), Ordering::Relaxed);
        let _ = way.queue.send((header, bytes));
    }

    /// Bytes that no connection has taken yet.
    pub fn queued(&self, to: u32) -> usize {
        self.way(to).queued.load(Ordering::Relaxed)
    }

    fn way(&self, to: u32) -> &Way {
        self.to.get(&to).expect("B3: frames go to ranks that were met")
    }
}

/// B10. The one that is there longer stays: the other one's files are what is new.
fn differ(own: RankId, peer: RankId) -> Gone {
    match own > peer {
        true => Gone::Failed(format!(
            "the model's files on this node differ from those of {peer}: fetch them again on both, and compare their sha256"
        )),
        false => Gone::Left,
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// What both tasks of a peer know.
#[derive(Clone)]
struct Side {
    peer: RankId,
    rank: u32,
    term: Term,
    inbox: Sender<Event>,
}

impl Side {
    async fn write(
        self,
        mut stream: BulkSender,
        mut queue: UnboundedReceiver<(StageHeader, Bytes)>,
        queued: Arc<AtomicUsize>,
    ) {
        let written = async {
            while let Some((header, bytes)) = queue.recv().await {
                let count = bytes.len();
                stream.write_header(&header).await?;
                stream.write_chunk(bytes).await?;
                queued.fetch_sub(count, Ordering::Relaxed);
            }
            Ok(())
        };
        if let Err(error) = written.await {
            self.lost(error);
        }
    }

    async fn read(self, mut stream: BulkReceiver) {
        let window = Arc::new(Semaphore::new(FRAMES_MAX));
        let read = async {
            while let Some(header) = stream.read_header::<StageHeader>().await? {
                if header.term != self.term || header.bytes as usize > FRAME_BYTES_MAX {
                    let why = format!("{} sent a frame of {} with {} bytes", self.peer, header.term, header.bytes);
                    return Ok(Some(why));
                }
                let place = window.clone().acquire_owned().await.expect("B2: the window is never closed");
                let bytes = take(&mut stream, header.bytes as usize).await?;
                self.tell(Event::Frame(Frame { from: self.rank, header, bytes, _place: place }));
            }
            Ok(None)
        };
        match read.await {
            Ok(None) => self.tell(Event::Left { term: self.term }),
            Ok(Some(error)) => self.tell(Event::Lost { term: self.term, peer: self.peer, error }),
            Err(error) => self.lost(error),
        }
    }

    fn lost(&self, error: TransportError) {
        let left = error.is_given_up();
        self.tell(if left {
            Event::Left { term: self.term }
        } else {
            Event::Lost { term: self.term, peer: self.peer, error: text_of(&error) }
        });
    }

    /// Nobody listens any more once the generation is over.
    fn tell(&self, event: Event) {
        let _ = self.inbox.send(event);
    }
}

/// Grows as bytes arrive: a header alone makes nobody allocate.
async fn take(stream: &mut BulkReceiver, missing: usize) -> Result<Vec<u8>, TransportError> {
    let mut bytes = Vec::with_capacity(missing.min(1 << 20));
    while bytes.len() < missing {
        let chunk = stream.read_chunk(missing - bytes.len()).await?;
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Little-endian, as they travel.
pub fn to_bytes<'a>(runs: impl IntoIterator<Item = &'a [f32]>) -> Bytes {
    let mut bytes = BytesMut::new();
    for values in runs {
        bytes.reserve(size_of_val(values));
        values.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
    }
    bytes.freeze()
}

/// The opposite of [`to_bytes`]; false: there are not as many.
pub fn fill(values: &mut [f32], bytes: &[u8]) -> bool {
    let fits = bytes.len() == size_of_val(values);
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*bytes);
    }
    fits
}

impl Spot {
    /// The ranks that this one has streams with: the same part of the stages beside it, the other parts of its own, and from the last stage the
    /// head, which takes its tokens. Where pages are kept also the ranks before and behind it, and everybody the head.
    pub fn peers(self) -> Vec<u32> {
        let Self { stage, part, stages, tensor, keeps } = self;
        let rank = |stage: u32, part: u32| stage * tensor + part;
        let mut peers: BTreeSet<u32> = (0..tensor).map(|other| rank(stage, other)).collect();
        peers.extend(stage.checked_sub(1).map(|before| rank(before, part)));
        peers.extend((stage + 1 < stages).then(|| rank(stage + 1, part)));
        let last = rank(stages - 1, 0);
        match self.rank() {
            0 => drop(peers.insert(last)),
            own if own == last => drop(peers.insert(0)),
            _ => {}
        }
        if keeps {
            peers.extend([self.before(), self.next(), 0]);
            peers.extend((0..self.ranks()).filter(|_| self.is_head()));
        }
        peers.remove(&self.rank());
        peers.into_iter().collect()
    }
}
