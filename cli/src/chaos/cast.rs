//! Which processes are of a local cluster, and signals that reach these alone. Owns the way from `local.json` to process descriptors; decides
//! no fault.
//!
//! V1: a process is of the cluster if the supervisor that holds the folder's lock started it, or if an agent of that supervisor did.
//! V2: a signal goes through a descriptor that was opened before its process was seen to be a child of its parent: a process id that is used
//! again reaches nobody.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::failure::{Exit, Failure};
use crate::local::folder::Folder;

const COORDINATOR: &str = "coordinator";

/// A process of the cluster, by descriptor.
#[derive(Debug)]
pub struct Actor {
    /// `coordinator`, or an agent's name; of a rank its agent's.
    pub name: String,
    pub pid: u32,
    process: OwnedFd,
}

/// Everybody who is there now.
#[derive(Debug)]
pub struct Cast {
    pub coordinator: Option<Actor>,
    pub agents: Vec<Actor>,
    /// In the order of their agents, then of their ids: a draw picks the same one on the same scene.
    pub ranks: Vec<Actor>,
}

impl Cast {
    pub fn look(folder: &Folder) -> Result<Self, Failure> {
        let gone = || {
            Failure::new(Exit::NotFound, format!("no local cluster runs in {}", folder.dir.display()))
                .help("start one with `stoke up`, or name its folder with --cluster")
        };
        let supervisor = folder.holder().ok_or_else(gone)?;
        let state = folder.read_state().filter(|state| state.supervisor == supervisor).ok_or_else(gone)?;
        let running = state.processes.iter().filter(|process| process.pid > 0);
        let mut actors: Vec<Actor> =
            running.filter_map(|process| Actor::open(&process.name, process.pid, supervisor)).collect();
        let coordinator = actors.iter().position(|actor| actor.name == COORDINATOR).map(|at| actors.remove(at));
        let processes = processes();
        let mut ranks = Vec::new();
        for agent in &actors {
            let children = processes.iter().filter(|(pid, parent)| *parent == agent.pid && is_worker(*pid));
            ranks.extend(children.filter_map(|(pid, _)| Actor::open(&agent.name, *pid, agent.pid)));
        }
        Ok(Self { coordinator, agents: actors, ranks })
    }

    /// Agents that have ranks, or all where none has any.
    pub fn busy_agents(&self) -> Vec<&Actor> {
        let busy = |agent: &&Actor| self.ranks.iter().any(|rank| rank.name == agent.name);
        let found: Vec<&Actor> = self.agents.iter().filter(busy).collect();
        if found.is_empty() { self.agents.iter().collect() } else { found }
    }
}

impl Actor {
    fn open(name: &str, pid: u32, parent: u32) -> Option<Self> {
        let raw = Pid::from_raw(pid.cast_signed())?;
        let process = pidfd_open(raw, PidfdFlags::empty()).ok()?;
        // V2.
        (parent_of(pid) == Some(parent)).then(|| Self { name: name.to_owned(), pid, process })
    }

    /// Whether it was there to take it.
    pub fn signal(&self, signal: Signal) -> bool {
        pidfd_send_signal(&self.process, signal).is_ok()
    }
}

/// Ids of all processes that run, with their parents', by id.
fn processes() -> Vec<(u32, u32)> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let ids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut found: Vec<(u32, u32)> = ids.filter_map(|pid| Some((pid, parent_of(pid)?))).collect();
    found.sort_unstable();
    found
}

/// The parent of a process that has not ended.
fn parent_of(pid: u32) -> Option<u32> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name in parentheses may hold anything; the state and the parent follow it. A zombie has ended.
fn parse_stat(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    fields.next()?.parse().ok().filter(|_| state != "Z" && state != "X")
}

/// An agent may have other children for a moment; ranks are those that were started as such.
fn is_worker(pid: u32) -> bool {
    let Ok(line) = std::fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")) else { return false };
    line.split(|byte| *byte == 0).nth(1) == Some(b"worker")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_read_behind_any_name_and_zombies_have_none() {
        assert_eq!(parse_stat("12 (a) b) c) S 7 12 12 0"), Some(7));
        assert_eq!(parse_stat("12 (stoke) Z 7 12 12 0"), None);
        assert_eq!(parse_stat("12"), None);
    }

    #[test]
    fn a_process_of_another_parent_is_no_actor() {
        let own = std::process::id();
        let parent = parent_of(own).expect("this process runs");
        assert!(Actor::open("x", own, parent).is_some());
        assert!(Actor::open("x", own, own).is_none(), "V2");
    }

    #[test]
    fn an_empty_folder_has_no_cast() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Cast::look(&Folder::new(dir.path())).unwrap_err().exit, Exit::NotFound);
    }
}
