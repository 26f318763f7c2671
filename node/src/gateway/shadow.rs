//! Copies of questions to shadows: jobs that are tried with a model's real questions, and whose answers nobody gets.
//!
//! G8: a copy costs the client nothing: it goes out when a head has taken the question itself, nobody waits for it, it is asked once, and where the
//! shadow is busy, was lost a moment ago or has as many copies as it may, there is none. It is taken back with the question, and not by its end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use stoke_protocol::message::rank::RankId;
use stoke_protocol::message::serve::{Answer, Ask, Head, Question, Refusal};
use stoke_protocol::spec::Task;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::asking::{Desk, FULL_REST, SEND_MAX};
use super::heads::Unreached;

/// The copies of one question. Dropping them takes them back.
#[derive(Default)]
pub(super) struct Copies(Vec<AbortHandle>);

/// A place in the table's count.
struct Copying {
    desk: Arc<Desk>,
    head: RankId,
}

impl Copies {
    /// To every shadow of the model that has room.
    pub(super) fn send(desk: &Arc<Desk>, (model, tasks): (&str, &[Task]), ask: &Ask, deadline_ms: u32) -> Self {
        match ask {
            Ask::Generate(_) | Ask::Embed { .. } | Ask::Infer { .. } => {}
            Ask::Describe | Ask::Probe => return Self::default(),
        }
        let heads = desk.table().begin_copies(model, tasks, Instant::now());
        let follow = |head: Head| {
            let copying = Copying { desk: desk.clone(), head: head.id };
            desk.counters.copies.fetch_add(1, Ordering::Relaxed);
            let question = Question { generation: head.generation, deadline_ms, ask: ask.clone() };
            tokio::spawn(copying.follow(head, question)).abort_handle()
        };
        Self(heads.into_iter().map(follow).collect())
    }

    /// The question has its answer: the copies go on to their own ends.
    pub(super) fn let_go(&mut self) {
        self.0.clear();
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

impl Copying {
    async fn follow(self, head: Head, question: Question) {
        let now = Instant::now;
        let failed = match self.read(head, &question).await {
            Ok(()) => return,
            Err(Failed::Busy(rest)) => {
                self.desk.table().busy(self.head, now() + rest);
                "it is busy"
            }
            Err(Failed::Lost) => {
                self.desk.table().lost(self.head, now());
                "it was lost"
            }
            Err(Failed::Refused) => "it refused",
        };
        self.desk.counters.copies_failed.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(head = %self.head, failed, "a shadow has not answered a copy");
    }

    /// Reads the answer to its end and keeps nothing of it.
    async fn read(&self, head: Head, question: &Question) -> Result<(), Failed> {
        let desk = &self.desk;
        let mut stream = match timeout(SEND_MAX, desk.heads.ask(head, question)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(Unreached::Full)) => return Err(Failed::Busy(FULL_REST)),
            Ok(Err(Unreached::Transport(_))) | Err(_) => return Err(Failed::Lost),
        };
        loop {
            let frame = timeout(desk.patience.silence, stream.frames.recv::<Answer>()).await;
            match frame {
                Ok(Ok(Some(Answer::Ended { .. }))) => return Ok(()),
                Ok(Ok(Some(Answer::Refused(Refusal::Busy { retry_after_ms })))) => {
                    let rest = Duration::from_millis(retry_after_ms.max(1).into()).min(FULL_REST);
                    return Err(Failed::Busy(rest));
                }
                Ok(Ok(Some(Answer::Refused(Refusal::Moved)))) => return Err(Failed::Lost),
                Ok(Ok(Some(Answer::Refused(_)))) => return Err(Failed::Refused),
                Ok(Ok(Some(_))) => {}
                Ok(Ok(None) | Err(_)) | Err(_) => return Err(Failed::Lost),
            }
        }
    }
}

/// Why a copy has no answer.
enum Failed {
    Busy(Duration),
    Lost,
    Refused,
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.desk.table().end_copy(self.head);
    }
}
