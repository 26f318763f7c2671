//! The end of a process, seen through its pidfd within a fraction of a millisecond. Owns the reaping of ranks; std's and tokio's own child
//! handling stay out of it, or one of them would take the status of the other. A process that an agent before this one has started is somebody
//! else's child: its end is seen in the same way, its status is not.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_send_signal};
use stoke_protocol::message::rank::Exit;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use super::inventory::Kept;

/// A process with its group, until it is gone.
#[derive(Debug)]
pub struct Watched {
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
    parent: Parent,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Parent {
    /// It is a zombie, and its number nobody else's, until it is reaped here.
    Us,
    Another,
}

impl Watched {
    /// Watches a child that leads its process group. It must be a child of this process and not reaped.
    pub fn new(pid: u32) -> io::Result<Self> {
        Self::open(pid, Parent::Us)
    }

    /// Watches a process of an agent before this one; none if it is gone.
    pub fn found(kept: &Kept) -> Option<Self> {
        // In this order: the descriptor is of whoever had the number before it was asked whose it is.
        let watched = Self::open(kept.pid, Parent::Another).ok()?;
        kept.is_running().then_some(watched)
    }

    fn open(pid: u32, parent: Parent) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)?;
        // SAFETY: an `OwnedFd` is open, and gives the same descriptor until it is dropped, which only the `AsyncFd` does.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }.map_err(io::Error::from)?;
        Ok(Self { pid, pidfd, parent })
    }

    /// Waits for the end of the process, kills what is left of its group, and reaps it; what is left of the group of another's child is not
    /// known to be that group any more. Each message of `kill` is a SIGKILL to the whole group; only here, where it is known that the process
    /// was not reaped and its number cannot belong to somebody else.
    pub async fn end(self, mut kill: mpsc::Receiver<()>) -> io::Result<Exit> {
        loop {
            tokio::select! {
                biased;
                ready = self.pidfd.readable() => break drop(ready?),
                Some(()) = kill.recv() => self.kill(),
            }
        }
        if self.parent == Parent::Another {
            return Ok(Exit::Unseen);
        }
        kill_group(self.pid);
        let status = rustix::process::waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), WaitIdOptions::EXITED)?;
        Ok(exit_of(&status.ok_or(io::ErrorKind::WouldBlock)?))
    }

    fn kill(&self) {
        // Stopped first, another's child cannot end and be reaped before its group is named.
        if self.parent == Parent::Us || pidfd_send_signal(self.pidfd.get_ref(), Signal::STOP).is_ok() {
            kill_group(self.pid);
        }
    }

    pub fn pid(&self) -> Pid {
        self.pid
    }
}

/// One that is gone is no error.
fn kill_group(pid: Pid) {
    let _ = rustix::process::kill_process_group(pid, Signal::KILL);
}

fn exit_of(status: &WaitIdStatus) -> Exit {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::NotStarted("the system reported neither a code nor a signal".into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::*;

    fn shell(script: &str) -> Watched {
        // Reaped by `end`, and by nothing else.
        #[allow(clippy::zombie_processes)]
        let child = Command::new("sh").args(["-c", script]).process_group(0).spawn().unwrap();
        Watched::new(child.id()).unwrap()
    }

    fn is_there(pid: Pid) -> bool {
        rustix::process::test_kill_process(pid).is_ok()
    }

    #[tokio::test]
    async fn codes_and_signals_are_told_apart_and_nothing_is_left() {
        for (script, exit) in
            [("exit 0", Exit::Code(0)), ("exit 7", Exit::Code(7)), ("kill -SEGV $$", Exit::Signal(11))]
        {
            let child = shell(script);
            let pid = child.pid();
            assert_eq!(child.end(mpsc::channel(1).1).await.unwrap(), exit);
            assert!(!is_there(pid), "a zombie is left");
        }
    }

    #[tokio::test]
    async fn a_kill_takes_the_whole_group_and_is_seen_at_once() {
        let child = shell("trap '' TERM; sleep 1000 & echo; wait");
        let (kill, killed) = mpsc::channel(1);
        let pid = child.pid();
        let end = tokio::spawn(child.end(killed));
        let start = Instant::now();
        kill.send(()).await.unwrap();
        assert_eq!(end.await.unwrap().unwrap(), Exit::Signal(9));
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        println!("seen after {:?}", start.elapsed());
        // The members are reaped by whoever inherits them, a moment later.
        let deadline = Instant::now() + Duration::from_secs(5);
        while rustix::process::test_kill_process_group(pid).is_ok() && Instant::now() < deadline {
            let members = Command::new("ps").args(["-o", "stat=", "-g", &pid.as_raw_nonzero().to_string()]).output();
            if members.is_ok_and(|ps| ps.stdout.split(|b| *b == b'\n').all(|l| l.is_empty() || l.starts_with(b"Z"))) {
                break;
            }
        }
        assert!(Instant::now() < deadline, "a member of the group is left");
    }

    #[tokio::test]
    async fn what_a_dead_rank_left_running_is_killed() {
        let child = shell("sleep 1000 & exit 3");
        let pid = child.pid();
        assert_eq!(child.end(mpsc::channel(1).1).await.unwrap(), Exit::Code(3));
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let group = Command::new("ps").args(["-e", "-o", "pgid=,stat="]).output().unwrap();
            let left = String::from_utf8_lossy(&group.stdout)
                .lines()
                .filter_map(|line| line.trim().split_once(char::is_whitespace))
                .any(|(pgid, stat)| pgid == pid.as_raw_nonzero().to_string() && !stat.trim().starts_with('Z'));
            if !left {
                break;
            }
            assert!(Instant::now() < deadline, "a child of the rank is left");
        }
    }
}
