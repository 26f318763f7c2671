//! Whether the kernel has killed a process for lack of memory, from the counter of the control group that the agent and its ranks live in.
//! Owns how much of that counter was seen; limits no memory and moves no process. A rank that somebody has moved to a group of its own is
//! not counted here.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// What a rank is said to have failed of when the counter has risen by its end.
pub const OUT_OF_MEMORY: &str = "its process was killed by signal 9: the memory of its machine or control group ran out; ask for fewer ranks a \
                                 machine, or raise the limit";
/// The same where there is no counter.
pub const MAYBE_OUT_OF_MEMORY: &str =
    "its process was killed by signal 9: by somebody, or by the kernel for lack of memory (`dmesg` tells)";

/// The kernel's kills in the agent's control group.
#[derive(Debug)]
pub struct OutOfMemory {
    counter: Option<PathBuf>,
    seen: Mutex<u64>,
}

impl OutOfMemory {
    /// Begins to count now.
    pub fn watch() -> Self {
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let counter = counters(&groups).into_iter().find(|path| kills(path).is_some());
        let seen = counter.as_deref().and_then(kills).unwrap_or(0);
        Self { counter, seen: Mutex::new(seen) }
    }

    /// Why a process that ended by SIGKILL may have, if memory had or may have had to do with it. Each kill of the kernel explains one end:
    /// ask once for each.
    pub fn explain(&self) -> Option<&'static str> {
        let Some(now) = self.counter.as_deref().and_then(kills) else { return Some(MAYBE_OUT_OF_MEMORY) };
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let explained = now > *seen;
        *seen += u64::from(explained);
        explained.then_some(OUT_OF_MEMORY)
    }
}

/// Where the counter may be: version 1 names its controllers, version 2 does not. Inside a container the group is the root of the mount.
fn counters(groups: &str) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
        let group = group.trim_start_matches('/');
        let (mount, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.events"),
            names if names.split(',').any(|name| name == "memory") => ("/sys/fs/cgroup/memory", "memory.oom_control"),
            _ => continue,
        };
        paths.extend([Path::new(mount).join(group).join(file), Path::new(mount).join(file)]);
    }
    paths
}

fn kills(counter: &Path) -> Option<u64> {
    parse(&fs::read_to_string(counter).ok()?)
}

fn parse(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_both_versions_are_found() {
        let first = counters("8:pids:/\n4:memory:/jobs/a:b\n0::/\n");
        assert_eq!(first[0], Path::new("/sys/fs/cgroup/memory/jobs/a:b/memory.oom_control"));
        assert_eq!(first[1], Path::new("/sys/fs/cgroup/memory/memory.oom_control"));
        let second = counters("0::/system.slice/stoke.service\n");
        assert_eq!(second[0], Path::new("/sys/fs/cgroup/system.slice/stoke.service/memory.events"));
        assert!(counters("nonsense").is_empty());
    }

    #[test]
    fn kills_are_read_from_both_versions() {
        assert_eq!(parse("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"), Some(3));
        assert_eq!(parse("low 0\nhigh 0\nmax 7\noom 2\noom_kill 2\noom_group_kill 0\n"), Some(2));
        assert_eq!(parse("oom_kill_disable 0\n"), None);
    }

    #[test]
    fn each_kill_of_the_kernel_explains_one_end() {
        let folder = tempfile::tempdir().unwrap();
        let counter = folder.path().join("memory.events");
        fs::write(&counter, "oom_kill 2\n").unwrap();
        let memory = OutOfMemory { counter: Some(counter.clone()), seen: Mutex::new(2) };
        assert_eq!(memory.explain(), None);
        fs::write(&counter, "oom_kill 4\n").unwrap();
        let explained = [(); 3].map(|()| memory.explain());
        assert_eq!(explained, [Some(OUT_OF_MEMORY), Some(OUT_OF_MEMORY), None]);
        fs::remove_file(&counter).unwrap();
        assert_eq!(memory.explain(), Some(MAYBE_OUT_OF_MEMORY));
    }
}
