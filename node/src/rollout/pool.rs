//! A learner's pool of ranks that play: which lanes wait, who plays which, and what has come back. Owns the orders of one round; the learner's thread takes
//! what is there, and tasks of the network's runtime send and receive.
//!
//! W2: a lane is wanted once a round: what comes of an earlier round, or for a lane that the learner has played meanwhile, is dropped. W3: nobody is
//! waited for who is clearly late: the learner plays the lane itself, which gives the same.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoke_jobs::rl::{PlayOrder, PlayedBytes, Rollouts};
use stoke_protocol::message::peer::{FromPlayer, ToPlayer};
use stoke_protocol::message::rank::{Member, RankId};
use stoke_protocol::transport::{BulkSender, Connection, TransportError};
use tokio::sync::{Notify, Semaphore};
use tokio::task::AbortHandle;

use super::stage::STATE_BYTES_MAX;
use crate::exchange::Mesh;
use crate::worker::Orders;

/// Orders of one player under way: while one is played the next one is there already.
const CREDITS: usize = 2;
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

#[derive(Default)]
struct Shared {
    round: Mutex<Round>,
    /// Something has come back, or will not.
    returned: Condvar,
    /// Lanes wait.
    ordered: Notify,
}

#[derive(Default)]
struct Round {
    version: u64,
    weights: Bytes,
    waiting: VecDeque<(u64, PlayOrder)>,
    /// Orders under way.
    sent: BTreeMap<u64, Sent>,
    done: BTreeMap<u32, PlayedBytes>,
    next: u64,
    longest: Option<Duration>,
}

struct Sent {
    lane: u32,
    to: RankId,
    at: Instant,
    order: PlayOrder,
}

/// A lane for a player.
struct Assigned {
    number: u64,
    order: PlayOrder,
    /// Where the player has those of another version: theirs and their bytes.
    weights: Option<(u64, Bytes)>,
}

impl Shared {
    fn round(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next lane for a player that has weights of a version.
    fn assign(&self, to: RankId, has: Option<u64>) -> Option<Assigned> {
        let mut round = self.round();
        let (number, order) = round.waiting.pop_front()?;
        let weights = (has != Some(round.version)).then(|| (round.version, round.weights.clone()));
        round.sent.insert(number, Sent { lane: order.lane, to, at: Instant::now(), order: order.clone() });
        Some(Assigned { number, order, weights })
    }

    fn returned(&self, number: u64, played: Option<PlayedBytes>) {
        let mut round = self.round();
        // W2.
        let Some(sent) = round.sent.remove(&number) else { return };
        if let Some(played) = played {
            let taken = sent.at.elapsed();
            round.longest = Some(round.longest.map_or(taken, |longest| longest.max(taken)));
            round.done.insert(sent.lane, played);
        }
        self.returned.notify_all();
    }

    /// What a player that is gone had is somebody else's.
    fn lost(&self, player: RankId) {
        let mut round = self.round();
        let numbers: Vec<u64> =
            round.sent.iter().filter(|(_, sent)| sent.to == player).map(|(number, _)| *number).collect();
        for number in numbers {
            let sent = round.sent.remove(&number).expect("it was just there");
            round.waiting.push_front((number, sent.order));
        }
        drop(round);
        self.returned.notify_all();
        self.ordered.notify_waiters();
    }
}

impl Pool {
    /// Tends whoever the orders name, for as long as the pool lives.
    pub fn start(mesh: Arc<Mesh>, orders: Orders) -> Self {
        let shared = Arc::new(Shared::default());
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
        let mut round = self.shared.round();
        if round.weights.is_empty() || round.version != version {
            round.weights = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
            round.version = version;
        }
        round.sent.clear();
        round.done.clear();
        let first = round.next;
        round.next += orders.len() as u64;
        round.waiting = (first..).zip(orders).collect();
        drop(round);
        self.shared.ordered.notify_waiters();
    }

    /// W3.
    fn take(&mut self, lane: u32) -> Option<PlayedBytes> {
        let mut round = self.shared.round();
        loop {
            if let Some(played) = round.done.remove(&lane) {
                return Some(played);
            }
            if let Some(at) = round.waiting.iter().position(|(_, order)| order.lane == lane) {
                round.waiting.remove(at);
                return None;
            }
            let number = round.sent.iter().find(|(_, sent)| sent.lane == lane).map(|(number, _)| *number)?;
            let late = round.longest.map_or(FIRST_MAX, |longest| (longest * LATE).max(LATE_MIN));
            let left = late.saturating_sub(round.sent[&number].at.elapsed());
            if left.is_zero() {
                round.sent.remove(&number);
                return None;
            }
            let waited = self.shared.returned.wait_timeout(round, left);
            round = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A task for each player that is ready.
async fn tend_all(shared: Arc<Shared>, mesh: Arc<Mesh>, orders: Orders) {
    let mut known: Vec<Member> = Vec::new();
    let mut tasks: BTreeMap<RankId, AbortOnDrop> = BTreeMap::new();
    while let Some(players) = orders.other_rollouts(&known).await {
        tracing::info!(players = players.len(), "told of the ranks that play");
        tasks.retain(|id, _| players.iter().any(|player| player.id == *id));
        for gone in known.iter().filter(|player| !players.contains(player)) {
            shared.lost(gone.id);
        }
        for player in &players {
            let tend = || AbortOnDrop(tokio::spawn(tend(shared.clone(), mesh.clone(), *player)).abort_handle());
            tasks.entry(player.id).or_insert_with(tend);
        }
        known = players;
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
            let credits = Semaphore::new(CREDITS);
            tokio::select! {
                ended = order(&shared, player.id, sender, &credits) => ended,
                ended = hear(&shared, &connection, &credits) => ended,
            }
            .map_err(|error| error.to_string())
        };
        if let Err(error) = met.await {
            tracing::info!(player = %player.id, %error, "lost a rank that plays");
        }
        shared.lost(player.id);
        tokio::time::sleep(RETRY).await;
    }
}

async fn order(
    shared: &Shared,
    player: RankId,
    mut sender: BulkSender,
    credits: &Semaphore,
) -> Result<(), TransportError> {
    let mut has = None;
    loop {
        // Given back when an answer has come.
        if let Ok(credit) = credits.acquire().await {
            credit.forget();
        }
        let Assigned { number, order, weights } = loop {
            let ordered = shared.ordered.notified();
            tokio::pin!(ordered);
            // From here on nothing is missed.
            ordered.as_mut().enable();
            if let Some(assigned) = shared.assign(player, has) {
                break assigned;
            }
            ordered.await;
        };
        if let Some((version, bytes)) = weights {
            let count = (bytes.len() / 4) as u32;
            sender.write_header(&ToPlayer::Weights { version, count }).await?;
            sender.write_chunk(bytes).await?;
            has = Some(version);
        }
        let bytes = order.state.len() as u32;
        sender.write_header(&ToPlayer::Play { order: number, lane: order.lane, bytes }).await?;
        if bytes > 0 {
            sender.write_chunk(Bytes::from(order.state)).await?;
        }
    }
}

async fn hear(shared: &Shared, connection: &Connection, credits: &Semaphore) -> Result<(), TransportError> {
    // It is there when the first answer is.
    let mut receiver = connection.accept_bulk().await?;
    while let Some(answer) = receiver.read_header::<FromPlayer>().await? {
        match answer {
            FromPlayer::Played { order, trajectory, state, failures }
                if trajectory <= TRAJECTORY_BYTES_MAX && state <= STATE_BYTES_MAX =>
            {
                let (mut bytes, mut after) = (vec![0; trajectory as usize], vec![0; state as usize]);
                receiver.read_exact(&mut bytes).await?;
                receiver.read_exact(&mut after).await?;
                shared.returned(order, Some(PlayedBytes { trajectory: bytes, after, failures }));
            }
            FromPlayer::Played { .. } => return Err(TransportError::Ended),
            FromPlayer::Failed { order, error } => {
                tracing::warn!(%error, "a lane could not be played elsewhere");
                shared.returned(order, None);
            }
        }
        credits.add_permits(1);
    }
    Ok(())
}
