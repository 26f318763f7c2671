//! The schedule of faults as a person writes it. Owns the grammar and its errors; draws nothing and touches no process.
//!
//! ```text
//! schedule = item { ("," | ";") item }
//! item     = fault ( "every" | "at" ) duration [ "for" duration ]
//! duration = number ( "ms" | "s" | "m" | "h" )
//! ```

use std::time::Duration;

use crate::failure::Failure;

/// Faults that follow each other faster than this find nobody who is back from the last one.
const PERIOD_MIN: Duration = Duration::from_millis(100);
/// A pause or partition without `for`: shorter than a lease, longer than anything in a step.
const PAUSE: Duration = Duration::from_secs(2);
/// Items of a schedule: each has random numbers of its own.
const ITEMS_MAX: usize = 64;
/// A longer time is a slip.
const DURATION_MAX: Duration = Duration::from_secs(24 * 3600);

/// What a schedule looks like, for `--help` and for errors.
pub const GRAMMAR: &str = "FAULT every TIME or FAULT at TIME, several with commas between, e.g. \"kill-rank every 3s, pause-node at 5s for 2s\"";

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Fault {
    KillRank,
    KillAllRanks,
    /// An agent and its ranks.
    KillNode,
    KillCoordinator,
    PauseRank,
    PauseNode,
    PauseCoordinator,
    /// No packet between a node and the coordinator or other nodes.
    PartitionNode,
    /// A byte of a shard of the newest committed checkpoint.
    CorruptShard,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Schedule {
    pub items: Vec<Item>,
    /// As it was written.
    pub text: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Item {
    pub fault: Fault,
    pub when: When,
    /// How long a pause or partition lasts; zero for what is over at once.
    pub hold: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    Every(Duration),
    At(Duration),
}

impl Fault {
    pub const ALL: [Self; 9] = [
        Self::KillRank,
        Self::KillAllRanks,
        Self::KillNode,
        Self::KillCoordinator,
        Self::PauseRank,
        Self::PauseNode,
        Self::PauseCoordinator,
        Self::PartitionNode,
        Self::CorruptShard,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::KillRank => "kill-rank",
            Self::KillAllRanks => "kill-all-ranks",
            Self::KillNode => "kill-node",
            Self::KillCoordinator => "kill-coordinator",
            Self::PauseRank => "pause-rank",
            Self::PauseNode => "pause-node",
            Self::PauseCoordinator => "pause-coordinator",
            Self::PartitionNode => "partition-node",
            Self::CorruptShard => "corrupt-shard",
        }
    }

    /// Whether it is over after a time: a pause or a partition.
    pub fn lasts(self) -> bool {
        match self {
            Self::PauseRank | Self::PauseNode | Self::PauseCoordinator | Self::PartitionNode => true,
            Self::KillRank | Self::KillAllRanks | Self::KillNode | Self::KillCoordinator | Self::CorruptShard => false,
        }
    }

    /// Whether ranks that are hit stop stepping.
    pub fn is_of_ranks(self) -> bool {
        match self {
            Self::KillRank | Self::KillAllRanks | Self::KillNode => true,
            Self::PauseRank | Self::PauseNode | Self::PartitionNode => true,
            Self::KillCoordinator | Self::PauseCoordinator | Self::CorruptShard => false,
        }
    }

    fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| fault.name() == word)
    }
}

impl Schedule {
    /// Reads a schedule; errors name the item, the word and the mend (exit code 2).
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let items = text
            .split([',', ';'])
            .enumerate()
            .map(|(index, item)| {
                parse_item(item.trim()).map_err(|problem| {
                    let place = if item.trim().is_empty() { String::new() } else { format!(" {:?}", item.trim()) };
                    Failure::usage(format!("chaos schedule, item {}{place}: {}", index + 1, problem.what))
                        .help(problem.mend)
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        if items.len() > ITEMS_MAX {
            let what = format!("chaos schedule: {} items, the limit is {ITEMS_MAX}", items.len());
            return Err(Failure::usage(what).help("use `every`, which repeats a fault"));
        }
        Ok(Self { items, text: text.trim().to_owned() })
    }
}

struct Problem {
    what: String,
    mend: String,
}

fn problem<T>(what: impl Into<String>, mend: impl Into<String>) -> Result<T, Problem> {
    Err(Problem { what: what.into(), mend: mend.into() })
}

fn parse_item(item: &str) -> Result<Item, Problem> {
    let words: Vec<&str> = item.split_whitespace().collect();
    let Some(name) = words.first() else {
        return problem("it is empty", format!("write {GRAMMAR}"));
    };
    let Some(fault) = Fault::parse(name) else {
        let known: Vec<&str> = Fault::ALL.into_iter().map(Fault::name).collect();
        return problem(format!("there is no fault {name:?}"), format!("faults are {}", known.join(", ")));
    };
    let example = format!("{name} every 3s");
    let (word, time) = match words[1..] {
        [] => return problem("it does not say when", format!("write {example:?}, or {:?}", format!("{name} at 3s"))),
        [word] => return problem(format!("there is no time after {word:?}"), format!("write {example:?}")),
        [word, time, ..] => (word, time),
    };
    let time_read = duration(time).or_else(|what| problem(what, format!("write {example:?}")))?;
    let when = match word {
        "every" if time_read < PERIOD_MIN => {
            let least = PERIOD_MIN.as_millis();
            return problem(format!("every {time} is too often"), format!("use at least {least}ms"));
        }
        "every" => When::Every(time_read),
        "at" => When::At(time_read),
        other => {
            return problem(
                format!("expected every or at after {name}, found {other:?}"),
                format!("write {example:?}, or {:?}", format!("{name} at 3s")),
            );
        }
    };
    let hold = match words[3..] {
        [] if fault.lasts() => PAUSE,
        [] => Duration::ZERO,
        ["for", hold] if fault.lasts() => {
            let mend = format!("write \"{name} {word} {time} for 2s\"");
            match duration(hold) {
                Ok(hold) if hold > Duration::ZERO => hold,
                Ok(_) => return problem("a pause or partition of no time is none", mend),
                Err(what) => return problem(what, mend),
            }
        }
        ["for"] => return problem("there is no time after \"for\"", format!("write \"{name} {word} {time} for 2s\"")),
        ["for", _] => {
            return problem(
                format!("{name} takes no `for`: only pauses and partitions last"),
                format!("write {example:?}"),
            );
        }
        [other, ..] => {
            return problem(format!("{other:?} is too much"), "separate faults with commas".to_owned());
        }
    };
    Ok(Item { fault, when, hold })
}

/// `500ms`, `1.5s`, `2m`, `1h`; also the values of arguments.
pub fn duration(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, f64); 4] = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    let wrong = || format!("{text:?} is no time: write a number and ms, s, m or h, for example 3s or 500ms");
    let (digits, seconds) =
        UNITS.iter().find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, *seconds))).ok_or_else(wrong)?;
    if digits.is_empty() || !digits.chars().all(|c| c.is_ascii_digit() || c == '.') {
        return Err(wrong());
    }
    let number: f64 = digits.parse().map_err(|_| wrong())?;
    Duration::try_from_secs_f64(number * seconds)
        .ok()
        .filter(|duration| *duration <= DURATION_MAX)
        .ok_or_else(|| format!("{text:?} is too long: a day is the limit"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Exit;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn a_schedule_is_items_with_commas_or_semicolons_between() {
        let schedule =
            Schedule::parse("pause-node every 5s for 500ms,kill-coordinator at 1.5m; pause-rank at 3s").unwrap();
        let item = |fault, when, hold| Item { fault, when, hold };
        assert_eq!(
            schedule.items,
            [
                item(Fault::PauseNode, When::Every(seconds(5)), Duration::from_millis(500)),
                item(Fault::KillCoordinator, When::At(seconds(90)), Duration::ZERO),
                item(Fault::PauseRank, When::At(seconds(3)), PAUSE),
            ]
        );
    }

    #[test]
    fn every_fault_reads_back() {
        for fault in Fault::ALL {
            let schedule = Schedule::parse(&format!(" {}  every 3s ", fault.name())).unwrap();
            assert_eq!((schedule.items.len(), schedule.items[0].fault), (1, fault));
        }
    }

    #[test]
    fn errors_say_what_where_and_how_to_mend_it() {
        for (text, what, mend) in [
            ("", "item 1: it is empty", "kill-rank every 3s"),
            ("kill-rank every 3s,", "item 2: it is empty", "commas"),
            (
                "kill-rank every 3s, kil-rank at 1s",
                "item 2 \"kil-rank at 1s\": there is no fault \"kil-rank\"",
                "kill-rank",
            ),
            ("kill-rank", "it does not say when", "kill-rank at 3s"),
            ("kill-rank every", "no time after \"every\"", "kill-rank every 3s"),
            ("kill-rank each 3s", "expected every or at after kill-rank, found \"each\"", "kill-rank every 3s"),
            ("kill-rank every 3", "\"3\" is no time", "kill-rank every 3s"),
            ("kill-rank every -3s", "\"-3s\" is no time", "kill-rank every 3s"),
            ("kill-rank every 1.2.3s", "is no time", "kill-rank every 3s"),
            ("kill-rank every infs", "is no time", "kill-rank every 3s"),
            ("kill-rank every 99h", "is too long", "kill-rank every 3s"),
            ("kill-rank every 10ms", "too often", "100ms"),
            ("kill-rank every 3s for 2s", "takes no `for`", "kill-rank every 3s"),
            ("pause-rank every 3s for", "no time after \"for\"", "pause-rank every 3s for 2s"),
            ("pause-rank every 3s for x", "\"x\" is no time", "pause-rank every 3s for 2s"),
            ("pause-rank at 3s for 0s", "no time is none", "pause-rank at 3s for 2s"),
            ("kill-rank every 3s kill-node at 3s", "\"kill-node\" is too much", "commas"),
        ] {
            let failure = Schedule::parse(text).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.message().contains(what), "{text:?}: {}", failure.message());
            assert!(failure.help_text().contains(mend), "{text:?}: {}", failure.help_text());
        }
    }
}
