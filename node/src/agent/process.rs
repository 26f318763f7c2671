//! Ranks as processes of this machine. Owns what a rank inherits and what it does not: one end of a socket pair, a file for what it prints,
//! a process group of its own, a small environment. Nothing secret is in its arguments or its environment (I35): the cookie and the credentials
//! of object stores go over the socket pair. A process begins with the start that is sent to it, after its record is durable: one whose agent
//! died before that ends by itself.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::Signal;
use stoke_protocol::message::rank::{
    Cookie, Exit, FromRank, RankEvent, RankId, Settle, StartRank, StoreSettings, ToRank,
};
use stoke_protocol::spec::{JobSpec, Program};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

use super::adopt;
use super::belongings::Belongings;
use super::claim::Claim;
use super::inventory::{Inventory, Kept, draw_cookie};
use super::log::{LogBook, Opened};
use super::memory::OutOfMemory;
use super::program::{self, Heard, Own};
use super::spawn::{RankEvents, RankProcess, Spawner};
use super::watch::Watched;
use crate::artifact::{ARTIFACTS, Cache};
use crate::config::Config;
use crate::exec::{GPUS, MARK, Mark, SCRATCH, Scratches};
use crate::{checkpoint, link};

/// The number of the inherited end of the socket pair.
pub const LINK_FD: &str = "STOKE_LINK_FD";
/// The address on which a rank listens for its peers.
pub const PEER_IP: &str = "STOKE_PEER_IP";
/// The folder of this node's shards in memory; not set where there is none.
pub const SHARDS: &str = "STOKE_SHARDS";

/// The process without which no rank is to live, where there is one: the supervisor of a local cluster. Ranks inherit it from their agent.
pub const KEEPER: &str = "STOKE_KEEPER";

/// All that a rank sees of the agent's environment, besides `STOKE_*`.
const INHERITED: [&str; 9] = [
    "PATH",
    "HOME",
    "TMPDIR",
    "RUST_LOG",
    "RUST_BACKTRACE",
    "LD_LIBRARY_PATH",
    "CUDA_PATH",
    // Which authorities are trusted for TLS to object stores.
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];
/// The kernel takes ranks before the agent when memory is short (F26).
const OOM_SCORE_ADJ: &str = "500";
/// Frames that wait for a rank that does not read. The coordinator sends a handful in a rank's life.
const FRAMES_MAX: usize = 64;
/// What a rank said last is read for so long after its end; nothing else holds its socket.
pub(super) const DRAIN_MAX: std::time::Duration = std::time::Duration::from_secs(2);

/// Starts `command` for each rank.
pub struct Processes {
    command: Vec<String>,
    inventory: Inventory,
    logs: LogBook,
    belongings: Belongings,
    artifacts: Cache,
    orphan_grace_ms: u64,
    has_gpu: bool,
    shards: Option<PathBuf>,
    memory: Arc<OutOfMemory>,
}

impl Processes {
    /// Ranks are started by the configured program and arguments; by this executable with the argument `worker` where there are none.
    pub fn new(
        config: &Config,
        inventory: Inventory,
        logs: LogBook,
        gpus: u32,
        shards: Option<PathBuf>,
    ) -> io::Result<Self> {
        let mut command = config.worker_command.clone();
        if command.is_empty() {
            let own = std::env::current_exe()?;
            let own = own.to_str().ok_or_else(|| io::Error::other("the path of this executable is not UTF-8"))?;
            command = vec![own.to_owned(), "worker".to_owned()];
        }
        let kept = inventory.read().map_err(io::Error::other)?;
        let (orphan_grace_ms, memory) = (config.orphan_grace_ms, Arc::new(OutOfMemory::watch()));
        let belongings = Belongings::new(Scratches::of(&config.dir), gpus, &kept);
        let (artifacts, has_gpu) = (Cache::of(&config.dir), gpus > 0);
        Ok(Self { artifacts, command, inventory, belongings, logs, orphan_grace_ms, has_gpu, shards, memory })
    }

    fn start(&self, start: &StartRank, ip: IpAddr) -> io::Result<Started> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        let ours = std::os::unix::net::UnixStream::from(ours);
        ours.set_nonblocking(true)?;
        let link = UnixStream::from_std(ours)?;
        let cookie = draw_cookie()?;
        let socket = self.inventory.socket(start.id).into_os_string().into_string();
        let socket = socket.map_err(|_| io::Error::other("the path of the agent's folder is not UTF-8"))?;
        let Opened { file, base, part } = self.logs.open(start.id)?;
        let spec = JobSpec::parse(&start.spec).map_err(io::Error::other)?;
        let mark = (spec.exec.is_some() || spec.program.is_some()).then(|| Mark::of(&cookie));
        let own = match (spec.program.as_ref().and_then(Program::sent), &mark) {
            (Some(artifact), Some(mark)) => {
                let room = (start.memory_bytes, spec.resources.cpus);
                Some(Own::new(self.artifacts.dir(), artifact, mark, room)?)
            }
            _ => None,
        };
        let mut command = self.command(own.as_ref(), &theirs, file, ip)?;
        command.envs(mark.iter().map(|mark| (MARK, mark.to_string())));
        let gpus = self.belongings.take_gpus(start.id, spec.resources.gpus);
        if let Some(exec) = &spec.exec {
            self.belongings.scratches.open(start.id)?;
            let numbers: Vec<String> = gpus.iter().map(ToString::to_string).collect();
            let passed = exec.pass_env.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
            command
                .envs(passed)
                .env(ARTIFACTS, self.artifacts.dir())
                .env(SCRATCH, self.belongings.scratches.of_rank(start.id))
                .env(GPUS, numbers.join(","));
        }
        let mut child = match &own {
            Some(own) => own.spawn(&mut command)?,
            None => command
                .spawn()
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", self.command[0])))?,
        };
        let watched = match self.keep((start, &spec), child.id(), (&cookie, gpus)) {
            Ok(watched) => watched,
            Err(error) => {
                // A rank that nobody can reap (no descriptor was left, F27) or find again (no disk) must not be there.
                let ended = child.kill().and_then(|()| child.wait()).ok().and_then(|status| status.code());
                return Err(match own {
                    // One that has ended already has left nothing in /proc.
                    Some(own) => own.not_kept(error, ended, &self.logs.last_lines(start.id)),
                    None => error,
                });
            }
        };
        // Raising it needs no privilege; without /proc there is nothing to raise.
        let _ = std::fs::write(format!("/proc/{}/oom_score_adj", child.id()), OOM_SCORE_ADJ);
        let settle = Settle {
            socket,
            cookie,
            orphan_grace_ms: self.orphan_grace_ms,
            log: base,
            log_part: part,
            log_bytes: self.logs.bytes_max(),
        };
        Ok(Started { watched, link, settle, mark, own })
    }

    /// N1.
    fn keep(
        &self,
        (start, spec): (&StartRank, &JobSpec),
        pid: u32,
        (cookie, gpus): (&Cookie, Vec<u32>),
    ) -> io::Result<Watched> {
        let watched = Watched::new(pid)?;
        let mut kept = Kept::new(start.id, pid, cookie, Claim::of(spec, start))?;
        (kept.runs_command, kept.gpus) = (spec.exec.is_some() || spec.program.is_some(), gpus);
        self.inventory.keep(&kept)?;
        Ok(watched)
    }

    fn command(&self, own: Option<&Own>, link: &OwnedFd, prints: File, ip: IpAddr) -> io::Result<Command> {
        let mut command = match own {
            Some(own) => own.command()?,
            None => {
                let mut command = Command::new(&self.command[0]);
                command.args(&self.command[1..]);
                command
            }
        };
        command.env_clear().process_group(0);
        let ours = |name: &str| if own.is_some() { program::OURS.contains(&name) } else { name.starts_with("STOKE_") };
        let kept = |name: &str| INHERITED.contains(&name) || ours(name);
        command.envs(std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(kept)));
        command.env(PEER_IP, ip.to_string()).env(LINK_FD, link.as_raw_fd().to_string()).env_remove(SHARDS);
        if let Some(shards) = &self.shards {
            command.env(SHARDS, shards);
        }
        if !self.has_gpu {
            // A build with GPU support looks for one at its first tensor otherwise, and fails where there is none.
            command.env("BURN_DEVICE", "flex");
        }
        command.stdin(Stdio::null()).stdout(prints.try_clone()?).stderr(prints);
        let fd = link.try_clone()?;
        let number = link.as_raw_fd();
        // SAFETY: between fork and exec only async-signal-safe calls are allowed; fcntl is one. `number` is open in the child: it is a copy
        // of the parent's table, where `link` lives until after the spawn.
        unsafe {
            command.pre_exec(move || {
                debug_assert_ne!(fd.as_raw_fd(), number);
                let inherited = std::os::fd::BorrowedFd::borrow_raw(number);
                Ok(rustix::io::fcntl_setfd(inherited, rustix::io::FdFlags::empty())?)
            });
        }
        Ok(command)
    }
}

impl Spawner for Processes {
    fn spawn(&self, start: StartRank, ip: IpAddr, events: RankEvents) -> Result<Box<dyn RankProcess>, String> {
        let id = start.id;
        let started = self.start(&start, ip).inspect_err(|_| {
            self.logs.ended(id);
            self.belongings.return_gpus(id);
        });
        let Started { watched, link, settle, mark, own } = started.map_err(|error| format!("start {error}"))?;
        let pid = watched.pid();
        tracing::info!(rank = %id, pid = pid.as_raw_nonzero().get(), "rank started");
        let (read, write) = link.into_split();
        let (handle, queue, killed) = Process::new();
        // The queue is empty: all have room.
        handle.send(ToRank::Settle(settle));
        let settings = Vec::from_iter(checkpoint::settings());
        if !settings.is_empty() {
            handle.send(ToRank::Stores(StoreSettings(settings.into())));
        }
        handle.send(ToRank::Start(start));
        tokio::spawn(write_frames(id, write, queue));
        let (memory, logs, belongings) = (self.memory.clone(), self.logs.clone(), self.belongings.clone());
        let reader = tokio::spawn(read_frames(id, read, events.clone(), logs.clone()));
        tokio::spawn(async move {
            let exit = match watched.end(killed).await {
                Ok(exit) => exit,
                Err(error) => Exit::NotStarted(format!("its end could not be read: {error}")),
            };
            let heard = tokio::time::timeout(DRAIN_MAX, reader).await;
            let heard = heard.ok().and_then(Result::ok).unwrap_or_default();
            let explained = own.as_ref().and_then(|own| own.explain(&exit, &heard, &logs.last_lines(id)));
            belongings.clear(id, mark).await;
            tracing::info!(rank = %id, ?exit, "rank is gone");
            if let Some(failed) = explained {
                events.frame(FromRank::Event(failed)).await;
            } else if exit == Exit::Signal(Signal::KILL.as_raw())
                && let Some(error) = memory.explain()
            {
                // Counts where the rank was wanted until now and has not said itself what it failed of.
                events.frame(FromRank::Event(RankEvent::Failed { error: error.into(), permanent: false })).await;
            }
            logs.ended(id);
            events.exited(exit);
        });
        Ok(Box::new(handle))
    }

    fn adopt(&self, kept: Kept, events: RankEvents) -> Box<dyn RankProcess> {
        adopt::adopt(kept, &self.inventory, (&self.logs, &self.belongings), events)
    }

    fn forget(&self, id: RankId) {
        self.inventory.forget(id);
    }
}

/// A process that waits for its start, its link, and what it is to be told before the start.
struct Started {
    watched: Watched,
    link: UnixStream,
    settle: Settle,
    /// Of what it may leave behind.
    mark: Option<Mark>,
    own: Option<Own>,
}

/// The way to a rank's process, for whoever it is.
pub(super) struct Process {
    frames: mpsc::Sender<ToRank>,
    kill: mpsc::Sender<()>,
}

impl Process {
    /// With what comes out at the other end.
    pub(super) fn new() -> (Self, mpsc::Receiver<ToRank>, mpsc::Receiver<()>) {
        let (frames, queue) = mpsc::channel(FRAMES_MAX);
        let (kill, killed) = mpsc::channel(1);
        (Self { frames, kill }, queue, killed)
    }
}

impl RankProcess for Process {
    fn send(&self, frame: ToRank) {
        // A rank that reads nothing is killed after its grace; what it misses does not matter.
        let _ = self.frames.try_send(frame);
    }

    fn kill(&self) {
        // Full: it is being killed already. Closed: it is gone.
        let _ = self.kill.try_send(());
    }
}

pub(super) async fn write_frames(id: RankId, mut link: OwnedWriteHalf, mut frames: mpsc::Receiver<ToRank>) {
    while let Some(frame) = frames.recv().await {
        if let Err(error) = link::send(&mut link, &frame).await {
            tracing::debug!(rank = %id, %error, "rank does not listen");
            return;
        }
    }
}

/// Until the rank hangs up.
pub(super) async fn read_frames(id: RankId, mut link: OwnedReadHalf, events: RankEvents, logs: LogBook) -> Heard {
    let mut heard = Heard::default();
    loop {
        match link::receive::<FromRank>(&mut link).await {
            Ok(Some(FromRank::Leaving { code })) => heard = Heard { any: true, code: Some(code) },
            Ok(Some(frame)) => {
                heard.any = true;
                logs.grew(id);
                events.frame(frame).await;
            }
            Ok(None) => break,
            Err(error) => {
                tracing::warn!(rank = %id, %error, "rank sent what is no frame");
                break;
            }
        }
    }
    events.hung_up();
    heard
}
