//! A rank that serves: it waits for its gang, takes its place in the split, and computes batches until the generation is over. Wiring, and the way
//! from one generation to the next; what the worker is around it (`worker`) is the same as for a rank that trains.
//!
//! - `door` (async): questions of gateways in, answers out; `generating`: text to tokens and back; `single`: models that need one rank.
//! - `head`: the first rank's compute thread: which requests are computed, and what becomes of their tokens.
//! - `stage`: what every rank computes of a batch, alone or with the other parts of its stage.
//! - `meter`: what a head has under way and has done.
//! - `resume`: how a generation begins with what is left of the one before; `kept`: which pages those are.
//! - `links`: the streams between ranks; `lines`: what has come by them; `split`: who has which layers; `model`: the files.
//! - `survey`: what a machine has of a model before anybody serves it, for the agent.
//!
//! B4 (I28): batches are computed only by a whole gang, in one generation; what was under way when it ended is computed again from its tokens.

mod door;
mod generating;
mod head;
mod kept;
mod lines;
mod links;
mod meter;
mod model;
mod resume;
mod single;
mod split;
mod stage;
mod survey;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use stoke_protocol::ids::{Fingerprint, Generation, Step, Term};
use stoke_protocol::message::rank::{Membership, RankEvent, RankId, StartRank};
use stoke_protocol::spec::{Serve, Task};
use tokio::runtime::Handle;

use self::door::Desk;
use self::generating::{Asked, Generating};
use self::head::Head;
use self::links::{Frame, Links};
pub use self::meter::Meter;
use self::model::Model;
pub use self::model::folder as model_folder;
use self::single::{Given, Single};
use self::split::Spot;
use self::stage::Worker;
pub use self::survey::survey;
use crate::exchange::{ExchangeError, Mesh};
use crate::worker::{Assignment, Beat, Failure, Orders, Outside, Told, text_of};

/// What the compute thread is told while it serves.
pub enum Event {
    Asked(Box<Asked>),
    /// For a model that answers at once.
    Given(Box<Given>),
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
    pub meter: Arc<Meter>,
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
    match serve.task {
        Task::Generate => run_decoder(given, serve, tell),
        Task::Embed | Task::Infer => run_single(given, serve, tell),
    }
}

fn run_decoder(given: Assignment, serve: Serve, tell: &dyn Fn(Told)) -> Result<(), Failure> {
    let model = given.beat.piece(|| Model::open(&serve)).map_err(Failure::Permanent)?;
    let spot = Spot::of(given.start.id.rank.0, &serve);
    let mut worker = Worker::new(&model, &serve, spot).map_err(Failure::Permanent)?;
    let words = spot.is_head().then(|| model.words()).transpose().map_err(Failure::Permanent)?;
    let post = Post::take(given, serve, tell)?;
    let mut head = words.map(|words| {
        let head = Head::new(&post.serve, &model, &words);
        let desk = Desk::Text(Arc::new(Generating::new(words, &model, post.notify.clone())));
        door::open(&post.mesh, (&post.serve, &post.meter), desk);
        head
    });
    post.serve(&mut |membership| {
        let links = match post.meet(membership, model.files) {
            Ok(links) => links,
            Err(gone) => return gone,
        };
        worker.enter(links);
        let gone = match &mut head {
            Some(head) => head.lead(&post, &mut worker, membership),
            None => worker.follow(&post),
        };
        worker.leave();
        gone
    })
}

fn run_single(given: Assignment, serve: Serve, tell: &dyn Fn(Told)) -> Result<(), Failure> {
    let weights = single::weights(&serve).map_err(Failure::Permanent)?;
    let single = given.beat.reading(|| Single::open(&serve, weights.as_ref()));
    let mut single = single.map_err(Failure::Permanent)?;
    let post = Post::take(given, serve, tell)?;
    door::open(&post.mesh, (&post.serve, &post.meter), single.desk(post.notify.clone()));
    post.serve(&mut |membership| {
        let generation = membership.generation;
        tell(Told::Event(RankEvent::Resumed { generation, step: Step(generation.0) }));
        single.lead(&post, generation)
    })
}

/// B4: every place in the split has its rank.
fn is_whole(membership: &Membership, serve: &Serve) -> bool {
    let in_order = (0..).zip(membership.members.iter()).all(|(place, member)| member.id.rank.0 == place);
    in_order && membership.members.len() == serve.ranks() as usize
}

impl<'a> Post<'a> {
    /// Says that the model is loaded, and waits for what is outside.
    fn take(given: Assignment, serve: Serve, tell: &'a dyn Fn(Told)) -> Result<Self, Failure> {
        tell(Told::Loaded);
        let Assignment { start, orders, beat, outside, runtime, .. } = given;
        let Ok(Outside { mesh, .. }) = outside.recv() else { return Err(Failure::Stopped) };
        let (notify, inbox) = channel();
        let (spot, meter) = (Spot::of(start.id.rank.0, &serve), Arc::new(Meter::default()));
        if spot.is_head() {
            tell(Told::Serving(meter.clone()));
        }
        Ok(Self { start, serve, spot, orders, runtime, mesh: Arc::new(mesh), beat, meter, inbox, notify, tell })
    }

    /// Through one generation after the other; `lead` stays in one until it is over.
    fn serve(&self, lead: &mut dyn FnMut(&Membership) -> Gone) -> Result<(), Failure> {
        let own = self.start.id;
        let mut membership = self.runtime.block_on(self.orders.next(Generation(0)))?;
        loop {
            let generation = membership.generation;
            if !membership.members.iter().chain(membership.joining.iter()).any(|member| member.id == own) {
                (self.tell)(Told::Left);
                return Ok(());
            }
            if membership.joining.iter().any(|member| member.id == own) {
                // There is no state to fetch: the others may count on it.
                (self.tell)(Told::Event(RankEvent::Joined { generation, step: Step(generation.0) }));
            } else if is_whole(&membership, &self.serve) {
                let watch = self.watch(generation);
                let gone = lead(&membership);
                watch.abort();
                match gone {
                    Gone::Left | Gone::Superseded => {}
                    Gone::Lost { peer, error } => {
                        tracing::warn!(%peer, %error, "lost a peer, waiting for another generation");
                        (self.tell)(Told::Event(RankEvent::PeerLost { generation, peer, error }));
                    }
                    Gone::Failed(error) => return Err(Failure::Error(error)),
                }
            }
            membership = self.runtime.block_on(self.orders.next(generation))?;
        }
    }

    /// Says to the inbox when a generation is over.
    fn watch(&self, generation: Generation) -> tokio::task::AbortHandle {
        let (orders, notify) = (self.orders.clone(), self.notify.clone());
        let watch = self.runtime.spawn(async move {
            // Of whatever kind: a batch is the smallest piece, and nothing of it is lost when it is computed again.
            let _ = orders.next(generation).await;
            let _ = notify.send(Event::Superseded(generation));
        });
        watch.abort_handle()
    }

    /// The streams of a generation.
    fn meet(&self, membership: &Membership, files: Fingerprint) -> Result<Links, Gone> {
        let generation = membership.generation;
        let formed = self.runtime.block_on(async {
            tokio::select! {
                biased;
                _ = self.orders.superseded(generation) => Err(Gone::Superseded),
                formed = Links::form(&self.mesh, membership, (self.spot, files), &self.notify) => formed,
            }
        })?;
        tracing::info!(%generation, stage = self.spot.stage, part = self.spot.part, "serving");
        Ok(formed)
    }
}

impl From<ExchangeError> for Gone {
    fn from(error: ExchangeError) -> Self {
        match error {
            ExchangeError::PeerLost { peer, source } => Self::Lost { peer, error: text_of(&source) },
            // It may be gone, and the coordinator too: what is loaded here is not given up for that.
            ref absent @ (ExchangeError::Absent { peer, .. } | ExchangeError::Unreachable { peer, .. }) => {
                Self::Lost { peer, error: text_of(absent) }
            }
            ExchangeError::PeerLeft { .. } => Self::Left,
            error => Self::Failed(text_of(&error)),
        }
    }
}
