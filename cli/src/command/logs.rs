//! `stoke logs`: what ranks print. Owns the order in which lines of several ranks are shown.

use std::collections::BTreeMap;

use stoke_protocol::ids::{JobId, Rank};
use stoke_protocol::message::client::{Reply, Request};
use stoke_protocol::message::node::LogChunk;
use stoke_protocol::message::rank::RankId;

use super::connect;
use crate::Global;
use crate::client::{Client, Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::named::{self, Among};
use crate::{json, output};

const EXAMPLES: &str = "\
Examples:
  stoke logs job-3 --tail 50
  stoke logs job-3 -f --rank 1
  stoke logs smollm2-135m-instruct -f";

/// Lines are put in order until so many bytes of them have come; what comes then is shown as it comes. Logs of ranks may have 16 MiB each.
const HELD_BYTES_MAX: usize = 64 << 20;
/// How lines of ranks begin, digit for digit: UTC.
const STAMP: &str = "0000-00-00T00:00:00.000000Z";
/// The same with JSON around it.
const BEFORE_STAMP: &str = "{\"timestamp\":\"";

/// Show the output of a job's ranks
///
/// Lines of several ranks stand in the order of the time stamps that ranks give them, by the clocks of their machines; a line without one, as
/// commands print them, stays behind the line before it. With --follow lines come in the order in which they arrive.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The job, e.g. job-3; or the model that it serves, or its name
    #[arg(value_name = "JOB|MODEL")]
    job: String,

    /// Keep printing what is written later, until the job has ended
    #[arg(short, long)]
    follow: bool,

    /// Only this rank
    #[arg(long, value_name = "R")]
    rank: Option<Rank>,

    /// Only the last lines of what is there
    #[arg(long, value_name = "N")]
    tail: Option<u32>,
}

/// A job that was never placed has no ranks yet: any may come.
async fn must_be_a_rank(client: &mut Client, job: JobId, rank: Rank) -> Result<(), Failure> {
    let Reply::Job(view) = client.ask(&Request::Job { job }, Repeat::Safe).await? else { return Err(unexpected()) };
    match view.world_sizes.last() {
        Some(world) if rank.0 >= *world => {
            let ranks = output::count(*world, "rank");
            Err(Failure::new(Exit::NotFound, format!("{job} has no {rank}: it has {ranks}, counted from 0")))
        }
        Some(_) | None => Ok(()),
    }
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let Args { job, follow, rank, tail } = args;
    let job = named::job(&mut client, &job, Among::All).await?;
    if let Some(rank) = rank {
        must_be_a_rank(&mut client, job, rank).await?;
    }
    let mut answers = client.stream(&Request::Logs { job, rank, tail, follow }).await?;
    let mut held = Held { logs: BTreeMap::new(), bytes: if follow { HELD_BYTES_MAX } else { 0 } };
    while let Some(reply) = answers.next().await? {
        let chunk = match reply {
            Reply::Log(chunk) => chunk,
            Reply::Refused(refusal) => return Err(refusal.into()),
            _ => return Err(unexpected()),
        };
        let last = chunk.last;
        held.push(chunk);
        if last || held.bytes >= HELD_BYTES_MAX {
            held.take().iter().try_for_each(|chunk| tell(chunk, global.json))?;
        }
        if last {
            break;
        }
    }
    Ok(Exit::Ok)
}

fn tell(chunk: &LogChunk, as_json: bool) -> Result<(), Failure> {
    if as_json {
        return json::log_lines(chunk).try_for_each(|line| output::print_json_line(&line));
    }
    let text: String = chunk.lines.iter().map(|line| format!("[{}] {line}\n", chunk.id.rank)).collect();
    output::print(&text)
}

/// Lines that wait for those of other ranks.
struct Held {
    logs: BTreeMap<RankId, Vec<String>>,
    bytes: usize,
}

impl Held {
    fn push(&mut self, chunk: LogChunk) {
        self.bytes = chunk.lines.iter().fold(self.bytes, |bytes, line| bytes.saturating_add(line.len()));
        self.logs.entry(chunk.id).or_default().extend(chunk.lines.0);
    }

    /// All of them, by their time stamps.
    fn take(&mut self) -> Vec<LogChunk> {
        let logs = std::mem::take(&mut self.logs);
        let mut lines: Vec<(&str, RankId, &String)> = Vec::new();
        for (id, log) in &logs {
            let mut newest = "";
            for line in log {
                // A log keeps its own order: what is older than the line before it stays there.
                newest = newest.max(stamp(line).unwrap_or_default());
                lines.push((newest, *id, line));
            }
        }
        lines.sort_by_key(|(stamp, ..)| *stamp);
        let runs = lines.chunk_by(|(_, one, _), (_, other, _)| one == other);
        let chunk = |run: &[(&str, RankId, &String)]| LogChunk {
            id: run[0].1,
            lines: run.iter().map(|(.., line)| (*line).clone()).collect(),
            last: false,
        };
        runs.map(chunk).collect()
    }
}

fn stamp(line: &str) -> Option<&str> {
    let found = line.strip_prefix(BEFORE_STAMP).unwrap_or(line).get(..STAMP.len())?;
    let fits = |(byte, form): (u8, u8)| if form == b'0' { byte.is_ascii_digit() } else { byte == form };
    found.bytes().zip(STAMP.bytes()).all(fits).then_some(found)
}

#[cfg(test)]
mod tests {
    use stoke_protocol::ids::Generation;

    use super::*;

    #[test]
    fn lines_of_several_ranks_stand_by_their_time_stamps() {
        let id = |rank| RankId { job: JobId(1), generation: Generation(1), rank: Rank(rank) };
        let at = |second: u32, text: &str| format!("2026-11-28T09:43:{second:02}.000000Z  INFO {text}");
        let json = "{\"timestamp\":\"2026-11-28T09:43:04.000000Z\",\"level\":\"INFO\"}".to_owned();
        let mut held = Held { logs: BTreeMap::new(), bytes: 0 };
        let none = || "no stamp: 2026-11-28".to_owned();
        for (rank, lines) in [
            (1, vec![none(), at(2, "b"), none(), at(5, "e")]),
            (0, vec![at(1, "a"), at(3, "c")]),
            (0, vec![at(2, "late"), json.clone()]),
        ] {
            held.push(LogChunk { id: id(rank), lines: lines.into(), last: false });
        }
        let told: Vec<(u32, Vec<String>)> =
            held.take().into_iter().map(|chunk| (chunk.id.rank.0, chunk.lines.0)).collect();
        let expected = vec![
            (1, vec![none()]),
            (0, vec![at(1, "a")]),
            (1, vec![at(2, "b"), none()]),
            (0, vec![at(3, "c"), at(2, "late"), json]),
            (1, vec![at(5, "e")]),
        ];
        assert_eq!(told, expected);
        assert!(held.take().is_empty());
    }
}
