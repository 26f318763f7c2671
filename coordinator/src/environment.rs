//! Everything that the coordinator takes from the world besides its folder's files: clocks, packets, chance and the log. A real process uses
//! `Environment::real`; a simulation brings its own, and then nothing here starts a thread.

use std::sync::Arc;
use std::time::SystemTime;

use stoke_protocol::identity::{Authority, Credentials, TokenSecret};
use stoke_protocol::transport::{Bind, Io};
use tokio::time::Instant;

use crate::journal::Log;
use crate::state::{Mono, Now, Time};

/// How records reach the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum JournalMode {
    /// A thread that commits in groups.
    Thread,
    /// In the cluster actor, for simulation.
    Inline,
}

pub struct Environment {
    /// The wall clock.
    pub wall: Arc<dyn Fn() -> Time + Send + Sync>,
    /// Where packets come from.
    pub bind: Bind,
    pub io: Io,
    pub log: Box<dyn Log>,
    pub journal: JournalMode,
    pub authority: Arc<Authority>,
    pub credentials: Credentials,
    /// Fresh secrets for join tokens.
    pub secret: Arc<dyn Fn() -> TokenSecret + Send + Sync>,
}

impl Environment {
    /// The machine's own clock and chance.
    pub(crate) fn real(
        bind: Bind,
        io: Io,
        log: Box<dyn Log>,
        authority: Arc<Authority>,
        credentials: Credentials,
    ) -> Self {
        Self {
            wall: Arc::new(wall),
            bind,
            io,
            log,
            journal: JournalMode::Thread,
            authority,
            credentials,
            secret: Arc::new(TokenSecret::random),
        }
    }
}

/// The clocks of a running coordinator. Monotonic time is tokio's, which a simulation controls.
#[derive(Clone)]
pub(crate) struct Clock {
    wall: Arc<dyn Fn() -> Time + Send + Sync>,
    started: Instant,
}

impl Clock {
    pub fn new(wall: Arc<dyn Fn() -> Time + Send + Sync>) -> Self {
        Self { wall, started: Instant::now() }
    }

    pub fn now(&self) -> Now {
        let mono = Mono(u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX));
        Now { wall: (self.wall)(), mono }
    }
}

fn wall() -> Time {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Time(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
