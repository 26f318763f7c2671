//! `stoke man`: man pages, from the same definition as `--help`.

use std::io;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use crate::failure::{Exit, Failure, OrFail};
use crate::{Cli, output};

const EXAMPLES: &str = "\
Examples:
  stoke man | man -l -
  stoke man ~/.local/share/man/man1       then: man stoke-submit";

/// What texts behind the options of `--help` are headed, and what man pages call that.
const HEADINGS: [(&str, &str); 3] =
    [("Example:", "EXAMPLES"), ("Examples:", "EXAMPLES"), ("Exit codes:", "EXIT STATUS")];

/// Write a man page of each command into a folder, or print that of `stoke`
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Made if it is not there
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub async fn run(args: Args) -> Result<Exit, Failure> {
    let mut command = Cli::command().disable_help_subcommand(true);
    let Some(dir) = args.dir else {
        let (_, page) = page(command).or_fail(Exit::Negative, "write the man page")?;
        output::print(&page)?;
        return Ok(Exit::Ok);
    };
    command.build();
    let written = std::fs::create_dir_all(&dir).and_then(|()| write(&command, &dir));
    written.or_fail(Exit::Negative, format!("write man pages to {}", dir.display()))?;
    Ok(Exit::Ok)
}

fn write(command: &clap::Command, dir: &Path) -> io::Result<()> {
    command.get_subcommands().filter(|nested| !nested.is_hide_set()).try_for_each(|nested| write(nested, dir))?;
    let (name, page) = page(command.clone())?;
    std::fs::write(dir.join(name), page)
}

/// The name of a page's file, and the page. The crate would put all that stands behind the options under EXTRA, and fill examples like sentences.
fn page(command: clap::Command) -> io::Result<(String, String)> {
    let behind = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let man = Man::new(command.after_help(None::<&'static str>));
    let mut page = Vec::new();
    man.render(&mut page)?;
    Ok((man.get_filename(), String::from_utf8_lossy(&page).into_owned() + &sections(&behind)))
}

/// Indented lines stay as they are, others are paragraphs.
fn sections(text: &str) -> String {
    let mut roff = Roff::new();
    let mut as_it_is = false;
    for line in text.lines() {
        if std::mem::replace(&mut as_it_is, line.starts_with(' ')) != as_it_is {
            roff.control(if as_it_is { "nf" } else { "fi" }, []);
        }
        match HEADINGS.iter().find(|(heading, _)| *heading == line) {
            Some((_, title)) => roff.control("SH", [*title]),
            None if line.is_empty() => roff.control("PP", []),
            None => roff.text([roman(line)]),
        };
    }
    roff.to_roff()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_of_every_command_stand_line_by_line_under_their_heading() {
        let mut command = Cli::command().disable_help_subcommand(true);
        command.build();
        let mut commands = vec![command];
        while let Some(command) = commands.pop() {
            commands.extend(command.get_subcommands().filter(|nested| !nested.is_hide_set()).cloned());
            let has_examples = command.get_after_help().is_some();
            let (name, page) = page(command).expect("a page");
            assert!(!page.contains(".SH EXTRA"), "{name}");
            assert_eq!(page.contains("\n.SH EXAMPLES\n.nf\n  "), has_examples, "{name}: {page}");
        }
        let text = "Exit codes:\n    0  done\n\nExamples:\n  a\n  b-c\n\nEnds with 0.";
        let expected = ".SH \"EXIT STATUS\"\n.nf\n    0  done\n.fi\n.PP\n.SH EXAMPLES\n.nf\n  a\n  b\\-c\n.fi\n.PP\nEnds with 0.\n";
        assert_eq!(sections(text), expected);
    }
}
