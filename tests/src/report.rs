//! What benches measure, as rows that the bench `suite` collects. Owns the file between them, and what a spread is; measures nothing.

use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Names the file that rows are added to; without it a bench only prints.
pub const FILE: &str = "STOKE_BENCH_REPORT";

/// One figure, with its peer's from the same run.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct Row {
    pub what: String,
    pub unit: String,
    pub ours: Figure,
    /// Who it is, and what it reached.
    pub peer: Option<(String, Figure)>,
    /// The goal for ours over the peer's, or for ours alone where there is no peer, where there is one.
    pub goal: Option<Goal>,
}

/// A median, and how far the middle half of the measurements lies apart, as a share of it; none of a single one.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq)]
pub struct Figure {
    pub median: f64,
    pub spread: Option<f64>,
}

#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Figure {
    pub fn of(values: &[f64]) -> Self {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        let at =
            |part: f64| values.get(((values.len() as f64 - 1.0) * part).round() as usize).copied().unwrap_or(f64::NAN);
        Self { median: at(0.5), spread: (values.len() > 1).then(|| (at(0.75) - at(0.25)) / at(0.5)) }
    }
}

impl Goal {
    pub fn holds(self, figure: f64) -> bool {
        match self {
            Self::AtLeast(least) => figure >= least,
            Self::AtMost(most) => figure <= most,
        }
    }
}

impl Row {
    pub fn new(what: impl Into<String>, unit: &str, ours: &[f64]) -> Self {
        Self { what: what.into(), unit: unit.to_owned(), ours: Figure::of(ours), peer: None, goal: None }
    }

    /// Nothing where the peer was not measured.
    pub fn beside(mut self, peer: &str, theirs: &[f64]) -> Self {
        self.peer = (!theirs.is_empty()).then(|| (peer.to_owned(), Figure::of(theirs)));
        self
    }

    pub fn goal(mut self, goal: Goal) -> Self {
        self.goal = Some(goal);
        self
    }

    /// Ours over the peer's.
    pub fn ratio(&self) -> Option<f64> {
        self.peer.as_ref().map(|(_, theirs)| self.ours.median / theirs.median)
    }

    /// Adds it to the suite's file, where there is one.
    pub fn report(self) {
        let Some(path) = std::env::var_os(FILE) else { return };
        let line = serde_json::to_string(&self).expect("JSON") + "\n";
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        file.and_then(|mut file| file.write_all(line.as_bytes())).expect("the suite's file is written");
    }
}

/// All rows of the file.
pub fn rows(path: &Path) -> Vec<Row> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).expect("a row of a bench")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_of_the_middle_half() {
        let figure = Figure::of(&[5.0, 1.0, 2.0, 3.0, 100.0]);
        assert_eq!(figure, Figure { median: 3.0, spread: Some(1.0) });
        assert_eq!(Figure::of(&[3.0]), Figure { median: 3.0, spread: None });
        let row = Row::new("a", "ms", &[2.0]).beside("b", &[8.0]).goal(Goal::AtMost(0.25));
        assert_eq!((row.ratio(), row.goal.is_some_and(|goal| goal.holds(0.25))), (Some(0.25), true));
        assert!(Row::new("a", "ms", &[2.0]).beside("b", &[]).peer.is_none());
    }
}
