//! A command and every process that comes of it: children that leave its group, orphans, daemons. Owns their end. This process is the parent of all whose
//! own parent is gone (`adopt_orphans`), so what is below it in the tree of processes is the family, and nothing else is.
//!
//! The last of a family to end is always a child of this process: its end is what is waited for.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use rustix::process::{
    Pid, Signal, WaitOptions, getpid, getppid, kill_process, kill_process_group, set_child_subreaper,
    set_parent_process_death_signal, wait,
};
use stoke_protocol::message::rank::Exit;
use tokio::signal::unix::{self, SignalKind};
use tokio::time::{Instant, timeout, timeout_at};

use super::cgroup::Cgroup;

/// Processes that are killed are gone within this, or this one may not kill them.
const KILL_MAX: Duration = Duration::from_secs(5);
/// A fork may be faster than a look at all processes: they are looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// From now on this process is the parent of orphans among its descendants.
pub fn adopt_orphans() -> io::Result<()> {
    Ok(set_child_subreaper(Some(getpid()))?)
}

pub struct Family {
    leader: Pid,
    /// How the leader has ended.
    exit: Option<Exit>,
    children: unix::Signal,
    group: Option<Cgroup>,
}

impl Family {
    /// Starts the command as the leader of a process group. It must be called on a thread that lives as long as the family: the kernel kills the leader when
    /// that thread ends, so that it does not outlive this process either.
    pub fn start(command: &mut Command, group: Option<Cgroup>) -> io::Result<Self> {
        // Before the first child, so that no end is missed.
        let children = unix::signal(SignalKind::child())?;
        let parent = getpid();
        let door = group.as_ref().map(Cgroup::door).transpose()?;
        // SAFETY: between fork and exec only async-signal-safe calls are allowed; write, prctl and getppid are. A change of the user, which was asked for
        // before, would take the signal back.
        unsafe {
            command.pre_exec(move || {
                if let Some(door) = &door {
                    rustix::io::write(door, b"0")?;
                }
                set_parent_process_death_signal(Some(Signal::KILL))?;
                // It may have ended before that.
                if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
            });
        }
        // Reaped by `reap`, with all others.
        #[allow(clippy::zombie_processes)]
        let child = command.spawn()?;
        let leader = Pid::from_raw(child.id().cast_signed()).expect("a process has an id above 0");
        Ok(Self { leader, exit: None, children, group })
    }

    pub fn pid(&self) -> i32 {
        self.leader.as_raw_nonzero().get()
    }

    /// Waits for the end of the command itself.
    pub async fn ended(&mut self) -> Exit {
        loop {
            self.reap();
            if let Some(exit) = &self.exit {
                return exit.clone();
            }
            self.children.recv().await;
        }
    }

    /// Asks the command's group to end, where it has not, and kills what is left of the family after `grace`. Nothing is left then.
    pub async fn end(&mut self, grace: Duration) {
        self.reap();
        if self.exit.is_none() && grace > Duration::ZERO {
            // Not reaped, so the group is its own.
            let _ = kill_process_group(self.leader, Signal::TERM);
        }
        let deadline = Instant::now() + grace;
        while !self.is_over() && Instant::now() < deadline {
            let _ = timeout_at(deadline, self.children.recv()).await;
        }
        let deadline = Instant::now() + KILL_MAX;
        while !self.is_over() {
            if Instant::now() > deadline {
                tracing::warn!(left = ?descendants(), "processes of the command cannot be killed");
                return;
            }
            // At once where there is a group; one by one those that have left it, or were never in one.
            self.group.as_ref().map(Cgroup::kill);
            kill_descendants();
            let _ = timeout(LOOK_AGAIN, self.children.recv()).await;
        }
        self.group.iter().for_each(Cgroup::remove);
    }

    fn is_over(&mut self) -> bool {
        self.reap();
        descendants().is_empty()
    }

    /// Takes the ends of all children; this process has none but the family.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if pid == self.leader {
                self.exit = Some(match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => Exit::Code(code),
                    (None, Some(signal)) => Exit::Signal(signal),
                    (None, None) => Exit::Unseen,
                });
            }
        }
    }
}

/// Kills whatever this process has started, at once: it is about to end itself.
pub fn end_all_now() {
    // What a process forks while it is being killed is found by the second look.
    for _ in 0..2 {
        kill_descendants();
    }
}

fn kill_descendants() {
    for pid in descendants() {
        // Nobody else reaps them, so the number is still theirs, or that of one whose own parent has just reaped it.
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Processes below this one in the tree that have not ended.
fn descendants() -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let stats = pids.filter_map(|pid| Some((pid, parent_of(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?)));
    let mut children: BTreeMap<i32, Vec<(i32, bool)>> = BTreeMap::new();
    for (pid, (parent, lives)) in stats {
        children.entry(parent).or_default().push((pid, lives));
    }
    let (mut found, mut next) = (Vec::new(), vec![getpid().as_raw_nonzero().get()]);
    while let Some(parent) = next.pop() {
        for (pid, lives) in children.remove(&parent).unwrap_or_default() {
            found.extend(Pid::from_raw(pid).filter(|_| lives));
            next.push(pid);
        }
    }
    found
}

/// The parent, and whether the process has not ended, from its `stat`; the name in parentheses may hold anything.
fn parent_of(stat: &str) -> Option<(i32, bool)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    Some((fields.next()?.parse().ok()?, state != "Z" && state != "X"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_read_behind_any_name() {
        assert_eq!(parent_of("12 (a) b) c) S 7 12 12 0"), Some((7, true)));
        assert_eq!(parent_of("12 (sh) Z 7 12 12 0"), Some((7, false)));
        assert_eq!(parent_of("12 (sh"), None);
    }
}
