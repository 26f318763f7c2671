//! Which kinds of inputs, events, effects, messages, faults and mishaps runs have had. The kinds are read from the source of each enum, so that a new
//! variant that no run ever has is missed by name. Owns the count; what is counted is noted where it happens.

use std::collections::BTreeMap;
use std::fmt::{self, Debug, Write};

use super::random::Stream;

/// An enum: how it is called here, how it begins in the source, and the source.
type Kinds = (&'static str, &'static str, &'static str);

const INPUT: &str = "coordinator input";
const KINDS: [Kinds; 14] = [
    (INPUT, "pub enum Input", include_str!("../../../coordinator/src/state/control.rs")),
    ("coordinator event", "pub enum Event", include_str!("../../../coordinator/src/state/event.rs")),
    ("coordinator effect", "pub enum Effect", include_str!("../../../coordinator/src/state/effect.rs")),
    ("agent event", "pub enum Event", include_str!("../../../node/src/agent/state.rs")),
    ("agent effect", "pub enum Effect", include_str!("../../../node/src/agent/state.rs")),
    ("from node", "pub enum FromNode", include_str!("../../../protocol/src/message/node.rs")),
    ("to node", "pub enum ToNode", include_str!("../../../protocol/src/message/node.rs")),
    ("from rank", "pub enum FromRank", include_str!("../../../protocol/src/message/rank.rs")),
    ("rank event", "pub enum RankEvent", include_str!("../../../protocol/src/message/rank.rs")),
    ("to rank", "pub enum ToRank", include_str!("../../../protocol/src/message/rank.rs")),
    ("request", "pub enum Request", include_str!("../../../protocol/src/message/client.rs")),
    ("ask", "pub enum Ask", include_str!("plan.rs")),
    ("fault", "pub enum Fault", include_str!("faults.rs")),
    ("happening", "pub enum Happening", include_str!("world.rs")),
];
const CHANCE: &str = "chance";

/// What no run has, and why.
const NOT_SIMULATED: [(&str, &str, &str); 33] = [
    (INPUT, "RenewNode", "certificates do not end here: the agent's tests"),
    ("coordinator event", "ProbationBegun", "a run is shorter than a quarantine: scenarios/blame.rs"),
    ("coordinator event", "QuarantineLifted", "a run is shorter than a quarantine: scenarios/blame.rs"),
    ("coordinator event", "PaceNoted", "modelled ranks are as fast as each other: stragglers.rs"),
    ("request", "ReleaseNode", "nobody here lifts a quarantine: scenarios/blame.rs"),
    ("agent event", "Inherited", "a modelled agent's ranks end with it: the integration tests of adoption"),
    ("from rank", "Return", "a modelled agent's ranks end with it: the integration tests of adoption"),
    ("to rank", "Settle", "a modelled agent's ranks end with it: the integration tests of adoption"),
    ("to rank", "Adopted", "a modelled agent's ranks end with it: the integration tests of adoption"),
    ("from rank", "Leaving", "the model sees processes end itself"),
    ("rank event", "Differ", "modelled ranks compute nothing that could differ: scenarios/wrong_numbers.rs"),
    ("rank event", "NotFinite", "modelled ranks compute nothing that is not finite: scenarios/wrong_numbers.rs"),
    ("to rank", "Stores", "modelled stores need no credentials: the integration tests of stores"),
    ("coordinator event", "MoveAsked", "nobody here watches how ranks do"),
    (INPUT, "Load", "modelled jobs train: scenarios/scaling.rs"),
    (INPUT, "Demand", "modelled jobs train: scenarios/scaling.rs"),
    ("coordinator event", "Promoted", "modelled jobs train: scenarios/serving.rs"),
    ("coordinator event", "RolledBack", "modelled jobs train: scenarios/serving.rs"),
    ("coordinator event", "LeaveAsked", "modelled jobs train: scenarios/serving.rs"),
    ("coordinator event", "ScaleNoted", "modelled jobs train: scenarios/scaling.rs"),
    ("from node", "Load", "modelled jobs train: scenarios/scaling.rs"),
    ("from node", "Demand", "modelled jobs train: scenarios/scaling.rs"),
    ("from rank", "Load", "modelled jobs train: scenarios/scaling.rs"),
    ("from node", "Timed", "no model collects traces: the integration tests of traces"),
    ("from rank", "Timed", "no model collects traces: the integration tests of traces"),
    ("request", "Promote", "modelled jobs train: scenarios/serving.rs"),
    ("request", "Rollback", "modelled jobs train: scenarios/serving.rs"),
    ("request", "Replicas", "modelled jobs train: scenarios/serving.rs"),
    ("agent effect", "Disconnect", "a coordinator that is behind turns the nodes away before they do"),
    ("agent effect", "Warn", "said of what no coordinator of ours sends"),
    ("from rank", "Alive", "of silence only its end is modelled: the agent's event"),
    ("to rank", "Start", "a modelled process has it from its beginning"),
    ("fault", "Flap", "a connection draws it: the chance link.flap-crash"),
];

/// Counts by enum and variant.
#[derive(Clone, Default, Debug)]
pub struct Coverage(BTreeMap<&'static str, BTreeMap<String, u64>>);

impl Coverage {
    /// Something of an enum has happened: its variant is the first word of its `Debug`.
    pub fn note(&mut self, kinds: &'static str, what: &impl Debug) {
        let mut name = FirstWord::default();
        // It ends with an error after the first word.
        let _ended = write!(name, "{what:?}");
        self.count(kinds, name.as_str(), 1);
    }

    /// Of each chance that a stream gave how often it came true.
    pub fn note_chances(&mut self, stream: &Stream) {
        let concern = stream.name().split('-').next().unwrap_or_default();
        for (site, hits) in stream.hits() {
            self.count(CHANCE, &format!("{concern}.{site}"), hits);
        }
    }

    pub fn add(&mut self, other: &Self) {
        for (kinds, counts) in &other.0 {
            counts.iter().for_each(|(name, count)| self.count(kinds, name, *count));
        }
    }

    fn count(&mut self, kinds: &'static str, name: &str, times: u64) {
        let counts = self.0.entry(kinds).or_default();
        match counts.get_mut(name) {
            Some(count) => *count += times,
            None => drop(counts.insert(name.to_owned(), times)),
        }
    }

    pub fn of(&self, kinds: &str, name: &str) -> u64 {
        self.0.get(kinds).and_then(|counts| counts.get(name)).copied().unwrap_or(0)
    }

    /// What has never happened, and what has although it is said not to be simulated.
    pub fn wrong(&self) -> Vec<String> {
        let excused = |kinds: &str, name: &str| NOT_SIMULATED.iter().any(|(k, n, _)| (*k, *n) == (kinds, name));
        let mut wrong = Vec::new();
        for (kinds, begins, source) in KINDS {
            for name in variants(begins, source) {
                match (self.of(kinds, &name), excused(kinds, &name)) {
                    (0, false) => wrong.push(format!("{kinds} {name} has never happened")),
                    (1.., true) => wrong.push(format!("{kinds} {name} happens: it is excused for nothing")),
                    (0, true) | (1.., false) => {}
                }
            }
        }
        let chances = self.0.get(CHANCE).into_iter().flatten().filter(|(_, hits)| **hits == 0);
        wrong.extend(chances.map(|(name, _)| format!("the chance {name} has never come true")));
        wrong
    }

    /// A line an enum.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for (kinds, counts) in &self.0 {
            let counts: Vec<String> = counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
            writeln!(text, "{kinds}: {}", counts.join(", ")).expect("text grows");
        }
        text
    }
}

/// Names of the variants of an enum, from source as rustfmt leaves it.
fn variants(begins: &str, source: &str) -> Vec<String> {
    let (_, body) = source.split_once(&format!("{begins} {{\n")).unwrap_or_else(|| panic!("{begins} is not there"));
    let mut names = Vec::new();
    for line in body.lines().take_while(|line| !line.starts_with('}')) {
        let inner = line.strip_prefix("    ").unwrap_or_default();
        if inner.starts_with(|first: char| first.is_ascii_uppercase()) {
            names.push(inner.chars().take_while(char::is_ascii_alphanumeric).collect());
        }
    }
    assert!(!names.is_empty(), "{begins} has no variants");
    names
}

/// Takes what is written up to the first character that is not of a name.
#[derive(Default)]
struct FirstWord {
    text: String,
}

impl FirstWord {
    fn as_str(&self) -> &str {
        &self.text
    }
}

impl Write for FirstWord {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = text.find(|other: char| !other.is_ascii_alphanumeric());
        self.text.push_str(&text[..end.unwrap_or(text.len())]);
        if end.is_some() { Err(fmt::Error) } else { Ok(()) }
    }
}
