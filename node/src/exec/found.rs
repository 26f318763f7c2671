//! What is left of a rank's command when the rank itself is gone, found by a mark in the environment of each process that the command has started. The
//! second way: the first is that a rank is the parent of all of them (`family.rs`), and ends them before it ends itself.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use stoke_protocol::message::rank::Cookie;

use super::cgroup::Cgroup;

/// In the environment of a rank, and of its command.
pub const MARK: &str = "STOKE_MARK";
/// As many as tell two ranks apart, of all clusters of a machine.
const MARK_CHARS: usize = 32;
/// A process that was killed is gone within this, or hangs in the kernel.
const END_MAX: Duration = Duration::from_secs(2);

/// Nobody can make one up without the rank's cookie, and nobody can tell the cookie from it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mark(String);

impl Mark {
    pub fn of(cookie: &Cookie) -> Self {
        Self::of_hash(blake3::hash(&cookie.0.0))
    }

    pub fn of_hash(cookie_blake3: blake3::Hash) -> Self {
        Self(cookie_blake3.to_hex()[..MARK_CHARS].to_owned())
    }

    /// This process's own.
    pub fn inherited() -> Option<Self> {
        std::env::var(MARK).ok().map(Self)
    }
}

impl std::fmt::Display for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Kills all processes with this mark, and waits a moment for their end; how many there were. Only processes whose environment this one may read.
pub fn end_marked(mark: &Mark) -> usize {
    let group = Cgroup::of(mark);
    group.as_ref().map(Cgroup::kill);
    let entry = format!("{MARK}={mark}");
    let has_mark = |pid: Pid| {
        let environment = fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == entry.as_bytes())
    };
    let (mut ended, deadline) = (0, Instant::now() + END_MAX);
    loop {
        // The descriptor first: then it is the process that is looked at that is killed.
        let open = |pid: Pid| Some((pid, pidfd_open(pid, PidfdFlags::empty()).ok()?));
        let found: Vec<_> = all().into_iter().filter_map(open).filter(|(pid, _)| has_mark(*pid)).collect();
        if found.is_empty() || Instant::now() > deadline {
            group.iter().for_each(Cgroup::remove);
            return ended;
        }
        for (_, process) in &found {
            ended += usize::from(pidfd_send_signal(process, Signal::KILL).is_ok());
        }
        for (_, process) in &found {
            let left = rustix::event::Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
            let _ = rustix::event::poll(
                &mut [rustix::event::PollFd::new(process, rustix::event::PollFlags::IN)],
                Some(&left),
            );
        }
    }
}

/// Ids of all processes.
fn all() -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)).collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn processes_with_the_mark_end_wherever_they_hide_and_no_others_do() {
        let mark = Mark::of(&Cookie(vec![std::process::id() as u8; 9].into()));
        let other = Command::new("sleep").arg("1000").env(MARK, "another").spawn();
        let mut other = other.unwrap();
        // A session of its own, behind a parent that is gone.
        let hidden = Command::new("setsid")
            .args(["sh", "-c", "trap '' TERM; (sleep 1000; true) &"])
            .env(MARK, mark.to_string())
            .status();
        assert!(hidden.unwrap().success());
        assert!(end_marked(&mark) >= 1);
        assert_eq!(end_marked(&mark), 0);
        assert!(other.try_wait().unwrap().is_none());
        other.kill().and_then(|()| other.wait()).unwrap();
    }
}
