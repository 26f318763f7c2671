//! The `stoke` binary: argument parsing, the runtime, the exit code. Everything else is in the commands.

mod artifact;
mod chaos;
mod chart;
mod client;
mod command;
mod detection;
mod diagnosis;
mod example;
mod failure;
mod local;
mod logging;
mod model;
mod named;
mod output;
mod place;
mod program;
mod progress;
mod report;
mod served;
mod service;
mod spec;
mod top;

use std::path::PathBuf;
use std::process::ExitCode;
use stoke_coordinator::api::json;

use clap::Parser;

use crate::command::Command;
use crate::failure::{Exit, Failure};

/// glibc gives the 64 KiB buffers of large packets back to the kernel each time; this keeps a third of the CPU of a transfer.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const EXIT_CODES: &str = "\
Exit codes:
    0  done
    1  the job failed, or a check found something
    2  wrong arguments, or an invalid spec (FILE:LINE: message)
    3  not found
    4  forbidden, or not authenticated
    5  the coordinator is unreachable, or cannot do it now
    6  conflict: already there, already running, already over
  130  interrupted

Examples:
  stoke run jobs/specs/domains.toml
  stoke up && stoke submit --wait jobs/specs/domains.toml
  stoke run jobs/specs/domains.toml --json | jq .weights_blake3";

/// Turns machines into a cluster that trains and serves: a coordinator, an agent on each machine, jobs that survive failures bit for bit.
#[derive(Parser, Debug)]
#[command(name = "stoke", version, after_help = EXIT_CODES, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Args, Debug)]
pub struct Global {
    /// Print one JSON document (or one a line, where it streams) instead of text
    #[arg(long, global = true)]
    json: bool,

    /// Folder of the cluster: a local cluster's, a coordinator's, or one of `stoke login` [env: STOKE_CLUSTER; default: ~/.local/share/stoke/local]
    #[arg(long, global = true, value_name = "DIR")]
    cluster: Option<PathBuf>,

    /// End with this process, which started us
    #[arg(long, global = true, hide = true, value_name = "PID")]
    parent: Option<u32>,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refused(&error),
    };
    let json = cli.global.json;
    dispatch(cli).unwrap_or_else(|failure| {
        failure.print();
        if json {
            // Programs get one document in any case; if even that cannot be written, the exit code still says it.
            let _ = output::print_json(&failure.json());
        }
        ExitCode::from(failure.exit.code())
    })
}

/// Help, or what is wrong with the arguments in clap's words; under `--json` that is a document too.
fn refused(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    let json = std::env::args_os().take_while(|argument| argument != "--").any(|argument| argument == "--json");
    if json && error.use_stderr() {
        let text = error.render().to_string();
        let said: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
        let said = said.join(" ");
        let _ = output::print_json(&Failure::usage(said.strip_prefix("error: ").unwrap_or(&said)).json());
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(Exit::Usage.code()))
}

fn dispatch(cli: Cli) -> Result<ExitCode, Failure> {
    if let Some(parent) = cli.global.parent {
        local::process::die_with(parent).map_err(|reason| Failure::new(Exit::Negative, reason))?;
    }
    logging::start(cli.command.is_service(), cli.global.json);
    cli.command.run(&cli.global)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn arguments_are_consistent_and_every_command_shows_an_example() {
        let mut cli = Cli::command();
        cli.build();
        cli.clone().debug_assert();
        // clap's own `help` repeats every command without its texts.
        let mut commands: Vec<_> =
            cli.get_subcommands().filter(|command| command.get_name() != "help").cloned().collect();
        while let Some(command) = commands.pop() {
            let nested: Vec<_> =
                command.get_subcommands().filter(|command| command.get_name() != "help").cloned().collect();
            if nested.is_empty() && !command.is_hide_set() {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Example"), "{} has no example", command.get_name());
                // Longer ones are wrapped, and nobody can paste them.
                let long = help.lines().find(|line| line.starts_with("  stoke ") && line.chars().count() > 100);
                assert_eq!(long, None, "{}", command.get_name());
            }
            commands.extend(nested);
        }
    }
}
