//! `stoke serve promote` and `stoke serve rollback`: a revision of a model takes over, or is taken back. Also what is said of who serves a model.

use stoke_protocol::ids::JobId;
use stoke_protocol::message::client::{Reply, Request};

use super::connect;
use crate::Global;
use crate::client::{Repeat, unexpected};
use crate::failure::{Exit, Failure};
use crate::output;

const PROMOTE_EXAMPLES: &str = "\
Examples:
  stoke serve new.toml --set serve.share=0.1      # job-7 gets a tenth of the new requests
  stoke serve promote job-7                       # now it gets all of them, and the others leave";

const ROLLBACK_EXAMPLES: &str = "\
Examples:
  stoke serve new.toml --set serve.share=0.1
  stoke serve rollback smollm2-135m-instruct      # as it was before";

/// Let a revision have all requests of its model: its share or shadow ends, and jobs of other revisions leave
///
/// Jobs that leave take no new requests, end the answers that they have begun (for up to ten minutes), and are cancelled then.
#[derive(clap::Args, Debug)]
#[command(after_help = PROMOTE_EXAMPLES)]
pub struct Promote {
    /// A job of the revision; the others of the same revision are promoted with it
    job: JobId,
}

/// Take back what is tried: jobs of a model with a share or a shadow leave
///
/// Answers that they have begun are ended (for up to ten minutes); then they are cancelled.
#[derive(clap::Args, Debug)]
#[command(after_help = ROLLBACK_EXAMPLES)]
pub struct Rollback {
    /// The model, as clients name it
    model: String,
}

pub async fn promote(args: Promote, global: &Global) -> Result<Exit, Failure> {
    change(Request::Promote { job: args.job }, global).await
}

pub async fn rollback(args: Rollback, global: &Global) -> Result<Exit, Failure> {
    change(Request::Rollback { model: args.model }, global).await
}

/// Asks for a change of who serves a model, and says what came of it.
pub async fn change(request: Request, global: &Global) -> Result<Exit, Failure> {
    let mut client = connect(global).await?;
    let reply = client.ask(&request, Repeat::Safe).await?;
    let Reply::Serving { model, jobs, added, leaving } = reply else { return Err(unexpected()) };
    if global.json {
        let texts = |jobs: &[JobId]| -> Vec<String> { jobs.iter().map(JobId::to_string).collect() };
        output::print_json(&serde_json::json!({
            "model": model, "jobs": texts(&jobs), "added": texts(&added), "leaving": texts(&leaving),
        }))?;
        return Ok(Exit::Ok);
    }
    let mut text = format!("{model} is served by {}\n", list(&jobs));
    if !added.is_empty() {
        text += &format!("new: {}; `stoke status JOB` shows how far they are\n", list(&added));
    }
    if !leaving.is_empty() {
        text += &format!("leaving, when their answers are over: {}\n", list(&leaving));
    }
    output::print(&text)?;
    Ok(Exit::Ok)
}

fn list(jobs: &[JobId]) -> String {
    jobs.iter().map(JobId::to_string).collect::<Vec<_>>().join(", ")
}
