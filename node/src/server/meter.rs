//! What a head has under way and has done, for whoever watches over the model. Owns the counts, and sees each frame that goes out; changes none. Probes
//! and descriptions are not counted: nobody waits for those.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stoke_protocol::message::load::Load;
use stoke_protocol::message::serve::{Answer, Ask};
use stoke_protocol::transport::{FrameSender, TransportError};
use tokio::time::Instant;

/// Of one head, since its process began.
#[derive(Default, Debug)]
pub struct Meter {
    /// Questions that are computed, as the compute thread has said last.
    computing: AtomicU32,
    done: Mutex<Load>,
}

/// Where the frames of one answer go.
pub struct Voice {
    frames: FrameSender,
    visit: Option<Visit>,
}

/// A question that counts, from its arrival on.
struct Visit {
    meter: Arc<Meter>,
    began: Instant,
    /// Its first token is still to come. One that goes on elsewhere had it there.
    is_new: bool,
}

impl Meter {
    /// Of the compute thread: so many questions are computed now.
    pub fn computes(&self, questions: usize) {
        self.computing.store(u32::try_from(questions).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    pub fn load(&self) -> Load {
        let done = *self.done();
        // All that are here, in `waiting` so far.
        let running = self.computing.load(Ordering::Relaxed).min(done.waiting);
        Load { running, waiting: done.waiting - running, ..done }
    }

    /// The lock is held for a few additions.
    fn done(&self) -> MutexGuard<'_, Load> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Voice {
    pub fn new(frames: FrameSender) -> Self {
        Self { frames, visit: None }
    }

    /// From here on the question counts, until this is dropped.
    pub fn count(&mut self, meter: &Arc<Meter>, ask: &Ask) {
        let is_new = match ask {
            Ask::Probe | Ask::Describe => return,
            Ask::Generate(generate) => generate.answered.is_empty(),
            Ask::Embed { .. } | Ask::Infer { .. } => true,
        };
        meter.done().waiting += 1;
        self.visit = Some(Visit { meter: meter.clone(), began: Instant::now(), is_new });
    }

    pub async fn send(&mut self, answer: &Answer) -> Result<(), TransportError> {
        self.frames.send(answer).await?;
        if let Some(visit) = &mut self.visit {
            visit.said(answer);
        }
        Ok(())
    }

    /// Resolves when nobody listens any more.
    pub async fn stopped(&mut self) {
        self.frames.stopped().await;
    }

    pub fn finish(self) -> Result<(), TransportError> {
        self.frames.finish()
    }
}

impl Visit {
    fn said(&mut self, answer: &Answer) {
        let tokens = match answer {
            Answer::Tokens { tokens, .. } => tokens.len() as u64,
            Answer::Vector { tokens, .. } => u64::from(*tokens),
            Answer::Tensors { .. } => 0,
            Answer::Ended { .. } => return self.meter.done().answers += 1,
            Answer::Begun { .. } | Answer::Described { .. } | Answer::Refused(_) => return,
        };
        let mut done = self.meter.done();
        done.tokens += tokens;
        if std::mem::take(&mut self.is_new) {
            done.first_tokens.add(u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX));
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.meter.done().waiting -= 1;
    }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::message::serve::Finish;

    use super::*;

    #[test]
    fn questions_run_or_wait_and_count_when_they_are_over() {
        let meter = Arc::new(Meter::default());
        let visit = |is_new| {
            meter.done().waiting += 1;
            Visit { meter: meter.clone(), began: Instant::now(), is_new }
        };
        let (mut first, mut replayed) = (visit(true), visit(false));
        meter.computes(1);
        assert_eq!((meter.load().running, meter.load().waiting), (1, 1));
        for visit in [&mut first, &mut replayed] {
            visit.said(&Answer::Begun { prompt_tokens: 9 });
            visit.said(&Answer::Tokens { index: 0, tokens: vec![1, 2].into(), text: "a".into() });
            visit.said(&Answer::Tokens { index: 2, tokens: vec![3].into(), text: "b".into() });
            visit.said(&Answer::Ended { why: Finish::Stop, text: String::new() });
        }
        drop((first, replayed));
        let load = meter.load();
        assert_eq!((load.running, load.waiting, load.answers, load.tokens), (0, 0, 2, 6));
        assert_eq!(load.first_tokens.count(), 1, "one of them had its first token elsewhere");
    }
}
