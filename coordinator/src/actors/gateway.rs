//! A user's connection: one task a request. Owns the conversation's shape (one answer, several frames, a stream); what is allowed and what
//! is answered comes from the cluster.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use stoke_protocol::codec::{FrameCap, decode, encode, encode_record};
use stoke_protocol::identity::{JoinToken, Subject};
use stoke_protocol::ids::{Digest, JobId};
use stoke_protocol::list::List;
use stoke_protocol::message::client::{Refusal, RefusalCode, Reply, Request};
use stoke_protocol::transport::{CloseCode, Connection, FrameSender, Request as Incoming, TransportError};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use super::door::Door;
use super::logs;
use super::messages::{Answer, Message, Question};
use crate::state::authorise::Verb;

/// Requests of one connection at a time; more wait in its QUIC streams.
const REQUESTS_MAX: usize = 16;
/// Views that wait for a watcher: it gets the newest in the end.
const VIEWS_WAITING_MAX: usize = 4;
/// Of a list in one frame. The largest entry (a node with all the labels there may be) is far below what a frame has left.
const LIST_BYTES: usize = FrameCap::Request.bytes() / 2;

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
        self.door.metrics.requests.with_label_values(&[Verb::of(&request).word()]).inc();
        let secret = (self.door.secret)();
        let kept = request.clone();
        let question = Question::Request { caller: self.subject.clone(), request, secret_hash: secret.hash() };
        let mut frames = reply.into_frames();
        // A client that is gone takes its question back: the cluster must not hold it for ever.
        let answer = tokio::select! {
            biased;
            answer = self.door.cluster.ask(question) => answer,
            () = frames.stopped() => return Ok(()),
        };
        match (answer, kept) {
            (Some(Answer::Granted), Request::Watch { job }) => self.watch(frames, job).await,
            (Some(Answer::Granted), Request::Logs { job, rank, tail, follow }) => {
                logs::relay(&self.door.cluster, frames, logs::Wanted { job, rank, tail, follow }).await
            }
            (Some(Answer::Granted), Request::Renew { csr }) => send(frames, vec![self.renew(&csr)]).await,
            (Some(Answer::Reply(reply)), _) => send(frames, split(*reply)).await,
            (Some(Answer::Token(id)), _) => {
                let token = JoinToken { ca_hash: self.ca_hash(), id, secret };
                send(frames, vec![Reply::Token { token: id, text: token.to_string() }]).await
            }
            (Some(Answer::Granted | Answer::Member(_) | Answer::Sign(_) | Answer::Denied(_)), _) => {
                send(frames, vec![Reply::Refused(going_down())]).await
            }
            // Whether it was done is unknown: a refusal would say that it was not (I9).
            (None, _) => {
                self.connection.close(CloseCode::ShuttingDown, "the coordinator goes down");
                Ok(())
            }
        }
    }

    async fn watch(&self, mut frames: FrameSender, job: JobId) -> Result<(), TransportError> {
        let (views, mut changes) = mpsc::channel(VIEWS_WAITING_MAX);
        self.door.cluster.send(Message::Watch { job, views });
        loop {
            let view = tokio::select! {
                biased;
                view = changes.recv() => view,
                () = frames.stopped() => return Ok(()),
            };
            match view {
                Some(view) => {
                    let last = view.state.is_terminal();
                    frames.send(&Reply::Job(Box::new(view))).await?;
                    if last {
                        return frames.finish();
                    }
                }
                None => return send(frames, vec![Reply::Refused(going_down())]).await,
            }
        }
    }

    fn renew(&self, csr: &[u8]) -> Reply {
        let ttl = Duration::from_secs(self.door.lifetimes.user_s);
        match self.door.authority.issue(csr, &self.subject, ttl) {
            Ok(issued) => Reply::Certificate { certificate: issued.certificate.into() },
            Err(error) => Reply::Refused(Refusal {
                code: RefusalCode::Invalid,
                message: error.to_string(),
                mend: "send a PKCS#10 request of an Ed25519 key".into(),
            }),
        }
    }

    fn ca_hash(&self) -> Digest {
        self.door.authority.ca_hash()
    }
}

pub(super) async fn send(mut frames: FrameSender, replies: Vec<Reply>) -> Result<(), TransportError> {
    for reply in replies {
        frames.send(&reply).await?;
    }
    frames.finish()
}

/// Long lists come in several frames of the same kind; the end of the stream is the end of the list.
fn split(reply: Reply) -> Vec<Reply> {
    match reply {
        Reply::Jobs(jobs) => pieces(jobs, Reply::Jobs),
        Reply::Nodes(nodes) => pieces(nodes, Reply::Nodes),
        Reply::Checkpoints(checkpoints) => pieces(checkpoints, Reply::Checkpoints),
        Reply::Tokens(tokens) => pieces(tokens, Reply::Tokens),
        other => vec![other],
    }
}

fn pieces<T: Serialize + Clone>(list: List<T>, wrap: fn(List<T>) -> Reply) -> Vec<Reply> {
    let mut replies = Vec::new();
    let (mut piece, mut bytes) = (Vec::new(), 0);
    for entry in list {
        let more = encode_record(&entry).map_or(0, |record| record.len());
        if bytes + more > LIST_BYTES {
            readable(std::mem::take(&mut piece), wrap, &mut replies);
            bytes = 0;
        }
        bytes += more;
        piece.push(entry);
    }
    readable(piece, wrap, &mut replies);
    replies
}

/// In pieces that a client decodes within its budget: small entries take more memory than bytes.
fn readable<T: Clone>(mut piece: Vec<T>, wrap: fn(List<T>) -> Reply, replies: &mut Vec<Reply>) {
    let reply = wrap(piece.clone().into());
    let is_readable =
        encode(&reply, FrameCap::Request).is_ok_and(|frame| decode::<Reply>(&frame, FrameCap::Request).is_ok());
    if is_readable || piece.len() < 2 {
        return replies.push(reply);
    }
    let rest = piece.split_off(piece.len() / 2);
    readable(piece, wrap, replies);
    readable(rest, wrap, replies);
}

fn going_down() -> Refusal {
    Refusal {
        code: RefusalCode::Unavailable,
        message: "the coordinator is going down or has too much to do".into(),
        mend: "try again".into(),
    }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::TokenId;
    use stoke_protocol::message::client::{TokenScope, TokenState, TokenView};

    use super::*;

    #[test]
    fn a_long_list_comes_in_pieces_that_hold_all_of_it() {
        let counts = |entries: usize, bytes: usize| -> Vec<usize> {
            let tokens: List<_> = std::iter::repeat_n((), entries).map(|()| token(bytes)).collect();
            let count = |reply: &Reply| match reply {
                Reply::Tokens(tokens) => {
                    let frame = encode(reply, FrameCap::Request).expect("each piece fits into a frame");
                    assert_eq!(decode::<Reply>(&frame, FrameCap::Request).as_ref().ok(), Some(reply));
                    tokens.len()
                }
                other => panic!("{other:?}"),
            };
            split(Reply::Tokens(tokens)).iter().map(count).collect()
        };
        assert_eq!(counts(0, 0), [0]);
        assert_eq!(counts(100, 100), [100]);
        assert_eq!(counts(25, 60_000), [8, 8, 8, 1]);
        // Which take more memory than bytes.
        let small = counts(5_000, 0);
        assert!(small.len() > 1 && small.iter().sum::<usize>() == 5_000, "{small:?}");
    }

    fn token(bytes: usize) -> TokenView {
        let (scope, state) = (TokenScope::Node, TokenState::Open);
        TokenView { token: TokenId(1), scope, state, expires_ms: 0, created_by: "x".repeat(bytes) }
    }
}
