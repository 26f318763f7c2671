//! One question of a user and its replies, whatever carries them: a QUIC stream or HTTP. Owns the shape (one answer, a list in pieces, a stream without end); what is
//! allowed and what is answered comes from the cluster.

use std::time::Duration;

use serde::Serialize;
use stoke_protocol::codec::{FrameCap, decode, encode, encode_record};
use stoke_protocol::identity::{JoinToken, Subject};
use stoke_protocol::ids::JobId;
use stoke_protocol::list::List;
use stoke_protocol::message::client::{Refusal, RefusalCode, Reply, Request};
use tokio::sync::{mpsc, oneshot};

use super::door::Door;
use super::logs;
use super::messages::{Answer, Message, Question};
use super::uploads;
use crate::state::authorise::Verb;

/// Replies that wait for a client to read; then the sender waits, and a watcher gets the newest view in the end.
const REPLIES_WAITING_MAX: usize = 4;
/// Of a list in one frame. The largest entry (a node with all the labels there may be) is far below what a frame has left.
const LIST_BYTES: usize = FrameCap::Request.bytes() / 2;

/// The client does not want any more replies.
pub(super) struct Gone;

/// How a conversation ended, when its last reply was sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ended {
    Answered,
    /// The cluster ended first: whether it was done is unknown (I9).
    Down,
}

#[derive(Clone)]
pub(crate) struct Conversation {
    pub door: Door,
    pub caller: Subject,
}

impl Conversation {
    /// Asks. Dropping the receiver takes the question back.
    pub fn begin(self, request: Request) -> (mpsc::Receiver<Reply>, oneshot::Receiver<Ended>) {
        let (replies, arriving) = mpsc::channel(REPLIES_WAITING_MAX);
        let (end, ended) = oneshot::channel();
        tokio::spawn(async move {
            let how = self.converse(request, &replies).await;
            // Before the receiver sees that no reply follows.
            let _gone = end.send(how.unwrap_or(Ended::Down));
            drop(replies);
        });
        (arriving, ended)
    }

    async fn converse(&self, request: Request, replies: &mpsc::Sender<Reply>) -> Result<Ended, Gone> {
        self.door.metrics.requests.with_label_values(&[Verb::of(&request).word()]).inc();
        // Bytes do not go through the cluster's mailbox.
        let request = match uploads::take(&self.door.artifacts, &self.caller, request).await {
            Ok(request) => request,
            Err(answer) => return send(replies, *answer).await.map(|()| Ended::Answered),
        };
        let secret = (self.door.secret)();
        let kept = request.clone();
        let question = Question::Request { caller: self.caller.clone(), request, secret_hash: secret.hash() };
        let answer = tokio::select! {
            biased;
            answer = self.door.cluster.ask(question) => answer,
            () = replies.closed() => return Err(Gone),
        };
        match (answer, kept) {
            (Some(Answer::Granted), Request::Watch { job }) => self.watch(replies, job).await?,
            (Some(Answer::Granted), Request::Logs { job, rank, tail, follow }) => {
                logs::relay(&self.door.cluster, replies, logs::Wanted { job, rank, tail, follow }).await?;
            }
            (Some(Answer::Granted), Request::Renew { csr }) => send(replies, self.renew(&csr)).await?,
            (Some(Answer::Artifacts(needed)), Request::Artifact { artifact, bytes }) => {
                let offered = uploads::offer(&self.door.artifacts, artifact, bytes, needed).await;
                send(replies, offered).await?;
            }
            (Some(Answer::Reply(reply)), _) => {
                for reply in split(*reply) {
                    send(replies, reply).await?;
                }
            }
            (Some(Answer::Token(id)), _) => {
                let token = JoinToken { ca_hash: self.door.authority.ca_hash(), id, secret };
                send(replies, Reply::Token { token: id, text: token.to_string() }).await?;
            }
            (
                Some(Answer::Granted | Answer::Artifacts(_) | Answer::Member(_) | Answer::Sign(_) | Answer::Denied(_)),
                _,
            ) => {
                send(replies, Reply::Refused(going_down())).await?;
            }
            (None, _) => return Ok(Ended::Down),
        }
        Ok(Ended::Answered)
    }

    async fn watch(&self, replies: &mpsc::Sender<Reply>, job: JobId) -> Result<(), Gone> {
        let (views, mut changes) = mpsc::channel(REPLIES_WAITING_MAX);
        self.door.cluster.send(Message::Watch { job, views });
        loop {
            let view = tokio::select! {
                biased;
                view = changes.recv() => view,
                () = replies.closed() => return Err(Gone),
            };
            match view {
                Some(view) => {
                    let last = view.state.is_terminal();
                    send(replies, Reply::Job(Box::new(view))).await?;
                    if last {
                        return Ok(());
                    }
                }
                None => return send(replies, Reply::Refused(going_down())).await,
            }
        }
    }

    fn renew(&self, csr: &[u8]) -> Reply {
        let ttl = Duration::from_secs(self.door.lifetimes.user_s);
        match self.door.authority.issue(csr, &self.caller, ttl) {
            Ok(issued) => Reply::Certificate { certificate: issued.certificate.into() },
            Err(error) => Reply::Refused(Refusal {
                code: RefusalCode::Invalid,
                message: error.to_string(),
                mend: "send a PKCS#10 request of an Ed25519 key".into(),
            }),
        }
    }
}

pub(super) async fn send(replies: &mpsc::Sender<Reply>, reply: Reply) -> Result<(), Gone> {
    replies.send(reply).await.map_err(|_| Gone)
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

pub(super) fn going_down() -> Refusal {
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
