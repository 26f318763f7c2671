//! `stoke jobs`: jobs, newest first.

use stoke_protocol::message::client::{JobState, JobView, Reply, Request, ServesView};
use stoke_protocol::message::serve::Traffic;

use super::connect;
use crate::Global;
use crate::client::{Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::{json, output};

const EXAMPLES: &str = "\
Examples:
  stoke jobs             # what waits and runs, and the last that have ended
  stoke jobs --all
  stoke jobs --json | jq -r '.jobs[] | select(.state == \"failed\") | .job'";

/// Of those that have ended, unless all are asked for.
const ENDED_SHOWN_MAX: usize = 10;

/// List jobs: all that wait or run, and the ten newest of those that have ended
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Also older ones that have ended (--json has them always)
    #[arg(long)]
    all: bool,
}

pub async fn run(args: Args, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let Reply::Jobs(jobs) = client.ask(&Request::Jobs, Repeat::Safe).await? else { return Err(unexpected()) };
    if global.json {
        let jobs: Vec<_> = jobs.iter().map(json::job).collect();
        output::print_json(&serde_json::json!({ "jobs": jobs }))?;
        return Ok(Exit::Ok);
    }
    let mut table = output::Table::new(&["JOB", "NAME", "STATE", "RANKS", "STEP", "LOSS", "OWNER", "AGE", "REASON"]);
    let (shown, left) = shown(&jobs, if args.all { usize::MAX } else { ENDED_SHOWN_MAX });
    for job in shown {
        table.row(row(job));
    }
    output::print(&table.render())?;
    if left > 0 {
        output::say(format_args!("{} more ended before: --all lists them", output::count(left as u64, "job")));
    }
    Ok(Exit::Ok)
}

/// Those that have not ended, and so many of the others; and how many are left out.
fn shown(jobs: &[JobView], ended_max: usize) -> (Vec<&JobView>, usize) {
    let mut ended = 0;
    let shown: Vec<&JobView> = jobs
        .iter()
        .filter(|job| {
            ended += usize::from(job.state.is_terminal());
            !job.state.is_terminal() || ended <= ended_max
        })
        .collect();
    let left = jobs.len() - shown.len();
    (shown, left)
}

fn row(job: &JobView) -> [String; 9] {
    let (step, loss) = match (&job.outcome, &job.progress) {
        (Some(outcome), _) => (outcome.step.0.to_string(), format!("{:.4}", outcome.loss)),
        (None, Some(progress)) => {
            (format!("{}/{}", progress.step.0, progress.steps.0), format!("{:.4}", progress.loss))
        }
        (None, None) => ("-".into(), "-".into()),
    };
    [
        job.job.to_string(),
        job.name.clone(),
        json::job_state(job.state).to_owned(),
        job.world_sizes.last().map_or("-".into(), ToString::to_string),
        step,
        loss,
        job.owner.clone(),
        output::age(job.submitted_ms),
        reason(job),
    ]
}

/// How much a model that is served has to do here, and how many of its replicas answer.
fn figures(serves: &ServesView) -> String {
    let ServesView { load, replicas, answering, .. } = serves;
    let replicas = if *replicas > 1 { format!(", {answering} of {replicas} replicas answer") } else { String::new() };
    let Some(load) = load else { return replicas };
    let waiting = if load.waiting > 0 { format!(", {} waiting", load.waiting) } else { String::new() };
    let running = output::count(load.running, "request");
    format!("{replicas}: {running} running{waiting}, {:.1} tokens/s", load.tokens_per_second)
}

fn reason(job: &JobView) -> String {
    let slow: Vec<String> =
        job.slow.iter().map(|(rank, times)| format!("{rank} is {times:.1} times as slow as the others")).collect();
    match &job.serves {
        _ if !job.reason.is_empty() => job.reason.clone(),
        Some(serves @ ServesView { model, ready, .. }) if job.state == JobState::Running => {
            let what = match job.traffic {
                Some(traffic @ Traffic::Share { .. }) => {
                    format!("serves {model}, a share of {}", json::share(traffic).unwrap_or_default())
                }
                Some(Traffic::Shadow) => format!("shadows {model}"),
                Some(Traffic::Leaving) => format!("leaves {model} when its answers are over"),
                Some(Traffic::Rest) | None => format!("serves {model}"),
            };
            if *ready { format!("{what}{}", figures(serves)) } else { format!("{what}, not ready") }
        }
        Some(_) | None => slow.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use stoke_protocol::message::client::LoadView;

    use super::*;
    use crate::named::tests::{ended, job};

    #[test]
    fn old_jobs_that_have_ended_are_left_out_and_those_that_live_never() {
        let newest_first = [
            ended(job(5, "e", None)),
            job(4, "d", None),
            ended(job(3, "c", None)),
            ended(job(2, "b", None)),
            job(1, "a", Some("chat")),
        ];
        let ids = |most| {
            let (shown, left) = shown(&newest_first, most);
            (shown.iter().map(|job| job.job.0).collect::<Vec<_>>(), left)
        };
        assert_eq!((ids(2), ids(0)), ((vec![5, 4, 3, 1], 1), (vec![4, 1], 3)));
        assert_eq!(ids(usize::MAX), (vec![5, 4, 3, 2, 1], 0));
    }

    #[test]
    fn a_model_that_is_served_is_shown_with_what_it_does() {
        let mut served = job(1, "s", Some("chat"));
        assert_eq!(row(&served)[8], "serves chat");
        let serves = served.serves.as_mut().expect("it serves");
        (serves.replicas, serves.answering) = (3, 2);
        serves.load = Some(LoadView {
            running: 4,
            waiting: 1,
            answers: 9,
            tokens: 99,
            tokens_per_second: 41.25,
            first_token_p50_ms: None,
            first_token_p99_ms: None,
        });
        assert_eq!(
            row(&served)[8],
            "serves chat, 2 of 3 replicas answer: 4 requests running, 1 waiting, 41.2 tokens/s"
        );
    }
}
