//! A rank that runs a command: it takes its place in the gang, starts the command with torchrun's variables, and starts it again whenever the gang
//! changes. Owns the order of these; what the worker is around it (`worker`) is the same as for a rank that trains, but for peers: commands find
//! each other by the address of the first rank.
//!
//! - `place`: which rank this is among the members, as variables; `port`: the TCP port that the first one's command may listen on.
//! - `family`: the command and all that it starts, until nothing of it is left; `output`: what it prints.
//! - `user`: who it runs as; `cgroup`: what it may take of its machine.
//! - `scratch`: its folders; `removal`: their end, whatever was left there.
//! - `found`: what of a rank's command is left when the rank itself is gone, for the agent.
//!
//! E1: a command runs in one set of members. Before another one begins, nothing of it is left. E2: a rank ends when its command and all that it started
//! have, however it is told to.

mod cgroup;
mod family;
mod found;
mod output;
mod place;
mod port;
mod removal;
mod scratch;
mod user;

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use stoke_protocol::ids::{Generation, Step};
use stoke_protocol::message::rank::{Exit, Membership, Purpose, RankEvent, StartRank};
use stoke_protocol::spec::{Exec, JobSpec};
use tokio::runtime::Handle;

pub use self::cgroup::Cgroup;
use self::family::Family;
pub use self::family::end_all_now;
pub use self::found::{MARK, Mark, end_marked};
use self::output::Output;
use self::place::Place;
pub use self::port::Port;
pub use self::scratch::{SCRATCH, Scratches};
use self::user::User;
use crate::worker::{Failure, Orders, Told, text_of};

/// What the command's environment has where the spec does not say otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const LANG: &str = "C.UTF-8";
/// Numbers of the accelerators that the agent has kept for this rank, with commas.
pub const GPUS: &str = "STOKE_GPUS";

/// What a rank that runs a command is given at its start.
pub struct Assignment {
    pub start: StartRank,
    pub spec: JobSpec,
    pub orders: Orders,
    pub port: Port,
    pub runtime: Handle,
}

/// Runs the command until the orders say stop. Blocks for as long as that takes.
pub fn run(given: Assignment, tell: &dyn Fn(Told)) -> Result<(), Failure> {
    let Assignment { start, spec, orders, port, runtime } = given;
    let exec = spec.exec.clone().expect("a job that runs a command has [exec], as its check says");
    let wanted = spec.resources.ranks.unwrap_or(1);
    let user = exec.user.as_deref().map(User::find).transpose().map_err(Failure::Error)?;
    let (attempts, room) = (spec.restart.attempts, (start.memory_bytes, spec.resources.cpus));
    let post = Post { start, spec: exec, user, attempts, room, wanted, orders, port, tell };
    tell(Told::Loaded);
    runtime.block_on(post.serve())
}

/// What is around the command.
struct Post<'a> {
    start: StartRank,
    spec: Exec,
    user: Option<User>,
    /// Memory and processors.
    room: (u64, u32),
    attempts: u32,
    /// Ranks that the job is to have.
    wanted: u32,
    orders: Orders,
    port: Port,
    tell: &'a dyn Fn(Told),
}

/// A command that was started, and the members that it was started with.
struct Running {
    family: Family,
    output: Output,
    membership: Arc<Membership>,
}

/// Why nobody waits for the command any more.
enum Gone {
    /// It has ended by itself.
    Ended(Exit),
    /// Another set of members begins.
    Next(Arc<Membership>),
}

impl Post<'_> {
    /// Through one generation after the other.
    async fn serve(mut self) -> Result<(), Failure> {
        family::adopt_orphans().map_err(|error| Failure::Error(format!("become the parent of orphans: {error}")))?;
        let own = self.start.id;
        let mut membership = self.orders.next(Generation(0)).await?;
        loop {
            let generation = membership.generation;
            if membership.joining.iter().any(|member| member.id == own) {
                // There is no state to fetch: the others may count on it.
                (self.tell)(Told::Event(RankEvent::Joined { generation, step: Step(0) }));
            } else if membership.position(own).is_none() {
                (self.tell)(Told::Left);
                return Ok(());
            } else if membership.purpose == Purpose::Checkpoint {
                // The command has ended, and has stored what it can: there is nothing else to store.
                self.resumed(&membership);
            } else {
                membership = self.take_part(membership).await?;
                continue;
            }
            membership = self.orders.next(generation).await?;
        }
    }

    /// Runs the command in a set of members; what comes after it.
    async fn take_part(&mut self, membership: Arc<Membership>) -> Result<Arc<Membership>, Failure> {
        if let Some(next) = self.gather(&membership).await? {
            return Ok(next);
        }
        let place = Place::of(self.start.id, &membership);
        let made = scratch::make(&self.start, self.spec.artifact, self.user.as_ref());
        let scratch = made.map_err(|error| Failure::Error(text_of(&error)))?;
        let command = self.command(&membership, &place, &scratch);
        // From here on the port is the command's.
        self.port.free();
        let mut running = self.begin(command, membership)?;
        self.resumed(&running.membership);
        let next = match self.watch(&mut running).await? {
            Gone::Next(next) => next,
            Gone::Ended(exit) => {
                running.family.end(Duration::ZERO).await;
                let last = running.output.close().await;
                let generation = running.membership.generation;
                (self.tell)(Told::Event(RankEvent::CommandEnded { generation, exit: exit.clone() }));
                if exit != Exit::Code(0) {
                    return Err(self.failure(&exit, &last));
                }
                tracing::info!("the command has exited with 0");
                self.wait_for_others(running.membership).await?
            }
        };
        self.port.take().map_err(|error| Failure::Error(text_of(&error)))?;
        Ok(next)
    }

    /// Waits a while for ranks that are missing: each that comes later costs all of them a start. Gives the next membership, where one came.
    async fn gather(&mut self, membership: &Membership) -> Result<Option<Arc<Membership>>, Failure> {
        let members = membership.members.len() as u32;
        self.wanted = self.wanted.max(members);
        if members == self.wanted || self.spec.gather.0 == 0 {
            return Ok(None);
        }
        tracing::info!(members, wanted = self.wanted, "waiting for other ranks");
        tokio::select! {
            biased;
            next = self.orders.next(membership.generation) => next.map(Some),
            () = tokio::time::sleep(Duration::from_millis(self.spec.gather.0)) => Ok(None),
        }
    }

    /// Until the command has ended, or is not to go on; then nothing of it is left.
    async fn watch(&self, running: &mut Running) -> Result<Gone, Failure> {
        let grace = Duration::from_millis(self.spec.grace.0);
        loop {
            let generation = running.membership.generation;
            let why = tokio::select! {
                biased;
                next = self.orders.next(generation) => match next {
                    Ok(next) if is_same(&running.membership, &next) => {
                        running.membership = next;
                        continue;
                    }
                    Ok(next) => Ok(Gone::Next(next)),
                    Err(stopped) => Err(stopped),
                },
                exit = running.family.ended() => return Ok(Gone::Ended(exit)),
                () = self.cut_off() => Err(Failure::Error("the coordinator was out of reach for longer than cut_off".into())),
            };
            tracing::info!("ending the command");
            running.family.end(grace).await;
            running.output.close().await;
            return why;
        }
    }

    /// The command has exited with 0: until others begin again, or the job is done.
    async fn wait_for_others(&self, mut membership: Arc<Membership>) -> Result<Arc<Membership>, Failure> {
        loop {
            let next = self.orders.next(membership.generation).await?;
            if !is_same(&membership, &next) {
                return Ok(next);
            }
            let generation = next.generation;
            (self.tell)(Told::Event(RankEvent::CommandEnded { generation, exit: Exit::Code(0) }));
            membership = next;
        }
    }

    /// Returns when the node has had no word from the coordinator for as long as the spec allows.
    async fn cut_off(&self) {
        let Some(most) = self.spec.cut_off else { return std::future::pending().await };
        loop {
            self.orders.alone(true).await;
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(most.0)) => return,
                () = self.orders.alone(false) => {}
            }
        }
    }

    fn begin(&self, mut command: Command, membership: Arc<Membership>) -> Result<Running, Failure> {
        let program = command.get_program().to_string_lossy().into_owned();
        let failed = |error: std::io::Error| {
            Failure::Error(format!(
                "start {program:?}: {error}: name a program that each node has, or one of the folder (\"./name\")"
            ))
        };
        let (output, pipes) = Output::open().map_err(failed)?;
        command.stdout(pipes.stdout).stderr(pipes.stderr);
        if let Some(user) = &self.user {
            user.run(&mut command);
        }
        let family = Family::start(&mut command, self.group()).map_err(failed)?;
        // It has the write ends of the pipes, which end with the last process that does.
        drop(command);
        tracing::info!(pid = family.pid(), program, generation = %membership.generation, "command started");
        Ok(Running { family, output, membership })
    }

    /// The control group of the command, where there can be one. Whoever counts on its limits is told that there are none.
    fn group(&self) -> Option<Cgroup> {
        let (memory_bytes, cpus) = self.room;
        let made = Mark::inherited().and_then(|mark| Cgroup::of(&mark)).map(|group| group.make(memory_bytes, cpus));
        let (group, problem) = match made {
            Some(Ok((group, problem))) => (Some(group), problem),
            Some(Err(problem)) => (None, Some(problem)),
            None => (None, Some("this machine has no control groups of version 2".to_owned())),
        };
        if let Some(problem) = problem {
            tracing::warn!(problem, "memory and cpus of the command are counted, and not limited (docs/exec.md)");
        }
        group
    }

    fn command(&self, membership: &Membership, place: &Place, scratch: &scratch::Scratch) -> Command {
        let arguments = self.spec.arguments();
        let mut command = Command::new(&arguments[0]);
        command.args(&arguments[1..]).current_dir(&scratch.work).stdin(Stdio::null()).env_clear().process_group(0);
        let own = |name: &str| std::env::var_os(name);
        command
            .env("PATH", own("PATH").unwrap_or_else(|| PATH.into()))
            .env("LANG", LANG)
            .env("TMPDIR", &scratch.temporary);
        match &self.user {
            Some(user) => command.env("HOME", &user.home).env("USER", &user.name).env("LOGNAME", &user.name),
            None => command.envs(own("HOME").map(|home| ("HOME", home))),
        };
        command.envs(self.spec.pass_env.iter().filter_map(|name| Some((name, own(name)?))));
        command.envs(&self.spec.env);
        command.envs(place.variables());
        command.env("TORCHELASTIC_RESTART_COUNT", membership.restarts.to_string());
        command.env("TORCHELASTIC_MAX_RESTARTS", self.attempts.saturating_sub(1).to_string());
        command.env("TORCHELASTIC_RUN_ID", self.start.id.job.to_string());
        command.env("STOKE_JOB", self.start.id.job.to_string());
        command.env("STOKE_GENERATION", membership.generation.0.to_string());
        command.env("STOKE_RANK", self.start.id.rank.0.to_string());
        command.env("CUDA_VISIBLE_DEVICES", own(GPUS).unwrap_or_default());
        command.envs(Mark::inherited().map(|mark| (MARK, mark.to_string())));
        command
    }

    /// The first member says that the generation runs.
    fn resumed(&self, membership: &Membership) {
        if membership.members.first().is_some_and(|first| first.id == self.start.id) {
            let generation = membership.generation;
            (self.tell)(Told::Event(RankEvent::Resumed { generation, step: Step(0) }));
        }
    }

    fn failure(&self, exit: &Exit, last: &[String]) -> Failure {
        let how = match exit {
            Exit::Code(code) => format!("the command exited with code {code}"),
            Exit::Signal(signal) => format!("the command was killed by signal {signal}"),
            other => format!("the command ended: {other:?}"),
        };
        let said = if last.is_empty() { String::new() } else { format!("; the last it said: {}", last.join(" | ")) };
        let for_good =
            matches!(exit, Exit::Code(code) if self.spec.fail_on.iter().any(|fatal| i32::from(*fatal) == *code));
        match for_good {
            true => Failure::Permanent(format!("{how}, which fail_on names{said}")),
            false => Failure::Error(format!("{how}{said}")),
        }
    }
}

/// Whether a command goes on through this change of generations.
fn is_same(before: &Membership, after: &Membership) -> bool {
    let ids = |membership: &Membership| membership.members.iter().map(|member| member.id).collect::<Vec<_>>();
    after.purpose == before.purpose && ids(before) == ids(after)
}
