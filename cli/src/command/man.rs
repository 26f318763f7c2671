//! `stoke man`: man pages, from the same definition as `--help`.

use std::path::PathBuf;

use clap::CommandFactory;

use crate::failure::{Exit, Failure, OrFail};
use crate::{Cli, output};

const EXAMPLES: &str = "\
Examples:
  stoke man | man -l -
  stoke man ~/.local/share/man/man1       then: man stoke-submit";

/// Write a man page of each command into a folder, or print that of `stoke`
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Made if it is not there
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub async fn run(args: Args) -> Result<Exit, Failure> {
    let command = Cli::command().disable_help_subcommand(true);
    let Some(dir) = args.dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page).or_fail(Exit::Negative, "write the man page")?;
        output::print(&String::from_utf8_lossy(&page))?;
        return Ok(Exit::Ok);
    };
    let written = std::fs::create_dir_all(&dir).and_then(|()| clap_mangen::generate_to(command, &dir));
    written.or_fail(Exit::Negative, format!("write man pages to {}", dir.display()))?;
    Ok(Exit::Ok)
}
