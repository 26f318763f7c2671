//! The `main` of a program of the user's own, whose trainers run as the ranks of jobs (docs/own-trainer.md). Owns its command line: `worker`, which a node's
//! agent calls, `check`, which `stoke submit` calls before it sends the program, and `train`, for whoever looks for a mistake. What a rank does is in
//! `worker`: the same as for trainers that are built in.

mod solo;

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use stoke_jobs::{JobError, Trainer, Trainers};
use stoke_protocol::spec::JobSpec;
use tracing_subscriber::EnvFilter;

use crate::artifact::MARK;
use crate::worker;

/// Unless `RUST_LOG` says otherwise; as `stoke` has them.
const LEVELS: &str = "info,quinn=warn,quinn_proto=warn,quinn_udp=error,rustls=warn";
/// Of wrong arguments and of a spec that cannot be run.
const WRONG: u8 = 2;

const USAGE: &str = "\
usage:
  check SPEC [--json]      whether the spec can be run; `-` reads it from standard input
  train SPEC [--steps N]   train in this process alone, without a cluster, and print the same weights_blake3
  worker                   one rank of a job; started by a node's agent

To train on a cluster, name this program in a spec (program = \"FILE\") and give that to `stoke run` or `stoke submit`.";

/// Runs this process as one of these trainers, as its arguments say. The whole `main` of a program:
///
/// ```ignore
/// use std::process::ExitCode;
/// use stoke_jobs::{JobError, Plan, Spec, Train, Trainer};
///
/// fn main() -> ExitCode {
///     stoke_node::rank::main(&[Trainer { name: "prose", sections: &["prose"], check, load }])
/// }
/// ```
///
/// Call it first: as a rank the process has inherited descriptors, which whatever opens files before it could take. Exit codes: 0 done, 1 the rank or the
/// training failed, 2 wrong arguments or a wrong spec.
pub fn main(trainers: &'static [Trainer]) -> ExitCode {
    // Whoever looks at this file finds out what it is, and what it speaks, before it runs.
    std::hint::black_box(&MARK);
    start_log();
    let trainers = Trainers::Own(trainers);
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["worker"] => worker::main(trainers),
        ["check", spec] => told(spec, check(trainers, spec).map(|_| ())),
        ["check", spec, "--json"] | ["check", "--json", spec] => told_as_json(check(trainers, spec)),
        ["train", spec] => train(trainers, spec, None),
        ["train", spec, "--steps", steps] | ["train", "--steps", steps, spec] if steps.parse::<u64>().is_ok() => {
            train(trainers, spec, steps.parse().ok())
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(WRONG)
        }
    }
}

/// What is wrong with a spec. The line is where it stands.
#[derive(Debug)]
struct Wrong {
    line: Option<usize>,
    message: String,
}

impl From<JobError> for Wrong {
    fn from(error: JobError) -> Self {
        match error {
            JobError::Config { line, problem, mend } => {
                Self { line: Some(line), message: format!("{problem} ({mend})") }
            }
            other => Self { line: None, message: worker::text_of(&other) },
        }
    }
}

fn check(trainers: Trainers, path: &str) -> Result<(JobSpec, String), Wrong> {
    let read = match path {
        "-" => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map(|_| text)
        }
        path => std::fs::read_to_string(path),
    };
    let text = read.map_err(|error| Wrong { line: None, message: format!("read the spec: {error}") })?;
    let spec = JobSpec::parse(&text).map_err(|error| Wrong { line: error.line, message: error.message })?;
    if spec.train.is_none() {
        return Err(Wrong { line: None, message: "the spec has no [train]: this program only trains".to_owned() });
    }
    trainers.check(&text, &spec.trainer, spec.training().lanes)?;
    Ok((spec, text))
}

fn train(trainers: Trainers, path: &str, steps: Option<u64>) -> ExitCode {
    let base = std::path::absolute(path).ok().and_then(|path| path.parent().map(Path::to_path_buf));
    let base: PathBuf = base.unwrap_or_default();
    let (spec, text) = match check(trainers, path) {
        Ok(checked) => checked,
        Err(wrong) => return told(path, Err(wrong)),
    };
    match solo::train(trainers, (&spec, &text), &base, steps) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn told(path: &str, checked: Result<(), Wrong>) -> ExitCode {
    let Err(Wrong { line, message }) = checked else { return ExitCode::SUCCESS };
    match line {
        Some(line) => eprintln!("error: {path}:{line}: {message}"),
        None => eprintln!("error: {path}: {message}"),
    }
    ExitCode::from(WRONG)
}

/// One document on standard output, whatever comes of it: for `stoke`.
fn told_as_json(checked: Result<(JobSpec, String), Wrong>) -> ExitCode {
    match checked {
        Ok(_) => {
            println!("{}", serde_json::json!({ "ok": true }));
            ExitCode::SUCCESS
        }
        Err(Wrong { line, message }) => {
            println!("{}", serde_json::json!({ "ok": false, "line": line, "message": message }));
            ExitCode::from(WRONG)
        }
    }
}

fn start_log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LEVELS));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    // One that the program has begun by itself stays.
    let _ = log.log_internal_errors(false).try_init();
}
