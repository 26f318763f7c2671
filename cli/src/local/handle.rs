//! The side of `stoke run` and `stoke up`: starts a supervisor process, hears its notices, ends it. Owns the lifeline; never touches the
//! supervisor's children.

use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::folder::Folder;
use super::gateways::GatewayFiles;
use super::notice::Notice;
use crate::detection::Detection;
use crate::failure::{Exit, Failure, OrFail};

/// Agents and coordinator have 10 s each to stop; then the supervisor kills them.
const STOP_MAX: Duration = Duration::from_secs(30);

/// Whose cluster it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Life {
    /// It ends with us, however we end, and so does its folder.
    Ours,
    /// It ends with us; the folder stays.
    OursKeepFolder,
    /// It stays when we leave.
    ItsOwn,
}

#[derive(Clone, Debug)]
pub struct Wish {
    pub nodes: u32,
    pub listen: SocketAddr,
    pub metrics: Option<SocketAddr>,
    pub api: Option<SocketAddr>,
    pub otlp: Option<String>,
    pub detection: Detection,
    pub gateways: GatewayFiles,
    pub life: Life,
}

pub struct LocalCluster {
    child: Child,
    lifeline: Option<ChildStdin>,
    notices: Lines<BufReader<ChildStdout>>,
}

impl LocalCluster {
    pub fn start(folder: &Folder, wish: &Wish) -> Result<Self, Failure> {
        folder.create()?;
        let log = folder.log("supervisor");
        let open = |path: &std::path::Path| OpenOptions::new().create(true).append(true).open(path);
        let log = open(&log).or_fail(Exit::Negative, format!("open {}", log.display()))?;
        let binary = std::env::current_exe().or_fail(Exit::Negative, "find this program's own file")?;
        let mut command = Command::new(binary);
        command.arg("supervise").arg("--dir").arg(&folder.dir);
        command.args(["--nodes", &wish.nodes.to_string(), "--listen", &wish.listen.to_string()]);
        command.args(["--detection", wish.detection.name()]);
        command.args(wish.gateways.arguments());
        if let Some(metrics) = wish.metrics {
            command.args(["--metrics", &metrics.to_string()]);
        }
        if let Some(api) = wish.api {
            command.args(["--api", &api.to_string()]);
        }
        if let Some(otlp) = &wish.otlp {
            command.args(["--otlp", otlp]);
        }
        match wish.life {
            Life::Ours => command.args(["--lifeline", "--remove"]).stdin(Stdio::piped()),
            Life::OursKeepFolder => command.arg("--lifeline").stdin(Stdio::piped()),
            Life::ItsOwn => command.arg("--detach").stdin(Stdio::null()),
        };
        if wish.life != Life::ItsOwn {
            // Ctrl-C at a terminal reaches the whole process group: it must reach us alone, and we end the rest in order.
            command.process_group(0);
        }
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .or_fail(Exit::Negative, "start the supervisor of the local cluster")?;
        let stdout = child.stdout.take().ok_or_else(|| Failure::new(Exit::Negative, "the supervisor has no output"))?;
        Ok(Self { lifeline: child.stdin.take(), notices: BufReader::new(stdout).lines(), child })
    }

    /// The next notice; none when the supervisor is gone. Cancel-safe.
    pub async fn next_notice(&mut self) -> Option<Notice> {
        loop {
            match self.notices.next_line().await {
                Ok(Some(line)) => {
                    if let Ok(notice) = serde_json::from_str(&line) {
                        return Some(notice);
                    }
                }
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// Waits until the cluster is up, or says why it is not.
    pub async fn ready(&mut self, folder: &Folder) -> Result<Notice, Failure> {
        match self.next_notice().await {
            Some(ready @ Notice::Ready { .. }) => Ok(ready),
            Some(notice) => Err(failed(notice)),
            None => {
                let log = folder.log_tail("supervisor", 5).join("\n  ");
                Err(Failure::new(Exit::Negative, format!("the supervisor of the local cluster ended early:\n  {log}")))
            }
        }
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Ends the cluster and waits until every process of it is gone.
    pub async fn end(mut self) {
        drop(self.lifeline.take());
        if let Some(pid) = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            let _ = kill_process(pid, Signal::TERM);
        }
        if tokio::time::timeout(STOP_MAX, self.child.wait()).await.is_err() {
            // Its children die with it.
            let _ = self.child.kill().await;
        }
    }
}

/// A notice that ends a run.
pub fn failed(notice: Notice) -> Failure {
    match notice {
        Notice::Failed { reason, help, log, exit } => {
            let log: String = log.iter().map(|line| format!("\n  {line}")).collect();
            let exit = Exit::of_code(exit.into()).unwrap_or(Exit::Negative);
            let failure = Failure::new(exit, format!("local cluster: {reason}{log}"));
            if help.is_empty() { failure } else { failure.help(help) }
        }
        Notice::Restarting { process, reason, .. } => {
            Failure::new(Exit::Negative, format!("local cluster: the {process} {reason} while it came up"))
        }
        Notice::Ready { .. } | Notice::Restarted { .. } => {
            Failure::new(Exit::Negative, "local cluster: the supervisor spoke out of turn")
        }
    }
}
