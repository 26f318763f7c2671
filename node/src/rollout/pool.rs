//! A learner's pool of ranks that play: a connection to each of them, on which what [`Round`] decides is sent, and what comes back is told to it. The learner's thread
//! takes what is there; tasks of the network's runtime send and receive.
//!
//! W3: nobody is waited for who is clearly late: the learner plays the lane itself, which gives the same.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use stoke_jobs::Broadcast;
use stoke_jobs::rl::{Found, PlayOrder, PlayedBytes, Rollouts};
use stoke_protocol::message::peer::{FromPlayer, ToPlayer};
use stoke_protocol::message::rank::{Member, RankId};
use stoke_protocol::transport::{BulkSender, Connection, TransportError};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::round::{Lane, Next, Round};
use super::stage::STATE_BYTES_MAX;
use super::tree::Cast;
use crate::exchange::Mesh;
use crate::worker::Orders;

/// Of a trajectory.
const TRAJECTORY_BYTES_MAX: u32 = 256 << 20;
/// A player is late after so many times the longest that one has taken so far.
const LATE: u32 = 4;
const LATE_MIN: Duration = Duration::from_millis(50);
/// Before the first one has come back.
const FIRST_MAX: Duration = Duration::from_secs(5);
/// Between two attempts to reach a player.
const RETRY: Duration = Duration::from_millis(200);

pub struct Pool {
    shared: Arc<Shared>,
    tending: AbortHandle,
}

struct Shared {
    round: Mutex<Round>,
    /// Something has come back, or will not.
    returned: Condvar,
    /// A player may be sent something.
    due: Notify,
}

impl Shared {
    fn round(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something is told to the round.
    fn tell(&self, told: impl FnOnce(&mut Round)) {
        told(&mut self.round());
        self.returned.notify_all();
        self.due.notify_waiters();
    }
}

impl Pool {
    /// Tends whoever the orders name, for as long as the pool lives.
    pub fn start(mesh: Arc<Mesh>, orders: Orders) -> Self {
        let round = Mutex::new(Round::new(mesh.own()));
        let shared = Arc::new(Shared { round, returned: Condvar::new(), due: Notify::new() });
        let io = mesh.io().clone();
        let tending = io.spawn(tend_all(shared.clone(), mesh, orders)).abort_handle();
        Self { shared, tending }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.tending.abort();
    }
}

impl Rollouts for Pool {
    fn begin(&mut self, version: u64, weights: &[f32], orders: Vec<PlayOrder>) {
        self.shared.tell(|round| round.begin(version, weights, orders));
    }

    /// W3.
    fn find(&mut self, lane: u32) -> Found {
        let mut round = self.shared.round();
        loop {
            let since = match round.find(lane) {
                Lane::Found(found) => return found,
                Lane::Sent(since) => since,
            };
            let late = round.longest().map_or(FIRST_MAX, |longest| (longest * LATE).max(LATE_MIN));
            let left = late.saturating_sub(since);
            if left.is_zero() {
                round.give_up(lane);
                return Found::Nobody;
            }
            let waited = self.shared.returned.wait_timeout(round, left);
            round = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn take_failures(&mut self) -> u32 {
        self.shared.round().take_failures()
    }

    fn broadcast(&self) -> Broadcast {
        self.shared.round().broadcast()
    }
}

/// A task for each player that is ready.
async fn tend_all(shared: Arc<Shared>, mesh: Arc<Mesh>, orders: Orders) {
    let mut known = Cast::default();
    let mut tasks: BTreeMap<RankId, AbortOnDrop> = BTreeMap::new();
    while let Some(cast) = orders.other_cast(&known).await {
        tracing::info!(players = cast.players.len(), learners = cast.learners.len(), "told of the ranks that play");
        tasks.retain(|id, _| cast.players.iter().any(|player| player.id == *id));
        shared.tell(|round| round.cast(cast.clone()));
        for player in &cast.players {
            let tend = || AbortOnDrop(tokio::spawn(tend(shared.clone(), mesh.clone(), *player)).abort_handle());
            tasks.entry(player.id).or_insert_with(tend);
        }
        known = cast;
    }
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// One player, until it is not named any more.
async fn tend(shared: Arc<Shared>, mesh: Arc<Mesh>, player: Member) {
    loop {
        let met = async {
            let connection = mesh.call(&player).await.map_err(|error| error.to_string())?;
            let sender = connection.open_bulk().await.map_err(|error| error.to_string())?;
            shared.tell(|round| round.connected(player.id));
            tokio::select! {
                ended = order(&shared, player.id, sender) => ended,
                ended = hear(&shared, player.id, &connection) => ended,
            }
            .map_err(|error| error.to_string())
        };
        if let Err(error) = met.await {
            tracing::info!(player = %player.id, %error, "lost a rank that plays");
        }
        shared.tell(|round| round.disconnected(player.id));
        tokio::time::sleep(RETRY).await;
    }
}

async fn order(shared: &Shared, player: RankId, mut sender: BulkSender) -> Result<(), TransportError> {
    loop {
        let due = shared.due.notified();
        let next = shared.round().next(player);
        match next {
            None => due.await,
            Some(Next::PassOn(players)) => {
                sender.write_header(&ToPlayer::PassOn { players: players.into() }).await?;
            }
            Some(Next::Weights(id, bytes)) => {
                sender.write_header(&ToPlayer::Weights { id, count: (bytes.len() / 4) as u32 }).await?;
                sender.write_chunk(bytes).await?;
            }
            Some(Next::Play(number, order, weights)) => {
                let bytes = order.state.len() as u32;
                sender.write_header(&ToPlayer::Play { order: number, lane: order.lane, weights, bytes }).await?;
                if bytes > 0 {
                    sender.write_chunk(Bytes::from(order.state)).await?;
                }
            }
        }
    }
}

async fn hear(shared: &Shared, player: RankId, connection: &Connection) -> Result<(), TransportError> {
    // It is there when the first answer is.
    let mut receiver = connection.accept_bulk().await?;
    while let Some(answer) = receiver.read_header::<FromPlayer>().await? {
        match answer {
            FromPlayer::Played { order, trajectory, state, failures, strays }
                if trajectory <= TRAJECTORY_BYTES_MAX && state <= STATE_BYTES_MAX =>
            {
                let (mut bytes, mut after) = (vec![0; trajectory as usize], vec![0; state as usize]);
                receiver.read_exact(&mut bytes).await?;
                receiver.read_exact(&mut after).await?;
                let played = PlayedBytes { trajectory: bytes, after, failures, strays };
                shared.tell(|round| round.answered(player, order, played));
            }
            FromPlayer::Played { .. } => return Err(TransportError::Ended),
            FromPlayer::Failed { order, error } => {
                tracing::warn!(%error, "a lane could not be played elsewhere");
                shared.tell(|round| round.failed(player, order));
            }
            FromPlayer::Wanting { order } => shared.tell(|round| round.wanting(player, order)),
            FromPlayer::Loaded { id } => shared.tell(|round| round.loaded(player, id)),
        }
    }
    Ok(())
}
