//! Ranks that play environments for those that learn: this process as one of them, and a learner's pool of them. Wiring, and the life of such a rank: it
//! listens, plays what it is told to, and ends when it is released.
//!
//! W1: what is played follows from the order and the weights before it on the same stream; nothing of a job is only here, so that such a rank may die
//! at any time.

mod feed;
mod pool;
mod round;
mod stage;
mod tree;

use std::sync::Arc;

use stoke_jobs::rl::Player;
use tokio::sync::mpsc;

pub use pool::Pool;
pub use tree::Cast;

use self::feed::Feed;
use self::stage::{Part, Stage};
use crate::worker::{Assignment, Failure, Outside, Told, text_of};

/// Orders of all learners together that wait; more wait in their streams.
const PARTS_MAX: usize = 64;

/// Plays until the orders say stop. Blocks for as long as that takes.
pub(crate) fn run(given: Assignment, tell: &dyn Fn(Told)) -> Result<(), Failure> {
    let train = given.spec.training();
    let mut player = Player::of_spec(&given.start.spec, (train.seed, train.lanes))?;
    tell(Told::Loaded);
    let Assignment { orders, beat, outside, runtime, .. } = given;
    let Ok(Outside { mesh, vault: _vault }) = outside.recv() else { return Err(Failure::Stopped) };
    let (parts, mut waiting) = mpsc::channel::<Part>(PARTS_MAX);
    let mut entered = mesh.open_door();
    let io = mesh.io().clone();
    let feed = Feed::new(Arc::new(mesh), player.weights_len());
    let stage = Arc::new(Stage { lanes: train.lanes, feed, parts });
    io.spawn(async move {
        while let Some(connection) = entered.recv().await {
            tokio::spawn(stage.clone().receive(connection));
        }
    });
    let mut loaded = None;
    loop {
        let part = runtime.block_on(async {
            tokio::select! {
                biased;
                () = orders.stopped() => None,
                part = waiting.recv() => part,
            }
        });
        let Some(Part { lane, state, weights, reply }) = part else { return Err(Failure::Stopped) };
        let played = beat.piece(|| {
            if loaded != Some(weights.id) {
                player.load(weights.id.version, &weights.values)?;
                loaded = Some(weights.id);
            }
            player.play(lane, &state)
        });
        if let Err(error) = &played {
            tracing::warn!(lane, %error, "a lane could not be played");
        }
        reply.played(played.map_err(|error| text_of(&error)));
    }
}
