//! From the file that a person wrote to the canonical spec that is submitted: `--set`, `--ranks` and `--resume` applied, paths absolute, all
//! checks done. Errors read `FILE:LINE: message`. Never talks to a cluster.

use std::fmt::Display;
use std::io::Read;
use std::path::{Path, PathBuf};

use stoke_jobs::JobError;
use stoke_protocol::spec::{JobSpec, Program, plain_toml};

use crate::failure::{Exit, Failure, OrFail};
use crate::{output, program};

/// The arguments of every command that takes a spec.
#[derive(clap::Args, Debug)]
pub struct SpecArgs {
    /// The job spec (TOML); `-` reads it from standard input
    #[arg(value_name = "SPEC")]
    pub spec: PathBuf,

    /// World size; overrides [resources] ranks
    #[arg(long, value_name = "R")]
    pub ranks: Option<u32>,

    /// Change a key of the spec, e.g. `--set train.epochs=1`; repeatable. Paths in [data] are relative to the spec's folder
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,

    /// Continue from this checkpoint: its folder, its URI, or a job of the cluster (its newest checkpoint)
    #[arg(long, value_name = "CHECKPOINT|JOB")]
    pub resume: Option<String>,
}

/// Reads, changes, completes and checks the spec.
pub fn prepare(args: &SpecArgs) -> Result<JobSpec, Failure> {
    let (name, text, base) = read(&args.spec)?;
    let changes = changes(args)?;
    let check = |count: usize| -> Result<JobSpec, (Option<usize>, String)> {
        // Line numbers hold only where nothing is changed.
        let text = if count == 0 { text.clone() } else { changed(&text, &changes[..count])? };
        finish(&text, &base)
    };
    let (_, message) = match check(changes.len()) {
        Ok(spec) => return Ok(spec),
        Err(error) => error,
    };
    // A mistake is of the first change that makes it; one that the file makes itself is shown where it stands.
    for count in 0..=changes.len() {
        match check(count) {
            Err((line, same)) if same == message && count == 0 => return Err(located(&name, &text, line, &message)),
            Err((_, same)) if same == message => {
                return Err(Failure::usage(format!("{}: {message}", changes[count - 1].typed)));
            }
            Ok(_) | Err(_) => {}
        }
    }
    Err(Failure::usage(format!("{name}: {message}")))
}

/// One rank a node where the spec does not say, and never more ranks than lanes: the answer says so where that leaves nodes idle.
pub fn default_ranks(spec: &mut JobSpec, nodes_up: u32) -> Option<String> {
    if spec.resources.ranks.is_some() || spec.serve.is_some() {
        return None;
    }
    let ranks = nodes_up.clamp(spec.resources.ranks_min.unwrap_or(1), spec.ranks_max());
    spec.resources.ranks = Some(ranks);
    let (ranks_text, nodes_text) = (output::count(ranks, "rank"), output::count(nodes_up, "node"));
    let lanes = spec.train.as_ref()?.lanes;
    (ranks < nodes_up).then(|| format!("{ranks_text} on {nodes_text}: [train] lanes = {lanes} allows no more"))
}

/// A checkpoint's URI from what people type: a folder, or the URI itself.
pub fn checkpoint_uri(text: &str) -> Result<String, Failure> {
    if text.contains("://") {
        return Ok(text.to_owned());
    }
    let path = std::path::absolute(text).or_fail(Exit::Usage, format!("resolve path {text}"))?;
    file_uri(&path)
}

pub fn file_uri(path: &Path) -> Result<String, Failure> {
    let text = path
        .to_str()
        .ok_or_else(|| Failure::usage(format!("path {} is not UTF-8: a URI cannot name it", path.display())))?;
    Ok(format!("file://{text}"))
}

fn read(path: &Path) -> Result<(String, String, PathBuf), Failure> {
    let current = || std::env::current_dir().or_fail(Exit::Usage, "find the current folder");
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).or_fail(Exit::Usage, "read the spec from standard input")?;
        return Ok(("stdin".to_owned(), text, current()?));
    }
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::from_error(Exit::Usage, error)
            .context(format!("read spec {}", path.display()))
            .help("name the file of a spec: jobs/specs/domains.toml is one that trains, jobs/specs/serve-smollm2.toml one that serves")
    })?;
    let base = std::path::absolute(path).or_fail(Exit::Usage, "resolve the spec's path")?;
    let base = base.parent().map(Path::to_path_buf).unwrap_or(current()?);
    Ok((path.display().to_string(), text, base))
}

/// A key that the command line changes.
struct Change {
    /// As errors name it.
    typed: String,
    key: String,
    value: toml::Value,
}

fn changes(args: &SpecArgs) -> Result<Vec<Change>, Failure> {
    let mut changes = Vec::new();
    for set in &args.sets {
        let (key, value) = set.split_once('=').ok_or_else(|| {
            Failure::usage(format!("--set {set:?} has no '='")).help("write for example --set train.epochs=1")
        })?;
        let key = key.trim().to_owned();
        changes.push(Change { typed: format!("--set {key}"), key, value: parse_value(value.trim()) });
    }
    if let Some(ranks) = args.ranks {
        let (typed, key) = ("--ranks".to_owned(), "resources.ranks".to_owned());
        changes.push(Change { typed, key, value: i64::from(ranks).into() });
    }
    if let Some(resume) = &args.resume {
        let (typed, key) = ("--resume".to_owned(), "checkpoint.resume".to_owned());
        changes.push(Change { typed, key, value: checkpoint_uri(resume)?.into() });
    }
    Ok(changes)
}

/// The document with these changes.
fn changed(text: &str, changes: &[Change]) -> Result<String, (Option<usize>, String)> {
    let mut document: toml::Table = toml::from_str(text).map_err(|error| {
        let line = error.span().map(|span| 1 + text[..span.start.min(text.len())].matches('\n').count());
        (line, plain_toml(error.message()))
    })?;
    for change in changes {
        set_key(&mut document, &change.key, change.value.clone()).map_err(|problem| (None, problem))?;
    }
    toml::to_string(&document).map_err(|error| (None, error.to_string()))
}

fn set_key(document: &mut toml::Table, key: &str, value: toml::Value) -> Result<(), String> {
    let mut path: Vec<&str> = key.split('.').collect();
    let last = path.pop().filter(|last| !last.is_empty() && path.iter().all(|part| !part.is_empty()));
    let Some(last) = last else {
        return Err("the key has an empty part: write for example --set train.epochs=1".to_owned());
    };
    let mut table = document;
    for part in path {
        let entry = table.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        table = entry.as_table_mut().ok_or_else(|| format!("{part} is not a section"))?;
    }
    // They stand for each other: choosing one drops the other. (Those of [rl] do not.)
    match key {
        "train.steps" => table.remove("epochs"),
        "train.epochs" => table.remove("steps"),
        _ => None,
    };
    table.insert(last.to_owned(), value);
    Ok(())
}

/// A TOML value, or the bare text where it is none: `--set name=trial` needs no quotes.
fn parse_value(text: &str) -> toml::Value {
    toml::from_str::<toml::Table>(&format!("value = {text}"))
        .ok()
        .filter(|table| table.len() == 1)
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| toml::Value::String(text.to_owned()))
}

/// The checks of the cluster, then the trainer's own, then the canonical spec.
fn finish(text: &str, base: &Path) -> Result<JobSpec, (Option<usize>, String)> {
    let parse = |text: &str| JobSpec::parse(text).map_err(|error| (error.line, error.message));
    let problem = |error: JobError| match error {
        JobError::Config { line, problem, mend } => (Some(line), format!("{problem} ({mend})")),
        other => (None, other.to_string()),
    };
    let spec = parse(text)?;
    if spec.serve.is_some() {
        return Ok(spec);
    }
    if spec.exec.is_some() {
        return absolute_folder(spec, text, base);
    }
    let program = match &spec.program {
        // Who sent it has checked it.
        Some(Program::Sent(artifact)) => Some(Program::Sent(*artifact)),
        Some(Program::File(file)) => {
            let path = base.join(file);
            program::check(&path, text, base)
                .map_err(|(line, message)| (line.or(line_of(text, "program")), message))?;
            let path = path.to_str().ok_or_else(|| (line_of(text, "program"), "the path is not UTF-8".to_owned()))?;
            Some(Program::File(path.to_owned()))
        }
        None => {
            stoke_jobs::check(text, &spec.trainer, spec.training().lanes).map_err(problem)?;
            None
        }
    };
    let absolute = stoke_jobs::absolute_paths(text, base).map_err(problem)?;
    Ok(JobSpec { program, ..parse(&absolute)? })
}

/// Where a key of the document itself stands, that is on no other line before.
fn line_of(text: &str, key: &str) -> Option<usize> {
    text.lines().position(|line| line.trim_start().starts_with(key)).map(|line| line + 1)
}

/// The folder that a command takes along, where it has one.
fn absolute_folder(mut spec: JobSpec, text: &str, base: &Path) -> Result<JobSpec, (Option<usize>, String)> {
    let Some(folder) = spec.exec.as_mut().and_then(|exec| exec.folder.as_mut()) else { return Ok(spec) };
    let line = line_of(text, "folder");
    let path = base.join(&*folder);
    let Some(absolute) = path.to_str().filter(|_| path.is_dir()) else {
        return Err((line, format!("folder = {folder:?}: there is no folder {}", path.display())));
    };
    *folder = absolute.to_owned();
    Ok(spec)
}

/// Names the file, the line, and the key that stands there. What is missing stands nowhere: its line is where its section begins.
fn located(name: &str, text: &str, line: Option<usize>, message: &dyn Display) -> Failure {
    let Some(line) = line else { return Failure::usage(format!("{name}: {message}")) };
    let message = message.to_string();
    let key = text.lines().nth(line.saturating_sub(1)).and_then(|line| line.split_once('=')).map(|(key, _)| key.trim());
    match key.filter(|key| !message.contains(key) && !message.starts_with("missing field")) {
        Some(key) => Failure::usage(format!("{name}:{line}: {key}: {message}")),
        None => Failure::usage(format!("{name}:{line}: {message}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(text: &str, sets: &[(&str, &str)]) -> toml::Table {
        let mut document: toml::Table = toml::from_str(text).unwrap();
        for (key, value) in sets {
            set_key(&mut document, key, parse_value(value)).unwrap();
        }
        document
    }

    #[test]
    fn set_reaches_sections_and_replaces_the_other_length() {
        let document = changed(
            "name = \"a\"\n[train]\nsteps = 5\n",
            &[("train.epochs", "1"), ("name", "trial"), ("model.width", "64")],
        );
        assert_eq!(document["train"]["epochs"].as_integer(), Some(1));
        assert!(document["train"].get("steps").is_none());
        assert_eq!(document["name"].as_str(), Some("trial"));
        assert_eq!(document["model"]["width"].as_integer(), Some(64));
    }

    #[test]
    fn steps_and_epochs_of_a_policy_stand_beside_each_other() {
        let document = changed("[rl]\nsteps = 128\n", &[("rl.epochs", "1")]);
        assert_eq!((document["rl"]["steps"].as_integer(), document["rl"]["epochs"].as_integer()), (Some(128), Some(1)));
    }

    #[test]
    fn set_refuses_keys_that_lead_nowhere() {
        let mut document = toml::Table::new();
        document.insert("name".into(), "a".into());
        assert!(set_key(&mut document, "name.deep", 1.into()).is_err());
        assert!(set_key(&mut document, "train.", 1.into()).is_err());
        assert!(set_key(&mut document, "", 1.into()).is_err());
    }

    #[test]
    fn values_are_toml_or_bare_text() {
        assert_eq!(parse_value("0.5"), toml::Value::Float(0.5));
        assert_eq!(parse_value("\"x\""), toml::Value::String("x".into()));
        assert_eq!(parse_value("plain text"), toml::Value::String("plain text".into()));
        assert_eq!(parse_value("1\nother = 2"), toml::Value::String("1\nother = 2".into()));
    }

    #[test]
    fn errors_name_the_key_that_their_line_sets() {
        let text = "a = 1\nlr = \"fast\"\n[train]\n";
        let said = |line, message: &str| located("job.toml", text, line, &message).message();
        assert_eq!(said(Some(2), "invalid type"), "job.toml:2: lr: invalid type");
        assert_eq!(said(Some(2), "lr is no number"), "job.toml:2: lr is no number");
        assert_eq!(said(Some(1), "missing field `trainer`"), "job.toml:1: missing field `trainer`");
        assert_eq!(said(Some(3), "no steps"), "job.toml:3: no steps");
        assert_eq!((said(None, "empty"), said(Some(9), "cut")), ("job.toml: empty".into(), "job.toml:9: cut".into()));
    }

    #[test]
    fn ranks_that_lanes_do_not_allow_are_told_of() {
        let text = "name = \"d\"\ntrainer = \"domains\"\n[train]\nepochs = 2\nbatch = 256\nlanes = 4\n";
        let ranks = |nodes| {
            let mut spec = JobSpec::parse(text).unwrap();
            let note = default_ranks(&mut spec, nodes);
            (spec.resources.ranks, note)
        };
        assert_eq!((ranks(0), ranks(4)), ((Some(1), None), (Some(4), None)));
        assert_eq!(ranks(5), (Some(4), Some("4 ranks on 5 nodes: [train] lanes = 4 allows no more".into())));
    }

    #[test]
    fn folders_become_uris() {
        assert_eq!(checkpoint_uri("/a/b").unwrap(), "file:///a/b");
        assert_eq!(checkpoint_uri("file:///a").unwrap(), "file:///a");
    }
}
