//! One supervised process of a local cluster: how it is started, watched and stopped. Owns its process id and its log file; never decides
//! whether it is started again.

use std::fs::OpenOptions;
use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use stoke_node::agent::KEEPER;
use stoke_protocol::transport::WEATHER_VARIABLE;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// After SIGTERM a process has this long: an agent stops its ranks in it. Then SIGKILL.
pub const STOP_MAX: Duration = Duration::from_secs(10);

/// What to start.
#[derive(Clone, Debug)]
pub struct Launch {
    pub name: String,
    pub arguments: Vec<String>,
    pub log: PathBuf,
    /// Where it reads of partitions.
    pub weather: PathBuf,
}

pub struct Running {
    pub child: Child,
    pub pid: u32,
    /// What it says about itself, a line at a time.
    pub lines: Lines<BufReader<ChildStdout>>,
}

impl Launch {
    /// Starts it with this program's own binary. It is told its parent's id and dies with it.
    ///
    /// Must be called on the main thread: the kernel ties a parent-death signal to the thread that forks.
    pub async fn start(&self) -> io::Result<Running> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        let mut child = Command::new(std::env::current_exe()?)
            .args(&self.arguments)
            .args(["--parent", &std::process::id().to_string()])
            .env(WEATHER_VARIABLE, &self.weather)
            // Ranks outlive their agent; they do not outlive their cluster.
            .env(KEEPER, std::process::id().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()?;
        let pid = child.id().ok_or_else(|| io::Error::other("the process ended before it was seen"))?;
        let stdout = child.stdout.take().ok_or_else(|| io::Error::other("standard output was not piped"))?;
        Ok(Running { child, pid, lines: BufReader::new(stdout).lines() })
    }
}

impl Running {
    /// SIGTERM, then SIGKILL after [`STOP_MAX`]. Returns when the process is gone.
    pub async fn stop(&mut self) {
        if let Some(pid) = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            let _ = kill_process(pid, Signal::TERM);
        }
        if tokio::time::timeout(STOP_MAX, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }
}

/// How a process ended, for people.
pub fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// For a process whose parent must not be outlived: SIGKILL when it dies, and an end now if it has died already.
pub fn die_with(parent: u32) -> Result<(), String> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| format!("ask to die with process {parent}: {error}"))?;
    match rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().cast_unsigned()) {
        Some(actual) if actual == parent => Ok(()),
        Some(_) | None => Err(format!("process {parent}, which started this one, is gone")),
    }
}
