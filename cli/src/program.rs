//! The program that a spec names (docs/own-trainer.md), on the machine where the job is submitted: whether it can be a rank, and what it says of the spec
//! itself. Owns that question and its answer; whoever submits sends it (`artifact.rs`).

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Deserialize;
use stoke_node::artifact::{Unfit, inspect};

use crate::output;

/// The last lines of what it printed are told.
const LINES_TOLD: usize = 3;

/// What a program answers to `check - --json`.
#[derive(Deserialize)]
struct Answer {
    ok: bool,
    line: Option<usize>,
    message: Option<String>,
}

/// Asks the program about the text of a spec, in the spec's folder. The error has the line in the spec, where it stands in one.
pub fn check(program: &Path, spec: &str, base: &Path) -> Result<(), (Option<usize>, String)> {
    let shown = program.display();
    let whole = |message: String| (None, message);
    match inspect(program) {
        Ok(Ok(())) => {}
        Ok(Err(unfit @ Unfit::Machine { .. })) => {
            output::say(format_args!("not checked here: program {shown}: {unfit}"));
            return Ok(());
        }
        Ok(Err(unfit)) => return Err(whole(format!("program {shown}: {unfit}"))),
        Err(error) => {
            let mend = "name the file that `cargo build --release` has made, relative to the spec";
            return Err(whole(format!("program {shown}: {error}: {mend}")));
        }
    }
    let asked = ask(program, spec, base);
    let output =
        asked.map_err(|error| whole(format!("run program {shown}: {error}: make it executable (chmod +x)")))?;
    let answer: Answer = serde_json::from_slice(&output.stdout).map_err(|_| {
        let printed = String::from_utf8_lossy(&output.stderr).into_owned();
        let lines: Vec<&str> = printed.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let last = lines[lines.len().saturating_sub(LINES_TOLD)..].join(" | ");
        let mend = "its main is to begin with `stoke_node::rank::main(TRAINERS)`, and print nothing itself before";
        whole(format!("program {shown} did not answer `check` ({}): {mend}; it said: {last}", output.status))
    })?;
    match answer.ok {
        true => Ok(()),
        false => Err((answer.line, answer.message.unwrap_or_else(|| format!("program {shown} refuses the spec")))),
    }
}

fn ask(program: &Path, spec: &str, base: &Path) -> std::io::Result<std::process::Output> {
    let mut command = Command::new(program);
    command.args(["check", "-", "--json"]).current_dir(base).env("RUST_LOG", "warn");
    let mut asked = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let Some(mut stdin) = asked.stdin.take() {
        // A spec is less than a pipe holds; one that does not read it says so by its answer.
        let _ = stdin.write_all(spec.as_bytes());
    }
    asked.wait_with_output()
}
