//! A user's connection: one task a request, whose replies are frames of its stream. What is answered comes from the conversation.

use std::sync::Arc;
use std::time::SystemTime;

use stoke_protocol::identity::Subject;
use stoke_protocol::message::client::Request;
use stoke_protocol::transport::{CloseCode, Connection, Request as Incoming, TransportError};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::conversation::{Conversation, Ended};
use super::door::Door;

/// Requests of one connection at a time; more wait in its QUIC streams.
const REQUESTS_MAX: usize = 16;
#[derive(Clone)]
pub(super) struct Gateway {
    pub door: Door,
    pub subject: Subject,
    pub connection: Connection,
}

impl Gateway {
    pub async fn run(self) {
        self.door.metrics.clients.inc();
        let left = self.connection.peer_expires_at().duration_since(SystemTime::now()).unwrap_or_default();
        if timeout(left, self.serve()).await.is_err() {
            self.connection
                .close(CloseCode::Unauthenticated, "the certificate has expired: connect with a renewed one");
        }
        self.door.metrics.clients.dec();
    }

    async fn serve(&self) {
        let room = Arc::new(Semaphore::new(REQUESTS_MAX));
        loop {
            let Ok(place) = room.clone().acquire_owned().await else { return };
            let Ok(request) = self.connection.accept_request().await else { return };
            let gateway = self.clone();
            tokio::spawn(async move {
                match gateway.answer(request).await {
                    Ok(()) => {}
                    Err(error @ TransportError::Frame(_)) => {
                        gateway.door.metrics.refused_frames.inc();
                        tracing::warn!(user = %gateway.subject, %error, "request refused");
                    }
                    Err(error) => tracing::debug!(user = %gateway.subject, %error, "request was not answered"),
                }
                drop(place);
            });
        }
    }

    async fn answer(&self, incoming: Incoming) -> Result<(), TransportError> {
        let (request, reply) = incoming.read::<Request>().await?;
        let mut frames = reply.into_frames();
        let conversation = Conversation { door: self.door.clone(), caller: self.subject.clone() };
        let (mut replies, ended) = conversation.begin(request);
        loop {
            let reply = tokio::select! {
                biased;
                reply = replies.recv() => reply,
                // A client that is gone takes its question back: the cluster must not hold it for ever.
                () = frames.stopped() => return Ok(()),
            };
            match reply {
                Some(reply) => frames.send(&reply).await?,
                None => break,
            }
        }
        match ended.await {
            Ok(Ended::Answered) => frames.finish(),
            // Whether it was done is unknown: a refusal would say that it was not (I9).
            Ok(Ended::Down) | Err(_) => {
                self.connection.close(CloseCode::ShuttingDown, "the coordinator goes down");
                Ok(())
            }
        }
    }
}
