//! `stoke chaos`: faults on the local cluster of `stoke up`, by a seeded schedule, and the account of what they did.

use std::time::Duration;

use super::stop_signal;
use crate::Global;
use crate::chaos::schedule::{self, Schedule};
use crate::chaos::storm::Storm;
use crate::failure::{Exit, Failure};
use crate::local::folder::Folder;
use crate::{output, place};

const EXAMPLES: &str = "\
Examples:
  stoke up --nodes 3 && stoke submit jobs/specs/domains.toml
  stoke chaos \"kill-rank every 3s\" --for 20s
  stoke chaos \"pause-node every 5s for 2s, kill-coordinator at 4s\" --seed 7
  stoke chaos \"lose-packets every 5s for 3s by 10%, slow-rank at 4s by 50%\" --for 30s
  stoke chaos \"kill-rank every 2s\" --json | jq '.jobs[].steps_lost'

The schedule is one or more of FAULT every TIME and FAULT at TIME, with commas or semicolons between; TIME is a number and ms, s, m or h.
What lasts takes `for TIME`, and some faults `by AMOUNT`, behind it.
  kill-rank          kill -9 of one rank's process
  kill-all-ranks     kill -9 of all of them at once: jobs go on from their checkpoints
  kill-node          kill -9 of an agent and its ranks; the agent is started again
  kill-agent         kill -9 of an agent alone; it is started again, and its ranks step on
  kill-coordinator   kill -9 of the coordinator; it is started again on its journal
  pause-rank         SIGSTOP, and SIGCONT after `for TIME` (2s if not given); so for the next two
  pause-node         an agent and its ranks
  pause-coordinator
  partition-node     no packet between a node and the coordinator or other nodes, for `for TIME` (2s if not given)
  partition-inbound  none towards the node; partition-outbound: none from it
  lose-packets       a share of the packets between a node and others is lost, `by 5%`; all of these last `for TIME`
  delay-packets      each of them comes late, `by 20ms`
  reorder-packets    a share of them is held back and overtaken, `by 20%`
  duplicate-packets  a share of them comes twice, `by 20%`
  slow-rank          a rank's process stands for a share of the time, `by 50%`; slow-node: an agent and its ranks do
  fill-disk          nothing more can be written beside the newest checkpoint; needs root
  corrupt-shard      flips a bit of a shard of the newest committed checkpoint, and does not mend it
  corrupt-rank       flips a bit of the parameters in the memory of one rank
Moments move a little by the seed: with `every` by up to a fifth of the period, with `at` by up to half a second. Who is struck is drawn too.

The account says for each job:
  steps begun again       were under way when ranks were lost
  committed steps lost    were done again from a checkpoint, as far as reports told of them (they come twice a second)
  samples lost            those of a finished job's steps, less those that it counts: 0
  without progress        from the blow until the job went on, and times without a step that last over a second
  committed               samples of committed steps a second, and the share of the time in which the job made progress
Only processes that this local cluster has started are touched.";

/// After the last fault: a node that was paused is back in its lease, a job that lost all its ranks trains again.
pub const SETTLE_MAX: Duration = Duration::from_secs(20);

/// Kill, pause and damage parts of the local cluster by a seeded schedule, and tell what it did to the jobs
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Faults and when they strike, e.g. "kill-rank every 3s, kill-coordinator at 4s"
    #[arg(value_name = "SCHEDULE")]
    schedule: String,

    /// How long; Ctrl-C ends it sooner, with the account
    #[arg(long = "for", value_name = "TIME", default_value = "60s", value_parser = schedule::duration)]
    duration: Duration,

    /// Moments and victims; the same seed strikes in the same way [default: a fresh one, told in the account]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let schedule = Schedule::parse_for_use(&args.schedule)?;
    let folder = Folder::new(&place::cluster_dir(global.cluster.as_deref())?);
    if folder.holder().is_none() {
        return Err(Failure::new(Exit::NotFound, format!("no local cluster runs in {}", folder.dir.display()))
            .help("start one with `stoke up`, or name its folder with --cluster; other clusters are not touched"));
    }
    let interrupted = stop_signal()?;
    let storm = Storm::new(&folder, &schedule, args.seed.unwrap_or_else(fresh_seed), None);
    let ended = tokio::select! {
        failure = rage(Some(&storm), |text| output::say(text)) => return cut_short(&storm, failure, global),
        () = tokio::time::sleep(args.duration) => Exit::Ok,
        () = interrupted => Exit::Interrupted,
    };
    let account = storm.settle(SETTLE_MAX).await;
    if global.json {
        output::print_json(&account.json())?;
    } else {
        output::print(&account.text())?;
    }
    Ok(if ended == Exit::Ok && account.has_losses() { Exit::Negative } else { ended })
}

/// The cluster is gone: nobody is waited for, and what was done until then is told.
fn cut_short(storm: &Storm, failure: Failure, global: &Global) -> Result<Exit, Failure> {
    let account = storm.account();
    if !global.json {
        output::print(&account.text())?;
    }
    Err(failure.beside(account.json()))
}

/// Resolves when the cluster is gone; never without a storm.
pub async fn rage(storm: Option<&Storm>, note: impl Fn(&str)) -> Failure {
    match storm {
        Some(storm) => storm.rage(note).await,
        None => std::future::pending().await,
    }
}

pub fn fresh_seed() -> u64 {
    // Short enough to be typed again.
    u64::from(rand::random::<u16>())
}
