//! What has happened to a job, as lines for people. Bounded: the first lines and the newest are kept, the middle is dropped and counted; and of
//! checkpoints that go alike one after the other only the newest is told, with their number: there is no end of them.
//! Decides nothing, and is read by nothing but `explain`.

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::LogIndex;
use stoke_protocol::message::client::TimelineEvent;

use super::time::Time;

/// Lines a job keeps: more would let a job that restarts often fill the snapshot.
const LINES_MAX: usize = 128;
/// Of these, so many from the beginning: how it was submitted and placed first.
const LINES_FIRST: usize = 16;

/// Behind the text of a line that stands for others too.
const IN_A_ROW: &str = " in a row)";

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Timeline {
    lines: Vec<Line>,
    dropped: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Line {
    at: Time,
    index: LogIndex,
    text: String,
}

impl Timeline {
    pub fn add(&mut self, at: Time, index: LogIndex, text: impl Into<String>) {
        let text = text.into();
        if let Some(last) = self.lines.last_mut().filter(|last| Fate::of(&text).is_some_and(|fate| last.is_of(fate))) {
            let times = last.times() + 1;
            *last = Line { at, index, text: format!("{text} ({times}{IN_A_ROW}") };
            return;
        }
        if self.lines.len() >= LINES_MAX {
            self.lines.remove(LINES_FIRST);
            self.dropped += 1;
        }
        self.lines.push(Line { at, index, text });
    }

    /// Lines of one entry, oldest first: they are the newest where it is the newest entry.
    pub(super) fn of(&self, index: LogIndex) -> impl Iterator<Item = &str> {
        let first = self.lines.iter().rposition(|line| line.index != index).map_or(0, |before| before + 1);
        self.lines[first..].iter().map(|line| line.text.as_str())
    }

    /// Oldest first; a line of its own tells how many were dropped.
    pub fn lines(&self) -> Vec<TimelineEvent> {
        let mut lines: Vec<TimelineEvent> = self
            .lines
            .iter()
            .map(|line| TimelineEvent { at_ms: line.at.0, index: line.index, text: line.text.clone() })
            .collect();
        if self.dropped > 0 {
            let before = lines[LINES_FIRST].clone();
            let text = format!("({} earlier lines were dropped)", self.dropped);
            lines.insert(LINES_FIRST, TimelineEvent { text, ..before });
        }
        lines
    }
}

/// What became of a checkpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Committed,
    NotStored,
}

impl Fate {
    /// By the words of `commits.rs` and `reports.rs`.
    fn of(text: &str) -> Option<Self> {
        let (_step, rest) = text.strip_prefix("checkpoint at ")?.split_once(' ')?;
        if rest.starts_with("committed") {
            Some(Self::Committed)
        } else if rest.starts_with("was not written") || rest.starts_with("not taken") {
            Some(Self::NotStored)
        } else {
            None
        }
    }
}

impl Line {
    fn is_of(&self, fate: Fate) -> bool {
        Fate::of(&self.text) == Some(fate)
    }

    /// How many it stands for.
    fn times(&self) -> u64 {
        let counted = self.text.strip_suffix(IN_A_ROW).and_then(|text| text.rsplit_once(" ("));
        counted.and_then(|(_, times)| times.parse().ok()).unwrap_or(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Found on a full disk: a line a rank and checkpoint had pushed out why the generations before had ended.
    #[test]
    fn checkpoints_that_go_alike_in_a_row_are_one_line() {
        let mut timeline = Timeline::default();
        let mut index = 0;
        let mut add = |text: &str| {
            index += 1;
            timeline.add(Time(index), LogIndex(index), text);
        };
        add("g1 goes on at step-0");
        (1..=12).for_each(|step| add(&format!("checkpoint at step-{step} committed")));
        for step in 13..1_000 {
            add(&format!("checkpoint at step-{step} was not written by rank-0: no space"));
            add(&format!("checkpoint at step-{step} was not written by rank-1: no space left"));
        }
        add("checkpoint at step-1000 not taken: its shards were not all stored");
        add("g1 ended: rank-1 was killed");
        add("checkpoint at step-1001 committed");
        add("checkpoint at step-1001 pinned by ada");
        add("checkpoint at step-1002 committed");
        let texts: Vec<String> = timeline.lines().into_iter().map(|line| line.text).collect();
        assert_eq!(
            texts,
            [
                "g1 goes on at step-0",
                "checkpoint at step-12 committed (12 in a row)",
                "checkpoint at step-1000 not taken: its shards were not all stored (1975 in a row)",
                "g1 ended: rank-1 was killed",
                "checkpoint at step-1001 committed",
                "checkpoint at step-1001 pinned by ada",
                "checkpoint at step-1002 committed",
            ]
        );
        assert_eq!(timeline.lines()[1].at_ms, 13);
    }

    #[test]
    fn a_long_timeline_keeps_its_beginning_and_its_end() {
        let mut timeline = Timeline::default();
        for number in 0..500 {
            timeline.add(Time(number), LogIndex(number), format!("line {number}"));
        }
        let lines = timeline.lines();
        assert_eq!(lines.len(), LINES_MAX + 1);
        assert_eq!(lines[0].text, "line 0");
        assert_eq!(lines[LINES_FIRST].text, "(372 earlier lines were dropped)");
        assert_eq!(lines.last().unwrap().text, "line 499");
    }
}
