//! Keeps one process of a local cluster running until it is told to stop. Owns the restarts of that process; tells the supervisor
//! everything, and never talks to the process itself.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::folder::Folder;
use super::process::{Launch, Running, describe};
use super::restarts::{Decision, RESTARTS_MAX, Restarts, WAIT_FIRST};
use crate::failure::Exit;

/// Keeper → supervisor.
#[derive(Debug)]
pub enum Happening {
    Started {
        slot: usize,
        pid: u32,
    },
    /// A line on its standard output.
    Said {
        slot: usize,
        line: String,
    },
    /// It died and will be started again.
    Died {
        slot: usize,
        reason: String,
    },
    /// It may not speak to the cluster any more: its node was removed. It is not started again, and the others go on.
    Dismissed {
        slot: usize,
    },
    /// It died and will not be.
    GaveUp {
        slot: usize,
        reason: String,
        exit: Exit,
    },
}

/// What the supervisor decides for its keepers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// The cluster comes up for the first time: a death now is a wrong argument or a port in use, and trying again hides it.
    Starting,
    Up,
    Stopping,
}

pub struct Keeper {
    pub slot: usize,
    pub folder: Folder,
    /// The newest way to start it: a coordinator comes back where it was, not where it was first asked to be.
    pub launch: watch::Receiver<Launch>,
    pub phase: watch::Receiver<Phase>,
    pub happenings: mpsc::Sender<Happening>,
}

impl Keeper {
    /// Returns when the process is gone for good.
    pub async fn run(mut self) {
        let (mut restarts, born) = (Restarts::default(), Instant::now());
        loop {
            let launch = self.launch.borrow().clone();
            let (reason, exit, pardoned) = match launch.start().await {
                Err(error) => (format!("could not be started: {error}"), Exit::Negative, false),
                Ok(mut running) => {
                    self.tell(Happening::Started { slot: self.slot, pid: running.pid }).await;
                    let Some((reason, exit)) = self.live(&mut running).await else { return };
                    (reason, exit, self.folder.take_pardon(running.pid))
                }
            };
            let phase = *self.phase.borrow();
            let decision = if pardoned { Decision::Again { after: WAIT_FIRST } } else { restarts.died(born.elapsed()) };
            let after = match (phase, decision) {
                (Phase::Stopping, _) => return,
                (Phase::Starting, _) => return self.give_up(reason, exit).await,
                (Phase::Up, _) if exit == Exit::Denied => {
                    return self.tell(Happening::Dismissed { slot: self.slot }).await;
                }
                (Phase::Up, Decision::GiveUp) => {
                    let reason = format!("{reason}, after {RESTARTS_MAX} restarts within a minute");
                    return self.give_up(reason, exit).await;
                }
                (Phase::Up, Decision::Again { after }) => after,
            };
            self.tell(Happening::Died { slot: self.slot, reason }).await;
            if self.stopped_within(after).await {
                return;
            }
        }
    }

    /// Until it dies (with the reason), or until it was stopped on order (none).
    async fn live(&mut self, running: &mut Running) -> Option<(String, Exit)> {
        let mut talks = true;
        loop {
            tokio::select! {
                biased;
                () = stopping(&mut self.phase) => {
                    running.stop().await;
                    return None;
                }
                line = running.lines.next_line(), if talks => match line {
                    Ok(Some(line)) => self.tell(Happening::Said { slot: self.slot, line }).await,
                    Ok(None) | Err(_) => talks = false,
                },
                status = running.child.wait() => {
                    return Some(match status {
                        Err(error) => (format!("could not be watched: {error}"), Exit::Negative),
                        Ok(status) => {
                            let told = [Exit::Conflict, Exit::Denied, Exit::Usage];
                            let told = told.into_iter().find(|exit| status.code() == Some(exit.code().into()));
                            (describe(status), told.unwrap_or(Exit::Negative))
                        }
                    });
                }
            }
        }
    }

    async fn stopped_within(&mut self, wait: Duration) -> bool {
        tokio::time::timeout(wait, stopping(&mut self.phase)).await.is_ok()
    }

    async fn give_up(&self, reason: String, exit: Exit) {
        self.tell(Happening::GaveUp { slot: self.slot, reason, exit }).await;
    }

    async fn tell(&self, happening: Happening) {
        // The supervisor reads until every keeper is gone; after that nobody wants to know.
        let _ = self.happenings.send(happening).await;
    }
}

/// Resolves when the supervisor stops this group, or is gone.
async fn stopping(phase: &mut watch::Receiver<Phase>) {
    let _ = phase.wait_for(|phase| *phase == Phase::Stopping).await;
}
