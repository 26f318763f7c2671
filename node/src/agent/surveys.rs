//! Surveys of models, off the agent's thread: one at a time, because they measure. Owns how many wait; what is looked at is `server::survey`'s.

use std::sync::Arc;

use ractor::ActorRef;
use stoke_protocol::message::split::Survey;
use tokio::sync::Semaphore;

use super::actor::Message;
use super::state::Event;
use crate::server;

/// More are not begun: the coordinator asks again.
const SURVEYS_MAX: usize = 16;

#[derive(Debug)]
pub(super) struct Surveyor {
    measuring: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

impl Default for Surveyor {
    fn default() -> Self {
        Self { measuring: Arc::new(Semaphore::new(1)), waiting: Arc::new(Semaphore::new(SURVEYS_MAX)) }
    }
}

impl Surveyor {
    pub fn begin(&self, survey: Survey, agent: ActorRef<Message>) {
        let Ok(place) = self.waiting.clone().try_acquire_owned() else {
            return tracing::warn!(model = survey.model, "too many models are being surveyed");
        };
        let measuring = self.measuring.clone();
        tokio::spawn(async move {
            let Ok(turn) = measuring.acquire_owned().await else { return };
            let surveyed = tokio::task::spawn_blocking(move || {
                let found = server::survey(&survey);
                tracing::info!(model = survey.model, ?found, "model surveyed");
                (survey, found)
            });
            let Ok((survey, found)) = surveyed.await else { return };
            drop((turn, place));
            // An agent that is gone needs no answer.
            let _ = agent.cast(Message::Event(Event::Surveyed { survey, found }, None));
        });
    }
}
