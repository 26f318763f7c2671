//! The schedule of faults as a person writes it. Owns the grammar and its errors; draws nothing and touches no process.
//!
//! ```text
//! schedule = item { ("," | ";") item }
//! item     = fault ( "every" | "at" ) duration [ "for" duration ] [ "by" amount ]
//! duration = number ( "ms" | "s" | "m" | "h" )
//! amount   = number "%" | duration
//! ```

use std::fmt;
use std::time::Duration;

use super::disk;
use crate::failure::Failure;

/// Faults that follow each other faster than this find nobody who is back from the last one.
const PERIOD_MIN: Duration = Duration::from_millis(100);
/// What lasts, without `for`: shorter than a lease, longer than anything in a step.
const PAUSE: Duration = Duration::from_secs(2);
/// Items of a schedule: each has random numbers of its own.
const ITEMS_MAX: usize = 64;
/// All of it is a partition or a pause.
const PERCENT_MAX: u16 = 95;
/// Packets that are later than this are lost, as every time-out sees it.
const DELAY_MS_MAX: u16 = 2_000;
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
    /// An agent alone.
    KillAgent,
    KillCoordinator,
    PauseRank,
    PauseNode,
    PauseCoordinator,
    /// No packet between a node and the coordinator or other nodes.
    PartitionNode,
    /// None towards the node.
    PartitionInbound,
    /// None from it.
    PartitionOutbound,
    /// A share of the packets between a node and others.
    LosePackets,
    /// All of them come late.
    DelayPackets,
    /// A share of them is held back.
    ReorderPackets,
    /// A share of them comes twice.
    DuplicatePackets,
    /// A rank stands for a share of the time.
    SlowRank,
    /// An agent and its ranks do.
    SlowNode,
    /// Nothing can be written beside the newest committed checkpoint.
    FillDisk,
    /// A byte of a shard of the newest committed checkpoint.
    CorruptShard,
    /// A bit of a rank's parameters, in its memory.
    CorruptRank,
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
    /// How long it lasts; zero for what is over at once.
    pub hold: Duration,
    /// How much, where that is a question.
    pub amount: Option<Amount>,
}

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Amount {
    /// Of a hundred.
    Percent(u16),
    Ms(u16),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    Every(Duration),
    At(Duration),
}

impl Fault {
    pub const ALL: [Self; 20] = [
        Self::KillRank,
        Self::KillAllRanks,
        Self::KillNode,
        Self::KillAgent,
        Self::KillCoordinator,
        Self::PauseRank,
        Self::PauseNode,
        Self::PauseCoordinator,
        Self::PartitionNode,
        Self::PartitionInbound,
        Self::PartitionOutbound,
        Self::LosePackets,
        Self::DelayPackets,
        Self::ReorderPackets,
        Self::DuplicatePackets,
        Self::SlowRank,
        Self::SlowNode,
        Self::FillDisk,
        Self::CorruptShard,
        Self::CorruptRank,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::KillRank => "kill-rank",
            Self::KillAllRanks => "kill-all-ranks",
            Self::KillNode => "kill-node",
            Self::KillAgent => "kill-agent",
            Self::KillCoordinator => "kill-coordinator",
            Self::PauseRank => "pause-rank",
            Self::PauseNode => "pause-node",
            Self::PauseCoordinator => "pause-coordinator",
            Self::PartitionNode => "partition-node",
            Self::PartitionInbound => "partition-inbound",
            Self::PartitionOutbound => "partition-outbound",
            Self::LosePackets => "lose-packets",
            Self::DelayPackets => "delay-packets",
            Self::ReorderPackets => "reorder-packets",
            Self::DuplicatePackets => "duplicate-packets",
            Self::SlowRank => "slow-rank",
            Self::SlowNode => "slow-node",
            Self::FillDisk => "fill-disk",
            Self::CorruptShard => "corrupt-shard",
            Self::CorruptRank => "corrupt-rank",
        }
    }

    /// Whether it is over after a time.
    pub fn lasts(self) -> bool {
        match self {
            Self::PauseRank | Self::PauseNode | Self::PauseCoordinator => true,
            Self::PartitionNode | Self::PartitionInbound | Self::PartitionOutbound => true,
            Self::LosePackets | Self::DelayPackets | Self::ReorderPackets | Self::DuplicatePackets => true,
            Self::SlowRank | Self::SlowNode | Self::FillDisk => true,
            Self::KillRank | Self::KillAllRanks | Self::KillNode | Self::KillAgent => false,
            Self::KillCoordinator | Self::CorruptShard | Self::CorruptRank => false,
        }
    }

    /// How much, if nothing else is written; none where that is no question.
    pub fn amount(self) -> Option<Amount> {
        match self {
            Self::LosePackets => Some(Amount::Percent(5)),
            Self::DelayPackets => Some(Amount::Ms(20)),
            Self::ReorderPackets | Self::DuplicatePackets => Some(Amount::Percent(20)),
            Self::SlowRank | Self::SlowNode => Some(Amount::Percent(50)),
            Self::PauseRank | Self::PauseNode | Self::PauseCoordinator => None,
            Self::PartitionNode | Self::PartitionInbound | Self::PartitionOutbound | Self::FillDisk => None,
            Self::KillRank | Self::KillAllRanks | Self::KillNode | Self::KillAgent => None,
            Self::KillCoordinator | Self::CorruptShard | Self::CorruptRank => None,
        }
    }

    /// Whether it can keep ranks that are hit from stepping.
    pub fn is_of_ranks(self) -> bool {
        match self {
            Self::KillRank | Self::KillAllRanks | Self::KillNode => true,
            Self::PauseRank | Self::PauseNode | Self::SlowRank | Self::SlowNode | Self::CorruptRank => true,
            Self::PartitionNode | Self::PartitionInbound | Self::PartitionOutbound => true,
            Self::LosePackets | Self::DelayPackets | Self::ReorderPackets | Self::DuplicatePackets => true,
            Self::KillAgent | Self::KillCoordinator | Self::PauseCoordinator | Self::FillDisk | Self::CorruptShard => {
                false
            }
        }
    }

    fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| fault.name() == word)
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Percent(share) => write!(f, "{share}%"),
            Self::Ms(ms) => write!(f, "{ms}ms"),
        }
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

    /// Reads a schedule that this process may carry out.
    pub fn parse_for_use(text: &str) -> Result<Self, Failure> {
        let schedule = Self::parse(text)?;
        if schedule.items.iter().any(|item| item.fault == Fault::FillDisk) {
            disk::check_rights()?;
        }
        Ok(schedule)
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
    let (hold, amount) = limits(fault, &words[3..], &format!("{name} {word} {time}"))?;
    Ok(Item { fault, when, hold, amount })
}

/// `for` and `by`, in any order; `before` is what stands before them.
fn limits(fault: Fault, mut words: &[&str], before: &str) -> Result<(Duration, Option<Amount>), Problem> {
    let mut hold = if fault.lasts() { PAUSE } else { Duration::ZERO };
    let mut amount = fault.amount();
    let by = amount.map(|amount| format!("write \"{before} by {amount}\""));
    while let [word, rest @ ..] = words {
        let value = rest.first();
        match (*word, value) {
            ("for", _) if !fault.lasts() => {
                let what = format!("{} takes no `for`: it is over at once", fault.name());
                return problem(what, format!("write {before:?}"));
            }
            ("by", _) if amount.is_none() => {
                return problem(format!("{} takes no `by`", fault.name()), format!("write {before:?}"));
            }
            ("for", None) => {
                return problem("there is no time after \"for\"", format!("write \"{before} for 2s\""));
            }
            ("by", None) => return problem("there is no amount after \"by\"", by.unwrap_or_default()),
            ("for", Some(value)) => {
                let mend = format!("write \"{before} for 2s\"");
                hold = match duration(value) {
                    Ok(hold) if hold > Duration::ZERO => hold,
                    Ok(_) => return problem("a pause or partition of no time is none", mend),
                    Err(what) => return problem(what, mend),
                };
            }
            ("by", Some(value)) => {
                amount = amount
                    .map(|usual| usual.parse(value))
                    .transpose()
                    .or_else(|what| problem(what, by.clone().unwrap_or_default()))?;
            }
            (other, _) => return problem(format!("{other:?} is too much"), "separate faults with commas"),
        }
        words = rest.get(1..).unwrap_or_default();
    }
    Ok((hold, amount))
}

impl Amount {
    /// Another amount of this kind.
    fn parse(self, text: &str) -> Result<Self, String> {
        match self {
            Self::Percent(_) => {
                let share = text.strip_suffix('%').and_then(|digits| digits.parse().ok());
                let share = share.filter(|share| (1..=PERCENT_MAX).contains(share));
                share.map(Self::Percent).ok_or_else(|| format!("{text:?} is no share from 1% to {PERCENT_MAX}%"))
            }
            Self::Ms(_) => {
                let ms = duration(text)?.as_millis();
                let fits = u16::try_from(ms).ok().filter(|ms| (1..=DELAY_MS_MAX).contains(ms));
                fits.map(Self::Ms).ok_or_else(|| format!("{text:?} is no delay from 1ms to {DELAY_MS_MAX}ms"))
            }
        }
    }
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
        let item = |fault, when, hold| Item { fault, when, hold, amount: None };
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
    fn amounts_stand_behind_by_and_have_a_usual_value() {
        let item = |text: &str| Schedule::parse(text).unwrap().items[0];
        let lose = item("lose-packets every 5s by 12% for 3s");
        assert_eq!((lose.hold, lose.amount), (seconds(3), Some(Amount::Percent(12))));
        assert_eq!(item("lose-packets every 5s for 3s by 12%"), lose);
        assert_eq!(item("delay-packets at 1s by 0.1s").amount, Some(Amount::Ms(100)));
        assert_eq!(item("slow-rank at 1s").amount, Some(Amount::Percent(50)));
        assert_eq!(item("partition-inbound at 1s").amount, None);
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
            ("lose-packets every 3s by 100%", "\"100%\" is no share from 1% to 95%", "lose-packets every 3s by 5%"),
            ("lose-packets every 3s by 20ms", "\"20ms\" is no share", "lose-packets every 3s by 5%"),
            ("delay-packets every 3s by 5%", "\"5%\" is no time", "delay-packets every 3s by 20ms"),
            ("delay-packets every 3s by 1m", "\"1m\" is no delay from 1ms", "delay-packets every 3s by 20ms"),
            ("kill-rank every 3s by 5%", "kill-rank takes no `by`", "kill-rank every 3s"),
            ("kill-rank every 3s kill-node at 3s", "\"kill-node\" is too much", "commas"),
        ] {
            let failure = Schedule::parse(text).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.message().contains(what), "{text:?}: {}", failure.message());
            assert!(failure.help_text().contains(mend), "{text:?}: {}", failure.help_text());
        }
    }
}
