//! A rank's end of the link to its agent, over the lives of agents. Owns the connection, the wait for the next agent and what is told to it;
//! understands no frame but those about itself. The rank steps on meanwhile: its way to its peers does not lead over the agent.
//!
//! E1: a process that was not settled, or not started, ends with its agent: no agent would find it, or it has not begun.
//! E2: whoever opens the socket is of the rank's own user, and the first that the rank says to it is its cookie.
//! E3: without an agent for longer than the grace, the rank ends; whoever ends without an agent writes down what was to be told.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use ractor::ActorRef;
use stoke_protocol::message::rank::{Cookie, FromRank, RankId, Settle, ToRank};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::failure::text_of;
use super::link::Message;
use super::pending::Pending;
use super::print::Print;
use crate::agent::{by_descriptor, write_last_words};
use crate::link as frames;

/// Frames on their way to or from the agent; the others wait in `Pending` or in the socket.
const FRAMES_MAX: usize = 64;
/// An agent that has dialled answers within this, or it is none.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// After a call that could not be taken (no descriptor is left, say): not at once, or it would be a loop.
const ACCEPT_AGAIN: Duration = Duration::from_millis(200);

/// Where the rank can be found when its agent is gone.
struct Home {
    settle: Settle,
    listener: UnixListener,
    print: Print,
}

struct Tether {
    actor: ActorRef<Message>,
    said: mpsc::Receiver<FromRank>,
    /// Nothing more will be said: the rank ends.
    closed: bool,
    pending: Pending,
    home: Option<Home>,
    /// Known from the start on.
    id: Option<RankId>,
}

/// Holds the link from the first agent on, until all that comes out of `said` is told, or written down.
pub async fn hold(link: UnixStream, said: mpsc::Receiver<FromRank>, actor: ActorRef<Message>) {
    let (pending, home, id) = (Pending::default(), None, None);
    let mut tether = Tether { actor, said, closed: false, pending, home, id };
    let mut link = link;
    loop {
        tether.talk(link).await;
        if tether.closed && tether.pending.is_empty() {
            return;
        }
        let (Some(mut home), Some(id)) = (tether.home.take(), tether.id) else {
            // E1. What is still said is for nobody.
            let _ = tether.actor.cast(Message::HungUp);
            return;
        };
        tracing::warn!(grace_ms = home.settle.orphan_grace_ms, "the agent is gone, going on without one");
        let Some(next) = tether.wait(&mut home, id).await else { return tether.write_down(&home, id).await };
        tracing::info!("another agent is there");
        tether.home = Some(home);
        link = next;
    }
}

impl Tether {
    /// Until the agent hangs up, or everything is told.
    async fn talk(&mut self, link: UnixStream) {
        let (read, write) = link.into_split();
        let (hear, mut heard) = mpsc::channel(FRAMES_MAX);
        let (tell, told) = mpsc::channel(FRAMES_MAX);
        let reader = tokio::spawn(read_frames(read, hear));
        let writer = tokio::spawn(write_frames(write, told));
        // An agent that does not read any more may have said something before.
        let mut reads = true;
        while !(self.closed && self.pending.is_empty()) {
            tokio::select! {
                biased;
                frame = heard.recv() => match frame {
                    Some(frame) => self.hear(frame),
                    None => break,
                },
                frame = self.said.recv(), if !self.closed => self.say(frame),
                room = tell.reserve(), if reads && !self.pending.is_empty() => match room {
                    Ok(room) => drop(self.pending.pop().map(|frame| room.send(frame))),
                    Err(_) => reads = false,
                },
            }
        }
        drop(tell);
        if self.closed && self.pending.is_empty() {
            // The last words are on their way.
            let _ = writer.await;
        } else {
            writer.abort();
        }
        reader.abort();
    }

    fn say(&mut self, frame: Option<FromRank>) {
        let Some(frame) = frame else {
            self.closed = true;
            return;
        };
        if let (FromRank::Alive, Some(home)) = (&frame, &mut self.home) {
            look(&mut home.print);
        }
        self.pending.push(frame);
    }

    fn hear(&mut self, frame: ToRank) {
        match &frame {
            ToRank::Settle(settle) => match Home::open(settle.clone()) {
                Ok(home) => self.home = Some(home),
                Err(error) => {
                    let error = format!("make the socket on which this rank waits for another agent: {error}");
                    return drop(self.actor.cast(Message::Homeless(error)));
                }
            },
            ToRank::Taken { said } => self.pending.taken(*said),
            ToRank::Certificate { .. } => self.pending.certified(),
            ToRank::Start(start) => self.id = Some(start.id),
            ToRank::Membership(_) | ToRank::Commit { .. } | ToRank::Committed { .. } | ToRank::Abandon { .. } => {}
            ToRank::Adopted | ToRank::Release | ToRank::Stop { .. } => {}
            ToRank::Stores(_) | ToRank::Coordinator { .. } | ToRank::Rollouts { .. } => {}
        }
        let _ = self.actor.cast(Message::Frame(frame));
    }

    /// Waits for the next agent. None: the rank ends before one comes.
    async fn wait(&mut self, home: &mut Home, id: RankId) -> Option<UnixStream> {
        let mut grace = Some(Instant::now() + Duration::from_millis(home.settle.orphan_grace_ms));
        while !self.closed {
            tokio::select! {
                frame = self.said.recv() => {
                    if frame == Some(FromRank::Alive) {
                        look(&mut home.print);
                    }
                    self.say(frame);
                }
                called = home.listener.accept() => match called {
                    Ok((link, _)) => match self.answer(link, home, id).await {
                        Ok(link) => return Some(link),
                        Err(error) => tracing::warn!(error = text_of(&error), "somebody called that is no agent"),
                    },
                    Err(error) => {
                        tracing::warn!(%error, "a call could not be taken");
                        sleep(ACCEPT_AGAIN).await;
                    }
                },
                () = sleep_until(grace.unwrap_or_else(Instant::now)), if grace.is_some() => {
                    tracing::error!("no agent came within the grace, ending");
                    grace = None;
                    let _ = self.actor.cast(Message::HungUp);
                }
            }
        }
        None
    }

    /// E2.
    async fn answer(&mut self, mut link: UnixStream, home: &Home, id: RankId) -> Result<UnixStream, frames::LinkError> {
        let caller = link.peer_cred()?.uid();
        if caller != rustix::process::geteuid().as_raw() {
            return Err(io::Error::other(format!("user {caller} is not the one of this rank")).into());
        }
        let next = self.pending.rewind();
        let talk = async {
            frames::send(&mut link, &FromRank::Return { id, cookie: home.settle.cookie.clone(), next }).await?;
            frames::receive::<ToRank>(&mut link).await
        };
        match timeout(ANSWER_MAX, talk).await {
            Ok(Ok(Some(ToRank::Adopted))) => Ok(link),
            Ok(Ok(_)) => Err(io::Error::other("it does not want this rank").into()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
        }
    }

    /// E3.
    async fn write_down(&mut self, home: &Home, id: RankId) {
        let next = self.pending.rewind();
        // Without the cookie: whoever reads it has the rank's folder.
        let first = FromRank::Return { id, cookie: Cookie::default(), next };
        let words: Vec<FromRank> = std::iter::once(first).chain(std::iter::from_fn(|| self.pending.pop())).collect();
        if let Err(error) = write_last_words(home.settle.socket.as_ref(), &words).await {
            tracing::warn!(%error, "last words were not written");
        }
    }
}

impl Home {
    fn open(settle: Settle) -> io::Result<Self> {
        let socket = PathBuf::from(&settle.socket);
        if let Err(error) = std::fs::remove_file(&socket)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        let (_folder, path): (OwnedFd, PathBuf) = by_descriptor(&socket)?;
        let listener = UnixListener::bind(path)?;
        let print = Print::new(PathBuf::from(&settle.log), settle.log_part, settle.log_bytes);
        Ok(Self { settle, listener, print })
    }
}

fn look(print: &mut Print) {
    if let Err(error) = print.look() {
        tracing::warn!(%error, "the log could not be cut");
    }
}

async fn read_frames(mut link: OwnedReadHalf, hear: mpsc::Sender<ToRank>) {
    loop {
        match frames::receive::<ToRank>(&mut link).await {
            Ok(Some(frame)) => {
                if hear.send(frame).await.is_err() {
                    return;
                }
            }
            Ok(None) => return,
            Err(error) => return tracing::error!(error = text_of(&error), "the agent sent what is no frame"),
        }
    }
}

async fn write_frames(mut link: OwnedWriteHalf, mut told: mpsc::Receiver<FromRank>) {
    while let Some(frame) = told.recv().await {
        if frames::send(&mut link, &frame).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::path::Path;

    use stoke_jobs::Trainers;
    use stoke_protocol::ids::{Generation, JobId, Rank};
    use stoke_protocol::message::rank::{StartFrom, StartRank};
    use stoke_protocol::transport::Io;

    use super::*;
    use crate::worker::tests::{Bench, PATIENCE};
    use crate::worker::{End, Place, run};

    fn place() -> Place {
        Place { ip: Ipv4Addr::LOCALHOST.into(), shards: None, trainers: Trainers::BuiltIn }
    }

    fn settle(dir: &Path, orphan_grace_ms: u64) -> Settle {
        // No file of a test's output is ever full.
        let (log, log_part, log_bytes) = (dir.join("log").display().to_string(), 0, u64::MAX);
        // A path that no socket could have.
        let folder = dir.join("a".repeat(120));
        std::fs::create_dir_all(&folder).unwrap();
        let socket = folder.join("rank.sock").display().to_string();
        Settle { socket, cookie: Cookie(vec![7; 32].into()), orphan_grace_ms, log, log_part, log_bytes }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_rank_that_was_not_started_ends_with_its_agent() {
        let dir = tempfile::tempdir().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let rank = tokio::spawn(run(theirs, place(), Io::thread("stoke-test-net").unwrap()));
        frames::send(&mut ours, &ToRank::Settle(settle(dir.path(), 3_600_000))).await.unwrap();
        drop(ours);
        assert_eq!(timeout(PATIENCE, rank).await.unwrap().unwrap(), End::HungUp);
    }

    /// Without a certificate when its first agent dies: the second one is told everything anew.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_rank_proves_itself_to_the_next_agent_and_ends_when_none_comes() {
        let bench = Bench::new();
        let settle = settle(bench.path(), 1_000);
        let socket = settle.socket.clone();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let rank = tokio::spawn(run(theirs, place(), Io::thread("stoke-test-net").unwrap()));
        let id = RankId { job: JobId(1), generation: Generation(1), rank: Rank(0) };
        let (spec, checkpoints) = (bench.spec("steps = 1", ""), bench.base("c"));
        frames::send(&mut ours, &ToRank::Settle(settle.clone())).await.unwrap();
        frames::send(
            &mut ours,
            &ToRank::Start(StartRank { id, spec, checkpoints, from: StartFrom::Seed, memory_bytes: 1 << 20 }),
        )
        .await
        .unwrap();
        let hello = frames::receive::<FromRank>(&mut ours).await.unwrap().unwrap();
        assert!(matches!(hello, FromRank::Hello { .. }), "{hello:?}");
        drop(ours);
        for _ in 0..2 {
            let (_folder, path) = crate::agent::by_descriptor(Path::new(&socket)).unwrap();
            let mut next = UnixStream::connect(path).await.unwrap();
            let back = timeout(PATIENCE, frames::receive::<FromRank>(&mut next)).await.unwrap().unwrap().unwrap();
            assert_eq!(back, FromRank::Return { id, cookie: settle.cookie.clone(), next: 1 });
            frames::send(&mut next, &ToRank::Adopted).await.unwrap();
            let again = frames::receive::<FromRank>(&mut next).await.unwrap().unwrap();
            assert_eq!(again, hello, "it has no certificate yet");
        }
        assert_eq!(timeout(PATIENCE, rank).await.unwrap().unwrap(), End::HungUp);
        let words = std::fs::read(Path::new(&socket).with_extension("last")).unwrap();
        let (mut words, mut last) = (&words[..], None);
        while let Some(frame) = frames::receive::<FromRank>(&mut words).await.unwrap() {
            last = Some(frame);
        }
        assert_eq!(last, Some(FromRank::Leaving { code: End::HungUp.code() }));
    }
}
