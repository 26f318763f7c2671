//! The key `program`: a trainer of the user's own, which runs as the process of each rank. Owns how it is written, and that such a spec may have sections of
//! its own, which belong to the program: they are passed through as they are.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use toml::de::{DeTable, DeValue};

use super::{Artifact, JobSpec, SpecError};

/// Where the program is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Program {
    /// A file, relative to the spec. Only in the text that people write: what is submitted names what was sent.
    File(String),
    /// Sent before, by its hash.
    Sent(Artifact),
}

/// What a file's name begins with is no hash.
const SENT: &str = "blake3:";

/// The keys of a document that are the cluster's or every trainer's. Others that are sections belong to the program.
const KEYS: [&str; 15] = [
    "name",
    "trainer",
    "program",
    "priority",
    "train",
    "serve",
    "exec",
    "resources",
    "checkpoint",
    "restart",
    "data",
    "model",
    "optimizer",
    "schedule",
    "rl",
];

impl Program {
    pub fn sent(&self) -> Option<Artifact> {
        match self {
            Self::File(_) => None,
            Self::Sent(artifact) => Some(*artifact),
        }
    }

    /// What is wrong, and what to write instead.
    pub(super) fn check(&self) -> Result<(), String> {
        match self {
            Self::File(path) if path.is_empty() || path.contains('\0') => {
                Err("program: name the file that `cargo build --release` has made, like \"target/release/NAME\"".into())
            }
            Self::File(_) | Self::Sent(_) => Ok(()),
        }
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.write_str(path),
            Self::Sent(artifact) => artifact.fmt(f),
        }
    }
}

impl Serialize for Program {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Program {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.starts_with(SENT) {
            true => text.parse().map(Self::Sent).map_err(serde::de::Error::custom),
            false => Ok(Self::File(text)),
        }
    }
}

/// The document as it is written, before any check. Sections that are the program's own stand apart.
pub(super) fn read(text: &str) -> Result<JobSpec, SpecError> {
    let wrong = |error: toml::de::Error| SpecError::from_toml(text, &error);
    let mut document = DeTable::parse(text).map_err(wrong)?;
    let own = match document.get_ref().contains_key("program") {
        true => take_own(document.get_mut()).map_err(wrong)?,
        false => toml::Table::new(),
    };
    let spec = JobSpec::deserialize(toml::de::Deserializer::from(document)).map_err(wrong)?;
    Ok(JobSpec { own, ..spec })
}

fn take_own(document: &mut DeTable<'_>) -> Result<toml::Table, toml::de::Error> {
    let is_own = |name: &str, value: &DeValue<'_>| !KEYS.contains(&name) && value.is_table();
    let found = document.iter().filter(|(name, value)| is_own(name.get_ref(), value.get_ref()));
    let names: Vec<String> = found.map(|(name, _)| name.get_ref().to_string()).collect();
    let mut own = toml::Table::new();
    for name in names {
        let Some(section) = document.remove(name.as_str()) else { continue };
        own.insert(name, toml::Value::deserialize(toml::de::ValueDeserializer::from(section))?);
    }
    Ok(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "name = \"p\"\ntrainer = \"prose\"\nprogram = \"target/release/own\"\n[train]\nsteps = 2\nbatch = 8\n\
                        [prose]\nheads = 4\n[prose.deep]\na = [1, 2]\n";

    fn error(text: &str) -> SpecError {
        JobSpec::parse(text).expect_err("spec must be refused")
    }

    #[test]
    fn sections_of_a_program_are_passed_through() {
        let spec = JobSpec::parse(GOOD).unwrap();
        assert_eq!(spec.program, Some(Program::File("target/release/own".into())));
        assert_eq!(spec.own["prose"]["deep"]["a"].as_array().map(Vec::len), Some(2));
        assert_eq!(JobSpec::parse(&spec.to_toml()).unwrap(), spec);
        let hash = format!("blake3:{}", "0a".repeat(32));
        let sent = JobSpec::parse(&GOOD.replace("target/release/own", &hash)).unwrap();
        assert_eq!(sent.program.as_ref().and_then(Program::sent).map(|artifact| artifact.to_string()), Some(hash));
        assert_eq!(JobSpec::parse(&sent.to_toml()).unwrap(), sent);
    }

    #[test]
    fn every_key_of_a_spec_is_known_to_be_none_of_the_programs() {
        let unknown = error("name = \"a\"\nnokey = 1\n").message;
        let (_, keys) = unknown.split_once("expected one of ").expect("serde lists the keys");
        let keys: Vec<&str> = keys.split(", ").map(|key| key.trim_matches('`')).collect();
        assert_eq!(keys, KEYS);
    }

    #[test]
    fn mistakes_keep_their_lines() {
        for (from, to, line, words) in [
            ("steps = 2", "stepps = 2", Some(5), "stepps"),
            ("batch = 8", "batch = \"x\"", Some(6), "expected a whole number"),
            ("target/release/own", "", Some(3), "target/release/NAME"),
            ("target/release/own", "blake3:12", Some(3), "64 hexadecimal digits"),
            ("program = ", "# program = ", Some(7), "unknown field `prose`"),
            ("name = \"p\"", "name = \"p\"\nother = 1", Some(2), "unknown field `other`"),
            ("[train]\nsteps = 2\nbatch = 8\n", "[exec]\ncommand = [\"true\"]\n", Some(2), "job with [exec] has none"),
            ("trainer = \"prose\"\n", "", None, "name it as the program does"),
            ("[prose]", "[rl]\na = 1\n[prose]", Some(3), "learns by built-in trainers"),
        ] {
            let refused = error(&GOOD.replace(from, to));
            assert!(refused.message.contains(words), "{to}: {refused}");
            assert_eq!(refused.line, line, "{to}: {refused}");
        }
    }
}
