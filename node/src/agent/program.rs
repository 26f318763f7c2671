//! Ranks that run a program of the user's own, in place of this agent's. Owns what such a process has that others have not, a group that bounds it, and what
//! it lacks, the agent's own variables; and the words for one that ends before it has said anything.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use stoke_protocol::message::rank::{Exit, RankEvent};
use stoke_protocol::spec::{Artifact, Bytes};
use stoke_protocol::transport::WEATHER_VARIABLE;

use super::process::KEEPER;
use crate::artifact::Cache;
use crate::exec::{Cgroup, Mark};

/// Of the agent's variables whose names are ours, all that such a program is given. The rest is the agent's.
pub const OURS: [&str; 2] = [KEEPER, WEATHER_VARIABLE];
/// A file that was written a moment ago may be open in a process that another thread has just forked, and cannot run until that one has become another program.
const BUSY_MAX: Duration = Duration::from_secs(1);
const BUSY_AGAIN: Duration = Duration::from_millis(2);

/// The program of one rank.
#[derive(Clone, Debug)]
pub struct Own {
    artifact: Artifact,
    path: PathBuf,
    group: Option<Cgroup>,
    memory_bytes: u64,
}

/// What a rank has said in its life.
#[derive(Clone, Default, Debug)]
pub struct Heard {
    /// Anything at all.
    pub any: bool,
    /// The code that it leaves with.
    pub code: Option<u8>,
}

impl Own {
    /// It was fetched. Its group is that of everything with the mark.
    pub fn new(
        artifacts: &Path,
        artifact: Artifact,
        mark: &Mark,
        (memory_bytes, cpus): (u64, u32),
    ) -> io::Result<Self> {
        let path = Cache::path(artifacts, artifact);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
        let made = Cgroup::of(mark).map(|group| group.make(memory_bytes, cpus));
        let (group, problem) = match made {
            Some(Ok((group, problem))) => (Some(group), problem),
            Some(Err(problem)) => (None, Some(problem)),
            None => (None, Some("this machine has no control groups of version 2".to_owned())),
        };
        if let Some(problem) = problem {
            tracing::warn!(
                problem,
                "memory and cpus of a rank's own program are counted, and not limited (docs/exec.md)"
            );
        }
        Ok(Self { artifact, path, group, memory_bytes })
    }

    pub fn command(&self) -> io::Result<Command> {
        let mut command = Command::new(&self.path);
        command.arg("worker");
        let door = self.group.as_ref().map(Cgroup::door).transpose()?;
        if let Some(door) = door {
            // SAFETY: between fork and exec only async-signal-safe calls are allowed; write is one.
            unsafe {
                command.pre_exec(move || Ok(rustix::io::write(&door, b"0").map(drop)?));
            }
        }
        Ok(command)
    }

    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        let deadline = Instant::now() + BUSY_MAX;
        loop {
            match command.spawn() {
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && Instant::now() < deadline => {
                    std::thread::sleep(BUSY_AGAIN);
                }
                Err(error) => {
                    self.group.iter().for_each(Cgroup::remove);
                    return Err(self.named(&error));
                }
                started => return started,
            }
        }
    }

    /// What is wrong with a process that could not be recorded: where it had ended by itself with a code, that.
    pub fn not_kept(&self, error: io::Error, ended: Option<i32>, printed: &[String]) -> io::Error {
        self.group.iter().for_each(Cgroup::remove);
        match ended.and_then(|code| self.explain(&Exit::Code(code), &Heard::default(), printed)) {
            Some(RankEvent::Failed { error, .. }) => {
                io::Error::other(format!("the program {}: {error}", self.artifact))
            }
            _ => error,
        }
    }

    fn named(&self, error: &io::Error) -> io::Error {
        let mend = match error.kind() {
            io::ErrorKind::NotFound => {
                "; it wants a loader that this node does not have (`ldd` tells): build it for x86_64-unknown-linux-musl, or on a system like the nodes'"
            }
            io::ErrorKind::PermissionDenied => {
                "; the agent's folder may be on a file system that is mounted noexec: start the agent with another --dir"
            }
            _ => "",
        };
        io::Error::new(error.kind(), format!("the program {}: {error}{mend}", self.artifact))
    }

    /// Why it may have ended, for people. `printed` is the end of its log.
    pub fn explain(&self, exit: &Exit, heard: &Heard, printed: &[String]) -> Option<RankEvent> {
        let last = if printed.is_empty() { "nothing".to_owned() } else { printed.join(" | ") };
        let (error, permanent) = match exit {
            Exit::Signal(signal) if *signal == Signal::KILL.as_raw() && self.was_out_of_memory() => {
                let memory = Bytes(self.memory_bytes);
                (
                    format!("its process was killed: it needs more than [resources] memory = \"{memory}\", raise that"),
                    false,
                )
            }
            Exit::Signal(signal) if *signal == Signal::ILL.as_raw() => {
                let mend = "build it without target-cpu=native";
                (format!("its program has instructions that this node's processor does not know: {mend}"), true)
            }
            Exit::Code(code) if !heard.any => {
                (format!("its program ended with code {code} before it said a word; it printed: {last}"), true)
            }
            _ => return None,
        };
        Some(RankEvent::Failed { error, permanent })
    }

    fn was_out_of_memory(&self) -> bool {
        self.group.as_ref().is_some_and(|group| group.kills() > 0)
    }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::Digest;

    use super::*;

    #[test]
    fn an_end_without_a_word_is_told_with_what_was_printed() {
        let own = Own { artifact: Artifact(Digest([1; 32])), path: "/x".into(), group: None, memory_bytes: 1 << 30 };
        let (silent, spoke) = (Heard::default(), Heard { any: true, code: Some(1) });
        let said = |exit, heard, printed: &[&str]| match own.explain(
            &exit,
            heard,
            &printed.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>(),
        ) {
            Some(RankEvent::Failed { error, permanent }) => Some((error, permanent)),
            _ => None,
        };
        let printed = said(Exit::Code(127), &silent, &["no such library", "sorry"]).unwrap();
        assert_eq!(
            printed,
            (
                "its program ended with code 127 before it said a word; it printed: no such library | sorry".to_owned(),
                true
            )
        );
        assert!(said(Exit::Code(0), &silent, &[]).unwrap().0.ends_with("printed: nothing"));
        assert_eq!(said(Exit::Code(1), &spoke, &["panicked"]), None, "it has said itself why");
        assert_eq!(said(Exit::Signal(9), &silent, &[]), None, "somebody has killed it");
        assert!(said(Exit::Signal(4), &spoke, &[]).unwrap().0.contains("target-cpu"));
        let loader = own.named(&io::ErrorKind::NotFound.into()).to_string();
        assert!(loader.contains("musl"), "{loader}");
    }
}
