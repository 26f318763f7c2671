//! Surveys of models: one at a time, because they measure, and each in a process of its own: files are mapped, and one that somebody shortens meanwhile
//! ends whoever reads it (SIGBUS). Owns how many wait and these processes; what is looked at is `server::survey`'s.

use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;

use ractor::ActorRef;
use stoke_protocol::message::split::{Survey, Surveyed};
use tokio::sync::Semaphore;

use super::actor::Message;
use super::state::Event;
use crate::server;

/// More are not begun: the coordinator asks again.
const SURVEYS_MAX: usize = 16;

/// This very program, also when its file was replaced.
const OWN: &str = "/proc/self/exe";
/// Of what a process that failed has said.
const SAID_MAX: usize = 1_000;

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
                let found = look(&survey);
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

/// Blocks until the process has ended.
fn look(survey: &Survey) -> Result<Surveyed, String> {
    let asked = serde_json::to_string(survey).expect("a survey has names for keys");
    let command = Command::new(OWN).args(["survey", &asked]).stdin(Stdio::null()).output();
    let ended = command.map_err(|error| format!("start a process that looks at the model: {error}"))?;
    if ended.status.success() {
        let found = serde_json::from_slice::<Result<Surveyed, String>>(&ended.stdout);
        return found.unwrap_or_else(|error| Err(format!("the process that looked at the model: {error}")));
    }
    let said = String::from_utf8_lossy(&ended.stderr);
    let said: String = said.trim().chars().take(SAID_MAX).collect();
    let model = &survey.model;
    Err(format!(
        "the process that looked at {model:?} ended with {}: its files were changed while they were read, or are damaged. {said}",
        ended.status
    ))
}

/// This process as one that looks at a model. For the hidden command `stoke survey`.
pub fn main(asked: &str) -> ExitCode {
    let found = match serde_json::from_str::<Survey>(asked) {
        Ok(survey) => server::survey(&survey),
        Err(error) => Err(format!("stoke survey is started by a node agent, not by hand: {error}")),
    };
    println!("{}", serde_json::to_string(&found).expect("what was found has names for keys"));
    ExitCode::SUCCESS
}
