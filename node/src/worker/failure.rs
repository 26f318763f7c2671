//! Why a rank gives up, in one text for people, and how a panic becomes one. Owns the panic hook.

use std::error::Error;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Mutex;

use stoke_jobs::JobError;
use stoke_protocol::ids::{Fingerprint, Generation, Step};
use stoke_protocol::message::rank::{Given, RankEvent, RankId};

use crate::exchange::ExchangeError;

/// The text of the last panic of this process, for the report; its trace goes to the log as usual.
static LAST_PANIC: Mutex<Option<String>> = Mutex::new(None);

/// How training ended, if not well.
#[derive(Debug)]
pub enum Failure {
    /// This rank cannot go on; the text says what failed, where, and what to do.
    Error(String),
    /// The same, and another try would end the same way: the spec, the data or the checkpoint is wrong.
    Permanent(String),
    /// The checkpoint to begin with cannot be used.
    Damaged { uri: String, error: String },
    /// The connection to another rank is gone. The coordinator knows better why, and makes another generation.
    PeerLost { peer: RankId, error: String },
    /// A step cannot be done, and the coordinator decides what follows.
    Undecided(Undecided),
    /// Another rank has left this generation: it was told of the next one before this rank is.
    PeerLeft,
    /// Another generation begins, and this one's step is given up.
    Interrupted,
    /// This rank was told to stop.
    Stopped,
}

/// What keeps a step from being done.
#[derive(Debug)]
pub enum Undecided {
    /// The sum is not finite, and the step may not be left out.
    NotFinite { given: Given },
    /// The members' parameters are not the same.
    Differ { replicas: Vec<(RankId, Fingerprint)> },
    /// A part of the optimizer's state is nobody's any more, or the two that keep it do not agree.
    StateLost { error: String },
}

impl Undecided {
    /// After `step` steps of a generation.
    pub fn event(self, generation: Generation, step: Step) -> RankEvent {
        match self {
            Self::NotFinite { given } => RankEvent::NotFinite { generation, step, given },
            Self::Differ { replicas } => RankEvent::Differ { generation, step, replicas: replicas.into() },
            Self::StateLost { error } => RankEvent::StateLost { generation, step, error },
        }
    }
}

impl From<ExchangeError> for Failure {
    fn from(error: ExchangeError) -> Self {
        let text = text_of(&error);
        match error {
            ExchangeError::Aborted { .. } => Self::Interrupted,
            ExchangeError::PeerLeft { .. } => Self::PeerLeft,
            ExchangeError::Differ { replicas, .. } => Self::Undecided(Undecided::Differ { replicas }),
            ExchangeError::PeerLost { peer, .. }
            | ExchangeError::Unreachable { peer, .. }
            | ExchangeError::Absent { peer, .. } => Self::PeerLost { peer, error: text },
            ExchangeError::Bind(_)
            | ExchangeError::NotARank { .. }
            | ExchangeError::Membership { .. }
            | ExchangeError::EndpointClosed
            | ExchangeError::StaleTerm { .. }
            | ExchangeError::Refused { .. }
            | ExchangeError::TooLarge { .. }
            | ExchangeError::State { .. }
            | ExchangeError::StepOrder { .. } => Self::Error(text),
        }
    }
}

impl From<JobError> for Failure {
    fn from(error: JobError) -> Self {
        let text = text_of(&error);
        if error.is_passing() { Self::Error(text) } else { Self::Permanent(text) }
    }
}

impl From<crate::checkpoint::CheckpointError> for Failure {
    fn from(error: crate::checkpoint::CheckpointError) -> Self {
        Self::Error(text_of(&error))
    }
}

/// Of a text for people: what a file says may be of any length, and a report has to fit into a frame.
const TEXT_CHARS_MAX: usize = 4_000;

/// An error with its causes, in one line; a cause that repeats what was said is left out. What it quotes from files may be anything: it is cut, and nothing in it
/// commands a terminal.
pub fn text_of(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    let shown = |letter: char| if letter.is_control() { letter.escape_debug().collect() } else { letter.to_string() };
    let mut said: String = text.chars().take(TEXT_CHARS_MAX).map(shown).collect();
    if text.chars().nth(TEXT_CHARS_MAX).is_some() {
        said.push_str(" ... (the rest is left out)");
    }
    said
}

/// Keeps the text of panics beside printing them.
pub fn keep_panics() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let what = info.payload_as_str().unwrap_or("of an unknown kind");
        let text = match info.location() {
            Some(place) => format!("panic at {place}: {what}"),
            None => format!("panic: {what}"),
        };
        *LAST_PANIC.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(text);
        print(info);
    }));
}

/// The text of the last panic.
pub fn last_panic() -> String {
    let last = LAST_PANIC.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    last.unwrap_or_else(|| "panic".to_owned())
}

/// Runs `work`; a panic is a failure with its text.
pub fn catch<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        let plain = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = LAST_PANIC.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let text = text.or(plain).or_else(|| payload.downcast_ref::<String>().cloned());
        Err(Failure::Error(text.unwrap_or_else(|| "panic".to_owned())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_says_is_cut_and_commands_no_terminal() {
        let error = std::io::Error::other(format!("a\u{1b}[31m\u{7}{}", "x".repeat(100_000)));
        let text = text_of(&error);
        assert!(text.starts_with("a\\u{1b}[31m\\u{7}x") && text.ends_with("x ... (the rest is left out)"), "{text}");
        assert!(text.len() < 5_000 && text_of(&std::io::Error::other("short")) == "short");
    }

    #[test]
    fn a_panic_is_a_failure_with_its_words() {
        let Err(Failure::Error(text)) = catch::<()>(|| panic!("lane {} burst", 3)) else { panic!("expected an error") };
        assert!(text.contains("lane 3 burst"), "{text}");
    }

    #[test]
    fn causes_are_told_once() {
        let inner = std::io::Error::other("no route");
        let outer =
            ExchangeError::Bind(std::sync::Arc::new(stoke_protocol::transport::TransportError::Endpoint(inner)));
        assert_eq!(text_of(&outer), "open the endpoint for peers: open endpoint: no route");
    }
}
