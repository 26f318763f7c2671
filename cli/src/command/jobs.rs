//! `stoke jobs`: all jobs, newest first.

use stoke_protocol::message::client::{JobState, JobView, Reply, Request, ServesView};
use stoke_protocol::message::serve::Traffic;

use super::connect;
use crate::Global;
use crate::client::{Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::{json, output};

const EXAMPLES: &str = "\
Examples:
  stoke jobs
  stoke jobs --json | jq -r '.jobs[] | select(.state == \"failed\") | .job'";

/// List jobs
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {}

pub async fn run(_args: Args, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let Reply::Jobs(jobs) = client.ask(&Request::Jobs, Repeat::Safe).await? else { return Err(unexpected()) };
    if global.json {
        let jobs: Vec<_> = jobs.iter().map(json::job).collect();
        output::print_json(&serde_json::json!({ "jobs": jobs }))?;
        return Ok(Exit::Ok);
    }
    let mut table = output::Table::new(&["JOB", "NAME", "STATE", "RANKS", "STEP", "LOSS", "OWNER", "AGE", "REASON"]);
    for job in jobs.iter() {
        table.row(row(job));
    }
    output::print(&table.render())?;
    Ok(Exit::Ok)
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

fn reason(job: &JobView) -> String {
    let slow: Vec<String> =
        job.slow.iter().map(|(rank, times)| format!("{rank} is {times:.1} times as slow as the others")).collect();
    match &job.serves {
        _ if !job.reason.is_empty() => job.reason.clone(),
        Some(ServesView { model, ready, .. }) if job.state == JobState::Running => {
            let what = match job.traffic {
                Some(traffic @ Traffic::Share { .. }) => {
                    format!("serves {model}, a share of {}", json::share(traffic).unwrap_or_default())
                }
                Some(Traffic::Shadow) => format!("shadows {model}"),
                Some(Traffic::Leaving) => format!("leaves {model} when its answers are over"),
                Some(Traffic::Rest) | None => format!("serves {model}"),
            };
            if *ready { what } else { format!("{what}, not ready") }
        }
        Some(_) | None => slow.join(", "),
    }
}
