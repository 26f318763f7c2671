//! The worker: the process that a rank is. It inherits one end of a socket pair from its agent, trains with its peers, and is told when to
//! end. Wiring, and the start and the end of the process.
//!
//! `link` (an actor) speaks with the agent, over `tether`, which outlives an agent; `trainer` and `vault` are threads; the exchange has a network
//! thread of its own.

mod beat;
mod damage;
pub(crate) mod failure;
mod finite;
mod joining;
mod link;
mod meter;
mod orders;
mod papers;
mod pending;
mod plan;
mod print;
mod restore;
mod tail;
#[cfg(test)]
mod tests;
mod tether;
mod trainer;
mod vault;
mod work;

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ractor::Actor;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, kill_process, pidfd_open};
use stoke_jobs::Trainers;
use stoke_protocol::message::rank::{FromRank, RankEvent};
use stoke_protocol::transport::Io;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use crate::agent::{KEEPER, LINK_FD, PEER_IP, SHARDS};

pub(crate) use beat::Beat;
pub use damage::ask as ask_for_damage;
pub(crate) use failure::{Failure, text_of};
pub use link::End;
pub(crate) use orders::Orders;
pub use pending::Pending;
pub(crate) use plan::loaded;
#[cfg(test)]
pub(crate) use print::Print;
pub(crate) use trainer::{Assignment, Outside, Told};

/// Frames to the agent that may wait; a rank says a few a second.
const FRAMES_MAX: usize = 1024;
/// The last words of a rank are written within this, or its agent does not listen.
const FAREWELL_MAX: Duration = Duration::from_secs(2);
/// The inherited descriptors of a rank begin after these.
const STANDARD_FDS: i32 = 3;

impl End {
    /// The exit code of the process; what the agent reports.
    pub fn code(self) -> u8 {
        match self {
            Self::Released => 0,
            Self::Failed => 1,
            Self::HungUp => 3,
            Self::Stopped => 4,
        }
    }
}

/// Runs this process as a rank that knows these trainers. For the hidden command `stoke worker` and for [`crate::rank`]; set up `tracing` before (to
/// standard error: the agent keeps it).
pub fn main(trainers: Trainers) -> ExitCode {
    failure::keep_panics();
    let (link, ip, shards) = match inherited().and_then(|inherited| end_with_keeper().map(|()| inherited)) {
        Ok(inherited) => inherited,
        Err(problem) => {
            eprintln!("stoke worker is started by a node agent, not by hand: {problem}");
            return ExitCode::from(2);
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("start the worker's runtime: {error}");
            return ExitCode::from(End::Failed.code());
        }
    };
    let end = runtime.block_on(async {
        link.set_nonblocking(true)?;
        let io = Io::thread("stoke-rank-net").map_err(std::io::Error::other)?;
        let place = Place { ip, shards, trainers };
        Ok::<_, std::io::Error>(run(UnixStream::from_std(link)?, place, io).await)
    });
    // Threads that still compute go with the process.
    runtime.shutdown_background();
    match end {
        Ok(end) => ExitCode::from(end.code()),
        Err(error) => {
            eprintln!("open the link to the agent: {error}");
            ExitCode::from(End::Failed.code())
        }
    }
}

/// Where a rank is, and what it can do.
pub struct Place {
    /// Where it listens for its peers.
    pub ip: IpAddr,
    /// Leads to the shards of checkpoints in this machine's memory.
    pub shards: Option<PathBuf>,
    pub trainers: Trainers,
}

/// A rank over a link. Ends when it is released, stopped or fails, or is without an agent for too long; threads of it may still be on their way out then.
pub async fn run(link: UnixStream, place: Place, io: Io) -> End {
    let (say, said) = mpsc::channel::<FromRank>(FRAMES_MAX);
    let (end, ended) = oneshot::channel();
    let last_words = say.clone();
    let arguments = link::Arguments { io, place, say, end };
    let Ok((actor, task)) = link::Link::spawn(None, link::Link, arguments).await else { return End::Failed };
    let tether = tokio::spawn(tether::hold(link, said, actor.clone()));
    let end = ended.await.unwrap_or_else(|_| {
        let error = failure::last_panic();
        tracing::error!(%error, "the rank's link actor failed");
        let _ = last_words.try_send(FromRank::Event(RankEvent::Failed { error, permanent: false }));
        End::Failed
    });
    actor.stop(None);
    let _ = task.await;
    let _ = last_words.try_send(FromRank::Leaving { code: end.code() });
    // No sender is left: the tether ends after the last frame.
    drop(last_words);
    let _ = tokio::time::timeout(FAREWELL_MAX, tether).await;
    end
}

/// Ends this process at once when its keeper is gone, whoever else is there: a local cluster leaves nothing behind.
fn end_with_keeper() -> Result<(), String> {
    let Ok(number) = std::env::var(KEEPER) else { return Ok(()) };
    let pid = number.parse().ok().and_then(Pid::from_raw).ok_or_else(|| format!("{KEEPER} is {number:?}"))?;
    let keeper =
        pidfd_open(pid, PidfdFlags::empty()).map_err(|error| format!("{KEEPER}, process {number}: {error}"))?;
    let watch = move || {
        while poll(&mut [PollFd::new(&keeper, PollFlags::IN)], None).is_err() {}
        crate::exec::end_all_now();
        let _ = kill_process(getpid(), Signal::KILL);
    };
    let thread = std::thread::Builder::new().name("keeper".to_owned()).spawn(watch);
    thread.map(drop).map_err(|error| format!("watch {KEEPER}: {error}"))
}

/// What the agent left for this process. Called once, before any other thread.
fn inherited() -> Result<(std::os::unix::net::UnixStream, IpAddr, Option<PathBuf>), String> {
    let number = std::env::var(LINK_FD).map_err(|_| format!("{LINK_FD} is not set"))?;
    let number: i32 = number.parse().map_err(|_| format!("{LINK_FD} is {number:?}"))?;
    if number < STANDARD_FDS {
        return Err(format!("{LINK_FD} is {number}, a standard stream"));
    }
    // SAFETY: the agent left this descriptor for us alone, and nothing in this process has opened or taken one yet. A number that is not
    // open is refused by the next call.
    let link = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&link, rustix::io::FdFlags::CLOEXEC).map_err(|error| format!("{LINK_FD}: {error}"))?;
    let ip = match std::env::var(PEER_IP) {
        Ok(ip) => ip.parse().map_err(|_| format!("{PEER_IP} is {ip:?}"))?,
        Err(_) => Ipv4Addr::LOCALHOST.into(),
    };
    Ok((link.into(), ip, std::env::var_os(SHARDS).map(PathBuf::from)))
}
