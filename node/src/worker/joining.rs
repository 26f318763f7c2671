//! A rank that joins: the state that is on its way to it, and the sums of the steps after that state. Owns the waiting, and how much is kept
//! meanwhile; who takes the state and does the steps is the trainer.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};

use stoke_protocol::ids::Term;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::failure::Failure;
use crate::exchange::{ExchangeError, Mesh, Received};

/// Sums that are kept while the state is waited for. Then no more are taken, and the others wait.
const SUMS_MAX: usize = 64;

pub struct Joining {
    state: Receiver<Result<Received, ExchangeError>>,
    /// Every giver has begun: nobody else's going keeps it from coming.
    arrives: Arc<AtomicBool>,
    receiving: AbortHandle,
    from: u64,
    sums: VecDeque<Vec<f32>>,
}

impl Drop for Joining {
    fn drop(&mut self) {
        self.receiving.abort();
    }
}

impl Joining {
    /// Receives the state after `from` steps behind the trainer's back.
    pub fn begin(runtime: &Handle, mesh: Arc<Mesh>, (term, from): (Term, u64)) -> Self {
        let (tell, state) = channel();
        let arrives = Arc::new(AtomicBool::new(false));
        let all_begun = arrives.clone();
        let receiving = runtime.spawn(async move {
            // A trainer that is gone needs no state.
            let _ = tell.send(mesh.take_state(term, &all_begun).await);
        });
        Self { state, arrives, receiving: receiving.abort_handle(), from, sums: VecDeque::new() }
    }

    /// Whether the state comes whoever else goes.
    pub fn arrives(&self) -> bool {
        self.arrives.load(Ordering::Acquire)
    }

    /// Steps that will be done when all of it is there.
    pub fn reaches(&self) -> u64 {
        self.from + self.sums.len() as u64
    }

    /// The sum of the step after those that it reaches.
    pub fn keep(&mut self, sum: &[f32]) {
        self.sums.push_back(sum.to_vec());
    }

    /// The state, if it is there by now; blocks where no more sums may be kept.
    pub fn received(&mut self) -> Result<Option<Received>, Failure> {
        let full = self.sums.len() >= SUMS_MAX;
        match if full { self.state.recv().map_err(|_| TryRecvError::Disconnected) } else { self.state.try_recv() } {
            Ok(received) => Ok(Some(received?)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Failure::Stopped),
        }
    }

    /// When the state is there: of which step it is, and the sums after it.
    pub fn into_parts(mut self) -> (u64, VecDeque<Vec<f32>>) {
        tracing::info!(step = self.from, behind = self.sums.len(), "state received");
        (self.from, std::mem::take(&mut self.sums))
    }
}
