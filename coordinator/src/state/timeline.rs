//! What has happened to a job, as lines for people. Bounded: the first lines and the newest are kept, the middle is dropped and counted.
//! Decides nothing, and is read by nothing but `explain`.

use serde::{Deserialize, Serialize};
use stoke_protocol::ids::LogIndex;
use stoke_protocol::message::client::TimelineEvent;

use super::time::Time;

/// Lines a job keeps: more would let a job that restarts often fill the snapshot.
const LINES_MAX: usize = 128;
/// Of these, so many from the beginning: how it was submitted and placed first.
const LINES_FIRST: usize = 16;

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
        if self.lines.len() >= LINES_MAX {
            self.lines.remove(LINES_FIRST);
            self.dropped += 1;
        }
        self.lines.push(Line { at, index, text: text.into() });
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

#[cfg(test)]
mod tests {
    use super::*;

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
