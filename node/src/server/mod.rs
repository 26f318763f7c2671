//! A rank that serves: it waits for its gang, takes its place in the split, and computes batches until the generation is over. Wiring, and the way
//! from one generation to the next; what the worker is around it (`worker`) is the same as for a rank that trains.
//!
//! - `door` (async): questions of gateways in, answers out; text to tokens and back.
//! - `head`: the first rank's compute thread: which requests are computed, and what becomes of their tokens.
//! - `stage`: what every rank computes of a batch, alone or with the other parts of its stage.
//! - `links`: the streams between ranks; `split`: who has which layers; `model`: the files.
//!
//! B4 (I28): batches are computed only by a whole gang, in one generation; what was under way when it ended is computed again from its tokens.

mod door;
mod head;
mod links;
mod model;
mod split;
mod stage;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use stoke_protocol::ids::{Generation, Step, Term};
use stoke_protocol::message::rank::{Membership, RankEvent, RankId, StartRank};
use stoke_protocol::spec::Serve;
use tokio::runtime::Handle;

use self::door::{Asked, Door};
use self::head::Head;
use self::links::{Frame, Links};
use self::model::Model;
use self::split::Spot;
use self::stage::Worker;
use crate::exchange::Mesh;
use crate::worker::{Assignment, Beat, Failure, Orders, Outside, Told, text_of};

/// What the compute thread is told while it serves.
pub enum Event {
    Asked(Box<Asked>),
    /// Nobody waits for this answer any more.
    Dropped(u64),
    Frame(Frame),
    /// The connection to another rank is gone.
    Lost {
        term: Term,
        peer: RankId,
        error: String,
    },
    /// Another rank has left this generation.
    Left {
        term: Term,
    },
    /// There is another generation, or this rank is to stop.
    Superseded(Generation),
}

/// Why a rank does not go on in its generation.
#[derive(Debug)]
pub enum Gone {
    Lost {
        peer: RankId,
        error: String,
    },
    Left,
    Superseded,
    /// This rank cannot go on: a text for people.
    Failed(String),
}

/// What is around a rank that serves.
pub struct Post<'a> {
    pub start: StartRank,
    pub serve: Serve,
    pub spot: Spot,
    pub orders: Orders,
    pub runtime: Handle,
    pub mesh: Arc<Mesh>,
    pub beat: Beat,
    pub inbox: Receiver<Event>,
    pub notify: Sender<Event>,
    pub tell: &'a dyn Fn(Told),
}

/// Serves until the orders say stop. Blocks for as long as that takes.
pub fn run(given: Assignment, tell: &dyn Fn(Told)) -> Result<(), Failure> {
    let serve = given.spec.serve.clone().expect("a job that serves has [serve], as its check says");
    // This thread is one of them, for as long as the pool lives.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(serve.threads as usize).use_current_thread().build();
    let _pool = pool.map_err(|error| Failure::Error(format!("start compute threads: {error}")))?;
    let model = given.beat.piece(|| Model::open(&serve)).map_err(Failure::Permanent)?;
    let spot = Spot::of(given.start.id.rank.0, &serve);
    let mut worker = Worker::new(&model, &serve, spot).map_err(Failure::Permanent)?;
    let words = spot.is_head().then(|| model.words()).transpose().map_err(Failure::Permanent)?;
    tell(Told::Loaded);
    let Assignment { start, orders, beat, outside, runtime, .. } = given;
    let Ok(Outside { mesh, .. }) = outside.recv() else { return Err(Failure::Stopped) };
    let (notify, inbox) = channel();
    let mesh = Arc::new(mesh);
    let mut head = words.map(|words| {
        let door = Door::open(&mesh, words, notify.clone(), &serve, &model);
        Head::new(&serve, &model, door)
    });
    let post = Post { start, serve, spot, orders, runtime, mesh, beat, inbox, notify, tell };
    let mut membership = post.runtime.block_on(post.orders.next(Generation(0)))?;
    loop {
        let generation = membership.generation;
        let own = post.start.id;
        if !membership.members.iter().chain(membership.joining.iter()).any(|member| member.id == own) {
            tell(Told::Left);
            return Ok(());
        }
        if membership.joining.iter().any(|member| member.id == own) {
            // There is no state to fetch: the others may count on it.
            tell(Told::Event(RankEvent::Joined { generation, step: Step(generation.0) }));
        } else if is_whole(&membership, &post.serve) {
            let gone = post.generation(&membership, &mut worker, head.as_mut());
            match gone {
                Gone::Left | Gone::Superseded => {}
                Gone::Lost { peer, error } => {
                    tracing::warn!(%peer, %error, "lost a peer, waiting for another generation");
                    tell(Told::Event(RankEvent::PeerLost { generation, peer, error }));
                }
                Gone::Failed(error) => return Err(Failure::Error(error)),
            }
        }
        membership = post.runtime.block_on(post.orders.next(generation))?;
    }
}

/// B4: every place in the split has its rank.
fn is_whole(membership: &Membership, serve: &Serve) -> bool {
    let in_order = (0..).zip(membership.members.iter()).all(|(place, member)| member.id.rank.0 == place);
    in_order && membership.members.len() == serve.ranks() as usize
}

impl Post<'_> {
    /// From its forming to its end.
    fn generation(&self, membership: &Membership, worker: &mut Worker<'_>, head: Option<&mut Head>) -> Gone {
        let generation = membership.generation;
        let formed = self.runtime.block_on(async {
            tokio::select! {
                biased;
                _ = self.orders.superseded(generation) => Err(Gone::Superseded),
                formed = Links::form(&self.mesh, membership, self.spot, &self.notify) => formed.map_err(|error| match error {
                    crate::exchange::ExchangeError::PeerLost { peer, source } => Gone::Lost { peer, error: text_of(&source) },
                    crate::exchange::ExchangeError::PeerLeft { .. } => Gone::Left,
                    error => Gone::Failed(text_of(&error)),
                }),
            }
        });
        let links = match formed {
            Ok(links) => links,
            Err(gone) => return gone,
        };
        tracing::info!(%generation, stage = self.spot.stage, part = self.spot.part, "serving");
        let (orders, notify) = (self.orders.clone(), self.notify.clone());
        let watch = self.runtime.spawn(async move {
            // Of whatever kind: a batch is the smallest piece, and nothing of it is lost when it is computed again.
            let _ = orders.next(generation).await;
            let _ = notify.send(Event::Superseded(generation));
        });
        worker.enter(links);
        let gone = match head {
            Some(head) => head.lead(self, worker, generation),
            None => worker.follow(self),
        };
        watch.abort();
        worker.leave();
        gone
    }
}
