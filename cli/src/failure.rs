//! How a command ends: its exit code, and for people what went wrong, why, and what to do. Owns the list of exit codes, which is stable over
//! releases; never prints anything but a failure.

use std::fmt::Display;
use std::io::IsTerminal;

use serde_json::{Value, json};
use stoke_protocol::message::client::{Refusal, RefusalCode};

use crate::output;

/// Exit codes: the same for every command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    Ok,
    /// The job failed, a check found something, an operation did not succeed.
    Negative,
    /// Wrong arguments or an invalid spec.
    Usage,
    NotFound,
    /// Forbidden for this role, or not authenticated.
    Denied,
    /// Nobody answered, or the coordinator cannot do it now.
    Unavailable,
    Conflict,
    Interrupted,
}

impl Exit {
    pub fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Negative => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Denied => 4,
            Self::Unavailable => 5,
            Self::Conflict => 6,
            Self::Interrupted => 130,
        }
    }

    /// The opposite; none where no command ends so.
    pub fn of_code(code: i32) -> Option<Self> {
        let all = [
            Self::Ok,
            Self::Negative,
            Self::Usage,
            Self::NotFound,
            Self::Denied,
            Self::Unavailable,
            Self::Conflict,
            Self::Interrupted,
        ];
        all.into_iter().find(|exit| i32::from(exit.code()) == code)
    }

    /// The name that programs see in `--json` errors.
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Negative => "failed",
            Self::Usage => "invalid",
            Self::NotFound => "not-found",
            Self::Denied => "forbidden",
            Self::Unavailable => "unavailable",
            Self::Conflict => "conflict",
            Self::Interrupted => "interrupted",
        }
    }
}

/// Why a command did not do what it was asked for.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    error: anyhow::Error,
    help: Option<String>,
    /// What programs are told beside the error: what was done until then.
    beside: serde_json::Map<String, Value>,
}

impl Failure {
    pub fn new(exit: Exit, message: impl Display) -> Self {
        Self::from_error(exit, anyhow::anyhow!("{message}"))
    }

    /// Keeps the chain of causes of `error`.
    pub fn from_error(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into(), help: None, beside: serde_json::Map::new() }
    }

    pub fn usage(message: impl Display) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// Says what the person can do now.
    #[must_use]
    pub fn help(mut self, help: impl Display) -> Self {
        self.help = Some(help.to_string());
        self
    }

    /// Gives programs these fields beside the error.
    #[must_use]
    pub fn beside(mut self, fields: Value) -> Self {
        if let Value::Object(fields) = fields {
            self.beside.extend(fields);
        }
        self
    }

    /// Says what was being done.
    #[must_use]
    pub fn context(mut self, context: impl Display) -> Self {
        self.error = self.error.context(context.to_string());
        self
    }

    pub fn message(&self) -> String {
        self.error.to_string()
    }

    pub fn help_text(&self) -> String {
        self.help.clone().unwrap_or_default()
    }

    /// `error:`, the chain of causes, `help:` to stderr.
    pub fn print(&self) {
        let (red, cyan, plain) = if colours() { ("\x1b[1;31m", "\x1b[1;36m", "\x1b[0m") } else { ("", "", "") };
        output::say(format_args!("{red}error{plain}: {}", self.error));
        let mut said = self.error.to_string();
        for cause in self.error.chain().skip(1) {
            let text = cause.to_string();
            // Some libraries repeat their cause in their own message.
            if !said.contains(&text) {
                output::say(format_args!("  because: {text}"));
            }
            said = text;
        }
        if let Some(help) = &self.help {
            output::say(format_args!("{cyan}help{plain}: {help}"));
        }
    }

    /// The one document on stdout of a command that failed under `--json`.
    pub fn json(&self) -> Value {
        let causes: Vec<String> = self.error.chain().skip(1).map(ToString::to_string).collect();
        let mut document = Value::Object(self.beside.clone());
        document["error"] = json!({
            "code": self.exit.name(),
            "message": self.error.to_string(),
            "causes": causes,
            "help": self.help,
        });
        document
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let exit = match refusal.code {
            RefusalCode::Invalid => Exit::Usage,
            RefusalCode::NotFound => Exit::NotFound,
            RefusalCode::Forbidden => Exit::Denied,
            RefusalCode::Conflict => Exit::Conflict,
            RefusalCode::Unavailable => Exit::Unavailable,
        };
        let failure = Self::new(exit, refusal.message);
        if refusal.mend.is_empty() { failure } else { failure.help(refusal.mend) }
    }
}

/// Adds an exit code and the words for people to the errors of libraries.
pub trait OrFail<T> {
    fn or_fail(self, exit: Exit, context: impl Display) -> Result<T, Failure>;
}

impl<T, E: Into<anyhow::Error>> OrFail<T> for Result<T, E> {
    fn or_fail(self, exit: Exit, context: impl Display) -> Result<T, Failure> {
        self.map_err(|error| Failure::from_error(exit, error).context(context))
    }
}

/// Colours only for a person who did not ask for none (<https://no-color.org>).
fn colours() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_documented_ones() {
        let codes = [
            Exit::Ok,
            Exit::Negative,
            Exit::Usage,
            Exit::NotFound,
            Exit::Denied,
            Exit::Unavailable,
            Exit::Conflict,
            Exit::Interrupted,
        ];
        assert_eq!(codes.map(Exit::code), [0, 1, 2, 3, 4, 5, 6, 130]);
    }

    #[test]
    fn a_refusal_keeps_its_mend_and_gets_its_code() {
        let refusal =
            Refusal { code: RefusalCode::Conflict, message: "job-7 has ended".into(), mend: "submit it again".into() };
        let failure = Failure::from(refusal);
        assert_eq!(failure.exit, Exit::Conflict);
        assert_eq!(failure.json()["error"]["code"], "conflict");
        assert_eq!(failure.json()["error"]["help"], "submit it again");
    }
}
