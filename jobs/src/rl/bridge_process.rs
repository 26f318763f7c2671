//! The Python process of a bridge: its pipes, its answers in time, what it said last, and its end. Knows frames and nothing of environments.
//!
//! One thread starts the process and reads its answers: the kernel kills the process when the thread that started it ends (`PR_SET_PDEATHSIG`), so
//! that thread must live as long, and it does, because it reads until the pipe is closed. Another keeps the end of standard error.

use std::io::{self, Read, Write};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::bridge::{BridgeConfig, SOURCE};
use super::env::EnvError;

/// What is kept of a traceback or of standard error: its end, where Python says what it was.
pub(super) const SAID_BYTES_MAX: usize = 4 << 10;
/// Of an answer: a broken process must not take all memory. 64 envs of colour frames of 210 x 160 are 26 MB.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// How long the end of standard error may come after the end of the process: a grandchild may hold the pipe.
const SAID_WAIT: Duration = Duration::from_millis(500);

/// How often whoever waits says that it does.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Answers that were waited for in this process, a second at a time: whoever looks after it sees that it waits for an environment, which has a deadline of its own, and
/// does not hang.
static WAITED: AtomicU64 = AtomicU64::new(0);

pub fn waited() -> u64 {
    WAITED.load(Ordering::Relaxed)
}

/// Why there is no answer.
pub(super) enum Answered {
    Raised(String),
    Ended,
    Late,
    Unreadable(String),
}

#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    requests: ChildStdin,
    answers: Receiver<Result<Vec<u8>, String>>,
    said: Arc<Mutex<Vec<u8>>>,
    /// Nothing is sent: it is closed when standard error is.
    said_all: Receiver<()>,
}

impl Process {
    pub fn start(config: &BridgeConfig, arguments: &str) -> Result<Self, EnvError> {
        let failed = |source| EnvError::Start {
            name: config.name.clone(),
            program: config.python.display().to_string(),
            source,
        };
        let mut command = Command::new(&config.python);
        command.args(["-c", SOURCE, arguments]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if !config.folders.is_empty() {
            let before = std::env::var_os("PYTHONPATH").unwrap_or_default();
            let folders = config.folders.iter().cloned().chain(std::env::split_paths(&before));
            let joined = std::env::join_paths(folders).map_err(|error| failed(io::Error::other(error)))?;
            command.env("PYTHONPATH", joined);
        }
        let (started, child) = sync_channel(1);
        let (answer, answers) = sync_channel(1);
        let reader = move || {
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) => return started.send(Err(error)).expect("the caller waits"),
            };
            let output = child.stdout.take().expect("piped");
            started.send(Ok(child)).expect("the caller waits");
            read_answers(output, &answer);
        };
        thread::Builder::new().name("bridge-answers".to_owned()).spawn(reader).map_err(failed)?;
        let mut child = child.recv().expect("the thread tells of its child").map_err(failed)?;
        let requests = child.stdin.take().expect("piped");
        let errors = child.stderr.take().expect("piped");
        let said = Arc::new(Mutex::new(Vec::new()));
        let (closed, said_all) = sync_channel(0);
        let process = Self { child, requests, answers, said: said.clone(), said_all };
        let keeper = move || keep_end(errors, &said, closed);
        thread::Builder::new().name("bridge-errors".to_owned()).spawn(keeper).map_err(failed)?;
        Ok(process)
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The request is small enough not to block on a process that waits for it.
    pub fn send(&mut self, request: &[u8]) -> Result<(), Answered> {
        self.requests.write_all(request).map_err(|_| Answered::Ended)
    }

    pub fn answer(&mut self, deadline: Duration) -> Result<Vec<u8>, Answered> {
        match self.wait(deadline) {
            Ok(Ok(frame)) if frame.first() == Some(&b'E') => {
                Err(Answered::Raised(String::from_utf8_lossy(&frame[1..]).into_owned()))
            }
            Ok(Ok(frame)) => Ok(frame),
            Ok(Err(problem)) => Err(Answered::Unreadable(problem)),
            Err(RecvTimeoutError::Timeout) => Err(Answered::Late),
            Err(RecvTimeoutError::Disconnected) => Err(Answered::Ended),
        }
    }

    fn wait(&self, deadline: Duration) -> Result<Result<Vec<u8>, String>, RecvTimeoutError> {
        let begun = Instant::now();
        loop {
            WAITED.fetch_add(1, Ordering::Relaxed);
            let left = deadline.saturating_sub(begun.elapsed());
            match self.answers.recv_timeout(left.min(LOOK_EVERY)) {
                Err(RecvTimeoutError::Timeout) if begun.elapsed() < deadline => {}
                answered => return answered,
            }
        }
    }

    /// Ends the process. What it said last, and how it ended.
    fn end(mut self) -> (String, String) {
        // A process whose pipes are closed is ending by itself: it is not to look as if it was killed.
        let _ = self.said_all.recv_timeout(SAID_WAIT);
        let _ = self.child.kill();
        let status = self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        let said = self.said.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        (if said.is_empty() { "nothing".to_owned() } else { said }, status)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already; a child of ours that was killed is always there to be waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Answered {
    pub fn into_error(self, name: &str, deadline: Duration, mut process: Process) -> EnvError {
        let name = name.to_owned();
        match self {
            Answered::Raised(said) => EnvError::Raised { name, said },
            Answered::Unreadable(problem) => EnvError::Answer { name, problem },
            Answered::Late => {
                let _ = process.child.kill();
                EnvError::Silent { name, deadline, said: process.end().0 }
            }
            Answered::Ended => {
                let (said, status) = process.end();
                EnvError::Ended { name, status, said }
            }
        }
    }
}

/// Frame after frame, until the pipe is closed or nobody wants them.
fn read_answers(mut output: ChildStdout, answers: &SyncSender<Result<Vec<u8>, String>>) {
    loop {
        let mut len = [0; 4];
        if output.read_exact(&mut len).is_err() {
            return;
        }
        let len = u32::from_le_bytes(len) as usize;
        let frame = if len == 0 || len > ANSWER_BYTES_MAX {
            Err(format!("{len} bytes, expected from 1 to {ANSWER_BYTES_MAX}"))
        } else {
            let mut frame = vec![0; len];
            if output.read_exact(&mut frame).is_err() {
                return;
            }
            Ok(frame)
        };
        let unreadable = frame.is_err();
        if answers.send(frame).is_err() || unreadable {
            // The process is killed by its owner, and must not lose this thread before that.
            let _ = io::copy(&mut output, &mut io::sink());
            return;
        }
    }
}

/// Keeps the last bytes; `closed` is dropped when there are no more.
fn keep_end(mut errors: ChildStderr, said: &Mutex<Vec<u8>>, closed: SyncSender<()>) {
    let mut piece = [0; 4 << 10];
    while let Ok(len @ 1..) = errors.read(&mut piece) {
        let mut said = said.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        said.extend_from_slice(&piece[..len]);
        let past = said.len().saturating_sub(SAID_BYTES_MAX);
        said.drain(..past);
    }
    drop(closed);
}
