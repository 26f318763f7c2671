//! A policy's weights where they are played: what has come, what is coming, and whom this rank passes it on to, piece by piece as it comes. Owns the memory of it.
//!
//! W4: weights are whole when they have their digest. W5: a child that cannot be reached or is slow holds up nobody but those behind it, who will ask a learner.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use stoke_protocol::message::peer::{ToPlayer, WeightsId};
use stoke_protocol::message::rank::{Member, RankId};
use stoke_protocol::transport::{BulkReceiver, TransportError};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use crate::exchange::Mesh;

/// Learners may be a round apart.
const KEPT: usize = 3;
/// What is passed on at once.
const PIECE_BYTES_MAX: usize = 256 << 10;
/// Nothing has come for so long: whoever waits for weights asks for them.
const SILENCE_MAX: Duration = Duration::from_millis(250);
/// Between two attempts to reach a child.
const RETRY: Duration = Duration::from_millis(200);

/// A policy as it was told.
pub struct Weights {
    pub id: WeightsId,
    pub values: Vec<f32>,
}

pub struct Feed {
    mesh: Arc<Mesh>,
    /// Numbers of the weights.
    len: usize,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// The newest last.
    coming: VecDeque<Coming>,
    next: u64,
    children: BTreeMap<RankId, Child>,
    connections: u64,
}

struct Coming {
    number: u64,
    id: WeightsId,
    pieces: Vec<Bytes>,
    whole: Option<Arc<Weights>>,
}

struct Child {
    /// The connections of learners that have named it.
    named_by: Vec<u64>,
    passing: AbortHandle,
}

impl Drop for Child {
    fn drop(&mut self) {
        self.passing.abort();
    }
}

/// What becomes of weights that are passed on.
enum Next {
    Piece(Bytes),
    End,
    /// They will not be whole.
    Gone,
}

impl Feed {
    pub fn new(mesh: Arc<Mesh>, len: usize) -> Arc<Self> {
        Arc::new(Self { mesh, len, state: Mutex::default(), changed: Notify::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes weights from a stream; others may wait for them meanwhile.
    pub async fn receive(
        &self,
        receiver: &mut BulkReceiver,
        (id, count): (WeightsId, u32),
    ) -> Result<(), TransportError> {
        if count as usize != self.len {
            return Err(TransportError::Ended);
        }
        let number = self.state().begin(id);
        let received = async {
            let mut left = self.len * 4;
            while left > 0 {
                let piece = receiver.read_chunk(left.min(PIECE_BYTES_MAX)).await?;
                left -= piece.len();
                self.state().coming(number).into_iter().for_each(|coming| coming.pieces.push(piece.clone()));
                self.changed.notify_waiters();
            }
            Ok(())
        };
        let ended = received.await.and_then(|()| self.state().end(number));
        if ended.is_err() {
            self.state().coming.retain(|coming| coming.number != number);
        }
        self.changed.notify_waiters();
        ended
    }

    /// These weights; none: they have not come, and nothing comes.
    pub async fn weights(&self, id: WeightsId) -> Option<Arc<Weights>> {
        loop {
            let changed = self.changed.notified();
            if let Some(weights) = self.state().whole(id) {
                return Some(weights);
            }
            timeout(SILENCE_MAX, changed).await.ok()?;
        }
    }

    /// The newest whole weights, when they are others than `known`.
    pub async fn newest(&self, known: Option<WeightsId>) -> WeightsId {
        loop {
            let changed = self.changed.notified();
            let newest =
                self.state().coming.iter().rev().find_map(|coming| coming.whole.as_ref().map(|whole| whole.id));
            if let Some(newest) = newest.filter(|newest| known != Some(*newest)) {
                return newest;
            }
            changed.await;
        }
    }

    /// A number for a connection. A learner may have another one before the end of the last is seen.
    pub fn connected(&self) -> u64 {
        let mut state = self.state();
        state.connections += 1;
        state.connections
    }

    /// To whom a learner has weights passed on, from here on, by a connection's word.
    pub fn pass_on(self: &Arc<Self>, connection: u64, players: &[Member]) {
        let own = self.mesh.own();
        let mut state = self.state();
        for child in state.children.values_mut() {
            child.named_by.retain(|by| *by != connection);
        }
        for player in players.iter().filter(|player| player.id != own) {
            let begin = || {
                let passing = self.mesh.io().spawn(self.clone().pass(*player)).abort_handle();
                Child { named_by: Vec::new(), passing }
            };
            state.children.entry(player.id).or_insert_with(begin).named_by.push(connection);
        }
        state.children.retain(|_, child| !child.named_by.is_empty());
    }

    async fn pass(self: Arc<Self>, child: Member) {
        loop {
            if let Err(error) = self.pass_to(&child).await {
                tracing::info!(child = %child.id, %error, "weights are not passed on");
            }
            sleep(RETRY).await;
        }
    }

    async fn pass_to(&self, child: &Member) -> Result<(), String> {
        let connection = self.mesh.call(child).await.map_err(|error| error.to_string())?;
        let mut sender = connection.open_bulk().await.map_err(|error| error.to_string())?;
        let mut passed = None;
        loop {
            let (number, id) = self.next_to_pass(passed).await;
            let header = ToPlayer::Weights { id, count: self.len as u32 };
            sender.write_header(&header).await.map_err(|error| error.to_string())?;
            for index in 0.. {
                match self.piece(number, index).await {
                    Next::Piece(piece) => sender.write_chunk(piece).await.map_err(|error| error.to_string())?,
                    Next::End => break,
                    Next::Gone => return Err("they have not come whole, or newer ones have come".to_owned()),
                }
            }
            passed = Some(id);
        }
    }

    /// The newest that come or have come, when they are others than those that were passed last.
    async fn next_to_pass(&self, passed: Option<WeightsId>) -> (u64, WeightsId) {
        loop {
            let changed = self.changed.notified();
            let newest = self.state().coming.back().map(|coming| (coming.number, coming.id));
            if let Some(newest) = newest.filter(|(_, id)| passed != Some(*id)) {
                return newest;
            }
            changed.await;
        }
    }

    async fn piece(&self, number: u64, index: usize) -> Next {
        loop {
            let changed = self.changed.notified();
            match self.state().coming(number) {
                None => return Next::Gone,
                Some(coming) => match coming.pieces.get(index) {
                    Some(piece) => return Next::Piece(piece.clone()),
                    None if coming.whole.is_some() => return Next::End,
                    None => {}
                },
            }
            changed.await;
        }
    }
}

impl State {
    fn begin(&mut self, id: WeightsId) -> u64 {
        let number = self.next;
        self.next += 1;
        if self.coming.len() == KEPT {
            self.coming.pop_front();
        }
        self.coming.push_back(Coming { number, id, pieces: Vec::new(), whole: None });
        number
    }

    fn coming(&mut self, number: u64) -> Option<&mut Coming> {
        self.coming.iter_mut().find(|coming| coming.number == number)
    }

    /// W4.
    fn end(&mut self, number: u64) -> Result<(), TransportError> {
        // Newer ones have taken its place.
        let Some(coming) = self.coming(number) else { return Ok(()) };
        let bytes = coming.pieces.concat();
        if digest_of(&bytes) != coming.id.digest {
            tracing::warn!(version = coming.id.version, "weights came without their digest");
            return Err(TransportError::Ended);
        }
        let values = bytes.as_chunks::<4>().0.iter().map(|number| f32::from_le_bytes(*number)).collect();
        coming.whole = Some(Arc::new(Weights { id: coming.id, values }));
        Ok(())
    }

    fn whole(&self, id: WeightsId) -> Option<Arc<Weights>> {
        self.coming.iter().filter(|coming| coming.id == id).find_map(|coming| coming.whole.clone())
    }
}

/// Of weights as bytes.
pub fn digest_of(bytes: &[u8]) -> u64 {
    let digest = blake3::hash(bytes);
    u64::from_le_bytes(*digest.as_bytes().first_chunk().expect("a digest has 32 bytes"))
}
