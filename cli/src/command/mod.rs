//! The commands, one file each. Wiring only: which there are, and what kind of runtime each runs on.

mod cancel;
mod chaos;
mod checkpoint;
mod completions;
mod coordinator;
mod dashboard;
mod doctor;
mod down;
mod drain;
mod embed;
mod eval;
mod explain;
mod infer;
mod jobs;
mod login;
mod logs;
mod man;
mod node;
mod nodes;
mod plot;
mod predict;
mod prune;
mod revision;
mod run;
mod scale;
mod serve;
mod status;
mod submit;
mod supervise;
mod token;
pub mod top;
mod up;

use std::future::Future;
use std::path::Path;
use std::process::ExitCode;

use clap::Subcommand;
use serde::de::DeserializeOwned;
use stoke_protocol::spec::plain_toml;

use crate::Global;
use crate::client::Client;
use crate::failure::{Exit, Failure, OrFail};
use crate::local::folder::Folder;
use crate::place;

/// Where a coordinator listens unless it is told otherwise.
pub const DEFAULT_PORT: u16 = 7878;

#[derive(Subcommand, Debug)]
pub enum Command {
    Run(run::Args),
    Up(up::Args),
    Down(down::Args),
    Submit(submit::Args),
    Serve(serve::Args),
    Status(status::Args),
    Jobs(jobs::Args),
    Nodes(nodes::Args),
    Logs(logs::Args),
    Cancel(cancel::Args),
    Scale(scale::Args),
    Drain(drain::Args),
    Explain(explain::Args),
    /// List, verify, pin and prune checkpoints
    #[command(subcommand)]
    Checkpoint(checkpoint::Checkpoint),
    Predict(predict::Args),
    Eval(eval::Args),
    Plot(plot::Args),
    Dashboard(dashboard::Args),
    Top(top::Args),
    Infer(infer::Args),
    Embed(embed::Args),
    /// Create, list and revoke join tokens
    #[command(subcommand)]
    Token(token::Token),
    Login(login::Args),
    Coordinator(coordinator::Args),
    Node(node::Args),
    Chaos(chaos::Args),
    Doctor(doctor::Args),
    Completions(completions::Args),
    Man(man::Args),
    /// One rank of a job; started by the agent
    #[command(hide = true)]
    Worker,
    /// A look at a model's files; started by the agent
    #[command(hide = true)]
    Survey {
        asked: String,
    },
    #[command(hide = true)]
    Supervise(supervise::Args),
}

impl Command {
    /// Whether it runs until it is stopped, and its log is what people read.
    pub fn is_service(&self) -> bool {
        match self {
            Self::Node(args) => args.is_service(),
            other => matches!(other, Self::Coordinator(_) | Self::Worker | Self::Survey { .. } | Self::Supervise(_)),
        }
    }

    pub fn run(self, global: &Global) -> Result<ExitCode, Failure> {
        let ended = match self {
            Self::Run(args) => alone(run::run(args, global)),
            Self::Up(args) => alone(up::run(args, global)),
            Self::Down(args) => alone(down::run(args, global)),
            Self::Submit(args) => alone(submit::run(args, global)),
            Self::Serve(args) => alone(serve::run(args, global)),
            Self::Status(args) => alone(status::run(args, global)),
            Self::Jobs(args) => alone(jobs::run(args, global)),
            Self::Nodes(args) => alone(nodes::run(args, global)),
            Self::Logs(args) => alone(logs::run(args, global)),
            Self::Cancel(args) => alone(cancel::run(args, global)),
            Self::Scale(args) => alone(scale::run(args, global)),
            Self::Drain(args) => alone(drain::run(args, global)),
            Self::Explain(args) => alone(explain::run(args, global)),
            Self::Checkpoint(command) => alone(checkpoint::run(command, global)),
            Self::Predict(args) => alone(predict::run(args, global)),
            Self::Eval(args) => alone(eval::run(args, global)),
            Self::Plot(args) => alone(plot::run(args, global)),
            Self::Dashboard(args) => shared(dashboard::run(args, global)),
            Self::Top(args) => alone(top::run(args, global)),
            Self::Infer(args) => alone(infer::run(args, global)),
            Self::Embed(args) => alone(embed::run(args, global)),
            Self::Token(command) => alone(token::run(command, global)),
            Self::Login(args) => alone(login::run(args, global)),
            Self::Chaos(args) => alone(chaos::run(args, global)),
            Self::Doctor(args) => alone(doctor::run(args, global)),
            Self::Completions(args) => alone(completions::run(args)),
            Self::Man(args) => alone(man::run(args)),
            Self::Supervise(args) => alone(supervise::run(args)),
            Self::Coordinator(args) => shared(coordinator::run(args, global)),
            Self::Node(args) => shared(node::run(args, global)),
            Self::Worker => return Ok(stoke_node::worker::main(stoke_jobs::Trainers::BuiltIn)),
            Self::Survey { asked } => return Ok(stoke_node::agent::surveys::main(&asked)),
        };
        ended.map(|exit| ExitCode::from(exit.code()))
    }
}

/// On this thread: a command that asks and answers, and the supervisor, whose children die with the thread that started them.
fn alone(command: impl Future<Output = Result<Exit, Failure>>) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.or_fail(Exit::Negative, "start the runtime")?;
    let ended = runtime.block_on(command);
    // A thread that waits for a line of standard input must not hold up the end.
    runtime.shutdown_background();
    ended
}

/// On all processors: the services.
fn shared(command: impl Future<Output = Result<Exit, Failure>>) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.or_fail(Exit::Negative, "start the runtime")?.block_on(command)
}

/// A service's settings from its TOML file; errors read `FILE:LINE: message`.
fn read_config<T: DeserializeOwned>(path: &Path) -> Result<T, Failure> {
    let text = std::fs::read_to_string(path).or_fail(Exit::Usage, format!("read settings {}", path.display()))?;
    toml::from_str(&text).map_err(|error| {
        let line = error.span().map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
        Failure::usage(format!("{}:{line}: {}", path.display(), plain_toml(error.message())))
    })
}

/// A connection to the cluster that the global arguments name.
async fn connect(global: &Global) -> Result<Client, Failure> {
    let dir = place::cluster_dir(global.cluster.as_deref())?;
    Folder::new(&dir).must_not_be_stopped()?;
    Client::open(&place::credentials_dir(&dir)?).await
}

/// Resolves at Ctrl-C or SIGTERM, from the moment when it is made.
fn stop_signal() -> Result<impl Future<Output = ()>, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let listen = |kind| signal(kind).or_fail(Exit::Negative, "listen for signals");
    let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
    let mut hangup = listen(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    })
}
