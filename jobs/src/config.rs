//! Reads this crate's sections of a job spec: `[data] [model] [optimizer] [schedule]`. The others belong to the
//! cluster and are passed over. Every mistake is reported with its key, its line and what to write instead.

use std::path::{Path, PathBuf};

use burn::optim::decay::WeightDecayConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdamConfig, AdamWConfig, SgdConfig};
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use toml::de::{DeTable, DeValue};

use crate::JobError;
use crate::train::optimizer::Rule;

/// The sections that every trainer has. `D` and `M` are the trainer's own `[data]` and `[model]`; derive [`Deserialize`] for them with
/// `deny_unknown_fields`.
#[derive(Debug, Deserialize)]
#[serde(bound = "D: DeserializeOwned, M: DeserializeOwned + Default")]
pub struct Sections<D, M> {
    /// The keys `train` and `held_out` are paths here, where they are texts: `stoke submit` makes them absolute against the spec's folder.
    pub data: D,
    #[serde(default)]
    pub model: M,
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    #[serde(default)]
    pub schedule: ScheduleConfig,
}

/// `[optimizer]`. Keys that do not belong to the named rule are refused. Defaults are PyTorch's.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    name: RuleName,
    weight_decay: Option<f32>,
    #[serde(deserialize_with = "some_pair")]
    betas: Option<[f32; 2]>,
    epsilon: Option<f32>,
    amsgrad: Option<bool>,
    momentum: Option<f64>,
    dampening: Option<f64>,
    nesterov: Option<bool>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RuleName {
    #[default]
    AdamW,
    Adam,
    Sgd,
}

impl OptimizerConfig {
    pub(crate) fn rule(&self) -> Rule {
        let [beta_1, beta_2] = self.betas.unwrap_or([0.9, 0.999]);
        let epsilon = self.epsilon.unwrap_or(1e-8);
        let amsgrad = self.amsgrad.unwrap_or(false);
        let decay = self.weight_decay.filter(|&rate| rate > 0.0).map(WeightDecayConfig::new);
        match self.name {
            RuleName::AdamW => Rule::AdamW(
                AdamWConfig::new()
                    .with_beta_1(beta_1)
                    .with_beta_2(beta_2)
                    .with_epsilon(epsilon)
                    .with_weight_decay(self.weight_decay.unwrap_or(0.01))
                    .with_amsgrad(amsgrad)
                    .build(),
            ),
            RuleName::Adam => Rule::Adam(
                AdamConfig::new()
                    .with_beta_1(beta_1)
                    .with_beta_2(beta_2)
                    .with_epsilon(epsilon)
                    .with_weight_decay(decay)
                    .with_amsgrad(amsgrad)
                    .build(),
            ),
            RuleName::Sgd => {
                let momentum = self.momentum.filter(|&momentum| momentum > 0.0).map(|momentum| {
                    MomentumConfig::new()
                        .with_momentum(momentum)
                        .with_dampening(self.dampening.unwrap_or(0.0))
                        .with_nesterov(self.nesterov.unwrap_or(false))
                });
                Rule::Sgd(SgdConfig::new().with_momentum(momentum).with_weight_decay(decay).build())
            }
        }
    }

    fn check(&self, spec: &Spec<'_>) -> Result<(), JobError> {
        let sgd = self.name == RuleName::Sgd;
        let given = [
            ("betas", self.betas.is_some() && sgd),
            ("epsilon", self.epsilon.is_some() && sgd),
            ("amsgrad", self.amsgrad.is_some() && sgd),
            ("momentum", self.momentum.is_some() && !sgd),
            ("dampening", self.dampening.is_some() && !sgd),
            ("nesterov", self.nesterov.is_some() && !sgd),
        ];
        let in_unit = |value: f64| (0.0..1.0).contains(&value);
        let ranges = [
            ("weight_decay", self.weight_decay.is_none_or(|rate| rate >= 0.0 && rate.is_finite()), "a number from 0"),
            ("betas", self.betas.is_none_or(|b| b.iter().all(|&b| in_unit(b.into()))), "two numbers from 0 to below 1"),
            ("epsilon", self.epsilon.is_none_or(|e| e > 0.0 && e.is_finite()), "a small number above 0"),
            ("momentum", self.momentum.is_none_or(in_unit), "a number from 0 to below 1"),
            ("dampening", self.dampening.is_none_or(in_unit), "a number from 0 to below 1"),
        ];
        if let Some((key, _)) = given.iter().find(|(_, foreign)| *foreign) {
            let problem = format!("{key} is no key of this optimizer");
            return Err(spec.mistake("optimizer", key, &problem, "remove it, or change name"));
        }
        if let Some((key, _, mend)) = ranges.iter().find(|(_, good, _)| !good) {
            return Err(spec.mistake("optimizer", key, &format!("{key} is out of range"), &format!("write {mend}")));
        }
        Ok(())
    }
}

/// `[schedule]`: linear warm-up to `lr`, then `decay` down to `min_lr` at the last step.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    pub(crate) lr: f64,
    pub(crate) warmup_steps: u64,
    pub(crate) decay: Decay,
    pub(crate) min_lr: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Decay {
    Cosine,
    Linear,
    Constant,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        ScheduleConfig { lr: 1e-3, warmup_steps: 0, decay: Decay::Cosine, min_lr: 0.0 }
    }
}

impl ScheduleConfig {
    fn check(&self, spec: &Spec<'_>) -> Result<(), JobError> {
        if !(self.lr > 0.0 && self.lr <= 1.0) {
            return Err(spec.mistake(
                "schedule",
                "lr",
                "lr must be above 0 and at most 1",
                "write a rate such as 1e-3",
            ));
        }
        if !(self.min_lr >= 0.0 && self.min_lr <= self.lr) {
            return Err(spec.mistake("schedule", "min_lr", "min_lr must be from 0 to lr", "lower it, or remove it"));
        }
        Ok(())
    }
}

/// The text of a spec, for errors that point into it.
#[derive(Clone, Copy, Debug)]
pub struct Spec<'a> {
    text: &'a str,
}

impl<'a> Spec<'a> {
    /// Of a whole document.
    pub fn new(text: &'a str) -> Self {
        Spec { text }
    }

    /// The document as it is written; in a rank, as the cluster writes it out.
    pub fn text(&self) -> &'a str {
        self.text
    }

    /// Parses `[data]`, `[model]`, `[optimizer]` and `[schedule]`, and checks the last two. What `D` and `M` hold is the trainer's to check.
    pub fn sections<D, M>(&self) -> Result<Sections<D, M>, JobError>
    where
        D: DeserializeOwned,
        M: DeserializeOwned + Default,
    {
        let sections: Sections<D, M> = toml::from_str(self.text).map_err(|error| self.syntax(&error))?;
        sections.optimizer.check(self)?;
        sections.schedule.check(self)?;
        Ok(sections)
    }

    /// Parses one section of the trainer's own. Errors name the line.
    pub fn section<T: DeserializeOwned>(&self, name: &str) -> Result<T, JobError> {
        let mut table = DeTable::parse(self.text).map_err(|error| self.syntax(&error))?;
        let Some(section) = table.get_mut().remove(name) else {
            return Err(JobError::Config {
                line: 1,
                problem: format!("no [{name}] section"),
                mend: "add it".to_owned(),
            });
        };
        let from = self.line(section.span().start);
        T::deserialize(toml::de::ValueDeserializer::from(section)).map_err(|error| match error.span() {
            Some(_) => self.syntax(&error),
            // What is missing stands nowhere: where the section begins.
            None => self.syntax_at(from, &error),
        })
    }

    /// Sections that are none of `known`, whose last ones are `own`.
    pub(crate) fn refuse_other_sections(&self, known: &[&str], own: &[&str]) -> Result<(), JobError> {
        let table = DeTable::parse(self.text).map_err(|error| self.syntax(&error))?;
        let other = |name: &str, value: &DeValue<'_>| value.is_table() && !known.contains(&name);
        let Some((name, _)) = table.get_ref().iter().find(|(name, value)| other(name.get_ref(), value.get_ref()))
        else {
            return Ok(());
        };
        let own: Vec<String> = own.iter().map(|name| format!("[{name}]")).collect();
        let has = if own.is_empty() { "only".to_owned() } else { format!("{} besides", own.join(", ")) };
        let mend = format!("this trainer has {has} [data], [model], [optimizer] and [schedule]");
        let problem = format!("unknown section [{}]", name.get_ref());
        Err(JobError::Config { line: self.line(name.span().start), problem, mend })
    }

    /// An error at `[section] key`, or at the section where the key is absent. `problem` says what is wrong with it (`heads must divide width`), `mend`
    /// what to write (`write a number such as 4`).
    pub fn mistake(&self, section: &str, key: &str, problem: &str, mend: &str) -> JobError {
        let table = DeTable::parse(self.text).ok();
        let line = table.as_ref().and_then(|table| {
            let (name, value) = table.get_ref().iter().find(|(name, _)| name.get_ref() == section)?;
            let inner = value.get_ref().as_table();
            let key = inner.and_then(|inner| inner.iter().find(|(name, _)| name.get_ref() == key));
            Some(self.line(key.map_or(name.span().start, |(name, _)| name.span().start)))
        });
        JobError::Config { line: line.unwrap_or(1), problem: format!("[{section}] {problem}"), mend: mend.to_owned() }
    }

    pub(crate) fn unknown_trainer(&self, name: &str, known: &[&str]) -> JobError {
        let mend = format!("write one of {}", known.join(", "));
        JobError::Config { line: self.line_of("trainer"), problem: format!("unknown trainer \"{name}\""), mend }
    }

    /// The line of a key of the document itself.
    fn line_of(&self, key: &str) -> usize {
        let table = DeTable::parse(self.text).ok();
        let found = table.as_ref().and_then(|table| table.get_ref().iter().find(|(name, _)| name.get_ref() == key));
        found.map_or(1, |(name, _)| self.line(name.span().start))
    }

    /// Whether the trainer is of a program of the user's own.
    pub(crate) fn has_program(&self) -> bool {
        DeTable::parse(self.text).is_ok_and(|table| table.get_ref().contains_key("program"))
    }

    /// Whose code only the program has.
    pub(crate) fn of_program(&self, trainer: &str) -> JobError {
        let problem =
            format!("trainer \"{trainer}\" is of a program of its own, and only that can compute with its weights");
        let mend = "`stoke checkpoint export` writes them as safetensors, for that program or any other".to_owned();
        JobError::Config { line: self.line_of("program"), problem, mend }
    }

    /// A language model continues texts.
    pub(crate) fn no_labels(&self) -> JobError {
        let problem = "trainer \"language\" continues texts: it has no labels".to_owned();
        let mend = "`stoke checkpoint export` writes a folder that `stoke serve` opens".to_owned();
        JobError::Config { line: self.line_of("trainer"), problem, mend }
    }

    /// A policy is no classifier, and no plain module.
    pub(crate) fn no_classifier(&self) -> JobError {
        let problem = "trainer \"rl\" learns a policy: it classifies nothing".to_owned();
        JobError::Config { line: 1, problem, mend: "`stoke eval JOB` tells what it is worth".to_owned() }
    }

    /// The files that `[data]` names.
    pub(crate) fn data_paths(&self) -> Result<Vec<PathBuf>, JobError> {
        let table = DeTable::parse(self.text).map_err(|error| self.syntax(&error))?;
        let data = table.get_ref().get("data").and_then(|data| data.get_ref().as_table());
        let path = |key: &&str| data?.get(*key)?.get_ref().as_str().map(PathBuf::from);
        Ok(PATHS.iter().filter_map(path).collect())
    }

    /// Whether training goes on from the folder of a model.
    pub(crate) fn is_from_folder(&self) -> bool {
        DeTable::parse(self.text).is_ok_and(|table| path_of_model(table.get_ref()).is_some())
    }

    fn line(&self, byte: usize) -> usize {
        1 + self.text.as_bytes().iter().take(byte).filter(|&&byte| byte == b'\n').count()
    }

    pub(crate) fn syntax(&self, error: &toml::de::Error) -> JobError {
        self.syntax_at(error.span().map_or(1, |span| self.line(span.start)), error)
    }

    fn syntax_at(&self, line: usize, error: &toml::de::Error) -> JobError {
        let message = error.message().lines().next().unwrap_or_default();
        let (problem, mend) = match message.split_once(", expected ") {
            Some((problem, expected)) => (problem.to_owned(), format!("write {}", plain(expected))),
            None if message.starts_with("missing field `data`") => {
                ("no [data] section".to_owned(), "add [data] with train = \"FILE\"".to_owned())
            }
            None if message.starts_with("missing field") => (message.to_owned(), "add the key".to_owned()),
            None => (message.to_owned(), "mend the TOML at this line".to_owned()),
        };
        JobError::Config { line, problem, mend }
    }
}

/// Two values and no more: of a longer list serde takes the first two without a word.
pub(crate) fn pair<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<[T; 2], D::Error> {
    let values = Vec::<T>::deserialize(deserializer)?;
    <[T; 2]>::try_from(values).map_err(|values| D::Error::invalid_length(values.len(), &"an array of length 2"))
}

fn some_pair<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<[f32; 2]>, D::Error> {
    pair(deserializer).map(Some)
}

/// What serde expects, for people who do not write Rust.
fn plain(expected: &str) -> &str {
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number",
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "a map" => "a section",
        other if other.starts_with("struct ") => "a section",
        other => other,
    }
}

/// The keys of `[data]` that hold paths.
const PATHS: [&str; 2] = ["train", "held_out"];

/// `[model] from` of the trainer `language`.
fn path_of_model<'a>(document: &'a DeTable<'_>) -> Option<&'a toml::Spanned<DeValue<'a>>> {
    document.get("trainer").filter(|trainer| trainer.get_ref().as_str() == Some("language"))?;
    document.get("model")?.get_ref().as_table()?.get("from").filter(|_| !document.contains_key("program"))
}

/// `[rl]`: the folders of modules, and the interpreter where it is no bare name.
fn paths_of_rl<'a>(document: &'a DeTable<'_>) -> Vec<&'a toml::Spanned<DeValue<'a>>> {
    let rl = document.get("rl").and_then(|rl| rl.get_ref().as_table());
    let Some(rl) = rl else { return Vec::new() };
    let folders = rl.get("folders").and_then(|folders| folders.get_ref().as_array());
    let python = rl.get("python").filter(|python| python.get_ref().as_str().is_some_and(|name| name.contains('/')));
    folders.into_iter().flatten().chain(python).collect()
}

/// The spec with the paths of `[data]`, `[model]` and `[rl]` made absolute against `base` (the spec's folder), and with the hash of what the folder of a model says
/// of it; the rest stays as it is written.
pub fn absolute_paths(config_toml: &str, base: &Path) -> Result<String, JobError> {
    let spec = Spec::new(config_toml);
    let table = DeTable::parse(config_toml).map_err(|error| spec.syntax(&error))?;
    let mut edits = Vec::new();
    if let Some(DeValue::Table(data)) = table.get_ref().get("data").map(toml::Spanned::get_ref) {
        for (key, value) in data.iter().filter(|(key, _)| PATHS.contains(&key.get_ref().as_ref())) {
            let DeValue::String(path) = value.get_ref() else { continue };
            // A place in an object store is the same everywhere.
            if path.contains("://") {
                continue;
            }
            let absolute = base.join(path.as_ref());
            let Some(absolute) = absolute.to_str() else {
                return Err(spec.mistake("data", key.get_ref(), "the path is not UTF-8", "move the file or the spec"));
            };
            edits.push((value.span(), toml::Value::String(absolute.to_owned()).to_string()));
        }
    }
    for value in paths_of_rl(table.get_ref()) {
        let DeValue::String(path) = value.get_ref() else { continue };
        let Some(absolute) = base.join(path.as_ref()).to_str().map(str::to_owned) else {
            return Err(spec.mistake("rl", "folders", "the path is not UTF-8", "move the folder or the spec"));
        };
        edits.push((value.span(), toml::Value::String(absolute).to_string()));
    }
    if let Some(value) = path_of_model(table.get_ref())
        && let DeValue::String(path) = value.get_ref()
    {
        let Some(absolute) = base.join(path.as_ref()).to_str().map(str::to_owned) else {
            return Err(spec.mistake("model", "from", "the path is not UTF-8", "move the folder or the spec"));
        };
        let mut written = toml::Value::String(absolute.clone()).to_string();
        // What the folder says is part of the job, where there is a line for it and the folder is here.
        let is_last = config_toml[value.span().end..].lines().next().is_none_or(|rest| {
            let rest = rest.trim_start();
            rest.is_empty() || rest.starts_with('#')
        });
        let known = table.get_ref().get("model").and_then(|model| model.get_ref().as_table());
        let is_known = known.is_some_and(|model| model.contains_key("from_blake3"));
        if is_last && !is_known && Path::new(&absolute).is_dir() {
            let digest = crate::train::files_blake3(Path::new(&absolute))?;
            written = format!("{written}\nfrom_blake3 = \"{digest}\"");
        }
        edits.push((value.span(), written));
    }
    let mut text = config_toml.to_owned();
    edits.sort_by_key(|(span, _)| std::cmp::Reverse(span.start));
    for (span, path) in edits {
        text.replace_range(span, &path);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Data {
        #[allow(dead_code)]
        train: String,
    }

    #[derive(Debug, Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Model {
        #[allow(dead_code)]
        hidden: usize,
    }

    fn error(text: &str) -> String {
        Spec::new(text).sections::<Data, Model>().expect_err("the spec is wrong").to_string()
    }

    #[test]
    fn mistakes_name_key_line_and_mend() {
        let rest = "[data]\ntrain = 'x.csv'\n";
        assert_eq!(
            error(&format!("{rest}[schedule]\nlrr = 1")),
            "line 4: unknown field `lrr` (write one of `lr`, `warmup_steps`, `decay`, `min_lr`)"
        );
        assert_eq!(
            error(&format!("{rest}[schedule]\nlr = 2.0")),
            "line 4: [schedule] lr must be above 0 and at most 1 (write a rate such as 1e-3)"
        );
        assert_eq!(
            error(&format!("{rest}[model]\nhidden = 'x'")),
            "line 4: invalid type: string \"x\" (write a whole number)"
        );
        assert_eq!(
            error(&format!("{rest}[optimizer]\nname = 'adamx'")),
            "line 4: unknown variant `adamx` (write one of `adamw`, `adam`, `sgd`)"
        );
        assert_eq!(
            error(&format!("{rest}[optimizer]\nname = 'sgd'\nmomentum = 2.0")),
            "line 5: [optimizer] momentum is out of range (write a number from 0 to below 1)"
        );
        assert_eq!(
            error(&format!("{rest}[optimizer]\nmomentum = 0.9")),
            "line 4: [optimizer] momentum is no key of this optimizer (remove it, or change name)"
        );
        assert_eq!(error("name = 'x'"), "line 1: no [data] section (add [data] with train = \"FILE\")");
        assert!(error("[data\n").starts_with("line 1: "));
    }

    #[test]
    fn paths_become_absolute_and_nothing_else_changes() {
        let text = "# a comment\nname = \"d\"\n[data]\ntrain = \"../data/a.csv\" # here\nheld_out = 0.2\n";
        let absolute = absolute_paths(text, Path::new("/jobs/specs")).expect("a good spec");
        assert_eq!(absolute, text.replace("../data/a.csv", "/jobs/specs/../data/a.csv"));
        assert_eq!(absolute_paths(&absolute, Path::new("/elsewhere")).expect("a good spec"), absolute);
        let text = "trainer = \"language\"\n[model]\nfrom = \"m\"\n[data]\ntrain = \"d\"\n";
        let absolute = absolute_paths(text, Path::new("/jobs")).expect("a good spec");
        assert_eq!(absolute, text.replace("\"m\"", "\"/jobs/m\"").replace("\"d\"", "\"/jobs/d\""));
        let other = text.replace("language", "other");
        assert!(absolute_paths(&other, Path::new("/jobs")).expect("a good spec").contains("from = \"m\""));
    }
}
