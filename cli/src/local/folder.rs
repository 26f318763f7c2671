//! The folder of a local cluster: what lies where, who holds it, and what runs in it. Owns the lock and `local.json`; starts nothing.
//!
//! ```text
//! DIR/lock            held by the supervisor as long as it lives; its process id inside
//! DIR/local.json      addresses and process ids, replaced at each change
//! DIR/coordinator/    authority, journal, admin credentials, checkpoints
//! DIR/node-1/ ...     one agent each
//! DIR/logs/           coordinator.log, node-1.log, ..., supervisor.log
//! DIR/pardons/        process ids that were killed on purpose: their deaths do not count as crashes
//! DIR/weather         which nodes are cut off, and until when (`stoke chaos`)
//! ```

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::gateways::GatewayFiles;
use crate::failure::{Exit, Failure, OrFail};
use crate::{output, place};

#[derive(Clone, Debug)]
pub struct Folder {
    pub dir: PathBuf,
}

/// Holds the folder: at most one supervisor a folder, whatever dies.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// What runs: for `stoke down`, for people and for tests. The lock, not this file, tells whether it is true.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct State {
    pub supervisor: u32,
    pub address: String,
    pub metrics: Option<String>,
    #[serde(default)]
    pub api: Option<String>,
    #[serde(default)]
    pub otlp: Option<String>,
    /// An older `local.json` has none.
    #[serde(default)]
    pub gateways: GatewayFiles,
    pub processes: Vec<Process>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Process {
    pub name: String,
    pub pid: u32,
    pub restarts: u32,
}

impl Folder {
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Makes the folder (for its owner only) and its parents.
    pub fn create(&self) -> Result<(), Failure> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(self.logs())
            .or_fail(Exit::Negative, format!("make cluster folder {}", self.dir.display()))
    }

    pub fn coordinator(&self) -> PathBuf {
        self.dir.join("coordinator")
    }

    pub fn node(&self, index: u32) -> PathBuf {
        self.dir.join(node_name(index))
    }

    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    pub fn log(&self, process: &str) -> PathBuf {
        self.logs().join(format!("{process}.log"))
    }

    /// Takes the lock, or says who has it.
    pub fn lock(&self) -> Result<Lock, Failure> {
        let path = self.dir.join("lock");
        let mut file = open_lock(&path).or_fail(Exit::Negative, format!("open {}", path.display()))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(Failure::new(
                Exit::Conflict,
                format!("a local cluster already runs in {} (process {})", self.dir.display(), read_pid(&mut file)),
            )
            .help("use it, stop it with `stoke down`, or give another folder with --dir"));
        }
        let written = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()));
        written.or_fail(Exit::Negative, format!("write {}", path.display()))?;
        Ok(Lock { _file: file })
    }

    /// The process that holds the lock now; none when nothing runs here.
    pub fn holder(&self) -> Option<u32> {
        let mut file = File::open(self.dir.join("lock")).ok()?;
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => None,
            Err(_) => read_pid(&mut file).parse().ok(),
        }
    }

    pub fn read_state(&self) -> Option<State> {
        let text = std::fs::read(self.dir.join("local.json")).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// A local cluster that was stopped answers nobody: there is nothing to wait for. Any other folder passes.
    pub fn must_not_be_stopped(&self) -> Result<(), Failure> {
        if self.holder().is_some() || self.read_state().is_none() {
            return Ok(());
        }
        Err(Failure::new(Exit::Unavailable, format!("the local cluster in {} is stopped", self.dir.display()))
            .help(format!("start it again with `{}`", self.up_command())))
    }

    /// What starts it again.
    pub fn up_command(&self) -> String {
        match place::cluster_dir(None) {
            Ok(default) if default == self.dir => "stoke up".to_owned(),
            Ok(_) | Err(_) => format!("stoke up --dir {}", output::quoted(&self.dir.to_string_lossy())),
        }
    }

    /// Replaced in one step, so that a reader never sees half of it.
    pub fn write_state(&self, state: &State) -> Result<(), Failure> {
        let path = self.dir.join("local.json");
        let fresh = self.dir.join("local.json.new");
        let text = serde_json::to_vec_pretty(state).or_fail(Exit::Negative, "encode local.json")?;
        std::fs::write(&fresh, text)
            .and_then(|()| std::fs::rename(&fresh, &path))
            .or_fail(Exit::Negative, format!("write {}", path.display()))
    }

    /// This process is about to be killed on purpose: it is started again as if it had never died before.
    pub fn pardon(&self, pid: u32) -> Result<(), Failure> {
        let path = self.pardons().join(pid.to_string());
        std::fs::create_dir_all(self.pardons())
            .and_then(|()| std::fs::write(&path, ""))
            .or_fail(Exit::Negative, format!("write {}", path.display()))
    }

    /// Whether it was killed on purpose. A pardon holds once: process ids come again.
    pub fn take_pardon(&self, pid: u32) -> bool {
        std::fs::remove_file(self.pardons().join(pid.to_string())).is_ok()
    }

    /// Pardons of an earlier life are for other processes.
    pub fn clear_pardons(&self) {
        let _ = std::fs::remove_dir_all(self.pardons());
    }

    pub fn weather(&self) -> PathBuf {
        self.dir.join("weather")
    }

    fn pardons(&self) -> PathBuf {
        self.dir.join("pardons")
    }

    /// Agents that were made here before; none on the first start.
    pub fn known_nodes(&self) -> Option<u32> {
        (1..).take_while(|index| self.node(*index).is_dir()).last()
    }

    /// The last lines of a process's log.
    pub fn log_tail(&self, process: &str, lines: usize) -> Vec<String> {
        let Ok(bytes) = std::fs::read(self.log(process)) else { return Vec::new() };
        let text = String::from_utf8_lossy(&bytes);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].iter().map(|line| (*line).to_owned()).collect()
    }
}

pub fn node_name(index: u32) -> String {
    format!("node-{index}")
}

/// Each node has an address of the loopback to itself, 127.0.1.1 and on, so that one can be cut off from the others.
pub fn node_ip(index: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 0, 1, 0)).saturating_add(index))
}

/// The node of that name.
pub fn node_index(name: &str) -> Option<u32> {
    name.strip_prefix("node-")?.parse().ok()
}

fn open_lock(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

fn read_pid(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.rewind().and_then(|()| file.read_to_string(&mut text));
    match read {
        Ok(_) if !text.trim().is_empty() => text.trim().to_owned(),
        Ok(_) | Err(_) => "unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_holder() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(&dir.path().join("a/b"));
        folder.create().unwrap();
        assert_eq!(folder.holder(), None);
        let lock = folder.lock().unwrap();
        assert_eq!(folder.holder(), Some(std::process::id()));
        let second = folder.lock().unwrap_err();
        assert_eq!(second.exit, Exit::Conflict);
        assert!(second.message().contains(&std::process::id().to_string()), "{}", second.message());
        drop(lock);
        // A process that another test starts at this moment has the descriptor too, until it runs its own program.
        let let_go = (0..500).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            folder.holder().is_none()
        });
        assert!(let_go, "{:?} holds it", folder.holder());
    }

    #[test]
    fn a_pardon_holds_once() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path());
        assert!(!folder.take_pardon(7));
        folder.pardon(7).unwrap();
        assert!(folder.take_pardon(7));
        assert!(!folder.take_pardon(7));
        folder.pardon(8).unwrap();
        folder.clear_pardons();
        assert!(!folder.take_pardon(8));
    }

    #[test]
    fn state_reads_back_and_logs_have_tails() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path());
        folder.create().unwrap();
        let process = Process { name: "coordinator".into(), pid: 7, restarts: 1 };
        let state = State {
            supervisor: 1,
            address: "127.0.0.1:1".into(),
            metrics: None,
            api: None,
            otlp: None,
            gateways: GatewayFiles::default(),
            processes: vec![process],
        };
        folder.must_not_be_stopped().expect("no cluster was here");
        folder.write_state(&state).unwrap();
        assert_eq!(folder.read_state(), Some(state));
        let stopped = folder.must_not_be_stopped().unwrap_err();
        assert_eq!(stopped.exit, Exit::Unavailable);
        assert!(stopped.help_text().contains("stoke up --dir "), "{}", stopped.help_text());
        std::fs::write(folder.log("coordinator"), "a\nb\nc\n").unwrap();
        assert_eq!(folder.log_tail("coordinator", 2), ["b", "c"]);
    }
}
