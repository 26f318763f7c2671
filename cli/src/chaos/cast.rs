//! Which processes are of a local cluster, and signals that reach these alone. Owns the way from `local.json` to process descriptors; decides
//! no fault.
//!
//! V1: a process is of the cluster if the supervisor that holds the folder's lock started it, or if it is in the records of an agent's ranks.
//! V2: a signal goes through a descriptor that was opened before its process was seen to be a child of the supervisor, or to be the recorded
//! one: a process id that is used again reaches nobody.

use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use stoke_node::agent::{Inventory, Kept};

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
    /// In the order of their agents, then of their rank ids: a draw picks the same one on the same scene.
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
        let mut ranks = Vec::new();
        for agent in &actors {
            // One whose records cannot be read has none to be struck.
            let kept = Inventory::open(&folder.dir.join(&agent.name)).and_then(|inventory| inventory.read());
            ranks.extend(kept.unwrap_or_default().iter().filter_map(|kept| Actor::rank(&agent.name, kept)));
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
        // V2.
        Self::descriptor(name, pid).filter(|_| parent_of(pid) == Some(parent))
    }

    fn rank(agent: &str, kept: &Kept) -> Option<Self> {
        Self::descriptor(agent, kept.pid).filter(|_| kept.is_running())
    }

    fn descriptor(name: &str, pid: u32) -> Option<Self> {
        let process = pidfd_open(Pid::from_raw(pid.cast_signed())?, PidfdFlags::empty()).ok()?;
        Some(Self { name: name.to_owned(), pid, process })
    }

    /// Whether it was there to take it.
    pub fn signal(&self, signal: Signal) -> bool {
        pidfd_send_signal(&self.process, signal).is_ok()
    }
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
