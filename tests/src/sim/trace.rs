//! A run as a file that people can read: the plan, and those choices that are not the least that may happen. Unlike a seed it stays the same run
//! when other things are drawn in other places. Owns the format; runs nothing.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::plan::Plan;
use super::planted::Planted;
use super::random::{Choices, Source};
use super::run::Setting;

/// A run, and what it shows.
#[derive(Clone, PartialEq, Debug)]
pub struct Trace {
    /// The broken defence that it needs; none when it showed a bug that has been mended.
    pub planted: Planted,
    /// What does not hold, as `Violation::name` tells it.
    pub breaks: String,
    pub plan: Plan,
    pub choices: Choices,
}

/// Millisecond, the how manieth draw in it, and what it gave.
type Drawn = (u64, u64, u64);

#[derive(Serialize, Deserialize)]
struct File {
    #[serde(default)]
    planted: Option<String>,
    breaks: String,
    #[serde(flatten)]
    plan: Plan,
    /// By stream and site.
    #[serde(default)]
    choices: BTreeMap<String, BTreeMap<String, Vec<Drawn>>>,
}

impl Trace {
    pub fn read(text: &str) -> Result<Self, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        let planted = match file.planted {
            None => Planted::Nothing,
            Some(name) => Planted::named(&name).ok_or_else(|| format!("there is no planted bug {name:?}"))?,
        };
        let sites = |sites: BTreeMap<String, Vec<Drawn>>| {
            sites
                .into_iter()
                .map(|(site, drawn)| (site, drawn.into_iter().map(|(ms, nth, value)| ((ms, nth), value)).collect()))
                .collect()
        };
        let choices = file.choices.into_iter().map(|(stream, found)| (stream, sites(found))).collect();
        Ok(Self { planted, breaks: file.breaks, plan: file.plan, choices })
    }

    /// One line an event; `words` go above it.
    pub fn write(&self, words: &str) -> String {
        let choices = self.choices.iter().map(|(stream, sites)| {
            let sites = sites.iter().map(|(site, drawn)| {
                (site.clone(), drawn.iter().map(|((ms, nth), value)| (*ms, *nth, *value)).collect())
            });
            (stream.clone(), sites.collect())
        });
        let planted = (self.planted != Planted::Nothing).then(|| self.planted.name());
        let (breaks, plan) = (self.breaks.clone(), self.plan.clone());
        let file = File { planted, breaks, plan, choices: choices.collect() };
        let table = toml::Table::try_from(&file).expect("a trace is TOML");
        let mut text = String::new();
        words.lines().for_each(|line| writeln!(text, "# {line}").expect("text grows"));
        let mut streams = toml::Table::new();
        for (name, value) in table {
            match value {
                toml::Value::Array(items) => {
                    let lines: String = items.iter().map(|item| format!("    {item},\n")).collect();
                    writeln!(text, "{name} = [\n{lines}]").expect("text grows");
                }
                toml::Value::Table(found) if name == "choices" => streams = found,
                toml::Value::Table(mut rates) => {
                    rates.retain(|_, rate| rate.as_float() != Some(0.0));
                    writeln!(text, "{name} = {}", toml::Value::Table(rates)).expect("text grows");
                }
                value => writeln!(text, "{name} = {value}").expect("text grows"),
            }
        }
        for (stream, sites) in streams {
            writeln!(text, "\n[choices.{stream}]").expect("text grows");
            for (site, drawn) in sites.as_table().expect("made above") {
                writeln!(text, "{site} = {drawn}").expect("text grows");
            }
        }
        text
    }

    /// To be run with its planted bug.
    pub fn setting(&self) -> Setting {
        let source = Source::Written(self.choices.clone());
        Setting { plan: self.plan.clone(), source, planted: self.planted, story: 0 }
    }

    /// Everything that is in it, counted: shrinking makes it less.
    pub fn size(&self) -> usize {
        size(&self.plan, &self.choices)
    }
}

pub fn size(plan: &Plan, choices: &Choices) -> usize {
    let choices: usize = choices.values().flat_map(|sites| sites.values().map(BTreeMap::len)).sum();
    plan.machines.len() + plan.asks.len() + plan.faults.len() + choices
}
