//! The section `[exec]`: a command that runs once a rank, as programs that were written for torchrun expect it. Owns its keys, defaults and checks; knows
//! nothing of processes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Artifact, Span};

/// A container for the command's name is a path: longer ones are no program of any machine.
const ARGUMENT_BYTES_MAX: usize = 16 * 1024;
/// A place is kept for a command that ends so long: an agent waits for no longer one.
pub const GRACE_MAX: Span = Span(300_000);
const GATHER_MAX: Span = Span(3_600_000);
/// As Linux lets users be called; numbers are users too.
const USER_BYTES_MAX: usize = 32;
/// A rank sets these itself: they say where in the gang it is.
const OURS: [&str; 10] = [
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
    "TMPDIR",
    "PWD",
];
const OUR_PREFIXES: [&str; 2] = ["STOKE_", "TORCHELASTIC_"];

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    pub command: Command,
    /// `command` is one text for `/bin/sh -c`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shell: bool,
    /// The folder that is packed when the job is submitted, relative to the spec. Only in the text that people write: what is submitted has `artifact`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folder: Option<String>,
    /// What each start of the command finds in its working folder. Left out: nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact: Option<Artifact>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Variables that the command gets as the agent has them, where it has them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pass_env: Vec<String>,
    /// The command runs as this user; the agent must be root. Left out: as the agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// From SIGTERM to SIGKILL.
    #[serde(default = "default_grace")]
    pub grace: Span,
    /// With these exit codes the job fails at once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fail_on: Vec<u8>,
    /// A gang with fewer ranks than asked waits so long for others before its commands start.
    #[serde(default = "default_gather")]
    pub gather: Span,
    /// The command is ended when its node has had no word from the coordinator for so long. Left out: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut_off: Option<Span>,
}

/// A program with its arguments, or a line for the shell.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a list of texts, like [\"python3\", \"train.py\"], or with shell = true one text"
)]
pub enum Command {
    Arguments(Vec<String>),
    Line(String),
}

fn default_grace() -> Span {
    Span(10_000)
}

fn default_gather() -> Span {
    Span(5_000)
}

impl Exec {
    /// The program and its arguments.
    pub fn arguments(&self) -> Vec<String> {
        match &self.command {
            Command::Arguments(arguments) => arguments.clone(),
            Command::Line(line) => vec!["/bin/sh".to_owned(), "-c".to_owned(), line.clone()],
        }
    }

    /// The key that is wrong, and what to write instead.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        self.check_command().map_err(|problem| ("command", problem))?;
        if self.folder.as_deref().is_some_and(|folder| folder.is_empty() || folder.contains('\0')) {
            return Err(("folder", "folder: name a folder, like \".\", or leave it out".into()));
        }
        if self.folder.is_some() && self.artifact.is_some() {
            return Err(("artifact", "the spec has both folder and artifact: leave one of them out".into()));
        }
        for (name, value) in &self.env {
            check_variable(name).map_err(|problem| ("env", problem))?;
            if value.contains('\0') {
                return Err(("env", format!("env: the value of {name} has a NUL, which no environment can hold")));
            }
        }
        for name in &self.pass_env {
            check_variable(name).map_err(|problem| ("pass_env", problem))?;
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.$".contains(&byte);
        if let Some(user) = &self.user
            && (!(1..=USER_BYTES_MAX).contains(&user.len()) || !user.bytes().all(plain) || user.starts_with('-'))
        {
            return Err(("user", format!("user = {user:?}: name a user of the nodes, like \"nobody\", or its number")));
        }
        if self.grace > GRACE_MAX {
            return Err(("grace", format!("grace = \"{}\": use at most \"{GRACE_MAX}\"", self.grace)));
        }
        if self.gather > GATHER_MAX {
            return Err(("gather", format!("gather = \"{}\": use at most \"{GATHER_MAX}\"", self.gather)));
        }
        if self.cut_off.is_some_and(|span| span.0 == 0) {
            return Err(("cut_off", "cut_off = \"0ms\": use a longer time, or leave it out".into()));
        }
        if self.fail_on.contains(&0) {
            return Err(("fail_on", "fail_on: 0 is how a command ends well, name other exit codes".into()));
        }
        Ok(())
    }

    fn check_command(&self) -> Result<(), String> {
        let arguments = match (&self.command, self.shell) {
            (Command::Arguments(arguments), false) => arguments.as_slice(),
            (Command::Line(line), true) => std::slice::from_ref(line),
            (Command::Arguments(_), true) => {
                return Err(
                    "command is a list, and shell = true takes one text: write command = \"...\", or leave shell out"
                        .into(),
                );
            }
            (Command::Line(_), false) => {
                return Err(
                    "command is one text: write a list, like [\"python3\", \"train.py\"], or add shell = true".into()
                );
            }
        };
        if arguments.first().is_none_or(|program| program.trim().is_empty()) {
            return Err("command is empty: name a program, like [\"python3\", \"train.py\"]".into());
        }
        match arguments.iter().find(|argument| argument.contains('\0') || argument.len() > ARGUMENT_BYTES_MAX) {
            Some(argument) if argument.contains('\0') => {
                Err("command: an argument has a NUL, which no program can be given".into())
            }
            Some(argument) => {
                let bytes = argument.len();
                Err(format!(
                    "command: an argument has {bytes} bytes, the limit is {ARGUMENT_BYTES_MAX}: put it into a file of the folder"
                ))
            }
            None => Ok(()),
        }
    }
}

fn check_variable(name: &str) -> Result<(), String> {
    if name.is_empty() || name.contains(['=', '\0']) {
        return Err(format!("{name:?} is no name of a variable: use one without '=' and NUL"));
    }
    if OURS.contains(&name) || OUR_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
        return Err(format!("{name} is set for each rank: leave it out"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::spec::{JobSpec, SpecError};

    const GOOD: &str = "name = \"e\"\n[exec]\ncommand = [\"python3\", \"train.py\"]\nenv = { A = \"b\" }\nuser = \"nobody\"\n\
                        pass_env = [\"LANG\"]\nfail_on = [2]\n[resources]\nranks = 2\n";

    fn error(text: &str) -> SpecError {
        JobSpec::parse(text).expect_err("spec must be refused")
    }

    #[test]
    fn the_canonical_text_of_a_command_reads_back_as_the_same_spec() {
        let spec = JobSpec::parse(GOOD).unwrap();
        assert_eq!((spec.ranks_min(2), spec.exec.as_ref().unwrap().grace.0), (2, 10_000));
        assert_eq!(JobSpec::parse(&spec.to_toml()).unwrap(), spec);
        let line = GOOD.replace("[\"python3\", \"train.py\"]", "\"a | b\"\nshell = true");
        let spec = JobSpec::parse(&line).unwrap();
        assert_eq!(spec.exec.as_ref().unwrap().arguments(), ["/bin/sh", "-c", "a | b"]);
        assert_eq!(JobSpec::parse(&spec.to_toml()).unwrap(), spec);
    }

    #[test]
    fn what_no_process_can_be_given_is_refused_with_its_line() {
        let long = format!("[\"{}\"]", "a".repeat(20_000));
        for (from, to, line, words) in [
            ("[\"python3\", \"train.py\"]", "[]", 3, "command is empty"),
            ("[\"python3\", \"train.py\"]", "[\"\"]", 3, "command is empty"),
            ("[\"python3\", \"train.py\"]", "\"python3 train.py\"", 3, "shell = true"),
            ("[\"python3\", \"train.py\"]", "[\"a\"]\nshell = true", 3, "leave shell out"),
            ("[\"python3\", \"train.py\"]", "[\"a\\u0000\"]", 3, "NUL"),
            ("[\"python3\", \"train.py\"]", long.as_str(), 3, "put it into a file"),
            ("{ A = \"b\" }", "{ \"A=B\" = \"b\" }", 4, "no name of a variable"),
            ("{ A = \"b\" }", "{ A = \"\\u0000\" }", 4, "NUL"),
            ("{ A = \"b\" }", "{ RANK = \"1\" }", 4, "set for each rank"),
            ("\"nobody\"", "\"no body\"", 5, "name a user"),
            ("\"LANG\"", "\"\"", 6, "no name of a variable"),
            ("[2]", "[0]", 7, "how a command ends well"),
            ("[2]", "[2]\ngrace = \"1h\"", 8, "at most \"5m\""),
            ("[2]", "[2]\nfolder = \"\"", 8, "name a folder"),
            ("ranks = 2", "ranks = 2\nranks_min = 3", 10, "use 1 to 2"),
            ("name = \"e\"", "name = \"e\"\ntrainer = \"digits\"", 2, "job with [exec] has none"),
            ("[resources]", "[checkpoint]\nkeep = 1\n[resources]", 8, "job with [exec] has none"),
        ] {
            let refused = error(&GOOD.replace(from, to));
            assert!(refused.message.contains(words), "{to}: {refused}");
            assert_eq!(refused.line, Some(line), "{to}: {refused}");
        }
    }
}
