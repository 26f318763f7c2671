//! The ranks that an agent has started, on disk: how the next agent of the node finds their processes. Owns the folder `ranks/`, for its owner
//! only: a record, a socket and the last words of each rank. Knows processes by what the kernel says of them; signals none but in
//! [`end_orphans`].
//!
//! N1 (I3): a record is durable before its process has an effect: the process begins with the start that is sent to it afterwards.
//! N2 (I15): a record goes when the coordinator has acknowledged the rank's end, not before.
//! N3: a process is the recorded one if its start time is, in the same life of the machine; a process id that is used again is somebody else.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use stoke_protocol::ids::Digest;
use stoke_protocol::message::rank::{Cookie, FromRank, RankId};

use super::claim::Claim;
use super::disk::{HomeError, lock, replace};
use super::shards;
use crate::exec::{Mark, Scratches, end_marked};
use crate::link;

const DIR: &str = "ranks";
const RECORD: &str = "json";
const SOCKET: &str = "sock";
const LAST_WORDS: &str = "last";
/// Of a damaged record.
const ASIDE: &str = "damaged";
/// A process that was killed is gone within this, or hangs in the kernel.
const END_MAX: Duration = Duration::from_secs(2);

/// The folder of an agent's ranks.
#[derive(Clone, Debug)]
pub struct Inventory {
    dir: PathBuf,
}

/// One rank's process.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Kept {
    pub id: RankId,
    pub pid: u32,
    /// When the process began, in clock ticks after the machine did.
    pub started: u64,
    /// The life of the machine.
    boot: String,
    /// Of the cookie that the process proves itself with.
    cookie_blake3: Digest,
    pub claim: Claim,
    /// Processes may be left when this one is gone.
    #[serde(default)]
    pub runs_command: bool,
    /// Numbers of the accelerators that are kept for it.
    #[serde(default)]
    pub gpus: Vec<u32>,
}

/// A cookie that nobody has had.
pub fn draw_cookie() -> io::Result<Cookie> {
    let mut bytes = vec![0; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(Cookie(bytes.into()))
}

impl Kept {
    /// A process that was started just now.
    pub fn new(id: RankId, pid: u32, cookie: &Cookie, claim: Claim) -> io::Result<Self> {
        let started = start_of(pid).ok_or_else(|| io::Error::other("its start time is not to be read in /proc"))?;
        let cookie_blake3 = Digest(*blake3::hash(&cookie.0.0).as_bytes());
        Ok(Self { id, pid, started, boot: boot()?, cookie_blake3, claim, runs_command: false, gpus: Vec::new() })
    }

    /// Of the processes that its command has started.
    pub fn mark(&self) -> Mark {
        Mark::of_hash(blake3::Hash::from_bytes(self.cookie_blake3.0))
    }

    /// N3. Ask after a descriptor of the process was opened: then it is this one's.
    pub fn is_running(&self) -> bool {
        boot().is_ok_and(|boot| boot == self.boot) && start_of(self.pid) == Some(self.started)
    }

    /// Whether it is the process's cookie. Hashes compare in constant time.
    pub fn has_cookie(&self, cookie: &Cookie) -> bool {
        blake3::hash(&cookie.0.0) == blake3::Hash::from_bytes(self.cookie_blake3.0)
    }
}

impl Inventory {
    /// The folder of the node in `dir`, made where it is not there.
    pub fn open(dir: &Path) -> Result<Self, HomeError> {
        let dir = dir.join(DIR);
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(|source| HomeError::Io {
            verb: "create",
            path: dir.clone(),
            source,
        })?;
        Ok(Self { dir })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The ranks that are recorded, for those who look while an agent runs.
    pub fn read(&self) -> Result<Vec<Kept>, HomeError> {
        let mut found = self.records()?.collect::<Result<Vec<Kept>, HomeError>>()?;
        found.sort_by_key(|kept| kept.id);
        Ok(found)
    }

    /// The ranks of agents before this one. A damaged record is set aside: its rank, which nobody can prove to be one any more, ends itself
    /// when no agent has called for a while, and no other rank waits for that.
    pub fn take_over(&self) -> Result<Vec<Kept>, HomeError> {
        let mut found = Vec::new();
        for record in self.records()? {
            match record {
                Ok(kept) => found.push(kept),
                Err(HomeError::DamagedRecord { path, problem }) => {
                    let aside = path.with_extension(ASIDE);
                    for rest in [SOCKET, LAST_WORDS] {
                        let _ = fs::remove_file(path.with_extension(rest));
                    }
                    fs::rename(&path, &aside).map_err(|source| HomeError::Io { verb: "set aside", path, source })?;
                    tracing::error!(record = %aside.display(), problem, "damaged record of a rank is set aside");
                }
                Err(error) => return Err(error),
            }
        }
        found.sort_by_key(|kept| kept.id);
        Ok(found)
    }

    /// Record by record; one that cannot be read hides no other.
    fn records(&self) -> Result<impl Iterator<Item = Result<Kept, HomeError>>, HomeError> {
        let failed = |path: &Path, source| HomeError::Io { verb: "read", path: path.into(), source };
        let entries = fs::read_dir(&self.dir).map_err(|source| failed(&self.dir, source))?;
        let paths = entries.flatten().map(|entry| entry.path());
        let records = paths.filter(|path| path.extension().is_some_and(|extension| extension == RECORD));
        Ok(records.filter_map(move |path| match fs::read(&path) {
            Ok(bytes) => Some(serde_json::from_slice(&bytes).map_err(|error| {
                let problem = error.to_string();
                HomeError::DamagedRecord { path, problem }
            })),
            // For those who look while an agent runs.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => Some(Err(failed(&path, source))),
        }))
    }

    /// N1.
    pub fn keep(&self, kept: &Kept) -> io::Result<()> {
        replace(&self.path(kept.id, RECORD), &serde_json::to_vec(kept).expect("numbers and texts are JSON"))
    }

    /// N2. What is not there needs no removal.
    pub fn forget(&self, id: RankId) {
        for extension in [SOCKET, LAST_WORDS, RECORD] {
            match fs::remove_file(self.path(id, extension)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(rank = %id, %error, "record of a rank that is gone was not removed");
                }
                Ok(()) | Err(_) => {}
            }
        }
    }

    /// Where a rank waits for its next agent.
    pub fn socket(&self, id: RankId) -> PathBuf {
        self.path(id, SOCKET)
    }

    /// What a rank wrote down because it ended while there was no agent.
    pub async fn last_words(&self, id: RankId) -> Vec<FromRank> {
        let bytes = fs::read(self.path(id, LAST_WORDS)).unwrap_or_default();
        let (mut rest, mut frames) = (&bytes[..], Vec::new());
        while let Ok(Some(frame)) = link::receive(&mut rest).await {
            frames.push(frame);
        }
        frames
    }

    fn path(&self, id: RankId, extension: &str) -> PathBuf {
        self.dir.join(format!("{}.{extension}", stem(id)))
    }
}

/// Writes the last words of the rank whose socket is `socket`, all of them or none.
pub async fn write_last_words(socket: &Path, frames: &[FromRank]) -> io::Result<()> {
    let mut bytes = Vec::new();
    for frame in frames {
        link::send(&mut bytes, frame).await.map_err(io::Error::other)?;
    }
    replace(&socket.with_extension(LAST_WORDS), &bytes)
}

/// Kills the ranks that an agent has left behind in the folder of its node, and waits for their end: the agent is not coming back. What they kept
/// in memory goes too. Does nothing where an agent runs. Gives how many there were.
pub fn end_orphans(dir: &Path) -> Result<usize, HomeError> {
    if !dir.join(DIR).exists() {
        return Ok(0);
    }
    let Ok(_lock) = lock(dir) else { return Ok(0) };
    let (mut ended, mut unread) = (0, None);
    for kept in Inventory::open(dir)?.records()? {
        let kept = match kept {
            Ok(kept) => kept,
            Err(error) => {
                unread = Some(error);
                continue;
            }
        };
        let Some(pid) = i32::try_from(kept.pid).ok().and_then(Pid::from_raw) else { continue };
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        if !kept.is_running() || pidfd_send_signal(&process, Signal::STOP).is_err() {
            continue;
        }
        // Stopped, it is there, and so its group is its own.
        let _ = kill_process_group(pid, Signal::KILL);
        ended += 1;
        let deadline = Instant::now() + END_MAX;
        let gone = || {
            let left = rustix::event::Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&left)).is_ok_and(|ready| ready > 0)
        };
        while !gone() && Instant::now() < deadline {}
        if kept.runs_command {
            end_marked(&kept.mark());
        }
    }
    shards::remove_of(dir);
    Scratches::of(dir).keep_only(&[]);
    unread.map_or(Ok(ended), Err)
}

/// The name of a rank's files.
fn stem(id: RankId) -> String {
    format!("{}-{}-{}", id.job, id.generation, id.rank)
}

/// When a process began, in clock ticks after the machine did. A zombie has ended.
fn start_of(pid: u32) -> Option<u64> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name in parentheses may hold anything; the state is the first field after it, the start time the twentieth.
fn parse_stat(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    fields.nth(18)?.parse().ok().filter(|_| state != "Z" && state != "X")
}

fn boot() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use stoke_protocol::ids::{Generation, JobId, Rank};

    use super::*;

    const ID: RankId = RankId { job: JobId(3), generation: Generation(2), rank: Rank(1) };

    #[test]
    fn start_times_are_read_behind_any_name_and_zombies_have_none() {
        let fields =
            |state: &str| format!("12 (a) b) c) {state} 7 12 12 0 -1 4194560 1 0 0 0 1 2 3 4 20 0 1 0 123456 99");
        assert_eq!(parse_stat(&fields("S")), Some(123_456));
        assert_eq!(parse_stat(&fields("Z")), None);
        assert_eq!(parse_stat("12 (stoke) S 7"), None);
    }

    #[tokio::test]
    async fn a_rank_is_found_again_by_record_and_cookie_and_no_other_process_is() {
        let dir = tempfile::tempdir().unwrap();
        let inventory = Inventory::open(dir.path()).unwrap();
        let cookie = draw_cookie().unwrap();
        let kept = Kept::new(ID, std::process::id(), &cookie, Claim::default()).unwrap();
        inventory.keep(&kept).unwrap();
        assert_eq!(inventory.read().unwrap(), std::slice::from_ref(&kept));
        assert!(kept.is_running() && kept.has_cookie(&cookie));
        assert!(!kept.has_cookie(&draw_cookie().unwrap()) && !kept.has_cookie(&Cookie::default()));
        let another = Kept { started: kept.started + 1, ..kept.clone() };
        let before = Kept { boot: "another".into(), ..kept.clone() };
        assert!(!another.is_running() && !before.is_running(), "N3");
        let said = [FromRank::Alive, FromRank::Leaving { code: 3 }];
        write_last_words(&inventory.socket(ID), &said).await.unwrap();
        assert_eq!(inventory.last_words(ID).await, said);
        inventory.forget(ID);
        assert!(inventory.read().unwrap().is_empty() && inventory.last_words(ID).await.is_empty());
        inventory.keep(&kept).unwrap();
        fs::write(inventory.dir.join("a").with_extension(RECORD), "{").unwrap();
        assert!(matches!(inventory.read(), Err(HomeError::DamagedRecord { .. })));
        assert_eq!(
            inventory.take_over().unwrap(),
            std::slice::from_ref(&kept),
            "the other rank does not wait for that"
        );
        assert!(inventory.dir.join("a").with_extension(ASIDE).exists());
        assert_eq!(inventory.read().unwrap(), [kept]);
    }

    #[test]
    fn orphans_are_ended_unless_an_agent_runs() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(end_orphans(dir.path()).unwrap(), 0);
        let inventory = Inventory::open(dir.path()).unwrap();
        let orphan = || {
            let child = Command::new("sleep").arg("1000").process_group(0).spawn().unwrap();
            let kept = Kept::new(ID, child.id(), &draw_cookie().unwrap(), Claim::default()).unwrap();
            inventory.keep(&kept).unwrap();
            (child, kept)
        };
        let (mut child, kept) = orphan();
        let agent = lock(dir.path()).unwrap();
        assert_eq!(end_orphans(dir.path()).unwrap(), 0);
        assert!(kept.is_running());
        drop(agent);
        assert_eq!(end_orphans(dir.path()).unwrap(), 1);
        assert!(!child.wait().unwrap().success());
        assert_eq!(end_orphans(dir.path()).unwrap(), 0);
        // A record that is damaged keeps no other rank alive, and is told of.
        let (mut child, _) = orphan();
        let damaged = dir.path().join(DIR).join("a").with_extension(RECORD);
        fs::write(damaged, "{").unwrap();
        assert!(matches!(end_orphans(dir.path()), Err(HomeError::DamagedRecord { .. })));
        assert!(!child.wait().unwrap().success());
    }
}
