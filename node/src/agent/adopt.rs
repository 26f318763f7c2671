//! Ranks that an agent before this one has started: dials the socket on which each waits, has it prove itself, and listens to what it says
//! from then on. Owns the handshake and the words of those that have ended meanwhile; what is decided of it is the state's, and how long a
//! rank may be silent the actor's.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use stoke_protocol::message::rank::{Exit, FromRank, ToRank};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::belongings::Belongings;
use super::inventory::{Inventory, Kept};
use super::log::LogBook;
use super::process::{DRAIN_MAX, Process, read_frames, write_frames};
use super::spawn::{RankEvents, RankProcess};
use super::watch::Watched;
use crate::link::{self, LinkError};
use crate::worker::text_of;

/// Between two calls at a rank that does not listen yet.
const DIAL_EVERY: Duration = Duration::from_millis(50);

/// Takes over the process of a rank. See [`super::spawn::Spawner::adopt`].
pub fn adopt(
    kept: Kept,
    inventory: &Inventory,
    (logs, belongings): (&LogBook, &Belongings),
    events: RankEvents,
) -> Box<dyn RankProcess> {
    let (handle, frames, killed) = Process::new();
    let (inventory, logs, belongings, id) = (inventory.clone(), logs.clone(), belongings.clone(), kept.id);
    logs.resume(id);
    let watched = Watched::found(&kept);
    tracing::info!(rank = %id, pid = kept.pid, runs = watched.is_some(), "rank of an agent before this one");
    tokio::spawn(async move {
        let exit = match watched {
            Some(watched) => live(watched.end(killed), &kept, &inventory.socket(id), (frames, &events, &logs)).await,
            None => Exit::AgentRestarted,
        };
        // Only a rank that ended while it was alone has written some.
        let mut code = None;
        for frame in inventory.last_words(id).await {
            if let FromRank::Leaving { code: said } = frame {
                code = Some(Exit::Code(said.into()));
            }
            events.frame(frame).await;
        }
        let exit = code.unwrap_or(exit);
        belongings.clear(id, kept.runs_command.then(|| kept.mark())).await;
        tracing::info!(rank = %id, ?exit, "rank is gone");
        logs.ended(id);
        events.exited(exit);
    });
    Box::new(handle)
}

/// Speaks with the rank until it is gone; how it went, as far as it has said so.
async fn live(
    end: impl Future<Output = io::Result<Exit>>,
    kept: &Kept,
    socket: &Path,
    (frames, events, logs): (mpsc::Receiver<ToRank>, &RankEvents, &LogBook),
) -> Exit {
    let mut end = std::pin::pin!(end);
    let (link, back) = tokio::select! {
        met = reach(kept, socket) => met,
        exit = &mut end => return exit.unwrap_or(Exit::Unseen),
    };
    tracing::info!(rank = %kept.id, "rank is back");
    events.frame(back).await;
    let (read, write) = link.into_split();
    tokio::spawn(write_frames(kept.id, write, frames));
    let reader = tokio::spawn(read_frames(kept.id, read, events.clone(), logs.clone()));
    let exit = end.await.unwrap_or(Exit::Unseen);
    let said = tokio::time::timeout(DRAIN_MAX, reader).await;
    said.ok().and_then(Result::ok).and_then(|heard| heard.code).map_or(exit, |code| Exit::Code(code.into()))
}

/// Calls until the rank has proved itself. One that does not is not heard, and falls to whoever looks for silent ranks.
async fn reach(kept: &Kept, socket: &Path) -> (UnixStream, FromRank) {
    let mut calls = interval(DIAL_EVERY);
    calls.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = String::new();
    loop {
        calls.tick().await;
        match meet(socket, kept).await {
            Ok(met) => return met,
            Err(error) => {
                let error = text_of(&error);
                if error != last {
                    tracing::info!(rank = %kept.id, error, "rank does not answer yet");
                    last = error;
                }
            }
        }
    }
}

/// Dials once; the rank's first frame, with which it has proved itself.
async fn meet(socket: &Path, kept: &Kept) -> Result<(UnixStream, FromRank), LinkError> {
    let mut link = dial(socket).await?;
    let refused = |what: &str| LinkError::Io(io::Error::other(what.to_owned()));
    let back = link::receive::<FromRank>(&mut link).await?.ok_or_else(|| refused("it hung up"))?;
    match &back {
        FromRank::Return { id, cookie, .. } if *id == kept.id && kept.has_cookie(cookie) => {}
        _ => return Err(refused("it is not the rank that was started")),
    }
    link::send(&mut link, &ToRank::Adopted).await?;
    Ok((link, back))
}

/// A socket's path is short, an agent's folder need not be: the way leads over a descriptor of the folder.
async fn dial(socket: &Path) -> io::Result<UnixStream> {
    let (_folder, path) = by_descriptor(socket)?;
    UnixStream::connect(path).await
}

/// The same file under a short path, good while the descriptor lives.
pub fn by_descriptor(socket: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let (Some(folder), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let folder = rustix::fs::open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let path = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
    Ok((folder, path))
}
