//! Machines that have run out of memory.

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::{Run, cluster_of, poll, process_of, step_of};

/// Room that is left above what the cluster in the group holds, and what is then asked for.
const ROOM_BYTES: u64 = 24 << 20;
const HOG_BYTES: u64 = 64 << 20;

/// Everything shares a control group: the command, coordinator, agents and ranks. The kernel has to take a rank, and it is said why.
#[test]
fn a_rank_killed_for_lack_of_memory_is_said_to_be_and_replaced_and_its_agent_lives() {
    let group = match Group::make() {
        Ok(group) => group,
        // Past the capture of the test runner: nobody should take this for a test that was done.
        Err(why) => return writeln!(std::io::stderr(), "not tested with a memory limit: {why}").expect("stderr"),
    };
    let run = Run::new("digits.toml", 2).set("train.steps", 200).set("checkpoint.every", 20);
    let (running, scratch) = run.under("sh", &["-c", "echo $$ > \"$0\" && exec \"$@\"", &group.procs()]).start();
    let cluster = cluster_of(&scratch);
    poll("a few steps", || step_of(&cluster).filter(|step| *step >= 3));
    let services = ["coordinator", "node-1", "node-2"];
    let before = services.map(|name| process_of(&cluster, name));

    poll("a limit that the kernel takes", || group.limit(group.held() + ROOM_BYTES).ok());
    poll("a kill for lack of memory", || {
        group.hog();
        (group.kills() > 0).then_some(())
    });
    poll("the end of the limit", || group.limit(1 << 50).ok());
    assert_eq!(services.map(|name| process_of(&cluster, name)), before, "a service was killed and not a rank");

    let ended =
        running.wait().expect(0).says(&["killed by signal 9", "memory of its machine or control group ran out"]);
    assert!(!ended.stderr.contains("the node-"), "an agent was lost: {ended:#?}");
    let summary = ended.json();
    assert!(summary["recoveries"].as_u64() >= Some(1), "{summary:#}");
    let worlds = summary["world_sizes"].as_array().expect("world sizes");
    assert_eq!(worlds.last(), Some(&2.into()), "nobody took its place: {summary:#}");
}

/// A control group for memory, of either version; removed when this is dropped.
struct Group {
    dir: PathBuf,
    files: Files,
}

/// Names of what is the same in both versions.
struct Files {
    limit: &'static str,
    used: &'static str,
    kills: &'static str,
    cache: &'static str,
}

const FIRST: Files = Files {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    kills: "memory.oom_control",
    cache: "total_cache",
};
const SECOND: Files = Files { limit: "memory.max", used: "memory.current", kills: "memory.events", cache: "file" };

impl Group {
    fn make() -> Result<Self, String> {
        let name = format!("stoke-test-{}", std::process::id());
        // Where version 2 does not hand memory to its groups yet; refused where version 1 has it.
        let _ = std::fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
        let mut why = String::new();
        for (mount, files) in [("/sys/fs/cgroup/memory", FIRST), ("/sys/fs/cgroup", SECOND)] {
            let group = Self { dir: PathBuf::from(mount).join(&name), files };
            match std::fs::create_dir(&group.dir) {
                Ok(()) if group.dir.join(group.files.limit).exists() => return Ok(group),
                Ok(()) => why = format!("{mount} has no {}", group.files.limit),
                Err(error) => why = format!("make a control group in {mount}: {error}"),
            }
        }
        Err(why)
    }

    fn procs(&self) -> String {
        self.dir.join("cgroup.procs").to_str().expect("UTF-8").to_owned()
    }

    fn limit(&self, bytes: u64) -> std::io::Result<()> {
        std::fs::write(self.dir.join(self.files.limit), bytes.to_string())
    }

    /// Bytes that the kernel cannot take back by dropping what it can read again.
    fn held(&self) -> u64 {
        let used: u64 = self.read(self.files.used).trim().parse().expect("bytes");
        used.saturating_sub(self.number("memory.stat", self.files.cache))
    }

    fn kills(&self) -> u64 {
        self.number(self.files.kills, "oom_kill")
    }

    /// Holds memory in the group for a moment. The kernel may kill it as well.
    fn hog(&self) {
        let script = format!("echo $$ > \"$0\" && head -c {HOG_BYTES} /dev/zero | tail -c {HOG_BYTES} > /dev/null");
        let _ = Command::new("sh").args(["-c", &script, &self.procs()]).status();
    }

    fn number(&self, file: &str, name: &str) -> u64 {
        let text = self.read(file);
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("{file} has no {name}: {text}")).trim().parse().expect("a number")
    }

    fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.dir.join(file)).expect("a file of the control group")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its last processes may take a moment to go.
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.dir.exists() && std::fs::remove_dir(&self.dir).is_err() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}
