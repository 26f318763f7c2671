//! The cluster actor, seen from outside `actors/`: what holds it need not know ractor.

use ractor::{Actor, ActorRef};

use super::cluster::{Arguments, ClusterActor};
use super::messages::{Answer, Message, Question};

/// The one way to speak to the cluster. Clones speak to the same.
#[derive(Clone)]
pub(crate) struct ClusterHandle(ActorRef<Message>);

impl ClusterHandle {
    /// Starts the actor; the future ends with it, also when it panics.
    pub async fn spawn(
        arguments: Arguments,
    ) -> Result<(Self, impl Future<Output = ()> + Send + 'static), Box<dyn std::error::Error + Send + Sync>> {
        let (actor, ended) = Actor::spawn(None, ClusterActor, arguments).await?;
        Ok((Self(actor), async move { drop(ended.await) }))
    }

    /// False when the actor has ended.
    pub fn send(&self, message: Message) -> bool {
        self.0.send_message(message).is_ok()
    }

    /// Asks and waits; none when the actor has ended.
    pub async fn ask(&self, question: Question) -> Option<Answer> {
        let (answer, answered) = tokio::sync::oneshot::channel();
        if !self.send(Message::Ask { question, answer }) {
            return None;
        }
        answered.await.ok()
    }

    /// Ends it at once, as a crash does.
    pub fn kill(&self) {
        self.0.kill();
    }
}
