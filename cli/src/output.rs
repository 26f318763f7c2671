//! What people read: aligned tables, sizes, ages. Owns standard output; never decides what is said.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::failure::{Exit, Failure, OrFail};

/// Writes to stdout. A reader that has gone away (`| head`) ends the process quietly, as for any Unix tool.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.or_fail(Exit::Negative, "write to standard output"),
    }
}

/// A line to stderr. Nobody may be reading it any more (`2>&1 | head`): that is no reason to lose what the command is doing.
pub fn say(line: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// One document of a command that answers once.
pub fn print_json(document: &Value) -> Result<(), Failure> {
    print(&format!("{document:#}\n"))
}

/// One line of a command that streams.
pub fn print_json_line(document: &Value) -> Result<(), Failure> {
    print(&format!("{document}\n"))
}

/// Rows under headings, columns aligned, two spaces apart, nothing after the last.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|heading| (*heading).to_owned()).collect()] }
    }

    /// Rows without headings: names and what they stand for.
    pub fn bare() -> Self {
        Self { rows: Vec::new() }
    }

    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    /// A row of a table whose columns are known only when it is made.
    pub fn cells(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:<width$}  "));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// `1536` is `1.5 KiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let power = (0..UNITS.len() - 1).take_while(|power| count >> (10 * (power + 1)) > 0).count();
    if power == 0 {
        return format!("{count} B");
    }
    format!("{:.1} {}", count as f64 / (1u64 << (10 * power)) as f64, UNITS[power])
}

/// `1 rank`, `2 ranks`.
pub fn count(number: impl Into<u64>, noun: &str) -> String {
    let number = number.into();
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", grouped(number))
}

/// A word that a shell reads as it is.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:=+,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// How this program was called, for commands that people copy: after `cargo run` it is on no path.
pub fn program() -> String {
    quoted(&std::env::args().next().unwrap_or_else(|| "stoke".to_owned()))
}

/// `1234567` is `1,234,567`.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `95_000` ms is `1m35s`; the two largest units are enough to read.
pub fn duration_ms(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..60 if ms < 10_000 => format!("{}.{}s", seconds, ms % 1000 / 100),
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// Age of a moment of the coordinator's clock, by ours; never negative.
pub fn age(since_ms: u64) -> String {
    duration_ms(now_ms().saturating_sub(since_ms))
}

pub fn now_ms() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}

/// A moment as `2026-11-22T17:04:05Z`.
pub fn moment(ms: u64) -> String {
    i64::try_from(ms / 1000)
        .ok()
        .and_then(|seconds| time::OffsetDateTime::from_unix_timestamp(seconds).ok())
        .and_then(|moment| moment.format(&time::format_description::well_known::Rfc3339).ok())
        .unwrap_or_else(|| format!("{ms} ms"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_and_leave_no_trailing_space() {
        let mut table = Table::new(&["JOB", "STATE"]);
        table.row(["job-1".into(), "running".into()]);
        table.row(["job-12".into(), String::new()]);
        assert_eq!(table.render(), "JOB     STATE\njob-1   running\njob-12\n");
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!((bytes(0), bytes(1023), bytes(1536)), ("0 B".into(), "1023 B".into(), "1.5 KiB".into()));
        assert_eq!(bytes(3 << 30), "3.0 GiB");
        assert_eq!((grouped(7), grouped(1_234_567)), ("7".into(), "1,234,567".into()));
        assert_eq!((duration_ms(4_250), duration_ms(95_000)), ("4.2s".into(), "1m35s".into()));
        assert_eq!((duration_ms(3_700_000), duration_ms(90_000_000)), ("1h01m".into(), "1d01h".into()));
        assert_eq!((count(1u32, "rank"), count(2u32, "rank")), ("1 rank".into(), "2 ranks".into()));
        assert_eq!((quoted("/a/b-1.x"), quoted("a b's")), ("/a/b-1.x".into(), r"'a b'\''s'".into()));
        assert_eq!(moment(0), "1970-01-01T00:00:00Z");
    }
}
