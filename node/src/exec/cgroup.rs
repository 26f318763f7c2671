//! A control group (version 2) of a rank's command: a limit of what all of its processes have together, and a way to kill them at once. Only where the rank
//! may make one: as root, or below a group that was handed to the agent. Without it a command is ended process by process, and nothing is limited.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::found::Mark;

/// Of the agent, where systemd starts it in a group of its own below the service's (`DelegateSubgroup=agent`): commands have theirs beside it.
const AGENT: &str = "agent";
/// Of `cpu.max`, in microseconds.
const PERIOD_US: u64 = 100_000;

#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Where the group of a command with this mark is, or would be.
    pub fn of(mark: &Mark) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        Some(Self { path: base(&mounts, &own)?.join(format!("stoke-{mark}")) })
    }

    /// Makes it. The second text says why nothing is limited, where it is so.
    pub fn make(self, memory_bytes: u64, cpus: u32) -> Result<(Self, Option<String>), String> {
        match fs::create_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.to_string()),
            Ok(()) | Err(_) => {}
        }
        let limited = self.limit(memory_bytes, cpus).err();
        Ok((self, limited))
    }

    fn limit(&self, memory_bytes: u64, cpus: u32) -> Result<(), String> {
        let parent = self.path.parent().ok_or("it has no parent")?;
        let enabled = fs::read_to_string(parent.join("cgroup.subtree_control")).unwrap_or_default();
        if !["memory", "cpu"].iter().all(|wanted| enabled.split_whitespace().any(|found| found == *wanted)) {
            let enable = fs::write(parent.join("cgroup.subtree_control"), "+memory +cpu");
            enable.map_err(|error| format!("the controllers memory and cpu of {}: {error}", parent.display()))?;
        }
        let max = format!("{} {PERIOD_US}", u64::from(cpus) * PERIOD_US);
        for (name, value) in
            [("memory.max", memory_bytes.to_string()), ("memory.swap.max", "0".into()), ("cpu.max", max)]
        {
            match fs::write(self.path.join(name), value) {
                // A machine without swap has no such file.
                Err(error) if name == "memory.swap.max" && error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(format!("{name} of {}: {error}", self.path.display())),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Whoever writes `0` there is in the group.
    pub fn door(&self) -> io::Result<File> {
        File::options().write(true).open(self.path.join("cgroup.procs"))
    }

    /// How many of its processes the kernel has killed for lack of memory.
    pub fn kills(&self) -> u64 {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        let count = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
    }

    /// All processes of the group, those that they fork meanwhile included.
    pub fn kill(&self) -> bool {
        fs::write(self.path.join("cgroup.kill"), "1").is_ok()
    }

    /// It is empty.
    pub fn remove(&self) {
        let _ = fs::remove_dir(&self.path);
    }
}

/// The group below which this process may make others, from its `mountinfo` and `cgroup`.
fn base(mounts: &str, own: &str) -> Option<PathBuf> {
    let is_v2 = |line: &&str| line.split_once(" - ").is_some_and(|(_, rest)| rest.starts_with("cgroup2 "));
    // The fifth field is where it is mounted, the fourth what of it.
    let mut fields = mounts.lines().find(is_v2)?.split(' ').skip(3);
    let (root, mounted) = (fields.next()?, Path::new(fields.next()?));
    let path = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    let below = Path::new(path).strip_prefix(root).ok()?;
    let own = mounted.join(below);
    Some(if own.ends_with(AGENT) { own.parent()?.to_owned() } else { own })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_of_this_process_is_found_on_every_kind_of_machine() {
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";
        let hybrid = "31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n32 23 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let found = |mounts, own| base(mounts, own).map(|path| path.display().to_string());
        assert_eq!(found(unified, "0::/\n").as_deref(), Some("/sys/fs/cgroup/"));
        assert_eq!(
            found(unified, "0::/system.slice/stoke.service/agent\n").as_deref(),
            Some("/sys/fs/cgroup/system.slice/stoke.service")
        );
        assert_eq!(found(hybrid, "3:cpu:/a\n0::/b\n").as_deref(), Some("/sys/fs/cgroup/unified/b"));
        assert_eq!(found("31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", "3:cpu:/a\n"), None);
    }
}
