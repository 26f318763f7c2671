//! `stoke completions`: what a shell needs to complete commands, options and values.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::failure::{Exit, Failure};
use crate::{Cli, output};

const EXAMPLES: &str = "\
Examples:
  stoke completions bash > ~/.local/share/bash-completion/completions/stoke
  stoke completions zsh > ~/.zfunc/_stoke                      with fpath+=~/.zfunc before compinit
  stoke completions fish > ~/.config/fish/completions/stoke.fish";

/// Print the completions of a shell
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[arg(value_enum)]
    shell: Shell,
}

pub async fn run(args: Args) -> Result<Exit, Failure> {
    // Into memory first: the generator panics where it cannot write, and a pipe may be closed.
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "stoke", &mut text);
    output::print(&String::from_utf8_lossy(&text))?;
    Ok(Exit::Ok)
}
