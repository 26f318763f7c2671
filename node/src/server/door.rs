//! Where gateways ask: connections of nodes, one stream a question. Owns deadlines and how many questions are held; what is asked and answered is
//! for `generating` and `single`.
//!
//! B5: at most `running + waiting` questions are held, and those over it are refused before their text is looked at. B6: a question whose stream is
//! gone is taken back at once.

use std::sync::Arc;
use std::time::Duration;

use stoke_protocol::message::serve::{Answer, Ask, Question, Refusal};
use stoke_protocol::spec::Serve;
use stoke_protocol::transport::{Connection, Request, TransportError};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::generating::Generating;
use super::meter::{Meter, Voice};
use super::single::Asking;
use crate::exchange::Mesh;

/// A question comes whole within this.
const QUESTION_MAX: Duration = Duration::from_secs(10);
/// What who is refused is told to wait.
const RETRY_AFTER_MS: u32 = 1_000;
/// A deadline that nobody set.
const FOR_EVER: Duration = Duration::from_secs(30 * 24 * 3600);

/// What a model is asked.
#[derive(Clone)]
pub enum Desk {
    Text(Arc<Generating>),
    Single(Arc<Asking>),
}

struct Door {
    desk: Desk,
    places: Arc<Semaphore>,
    meter: Arc<Meter>,
}

/// Lets gateways in, for as long as the rank's mesh is open.
pub fn open(mesh: &Mesh, (serve, meter): (&Serve, &Arc<Meter>), desk: Desk) {
    let places = Arc::new(Semaphore::new((serve.running + serve.waiting) as usize));
    let (mut entered, door) = (mesh.open_door(), Arc::new(Door { desk, places, meter: meter.clone() }));
    mesh.io().spawn(async move {
        while let Some(connection) = entered.recv().await {
            tokio::spawn(door.clone().receive(connection));
        }
    });
}

pub fn invalid(problem: String) -> Refusal {
    Refusal::Invalid { problem }
}

impl Door {
    async fn receive(self: Arc<Self>, connection: Connection) {
        while let Ok(request) = connection.accept_request().await {
            tokio::spawn(self.clone().answer(request));
        }
    }

    async fn answer(self: Arc<Self>, request: Request) {
        let Ok(Ok((question, reply))) = timeout(QUESTION_MAX, request.read::<Question>()).await else { return };
        let mut voice = Voice::new(reply.into_frames());
        let last = match self.places.clone().try_acquire_owned() {
            Ok(_place) => {
                voice.count(&self.meter, &question.ask);
                self.take(question, &mut voice).await
            }
            Err(_) => Ok(Answer::Refused(Refusal::Busy { retry_after_ms: RETRY_AFTER_MS })),
        };
        // Whoever is gone needs no last word.
        let Ok(last) = last else { return };
        if voice.send(&last).await.is_ok() {
            let _ = voice.finish();
        }
    }

    /// The last frame of the answer. An error: nobody listens any more.
    async fn take(&self, question: Question, voice: &mut Voice) -> Result<Answer, TransportError> {
        let Question { deadline_ms, ask, .. } = question;
        let within = match deadline_ms {
            0 => FOR_EVER,
            ms => Duration::from_millis(ms.into()),
        };
        let deadline = Instant::now() + within;
        match (&self.desk, ask) {
            (Desk::Text(desk), Ask::Generate(generate)) => desk.clone().answer(generate, deadline, voice).await,
            (Desk::Text(desk), Ask::Probe) => desk.clone().probe(deadline).await,
            (Desk::Text(_), Ask::Embed { .. } | Ask::Infer { .. } | Ask::Describe) => {
                let problem = "this model answers chats and continues texts, and gives no vectors or tensors";
                Ok(Answer::Refused(invalid(problem.into())))
            }
            (Desk::Single(desk), ask) => desk.clone().answer(ask, deadline, voice).await,
        }
    }
}
