//! The job spec: one TOML document that people write. Owns its keys, their defaults and their checks; errors name the key, the line and the
//! mend. The sections `[data]`, `[model]`, `[optimizer]`, `[schedule]` and `[rl]` belong to the trainer and are checked by `stoke-jobs`, or by a
//! program of the user's.

mod artifact;
mod exec;
mod program;
mod replicas;
mod serve;
mod span;
mod train;
mod words;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::label::{check_labels, is_plain};

pub use artifact::{ARTIFACT_BYTES_MAX, ARTIFACT_PART_BYTES, Artifact};
pub use exec::{Command, Exec, GRACE_MAX};
pub use program::Program;
pub use replicas::{REPLICAS_MAX, Replicas};
pub use serve::{IDENTITY, Precision, Serve, Share, Task};
pub use span::Span;
pub use train::{Diloco, Floats, OnNan, Sharding, Straggler, Train, Wire};
pub use words::{plain_json, plain_toml};

/// A spec travels in one control frame, beside other fields: so much as it was written, and so much in its canonical form.
pub const SPEC_BYTES_MAX: usize = 32 * 1024;
/// One shard record a rank must fit into a control frame when a checkpoint is committed.
pub const RANKS_MAX: u32 = 256;
/// The names of all that are kept travel in one control frame.
pub const KEEP_MAX: u32 = 1_000;
const NAME_CHARS_MAX: usize = 63;
/// The trainer of jobs with `[rl]`.
const RL: &str = "rl";
/// More than the processors of any machine: a rank starts so many threads at once.
const THREADS_MAX: u32 = 256;
/// Of a rank, where nobody has said or measured how much it needs.
const MEMORY: Bytes = Bytes(1 << 30);
/// A folder's path is shorter on Linux; two of them travel beside the spec.
const URI_BYTES_MAX: usize = 4096;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// For people; letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// A built-in trainer: `domains`, `digits`, `rl`; or one of `program`. Empty: the job serves, runs a command, or has `[rl]`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub trainer: String,
    /// What runs as the process of each rank, where the trainer is none of ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub program: Option<Program>,
    /// Higher goes first.
    #[serde(default)]
    pub priority: i32,
    /// Of a job that trains; or `serve`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train: Option<Train>,
    /// Of a job that serves; or `train`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serve: Option<Serve>,
    /// Of a job that runs a command; or one of the two before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exec: Option<Exec>,
    #[serde(default)]
    pub resources: Resources,
    #[serde(default)]
    pub checkpoint: Checkpoint,
    #[serde(default)]
    pub restart: Restart,
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub data: toml::Table,
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub model: toml::Table,
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub optimizer: toml::Table,
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub schedule: toml::Table,
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    pub rl: toml::Table,
    /// Sections that are the program's own.
    #[serde(skip)]
    pub own: toml::Table,
}

/// What each rank needs.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Resources {
    /// World size. Left out, it is the number of nodes that are up when the job is taken in, and at most one rank a lane.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<u32>,
    /// A job that has lost ranks goes on with no fewer than this, while replacements come up. Left out: 1; of a job with `[exec]`, all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks_min: Option<u32>,
    /// Of a job with `[rl]`: ranks besides, that play environments for those that learn. They come and go: whoever learns can play by itself.
    #[serde(skip_serializing_if = "is_zero")]
    pub rollouts: u32,
    pub cpus: u32,
    /// Left out: 1 GiB; of a decoder that is served, what its part of the model needs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Bytes>,
    pub gpus: u32,
    /// A rank is only placed on nodes that carry all of these.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Steps between checkpoints; one is always written after the last step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<u64>,
    /// `file:///absolute/folder`, `s3://bucket/folder`, `az://container/folder` or `gs://bucket/folder`. Left out: the cluster's own folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Committed checkpoints that are kept; older ones are removed.
    pub keep: u32,
    /// URI of a checkpoint to continue from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resume: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Restart {
    /// A job that fails so many times without getting further has failed for good (I11).
    pub attempts: u32,
}

/// A number of bytes, written as `"512MiB"`, `"2GB"` or plain digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Bytes(pub u64);

/// What is wrong with a spec. Printed as one line: `domains.toml:4: unknown key ...`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub struct SpecError {
    /// 1-based; none where the whole document is meant.
    pub line: Option<usize>,
    pub message: String,
}

fn one() -> u32 {
    1
}

fn is_zero(value: &u32) -> bool {
    *value == 0
}

impl Default for Resources {
    fn default() -> Self {
        Self { ranks: None, ranks_min: None, rollouts: 0, cpus: 1, memory: None, gpus: 0, labels: BTreeMap::new() }
    }
}

impl Resources {
    pub fn memory(&self) -> Bytes {
        self.memory.unwrap_or(MEMORY)
    }
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { every: None, to: None, keep: 3, resume: None }
    }
}

impl Default for Restart {
    fn default() -> Self {
        Self { attempts: 3 }
    }
}

impl JobSpec {
    /// Reads and checks a whole document.
    pub fn parse(text: &str) -> Result<Self, SpecError> {
        if text.len() > SPEC_BYTES_MAX {
            return Err(SpecError::whole(format!(
                "spec has {} bytes, the limit is {SPEC_BYTES_MAX}: put data into files and name them",
                text.len()
            )));
        }
        let mut spec = program::read(text)?;
        spec.complete_rl().map_err(|(key, message)| SpecError { line: line_of_key(text, key), message })?;
        spec.check(text)?;
        // Short keys like `a.b.c = 1` grow when each table gets its own heading.
        let canonical = spec.to_toml().len();
        if canonical > SPEC_BYTES_MAX {
            return Err(SpecError::whole(format!(
                "spec has {canonical} bytes when it is written out, the limit is {SPEC_BYTES_MAX}: put data into files and name them"
            )));
        }
        Ok(spec)
    }

    /// A job with `[rl]` has its length there, and one sample a lane and step: `[train]` says the rest, or is left out.
    fn complete_rl(&mut self) -> Result<(), (&'static str, String)> {
        if self.rl.is_empty() {
            return match &self.train {
                Some(train) if train.batch == 0 => {
                    Err(("train", "missing field `batch`: add for example `batch = 64`".into()))
                }
                _ => Ok(()),
            };
        }
        if self.trainer.is_empty() {
            self.trainer = RL.to_owned();
        }
        if self.program.is_some() {
            return Err((
                "program",
                "program: a job with [rl] learns by built-in trainers, leave one of them out".into(),
            ));
        }
        if self.trainer != RL {
            return Err((
                "trainer",
                format!("trainer = {:?} has no section [rl]: leave one of them out", self.trainer),
            ));
        }
        let others = [
            ("data", &self.data),
            ("model", &self.model),
            ("optimizer", &self.optimizer),
            ("schedule", &self.schedule),
        ];
        if let Some((section, _)) = others.iter().find(|(_, table)| !table.is_empty()) {
            return Err((
                section,
                format!("[{section}] means nothing to a job with [rl]: leave it out, [rl] has keys of its own"),
            ));
        }
        let train = self.train.get_or_insert_default();
        if train.diloco.is_some() {
            return Err(("diloco", "[train.diloco]: leave it out, a job with [rl] makes no local steps".into()));
        }
        if train.precision != Floats::F32 {
            return Err(("precision", "precision = \"bf16\": leave it out, a job with [rl] computes in f32".into()));
        }
        if train.sharding != Sharding::None {
            return Err(("sharding", "sharding = \"zero1\": leave it out, a policy's optimizer is small".into()));
        }
        if train.clip_norm.is_some() {
            return Err(("clip_norm", "clip_norm: leave it out, `[rl] max_grad_norm` cuts gradients".into()));
        }
        if train.steps.is_some() || train.epochs.is_some_and(|epochs| epochs != 1) {
            let key = if train.steps.is_some() { "steps" } else { "epochs" };
            return Err((key, format!("{key}: leave it out, `[rl] total_steps` says how long a job learns")));
        }
        if train.batch != 0 && train.batch != train.lanes {
            return Err(("batch", "batch: leave it out, [rl] says what a round and an update are made of".into()));
        }
        (train.epochs, train.batch) = (Some(1), train.lanes);
        Ok(())
    }

    /// The canonical text: what is submitted, journalled and hashed.
    pub fn to_toml(&self) -> String {
        let (spec, own) = (toml::to_string(self), toml::to_string(&self.own));
        // Those are sections, and may stand behind all others.
        spec.expect("a spec has only types that TOML can write") + &own.expect("it was TOML when it was read")
    }

    /// What a trainer is to do. For jobs that train only.
    pub fn training(&self) -> &Train {
        self.train.as_ref().expect("a job that trains has [train], as its check says")
    }

    /// A rank that trains owns at least one lane, and one that serves has its place in the split.
    pub fn ranks_max(&self) -> u32 {
        match (&self.train, &self.serve) {
            (_, Some(serve)) => serve.ranks(),
            (Some(train), None) => RANKS_MAX.min(train.lanes),
            (None, None) => RANKS_MAX,
        }
    }

    /// With how many of so many ranks it goes on. A split has no place for fewer: nothing may take a rank of it away.
    pub fn ranks_min(&self, ranks: u32) -> u32 {
        match (&self.serve, &self.exec, self.resources.ranks_min) {
            (Some(serve), _, _) => serve.ranks(),
            (None, _, Some(least)) => least,
            (None, Some(_), None) => ranks,
            (None, None, None) => 1,
        }
    }

    /// Whether the layers of a model are cut over ranks: by what its nodes have, as far as the spec does not say how.
    pub fn awaits_split(&self) -> bool {
        self.serve.as_ref().is_some_and(|serve| serve.task == Task::Generate)
    }

    fn check(&self, text: &str) -> Result<(), SpecError> {
        let fail = |key: &str, message: String| Err(SpecError { line: line_of_key(text, key), message });
        let resources = &self.resources;
        if !is_name(&self.name) {
            return fail(
                "name",
                format!("name = {:?}: use 1 to {NAME_CHARS_MAX} letters, digits, '-', '_' or '.'", self.name),
            );
        }
        let two = |one: &'static str, other: &str| {
            Err((one, format!("the spec has both [{other}] and [{one}]: a job does one of them, leave the other out")))
        };
        let checked = match (&self.train, &self.serve, &self.exec) {
            (Some(train), None, None) => self.check_trainer().and_then(|()| train.check()),
            (None, Some(serve), None) => self.check_is_no_trainer("serve").and_then(|()| serve.check()),
            (None, None, Some(exec)) => self.check_is_no_trainer("exec").and_then(|()| exec.check()),
            (Some(_), Some(_), _) => two("serve", "train"),
            (Some(_), None, Some(_)) => two("exec", "train"),
            (None, Some(_), Some(_)) => two("exec", "serve"),
            (None, None, None) => Err((
                "train",
                "missing section [train], [serve] for a job that serves a model, or [exec] for one that runs a command"
                    .into(),
            )),
        };
        if let Err((key, message)) = checked {
            return fail(key, message);
        }
        if let Some(ranks) = resources.ranks {
            let most = self.ranks_max();
            if !(1..=most).contains(&ranks) {
                return fail(
                    "ranks",
                    match (&self.train, &self.serve) {
                        (Some(Train { lanes, .. }), _) => format!(
                            "ranks = {ranks} with lanes = {lanes}: use 1 to {most} (a rank owns at least one lane)"
                        ),
                        (None, Some(_)) => format!("ranks = {ranks}: the split of [serve] has {most}, leave it out"),
                        (None, None) => format!("ranks = {ranks}: use 1 to {most}"),
                    },
                );
            }
        }
        let most = resources.ranks.unwrap_or(self.ranks_max());
        if let Some(least) = resources.ranks_min.filter(|least| !(1..=most).contains(least)) {
            return fail("ranks_min", format!("ranks_min = {least}: use 1 to {most}"));
        }
        if resources.rollouts > 0 && self.rl.is_empty() {
            return fail("rollouts", "rollouts: only jobs with [rl] have ranks that play environments".into());
        }
        if resources.rollouts > RANKS_MAX {
            return fail("rollouts", format!("rollouts = {}: use at most {RANKS_MAX}", resources.rollouts));
        }
        if resources.cpus == 0 {
            return fail("cpus", "cpus = 0: a rank needs at least 1".into());
        }
        let labels = resources.labels.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        if let Err(problem) = check_labels(labels) {
            return fail("resources.labels", problem);
        }
        if self.checkpoint.every == Some(0) {
            return fail("every", "every = 0: use at least 1 step, or leave it out".into());
        }
        if self.checkpoint.keep == 0 {
            return fail("keep", "keep = 0: the newest checkpoint is always kept, use at least 1".into());
        }
        if self.checkpoint.keep > KEEP_MAX {
            return fail("keep", format!("keep = {}: use at most {KEEP_MAX}", self.checkpoint.keep));
        }
        for (key, uri) in [("to", &self.checkpoint.to), ("resume", &self.checkpoint.resume)] {
            if let Some(uri) = uri
                && let Err(problem) = check_uri(uri)
            {
                return fail(key, format!("{key} = {uri:?}: {problem}"));
            }
        }
        if let Some(Serve { cache, .. }) = &self.serve
            && let Some(memory) = resources.memory
            && cache.0 >= memory.0
        {
            return fail(
                "cache",
                format!("cache = \"{cache}\" of memory = \"{memory}\": a rank needs some for the model too"),
            );
        }
        if self.restart.attempts == 0 {
            return fail("attempts", "attempts = 0: use at least 1".into());
        }
        Ok(())
    }

    fn check_trainer(&self) -> Result<(), (&'static str, String)> {
        if let Some(program) = &self.program {
            program.check().map_err(|problem| ("program", problem))?;
            let trainer = &self.trainer;
            let mend = || format!("trainer = {trainer:?}: name it as the program does, for example \"prose\"");
            return if is_name(trainer) { Ok(()) } else { Err(("trainer", mend())) };
        }
        match is_name(&self.trainer) {
            true => Ok(()),
            false if self.trainer.is_empty() => {
                Err(("trainer", "missing field `trainer`: name a built-in one, for example \"domains\"".into()))
            }
            false => {
                let trainer = &self.trainer;
                Err(("trainer", format!("trainer = {trainer:?}: name a built-in trainer, for example \"domains\"")))
            }
        }
    }

    /// What is for trainers only has no meaning in a job with this section.
    fn check_is_no_trainer(&self, section: &str) -> Result<(), (&'static str, String)> {
        let sections = [
            ("data", self.data.is_empty()),
            ("model", self.model.is_empty()),
            ("optimizer", self.optimizer.is_empty()),
            ("schedule", self.schedule.is_empty()),
            ("rl", self.rl.is_empty()),
            ("checkpoint", self.checkpoint == Checkpoint::default()),
            ("trainer", self.trainer.is_empty()),
            ("program", self.program.is_none()),
        ];
        match sections.iter().find(|(_, is_empty)| !is_empty) {
            Some((key, _)) => Err((key, format!("{key} is for jobs that train: a job with [{section}] has none"))),
            None => Ok(()),
        }
    }
}

/// Whether checkpoints can be kept there, and if not, the mend. Taken literally: `%41` is three characters of a name, because people paste paths
/// and nobody encodes them.
pub fn check_uri(uri: &str) -> Result<(), &'static str> {
    if uri.len() > URI_BYTES_MAX || !is_plain(uri) {
        return Err("use up to 4096 bytes without control characters");
    }
    let bucket = ["s3://", "az://", "gs://"].iter().find_map(|scheme| uri.strip_prefix(scheme));
    let path = match (uri.strip_prefix("file:///"), bucket) {
        (Some(path), _) => path.trim_end_matches('/'),
        (None, Some(rest)) => {
            let (bucket, path) = rest.trim_end_matches('/').split_once('/').unwrap_or((rest.trim_end_matches('/'), ""));
            // No user, password or port: credentials never stand in a spec.
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
            if bucket.is_empty() || !bucket.bytes().all(allowed) {
                return Err(
                    "name a bucket or container, then a folder, and nothing else, like \"s3://bucket/checkpoints\"",
                );
            }
            if path.is_empty() {
                return Ok(());
            }
            path
        }
        (None, None) => {
            return Err(
                "use an absolute URI like \"file:///var/lib/stoke/checkpoints\" or \"s3://bucket/checkpoints\"",
            );
        }
    };
    let part = |part: &str| matches!(part, "" | "." | "..");
    if path.split('/').any(part) {
        return Err("write the path out, without \"..\", \".\" and empty parts");
    }
    Ok(())
}

fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=NAME_CHARS_MAX).contains(&name.len()) && name.chars().all(allowed) && !name.starts_with('.')
}

/// The line of `key = ...` or `[key]`. Good enough to point at: keys are unique in this format but for those of the opaque sections.
fn line_of_key(text: &str, key: &str) -> Option<usize> {
    text.lines()
        .position(|line| {
            let line = line.trim_start();
            let rest = line.strip_prefix(key).map(str::trim_start);
            let table = |section: &str| line.starts_with(&format!("[{section}{key}]"));
            rest.is_some_and(|rest| rest.starts_with('=')) || table("") || table("exec.")
        })
        .map(|line| line + 1)
}

impl SpecError {
    fn whole(message: String) -> Self {
        Self { line: None, message }
    }

    fn from_toml(text: &str, error: &toml::de::Error) -> Self {
        let line = error.span().map(|Range { start, .. }| 1 + text[..start.min(text.len())].matches('\n').count());
        Self { line, message: plain_toml(error.message()) }
    }
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

const UNITS: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

impl std::str::FromStr for Bytes {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let (digits, unit) = UNITS
            .iter()
            .find_map(|(suffix, unit)| text.strip_suffix(suffix).map(|digits| (digits, *unit)))
            .unwrap_or((text, 1));
        let count: u64 =
            digits.trim().parse().map_err(|_| format!("{text:?} is not a size: write for example \"512MiB\""))?;
        count.checked_mul(unit).map(Self).ok_or_else(|| format!("{text:?} is larger than any machine"))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS[..4].iter().rev().find(|(_, unit)| self.0 >= *unit && self.0.is_multiple_of(*unit));
        match unit {
            Some((suffix, unit)) => write!(f, "{}{suffix}", self.0 / unit),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a size: write for example \"512MiB\"")]
        enum Written {
            Count(u64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Count(count) => Ok(Self(count)),
            Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str =
        "name = \"d\"\ntrainer = \"domains\"\n[train]\nepochs = 2\nbatch = 256\n[resources]\nmemory = \"512MiB\"\n";

    fn error(text: &str) -> SpecError {
        JobSpec::parse(text).expect_err("spec must be refused")
    }

    #[test]
    fn defaults_are_filled_and_the_canonical_text_parses_to_the_same_spec() {
        let spec = JobSpec::parse(GOOD).unwrap();
        assert_eq!((spec.training().lanes, spec.resources.cpus, spec.resources.memory()), (8, 1, Bytes(512 << 20)));
        assert_eq!(JobSpec::parse(&spec.to_toml()).unwrap(), spec);
    }

    #[test]
    fn errors_name_the_line_and_the_key() {
        let unknown = error(&GOOD.replace("epochs", "epoch"));
        assert_eq!(unknown.line, Some(4));
        assert!(unknown.message.contains("epoch"), "{unknown}");
        let wrong_type = error(&GOOD.replace("256", "\"many\""));
        assert_eq!(wrong_type.line, Some(5));
        assert_eq!(wrong_type.message, "invalid type: string \"many\", expected a whole number from 0 to 4294967295");
        let uneven = error(&GOOD.replace("256", "250"));
        assert_eq!(uneven.line, Some(5));
        assert!(uneven.message.contains("multiple of 8"), "{uneven}");
        let crowded = error(&GOOD.replace("[resources]", "[resources]\nranks = 9"));
        assert_eq!(crowded.line, Some(7));
        assert!(error(&GOOD.replace("512MiB", "lots")).message.contains("512MiB"));
    }

    #[test]
    fn local_steps_and_the_wire_are_checked() {
        let with = |section: &str| GOOD.replace("[resources]", &format!("{section}\n[resources]"));
        let spec = JobSpec::parse(&with("wire = \"bf16\"\n[train.diloco]\nlocal_steps = 20")).unwrap();
        let diloco = Diloco { local_steps: 20, outer_lr: 0.7, outer_momentum: 0.9 };
        assert_eq!((spec.training().diloco, spec.training().wire), (Some(diloco), Wire::Bf16));
        assert_eq!(spec.training().samples_a_step(), 20 * 256);
        assert_eq!(JobSpec::parse(&spec.to_toml()).unwrap(), spec);
        for (section, line, words) in [
            ("wire = \"int8\"", 6, "bf16"),
            ("[train.diloco]\nouter_lr = 0.7", 6, "local_steps"),
            ("[train.diloco]\nlocal_steps = 0", 7, "use 1 to 10000"),
            ("[train.diloco]\nlocal_steps = 20000", 7, "use 1 to 10000"),
            ("[train.diloco]\nlocal_steps = 2\nouter_lr = 0", 8, "positive"),
            ("[train.diloco]\nlocal_steps = 2\nouter_lr = nan", 8, "positive"),
            ("[train.diloco]\nlocal_steps = 2\nouter_momentum = 0.99999999", 8, "below 1"),
            ("[train.diloco]\nlocal_steps = 2\nouter = 1", 8, "outer"),
        ] {
            let refused = error(&with(section));
            assert_eq!(refused.line, Some(line), "{refused}");
            assert!(refused.message.contains(words), "{refused}");
        }
        let many = error(&with("[train.diloco]\nlocal_steps = 10000").replace("256\n", "25600\n"));
        assert!(many.message.contains("at most 16777216 samples"), "{many}");
        let policy = "name = \"p\"\n[rl]\nenv = \"CartPole-v1\"\n[train.diloco]\nlocal_steps = 2\n";
        assert!(error(policy).message.contains("no local steps"));
    }

    #[test]
    fn what_ranks_keep_a_part_of_is_checked() {
        let with = |key: &str| GOOD.replace("[resources]", &format!("{key}\n[resources]"));
        assert_eq!(JobSpec::parse(GOOD).unwrap().training().sharding, Sharding::None);
        assert!(!JobSpec::parse(GOOD).unwrap().to_toml().contains("sharding"));
        let spec = JobSpec::parse(&with("sharding = \"zero1\"")).unwrap();
        assert_eq!(spec.training().sharding, Sharding::Zero1);
        assert_eq!(JobSpec::parse(&spec.to_toml()).unwrap(), spec);
        let refused = error(&with("sharding = \"zero3\""));
        assert!(refused.line == Some(6) && refused.message.contains("zero1"), "{refused}");
        let policy = "name = \"p\"\n[rl]\nenv = \"CartPole-v1\"\n[train]\nsharding = \"zero1\"\n";
        assert!(error(policy).message.contains("leave it out"));
    }

    #[test]
    fn what_lanes_compute_in_is_checked() {
        let with = |key: &str| GOOD.replace("[resources]", &format!("{key}\n[resources]"));
        assert_eq!(JobSpec::parse(GOOD).unwrap().training().precision, Floats::F32);
        let spec = JobSpec::parse(&with("precision = \"bf16\"")).unwrap();
        assert_eq!(spec.training().precision, Floats::Bf16);
        assert_eq!(JobSpec::parse(&spec.to_toml()).unwrap(), spec);
        let refused = error(&with("precision = \"f16\""));
        assert_eq!(refused.line, Some(6));
        assert!(refused.message.contains("f32") && refused.message.contains("bf16"), "{refused}");
        let policy = "name = \"p\"\n[rl]\nenv = \"CartPole-v1\"\n[train]\nprecision = \"bf16\"\n";
        let refused = error(policy);
        assert!(refused.line == Some(5) && refused.message.contains("leave it out"), "{refused}");
    }

    #[test]
    fn a_spec_that_grows_over_its_limit_is_refused() {
        let keys: String = (0..3_600).map(|key| format!("a{key}.b=1\n")).collect();
        let text = format!("{GOOD}[model]\n{keys}");
        let written = &text[..text.len().min(SPEC_BYTES_MAX)];
        let refused = error(&written[..written.rfind('\n').unwrap_or(0)]);
        assert!(refused.message.contains("when it is written out"), "{refused}");
    }

    #[test]
    fn what_no_machine_has_or_no_folder_is_called_is_refused() {
        let threads = error(&GOOD.replace("epochs = 2", "epochs = 2\nthreads = 60000"));
        assert!(threads.message.contains("use 1 to 256"), "{threads}");
        for to in [
            "file:///a/../b",
            "file:///a//b",
            "file:///./a",
            "file:///",
            "file://host/a",
            "/a",
            "file:///a\\u001b",
            "s3://",
            "s3:///a",
            "s3://key:secret@bucket/a",
            "s3://bucket//a",
            "az://container/../a",
            "http://bucket/a",
        ] {
            let refused = error(&format!("{GOOD}[checkpoint]\nto = \"{to}\"\n"));
            assert_eq!(refused.line, Some(9), "{refused}");
        }
        let buckets = ["s3://bucket", "s3://my.bucket-1/a b/ä/", "az://container/a", "gs://bucket/a"];
        for to in ["file:///a%41b", "file:///a b/", "file:///ä/b.c"].into_iter().chain(buckets) {
            JobSpec::parse(&format!("{GOOD}[checkpoint]\nto = \"{to}\"\n")).unwrap();
        }
        let label = error(&format!("{GOOD}[resources.labels]\nzone = \"a\\u001b\"\n"));
        assert_eq!(label.line, Some(8), "{label}");
        assert!(error(&GOOD.replace("domains", "no trainer")).message.contains("trainer"));
    }
}
