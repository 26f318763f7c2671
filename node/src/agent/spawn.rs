//! The seam between an agent's decisions and the processes that carry them out. Two implementations: real processes (`process.rs`), and the
//! simulator's, which have no process at all.

use std::net::IpAddr;

use ractor::ActorRef;
use stoke_protocol::message::rank::{Exit, FromRank, RankId, StartRank, ToRank};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::actor::Message;
use super::inventory::Kept;
use super::state::Event;

/// Frames of one rank that may wait in the agent's mailbox. A rank that talks more waits in its socket (mailboxes are unbounded).
const FRAMES_MAX: usize = 32;

/// Starts ranks.
pub trait Spawner: Send + Sync + 'static {
    /// Starts the process of a rank, which listens for peers on `ip`, and gives it `start`. What it says and its end go to `events`, the end
    /// exactly once and last.
    fn spawn(&self, start: StartRank, ip: IpAddr, events: RankEvents) -> Result<Box<dyn RankProcess>, String>;

    /// Takes over what an agent before this one has started. The process is watched and spoken to as one of this agent's own; of one that is
    /// gone, or does not prove itself, only the end comes.
    fn adopt(&self, kept: Kept, events: RankEvents) -> Box<dyn RankProcess>;

    /// The rank's end is known to everybody: nothing needs to be found again.
    fn forget(&self, id: RankId);
}

/// A rank that was started. Dropping it changes nothing about the process.
pub trait RankProcess: Send {
    /// Hands over a frame; a process that does not read or is gone never gets it.
    fn send(&self, frame: ToRank);
    /// SIGKILL to everything that the rank started; the end comes as an event.
    fn kill(&self);
}

/// Where a rank's events go.
#[derive(Clone, Debug)]
pub struct RankEvents {
    id: RankId,
    agent: ActorRef<Message>,
    room: std::sync::Arc<Semaphore>,
}

impl RankEvents {
    pub(super) fn new(id: RankId, agent: ActorRef<Message>) -> Self {
        Self { id, agent, room: std::sync::Arc::new(Semaphore::new(FRAMES_MAX)) }
    }

    /// The rank said something. Waits while the agent is behind.
    pub async fn frame(&self, frame: FromRank) {
        let place = self.room.clone().acquire_owned().await.ok();
        self.tell(Event::Rank { id: self.id, frame }, place);
    }

    /// The rank has closed its link.
    pub fn hung_up(&self) {
        self.tell(Event::HungUp { id: self.id }, None);
    }

    /// The rank is gone and all that it said was passed on.
    pub fn exited(&self, exit: Exit) {
        self.tell(Event::Exited { id: self.id, exit }, None);
    }

    fn tell(&self, event: Event, place: Option<OwnedSemaphorePermit>) {
        // An agent that is gone needs no events.
        let _ = self.agent.cast(Message::Event(event, place));
    }
}
